//! One end of a stream: an established leg.

use std::{fmt, io, time::Duration};

use bytes::Bytes;
use midspan_core::{
    capability::{Capabilities, HALF_CLOSE},
    frame::FrameError,
    id::StreamId,
};
use thiserror::Error;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};

use crate::{
    dial::{Connection, describe},
    http::Upgraded,
    messages::Messages,
    proxy::{Traffic, linger, pump},
};

/// One end of a stream, as a sequence of messages.
///
/// Dropping it without [`Stream::close`] ends the stream at once; the other end hears that the connection was lost.
pub struct Stream {
    id: StreamId,
    messages: Messages<Connection>,
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
    pub(crate) fn new(id: StreamId, leg: Upgraded, own: &Capabilities, peer: &Capabilities) -> Self {
        let messages = Messages::new(leg.connection, leg.early.into());
        Self { id, messages, half_close: own.shared_with(peer).has(HALF_CLOSE) }
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
    ///
    /// When the future is dropped before its end, either nothing of the message is sent or all of it: the rest goes out
    /// with the next call.
    pub async fn send(&mut self, message: Message) -> Result<(), StreamError> {
        self.messages.send(message).await
    }

    /// Receives one message, or nothing once the other end has closed in good order.
    ///
    /// Pings while it waits, and gives up after 90 s. Nothing is lost when the future is dropped before its end.
    pub async fn receive(&mut self) -> Result<Option<Message>, StreamError> {
        self.messages.receive().await
    }

    /// Closes in good order: all that was sent arrives before the other end hears of it.
    pub async fn close(self, text: &str) {
        self.messages.close(text).await;
    }

    /// Carries the bytes of a local TCP connection until both directions are over.
    ///
    /// After an abnormal end the local connection is reset, so that its other end does not take what came for the whole.
    pub async fn proxy(self, mut local: TcpStream) -> Result<Traffic, StreamError> {
        let _ = local.set_nodelay(true);
        let (reader, writer) = local.split();
        let result = pump(self.messages, reader, writer, self.half_close).await;
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
        pump(self.messages, reader, writer, self.half_close).await
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
    pub(crate) fn of_close(code: Option<u16>, text: String) -> Result<(), Self> {
        match code {
            // Without a code is how a browser's `close()` closes.
            None | Some(1000) => Ok(()),
            Some(code) if text.is_empty() => {
                Err(Self::Ended { code, text: "no reason was given".to_owned() })
            }
            Some(code) => Err(Self::Ended { code, text }),
        }
    }

    pub(crate) fn local(error: &io::Error) -> Self {
        Self::Local { kind: error.kind(), reason: describe(error) }
    }

    pub(crate) fn no_close_frame() -> Self {
        Self::Lost("it was closed without a close frame".to_owned())
    }
}

impl From<io::Error> for StreamError {
    /// What a failure of the connection to the relay means.
    fn from(error: io::Error) -> Self {
        // TLS without its own end is how a process that was killed looks.
        if error.kind() == io::ErrorKind::UnexpectedEof {
            Self::no_close_frame()
        } else {
            Self::Lost(describe(&error))
        }
    }
}

impl From<FrameError> for StreamError {
    fn from(error: FrameError) -> Self {
        Self::Lost(format!("the relay broke the WebSocket protocol: {error}"))
    }
}

/// How often a leg is pinged when nothing comes.
pub(crate) const PING_EVERY: Duration = Duration::from_secs(30);

/// How long nothing at all, not even the answer to a ping, may come.
pub(crate) const SILENCE: Duration = Duration::from_secs(90);

/// How long the other side may take to answer a close frame.
pub(crate) const CLOSE_WAIT: Duration = Duration::from_secs(5);
