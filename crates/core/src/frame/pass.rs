//! Frames of one leg become frames for the other, in the buffer that they were read into.
//!
//! Every header that goes out is no longer than the one that came in, so that the output grows behind the input, and a
//! read full of frames leaves in one write.

use std::ops::Range;

use super::{
    Control, FrameError, FrameReader, Partial, Sender, control, header_size,
    mask::{self, Key, move_short},
    parse_header, write_header,
};

/// A frame with a payload of up to this many bytes leaves as one frame; SDK clients rely on it up to 64 KiB.
pub const HOLD: usize = 64 * 1024;

/// How many bytes of a buffer must be free before its input, for the header of a frame that began in an earlier read.
pub const HEADROOM: usize = 10;

/// The first byte of a whole text message, of a whole binary one, and the bit in the second byte of what is masked.
const TEXT: u8 = 0x81;
const BINARY: u8 = 0x82;
const MASKED: u8 = 0x80;

/// The longest payload whose length fits into the second byte, in bytes; the header is then that long, mask included.
const SMALL: usize = 125;
const SMALL_HEADER: usize = 6;

/// How far a buffer was passed through.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Passage {
    output: Range<usize>,
    input: Range<usize>,
    payload: u64,
    messages: u64,
}

/// Why [`FrameReader::pass`] came to a stop.
#[derive(Debug, PartialEq, Eq)]
pub enum Stop<'a> {
    /// What is left of the input is no whole frame.
    Starved {
        /// How long it is worth waiting for, in bytes from the start of what is left; 0 when that is not known yet.
        wanted: usize,
    },
    /// A whole control frame, which is not passed on.
    Control(Control<'a>),
}

impl Passage {
    /// Begins with the input at `input`, before which [`HEADROOM`] bytes must be free.
    pub fn new(input: Range<usize>) -> Self {
        Self { output: input.start..input.start, input, payload: 0, messages: 0 }
    }

    /// Where the frames stand that go to the other leg.
    pub fn output(&self) -> Range<usize> {
        self.output.clone()
    }

    /// Where the input stands that was not passed on.
    pub fn rest(&self) -> Range<usize> {
        self.input.clone()
    }

    /// How many bytes of payload were passed on.
    pub fn payload(&self) -> u64 {
        self.payload
    }

    /// How many messages came to their end.
    pub fn messages(&self) -> u64 {
        self.messages
    }
}

impl FrameReader {
    /// Passes on frames of messages until the input is used up or a control frame stands before the rest of it.
    ///
    /// With `hold`, a frame of up to [`HOLD`] bytes waits until it is whole. Otherwise, and when it is longer, what is
    /// here of it goes out as a fragment of the same message. To be called again after a control frame.
    pub fn pass<'a>(
        &mut self,
        buffer: &'a mut [u8],
        passage: &mut Passage,
        hold: bool,
    ) -> Result<Stop<'a>, FrameError> {
        loop {
            if self.partial.is_none() && !self.in_message && self.sender == Sender::Client {
                pass_small(buffer, passage);
            }
            let input = &buffer[passage.input.clone()];
            let (partial, header) = if let Some(partial) = self.partial {
                (partial, 0)
            } else {
                let Some(header) = parse_header(input, self.sender)? else {
                    return Ok(Stop::Starved { wanted: 0 });
                };
                self.check_sequence(&header)?;
                let is_control = header.opcode.is_control();
                if (is_control || hold && header.length <= HOLD as u64) && input.len() < header.end() {
                    return Ok(Stop::Starved { wanted: header.end() });
                }
                if is_control {
                    let start = passage.input.start;
                    passage.input.start += header.end();
                    let payload = &mut buffer[start + header.size..passage.input.start];
                    return control(&header, payload).map(Stop::Control);
                }
                (Partial::of(&header), header.size)
            };
            let available = input.len() - header;
            if available == 0 && partial.left > 0 {
                return Ok(Stop::Starved { wanted: 0 });
            }
            let piece = self.take(partial, available);

            let payload = passage.input.start + header;
            let end = payload + piece.length;
            if passage.output.is_empty() {
                // The first payload stays where it is.
                let start = payload - header_size(piece.length);
                passage.output = start..start;
            }
            let to = passage.output.end;
            let to = to + write_header(&mut buffer[to..], piece.opcode, piece.fin, piece.length);
            match piece.key {
                Some(key) => mask::move_masked(&mut buffer[to..end], payload - to, key),
                None => buffer.copy_within(payload..end, to),
            }
            passage.output.end = to + piece.length;
            passage.input.start = end;
            passage.payload += piece.length as u64;
            passage.messages += u64::from(piece.fin);
        }
    }
}

/// Passes on the small whole messages that stand next. They are what takes the most steps for a byte, so they take no
/// step that only others need.
fn pass_small(buffer: &mut [u8], passage: &mut Passage) {
    let (mut at, end) = (passage.input.start, passage.input.end);
    while let Some(&[first @ (TEXT | BINARY), second @ (MASKED..=u8::MAX), a, b, c, d]) =
        buffer[at..end].first_chunk()
    {
        let size = second ^ MASKED;
        let length = usize::from(size);
        let payload = at + SMALL_HEADER;
        if length > SMALL || end - payload < length {
            break;
        }
        if passage.output.is_empty() {
            // The first payload stays where it is.
            passage.output = payload - 2..payload - 2;
        }
        let to = passage.output.end;
        (buffer[to], buffer[to + 1]) = (first, size);
        at = payload + length;
        move_short(&mut buffer[to + 2..at], payload - to - 2, Key([a, b, c, d]));
        passage.output.end = to + 2 + length;
        passage.payload += length as u64;
        passage.messages += 1;
    }
    passage.input.start = at;
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::{Event, Opcode, Sender, put_close, put_frame};
    use super::*;

    #[test]
    fn a_read_full_of_frames_is_one_output() {
        let key = [9, 8, 7, 6];
        let input =
            [masked(Opcode::Text, true, b"one", key), masked(Opcode::Binary, true, &[5; 300], key)].concat();
        let mut expected = Vec::new();
        put_frame(&mut expected, Opcode::Text, true, b"one");
        put_frame(&mut expected, Opcode::Binary, true, &[5; 300]);
        let mut reader = FrameReader::new(Sender::Client);
        let (mut buffer, mut passage) = buffer(&input);
        let stop = reader.pass(&mut buffer, &mut passage, true);
        assert_eq!(stop, Ok(Stop::Starved { wanted: 0 }));
        assert_eq!(buffer[passage.output()], expected);
        assert_eq!((passage.payload(), passage.messages(), passage.rest().len()), (303, 2, 0));
    }

    #[test]
    fn a_frame_that_is_not_whole_waits_or_goes_out_as_a_fragment() {
        let frame = masked(Opcode::Binary, true, &[7; 1000], [1, 2, 3, 4]);
        let mut reader = FrameReader::new(Sender::Client);
        let (mut bytes, mut passage) = buffer(&frame[..500]);
        assert_eq!(reader.pass(&mut bytes, &mut passage, true), Ok(Stop::Starved { wanted: frame.len() }));
        assert_eq!((passage.output().len(), passage.rest().len()), (0, 500));

        let mut fragments = Vec::new();
        for input in [&frame[..500], &frame[500..]] {
            let (mut bytes, mut passage) = buffer(input);
            assert_eq!(reader.pass(&mut bytes, &mut passage, false), Ok(Stop::Starved { wanted: 0 }));
            fragments.extend_from_slice(&bytes[passage.output()]);
        }
        let mut expected = Vec::new();
        put_frame(&mut expected, Opcode::Binary, false, &[7; 492]);
        put_frame(&mut expected, Opcode::Continuation, true, &[7; 508]);
        assert_eq!(fragments, expected);
    }

    #[derive(Debug, Clone)]
    struct Frame {
        opcode: Opcode,
        fin: bool,
        payload: Vec<u8>,
    }

    /// Frames in an order that the protocol allows.
    fn frames() -> impl Strategy<Value = Vec<Frame>> {
        let length = prop_oneof![
            6 => 0usize..300, 1 => Just(125), 1 => Just(126), 1 => Just(65_535), 1 => Just(65_536), 1 => Just(65_537),
            1 => 0usize..200_000,
        ];
        let frame = (0u8..6, any::<bool>(), length, any::<u8>());
        prop::collection::vec(frame, 0..12).prop_map(|frames| {
            let mut in_message = false;
            let frames = frames.into_iter().map(|(kind, fin, length, byte)| {
                let (opcode, fin, length) = match (kind, in_message) {
                    (0, _) => (Opcode::Ping, true, length % 126),
                    (1, _) => (Opcode::Pong, true, length % 126),
                    (_, true) => (Opcode::Continuation, fin, length),
                    (2, false) => (Opcode::Text, fin, length),
                    (_, false) => (Opcode::Binary, fin, length),
                };
                in_message = if opcode.is_control() { in_message } else { !fin };
                // A pattern that shows when bytes are at the wrong place.
                let payload =
                    (0..length).map(|at| byte.wrapping_add(u8::try_from(at % 251).unwrap())).collect();
                Frame { opcode, fin, payload }
            });
            frames.collect()
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(96))]

        /// Against a reference that looks at whole frames only: whatever the reads, and however often waiting is given
        /// up, the same messages and control frames come out; frames that may wait leave whole.
        #[test]
        fn passing_on_keeps_every_message(
            frames in frames(),
            key: [u8; 4],
            reads in prop::collection::vec((1usize..70_000, any::<bool>()), 1..8),
            always_hold: bool,
        ) {
            let wire: Vec<u8> =
                frames.iter().flat_map(|frame| masked(frame.opcode, frame.fin, &frame.payload, key)).collect();
            let mut reader = FrameReader::new(Sender::Client);
            let (mut sent_on, mut pings) = (Vec::new(), Vec::new());
            let (mut held, mut left) = (Vec::new(), &wire[..]);
            let (mut payload, mut messages) = (0, 0);
            for &(size, hold) in reads.iter().cycle() {
                let hold = hold || always_hold;
                let (read, rest) = left.split_at(size.min(left.len()));
                left = rest;
                held.extend_from_slice(read);
                let (mut bytes, mut passage) = buffer(&held);
                loop {
                    match reader.pass(&mut bytes, &mut passage, hold).unwrap() {
                        Stop::Starved { wanted } => {
                            let rest = passage.rest().len();
                            prop_assert!(wanted == 0 || wanted > rest, "waits for what is there");
                            prop_assert!(rest < HOLD + super::super::HEADER_MAX, "holds too much");
                            prop_assert!(hold || rest < 140, "holds although it must not");
                            break;
                        }
                        Stop::Control(Control::Ping(payload)) => pings.push(payload.to_vec()),
                        Stop::Control(Control::Pong) => {}
                        Stop::Control(Control::Close(_)) => prop_assert!(false),
                    }
                }
                sent_on.extend_from_slice(&bytes[passage.output()]);
                held = bytes[passage.rest()].to_vec();
                (payload, messages) = (payload + passage.payload(), messages + passage.messages());
                if left.is_empty() {
                    break;
                }
            }
            prop_assert!(held.is_empty(), "{} bytes were not passed on", held.len());
            prop_assert!(!reader.in_message() || frames.iter().rev().find(|f| !f.opcode.is_control()).is_some_and(|f| !f.fin));

            let expected_pings: Vec<_> =
                frames.iter().filter(|f| f.opcode == Opcode::Ping).map(|f| f.payload.clone()).collect();
            prop_assert_eq!(pings, expected_pings);
            let data: Vec<_> = frames.into_iter().filter(|frame| !frame.opcode.is_control()).collect();
            prop_assert_eq!(payload, data.iter().map(|frame| frame.payload.len() as u64).sum::<u64>());
            prop_assert_eq!(messages, data.iter().filter(|frame| frame.fin).count() as u64);
            if always_hold && data.iter().all(|frame| frame.payload.len() <= HOLD) {
                let mut whole = Vec::new();
                for frame in &data {
                    put_frame(&mut whole, frame.opcode, frame.fin, &frame.payload);
                }
                prop_assert!(sent_on == whole, "a frame was broken up");
            }
            prop_assert!(joined(&mut sent_on) == join(data), "other messages come out");
        }

        #[test]
        fn garbage_never_panics_and_never_grows(bytes in prop::collection::vec(any::<u8>(), 0..400), hold: bool) {
            let mut reader = FrameReader::new(Sender::Client);
            let (mut buffer, mut passage) = buffer(&bytes);
            while let Ok(Stop::Control(_)) = reader.pass(&mut buffer, &mut passage, hold) {}
            prop_assert!(passage.output().end <= passage.rest().start);
        }
    }

    #[test]
    fn what_stands_before_a_close_frame_is_passed_on() {
        let mut input = masked(Opcode::Binary, true, b"last", [0; 4]);
        let mut close = Vec::new();
        put_close(&mut close, crate::frame::CloseFrame { code: Some(1000), text: "bye" });
        input.extend(masked(Opcode::Close, true, &close[2..], [3; 4]));
        let mut reader = FrameReader::new(Sender::Client);
        let (mut buffer, mut passage) = buffer(&input);
        match reader.pass(&mut buffer, &mut passage, true) {
            Ok(Stop::Control(Control::Close(close))) => {
                assert_eq!((close.code, close.text), (Some(1000), "bye"));
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(buffer[passage.output()], *b"\x82\x04last");
    }

    /// Messages as type and bytes; one that has no end is marked.
    type Messages = Vec<(Opcode, Vec<u8>, bool)>;

    fn join(frames: Vec<Frame>) -> Messages {
        let mut messages = Messages::new();
        for frame in frames {
            match messages.last_mut() {
                Some((_, payload, fin)) if frame.opcode == Opcode::Continuation => {
                    payload.extend(frame.payload);
                    *fin = frame.fin;
                }
                _ => messages.push((frame.opcode, frame.payload, frame.fin)),
            }
        }
        messages
    }

    fn joined(wire: &mut [u8]) -> Messages {
        let (mut reader, mut at, mut frames) = (FrameReader::new(Sender::Server), 0, Vec::new());
        while let Some((taken, event)) = reader.next(&mut wire[at..]).unwrap() {
            at += taken;
            if let Event::Data { opcode, fin, payload } = event {
                frames.push(Frame { opcode, fin, payload: payload.to_vec() });
            }
        }
        assert_eq!(at, wire.len(), "the output ends in the middle of a frame");
        join(frames)
    }

    fn buffer(input: &[u8]) -> (Vec<u8>, Passage) {
        let mut buffer = vec![0; HEADROOM];
        buffer.extend_from_slice(input);
        let end = buffer.len();
        (buffer, Passage::new(HEADROOM..end))
    }

    fn masked(opcode: Opcode, fin: bool, payload: &[u8], key: [u8; 4]) -> Vec<u8> {
        let mut frame = vec![0; super::super::HEADER_MAX];
        frame.extend_from_slice(payload);
        let start = super::super::mask_frame(&mut frame, opcode, fin, key);
        frame.split_off(start)
    }
}
