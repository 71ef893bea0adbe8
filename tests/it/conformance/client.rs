//! A WebSocket client that says whatever a case wants, right or wrong, and looks closely at what it hears.
//!
//! It shares no code with the relay, nor with the library that the echo is made with.

use std::{fmt, time::Duration};

use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadHalf, WriteHalf, split},
    sync::watch,
    task::yield_now,
    time::{sleep, timeout},
};

use super::cases::{Case, Finish, Step};

/// How long a case may take. One that hangs has this time, and no other comes near it.
const CASE: Duration = Duration::from_secs(20);

/// Chopped writes of more pieces than this go without a pause between the pieces.
const PAUSES: usize = 400;

/// A frame to be sent (RFC 6455, section 5.2), legal unless it is told otherwise.
#[derive(Debug, Clone)]
pub(super) struct Frame {
    pub(super) fin: bool,
    pub(super) reserved: u8,
    pub(super) opcode: u8,
    pub(super) mask: Option<[u8; 4]>,
    pub(super) length: Length,
    pub(super) payload: Vec<u8>,
}

/// In which form a frame states its length.
#[derive(Debug, Clone, Copy)]
pub(super) enum Length {
    Shortest,
    In16Bits,
    In64Bits,
    /// In 64 bits, and not the truth.
    Claimed(u64),
}

impl Frame {
    pub(super) fn new(opcode: u8, payload: &[u8]) -> Self {
        // Another one for every kind of frame, so that a mask that is kept for too long shows.
        let mask = [0x9d ^ opcode, 0x02, 0xf1 ^ opcode, 0x64];
        let payload = payload.to_vec();
        Self { fin: true, reserved: 0, opcode, mask: Some(mask), length: Length::Shortest, payload }
    }

    pub(super) fn continuation(payload: &[u8]) -> Self {
        Self::new(0, payload)
    }

    pub(super) fn text(payload: &[u8]) -> Self {
        Self::new(1, payload)
    }

    pub(super) fn binary(payload: &[u8]) -> Self {
        Self::new(2, payload)
    }

    pub(super) fn close(payload: &[u8]) -> Self {
        Self::new(8, payload)
    }

    pub(super) fn close_code(code: u16, text: &str) -> Self {
        Self::close(&[&code.to_be_bytes(), text.as_bytes()].concat())
    }

    pub(super) fn ping(payload: &[u8]) -> Self {
        Self::new(9, payload)
    }

    pub(super) fn pong(payload: &[u8]) -> Self {
        Self::new(10, payload)
    }

    pub(super) fn unfinished(self) -> Self {
        Self { fin: false, ..self }
    }

    /// With reserved bits, of which 4 is RSV1.
    pub(super) fn reserved(self, reserved: u8) -> Self {
        Self { reserved, ..self }
    }

    pub(super) fn masked_with(self, mask: [u8; 4]) -> Self {
        Self { mask: Some(mask), ..self }
    }

    pub(super) fn unmasked(self) -> Self {
        Self { mask: None, ..self }
    }

    pub(super) fn length(self, length: Length) -> Self {
        Self { length, ..self }
    }

    pub(super) fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![self.reserved << 4 | self.opcode];
        if self.fin {
            bytes[0] |= 0x80;
        }
        let length = self.payload.len();
        let masked = if self.mask.is_some() { 0x80 } else { 0 };
        match self.length {
            Length::Shortest if length < 126 => bytes.push(masked | u8::try_from(length).unwrap()),
            Length::Shortest if length < 0x1_0000 => put_16_bits(&mut bytes, masked, length),
            Length::In16Bits => put_16_bits(&mut bytes, masked, length),
            Length::Shortest | Length::In64Bits => put_64_bits(&mut bytes, masked, length as u64),
            Length::Claimed(length) => put_64_bits(&mut bytes, masked, length),
        }
        let start = bytes.len() + if masked == 0 { 0 } else { 4 };
        bytes.extend(self.mask.iter().flatten());
        bytes.extend(&self.payload);
        if let Some(mask) = self.mask {
            for (index, byte) in bytes[start..].iter_mut().enumerate() {
                *byte ^= mask[index % 4];
            }
        }
        bytes
    }
}

fn put_16_bits(bytes: &mut Vec<u8>, masked: u8, length: usize) {
    bytes.push(masked | 0x7e);
    bytes.extend(u16::try_from(length).unwrap().to_be_bytes());
}

fn put_64_bits(bytes: &mut Vec<u8>, masked: u8, length: u64) {
    bytes.push(masked | 0x7f);
    bytes.extend(length.to_be_bytes());
}

/// A whole message.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Message {
    pub(super) text: bool,
    pub(super) payload: Vec<u8>,
}

impl fmt::Debug for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.text { "text" } else { "binary" };
        write!(f, "{kind} of {} bytes: {}", self.payload.len(), start(&self.payload))
    }
}

fn start(payload: &[u8]) -> String {
    let dots = if payload.len() > 16 { "..." } else { "" };
    format!("{}{dots}", payload[..payload.len().min(16)].escape_ascii())
}

/// How it ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum End {
    /// The server still answered after all that the case sent, and closed in good order when the client asked it to.
    Open,
    /// With a close frame, with or without a code, and then the end of the connection.
    Closed(Option<u16>),
    /// The connection ended without a close frame.
    Dropped,
    /// What the server sent is itself against the protocol.
    Broken(&'static str),
    /// Nothing happened any more.
    Hung,
}

/// All that the client saw.
#[derive(Debug, Clone, Default)]
pub(super) struct Seen {
    pub(super) messages: Vec<Message>,
    pub(super) pongs: Vec<Vec<u8>>,
    /// How the server's close frame ends the case.
    close: Option<End>,
    /// Nothing more can come: without an error, because the connection is at its end.
    over: Option<Result<(), &'static str>>,
    /// The message that is not complete yet.
    building: Option<Message>,
}

impl Seen {
    fn is_ended(&self) -> bool {
        self.close.is_some() || self.over.is_some()
    }

    fn is_probed(&self) -> bool {
        self.messages.contains(&probe()) && self.pongs.contains(&probe().payload)
    }
}

/// What is sent at the end of a case to see whether the server still answers. What it answers too much comes before.
fn probe() -> Message {
    Message { text: false, payload: b"Is anybody still there?".to_vec() }
}

/// Asks for a WebSocket.
pub(super) async fn upgrade<IO: AsyncRead + AsyncWrite + Unpin>(
    io: &mut IO,
    path: &str,
    host: &str,
    headers: &str,
) {
    let request = format!(
        "GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n{headers}\r\n"
    );
    io.write_all(request.as_bytes()).await.unwrap();
    io.flush().await.unwrap();
    let mut answer = Vec::new();
    // Octet by octet: what follows the header belongs to the case.
    while !answer.ends_with(b"\r\n\r\n") {
        answer.push(io.read_u8().await.unwrap());
    }
    let answer = String::from_utf8(answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 101 "), "refused: {answer}");
    // RFC 6455, section 1.3, has this answer to the key above.
    assert!(answer.contains("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="), "the wrong answer to the key: {answer}");
}

/// Plays a case, and tells what was seen and how it ended.
pub(super) async fn play<IO: AsyncRead + AsyncWrite>(io: IO, case: &Case) -> (Seen, End) {
    let (read, write) = split(io);
    let (sender, receiver) = watch::channel(Seen::default());
    let both = async {
        let ((), open) = tokio::join!(listen(read, &sender), speak(write, case, receiver.clone()));
        open
    };
    let open = timeout(CASE, both).await;
    let mut seen = receiver.borrow().clone();
    let end = match (&open, seen.over, seen.close.take()) {
        (Err(_), _, _) | (_, None, _) => End::Hung,
        (_, Some(Err(what)), _) => End::Broken(what),
        (_, Some(Ok(())), None) => End::Dropped,
        (Ok(true), Some(Ok(())), Some(End::Closed(Some(1000)))) => End::Open,
        (Ok(_), Some(Ok(())), Some(close)) => close,
    };
    if let Some(index) = seen.messages.iter().position(|message| *message == probe()) {
        seen.messages.remove(index);
    }
    if let Some(index) = seen.pongs.iter().position(|payload| *payload == probe().payload) {
        seen.pongs.remove(index);
    }
    (seen, end)
}

/// Sends what the case wants, and ends the connection. Whether the server had answered the probe before.
async fn speak<IO: AsyncRead + AsyncWrite>(
    mut write: WriteHalf<IO>,
    case: &Case,
    mut seen: watch::Receiver<Seen>,
) -> bool {
    for step in &case.steps {
        match step {
            Step::Send(bytes) => put(&mut write, bytes).await,
            Step::Chop(bytes, size) => {
                let pieces = bytes.chunks(*size);
                let pauses = pieces.len() <= PAUSES;
                for piece in pieces {
                    if seen.borrow().is_ended() {
                        break;
                    }
                    put(&mut write, piece).await;
                    if pauses {
                        sleep(Duration::from_millis(1)).await;
                    } else {
                        yield_now().await;
                    }
                }
            }
            Step::Await { messages, pongs } => {
                let answered = |seen: &Seen| {
                    seen.is_ended() || seen.messages.len() >= *messages && seen.pongs.len() >= *pongs
                };
                seen.wait_for(answered).await.unwrap();
            }
        }
    }
    let mut answered = false;
    if case.finish == Finish::Probe {
        let probes = [Frame::binary(&probe().payload).bytes(), Frame::ping(&probe().payload).bytes()];
        put(&mut write, &probes.concat()).await;
        seen.wait_for(|seen| seen.is_ended() || seen.is_probed()).await.unwrap();
        answered = !seen.borrow().is_ended();
    }
    if answered {
        put(&mut write, &Frame::close_code(1000, "").bytes()).await;
    }
    seen.wait_for(Seen::is_ended).await.unwrap();
    if !answered && case.finish != Finish::Closed {
        put(&mut write, &Frame::close(b"").bytes()).await;
    }
    // It is the server that ends the connection first (RFC 6455, section 7.1.1).
    seen.wait_for(|seen| seen.over.is_some()).await.unwrap();
    let _ = write.shutdown().await;
    answered
}

/// Writes, to whoever may be gone: what that means is seen when reading.
async fn put<IO: AsyncRead + AsyncWrite>(write: &mut WriteHalf<IO>, bytes: &[u8]) {
    if write.write_all(bytes).await.is_ok() {
        let _ = write.flush().await;
    }
}

async fn listen<IO: AsyncRead + AsyncWrite>(mut read: ReadHalf<IO>, seen: &watch::Sender<Seen>) {
    let mut buffer = Vec::with_capacity(64 * 1024);
    let over = loop {
        match read.read_buf(&mut buffer).await {
            // A connection that is reset has ended as well; what that destroyed is missing in what was seen.
            Ok(0) | Err(_) if buffer.is_empty() => break Ok(()),
            Ok(0) | Err(_) => break Err("the connection ended in the middle of a frame"),
            Ok(_) => {}
        }
        let mut at = 0;
        let mut heard = Ok(());
        seen.send_modify(|seen| {
            heard = loop {
                match take(&buffer[at..]) {
                    Ok(None) => break Ok(()),
                    Err(what) => break Err(what),
                    Ok(Some((frame, size))) => {
                        at += size;
                        if let Err(what) = hear(seen, frame) {
                            break Err(what);
                        }
                    }
                }
            };
        });
        if heard.is_err() {
            break heard;
        }
        buffer.drain(..at);
    };
    seen.send_modify(|seen| seen.over = Some(over));
}

/// One frame from the front of `bytes`, as a server may send it, and its size.
fn take(bytes: &[u8]) -> Result<Option<(Frame, usize)>, &'static str> {
    let &[first, second, ref rest @ ..] = bytes else { return Ok(None) };
    if second & 0x80 != 0 {
        return Err("a masked frame from the server");
    }
    let (length, size, least) = match second {
        127 => match rest.first_chunk() {
            Some(length) => (u64::from_be_bytes(*length), 10, 0x1_0000),
            None => return Ok(None),
        },
        126 => match rest.first_chunk() {
            Some(length) => (u64::from(u16::from_be_bytes(*length)), 4, 126),
            None => return Ok(None),
        },
        short => (u64::from(short), 2, 0),
    };
    if length < least {
        return Err("a length that is not the shortest");
    }
    let length = usize::try_from(length).map_err(|_| "a length that nobody could send")?;
    let Some(payload) = bytes[size..].get(..length) else { return Ok(None) };
    let frame = Frame {
        fin: first & 0x80 != 0,
        reserved: first >> 4 & 7,
        opcode: first & 15,
        mask: None,
        length: Length::Shortest,
        payload: payload.to_vec(),
    };
    Ok(Some((frame, size + length)))
}

fn hear(seen: &mut Seen, frame: Frame) -> Result<(), &'static str> {
    if seen.close.is_some() {
        return Err("a frame after the close frame");
    }
    if frame.reserved != 0 {
        return Err("a reserved bit");
    }
    if frame.opcode >= 8 && (!frame.fin || frame.payload.len() > 125) {
        return Err("a control frame that is fragmented or too long");
    }
    match frame.opcode {
        0 => seen.building.as_mut().ok_or("a continuation of nothing")?.payload.extend(frame.payload),
        1 | 2 if seen.building.is_some() => return Err("a message in a message"),
        1 | 2 => seen.building = Some(Message { text: frame.opcode == 1, payload: frame.payload }),
        8 => {
            let code = match frame.payload[..] {
                [] => None,
                [high, low, ref text @ ..] if str::from_utf8(text).is_ok() => {
                    Some(u16::from_be_bytes([high, low]))
                }
                _ => return Err("a malformed close frame"),
            };
            seen.close = Some(End::Closed(code));
        }
        // A case is over long before the server misses an answer.
        9 => {}
        10 => seen.pongs.push(frame.payload),
        _ => return Err("an unknown opcode"),
    }
    if frame.opcode <= 2 && frame.fin {
        let whole = seen.building.take();
        if whole.iter().any(|message| message.text && str::from_utf8(&message.payload).is_err()) {
            return Err("a text that is not UTF-8");
        }
        seen.messages.extend(whole);
    }
    Ok(())
}

#[test]
fn the_client_writes_and_reads_the_examples_of_the_standard() {
    // RFC 6455, section 5.7.
    let hello = Frame::text(b"Hello").masked_with([0x37, 0xfa, 0x21, 0x3d]);
    assert_eq!(hello.bytes(), [0x81, 0x85, 0x37, 0xfa, 0x21, 0x3d, 0x7f, 0x9f, 0x4d, 0x51, 0x58]);
    let header = |length| Frame::binary(&vec![0; length]).unmasked().bytes()[..4].to_vec();
    assert_eq!((header(256), header(65_536)), (vec![0x82, 0x7e, 1, 0], vec![0x82, 0x7f, 0, 0]));

    let bytes =
        [0x01, 0x03, 0x48, 0x65, 0x6c, 0x8a, 0x01, 0x21, 0x80, 0x02, 0x6c, 0x6f, 0x88, 0x02, 0x03, 0xe9];
    let (mut seen, mut at) = (Seen::default(), 0);
    while let Some((frame, size)) = take(&bytes[at..]).unwrap() {
        hear(&mut seen, frame).unwrap();
        at += size;
    }
    assert_eq!(at, bytes.len());
    assert_eq!(seen.messages, [Message { text: true, payload: b"Hello".to_vec() }]);
    assert_eq!((seen.pongs, seen.close), (vec![b"!".to_vec()], Some(End::Closed(Some(1001)))));
}
