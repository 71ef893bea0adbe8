//! One accepted connection, whatever it runs over.

use std::{
    ffi::c_int,
    io::{self, IoSlice},
    os::fd::AsRawFd as _,
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

    /// Has its reader woken for so many bytes at once, and not for less; or for its end. Whether that is so now.
    ///
    /// Below that mark the kernel acknowledges at once what comes in (`SO_RCVLOWAT`, socket(7)); it may settle for a lower
    /// one. Never with TLS.
    pub fn set_low_water(&self, bytes: usize) -> bool {
        let (Transport::Tcp(socket), Ok(bytes)) = (&self.transport, c_int::try_from(bytes)) else {
            return false;
        };
        uapi::setsockopt(socket.as_raw_fd(), uapi::c::SOL_SOCKET, uapi::c::SO_RCVLOWAT, &bytes).is_ok()
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpListener,
        time::timeout,
    };

    use super::*;

    /// Far less than the first window of a connection, which would be a reason to wake the reader, too.
    const MARK: usize = 16 * 1024;

    /// The accepted end is the second.
    async fn connected() -> (TcpStream, Connection) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let peer = TcpStream::connect(listener.local_addr().unwrap());
        let (peer, accepted) = tokio::join!(peer, listener.accept());
        (peer.unwrap(), Connection { transport: Transport::Tcp(accepted.unwrap().0), _held: None })
    }

    /// What comes of a read within `time`, if anything.
    async fn read(connection: &mut Connection, time: Duration) -> Option<usize> {
        let mut buffer = vec![0; 2 * MARK];
        timeout(time, connection.read(&mut buffer)).await.ok().map(Result::unwrap)
    }

    const SHORT: Duration = Duration::from_millis(100);
    const LONG: Duration = Duration::from_secs(30);

    #[tokio::test]
    async fn below_the_mark_nobody_is_woken_until_it_is_lowered() {
        let (mut peer, mut connection) = connected().await;
        assert!(connection.set_low_water(MARK));
        assert_eq!(read(&mut connection, SHORT).await, None, "nothing was sent");
        peer.write_all(b"little").await.unwrap();
        assert_eq!(read(&mut connection, SHORT).await, None);
        assert!(connection.set_low_water(1));
        assert_eq!(read(&mut connection, LONG).await, Some(6));
    }

    #[tokio::test]
    async fn at_the_mark_and_at_the_end_the_reader_is_woken() {
        let (mut peer, mut connection) = connected().await;
        assert!(connection.set_low_water(MARK));
        peer.write_all(&vec![7; MARK]).await.unwrap();
        let mut read_so_far = 0;
        while read_so_far < MARK {
            read_so_far += read(&mut connection, LONG).await.unwrap();
        }
        peer.write_all(b"little").await.unwrap();
        assert_eq!(read(&mut connection, SHORT).await, None);
        drop(peer);
        assert_eq!(read(&mut connection, LONG).await, Some(6));
        assert_eq!(read(&mut connection, LONG).await, Some(0));
    }

    #[tokio::test]
    async fn a_connection_in_memory_has_no_mark() {
        let (_peer, stream) = tokio::io::duplex(64);
        assert!(!Connection::memory(stream).set_low_water(MARK));
    }
}
