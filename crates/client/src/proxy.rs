//! The bytes of a local connection through a leg, with half-close.

use std::{
    future::pending,
    io,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use futures_util::{
    FutureExt as _, SinkExt as _, StreamExt as _,
    stream::{SplitSink, SplitStream},
};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::TcpStream,
    sync::oneshot,
    time::{Instant, MissedTickBehavior, interval_at, timeout},
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        self, Message,
        protocol::{CloseFrame, frame::coding::CloseCode},
    },
};

use crate::leg::{CLOSE_WAIT, PING_EVERY, SILENCE, StreamError};

/// How many bytes a stream carried.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Traffic {
    /// Bytes from the local connection into the stream.
    pub sent: u64,
    /// Bytes from the stream into the local connection.
    pub received: u64,
}

/// Carries bytes both ways until the stream is over.
///
/// On a clean end all that was received has been written and `writer` is shut down. On an error the leg is dropped
/// without a close frame, unless the relay closed it.
pub(crate) async fn pump<S, R, W>(
    socket: WebSocketStream<S>,
    mut reader: R,
    mut writer: W,
    half_close: bool,
) -> Result<Traffic, StreamError>
where
    S: AsyncRead + AsyncWrite + Unpin,
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let (mut sink, mut source) = socket.split();
    let (tell_end, remote_end) = oneshot::channel();
    let (sent, received) = (AtomicU64::new(0), AtomicU64::new(0));

    let ended_by_us = {
        let outward = send(&mut sink, &mut reader, half_close, remote_end, &sent);
        let inward = receive(&mut source, &mut writer, half_close, tell_end, &received);
        tokio::pin!(outward, inward);
        tokio::select! {
            biased;
            result = &mut inward => result.map(|()| false),
            result = &mut outward => match result {
                Outward::Closed => timeout(CLOSE_WAIT, inward).await.map_or(Ok(true), |_| Ok(true)),
                Outward::Local(error) => Err(error),
                // What the relay sent before it went, and its reason, are still to be read.
                Outward::Leg(error) => match timeout(DELIVERY_WAIT, inward).await {
                    Ok(result) => result.map(|()| false),
                    Err(_) => Err(error),
                },
            },
        }
    }?;

    if !ended_by_us {
        // The answer to the close frame is a courtesy that the relay does not depend on.
        let _ = timeout(CLOSE_WAIT, sink.flush()).await;
    }
    drop((sink, source));
    // What failed here was told to nobody yet, and nobody waits for it any more: all bytes are written.
    let _ = writer.shutdown().await;
    Ok(Traffic { sent: sent.into_inner(), received: received.into_inner() })
}

/// How the outward direction came to its end.
enum Outward {
    /// The close frame is sent.
    Closed,
    /// The local connection failed.
    Local(StreamError),
    /// The leg failed.
    Leg(StreamError),
}

async fn send<S, R>(
    sink: &mut SplitSink<WebSocketStream<S>, Message>,
    reader: &mut R,
    half_close: bool,
    remote_end: oneshot::Receiver<()>,
    sent: &AtomicU64,
) -> Outward
where
    S: AsyncRead + AsyncWrite + Unpin,
    R: AsyncRead + Unpin,
{
    match send_all(sink, reader, half_close, remote_end, sent).await {
        Ok(()) => Outward::Closed,
        Err(SendError::Local(error)) => Outward::Local(StreamError::local(&error)),
        Err(SendError::Leg(error)) => Outward::Leg(error.into()),
    }
}

enum SendError {
    Local(io::Error),
    Leg(tungstenite::Error),
}

impl From<tungstenite::Error> for SendError {
    fn from(error: tungstenite::Error) -> Self {
        Self::Leg(error)
    }
}

async fn send_all<S, R>(
    sink: &mut SplitSink<WebSocketStream<S>, Message>,
    reader: &mut R,
    half_close: bool,
    remote_end: oneshot::Receiver<()>,
    sent: &AtomicU64,
) -> Result<(), SendError>
where
    S: AsyncRead + AsyncWrite + Unpin,
    R: AsyncRead + Unpin,
{
    let mut pings = interval_at(Instant::now() + PING_EVERY, PING_EVERY);
    pings.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut buffer = BytesMut::new();
    loop {
        if buffer.capacity() < READ_LEAST {
            buffer.reserve(READ_MOST);
        }
        let read = match reader.read_buf(&mut buffer).now_or_never() {
            Some(read) => read,
            None => {
                sink.flush().await?;
                tokio::select! {
                    read = reader.read_buf(&mut buffer) => read,
                    _ = pings.tick() => {
                        sink.send(Message::Ping(Bytes::new())).await?;
                        continue;
                    }
                }
            }
        };
        let count = read.map_err(SendError::Local)?;
        if count == 0 {
            break;
        }
        sink.feed(Message::Binary(buffer.split().freeze())).await?;
        sent.fetch_add(count as u64, Relaxed);
    }

    if half_close {
        sink.send(Message::Binary(Bytes::new())).await?;
        let ended = async {
            // A receiver that is gone has its own result, which decides.
            if remote_end.await.is_err() {
                pending::<()>().await;
            }
        };
        tokio::pin!(ended);
        loop {
            tokio::select! {
                () = &mut ended => break,
                _ = pings.tick() => sink.send(Message::Ping(Bytes::new())).await?,
            }
        }
    }
    let frame = CloseFrame { code: CloseCode::Normal, reason: "".into() };
    sink.send(Message::Close(Some(frame))).await?;
    Ok(())
}

async fn receive<S, W>(
    source: &mut SplitStream<WebSocketStream<S>>,
    writer: &mut W,
    half_close: bool,
    tell_end: oneshot::Sender<()>,
    received: &AtomicU64,
) -> Result<(), StreamError>
where
    S: AsyncRead + AsyncWrite + Unpin,
    W: AsyncWrite + Unpin,
{
    let local = |error: io::Error| StreamError::local(&error);
    let mut tell_end = Some(tell_end);
    loop {
        let message = timeout(SILENCE, source.next()).await.map_err(|_| StreamError::Silent)?;
        let data = match message {
            Some(Ok(Message::Binary(data))) => data,
            Some(Ok(Message::Text(text))) => Bytes::from(text),
            Some(Ok(Message::Close(frame))) => return StreamError::of_close(frame).map_or(Ok(()), Err),
            Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_))) => continue,
            Some(Err(error)) => return Err(error.into()),
            None => return Err(StreamError::no_close_frame()),
        };
        if half_close && data.is_empty() {
            if let Some(tell) = tell_end.take() {
                writer.shutdown().await.or_else(already_gone).map_err(local)?;
                // The sender may be gone when the local connection failed at the same moment.
                let _ = tell.send(());
            }
            continue;
        }
        if tell_end.is_none() {
            return Err(StreamError::AfterEnd);
        }
        writer.write_all(&data).await.map_err(local)?;
        writer.flush().await.map_err(local)?;
        received.fetch_add(data.len() as u64, Relaxed);
    }
}

/// Ends a local connection whose sending side is shut down, so that nothing that was delivered is lost: a socket that is
/// closed with unread data in it resets, and the reset can overtake the data.
pub(crate) async fn linger(local: &mut TcpStream) {
    let mut waste = vec![0; 4096];
    let drain = async { while local.read(&mut waste).await.is_ok_and(|count| count > 0) {} };
    // Whoever still sends after that has been told long enough.
    let _ = timeout(LINGER, drain).await;
}

fn already_gone(error: io::Error) -> io::Result<()> {
    if error.kind() == io::ErrorKind::NotConnected { Ok(()) } else { Err(error) }
}

/// One read of the local connection, and so one message, at the most.
const READ_MOST: usize = 64 * 1024;

/// Below this much room a new buffer is better than another small message.
const READ_LEAST: usize = 8 * 1024;

/// How long a slow local reader may take for what came before the leg was lost.
const DELIVERY_WAIT: Duration = Duration::from_secs(60);

/// How long the local end may go on sending after the stream's clean end.
const LINGER: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use tokio::io::{DuplexStream, duplex, split};
    use tokio_tungstenite::tungstenite::protocol::Role;

    use super::*;
    use crate::leg;

    #[tokio::test]
    async fn each_direction_ends_by_itself() {
        let (mut local, mut remote, pump) = pumped(true).await;
        let story = async {
            local.write_all(b"question").await.unwrap();
            local.shutdown().await.unwrap();
            assert_eq!(remote.next().await.unwrap().unwrap(), Message::binary("question"));
            assert_eq!(remote.next().await.unwrap().unwrap(), Message::binary(""));
            remote.send(Message::binary("the whole ")).await.unwrap();
            remote.send(Message::binary("answer")).await.unwrap();
            remote.send(Message::binary("")).await.unwrap();
            let mut answer = String::new();
            local.read_to_string(&mut answer).await.unwrap();
            assert_eq!(answer, "the whole answer");
            assert_eq!(close_code(&mut remote).await, Some(CloseCode::Normal));
        };
        let (result, ()) = tokio::join!(pump, story);
        assert_eq!(result.unwrap(), Traffic { sent: 8, received: 16 });
    }

    #[tokio::test]
    async fn the_remote_end_may_come_first() {
        let (mut local, mut remote, pump) = pumped(true).await;
        let story = async {
            remote.send(Message::binary("banner")).await.unwrap();
            remote.send(Message::binary("")).await.unwrap();
            let mut banner = String::new();
            local.read_to_string(&mut banner).await.unwrap();
            assert_eq!(banner, "banner");
            local.write_all(b"late").await.unwrap();
            drop(local);
            assert_eq!(remote.next().await.unwrap().unwrap(), Message::binary("late"));
            assert_eq!(remote.next().await.unwrap().unwrap(), Message::binary(""));
            assert_eq!(close_code(&mut remote).await, Some(CloseCode::Normal));
        };
        let (result, ()) = tokio::join!(pump, story);
        assert_eq!(result.unwrap(), Traffic { sent: 4, received: 6 });
    }

    #[tokio::test]
    async fn without_the_capability_one_end_is_both() {
        let (mut local, mut remote, pump) = pumped(false).await;
        let story = async {
            remote.send(Message::binary("")).await.unwrap();
            local.write_all(b"x").await.unwrap();
            local.shutdown().await.unwrap();
            assert_eq!(remote.next().await.unwrap().unwrap(), Message::binary("x"));
            assert_eq!(close_code(&mut remote).await, Some(CloseCode::Normal));
        };
        let (result, ()) = tokio::join!(pump, story);
        assert_eq!(result.unwrap(), Traffic { sent: 1, received: 0 });
    }

    #[tokio::test]
    async fn all_that_came_before_a_cut_is_delivered_and_the_cut_is_told() {
        let (mut local, mut remote, pump) = pumped(true).await;
        let story = async {
            remote.send(Message::binary("part")).await.unwrap();
            let frame = CloseFrame { code: CloseCode::Error, reason: "device_lost: gone".into() };
            remote.send(Message::Close(Some(frame))).await.unwrap();
            let mut part = [0; 4];
            local.read_exact(&mut part).await.unwrap();
            assert_eq!(&part, b"part");
        };
        let (result, ()) = tokio::join!(pump, story);
        assert_eq!(result, Err(StreamError::Ended { code: 1011, text: "device_lost: gone".to_owned() }));
    }

    #[tokio::test]
    async fn a_lost_leg_is_no_clean_end() {
        let (_local, remote, pump) = pumped(true).await;
        drop(remote);
        assert!(matches!(pump.await, Err(StreamError::Lost(_))));
    }

    #[tokio::test]
    async fn data_after_the_end_is_refused() {
        let (_local, mut remote, pump) = pumped(true).await;
        let story = async {
            remote.send(Message::binary("")).await.unwrap();
            remote.send(Message::binary("more")).await.unwrap();
        };
        let (result, ()) = tokio::join!(pump, story);
        assert_eq!(result, Err(StreamError::AfterEnd));
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_leg_is_pinged_and_then_given_up() {
        let (_local, mut remote, pump) = pumped(true).await;
        let begin = Instant::now();
        let story = async {
            // The socket is held, and read without ever being flushed: no answer to a ping leaves it.
            let first = remote.get_mut().read_u8().await.unwrap();
            assert_eq!(first, 0x89, "a final ping frame");
            assert_eq!(begin.elapsed(), PING_EVERY);
        };
        let (result, ()) = tokio::join!(pump, story);
        assert_eq!(result, Err(StreamError::Silent));
        assert_eq!(begin.elapsed(), SILENCE);
    }

    #[tokio::test]
    async fn much_data_passes_both_ways_at_once() {
        let (local, mut remote, pump) = pumped(true).await;
        let (mut local_reader, mut local_writer) = split(local);
        let data: Vec<u8> = (0..3_000_000_u32).map(|index| index.to_le_bytes()[index as usize % 2]).collect();
        let story = async {
            let write = async {
                local_writer.write_all(&data).await.unwrap();
                local_writer.shutdown().await.unwrap();
            };
            let read = async {
                let mut back = Vec::new();
                local_reader.read_to_end(&mut back).await.unwrap();
                back
            };
            let echo = async {
                while let Some(Ok(message)) = remote.next().await {
                    if message.is_binary() {
                        assert!(message.len() <= READ_MOST);
                        remote.send(message).await.unwrap();
                    }
                }
            };
            let ((), back, ()) = tokio::join!(write, read, echo);
            assert!(back == data, "the bytes came back changed");
        };
        let (result, ()) = tokio::join!(pump, story);
        assert_eq!(result.unwrap(), Traffic { sent: 3_000_000, received: 3_000_000 });
    }

    /// A local connection, the other end of the leg, and the pump between them.
    async fn pumped(
        half_close: bool,
    ) -> (DuplexStream, WebSocketStream<DuplexStream>, impl Future<Output = Result<Traffic, StreamError>>)
    {
        let (local, near_local) = duplex(16 * 1024);
        let (near_leg, far_leg) = duplex(16 * 1024);
        let near = WebSocketStream::from_raw_socket(near_leg, Role::Client, Some(leg::config())).await;
        let far = WebSocketStream::from_raw_socket(far_leg, Role::Server, None).await;
        let (reader, writer) = split(near_local);
        (local, far, pump(near, reader, writer, half_close))
    }

    async fn close_code(socket: &mut WebSocketStream<DuplexStream>) -> Option<CloseCode> {
        while let Some(Ok(message)) = socket.next().await {
            if let Message::Close(frame) = message {
                // Sends the answer to the close frame.
                let _ = socket.flush().await;
                return frame.map(|frame| frame.code);
            }
        }
        None
    }
}
