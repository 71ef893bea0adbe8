//! One TLS session of a listener, over rustls' unbuffered API.
//!
//! Records are read into a buffer of the thread, opened there, and their payload goes straight to the reader; what is
//! written is sealed into another buffer of the thread and leaves in one write. A session keeps bytes of its own only for
//! a record that is not whole, for a reader that takes less than a record, and for a socket that takes nothing.

use std::{
    cell::RefCell,
    fmt, io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use rustls::{
    ServerConfig,
    server::{ServerConnectionData, UnbufferedServerConnection},
    unbuffered::{
        ConnectionState, EncodeError, EncodeTlsData, InsufficientSizeError, UnbufferedStatus, WriteTraffic,
    },
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// The most that is read from the socket at once, in bytes.
const READ: usize = 256 * 1024;

/// The least that is read from the socket at once, in bytes.
const READ_LEAST: usize = 1024;

/// A read goes on to here, in bytes from the start of a record: behind its end, so that small reads of the caller do not
/// make small reads of the socket.
const WHOLE: usize = 17 * 1024;

/// The most payload that is sealed and written at once, in bytes.
const SEAL: usize = 256 * 1024;

/// Room for the headers and tags of the records that [`SEAL`] bytes come to, and for messages of TLS itself.
const SEAL_OVERHEAD: usize = 8 * 1024;

thread_local! {
    static SEALED: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
    static OPENED: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

fn with_buffer<T>(
    buffer: &'static std::thread::LocalKey<RefCell<Vec<u8>>>,
    least: usize,
    work: impl FnOnce(&mut [u8]) -> T,
) -> T {
    buffer.with_borrow_mut(|buffer| {
        if buffer.len() < least {
            buffer.resize(least, 0);
        }
        work(buffer)
    })
}

/// How much TLS itself may say, answers to key updates mostly, while the socket takes nothing, in bytes.
const ANSWERS_MAX: usize = 16 * 1024;

/// A TLS session over `S`, the server's end.
pub struct TlsStream<S> {
    socket: S,
    session: UnbufferedServerConnection,
    /// The start of a record that is not whole.
    incoming: Vec<u8>,
    /// Payload that the reader had no room for.
    opened: Vec<u8>,
    /// Records that the socket has not taken, from `written` on.
    outgoing: Vec<u8>,
    written: usize,
    /// How much of `outgoing` TLS itself has said.
    answers: usize,
    /// Whether payload may be sent.
    established: bool,
    /// Whether the peer has said that nothing more comes.
    peer_closed: bool,
    /// Whether we have.
    closed: bool,
}

/// What is done with payload once it may be sent.
type Write<'a> = &'a mut dyn FnMut(WriteTraffic<'_, ServerConnectionData>) -> Result<(), rustls::Error>;

impl<S: AsyncRead + AsyncWrite + Unpin> TlsStream<S> {
    /// Does the handshake.
    pub async fn accept(socket: S, config: Arc<ServerConfig>) -> io::Result<Self> {
        let mut stream = Self {
            socket,
            session: UnbufferedServerConnection::new(config).map_err(broken)?,
            incoming: Vec::new(),
            opened: Vec::new(),
            outgoing: Vec::new(),
            written: 0,
            answers: 0,
            established: false,
            peer_closed: false,
            closed: false,
        };
        std::future::poll_fn(|cx| stream.poll_handshake(cx)).await?;
        Ok(stream)
    }

    /// Puts something else below.
    pub fn try_map_socket<T>(self, map: impl FnOnce(S) -> io::Result<T>) -> io::Result<TlsStream<T>> {
        Ok(TlsStream {
            socket: map(self.socket)?,
            session: self.session,
            incoming: self.incoming,
            opened: self.opened,
            outgoing: self.outgoing,
            written: self.written,
            answers: self.answers,
            established: self.established,
            peer_closed: self.peer_closed,
            closed: self.closed,
        })
    }

    /// What is below.
    pub fn socket(&self) -> &S {
        &self.socket
    }

    /// How many bytes it keeps, of what was written to it and of what came in.
    pub fn backlog(&self) -> usize {
        self.outgoing.capacity() + self.incoming.capacity() + self.opened.capacity()
    }

    fn poll_handshake(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            ready!(self.poll_send(cx))?;
            if self.established {
                return Poll::Ready(Ok(()));
            }
            if self.peer_closed {
                return Poll::Ready(Err(truncated()));
            }
            ready!(self.poll_open(cx, &mut ReadBuf::new(&mut [])))?;
        }
    }

    /// Reads from the socket once, and opens what is whole into `reader`.
    fn poll_open(&mut self, cx: &mut Context<'_>, reader: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let kept = self.incoming.len();
        let room = reader.remaining().max(WHOLE.saturating_sub(kept)).clamp(READ_LEAST, READ);
        with_buffer(&OPENED, kept + room, |buffer| {
            let mut read = ReadBuf::new(&mut buffer[kept..kept + room]);
            ready!(Pin::new(&mut self.socket).poll_read(cx, &mut read))?;
            let end = kept + read.filled().len();
            if end == kept {
                return Poll::Ready(Err(truncated()));
            }
            buffer[..kept].copy_from_slice(&self.incoming);
            let (used, processed) = self.process(&mut buffer[..end], reader, &mut |_| Ok(()));
            // No more than that: thousands of streams may keep the start of a record for long.
            self.incoming = buffer[used..end].to_vec();
            Poll::Ready(processed.map_err(broken))
        })
    }

    /// Opens the whole records in `records` into `reader`, then calls `write`, if payload may be sent. Says how many
    /// bytes of `records` are used up.
    fn process(
        &mut self,
        records: &mut [u8],
        reader: &mut ReadBuf<'_>,
        write: Write<'_>,
    ) -> (usize, Result<(), rustls::Error>) {
        let mut used = 0;
        loop {
            let UnbufferedStatus { discard, state } = self.session.process_tls_records(&mut records[used..]);
            let state = match state {
                Ok(state) => state,
                Err(error) => {
                    self.take_alert();
                    return (used + discard, Err(error));
                }
            };
            let done = match state {
                ConnectionState::ReadTraffic(mut traffic) => {
                    while let Some(Ok(record)) = traffic.next_record() {
                        let fits = record.payload.len().min(reader.remaining());
                        let (now, later) = record.payload.split_at(fits);
                        reader.put_slice(now);
                        self.opened.reserve_exact(later.len());
                        self.opened.extend_from_slice(later);
                    }
                    false
                }
                ConnectionState::EncodeTlsData(data) => {
                    let size = encode(&mut self.outgoing, data);
                    self.answers += size;
                    if self.established && self.answers > ANSWERS_MAX {
                        return (
                            used + discard,
                            Err(rustls::Error::General("too many key updates".to_owned())),
                        );
                    }
                    size == 0
                }
                // What was encoded stands in `outgoing`, before everything that comes later.
                ConnectionState::TransmitTlsData(data) => {
                    data.done();
                    false
                }
                ConnectionState::PeerClosed => {
                    self.peer_closed = true;
                    false
                }
                ConnectionState::WriteTraffic(traffic) => {
                    self.established = true;
                    return (used + discard, write(traffic));
                }
                ConnectionState::BlockedHandshake => true,
                // The session is over. Early data is not offered, and other states are for later versions of the library.
                ConnectionState::Closed | ConnectionState::ReadEarlyData(_) | _ => {
                    self.peer_closed = true;
                    true
                }
            };
            used += discard;
            if done {
                return (used, Ok(()));
            }
        }
    }

    /// Puts the alert that tells the peer of an error with what goes out.
    fn take_alert(&mut self) {
        if let Ok(ConnectionState::EncodeTlsData(data)) = self.session.process_tls_records(&mut []).state {
            encode(&mut self.outgoing, data);
        }
    }

    /// Calls `write` with the session, which has nothing to read.
    fn with_traffic(&mut self, write: Write<'_>) -> io::Result<()> {
        let mut records = std::mem::take(&mut self.incoming);
        let mut called = false;
        let (used, processed) = self.process(&mut records, &mut ReadBuf::new(&mut []), &mut |traffic| {
            called = true;
            write(traffic)
        });
        records.drain(..used);
        self.incoming = records;
        processed.map_err(broken)?;
        if called { Ok(()) } else { Err(io::ErrorKind::BrokenPipe.into()) }
    }

    /// Writes what is outgoing.
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.written < self.outgoing.len() {
            let bytes = &self.outgoing[self.written..];
            let written = ready!(Pin::new(&mut self.socket).poll_write(cx, bytes))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.written += written;
        }
        if self.written > 0 {
            (self.outgoing, self.written, self.answers) = (Vec::new(), 0, 0);
        }
        Poll::Ready(Ok(()))
    }

    /// Writes records of payload, of which `outgoing` keeps what the socket does not take.
    fn send(&mut self, cx: &mut Context<'_>, records: &[u8]) -> io::Result<()> {
        let mut sent = 0;
        while self.outgoing.is_empty() && sent < records.len() {
            match Pin::new(&mut self.socket).poll_write(cx, &records[sent..]) {
                Poll::Ready(Ok(0)) => return Err(io::ErrorKind::WriteZero.into()),
                Poll::Ready(written) => sent += written?,
                Poll::Pending => break,
            }
        }
        self.outgoing.extend_from_slice(&records[sent..]);
        Ok(())
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for TlsStream<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        reader: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if reader.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        if !self.opened.is_empty() {
            let size = self.opened.len().min(reader.remaining());
            reader.put_slice(&self.opened[..size]);
            self.opened.drain(..size);
            if self.opened.is_empty() {
                self.opened = Vec::new();
            }
            return Poll::Ready(Ok(()));
        }
        let before = reader.filled().len();
        while !self.peer_closed && reader.filled().len() == before {
            let opened = self.poll_open(cx, reader);
            if self.answers > 0 {
                // Answers and alerts go out when they can; who reads does not wait for that.
                let _ = self.poll_send(cx);
            }
            ready!(opened)?;
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for TlsStream<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if self.closed {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        ready!(self.poll_send(cx))?;
        let payload = &bytes[..bytes.len().min(SEAL)];
        with_buffer(&SEALED, SEAL + SEAL_OVERHEAD, |sealed| {
            let mut size = 0;
            self.with_traffic(&mut |mut traffic| {
                size = traffic
                    .encrypt(payload, sealed)
                    .map_err(|error| rustls::Error::General(error.to_string()))?;
                Ok(())
            })?;
            self.send(cx, &sealed[..size])
        })?;
        Poll::Ready(Ok(payload.len()))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_send(cx))?;
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.closed {
            self.closed = true;
            let mut notice = [0; 256];
            let mut size = 0;
            self.with_traffic(&mut |mut traffic| {
                size = traffic
                    .queue_close_notify(&mut notice)
                    .map_err(|error| rustls::Error::General(error.to_string()))?;
                Ok(())
            })?;
            self.outgoing.extend_from_slice(&notice[..size]);
        }
        ready!(self.poll_send(cx))?;
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}

impl<S> fmt::Debug for TlsStream<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsStream").field("established", &self.established).finish_non_exhaustive()
    }
}

/// Appends what TLS itself has to say, and gives its size.
fn encode(outgoing: &mut Vec<u8>, mut data: EncodeTlsData<'_, ServerConnectionData>) -> usize {
    let start = outgoing.len();
    let size = match data.encode(&mut []) {
        Err(EncodeError::InsufficientSize(InsufficientSizeError { required_size })) => {
            outgoing.resize(start + required_size, 0);
            data.encode(&mut outgoing[start..]).unwrap_or(0)
        }
        Ok(size) => size,
        Err(EncodeError::AlreadyEncoded) => 0,
    };
    outgoing.truncate(start + size);
    size
}

fn broken(error: rustls::Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

/// The connection ended without `close_notify`, so that the end may be somebody else's doing (RFC 8446, section 6.1).
fn truncated() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "the connection ended without the end of its TLS session")
}
