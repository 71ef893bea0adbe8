//! One device link: from its upgrade to its end.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::{SinkExt as _, StreamExt as _};
use midspan_core::{
    id::DeviceAddress,
    link::{FromDevice, Goodbye, GoodbyeReason, Invitation, MESSAGE_MAX, SUBPROTOCOL, ToDevice},
    time::UnixTime,
};
use tokio::{
    sync::mpsc,
    time::{Instant, MissedTickBehavior, interval_at, sleep_until, timeout},
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        self, Message,
        protocol::{CloseFrame, WebSocketConfig, frame::coding::CloseCode},
    },
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::{
    dial::Connection,
    http::{Relay, RequestError},
    leg::{CLOSE_WAIT, StreamError},
};

/// What a link tells its device.
pub(crate) enum LinkEvent {
    /// The relay took the link.
    Welcomed {
        /// Which link.
        generation: u64,
        /// How long its credential is still good, by the relay's clock.
        life: Duration,
        /// The relay's clock.
        now: UnixTime,
    },
    /// The relay wants the device to open another link. This one lasts until then, if the relay can keep it.
    ToldToMove {
        /// Which link.
        generation: u64,
        /// When.
        goodbye: Goodbye,
    },
    /// A service asks for a stream.
    Invited {
        /// The request.
        invitation: Invitation,
        /// Where the answer goes.
        answers: mpsc::Sender<FromDevice>,
    },
}

/// How a link ended.
pub(crate) enum LinkEnd {
    /// The relay did not take it.
    NotOpened(RequestError),
    /// It ended without a goodbye.
    Lost(String),
    /// The relay said why.
    Goodbye(Goodbye),
    /// The device is stopping.
    Stopped,
}

/// What a link needs.
pub(crate) struct Link {
    pub(crate) generation: u64,
    pub(crate) relay: Arc<Relay>,
    pub(crate) address: DeviceAddress,
    pub(crate) events: mpsc::Sender<LinkEvent>,
    pub(crate) stop: CancellationToken,
}

impl Link {
    /// Opens the link and serves it until it ends.
    pub(crate) async fn run(self) -> (u64, LinkEnd) {
        let end = tokio::select! {
            opened = self.open() => match opened {
                Ok((socket, welcome)) => self.serve(socket, welcome).await,
                Err(end) => end,
            },
            () = self.stop.cancelled() => LinkEnd::Stopped,
        };
        (self.generation, end)
    }

    async fn open(&self) -> Result<(Socket, Welcome), LinkEnd> {
        let path = format!("/v1/{}/link", self.address.path());
        let config = WebSocketConfig::default()
            .max_message_size(Some(MESSAGE_MAX))
            .max_frame_size(Some(MESSAGE_MAX))
            .read_buffer_size(4096)
            .write_buffer_size(0);
        let mut socket = self.relay.link(&path, SUBPROTOCOL, config).await.map_err(LinkEnd::NotOpened)?;
        let first = timeout(WELCOME_WAIT, next_message(&mut socket)).await;
        match first {
            Ok(Ok(ToDevice::Welcome { now, ping_seconds, silence_seconds, expires })) => {
                let seconds = |number: u64| Duration::from_secs(number.clamp(1, 3600));
                let (ping, silence) = (seconds(ping_seconds), seconds(silence_seconds));
                Ok((socket, Welcome { now, life: expires.since(now), ping, silence }))
            }
            Ok(Ok(ToDevice::Goodbye(goodbye))) => Err(LinkEnd::Goodbye(goodbye)),
            Ok(Ok(ToDevice::Request(_) | ToDevice::Unknown)) => {
                Err(LinkEnd::Lost("the relay began with something else than a welcome".to_owned()))
            }
            Ok(Err(reason)) => Err(LinkEnd::Lost(reason)),
            Err(_) => Err(LinkEnd::Lost(format!("no welcome within {} s", WELCOME_WAIT.as_secs()))),
        }
    }

    async fn serve(&self, mut socket: Socket, welcome: Welcome) -> LinkEnd {
        let Welcome { now, life, ping, silence } = welcome;
        if self.events.send(LinkEvent::Welcomed { generation: self.generation, life, now }).await.is_err() {
            return LinkEnd::Stopped;
        }
        let (answers, mut outgoing) = mpsc::channel(ANSWERS);
        let mut pings = interval_at(Instant::now() + ping, ping);
        pings.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut heard = Instant::now();
        let mut told_to_move = None;
        let over = |told_to_move: Option<Goodbye>, reason: String| {
            told_to_move.map_or(LinkEnd::Lost(reason), LinkEnd::Goodbye)
        };
        loop {
            let sending = tokio::select! {
                message = socket.next() => {
                    heard = Instant::now();
                    match message {
                        Some(Ok(Message::Text(text))) => match serde_json::from_str(&text) {
                            Ok(ToDevice::Request(invitation)) => {
                                let event = LinkEvent::Invited { invitation, answers: answers.clone() };
                                if self.events.send(event).await.is_err() {
                                    return LinkEnd::Stopped;
                                }
                            }
                            Ok(ToDevice::Goodbye(goodbye)) if goodbye.reason == GoodbyeReason::Draining => {
                                let event = LinkEvent::ToldToMove {
                                    generation: self.generation,
                                    goodbye: goodbye.clone(),
                                };
                                if self.events.send(event).await.is_err() {
                                    return LinkEnd::Stopped;
                                }
                                told_to_move = Some(goodbye);
                            }
                            Ok(ToDevice::Goodbye(goodbye)) => {
                                finish(&mut socket).await;
                                return LinkEnd::Goodbye(goodbye);
                            }
                            Ok(ToDevice::Welcome { .. } | ToDevice::Unknown) => {}
                            Err(error) => warn!(%error, "the relay sent a message that is not understood"),
                        },
                        Some(Ok(Message::Close(frame))) => {
                            let _ = timeout(CLOSE_WAIT, socket.flush()).await;
                            return over(told_to_move, close_words(frame));
                        }
                        Some(Ok(_)) => {}
                        Some(Err(error)) => return over(told_to_move, lost(error)),
                        None => return over(told_to_move, StreamError::no_close_frame().to_string()),
                    }
                    continue;
                }
                answer = outgoing.recv() => match answer {
                    Some(answer) => match serde_json::to_string(&answer) {
                        Ok(text) => Message::text(text),
                        Err(error) => {
                            warn!(%error, "an answer could not be put into JSON");
                            continue;
                        }
                    },
                    None => return LinkEnd::Stopped,
                },
                _ = pings.tick() => Message::Ping(Bytes::new()),
                () = sleep_until(heard + silence) => {
                    return LinkEnd::Lost(format!("nothing came from the relay for {} s", silence.as_secs()));
                }
                () = self.stop.cancelled() => {
                    let frame = CloseFrame { code: CloseCode::Normal, reason: "the device is stopping".into() };
                    let _ = timeout(SEND_WAIT, socket.close(Some(frame))).await;
                    finish(&mut socket).await;
                    return LinkEnd::Stopped;
                }
            };
            match timeout(SEND_WAIT, socket.send(sending)).await {
                Ok(Ok(())) => {}
                // Why the link is over is told by what can still be read from it.
                Ok(Err(error)) => debug!(%error, "the link takes no more messages"),
                Err(_) => {
                    return LinkEnd::Lost(format!("the relay took nothing for {} s", SEND_WAIT.as_secs()));
                }
            }
        }
    }
}

type Socket = WebSocketStream<Connection>;

/// What the relay said first.
struct Welcome {
    now: UnixTime,
    life: Duration,
    ping: Duration,
    silence: Duration,
}

async fn next_message(socket: &mut Socket) -> Result<ToDevice, String> {
    loop {
        match socket.next().await {
            Some(Ok(Message::Text(text))) => {
                return serde_json::from_str(&text)
                    .map_err(|error| format!("a message is not understood: {error}"));
            }
            Some(Ok(Message::Close(frame))) => return Err(close_words(frame)),
            Some(Ok(_)) => {}
            Some(Err(error)) => return Err(lost(error)),
            None => return Err(StreamError::no_close_frame().to_string()),
        }
    }
}

/// Waits for the close frame and answers it, for a moment.
async fn finish(socket: &mut Socket) {
    let closing = async {
        while let Some(Ok(message)) = socket.next().await {
            if message.is_close() {
                let _ = socket.flush().await;
                return;
            }
        }
    };
    let _ = timeout(FINISH_WAIT, closing).await;
}

#[expect(clippy::wildcard_enum_match_arm, reason = "every other failure keeps the library's words")]
fn lost(error: tungstenite::Error) -> String {
    let error = match error {
        tungstenite::Error::Io(error) => error.into(),
        tungstenite::Error::Protocol(tungstenite::error::ProtocolError::ResetWithoutClosingHandshake)
        | tungstenite::Error::ConnectionClosed
        | tungstenite::Error::AlreadyClosed => StreamError::no_close_frame(),
        other => StreamError::Lost(other.to_string()),
    };
    error.to_string()
}

fn close_words(frame: Option<CloseFrame>) -> String {
    match frame {
        Some(frame) if frame.reason.is_empty() => format!("the relay closed it with code {}", frame.code),
        Some(frame) => format!("the relay closed it with code {}: {}", frame.code, frame.reason),
        None => "the relay closed it without a reason".to_owned(),
    }
}

/// Answers that wait to be sent; whoever answers waits when it is full.
const ANSWERS: usize = 64;

/// From the upgrade to the first message.
const WELCOME_WAIT: Duration = Duration::from_secs(10);

/// How long the network may take one small message.
const SEND_WAIT: Duration = Duration::from_secs(10);

/// For the close frame after a goodbye: short, because a new link waits for it.
const FINISH_WAIT: Duration = Duration::from_secs(1);
