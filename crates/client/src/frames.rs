//! The frames of one leg over its connection, as the client's end reads and writes them.

use std::{
    io,
    ops::Range,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Buf as _, BytesMut};
use midspan_core::{
    frame::{CONTROL_MAX, Control, Event, FrameError, FrameReader, HEADER_MAX, Opcode, Sender, mask_frame},
    link::close_text,
};
use rand::RngExt as _;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// The connection of a leg. Has a buffer only for a frame that is not whole and for what the connection does not take.
pub(crate) struct Frames<IO> {
    io: IO,
    reader: FrameReader,
    /// What was read and is not used yet.
    input: BytesMut,
    /// Frames that the connection has not taken yet, from `written` on.
    output: Vec<u8>,
    written: usize,
    unflushed: bool,
    /// What the last ping held that is not answered yet.
    pong: Option<Vec<u8>>,
    /// Whether our close frame is written, or waits in `output`.
    closed: bool,
    /// What ended the last read behind bytes that were still good.
    failure: Option<io::Error>,
}

/// What came out of a leg.
#[derive(Debug)]
pub(crate) enum Piece {
    /// A frame of a message, or a part of one.
    Data {
        /// `Continuation` unless a message begins here.
        opcode: Opcode,
        /// Whether the message ends here.
        fin: bool,
        /// Where the bytes stand.
        payload: Range<usize>,
    },
    /// The last frame.
    Close {
        /// The code, if there is one.
        code: Option<u16>,
        /// The text, which may be empty.
        text: String,
    },
}

impl<IO: AsyncRead + AsyncWrite + Unpin> Frames<IO> {
    /// The client's end of a connection, of which `early` was read already.
    pub(crate) fn new(io: IO, early: BytesMut) -> Self {
        Self {
            io,
            reader: FrameReader::new(Sender::Server),
            input: early,
            output: Vec::new(),
            written: 0,
            unflushed: false,
            pong: None,
            closed: false,
            failure: None,
        }
    }

    /// Takes the next piece from `buffer`, from `at` on; pings and pongs are dealt with on the way.
    ///
    /// `None` means that more bytes are needed. A close frame has been answered, as far as [`Self::poll_drain`] can.
    pub(crate) fn take(&mut self, buffer: &mut [u8], at: &mut usize) -> Result<Option<Piece>, FrameError> {
        while let Some((taken, event)) = self.reader.next(&mut buffer[*at..])? {
            *at += taken;
            match event {
                Event::Data { opcode, fin, payload } => {
                    let payload = *at - payload.len()..*at;
                    return Ok(Some(Piece::Data { opcode, fin, payload }));
                }
                // A later ping's answer is an answer to those before (RFC 6455, section 5.5.3).
                Event::Control(Control::Ping(payload)) => self.pong = Some(payload.to_vec()),
                Event::Control(Control::Pong) => {}
                Event::Control(Control::Close(close)) => {
                    let (code, text) = (close.code, close.text.to_owned());
                    self.put_close(code, "");
                    return Ok(Some(Piece::Close { code, text }));
                }
            }
        }
        Ok(None)
    }

    /// Hands out what was read and not used, if there is anything.
    pub(crate) fn take_input(&mut self) -> Option<BytesMut> {
        (!self.input.is_empty()).then(|| std::mem::take(&mut self.input))
    }

    /// Takes back what was handed out, but for the first `used` bytes.
    pub(crate) fn put_back(&mut self, mut input: BytesMut, used: usize) {
        input.advance(used);
        self.input = if input.is_empty() { BytesMut::new() } else { input };
    }

    /// Keeps what is not used yet of what was read.
    pub(crate) fn keep(&mut self, rest: &[u8]) {
        self.input = BytesMut::from(rest);
    }

    /// Puts what was kept to the front of `buffer`, reads behind it, and says how much there is then.
    pub(crate) fn poll_fill(&mut self, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        if let Some(error) = self.failure.take() {
            return Poll::Ready(Err(error));
        }
        let kept = self.input.len();
        let mut read = ReadBuf::new(&mut buffer[kept..]);
        // TLS hands out a record at a time; a socket that gave less than it was asked for has nothing more.
        while read.remaining() > 0 {
            let before = read.filled().len();
            let end = match Pin::new(&mut self.io).poll_read(cx, &mut read) {
                Poll::Pending if before == 0 => return Poll::Pending,
                Poll::Pending => break,
                Poll::Ready(Ok(())) if read.filled().len() > before => continue,
                Poll::Ready(Ok(())) => io::ErrorKind::UnexpectedEof.into(),
                Poll::Ready(Err(error)) => error,
            };
            if before == 0 {
                return Poll::Ready(Err(end));
            }
            self.failure = Some(end);
            break;
        }
        let filled = kept + read.filled().len();
        buffer[..kept].copy_from_slice(&self.input);
        self.input = BytesMut::new();
        Poll::Ready(Ok(filled))
    }

    /// Sends a frame of the payload in `buffer` behind its first [`HEADER_MAX`] bytes, and keeps what the connection does
    /// not take. Nothing else may be waiting.
    pub(crate) fn write(
        &mut self,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
        opcode: Opcode,
        fin: bool,
    ) -> io::Result<()> {
        let mut at = mask_frame(buffer, opcode, fin, key());
        self.unflushed = true;
        while at < buffer.len() {
            match Pin::new(&mut self.io).poll_write(cx, &buffer[at..]) {
                Poll::Ready(written) => at += some(written?)?,
                Poll::Pending => break,
            }
        }
        self.output.extend_from_slice(&buffer[at..]);
        Ok(())
    }

    /// Writes what waits, answers the last ping, and flushes.
    pub(crate) fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            while self.written < self.output.len() {
                let written = ready!(Pin::new(&mut self.io).poll_write(cx, &self.output[self.written..]))?;
                self.written += some(written)?;
                self.unflushed = true;
            }
            if self.written > 0 {
                (self.output, self.written) = (Vec::new(), 0);
            }
            match self.pong.take() {
                Some(payload) if !self.closed => self.put(Opcode::Pong, &payload),
                _ => break,
            }
        }
        if self.unflushed {
            ready!(Pin::new(&mut self.io).poll_flush(cx))?;
            self.unflushed = false;
        }
        Poll::Ready(Ok(()))
    }
}

impl<IO> Frames<IO> {
    /// Whether frames wait for the connection.
    pub(crate) fn is_blocked(&self) -> bool {
        !self.output.is_empty()
    }

    /// Asks for a sign of life.
    pub(crate) fn put_ping(&mut self) {
        if !self.closed {
            self.put(Opcode::Ping, &[]);
        }
    }

    /// Ends this direction. Only the first close frame counts.
    pub(crate) fn put_close(&mut self, code: Option<u16>, text: &str) {
        if self.closed {
            return;
        }
        self.closed = true;
        let mut payload = Vec::new();
        if let Some(code) = code {
            payload.extend_from_slice(&code.to_be_bytes());
            payload.extend_from_slice(close_text(text).as_bytes());
        }
        self.put(Opcode::Close, &payload);
    }

    /// Puts a frame of its own behind what waits; `payload` is as short as a control frame's.
    pub(crate) fn put(&mut self, opcode: Opcode, payload: &[u8]) {
        let mut frame = [0; HEADER_MAX + CONTROL_MAX];
        let frame = &mut frame[..HEADER_MAX + payload.len()];
        frame[HEADER_MAX..].copy_from_slice(payload);
        let start = mask_frame(frame, opcode, true, key());
        self.output.extend_from_slice(&frame[start..]);
    }

    /// Puts a frame of any length behind what waits.
    pub(crate) fn put_long(&mut self, opcode: Opcode, payload: &[u8]) {
        let mut frame = vec![0; HEADER_MAX];
        frame.extend_from_slice(payload);
        let start = mask_frame(&mut frame, opcode, true, key());
        self.output.extend_from_slice(&frame[start..]);
    }
}

/// A key that nobody can foresee (RFC 6455, section 10.3).
fn key() -> [u8; 4] {
    rand::rng().random()
}

/// A write of nothing would be tried for ever.
pub(crate) fn some(written: usize) -> io::Result<usize> {
    if written == 0 { Err(io::ErrorKind::WriteZero.into()) } else { Ok(written) }
}
