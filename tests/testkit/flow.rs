use std::ops::Range;

use tokio::io::{self, AsyncReadExt as _, AsyncWriteExt as _, ReadHalf, WriteHalf};

use crate::{Message, Random, Script, Socket};

/// How much is read, and masked and written, at once.
const PIECE: usize = 64 * 1024;

/// One end of a stream through which payload flows: made and checked on the way, never held as a whole.
#[derive(Debug)]
pub struct FlowLeg {
    socket: Socket,
    early: Vec<u8>,
}

/// The receiving side of a [`FlowLeg`].
#[derive(Debug)]
pub struct FlowReader {
    io: ReadHalf<Socket>,
    buffer: Vec<u8>,
    at: usize,
    /// The data frame under way: whether its message ends with it, and how much of it is still to come.
    frame: Option<(bool, usize)>,
    /// The message under way, and how much of it has come.
    message: Option<(Message, usize)>,
    script: Script,
    messages: u64,
    bytes: u64,
}

/// The sending side of a [`FlowLeg`].
#[derive(Debug)]
pub struct FlowWriter {
    io: WriteHalf<Socket>,
    piece: Vec<u8>,
}

/// What came in.
#[derive(Debug, PartialEq, Eq)]
pub enum Incoming {
    /// A piece of a message, and whether the message ends with it.
    Data(bool),
    /// A ping.
    Ping(Vec<u8>),
    /// A pong.
    Pong(Vec<u8>),
    /// A close frame.
    Close(Option<(u16, String)>),
}

impl FlowLeg {
    /// A leg after its upgrade; `early` came along with the answer.
    pub fn new(socket: Socket, early: Vec<u8>) -> Self {
        Self { socket, early }
    }

    /// Both directions; the reader expects the messages of `script`.
    pub fn split(self, script: Script) -> (FlowReader, FlowWriter) {
        let (read, write) = io::split(self.socket);
        let reader = FlowReader {
            io: read,
            buffer: self.early,
            at: 0,
            frame: None,
            message: None,
            script,
            messages: 0,
            bytes: 0,
        };
        (reader, FlowWriter { io: write, piece: Vec::new() })
    }
}

impl FlowReader {
    /// How many messages have come as a whole, and how many bytes of the next one.
    pub fn received(&self) -> (u64, usize) {
        (self.messages, self.message.map_or(0, |(_, position)| position))
    }

    /// How many bytes of payload have come.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The next thing that comes in. Panics when that is not what the script says, or when the connection ends.
    pub async fn next(&mut self) -> Incoming {
        loop {
            if let Some(incoming) = self.take() {
                return incoming;
            }
            self.buffer.drain(..self.at);
            self.at = 0;
            if self.buffer.is_empty() {
                // A leg on which nothing comes holds no memory.
                self.buffer = Vec::new();
            }
            self.buffer.reserve(PIECE);
            let read = self.io.read_buf(&mut self.buffer).await;
            let received = self.received();
            assert!(
                matches!(read, Ok(1..)),
                "the connection ended without a close frame: {read:?} after {received:?}"
            );
        }
    }

    /// Waits for the connection's end, before which nothing may come.
    pub async fn ended(&mut self) {
        self.buffer.drain(..self.at);
        self.at = 0;
        // How it ends does not matter after a close frame.
        let _ = self.io.read_buf(&mut self.buffer).await;
        assert!(self.buffer.is_empty(), "{} bytes came after the close frame", self.buffer.len());
    }

    fn take(&mut self) -> Option<Incoming> {
        if self.frame.is_none()
            && let Some(control) = self.take_head()
        {
            return Some(control);
        }
        let (fin, left) = self.frame?;
        let now = left.min(self.buffer.len() - self.at);
        if now == 0 && left > 0 {
            return None;
        }
        let (message, position) = self.message.as_mut()?;
        let bytes = &self.buffer[self.at..self.at + now];
        assert!(message.has(*position, bytes), "changed within {now} bytes from {position} of {message:?}");
        self.at += now;
        self.bytes += now as u64;
        *position += now;
        if now < left {
            self.frame = Some((fin, left - now));
            return Some(Incoming::Data(false));
        }
        self.frame = None;
        if fin {
            assert_eq!(*position, message.length, "ended early: {message:?}");
            self.message = None;
            self.messages += 1;
        }
        Some(Incoming::Data(fin))
    }

    /// Takes a control frame and gives it, or the header of a data frame and notes it; nothing when it is not there yet.
    fn take_head(&mut self) -> Option<Incoming> {
        let bytes = &self.buffer[self.at..];
        let (&first, &second) = (bytes.first()?, bytes.get(1)?);
        let (fin, opcode) = (first & 0x80 != 0, first & 15);
        assert_eq!((first & 0x70, second & 0x80), (0, 0), "reserved bits or a mask");
        let (length, start) = match second {
            126 => (u64::from(u16::from_be_bytes(*bytes.get(2..)?.first_chunk()?)), 4),
            127 => (u64::from_be_bytes(*bytes.get(2..)?.first_chunk()?), 10),
            short => (u64::from(short), 2),
        };
        let length = usize::try_from(length).unwrap();
        if opcode < 8 {
            match (opcode, self.message.is_some()) {
                (0, true) => {}
                (1 | 2, false) => {
                    let message = self.script.next()?;
                    assert_eq!(opcode == 1, message.text, "the type of {message:?}");
                    self.message = Some((message, 0));
                }
                (_, open) => panic!("opcode {opcode}, within a message: {open}"),
            }
            self.at += start;
            self.frame = Some((fin, length));
            return None;
        }
        assert!(fin && length <= 125, "a control frame with fin {fin} and {length} bytes");
        let payload = bytes.get(start..start + length)?.to_vec();
        self.at += start + length;
        Some(match opcode {
            8 => {
                Incoming::Close(payload.split_first_chunk().map(|(code, text)| {
                    (u16::from_be_bytes(*code), String::from_utf8_lossy(text).into_owned())
                }))
            }
            9 => Incoming::Ping(payload),
            10 => Incoming::Pong(payload),
            _ => panic!("opcode {opcode}"),
        })
    }
}

impl FlowWriter {
    /// Sends a control frame.
    pub async fn control(&mut self, opcode: u8, payload: &[u8], random: &mut Random) -> io::Result<()> {
        let key = random.mask();
        head(&mut self.piece, true, opcode, payload.len(), key);
        let start = self.piece.len();
        self.piece.extend_from_slice(payload);
        mask(&mut self.piece[start..], key, 0);
        self.put(None).await
    }

    /// Sends a close frame.
    pub async fn close(&mut self, reason: Option<(u16, &str)>, random: &mut Random) -> io::Result<()> {
        let payload = reason.map(|(code, text)| [&code.to_be_bytes(), text.as_bytes()].concat());
        self.control(8, &payload.unwrap_or_default(), random).await
    }

    /// Sends a message in one frame.
    pub async fn message(&mut self, message: &Message, random: &mut Random) -> io::Result<()> {
        self.fragment(message, 0..message.length, (true, true), false, random).await
    }

    /// Sends a part of a message, which may be its first, its last or both. `chopped` cuts it into many writes.
    pub async fn fragment(
        &mut self,
        message: &Message,
        range: Range<usize>,
        (first, last): (bool, bool),
        chopped: bool,
        random: &mut Random,
    ) -> io::Result<()> {
        let opcode = match (first, message.text) {
            (true, true) => 1,
            (true, false) => 2,
            (false, _) => 0,
        };
        let key = random.mask();
        head(&mut self.piece, last, opcode, range.len(), key);
        let (mut at, end) = (range.start, range.end);
        loop {
            let masked = self.piece.len();
            while at < end && self.piece.len() < PIECE {
                let now = message.at(at);
                let now = &now[..now.len().min(end - at).min(PIECE - self.piece.len())];
                self.piece.extend_from_slice(now);
                at += now.len();
            }
            let position = at - range.start - (self.piece.len() - masked);
            mask(&mut self.piece[masked..], key, position);
            self.put(chopped.then_some(&mut *random)).await?;
            if at == end {
                return Ok(());
            }
        }
    }

    /// Ends the sending direction of the connection. It may be gone already.
    pub async fn shutdown(&mut self) {
        let _ = self.io.shutdown().await;
    }

    /// Both sides of a leg in one again, to end its connection as a whole.
    pub fn unsplit(self, reader: FlowReader) -> Socket {
        reader.io.unsplit(self.io)
    }

    async fn put(&mut self, mut chop: Option<&mut Random>) -> io::Result<()> {
        let mut rest = &self.piece[..];
        while !rest.is_empty() {
            let now = chop.as_mut().map_or(rest.len(), |random| random.length(rest.len()));
            self.io.write_all(&rest[..now]).await?;
            self.io.flush().await?;
            rest = &rest[now..];
        }
        // A leg that sends nothing holds no memory.
        self.piece = Vec::new();
        Ok(())
    }
}

fn head(bytes: &mut Vec<u8>, fin: bool, opcode: u8, length: usize, key: [u8; 4]) {
    bytes.clear();
    bytes.push(u8::from(fin) << 7 | opcode);
    match length {
        0..=125 => bytes.push(0x80 | u8::try_from(length).unwrap()),
        126..=0xffff => {
            bytes.push(0x80 | 0x7e);
            bytes.extend(u16::try_from(length).unwrap().to_be_bytes());
        }
        _ => {
            bytes.push(0x80 | 0x7f);
            bytes.extend((length as u64).to_be_bytes());
        }
    }
    bytes.extend(key);
}

/// Masks what stands at `position` of a payload, eight bytes at a time: without optimisation, one at a time takes too long.
fn mask(bytes: &mut [u8], mut key: [u8; 4], position: usize) {
    key.rotate_left(position % 4);
    let [a, b, c, d] = key;
    let wide = u64::from_ne_bytes([a, b, c, d, a, b, c, d]);
    let (eights, rest) = bytes.as_chunks_mut::<8>();
    for eight in eights {
        *eight = (u64::from_ne_bytes(*eight) ^ wide).to_ne_bytes();
    }
    for (byte, key) in rest.iter_mut().zip(wide.to_ne_bytes()) {
        *byte ^= key;
    }
}
