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
    tls: Option<Box<rustls::Connection>>,
    nonblocking: bool,
}

/// Room for what is read; one for each thread.
pub(crate) struct Scratch {
    wire: Vec<u8>,
    plain: Vec<u8>,
}

impl Scratch {
    pub(crate) fn new() -> Self {
        Self { wire: vec![0; CHUNK], plain: vec![0; CHUNK] }
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
            connection.secure(ClientConnection::new(Arc::clone(config), name)?.into());
            connection.flush()?;
        }
        Ok(connection)
    }

    /// The other end of a connection without a relay.
    pub(crate) fn accept(listener: &TcpListener, tls: Option<&Arc<ServerConfig>>) -> Result<Self> {
        let mut connection = Self::of(listener.accept()?.0)?;
        if let Some(config) = tls {
            connection.secure(ServerConnection::new(Arc::clone(config))?.into());
        }
        Ok(connection)
    }

    fn secure(&mut self, mut tls: rustls::Connection) {
        tls.set_buffer_limit(Some(TLS_CHUNK));
        self.tls = Some(Box::new(tls));
    }

    /// A connection that is there already, without TLS.
    pub(crate) fn of(socket: TcpStream) -> Result<Self> {
        socket.set_nodelay(true)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.set_write_timeout(Some(PATIENCE))?;
        Ok(Self { socket, tls: None, nonblocking: false })
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
        if let Some(tls) = &mut self.tls {
            while tls.is_handshaking() {
                tls.complete_io(&mut self.socket).context("TLS handshake")?;
            }
        }
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
        let Some(tls) = &mut self.tls else { return self.socket.write(bytes) };
        if !flush_tls(tls, &mut self.socket)? {
            return Err(ErrorKind::WouldBlock.into());
        }
        let taken = tls.writer().write(&bytes[..bytes.len().min(TLS_CHUNK)])?;
        flush_tls(tls, &mut self.socket)?;
        Ok(taken)
    }

    /// Sends what waits here; whether nothing is left.
    pub(crate) fn flush(&mut self) -> io::Result<bool> {
        match &mut self.tls {
            Some(tls) => flush_tls(tls, &mut self.socket),
            None => Ok(true),
        }
    }

    /// One read, whose bytes go to `take`.
    pub(crate) fn receive(
        &mut self,
        scratch: &mut Scratch,
        mut take: impl FnMut(&[u8]) -> Result<()>,
    ) -> Result<Received> {
        let buffer = if self.tls.is_some() { &mut scratch.wire } else { &mut scratch.plain };
        let length = match self.socket.read(buffer) {
            Ok(0) => return Ok(Received::End),
            Ok(length) => length,
            // A blocking socket says so when its time is over, and then it is an error.
            Err(error) if error.kind() == ErrorKind::WouldBlock && self.nonblocking => {
                return Ok(Received::Nothing);
            }
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(Received::End),
            Err(error) => return Err(error).context("nothing comes from the relay"),
        };
        let Some(tls) = &mut self.tls else {
            take(&scratch.plain[..length])?;
            return Ok(Received::Some);
        };
        // The library reads no more than 4 KiB at a time by itself, which would cost a system call each.
        let mut wire = &scratch.wire[..length];
        while !wire.is_empty() {
            tls.read_tls(&mut wire)?;
            let mut left = tls.process_new_packets()?.plaintext_bytes_to_read();
            while left > 0 {
                let length = tls.reader().read(&mut scratch.plain)?;
                take(&scratch.plain[..length])?;
                left -= length;
            }
        }
        Ok(Received::Some)
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

fn flush_tls(tls: &mut rustls::Connection, socket: &mut TcpStream) -> io::Result<bool> {
    while tls.wants_write() {
        match tls.write_tls(socket) {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
            Err(error) => return Err(error),
        }
    }
    Ok(true)
}
