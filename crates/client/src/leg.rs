//! One end of a stream: an established leg.

use std::{fmt, io, time::Duration};

use bytes::Bytes;
use futures_util::{SinkExt as _, StreamExt as _};
use midspan_core::{
    capability::{Capabilities, HALF_CLOSE},
    id::StreamId,
    link::close_text,
};
use thiserror::Error;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    time::timeout,
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        self,
        protocol::{CloseFrame, WebSocketConfig, frame::coding::CloseCode},
    },
};

use crate::{
    dial::{Connection, describe},
    proxy::{Traffic, linger, pump},
};

/// One end of a stream, as a sequence of messages.
///
/// Dropping it without [`Stream::close`] ends the stream at once; the other end hears that the connection was lost.
pub struct Stream {
    id: StreamId,
    socket: WebSocketStream<Connection>,
    half_close: bool,
}

/// What one end sends and the other receives, type and boundaries kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// UTF-8 text.
    Text(String),
    /// Bytes. With half-close in force, an empty message ends the direction.
    Binary(Bytes),
}

/// Why a stream ended otherwise than by a clean close.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum StreamError {
    /// The relay, or the other end, closed the stream with another code than 1000.
    #[error("the stream was ended: {text} (close code {code})")]
    Ended {
        /// The close code (RFC 6455, section 7.4).
        code: u16,
        /// The close text: the relay's begins with the reason.
        text: String,
    },
    /// The connection to the relay ended without a close frame.
    #[error("the connection to the relay was lost: {0}")]
    Lost(String),
    /// Nothing came from the relay for 90 s.
    #[error("the relay was silent for {} s", SILENCE.as_secs())]
    Silent,
    /// The other end broke the half-close rules.
    #[error("the other end sent data after the end of its direction")]
    AfterEnd,
    /// The local connection failed, and the stream was aborted.
    #[error("the local connection failed: {reason}")]
    Local {
        /// What kind of failure.
        kind: io::ErrorKind,
        /// Why, in the words of the system.
        reason: String,
    },
}

impl Stream {
    pub(crate) fn new(
        id: StreamId,
        socket: WebSocketStream<Connection>,
        own: &Capabilities,
        peer: &Capabilities,
    ) -> Self {
        Self { id, socket, half_close: own.shared_with(peer).has(HALF_CLOSE) }
    }

    /// The stream's id, as the relay's log and API have it.
    pub fn id(&self) -> StreamId {
        self.id
    }

    /// Whether each direction ends by itself, with an empty binary message.
    pub fn half_close(&self) -> bool {
        self.half_close
    }

    /// Sends one message, and waits while the other end does not read.
    pub async fn send(&mut self, message: Message) -> Result<(), StreamError> {
        let message = match message {
            Message::Text(text) => tungstenite::Message::text(text),
            Message::Binary(data) => tungstenite::Message::Binary(data),
        };
        self.socket.send(message).await.map_err(StreamError::from)
    }

    /// Receives one message, or nothing once the other end has closed in good order.
    ///
    /// Pings while it waits, and gives up after 90 s.
    pub async fn receive(&mut self) -> Result<Option<Message>, StreamError> {
        let mut silent = Duration::ZERO;
        loop {
            let Ok(message) = timeout(PING_EVERY, self.socket.next()).await else {
                silent += PING_EVERY;
                if silent >= SILENCE {
                    return Err(StreamError::Silent);
                }
                self.socket.send(tungstenite::Message::Ping(Bytes::new())).await?;
                continue;
            };
            silent = Duration::ZERO;
            match message {
                Some(Ok(tungstenite::Message::Text(text))) => {
                    return Ok(Some(Message::Text(text.as_str().to_owned())));
                }
                Some(Ok(tungstenite::Message::Binary(data))) => return Ok(Some(Message::Binary(data))),
                Some(Ok(tungstenite::Message::Close(frame))) => {
                    // The answer to the close frame is a courtesy that the relay does not depend on.
                    let _ = timeout(CLOSE_WAIT, self.socket.flush()).await;
                    return StreamError::of_close(frame).map_or(Ok(None), Err);
                }
                Some(Ok(_)) => {}
                Some(Err(error)) => return Err(error.into()),
                None => return Err(StreamError::no_close_frame()),
            }
        }
    }

    /// Closes in good order: all that was sent arrives before the other end hears of it.
    pub async fn close(mut self, text: &str) {
        let frame = CloseFrame { code: CloseCode::Normal, reason: close_text(text).to_owned().into() };
        let closing = async {
            self.socket.close(Some(frame)).await?;
            while let Some(Ok(message)) = self.socket.next().await {
                if message.is_close() {
                    break;
                }
            }
            Ok::<_, tungstenite::Error>(())
        };
        // Whoever closes has nothing more to lose: a failure changes nothing for it.
        let _ = timeout(CLOSE_WAIT, closing).await;
    }

    /// Carries the bytes of a local TCP connection until both directions are over.
    ///
    /// After an abnormal end the local connection is reset, so that its other end does not take what came for the whole.
    pub async fn proxy(self, mut local: TcpStream) -> Result<Traffic, StreamError> {
        let _ = local.set_nodelay(true);
        let (reader, writer) = local.split();
        let result = pump(self.socket, reader, writer, self.half_close).await;
        match result {
            Ok(_) => linger(&mut local).await,
            // The socket may be gone already, and then there is nothing to reset.
            Err(_) => drop(local.set_zero_linger()),
        }
        result
    }

    /// Carries bytes from `reader` and to `writer`, such as standard input and output, until both directions are over.
    pub async fn proxy_io<R, W>(self, reader: R, writer: W) -> Result<Traffic, StreamError>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        pump(self.socket, reader, writer, self.half_close).await
    }
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stream")
            .field("id", &self.id)
            .field("half_close", &self.half_close)
            .finish_non_exhaustive()
    }
}

impl StreamError {
    /// What a close frame means; a clean one is no error.
    pub(crate) fn of_close(frame: Option<CloseFrame>) -> Option<Self> {
        match frame {
            // Without a code is how a browser's `close()` closes.
            None | Some(CloseFrame { code: CloseCode::Normal, .. }) => None,
            Some(frame) => {
                let text =
                    if frame.reason.is_empty() { "no reason was given" } else { frame.reason.as_str() };
                Some(Self::Ended { code: frame.code.into(), text: text.to_owned() })
            }
        }
    }

    pub(crate) fn local(error: &io::Error) -> Self {
        Self::Local { kind: error.kind(), reason: describe(error) }
    }

    pub(crate) fn no_close_frame() -> Self {
        Self::Lost("it was closed without a close frame".to_owned())
    }
}

impl From<tungstenite::Error> for StreamError {
    #[expect(clippy::wildcard_enum_match_arm, reason = "every other failure keeps the library's words")]
    fn from(error: tungstenite::Error) -> Self {
        match error {
            // TLS without its own end is how a process that was killed looks.
            tungstenite::Error::Io(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                Self::no_close_frame()
            }
            tungstenite::Error::Io(error) => Self::Lost(describe(&error)),
            tungstenite::Error::Protocol(tungstenite::error::ProtocolError::ResetWithoutClosingHandshake)
            | tungstenite::Error::ConnectionClosed
            | tungstenite::Error::AlreadyClosed => Self::no_close_frame(),
            other => Self::Lost(other.to_string()),
        }
    }
}

/// What every leg is read and written with.
pub(crate) fn config() -> WebSocketConfig {
    WebSocketConfig::default()
        .max_message_size(Some(MESSAGE_MAX))
        .max_frame_size(Some(MESSAGE_MAX))
        // Each message goes to TLS at once; flushing is what waits until the source has no more.
        .write_buffer_size(0)
}

/// The longest message that a leg takes.
const MESSAGE_MAX: usize = 64 << 20;

/// How often a leg is pinged when nothing comes.
pub(crate) const PING_EVERY: Duration = Duration::from_secs(30);

/// How long nothing at all, not even the answer to a ping, may come.
pub(crate) const SILENCE: Duration = Duration::from_secs(90);

/// How long the other side may take to answer a close frame.
pub(crate) const CLOSE_WAIT: Duration = Duration::from_secs(5);
