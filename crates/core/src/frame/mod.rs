//! WebSocket frames (RFC 6455, section 5) without I/O: headers are read, payload is passed on.
//!
//! A [`FrameReader`] holds the state of one direction, about 40 bytes, and never payload. A relay calls
//! [`FrameReader::pass`], which turns a buffer of one leg's frames into frames for the other leg where they stand; an
//! end of a stream calls [`FrameReader::next`]. Both come to the same messages, whatever the reads are.

mod mask;
mod pass;

pub use pass::{HEADROOM, HOLD, Passage, Stop};
use thiserror::Error;

use self::mask::Key;

/// The longest header of a frame, in bytes.
pub const HEADER_MAX: usize = 14;

/// The longest payload of a control frame, in bytes (RFC 6455, section 5.5).
pub const CONTROL_MAX: usize = 125;

/// What a frame carries (RFC 6455, section 5.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Opcode {
    /// More of the message before.
    Continuation,
    /// The start of a text message.
    Text,
    /// The start of a binary message.
    Binary,
    /// The end of the connection.
    Close,
    /// Are you there?
    Ping,
    /// I am here.
    Pong,
}

/// Who sent the frames that are read: a client must mask, a server must not (RFC 6455, section 5.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sender {
    /// Frames must be masked.
    Client,
    /// Frames must not be masked.
    Server,
}

/// What is wrong with a frame, which ends the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum FrameError {
    /// A reserved bit is set, and no extension was agreed on.
    #[error("a reserved bit is set")]
    ReservedBit,
    /// An opcode that RFC 6455 does not define.
    #[error("unknown opcode")]
    UnknownOpcode,
    /// A client's frame without a mask.
    #[error("a client's frame must be masked")]
    NotMasked,
    /// A server's frame with a mask.
    #[error("a server's frame must not be masked")]
    Masked,
    /// A control frame in fragments.
    #[error("a control frame must not be fragmented")]
    FragmentedControl,
    /// A control frame of more than 125 bytes.
    #[error("a control frame has at most {CONTROL_MAX} bytes")]
    ControlTooLong,
    /// A length in more bytes than it needs, or with the top bit set.
    #[error("the length is not in its shortest form")]
    Length,
    /// A continuation without a beginning.
    #[error("a continuation without a message")]
    NothingToContinue,
    /// A new message inside another.
    #[error("a new message before the end of the last one")]
    Unfinished,
    /// A close frame with half a code, or a code that must not be sent.
    #[error("a malformed close frame")]
    Close,
    /// A close frame with a text that is not UTF-8.
    #[error("the text of a close frame must be UTF-8")]
    CloseText,
}

impl FrameError {
    /// The code of the close frame that tells the sender (RFC 6455, section 7.4.1).
    pub fn close_code(self) -> u16 {
        if self == Self::CloseText { 1007 } else { 1002 }
    }
}

/// What comes next out of a leg's bytes.
#[derive(Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// A frame of a message, or a piece of one, unmasked.
    Data {
        /// The opcode to send it on with.
        opcode: Opcode,
        /// Whether the message ends here.
        fin: bool,
        /// The bytes.
        payload: &'a [u8],
    },
    /// A whole control frame.
    Control(Control<'a>),
}

/// A control frame, unmasked.
#[derive(Debug, PartialEq, Eq)]
pub enum Control<'a> {
    /// To be answered with a pong that holds the same bytes.
    Ping(&'a [u8]),
    /// A sign of life.
    Pong,
    /// The last frame of this direction.
    Close(CloseFrame<'a>),
}

/// Code and text of a close frame; both empty when the sender gave none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CloseFrame<'a> {
    /// The code, or `None` for a frame without one.
    pub code: Option<u16>,
    /// The text.
    pub text: &'a str,
}

/// Reads the frames of one direction. About 40 bytes; holds no payload.
#[derive(Debug, Clone)]
pub struct FrameReader {
    sender: Sender,
    in_message: bool,
    /// Of the data frame that is passed on in pieces.
    partial: Option<Partial>,
}

/// What is still to come of a data frame.
#[derive(Debug, Clone, Copy)]
struct Partial {
    /// What the next piece is sent on with.
    opcode: Opcode,
    fin: bool,
    left: u64,
    key: Option<Key>,
}

#[derive(Debug, Clone, Copy)]
struct Header {
    fin: bool,
    opcode: Opcode,
    length: u64,
    key: Option<Key>,
    size: usize,
}

/// A data frame, or as much of one as is here.
#[derive(Debug, Clone, Copy)]
struct Piece {
    opcode: Opcode,
    fin: bool,
    length: usize,
    key: Option<Key>,
}

impl FrameReader {
    /// A reader for what `sender` sends.
    pub fn new(sender: Sender) -> Self {
        Self { sender, in_message: false, partial: None }
    }

    /// Takes the next event from the front of `input`, and says how many bytes it took.
    ///
    /// A frame of a message comes out in pieces, as it arrives; a control frame comes out whole. `None` means that more
    /// bytes are needed; what then remains is at most [`HEADER_MAX`] and [`CONTROL_MAX`] together. Payload is
    /// unmasked where it stands.
    pub fn next<'a>(&mut self, input: &'a mut [u8]) -> Result<Option<(usize, Event<'a>)>, FrameError> {
        let (partial, start) = if let Some(partial) = self.partial {
            (partial, 0)
        } else {
            let Some(header) = parse_header(input, self.sender)? else { return Ok(None) };
            self.check_sequence(&header)?;
            if header.opcode.is_control() {
                let end = header.end();
                return match input.get_mut(header.size..end) {
                    None => Ok(None),
                    Some(payload) => Ok(Some((end, Event::Control(control(&header, payload)?)))),
                };
            }
            (Partial::of(&header), header.size)
        };
        let available = input.len() - start;
        if available == 0 && partial.left > 0 {
            return Ok(None);
        }
        let piece = self.take(partial, available);
        let end = start + piece.length;
        let payload = &mut input[start..end];
        if let Some(key) = piece.key {
            mask::mask(payload, key);
        }
        Ok(Some((end, Event::Data { opcode: piece.opcode, fin: piece.fin, payload })))
    }

    /// Whether the leg is in the middle of a message.
    pub fn in_message(&self) -> bool {
        self.in_message
    }

    /// Takes what is here of a frame, of which something must be here unless it is empty.
    #[inline]
    fn take(&mut self, partial: Partial, available: usize) -> Piece {
        let length = usize::try_from(partial.left).map_or(available, |left| left.min(available));
        let left = partial.left - length as u64;
        let fin = partial.fin && left == 0;
        self.in_message = !fin;
        self.partial = (left > 0).then(|| {
            let key = partial.key.map(|key| key.after(length));
            Partial { opcode: Opcode::Continuation, left, key, fin: partial.fin }
        });
        Piece { opcode: partial.opcode, fin, length, key: partial.key }
    }

    #[inline]
    fn check_sequence(&self, header: &Header) -> Result<(), FrameError> {
        match (header.opcode, self.in_message) {
            (Opcode::Continuation, false) => Err(FrameError::NothingToContinue),
            (Opcode::Text | Opcode::Binary, true) => Err(FrameError::Unfinished),
            (Opcode::Continuation, true)
            | (Opcode::Text | Opcode::Binary, false)
            | (Opcode::Close | Opcode::Ping | Opcode::Pong, _) => Ok(()),
        }
    }
}

impl Partial {
    #[inline]
    fn of(header: &Header) -> Self {
        Self { opcode: header.opcode, fin: header.fin, left: header.length, key: header.key }
    }
}

impl Header {
    /// Where the frame ends, counted from its first byte. For frames that are known to be short.
    #[inline]
    fn end(&self) -> usize {
        self.size + usize::try_from(self.length).unwrap_or(usize::MAX / 2)
    }
}

impl Opcode {
    #[inline]
    fn bits(self) -> u8 {
        match self {
            Self::Continuation => 0,
            Self::Text => 1,
            Self::Binary => 2,
            Self::Close => 8,
            Self::Ping => 9,
            Self::Pong => 10,
        }
    }

    #[inline]
    fn is_control(self) -> bool {
        matches!(self, Self::Close | Self::Ping | Self::Pong)
    }
}

/// Reads the payload of a control frame, which must be whole.
fn control<'a>(header: &Header, payload: &'a mut [u8]) -> Result<Control<'a>, FrameError> {
    if let Some(key) = header.key {
        mask::mask(payload, key);
    }
    match header.opcode {
        Opcode::Ping => Ok(Control::Ping(payload)),
        Opcode::Close => Ok(Control::Close(parse_close(payload)?)),
        Opcode::Pong | Opcode::Continuation | Opcode::Text | Opcode::Binary => Ok(Control::Pong),
    }
}

/// How long the header of a frame of this length is, without a mask.
#[inline]
fn header_size(length: usize) -> usize {
    match length {
        0..=125 => 2,
        126..=0xffff => 4,
        _ => 10,
    }
}

/// Writes the header of a frame that is not masked to the front of `output`, and says how long it is.
#[inline]
fn write_header(output: &mut [u8], opcode: Opcode, fin: bool, length: usize) -> usize {
    output[0] = u8::from(fin) << 7 | opcode.bits();
    #[expect(clippy::cast_possible_truncation, reason = "the lengths were just told apart")]
    match length {
        0..=125 => output[1] = length as u8,
        126..=0xffff => {
            output[1] = 126;
            output[2..4].copy_from_slice(&(length as u16).to_be_bytes());
        }
        _ => {
            output[1] = 127;
            output[2..10].copy_from_slice(&(length as u64).to_be_bytes());
        }
    }
    header_size(length)
}

/// Appends the header of a frame that is not masked, as a server sends it.
pub fn put_header(output: &mut Vec<u8>, opcode: Opcode, fin: bool, length: usize) {
    let mut header = [0; HEADROOM];
    let size = write_header(&mut header, opcode, fin, length);
    output.extend_from_slice(&header[..size]);
}

/// Makes a masked frame, as a client sends it, of the payload in `buffer` behind the first [`HEADER_MAX`] bytes, and
/// says where it begins.
///
/// `key` must not be foreseeable for whoever chose the payload (RFC 6455, section 10.3).
pub fn mask_frame(buffer: &mut [u8], opcode: Opcode, fin: bool, key: [u8; 4]) -> usize {
    let length = buffer.len() - HEADER_MAX;
    let start = HEADER_MAX - 4 - header_size(length);
    write_header(&mut buffer[start..], opcode, fin, length);
    buffer[start + 1] |= 0x80;
    buffer[HEADER_MAX - 4..HEADER_MAX].copy_from_slice(&key);
    mask::mask(&mut buffer[HEADER_MAX..], Key(key));
    start
}
/// Appends a whole frame that is not masked.
pub fn put_frame(output: &mut Vec<u8>, opcode: Opcode, fin: bool, payload: &[u8]) {
    put_header(output, opcode, fin, payload.len());
    output.extend_from_slice(payload);
}

/// Appends a close frame. The text is cut to what fits; without a code there is no text.
pub fn put_close(output: &mut Vec<u8>, close: CloseFrame<'_>) {
    let Some(code) = close.code else { return put_header(output, Opcode::Close, true, 0) };
    let text = crate::link::close_text(close.text);
    put_header(output, Opcode::Close, true, 2 + text.len());
    output.extend_from_slice(&code.to_be_bytes());
    output.extend_from_slice(text.as_bytes());
}

#[inline]
fn parse_header(input: &[u8], sender: Sender) -> Result<Option<Header>, FrameError> {
    let &[first, second, ref rest @ ..] = input else { return Ok(None) };
    if first & 0x70 != 0 {
        return Err(FrameError::ReservedBit);
    }
    let fin = first & 0x80 != 0;
    let opcode = match first & 0x0f {
        0 => Opcode::Continuation,
        1 => Opcode::Text,
        2 => Opcode::Binary,
        8 => Opcode::Close,
        9 => Opcode::Ping,
        10 => Opcode::Pong,
        _ => return Err(FrameError::UnknownOpcode),
    };
    let masked = second & 0x80 != 0;
    match (sender, masked) {
        (Sender::Client, false) => return Err(FrameError::NotMasked),
        (Sender::Server, true) => return Err(FrameError::Masked),
        (Sender::Client, true) | (Sender::Server, false) => {}
    }
    let short = second & 0x7f;
    if matches!(opcode, Opcode::Close | Opcode::Ping | Opcode::Pong) {
        if !fin {
            return Err(FrameError::FragmentedControl);
        }
        if usize::from(short) > CONTROL_MAX {
            return Err(FrameError::ControlTooLong);
        }
    }
    let (length, length_size, least) = match short {
        126 => match rest.first_chunk::<2>() {
            None => return Ok(None),
            Some(&bytes) => (u64::from(u16::from_be_bytes(bytes)), 2, 126),
        },
        127 => match rest.first_chunk::<8>() {
            None => return Ok(None),
            Some(&bytes) => (u64::from_be_bytes(bytes), 8, 0x1_0000),
        },
        short => (u64::from(short), 0, 0),
    };
    if length < least || length > i64::MAX as u64 {
        return Err(FrameError::Length);
    }
    let key = match (masked, rest[length_size..].first_chunk::<4>()) {
        (false, _) => None,
        (true, None) => return Ok(None),
        (true, Some(&key)) => Some(Key(key)),
    };
    let size = 2 + length_size + if masked { 4 } else { 0 };
    Ok(Some(Header { fin, opcode, length, key, size }))
}

fn parse_close(payload: &[u8]) -> Result<CloseFrame<'_>, FrameError> {
    match payload {
        [] => Ok(CloseFrame { code: None, text: "" }),
        [_] => Err(FrameError::Close),
        [high, low, text @ ..] => {
            let code = u16::from_be_bytes([*high, *low]);
            // RFC 6455, section 7.4, and the registry that it founds.
            if !matches!(code, 1000..=1003 | 1007..=1014 | 3000..=4999) {
                return Err(FrameError::Close);
            }
            let text = std::str::from_utf8(text).map_err(|_| FrameError::CloseText)?;
            Ok(CloseFrame { code: Some(code), text })
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_examples_of_rfc_6455_section_5_7() {
        let mut masked_hello = [0x81, 0x85, 0x37, 0xfa, 0x21, 0x3d, 0x7f, 0x9f, 0x4d, 0x51, 0x58];
        let mut reader = FrameReader::new(Sender::Client);
        let event = Event::Data { opcode: Opcode::Text, fin: true, payload: b"Hello" };
        assert_eq!(reader.next(&mut masked_hello), Ok(Some((11, event))));

        let mut output = Vec::new();
        put_frame(&mut output, Opcode::Text, true, b"Hello");
        assert_eq!(output, [0x81, 0x05, 0x48, 0x65, 0x6c, 0x6c, 0x6f]);
        output.clear();
        put_header(&mut output, Opcode::Binary, true, 256);
        assert_eq!(output, [0x82, 0x7e, 0x01, 0x00]);
        output.clear();
        put_header(&mut output, Opcode::Binary, true, 65536);
        assert_eq!(output, [0x82, 0x7f, 0, 0, 0, 0, 0, 1, 0, 0]);
    }

    #[test]
    fn what_is_forbidden_is_refused() {
        use FrameError as E;
        for (bytes, error) in [
            (&[0xc2, 0x80, 0, 0, 0, 0][..], E::ReservedBit),
            (&[0x83, 0x80, 0, 0, 0, 0], E::UnknownOpcode),
            (&[0x8b, 0x80, 0, 0, 0, 0], E::UnknownOpcode),
            (&[0x82, 0x00], E::NotMasked),
            (&[0x09, 0x80, 0, 0, 0, 0], E::FragmentedControl),
            (&[0x89, 0xfe, 0, 126], E::ControlTooLong),
            (&[0x82, 0xfe, 0, 125, 0, 0, 0, 0], E::Length),
            (&[0x82, 0xff, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0, 0, 0, 0], E::Length),
            (&[0x82, 0xff, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], E::Length),
            (&[0x80, 0x80, 0, 0, 0, 0], E::NothingToContinue),
            (&[0x88, 0x81, 0, 0, 0, 0, 3], E::Close),
            (&[0x88, 0x82, 0, 0, 0, 0, 0x03, 0xed], E::Close),
            (&[0x88, 0x83, 0, 0, 0, 0, 0x03, 0xe8, 0xff], E::CloseText),
        ] {
            let mut input = bytes.to_vec();
            assert_eq!(FrameReader::new(Sender::Client).next(&mut input), Err(error), "{bytes:02x?}");
        }
        let mut unfinished = [0x02, 0x80, 0, 0, 0, 0, 0x82, 0x80, 0, 0, 0, 0];
        let mut reader = FrameReader::new(Sender::Client);
        reader.next(&mut unfinished).unwrap();
        assert_eq!(reader.next(&mut unfinished[6..]), Err(E::Unfinished));
        let mut masked = [0x82, 0x80, 0, 0, 0, 0];
        assert_eq!(FrameReader::new(Sender::Server).next(&mut masked), Err(E::Masked));
    }

    #[derive(Debug, Clone, PartialEq)]
    enum Sent {
        Message { text: bool, fragments: Vec<Vec<u8>> },
        Ping(Vec<u8>),
        Pong,
    }

    fn sent() -> impl Strategy<Value = Vec<Sent>> {
        let bytes = prop_oneof![
            8 => prop::collection::vec(any::<u8>(), 0..200),
            1 => (0usize..200_000, any::<u8>()).prop_map(|(n, b)| vec![b; n]),
        ];
        let message = (any::<bool>(), prop::collection::vec(bytes, 1..4))
            .prop_map(|(text, fragments)| Sent::Message { text, fragments });
        let ping = prop::collection::vec(any::<u8>(), 0..=125).prop_map(Sent::Ping);
        prop::collection::vec(prop_oneof![4 => message, 1 => ping, 1 => Just(Sent::Pong)], 0..8)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Whatever the chunks: the same messages come out, of the same type.
        #[test]
        fn reading_is_the_inverse_of_writing(sent in sent(), chunk in 1usize..100_000, key: [u8; 4]) {
            let wire = write_all(&sent, key);
            let (mut reader, mut pending, mut got) = (FrameReader::new(Sender::Client), Vec::new(), Vec::new());
            let mut building: Option<(bool, Vec<u8>)> = None;
            for piece in wire.chunks(chunk) {
                pending.extend_from_slice(piece);
                let mut at = 0;
                while let Some((taken, event)) = reader.next(&mut pending[at..]).unwrap() {
                    at += taken;
                    match event {
                        Event::Data { opcode, fin, payload } => {
                            let text = opcode == Opcode::Text;
                            prop_assert_eq!(opcode == Opcode::Continuation, building.is_some());
                            building.get_or_insert((text, Vec::new())).1.extend_from_slice(payload);
                            if fin {
                                let (text, bytes) = building.take().unwrap();
                                got.push(Sent::Message { text, fragments: vec![bytes] });
                            }
                        }
                        Event::Control(Control::Ping(payload)) => got.push(Sent::Ping(payload.to_vec())),
                        Event::Control(Control::Pong) => got.push(Sent::Pong),
                        Event::Control(Control::Close(_)) => prop_assert!(false),
                    }
                }
                pending.drain(..at);
                prop_assert!(pending.len() <= HEADER_MAX + CONTROL_MAX);
            }
            let joined: Vec<_> = sent.into_iter().map(|sent| match sent {
                Sent::Message { text, fragments } => Sent::Message { text, fragments: vec![fragments.concat()] },
                Sent::Ping(_) | Sent::Pong => sent,
            }).collect();
            prop_assert_eq!(got, joined);
            prop_assert!(pending.is_empty() && !reader.in_message());
        }

        #[test]
        fn garbage_never_panics_and_always_gets_on(mut bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let mut reader = FrameReader::new(Sender::Client);
            let mut at = 0;
            while let Ok(Some((taken, _))) = reader.next(&mut bytes[at..]) {
                prop_assert!(taken > 0);
                at += taken;
            }
        }

        #[test]
        fn close_frames_read_back(code in prop_oneof![1000u16..=1003, 3000u16..=4999], text in ".{0,200}") {
            let mut output = Vec::new();
            put_close(&mut output, CloseFrame { code: Some(code), text: &text });
            prop_assert!(output.len() <= 2 + CONTROL_MAX);
            match FrameReader::new(Sender::Server).next(&mut output).unwrap().unwrap().1 {
                Event::Control(Control::Close(close)) => {
                    prop_assert_eq!(close.code, Some(code));
                    prop_assert!(text.starts_with(close.text));
                }
                event @ (Event::Data { .. } | Event::Control(_)) => prop_assert!(false, "{:?}", event),
            }
        }
    }

    fn write_all(sent: &[Sent], key: [u8; 4]) -> Vec<u8> {
        let mut wire = Vec::new();
        let mut put = |opcode, fin, payload: &[u8]| {
            let mut frame = Vec::new();
            put_header(&mut frame, opcode, fin, payload.len());
            frame[1] |= 0x80;
            frame.extend_from_slice(&key);
            frame.extend(payload.iter().zip(key.iter().cycle()).map(|(byte, key)| byte ^ key));
            wire.extend_from_slice(&frame);
        };
        for sent in sent {
            match sent {
                Sent::Ping(payload) => put(Opcode::Ping, true, payload),
                Sent::Pong => put(Opcode::Pong, true, b"x"),
                Sent::Message { text, fragments } => {
                    let first = if *text { Opcode::Text } else { Opcode::Binary };
                    for (index, fragment) in fragments.iter().enumerate() {
                        let opcode = if index == 0 { first } else { Opcode::Continuation };
                        put(opcode, index + 1 == fragments.len(), fragment);
                    }
                }
            }
        }
        wire
    }
}
