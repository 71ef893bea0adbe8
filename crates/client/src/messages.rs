//! A leg as a sequence of messages.

use std::{
    future::poll_fn,
    io,
    task::{Context, Poll, ready},
};

use bytes::{Bytes, BytesMut};
use midspan_core::frame::{HEADER_MAX, Opcode};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::{Instant, sleep_until, timeout},
};

use crate::{
    frames::{Frames, Piece},
    leg::{CLOSE_WAIT, Message, PING_EVERY, SILENCE, StreamError},
    scratch,
};

/// Messages over a connection, in both directions.
pub(crate) struct Messages<IO> {
    frames: Frames<IO>,
    incoming: Incoming,
    /// What is still to be sent of a message, and what it goes on with.
    outgoing: Option<(Opcode, Bytes)>,
    /// How the stream ended.
    end: Option<Result<(), StreamError>>,
    /// When the leg is pinged, unless something comes before.
    next_ping: Instant,
    /// How many pings were sent since anything came.
    unanswered: u32,
}

/// What is here of a message that is not whole.
#[derive(Debug, Default)]
pub(crate) struct Incoming {
    pub(crate) is_text: bool,
    pub(crate) data: Vec<u8>,
}

/// What the proxy goes on with.
pub(crate) struct Parts<IO> {
    pub(crate) frames: Frames<IO>,
    pub(crate) incoming: Incoming,
    pub(crate) end: Option<Result<(), StreamError>>,
}

impl<IO: AsyncRead + AsyncWrite + Unpin> Messages<IO> {
    /// The client's end of a connection, of which `early` was read already.
    pub(crate) fn new(io: IO, early: BytesMut) -> Self {
        Self {
            frames: Frames::new(io, early),
            incoming: Incoming::default(),
            outgoing: None,
            end: None,
            next_ping: Instant::now() + PING_EVERY,
            unanswered: 0,
        }
    }

    /// Sends one message. When it is dropped half-way, the rest goes out with whatever is called next.
    pub(crate) async fn send(&mut self, message: Message) -> Result<(), StreamError> {
        let (opcode, payload) = match message {
            Message::Text(text) => (Opcode::Text, Bytes::from(text)),
            Message::Binary(data) => (Opcode::Binary, data),
        };
        match &self.end {
            None => {}
            Some(Err(error)) => return Err(error.clone()),
            Some(Ok(())) => return Err(StreamError::Lost("the other end has closed it".to_owned())),
        }
        poll_fn(|cx| self.poll_send(cx)).await?;
        self.outgoing = Some((opcode, payload));
        Ok(poll_fn(|cx| self.poll_send(cx)).await?)
    }

    /// Receives one message, or nothing after a clean end; the end is the same however often it is asked for.
    pub(crate) async fn receive(&mut self) -> Result<Option<Message>, StreamError> {
        while self.end.is_none() {
            let next_ping = self.next_ping;
            tokio::select! {
                biased;
                message = poll_fn(|cx| self.poll_receive(cx)) => {
                    if let Some(message) = message {
                        return Ok(Some(message));
                    }
                    // The answer to the close frame is a courtesy that the relay does not depend on.
                    let _ = timeout(CLOSE_WAIT, poll_fn(|cx| self.frames.poll_drain(cx))).await;
                }
                () = sleep_until(next_ping) => self.ping(),
            }
        }
        match &self.end {
            Some(Err(error)) => Err(error.clone()),
            Some(Ok(())) | None => Ok(None),
        }
    }

    fn ping(&mut self) {
        let now = Instant::now();
        if now < self.next_ping {
            return;
        }
        self.unanswered += 1;
        if PING_EVERY * self.unanswered >= SILENCE {
            self.end = Some(Err(StreamError::Silent));
        }
        self.next_ping = now + PING_EVERY;
        self.frames.put_ping();
    }

    /// Closes in good order, and waits for the answer.
    pub(crate) async fn close(mut self, text: &str) {
        let closing = async {
            poll_fn(|cx| self.poll_send(cx)).await?;
            self.frames.put_close(Some(1000), text);
            poll_fn(|cx| self.frames.poll_drain(cx)).await?;
            while poll_fn(|cx| self.poll_receive(cx)).await.is_some() {}
            Ok::<_, io::Error>(())
        };
        // Whoever closes has nothing more to lose: a failure changes nothing for it.
        let _ = timeout(CLOSE_WAIT, closing).await;
    }

    /// What a proxy goes on with, which takes messages for a mere flow of bytes.
    pub(crate) fn into_parts(mut self) -> Parts<IO> {
        if let Some((opcode, rest)) = self.outgoing {
            self.frames.put_long(opcode, &rest);
        }
        Parts { frames: self.frames, incoming: self.incoming, end: self.end }
    }

    /// Sends what waits, and what is left of a message.
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            ready!(self.frames.poll_drain(cx))?;
            let Some((opcode, mut rest)) = self.outgoing.take() else { return Poll::Ready(Ok(())) };
            let payload = rest.split_to(rest.len().min(FRAME_MOST));
            if !rest.is_empty() {
                self.outgoing = Some((Opcode::Continuation, rest));
            }
            let fin = self.outgoing.is_none();
            scratch::with(&scratch::FRAMES, HEADER_MAX + payload.len(), |buffer| {
                buffer[HEADER_MAX..].copy_from_slice(&payload);
                self.frames.write(cx, buffer, opcode, fin)
            })?;
        }
    }

    /// Waits for a whole message, or for the end, which it notes.
    fn poll_receive(&mut self, cx: &mut Context<'_>) -> Poll<Option<Message>> {
        while self.end.is_none() {
            if let Some(mut input) = self.frames.take_input() {
                let (message, used) = self.join(&mut input);
                self.frames.put_back(input, used);
                if message.is_some() {
                    return Poll::Ready(message);
                }
                if self.end.is_some() {
                    break;
                }
            }
            // What cannot be written does not matter here: why the leg is over is told by what can still be read.
            let _ = self.poll_send(cx);
            let size = if self.incoming.data.len() < READ_FIRST { READ_FIRST } else { READ_MOST };
            let message = scratch::with(&scratch::FRAMES, size, |buffer| {
                match ready!(self.frames.poll_fill(cx, buffer)) {
                    Ok(filled) => {
                        self.next_ping = Instant::now() + PING_EVERY;
                        self.unanswered = 0;
                        let (message, used) = self.join(&mut buffer[..filled]);
                        self.frames.keep(&buffer[used..filled]);
                        Poll::Ready(message)
                    }
                    Err(error) => {
                        self.end = Some(Err(error.into()));
                        Poll::Ready(None)
                    }
                }
            });
            if let Some(message) = ready!(message) {
                return Poll::Ready(Some(message));
            }
        }
        Poll::Ready(None)
    }

    /// Joins frames until a message is whole, and says how many bytes it used.
    fn join(&mut self, buffer: &mut [u8]) -> (Option<Message>, usize) {
        let mut at = 0;
        loop {
            let piece = match self.frames.take(buffer, &mut at) {
                Ok(Some(piece)) => piece,
                Ok(None) => return (None, at),
                Err(error) => {
                    self.refuse(error.close_code(), error.into());
                    return (None, at);
                }
            };
            match piece {
                Piece::Close { code, text } => {
                    self.end = Some(StreamError::of_close(code, text));
                    return (None, at);
                }
                Piece::Data { opcode, fin, payload } => {
                    let Incoming { is_text, data } = &mut self.incoming;
                    if opcode != Opcode::Continuation {
                        *is_text = opcode == Opcode::Text;
                    }
                    if data.len() + payload.len() > MESSAGE_MAX {
                        let words = format!("a message is longer than {} MiB", MESSAGE_MAX >> 20);
                        self.refuse(1009, StreamError::Lost(words));
                        return (None, at);
                    }
                    data.extend_from_slice(&buffer[payload]);
                    if !fin {
                        continue;
                    }
                    let data = std::mem::take(data);
                    if !*is_text {
                        return (Some(Message::Binary(data.into())), at);
                    }
                    let text = String::from_utf8(data);
                    if text.is_err() {
                        self.refuse(1007, StreamError::Lost("a text message is not UTF-8".to_owned()));
                    }
                    return (text.ok().map(Message::Text), at);
                }
            }
        }
    }

    fn refuse(&mut self, code: u16, error: StreamError) {
        self.frames.put_close(Some(code), "");
        self.end = Some(Err(error));
    }
}

/// The longest message that a leg takes.
const MESSAGE_MAX: usize = 64 << 20;

/// The longest payload of a frame; a longer message goes out in fragments.
const FRAME_MOST: usize = 1 << 20;

/// One read, while the message is not known to be long.
const READ_FIRST: usize = 64 * 1024;

/// One read in the middle of a long message.
const READ_MOST: usize = 1 << 20;

#[cfg(test)]
mod tests {
    use futures_util::{FutureExt as _, SinkExt as _, StreamExt as _};
    use midspan_core::frame::{put_frame, put_header};
    use proptest::prelude::*;
    use tokio::io::{AsyncWriteExt as _, DuplexStream, duplex};
    use tokio_tungstenite::{
        WebSocketStream,
        tungstenite::{Message as Frame, protocol::Role},
    };

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Against an implementation that is not ours: it sends every message back.
        #[test]
        fn messages_keep_their_bounds_whatever_the_reads(
            messages in prop::collection::vec((any::<bool>(), length()), 0..8),
            room in 1usize..100_000,
        ) {
            let messages: Vec<_> = messages.into_iter().map(|(is_text, length)| message(is_text, length)).collect();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
            let back = runtime.unwrap().block_on(async {
                let (mut near, mut far) = ends(room).await;
                let echo = async {
                    while let Some(Ok(message)) = far.next().await {
                        if !message.is_close() {
                            far.send(Frame::Ping("?".into())).await.unwrap();
                            far.send(message).await.unwrap();
                        }
                    }
                };
                let story = async {
                    let mut back = Vec::new();
                    for message in &messages {
                        near.send(message.clone()).await.unwrap();
                        back.push(near.receive().await.unwrap().unwrap());
                    }
                    near.close("done").await;
                    back
                };
                tokio::join!(story, echo).0
            });
            prop_assert!(back == messages);
        }
    }

    #[tokio::test]
    async fn a_send_that_is_given_up_goes_out_with_the_next_call() {
        let (mut near, mut far) = ends(1000).await;
        let (long, short) = (message(false, 3 * FRAME_MOST), message(true, 5));
        assert_eq!(near.send(long.clone()).now_or_never(), None, "there is no room for it");
        let story = async {
            near.send(short.clone()).await.unwrap();
            near.close("").await;
        };
        let hear = async {
            let mut heard = Vec::new();
            while let Some(Ok(frame)) = far.next().await {
                heard.push(frame);
            }
            heard
        };
        let ((), heard) = tokio::join!(story, hear);
        let Message::Binary(long) = long else { panic!() };
        assert!(heard[0] == Frame::Binary(long), "the long message");
        assert_eq!(heard[1], Frame::text("aaaaa"));
        assert!(heard[2].is_close());
    }

    #[tokio::test]
    async fn a_receive_that_is_given_up_loses_nothing() {
        let (mut near, mut far) = ends(100_000).await;
        let mut wire = Vec::new();
        put_frame(&mut wire, Opcode::Text, false, b"half of it, ");
        far.get_mut().write_all(&wire).await.unwrap();
        assert_eq!(near.receive().now_or_never(), None);
        wire.clear();
        put_frame(&mut wire, Opcode::Continuation, true, b"and the rest");
        far.get_mut().write_all(&wire).await.unwrap();
        assert_eq!(near.receive().await, Ok(Some(Message::Text("half of it, and the rest".to_owned()))));
    }

    #[tokio::test]
    async fn what_cannot_be_a_message_is_an_error_that_stays() {
        let mut not_text = Vec::new();
        put_frame(&mut not_text, Opcode::Text, true, b"\xff");
        let mut too_long = Vec::new();
        put_header(&mut too_long, Opcode::Binary, true, MESSAGE_MAX + 1);
        too_long.resize(too_long.len() + MESSAGE_MAX + 1, 0);
        let cases = [
            (not_text, 1007, "a text message is not UTF-8"),
            (too_long, 1009, "a message is longer than 64 MiB"),
            (vec![0x83, 0], 1002, "the relay broke the WebSocket protocol: unknown opcode"),
        ];
        for (wire, code, words) in cases {
            let (mut near, mut far) = ends(1 << 20).await;
            let story = async {
                far.get_mut().write_all(&wire).await.unwrap();
                let Frame::Close(Some(frame)) = far.next().await.unwrap().unwrap() else {
                    panic!("no close")
                };
                assert_eq!(u16::from(frame.code), code);
            };
            let (received, ()) = tokio::join!(near.receive(), story);
            assert_eq!(received, Err(StreamError::Lost(words.to_owned())));
            assert_eq!(near.receive().await, received, "it is asked again");
            assert!(near.send(message(true, 1)).await.is_err());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn silence_is_asked_about_and_then_the_end() {
        let (mut near, _far) = ends(1000).await;
        let begin = Instant::now();
        assert_eq!(near.receive().await, Err(StreamError::Silent));
        assert_eq!(begin.elapsed(), SILENCE);
    }

    fn length() -> impl Strategy<Value = usize> {
        prop_oneof![4 => 0usize..300, 2 => 0usize..200_000, 1 => FRAME_MOST - 1..3 * FRAME_MOST]
    }

    fn message(is_text: bool, length: usize) -> Message {
        if is_text {
            Message::Text("a".repeat(length))
        } else {
            Message::Binary((0..length).map(|at| at.to_le_bytes()[0] ^ at.to_le_bytes()[1]).collect())
        }
    }

    async fn ends(room: usize) -> (Messages<DuplexStream>, WebSocketStream<DuplexStream>) {
        let (near, far) = duplex(room);
        (
            Messages::new(near, BytesMut::new()),
            WebSocketStream::from_raw_socket(far, Role::Server, None).await,
        )
    }
}
