//! A TLS session as a stream of bytes.
//!
//! Records are read to where the reader wants their payload, and opened there; the records of up to 256 KiB leave in one
//! write. A session keeps bytes of its own only for a record that is not whole, for a reader that has less room than a
//! record takes, and for a socket that takes nothing.

use std::{
    cell::RefCell,
    fmt,
    io::{self, IoSlice},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use rustls::{ClientConfig, ServerConfig, pki_types::ServerName};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::{
    handshake::{self, Done, Turns, broken, truncated},
    session::{Fatal, Opened, RECORD_MAX, SEALED_MAX, Session},
};
use crate::{copy::append, unsent::Unsent};

/// The most payload that is sealed and written at once, in bytes: that of 16 records. What was sealed first is still in the
/// caches when the last has been. 512 KiB took about a tenth more of the processor with one stream, and no more with 32.
pub(super) const SEAL: usize = 16 * SEALED_MAX;

thread_local! {
    /// Where records are opened for a reader that has less room than one takes.
    static RECORD: RefCell<[u8; RECORD_MAX]> = const { RefCell::new([0; RECORD_MAX]) };
}

/// A TLS session over `S`.
pub struct TlsStream<S> {
    pub(super) socket: S,
    pub(super) session: Session,
    /// The start of a record that is not whole.
    incoming: Vec<u8>,
    /// Payload that the reader had no room for.
    opened: Vec<u8>,
    /// Records that the socket has not taken.
    outgoing: Unsent,
    /// Whether they are what the handshake has left, which is in no hurry: a write and a wake-up less for both ends when
    /// it goes with the first payload.
    tickets: bool,
    /// Whether the answer to a key update, or an alert, is among them.
    answering: bool,
    /// Whether the peer has said that nothing more comes.
    peer_closed: bool,
    /// Whether we have.
    closed: bool,
    /// Why nothing more can be opened.
    failure: Option<Box<rustls::Error>>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> TlsStream<S> {
    /// Does the server's part of the handshake.
    ///
    /// `read` has been read of `socket` already. The costly step waits for one of `turns`. Fails when the peer makes a mistake, or ends the connection. `config` must come from
    /// [`server_config`](super::server_config).
    pub async fn accept(
        mut socket: S,
        config: Arc<ServerConfig>,
        turns: Arc<Turns>,
        read: Vec<u8>,
    ) -> io::Result<Self> {
        let done = handshake::accept(&mut socket, config, &turns, read).await?;
        Ok(Self::new(socket, done))
    }

    /// Does the client's part of the handshake, with a server that is to prove that it is `name`.
    ///
    /// Its last message leaves with the first payload. Fails like [`TlsStream::accept`]; a server that does not take the
    /// client's certificate says so later. `config` must be made by `configure_client`.
    pub(crate) async fn connect(
        mut socket: S,
        config: Arc<ClientConfig>,
        name: ServerName<'static>,
    ) -> io::Result<Self> {
        let done = handshake::connect(&mut socket, config, name).await?;
        Ok(Self::new(socket, done))
    }

    fn new(socket: S, Done { session, mut incoming, outgoing }: Done) -> Self {
        let mut unsent = Unsent::default();
        unsent.push(outgoing);
        let mut stream = Self {
            socket,
            session,
            incoming: Vec::new(),
            opened: Vec::new(),
            tickets: !unsent.is_empty(),
            outgoing: unsent,
            answering: false,
            peer_closed: false,
            closed: false,
            failure: None,
        };
        let opened = stream.open(&mut incoming);
        incoming.truncate(opened);
        incoming.shrink_to_fit();
        stream.opened = incoming;
        stream
    }

    /// Puts something else below.
    pub fn try_map_socket<T>(self, map: impl FnOnce(S) -> io::Result<T>) -> io::Result<TlsStream<T>> {
        Ok(TlsStream {
            socket: map(self.socket)?,
            session: self.session,
            incoming: self.incoming,
            opened: self.opened,
            outgoing: self.outgoing,
            tickets: self.tickets,
            answering: self.answering,
            peer_closed: self.peer_closed,
            closed: self.closed,
            failure: self.failure,
        })
    }

    /// What is below.
    pub fn socket(&self) -> &S {
        &self.socket
    }

    /// How many bytes it keeps, of what was written to it and of what came in.
    pub fn backlog(&self) -> usize {
        self.outgoing.memory() + self.incoming.capacity() + self.opened.capacity()
    }

    /// Reads from the socket once, and opens what is whole into `reader`.
    fn poll_open(&mut self, cx: &mut Context<'_>, reader: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if reader.remaining() >= RECORD_MAX {
            let opened = ready!(self.poll_open_in(cx, reader.initialize_unfilled()))?;
            reader.advance(opened);
            return Poll::Ready(Ok(()));
        }
        // To the end of a record, so that small reads of the caller do not make small reads of the socket.
        RECORD.with_borrow_mut(|record| {
            let opened = ready!(self.poll_open_in(cx, record))?;
            let (now, later) = record[..opened].split_at(opened.min(reader.remaining()));
            reader.put_slice(now);
            append(&mut self.opened, later);
            Poll::Ready(Ok(()))
        })
    }

    /// Reads from the socket once, into `buffer`, which has room for a record, and says how much payload stands at its
    /// start then.
    fn poll_open_in(&mut self, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        let kept = self.incoming.len();
        let mut read = ReadBuf::new(&mut buffer[kept..]);
        ready!(Pin::new(&mut self.socket).poll_read(cx, &mut read))?;
        let end = kept + read.filled().len();
        if end == kept {
            return Poll::Ready(Err(truncated()));
        }
        buffer[..kept].copy_from_slice(&self.incoming);
        Poll::Ready(Ok(self.open(&mut buffer[..end])))
    }

    /// Opens the whole ones of `records`, keeps what is left, and says how much payload stands at the start then.
    fn open(&mut self, records: &mut [u8]) -> usize {
        let start = records.as_ptr().addr();
        let (mut used, mut opened) = (0, 0);
        while !self.peer_closed && self.failure.is_none() {
            match self.session.open(&mut records[used..]) {
                Ok(None) => break,
                Ok(Some((size, found))) => {
                    match found {
                        Opened::Payload(payload) => {
                            let (from, length) = (payload.as_ptr().addr() - start, payload.len());
                            records.copy_within(from..from + length, opened);
                            opened += length;
                        }
                        Opened::KeyUpdate { requested } => {
                            // One answer does for all that were asked before it leaves (RFC 8446, section 4.6.3).
                            if requested && !self.answering && !self.closed {
                                self.answering = true;
                                match self.session.update_keys() {
                                    Ok(record) => self.outgoing.push(record),
                                    Err(error) => self.fail(error.into()),
                                }
                            }
                        }
                        Opened::Closed => self.peer_closed = true,
                        Opened::Nothing => {}
                    }
                    used += size;
                }
                Err(fatal) => self.fail(fatal),
            }
        }
        if used == records.len() || self.peer_closed || self.failure.is_some() {
            self.incoming = Vec::new();
        } else {
            // No more than that: thousands of streams may keep the start of a record for long.
            self.incoming = records[used..].to_vec();
        }
        opened
    }

    /// Ends the session, which the peer is told in our last record.
    fn fail(&mut self, Fatal { alert, error }: Fatal) {
        if let Some(alert) = alert
            && !self.closed
            && let Ok(record) = self.session.alert(alert)
        {
            self.outgoing.push(record);
            self.answering = true;
        }
        self.closed = true;
        self.failure = Some(Box::new(error));
    }

    /// Writes what is outgoing.
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.tickets = false;
        while !self.outgoing.is_empty() {
            ready!(self.outgoing.poll_write(Pin::new(&mut self.socket), cx))?;
        }
        self.answering = false;
        Poll::Ready(Ok(()))
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
        let before = reader.filled().len();
        if !self.opened.is_empty() {
            let size = self.opened.len().min(reader.remaining());
            reader.put_slice(&self.opened[..size]);
            self.opened.drain(..size);
            if self.opened.is_empty() {
                self.opened = Vec::new();
            }
        }
        loop {
            if self.answering {
                // Answers and alerts go out when they can; who reads does not wait for that.
                let _ = self.poll_send(cx);
            }
            if self.peer_closed || reader.filled().len() > before {
                return Poll::Ready(Ok(()));
            }
            if let Some(error) = &self.failure {
                return Poll::Ready(Err(broken(rustls::Error::clone(error))));
            }
            ready!(self.poll_open(cx, reader))?;
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for TlsStream<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if self.closed {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        if !self.tickets {
            ready!(self.poll_send(cx))?;
        }
        let stream = &mut *self;
        let mut taken = 0;
        for slice in slices {
            let payload = &slice[..slice.len().min(SEAL - taken)];
            stream.session.seal(payload, &mut stream.outgoing).map_err(broken)?;
            taken += payload.len();
        }
        if taken > 0 {
            // What the socket does not take is kept.
            let _ = stream.poll_send(cx)?;
        }
        Poll::Ready(Ok(taken))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.tickets {
            ready!(self.poll_send(cx))?;
        }
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let stream = &mut *self;
        if !stream.closed {
            stream.closed = true;
            stream.outgoing.push(stream.session.close().map_err(broken)?);
        }
        ready!(self.poll_send(cx))?;
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}

impl<S> fmt::Debug for TlsStream<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsStream").field("closed", &self.closed).finish_non_exhaustive()
    }
}
