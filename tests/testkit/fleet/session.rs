use bytes::Bytes;
use futures_util::{SinkExt as _, StreamExt as _};
use midspan_core::id::StreamId;
use sha2::{Digest as _, Sha256, digest::Output};
use tokio::{
    io::AsyncWriteExt as _,
    time::{Instant, timeout_at},
};
use tokio_tungstenite::tungstenite::{Message, protocol::CloseFrame};

use crate::{Leg, Random, within};

/// One end of a stream: it sends random bytes, and remembers the hash of what it sent and of what came.
#[derive(Debug)]
pub struct Session {
    /// The stream.
    pub stream: StreamId,
    owner: usize,
    edge: usize,
    leg: Leg,
    random: Random,
    sent: Sha256,
    received: Sha256,
    bytes: usize,
}

/// How a stream ended for one end of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// With a close frame: its code and text.
    Closed(u16, String),
    /// Without one.
    Lost,
}

/// What an end has seen of its stream.
#[derive(Debug, Clone)]
pub struct Seen {
    /// The stream.
    pub stream: StreamId,
    /// The edge that owned it.
    pub owner: usize,
    /// The edge at which this end came in.
    pub edge: usize,
    /// SHA-256 of what it sent.
    pub sent: Output<Sha256>,
    /// SHA-256 of what it received.
    pub received: Output<Sha256>,
    /// How much it received.
    pub bytes: usize,
    /// How it ended.
    pub end: End,
    /// When.
    pub at: Instant,
}

impl Session {
    pub(super) fn new(stream: StreamId, [owner, edge]: [usize; 2], leg: Leg, seed: u64) -> Self {
        let (sent, received) = (Sha256::new(), Sha256::new());
        Self { stream, owner, edge, leg, random: Random::new(seed), sent, received, bytes: 0 }
    }

    /// As the service: sends `length` bytes, and waits for as many of the device's.
    pub async fn talk(&mut self, length: usize) -> Result<(), End> {
        self.send(length).await?;
        let answer = within("the device's answer", self.next()).await?;
        assert_eq!(answer.len(), length, "stream {}", self.stream);
        Ok(())
    }

    /// As the device: answers whatever comes with as many bytes, until the end.
    pub async fn answer(mut self) -> Seen {
        loop {
            let next = match self.next().await {
                Ok(bytes) => self.send(bytes.len()).await,
                Err(end) => Err(end),
            };
            if let Err(end) = next {
                return self.seen(end).await;
            }
        }
    }

    /// Waits until `when`, or for the stream's end. Nothing may come before that.
    pub async fn rest(&mut self, when: Instant) -> Result<(), End> {
        match timeout_at(when, self.next()).await {
            Err(_) => Ok(()),
            Ok(Err(end)) => Err(end),
            Ok(Ok(bytes)) => panic!("{} bytes that nobody asked for on stream {}", bytes.len(), self.stream),
        }
    }

    /// Closes the stream, and waits for its end.
    pub async fn close(mut self) -> Seen {
        let close = Message::Close(Some(CloseFrame { code: 1000.into(), reason: "done".into() }));
        // It may have ended in this moment, which the next call tells.
        let _ = within("sending the close frame", self.leg.socket.send(close)).await;
        let end = match within("the answer to a close frame", self.next()).await {
            Ok(bytes) => panic!("{} bytes after the close frame on stream {}", bytes.len(), self.stream),
            Err(end) => end,
        };
        self.seen(end).await
    }

    /// Gives what was seen of a stream that has ended, and leaves it in good order.
    pub async fn seen(mut self, end: End) -> Seen {
        let at = Instant::now();
        if matches!(end, End::Closed(..)) {
            within("the end of a connection", async {
                while let Some(Ok(_)) = self.leg.socket.next().await {}
            })
            .await;
            // The relay waits a moment for this. It may be gone already.
            let _ = self.leg.socket.get_mut().shutdown().await;
        }
        Seen {
            stream: self.stream,
            owner: self.owner,
            edge: self.edge,
            sent: self.sent.finalize(),
            received: self.received.finalize(),
            bytes: self.bytes,
            end,
            at,
        }
    }

    async fn send(&mut self, length: usize) -> Result<(), End> {
        let mut bytes = Vec::with_capacity(length + 8);
        while bytes.len() < length {
            bytes.extend(self.random.number().to_le_bytes());
        }
        bytes.truncate(length);
        self.sent.update(&bytes);
        if within("sending a message", self.leg.socket.send(Message::binary(bytes))).await.is_err() {
            // The close frame, if there was one, is still to be read.
            return match within("the end of a stream that takes nothing", self.next()).await {
                Ok(_) => Err(End::Lost),
                Err(end) => Err(end),
            };
        }
        Ok(())
    }

    async fn next(&mut self) -> Result<Bytes, End> {
        loop {
            match self.leg.socket.next().await {
                Some(Ok(Message::Binary(bytes))) => {
                    self.received.update(&bytes);
                    self.bytes += bytes.len();
                    return Ok(bytes);
                }
                Some(Ok(Message::Close(Some(CloseFrame { code, reason })))) => {
                    return Err(End::Closed(code.into(), reason.as_str().to_owned()));
                }
                Some(Ok(Message::Close(None))) => return Err(End::Closed(1005, String::new())),
                Some(Ok(_)) => {}
                Some(Err(_)) | None => return Err(End::Lost),
            }
        }
    }
}
