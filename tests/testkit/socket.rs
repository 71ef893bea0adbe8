use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use rustls::pki_types::ServerName;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf},
    net::{TcpSocket, TcpStream},
};
use tokio_rustls::TlsConnector;

use crate::{Io, Target, within};

/// A connection with or without TLS.
#[derive(Debug)]
pub enum Socket {
    /// With TLS.
    Tls(Box<Io>),
    /// Without.
    Plain(TcpStream),
}

impl Socket {
    /// Resets the connection.
    pub fn abort(self) {
        let tcp = match &self {
            Self::Tls(tls) => tls.get_ref().0,
            Self::Plain(tcp) => tcp,
        };
        tcp.set_zero_linger().unwrap();
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tls(tls) => Pin::new(tls).poll_read(cx, buffer),
            Self::Plain(tcp) => Pin::new(tcp).poll_read(cx, buffer),
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tls(tls) => Pin::new(tls).poll_write(cx, bytes),
            Self::Plain(tcp) => Pin::new(tcp).poll_write(cx, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tls(tls) => Pin::new(tls).poll_flush(cx),
            Self::Plain(tcp) => Pin::new(tcp).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tls(tls) => Pin::new(tls).poll_shutdown(cx),
            Self::Plain(tcp) => Pin::new(tcp).poll_shutdown(cx),
        }
    }
}

/// How to reach a relay's public port.
#[derive(Debug, Clone)]
pub struct Dial {
    /// The relay.
    pub target: Target,
    /// Whether it speaks TLS.
    pub tls: bool,
    /// The kernel's buffers for each connection, or as large as the kernel likes.
    pub buffers: Option<u32>,
}

impl Dial {
    /// Opens a connection.
    pub async fn connect(&self) -> Socket {
        let socket = TcpSocket::new_v4().unwrap();
        if let Some(size) = self.buffers {
            socket.set_recv_buffer_size(size).unwrap();
            socket.set_send_buffer_size(size).unwrap();
        }
        let tcp = within("a TCP connection", socket.connect(self.target.address)).await.unwrap();
        tcp.set_nodelay(true).unwrap();
        if !self.tls {
            return Socket::Plain(tcp);
        }
        let name = ServerName::try_from(self.target.host().to_owned()).unwrap();
        let handshake = TlsConnector::from(Arc::clone(&self.target.tls)).connect(name, tcp);
        Socket::Tls(Box::new(within("a TLS handshake", handshake).await.unwrap()))
    }

    /// Opens a WebSocket, and gives what came right after the answer, too.
    pub async fn upgrade(&self, path: &str, headers: &[(&str, &str)]) -> (Socket, Vec<u8>) {
        let mut socket = self.connect().await;
        let mut request = format!(
            "GET {path} HTTP/1.1\r\nHost: {}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n",
            self.target.authority
        );
        for (name, value) in headers {
            request.extend([name, ": ", value, "\r\n"]);
        }
        request += "\r\n";
        within("the answer to an upgrade", async {
            socket.write_all(request.as_bytes()).await.unwrap();
            socket.flush().await.unwrap();
            let mut answer = Vec::new();
            loop {
                let end = answer.windows(4).position(|four| four == b"\r\n\r\n");
                if let Some(end) = end {
                    let text = String::from_utf8_lossy(&answer);
                    assert!(text.starts_with("HTTP/1.1 101 "), "refused: {text}");
                    return (socket, answer.split_off(end + 4));
                }
                let read = socket.read_buf(&mut answer).await.unwrap();
                assert!(read > 0, "no answer: {}", String::from_utf8_lossy(&answer));
            }
        })
        .await
    }
}
