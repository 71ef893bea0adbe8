//! One connection of the generator, with or without TLS, blocking or not.

use std::{
    io::{self, ErrorKind, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    os::fd::{AsFd, BorrowedFd},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use rustls::{ClientConfig, ClientConnection, ServerConfig, ServerConnection};

use crate::records::{RECORD, Records};

/// No answer of a relay takes this long.
const PATIENCE: Duration = Duration::from_secs(20);
/// What one read takes at most.
const CHUNK: usize = 1 << 20;
/// What TLS takes of one write.
const TLS_CHUNK: usize = 256 << 10;

/// A connection to a relay, or from one.
#[derive(Debug)]
pub(crate) struct Connection {
    socket: TcpStream,
    tls: Tls,
    nonblocking: bool,
}

#[derive(Debug)]
enum Tls {
    None,
    Handshake(Box<rustls::Connection>),
    Open(Box<Records>),
}

/// Room for what is read; one for each thread.
pub(crate) struct Scratch(Vec<u8>);

impl Scratch {
    pub(crate) fn new() -> Self {
        Self(vec![0; RECORD + CHUNK])
    }
}

impl Connection {
    /// Connects, and starts the TLS handshake if there is to be one.
    pub(crate) fn open(address: SocketAddr, tls: Option<&Arc<ClientConfig>>) -> Result<Self> {
        Self::open_as("localhost", address, tls)
    }

    /// The same, asking for a server of another name.
    pub(crate) fn open_as(name: &str, address: SocketAddr, tls: Option<&Arc<ClientConfig>>) -> Result<Self> {
        let socket = TcpStream::connect(address).with_context(|| format!("cannot connect to {address}"))?;
        let mut connection = Self::of(socket)?;
        if let Some(config) = tls {
            let name = name.to_owned().try_into()?;
            let mut handshake = ClientConnection::new(Arc::clone(config), name)?;
            handshake.write_tls(&mut connection.socket)?;
            connection.tls = Tls::Handshake(Box::new(handshake.into()));
        }
        Ok(connection)
    }

    /// The other end of a connection without a relay.
    pub(crate) fn accept(listener: &TcpListener, tls: Option<&Arc<ServerConfig>>) -> Result<Self> {
        let mut connection = Self::of(listener.accept()?.0)?;
        if let Some(config) = tls {
            let handshake = ServerConnection::new(Arc::clone(config))?;
            connection.tls = Tls::Handshake(Box::new(handshake.into()));
        }
        Ok(connection)
    }

    /// A connection that is there already, without TLS.
    pub(crate) fn of(socket: TcpStream) -> Result<Self> {
        socket.set_nodelay(true)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.set_write_timeout(Some(PATIENCE))?;
        Ok(Self { socket, tls: Tls::None, nonblocking: false })
    }

    pub(crate) fn set_nonblocking(&mut self, nonblocking: bool) -> io::Result<()> {
        self.nonblocking = nonblocking;
        self.socket.set_nonblocking(nonblocking)
    }

    /// Asks for an upgrade to WebSocket.
    pub(crate) fn request(&mut self, path: &str, ticket: Option<&str>) -> Result<()> {
        let authorization =
            ticket.map(|ticket| format!("Authorization: Bearer {ticket}\r\n")).unwrap_or_default();
        self.request_with(path, &authorization)
    }

    /// The same with these headers, each with its end of line.
    pub(crate) fn request_with(&mut self, path: &str, headers: &str) -> Result<()> {
        let request = format!(
            "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n{headers}\r\n"
        );
        self.handshake()?;
        self.send_all(request.as_bytes())?;
        Ok(())
    }

    /// Does the TLS handshake to its end, on a blocking socket.
    pub(crate) fn handshake(&mut self) -> Result<()> {
        self.tls = match std::mem::replace(&mut self.tls, Tls::None) {
            Tls::Handshake(mut tls) => {
                while tls.is_handshaking() {
                    tls.complete_io(&mut self.socket).context("TLS handshake")?;
                }
                Tls::Open(Box::new(Records::after(*tls)?))
            }
            tls @ (Tls::None | Tls::Open(_)) => tls,
        };
        Ok(())
    }

    /// Waits for the answer to the upgrade. Nothing may come behind it yet.
    pub(crate) fn answer(&mut self, scratch: &mut Scratch) -> Result<()> {
        let mut head = Vec::new();
        while !head.windows(4).any(|end| end == b"\r\n\r\n") {
            let more = self.receive(scratch, |bytes| {
                head.extend_from_slice(bytes);
                Ok(())
            })?;
            ensure!(more == Received::Some, "the relay closed the connection instead of an answer");
        }
        if !head.starts_with(b"HTTP/1.1 101 ") || !head.ends_with(b"\r\n\r\n") {
            bail!("the relay answered {}", String::from_utf8_lossy(&head));
        }
        Ok(())
    }

    /// Writes all, on a blocking socket.
    pub(crate) fn send_all(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            bytes = &bytes[self.send(bytes)?..];
        }
        while !self.flush()? {}
        Ok(())
    }

    /// Hands over what is taken of `bytes`. With TLS some of it may wait here for a [`Connection::flush`].
    pub(crate) fn send(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut self.tls {
            Tls::None => self.socket.write(bytes),
            Tls::Handshake(_) => Err(io::Error::other("the TLS handshake is not done")),
            Tls::Open(tls) => {
                if !tls.send(&mut self.socket)? {
                    return Err(ErrorKind::WouldBlock.into());
                }
                let bytes = &bytes[..bytes.len().min(TLS_CHUNK)];
                tls.seal(bytes)?;
                tls.send(&mut self.socket)?;
                Ok(bytes.len())
            }
        }
    }

    /// Sends what waits here; whether nothing is left.
    pub(crate) fn flush(&mut self) -> io::Result<bool> {
        match &mut self.tls {
            Tls::Open(tls) => tls.send(&mut self.socket),
            Tls::None | Tls::Handshake(_) => Ok(true),
        }
    }

    /// One read, whose bytes go to `take`.
    pub(crate) fn receive(
        &mut self,
        scratch: &mut Scratch,
        mut take: impl FnMut(&[u8]) -> Result<()>,
    ) -> Result<Received> {
        let (received, bytes) = self.read(scratch)?;
        match &mut self.tls {
            Tls::Open(tls) => tls.open(&mut scratch.0[..bytes], take)?,
            Tls::None | Tls::Handshake(_) => take(&scratch.0[..bytes])?,
        }
        Ok(received)
    }

    /// One read from a connection with TLS, whose records are counted and, but for the first, not opened. How many bytes of
    /// payload there were.
    pub(crate) fn count(&mut self, scratch: &mut Scratch) -> Result<(Received, usize)> {
        let (received, bytes) = self.read(scratch)?;
        let Tls::Open(tls) = &mut self.tls else { bail!("there are no records") };
        Ok((received, tls.count(&mut scratch.0[..bytes])?))
    }

    #[cfg(test)]
    pub(crate) fn into_records(self) -> Option<Records> {
        if let Tls::Open(records) = self.tls { Some(*records) } else { None }
    }

    pub(crate) fn is_tls(&self) -> bool {
        matches!(self.tls, Tls::Open(_))
    }

    /// One read, to behind what is left of the last one; how much there is then.
    fn read(&mut self, Scratch(buffer): &mut Scratch) -> Result<(Received, usize)> {
        let kept = if let Tls::Open(tls) = &self.tls { tls.resume(buffer) } else { 0 };
        match self.socket.read(&mut buffer[kept..kept + CHUNK]) {
            Ok(0) => Ok((Received::End, kept)),
            Ok(length) => Ok((Received::Some, kept + length)),
            // A blocking socket says so when its time is over, and then it is an error.
            Err(error) if error.kind() == ErrorKind::WouldBlock && self.nonblocking => {
                Ok((Received::Nothing, kept))
            }
            Err(error) if error.kind() == ErrorKind::ConnectionReset => Ok((Received::End, kept)),
            Err(error) => Err(error).context("nothing comes from the relay"),
        }
    }
}

/// What a read found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Received {
    Some,
    Nothing,
    End,
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
