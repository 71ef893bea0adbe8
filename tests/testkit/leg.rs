use std::io;

use bytes::Bytes;
use futures_util::{SinkExt as _, StreamExt as _};
use http::HeaderMap;
use midspan_core::id::StreamId;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        Message,
        protocol::{CloseFrame, Role, WebSocketConfig},
    },
};

use crate::{Answer, Frame, Io, Target, Upgraded, until, within};

/// A joined stream, both of whose ends are in the test's hand.
#[derive(Debug)]
pub struct Joined {
    /// The stream.
    pub id: StreamId,
    /// The service's leg.
    pub service: Leg,
    /// The device's leg.
    pub device: Leg,
}

/// One end of a stream, as a well-behaved client has it.
#[derive(Debug)]
pub struct Leg {
    /// The WebSocket.
    pub socket: WebSocketStream<Io>,
    /// The header of the answer to the upgrade.
    pub headers: HeaderMap,
}

impl Leg {
    /// Opens a leg at `url` with `ticket`.
    pub async fn open(target: &Target, url: &str, ticket: &str) -> Self {
        Self::try_open(target, url, ticket, &[]).await.unwrap_or_else(|answer| panic!("refused: {answer:?}"))
    }

    /// Opens a leg as a client does that hears "try again with the same ticket": on a machine that is busy, an edge may not reach
    /// another one in its time.
    pub async fn open_patiently(target: &Target, url: &str, ticket: &str) -> Self {
        until("the leg is taken", || async {
            match Self::try_open(target, url, ticket, &[]).await {
                Ok(leg) => Some(leg),
                Err(answer) if answer.status == 503 => None,
                Err(answer) => panic!("refused: {answer:?}"),
            }
        })
        .await
    }

    /// Opens a leg with headers more, or gives the refusal.
    pub async fn try_open(
        target: &Target,
        url: &str,
        ticket: &str,
        headers: &[(&str, &str)],
    ) -> Result<Self, Answer> {
        Ok(Self::from_upgraded(upgrade(target, url, ticket, headers).await?).await)
    }

    /// The leg of a connection that was upgraded.
    pub async fn from_upgraded(upgraded: Upgraded) -> Self {
        let Upgraded { io, early, headers } = upgraded;
        let config = WebSocketConfig::default().max_message_size(None).max_frame_size(None);
        let socket = WebSocketStream::from_partially_read(io, early.into(), Role::Client, Some(config)).await;
        Self { socket, headers }
    }

    /// Sends a message.
    pub async fn send(&mut self, message: Message) {
        within("sending a message", self.socket.send(message)).await.unwrap();
    }

    /// Sends a text message.
    pub async fn send_text(&mut self, text: &str) {
        self.send(Message::text(text)).await;
    }

    /// Sends a binary message.
    pub async fn send_binary(&mut self, bytes: impl Into<Bytes>) {
        self.send(Message::binary(bytes)).await;
    }

    /// Closes this end.
    pub async fn close(&mut self, code: u16, text: &str) {
        self.send(Message::Close(Some(CloseFrame { code: code.into(), reason: text.to_owned().into() })))
            .await;
    }

    /// The next message but pings and pongs.
    pub async fn next(&mut self) -> Message {
        within("the next message", async {
            loop {
                match self.socket.next().await {
                    Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                    Some(Ok(message)) => return message,
                    end => panic!("the leg ended without a close frame: {end:?}"),
                }
            }
        })
        .await
    }

    /// The next message, which must be text.
    pub async fn next_text(&mut self) -> String {
        match self.next().await {
            Message::Text(text) => text.as_str().to_owned(),
            other => panic!("expected text: {other:?}"),
        }
    }

    /// The next message, which must be binary.
    pub async fn next_binary(&mut self) -> Bytes {
        match self.next().await {
            Message::Binary(bytes) => bytes,
            other => panic!("expected a binary message: {other:?}"),
        }
    }

    /// The close frame, which must come next. Waits for the connection's end, too, and ends it on this side.
    pub async fn closed(&mut self) -> (u16, String) {
        let close = match self.next().await {
            Message::Close(Some(CloseFrame { code, reason })) => (code.into(), reason.as_str().to_owned()),
            Message::Close(None) => (1005, String::new()),
            other => panic!("expected a close frame: {other:?}"),
        };
        // The answer goes out with the next calls; then the relay closes the connection.
        within("the end of the connection", async { while let Some(Ok(_)) = self.socket.next().await {} })
            .await;
        // The relay waits a moment for this. It may be gone already.
        let _ = self.socket.get_mut().shutdown().await;
        close
    }

    /// Checks that the stream ends for `reason`: with that close code, and the reason at the start of the text.
    pub async fn ends(&mut self, code: u16, reason: &str) {
        let (got, text) = self.closed().await;
        assert_eq!(got, code, "{text}");
        assert!(
            text.starts_with(&format!("{reason}: ")),
            "the close text does not begin with {reason}: {text:?}"
        );
    }

    /// Resets the connection.
    pub fn abort(self) {
        self.socket.get_ref().get_ref().0.set_zero_linger().unwrap();
    }
}

/// One end of a stream, byte by byte. Answers nothing by itself.
#[derive(Debug)]
pub struct RawLeg {
    /// The connection.
    pub io: Io,
    buffer: Vec<u8>,
}

impl RawLeg {
    /// Opens a leg at `url` with `ticket`.
    pub async fn open(target: &Target, url: &str, ticket: &str) -> Self {
        match upgrade(target, url, ticket, &[]).await {
            Ok(Upgraded { io, early, .. }) => Self { io, buffer: early.to_vec() },
            Err(answer) => panic!("refused: {answer:?}"),
        }
    }

    /// Sends a frame.
    pub async fn send(&mut self, frame: &Frame) {
        self.send_bytes(&frame.bytes()).await;
    }

    /// Sends bytes that need not be a frame.
    pub async fn send_bytes(&mut self, bytes: &[u8]) {
        within("sending bytes", async {
            self.io.write_all(bytes).await.unwrap();
            self.io.flush().await.unwrap();
        })
        .await;
    }

    /// The next frame, or `None` at the connection's end.
    pub async fn next(&mut self) -> Option<Frame> {
        within("the next frame", async {
            loop {
                if let Some(frame) = Frame::take(&mut self.buffer) {
                    assert!(frame.mask.is_none(), "the relay must not mask: {frame:?}");
                    return Some(frame);
                }
                match self.io.read_buf(&mut self.buffer).await {
                    Ok(0) => return None,
                    Ok(_) => {}
                    Err(error) if ended(&error) => return None,
                    Err(error) => panic!("reading: {error}"),
                }
            }
        })
        .await
    }

    /// The next frame but pings.
    pub async fn next_but_pings(&mut self) -> Frame {
        loop {
            match self.next().await {
                Some(frame) if frame.opcode == 9 => {}
                Some(frame) => return frame,
                None => panic!("the connection ended without a close frame"),
            }
        }
    }

    /// The next message, put together from its fragments: opcode and payload.
    pub async fn next_message(&mut self) -> (u8, Vec<u8>) {
        let first = self.next_but_pings().await;
        assert!(matches!(first.opcode, 1 | 2), "expected a message: {first:?}");
        let (mut fin, mut payload) = (first.fin, first.payload);
        while !fin {
            let more = self.next_but_pings().await;
            assert_eq!(more.opcode, 0, "expected a continuation: {more:?}");
            fin = more.fin;
            payload.extend(more.payload);
        }
        (first.opcode, payload)
    }

    /// Checks that the stream ends for `reason`, answers the close frame, and waits for the connection's end.
    pub async fn ends(&mut self, code: u16, reason: &str) {
        let frame = self.next_but_pings().await;
        let (got, text) = frame.close_reason().unwrap_or_else(|| panic!("expected a close frame: {frame:?}"));
        assert_eq!(got, code, "{text}");
        assert!(
            text.starts_with(&format!("{reason}: ")),
            "the close text does not begin with {reason}: {text:?}"
        );
        let _ = self.io.write_all(&Frame::close(code, "").bytes()).await;
        assert_eq!(self.next().await, None, "something came after the close frame");
        let _ = self.io.shutdown().await;
    }

    /// Resets the connection.
    pub fn abort(self) {
        self.io.get_ref().0.set_zero_linger().unwrap();
    }
}

async fn upgrade(
    target: &Target,
    url: &str,
    ticket: &str,
    headers: &[(&str, &str)],
) -> Result<Upgraded, Answer> {
    let authorization = format!("Bearer {ticket}");
    let mut all = vec![("authorization", authorization.as_str())];
    all.extend_from_slice(headers);
    target.upgrade(path_of(url), &all).await
}

/// The path of a leg's URL.
pub(crate) fn path_of(url: &str) -> &str {
    let rest = url.strip_prefix("wss://").unwrap_or_else(|| panic!("a leg's URL must be wss: {url}"));
    &rest[rest.find('/').expect("a leg's URL needs a path")..]
}

/// Whether the other side has gone, with or without TLS's own goodbye.
fn ended(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe
    )
}
