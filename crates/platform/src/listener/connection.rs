//! One accepted connection, whatever it runs over.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll},
};

use futures_util::FutureExt as _;
use tokio::{
    io::{AsyncRead, AsyncWrite, DuplexStream, Interest, ReadBuf},
    net::TcpStream,
};

use super::Held;
use crate::tls::TlsStream;

/// One connection of a listener, which keeps its place until it is dropped.
#[derive(Debug)]
pub struct Connection {
    transport: Transport,
    _held: Option<Held>,
}

#[derive(Debug)]
pub(super) enum Transport {
    Tcp(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
    Memory(DuplexStream),
}

impl Connection {
    pub(super) fn new(transport: Transport, held: Held) -> Self {
        Self { transport, _held: Some(held) }
    }

    /// One end of a pair that lives in memory, for tests.
    pub fn memory(stream: DuplexStream) -> Self {
        Self { transport: Transport::Memory(stream), _held: None }
    }

    /// Moves it to the runtime of the caller, whose thread waits for it from here on.
    pub fn rehome(self) -> io::Result<Self> {
        let Self { transport, _held: held } = self;
        let transport = match transport {
            Transport::Tcp(stream) => Transport::Tcp(rehome(stream)?),
            Transport::Tls(stream) => Transport::Tls(Box::new(stream.try_map_socket(rehome)?)),
            Transport::Memory(stream) => Transport::Memory(stream),
        };
        Ok(Self { transport, _held: held })
    }

    /// Whether it is a TLS session.
    pub fn is_tls(&self) -> bool {
        matches!(self.transport, Transport::Tls(_))
    }

    /// How many bytes it keeps, of what was written to it and of what came in.
    pub fn backlog(&self) -> usize {
        match &self.transport {
            Transport::Tcp(_) | Transport::Memory(_) => 0,
            Transport::Tls(stream) => stream.backlog(),
        }
    }

    /// Whether the peer has ended its direction, also when there are bytes before that end which nobody has read yet.
    ///
    /// Known from the socket's readiness, without reading. Always false in memory.
    pub fn is_read_closed(&self) -> bool {
        let socket = match &self.transport {
            Transport::Tcp(stream) => stream,
            Transport::Tls(stream) => stream.socket(),
            Transport::Memory(_) => return false,
        };
        let ready = socket.ready(Interest::READABLE | Interest::ERROR).now_or_never();
        match ready {
            Some(Ok(ready)) => ready.is_read_closed() || ready.is_error(),
            Some(Err(_)) => true,
            None => false,
        }
    }

    fn io(self: Pin<&mut Self>) -> Pin<&mut (dyn Io + '_)> {
        match &mut self.get_mut().transport {
            Transport::Tcp(stream) => Pin::new(stream),
            Transport::Tls(stream) => Pin::new(stream),
            Transport::Memory(stream) => Pin::new(stream),
        }
    }
}

fn rehome(stream: TcpStream) -> io::Result<TcpStream> {
    TcpStream::from_std(stream.into_std()?)
}

trait Io: AsyncRead + AsyncWrite + Unpin {}
impl<T: AsyncRead + AsyncWrite + Unpin> Io for T {}

impl AsyncRead for Connection {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.io().poll_read(cx, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.io().poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.io().poll_write_vectored(cx, slices)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.io().poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.io().poll_shutdown(cx)
    }
}
