//! Frames that are made once and sent often, and frames that are counted and not looked into.

use std::sync::Arc;

use anyhow::{Result, bail};

use crate::number::count;

/// What one write holds at most.
const PATTERN: usize = 1 << 20;
const MAX_HEADER: usize = 14;

/// Masked binary frames, back to back.
#[derive(Debug, Clone)]
pub(crate) struct Pattern {
    bytes: Arc<[u8]>,
    frame: usize,
    payload: usize,
}

impl Pattern {
    /// As many frames as fit into a large write, at least one.
    pub(crate) fn new(payload: usize) -> Self {
        let one = payload + MAX_HEADER;
        Self::of(payload, (PATTERN / one).max(1))
    }

    /// One frame alone.
    pub(crate) fn single(payload: usize) -> Self {
        Self::of(payload, 1)
    }

    fn of(payload: usize, frames: usize) -> Self {
        let content = content(payload);
        let mut bytes = Vec::with_capacity(frames * (payload + MAX_HEADER));
        let mut key = 0x7f4a_7c15_u32;
        for _ in 0..frames {
            // No two neighbours have the same mask, as with real clients.
            key = key.wrapping_add(0x9e37_79b9);
            let mask = key.to_be_bytes();
            bytes.push(0x82);
            push_length(&mut bytes, payload);
            bytes.extend_from_slice(&mask);
            bytes.extend(content.iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask));
        }
        Self { frame: bytes.len() / frames, bytes: bytes.into(), payload }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Length of one frame, header included.
    pub(crate) fn frame(&self) -> usize {
        self.frame
    }

    pub(crate) fn payload(&self) -> usize {
        self.payload
    }

    /// What arrives of each frame, if that is known before: a relay may break up a frame above 64 KiB.
    pub(crate) fn alike(&self, masked: bool) -> Option<Alike> {
        let frame = self.frame - if masked { 0 } else { 4 };
        (self.payload <= 64 << 10).then_some(Alike { frame: count(frame), payload: count(self.payload) })
    }

    /// What the first frame says once its mask is off.
    pub(crate) fn plain(&self) -> Vec<u8> {
        content(self.payload)
    }
}

/// Bytes without a pattern that a mask could hide behind.
fn content(length: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

fn push_length(bytes: &mut Vec<u8>, payload: usize) {
    match (u8::try_from(payload), u16::try_from(payload)) {
        (Ok(short @ ..126), _) => bytes.push(0x80 | short),
        (_, Ok(middle)) => {
            bytes.push(0x80 | 0x7e);
            bytes.extend_from_slice(&middle.to_be_bytes());
        }
        _ => {
            bytes.push(0x80 | 0x7f);
            bytes.extend_from_slice(&count(payload).to_be_bytes());
        }
    }
}

/// A masked Close frame with code 1000.
pub(crate) const CLOSE: [u8; 8] = [0x88, 0x82, 0, 0, 0, 0, 0x03, 0xe8];

/// Counts frames by their headers, masked or not, however the reads cut them.
#[derive(Debug, Default)]
pub(crate) struct FrameCounter {
    /// Messages that are there to their end.
    pub(crate) messages: u64,
    /// Bytes of their payload, and of that which is under way.
    pub(crate) payload: u64,
    /// Whether a Close frame came.
    pub(crate) closed: bool,
    header: [u8; MAX_HEADER],
    filled: usize,
    left: u64,
    control: bool,
    last: bool,
    /// How many bytes were counted without a look at them.
    uniform: u64,
}

/// How long each frame that arrives is, and its payload.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Alike {
    pub(crate) frame: u64,
    pub(crate) payload: u64,
}

#[derive(Debug, PartialEq, Eq)]
struct Header {
    length: usize,
    payload: u64,
    opcode: u8,
    fin: bool,
}

impl FrameCounter {
    /// Takes what one read gave.
    pub(crate) fn feed(&mut self, mut bytes: &[u8]) -> Result<()> {
        self.skip(&mut bytes);
        while !bytes.is_empty() {
            if self.filled == 0
                && let Some(header) = read_header(bytes)?
            {
                bytes = &bytes[header.length..];
                self.begin(&header);
            } else {
                // A header that a read cut in two; rare enough to go byte by byte.
                self.header[self.filled] = bytes[0];
                self.filled += 1;
                bytes = &bytes[1..];
                if let Some(header) = read_header(&self.header[..self.filled])? {
                    self.filled = 0;
                    self.begin(&header);
                }
            }
            self.skip(&mut bytes);
        }
        Ok(())
    }

    /// Takes so many bytes of whole messages that are all alike, and whose frames are not looked at.
    pub(crate) fn count(&mut self, bytes: u64, alike: Alike) {
        self.uniform += bytes;
        let (whole, rest) = (self.uniform / alike.frame, self.uniform % alike.frame);
        self.messages = whole;
        self.payload = whole * alike.payload + rest.saturating_sub(alike.frame - alike.payload);
        self.left = if rest == 0 { 0 } else { alike.frame - rest };
    }

    /// Whether nothing is under way.
    pub(crate) fn is_between(&self) -> bool {
        self.filled == 0 && self.left == 0
    }

    fn begin(&mut self, header: &Header) {
        self.left = header.payload;
        self.control = header.opcode >= 8;
        self.closed |= header.opcode == 8;
        self.last = header.fin && !self.control;
        if self.left == 0 {
            self.messages += u64::from(self.last);
        }
    }

    fn skip(&mut self, bytes: &mut &[u8]) {
        if self.left == 0 {
            return;
        }
        let here = self.left.min(count(bytes.len()));
        self.left -= here;
        if !self.control {
            self.payload += here;
        }
        if self.left == 0 {
            self.messages += u64::from(self.last);
        }
        *bytes = &bytes[usize::try_from(here).unwrap_or(bytes.len())..];
    }
}

fn read_header(bytes: &[u8]) -> Result<Option<Header>> {
    let [first, second, rest @ ..] = bytes else { return Ok(None) };
    let (opcode, short) = (first & 0x0f, second & 0x7f);
    if first & 0x70 != 0 || !matches!(opcode, 0..=2 | 8..=10) {
        bail!("the relay sent something that is no frame: {first:#04x}");
    }
    let mask = if second & 0x80 == 0 { 0 } else { 4 };
    let (extra, payload) = match (short, rest) {
        (126, rest) if let Some(bytes) = rest.first_chunk() => (2, u64::from(u16::from_be_bytes(*bytes))),
        (127, rest) if let Some(bytes) = rest.first_chunk() => (8, u64::from_be_bytes(*bytes)),
        (126 | 127, _) => return Ok(None),
        _ => (0, u64::from(short)),
    };
    let length = 2 + extra + mask;
    Ok((bytes.len() >= length).then_some(Header { length, payload, opcode, fin: first & 0x80 != 0 }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_count_the_same_however_they_are_cut() {
        let mut stream = Vec::new();
        for size in [0, 1, 64, 125, 126, 127, 65_535, 65_536] {
            stream.extend_from_slice(Pattern::single(size).bytes());
        }
        for cut in [1, 2, 3, 7, 13, 14, 15, 4096, stream.len()] {
            let mut counter = FrameCounter::default();
            stream.chunks(cut).for_each(|chunk| counter.feed(chunk).unwrap());
            assert_eq!((counter.messages, counter.payload), (8, 131_514), "cut into {cut}");
            assert!(counter.is_between());
        }
    }

    #[test]
    fn fragments_are_one_message_and_control_frames_are_none() {
        let mut counter = FrameCounter::default();
        counter.feed(&[0x02, 2, 1, 2, 0x89, 1, 9, 0x80, 1, 3]).unwrap();
        assert_eq!((counter.messages, counter.payload, counter.closed), (1, 3, false));
        counter.feed(&CLOSE).unwrap();
        assert_eq!((counter.messages, counter.closed), (1, true));
    }

    #[test]
    fn counted_frames_are_as_many_as_looked_at_ones() {
        let pattern = Pattern::new(16 << 10);
        for cut in [1000, 16_384, 16_385, 100_000] {
            let (mut fed, mut counted) = (FrameCounter::default(), FrameCounter::default());
            for chunk in pattern.bytes().chunks(cut) {
                fed.feed(chunk).unwrap();
                counted.count(count(chunk.len()), pattern.alike(true).unwrap());
                assert_eq!(
                    (counted.messages, counted.payload),
                    (fed.messages, fed.payload),
                    "cut into {cut}"
                );
            }
            assert!(counted.is_between());
        }
    }

    #[test]
    fn half_a_frame_is_no_message() {
        let mut counter = FrameCounter::default();
        counter.feed(&[0x82, 5, 0, 0]).unwrap();
        assert_eq!((counter.messages, counter.payload, counter.is_between()), (0, 2, false));
        assert!(FrameCounter::default().feed(b"HTTP/1.1 200 OK").is_err());
    }

    #[test]
    fn a_pattern_is_what_it_says() {
        for payload in [64, 1024, 16 << 10, 64 << 10, 1 << 20] {
            let pattern = Pattern::new(payload);
            let mut counter = FrameCounter::default();
            counter.feed(pattern.bytes()).unwrap();
            assert_eq!(counter.messages, count(pattern.bytes().len() / pattern.frame()));
            assert_eq!(counter.payload, counter.messages * count(payload));
            let header = pattern.frame() - payload;
            let mask = &pattern.bytes()[header - 4..header];
            let plain: Vec<u8> = pattern.bytes()[header..pattern.frame()]
                .iter()
                .zip(mask.iter().cycle())
                .map(|(a, b)| a ^ b)
                .collect();
            assert_eq!(plain, pattern.plain());
        }
    }
}
