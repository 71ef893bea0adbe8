//! The bytes of a local connection through a leg, with half-close.
//!
//! What one read of the local connection gives leaves as one frame in one write, and the payload of all frames in one
//! read of the leg is written at once. Both pass through a buffer of the thread: a stream keeps bytes of its own only
//! while one side takes none, at most one read in each direction.
//!
//! Nothing is left for the kernel to copy on its own (`splice`): a leg is TLS, which is opened here, unless it is for a
//! trial on one machine.

use std::{
    future::poll_fn,
    io,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use midspan_core::frame::{HEADER_MAX, Opcode};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf},
    net::TcpStream,
    time::{Instant, MissedTickBehavior, interval_at, sleep_until, timeout},
};

use crate::{
    frames::{Frames, Piece, some},
    leg::{CLOSE_WAIT, PING_EVERY, SILENCE, StreamError},
    messages::{Messages, Parts},
    scratch,
};

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
/// without a close frame, unless the relay closed it or broke the protocol.
pub(crate) async fn pump<IO, R, W>(
    messages: Messages<IO>,
    reader: R,
    writer: W,
    half_close: bool,
) -> Result<Traffic, StreamError>
where
    IO: AsyncRead + AsyncWrite + Unpin,
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let Parts { frames, incoming, end } = messages.into_parts();
    let mut pump = Pump {
        frames,
        reader,
        writer,
        half_close,
        outward: Outward::Open,
        deadline_moved: false,
        outward_pace: Pace::default(),
        inward_pace: Pace::default(),
        in_binary: !incoming.is_text,
        message_is_empty: incoming.data.is_empty(),
        undelivered: incoming.data,
        delivered: 0,
        unflushed: true,
        remote_ended: false,
        writer_ended: false,
        end,
        heard: Instant::now(),
        traffic: Traffic::default(),
    };
    pump.traffic.received = pump.undelivered.len() as u64;
    let result = pump.run().await;

    let wait = match &result {
        Ok(()) => CLOSE_WAIT,
        Err(_) => Duration::ZERO,
    };
    // The answer to the close frame is a courtesy that the relay does not depend on.
    let _ = timeout(wait, poll_fn(|cx| pump.frames.poll_drain(cx))).await;
    let Pump { frames, mut writer, traffic, .. } = pump;
    drop(frames);
    result?;
    // What failed here was told to nobody yet, and nobody waits for it any more: all bytes are written.
    let _ = writer.shutdown().await;
    Ok(traffic)
}

/// Both directions of a stream, in one task.
struct Pump<IO, R, W> {
    frames: Frames<IO>,
    reader: R,
    writer: W,
    half_close: bool,
    outward: Outward,
    /// Whether `outward` has come to something else than whoever waits knows of.
    deadline_moved: bool,
    outward_pace: Pace,
    inward_pace: Pace,
    /// Of the message that comes: its type, and whether it has been empty so far.
    in_binary: bool,
    message_is_empty: bool,
    /// What the local connection has not taken yet, from `delivered` on.
    undelivered: Vec<u8>,
    delivered: usize,
    unflushed: bool,
    /// Whether the other end sends no more.
    remote_ended: bool,
    /// Whether the local connection was told so.
    writer_ended: bool,
    /// What the stream comes to, once everything before is delivered.
    end: Option<Result<(), StreamError>>,
    /// When something last came from the relay, or could have been read.
    heard: Instant,
    traffic: Traffic,
}

/// How far the outward direction is.
enum Outward {
    /// The local connection is read.
    Open,
    /// It has ended, and the other end was told.
    Ended,
    /// The close frame is on its way.
    Closing,
    /// The close frame was sent, at that time.
    Closed(Instant),
    /// The leg takes nothing any more, since that time.
    Failed(Instant, StreamError),
}

/// What came of an attempt to move bytes.
enum Step {
    /// Nothing can be moved now.
    Idle,
    /// So many bytes, or something else that changes what can be done next.
    Moved(usize),
    /// The stream is over.
    Over(Result<(), StreamError>),
}

impl<IO, R, W> Pump<IO, R, W>
where
    IO: AsyncRead + AsyncWrite + Unpin,
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    async fn run(&mut self) -> Result<(), StreamError> {
        let mut pings = interval_at(Instant::now() + PING_EVERY, PING_EVERY);
        pings.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let deadline = self.deadline();
            tokio::select! {
                biased;
                over = poll_fn(|cx| self.poll(cx)) => if let Some(result) = over {
                    // Whoever has closed in good order does not care how the rest goes.
                    return if matches!(self.outward, Outward::Closed(_)) { Ok(()) } else { result };
                },
                _ = pings.tick() => if matches!(self.outward, Outward::Open | Outward::Ended)
                    && !self.frames.is_blocked()
                {
                    self.frames.put_ping();
                },
                () = sleep_until(deadline) => if Instant::now() >= self.deadline() {
                    return self.too_late();
                },
            }
        }
    }

    /// Until when something has to happen. Moves on while bytes move, so that whoever waits has to look again.
    fn deadline(&self) -> Instant {
        // While the local connection takes nothing, the leg is not read.
        let heard = if self.is_delivering() { Instant::now() } else { self.heard };
        let silence = heard + SILENCE;
        match &self.outward {
            Outward::Open | Outward::Ended | Outward::Closing => silence,
            Outward::Closed(when) => *when + CLOSE_WAIT,
            Outward::Failed(when, _) => silence.min(*when + DELIVERY_WAIT),
        }
    }

    fn too_late(&mut self) -> Result<(), StreamError> {
        match &self.outward {
            Outward::Open | Outward::Ended | Outward::Closing => Err(StreamError::Silent),
            Outward::Closed(_) => Ok(()),
            Outward::Failed(_, error) => Err(error.clone()),
        }
    }

    /// Moves bytes until nothing can be moved. `None` says that the deadline has changed.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<(), StreamError>>> {
        let mut turn = 0;
        loop {
            let mut idle = true;
            for step in [Self::step_inward, Self::step_outward] {
                match step(self, cx) {
                    Step::Idle => {}
                    Step::Moved(bytes) => {
                        idle = false;
                        turn += bytes;
                    }
                    Step::Over(result) => return Poll::Ready(Some(result)),
                }
            }
            if std::mem::take(&mut self.deadline_moved) {
                return Poll::Ready(None);
            }
            if idle {
                return Poll::Pending;
            }
            if turn >= TURN {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
        }
    }

    /// From the local connection into the leg.
    fn step_outward(&mut self, cx: &mut Context<'_>) -> Step {
        if matches!(self.outward, Outward::Closed(_) | Outward::Failed(..)) {
            return Step::Idle;
        }
        match self.frames.poll_drain(cx) {
            Poll::Pending => return Step::Idle,
            Poll::Ready(Ok(())) => {}
            Poll::Ready(Err(error)) => return self.outward_failed(error),
        }
        match self.outward {
            Outward::Open => self.read_local(cx),
            Outward::Ended if self.writer_ended => self.close(),
            Outward::Closing => {
                self.outward = Outward::Closed(Instant::now());
                self.deadline_moved = true;
                Step::Moved(0)
            }
            Outward::Ended | Outward::Closed(_) | Outward::Failed(..) => Step::Idle,
        }
    }

    /// Makes one frame of one read.
    fn read_local(&mut self, cx: &mut Context<'_>) -> Step {
        let size = self.outward_pace.size();
        scratch::with(&scratch::FRAMES, HEADER_MAX + size, |buffer| {
            let mut read = ReadBuf::new(&mut buffer[HEADER_MAX..]);
            match Pin::new(&mut self.reader).poll_read(cx, &mut read) {
                Poll::Pending => return Step::Idle,
                Poll::Ready(Err(error)) => return Step::Over(Err(StreamError::local(&error))),
                Poll::Ready(Ok(())) => {}
            }
            let count = read.filled().len();
            if count == 0 {
                return self.local_ended();
            }
            let frame = &mut buffer[..HEADER_MAX + count];
            if let Err(error) = self.frames.write(cx, frame, Opcode::Binary, true) {
                return self.outward_failed(error);
            }
            self.outward_pace.adapt(count, self.frames.is_blocked());
            self.traffic.sent += count as u64;
            Step::Moved(count)
        })
    }

    fn local_ended(&mut self) -> Step {
        if !self.half_close {
            return self.close();
        }
        self.frames.put(Opcode::Binary, &[]);
        self.outward = Outward::Ended;
        Step::Moved(0)
    }

    fn close(&mut self) -> Step {
        self.frames.put_close(Some(1000), "");
        self.outward = Outward::Closing;
        Step::Moved(0)
    }

    /// What the relay sent before it went, and its reason, are still to be read.
    fn outward_failed(&mut self, error: io::Error) -> Step {
        self.outward = Outward::Failed(Instant::now(), error.into());
        self.deadline_moved = true;
        Step::Moved(0)
    }

    /// From the leg into the local connection.
    fn step_inward(&mut self, cx: &mut Context<'_>) -> Step {
        match self.poll_deliver(cx) {
            Poll::Pending => return Step::Idle,
            Poll::Ready(Ok(())) => {}
            Poll::Ready(Err(error)) => return Step::Over(Err(StreamError::local(&error))),
        }
        if let Some(end) = self.end.take() {
            return Step::Over(end);
        }
        if let Some(mut input) = self.frames.take_input() {
            let (used, step) = self.deliver_all(cx, &mut input);
            self.frames.put_back(input, used);
            if used > 0 || self.end.is_some() {
                return step;
            }
        }
        let size = self.inward_pace.size();
        scratch::with(&scratch::FRAMES, size, |buffer| {
            let filled = match self.frames.poll_fill(cx, buffer) {
                Poll::Pending => return Step::Idle,
                Poll::Ready(Ok(filled)) => filled,
                Poll::Ready(Err(error)) => return Step::Over(Err(error.into())),
            };
            self.heard = Instant::now();
            let (used, step) = self.deliver_all(cx, &mut buffer[..filled]);
            self.frames.keep(&buffer[used..filled]);
            self.inward_pace.adapt(filled, !self.undelivered.is_empty());
            step
        })
    }

    /// Delivers the payload of the frames in `buffer` in one write, and says how many bytes it used.
    fn deliver_all(&mut self, cx: &mut Context<'_>, buffer: &mut [u8]) -> (usize, Step) {
        let mut at = 0;
        // The first payload stays where it is, and the others are moved up behind it.
        let mut data = 0..0;
        while self.end.is_none() {
            match self.frames.take(buffer, &mut at) {
                Ok(None) => break,
                Ok(Some(Piece::Data { opcode, fin, payload })) => {
                    if opcode != Opcode::Continuation {
                        self.in_binary = opcode == Opcode::Binary;
                        self.message_is_empty = true;
                    }
                    self.message_is_empty &= payload.is_empty();
                    if !payload.is_empty() && self.remote_ended {
                        self.end = Some(Err(StreamError::AfterEnd));
                    } else if data.is_empty() {
                        data = payload;
                    } else {
                        let end = data.end + payload.len();
                        buffer.copy_within(payload, data.end);
                        data.end = end;
                    }
                    self.remote_ended |= self.half_close && fin && self.in_binary && self.message_is_empty;
                }
                Ok(Some(Piece::Close { code, text })) => self.end = Some(StreamError::of_close(code, text)),
                Err(error) => {
                    self.frames.put_close(Some(error.close_code()), "");
                    self.end = Some(Err(error.into()));
                }
            }
        }
        self.traffic.received += data.len() as u64;
        let step = match self.write_local(cx, &buffer[data]) {
            Ok(()) => Step::Moved(at),
            Err(error) => Step::Over(Err(StreamError::local(&error))),
        };
        (at, step)
    }

    /// Writes payload, and keeps what the local connection does not take.
    fn write_local(&mut self, cx: &mut Context<'_>, mut data: &[u8]) -> io::Result<()> {
        self.unflushed |= !data.is_empty();
        while !data.is_empty() {
            match Pin::new(&mut self.writer).poll_write(cx, data) {
                Poll::Pending => break,
                Poll::Ready(written) => data = &data[some(written?)?..],
            }
        }
        self.undelivered.extend_from_slice(data);
        Ok(())
    }

    /// Writes what waits for the local connection, flushes, and shuts it down after the end of this direction.
    fn poll_deliver(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.delivered < self.undelivered.len() {
            let rest = &self.undelivered[self.delivered..];
            self.delivered += some(ready!(Pin::new(&mut self.writer).poll_write(cx, rest))?)?;
            self.heard = Instant::now();
        }
        if self.delivered > 0 {
            (self.undelivered, self.delivered) = (Vec::new(), 0);
        }
        if self.unflushed {
            ready!(Pin::new(&mut self.writer).poll_flush(cx))?;
            self.unflushed = false;
            self.heard = Instant::now();
        }
        if self.remote_ended && !self.writer_ended {
            ready!(Pin::new(&mut self.writer).poll_shutdown(cx)).or_else(already_gone)?;
            self.writer_ended = true;
            self.heard = Instant::now();
        }
        Poll::Ready(Ok(()))
    }

    fn is_delivering(&self) -> bool {
        self.unflushed || !self.undelivered.is_empty() || self.remote_ended && !self.writer_ended
    }
}

/// How much is read at once: much while it comes fast and is taken, little for whoever would have to keep it.
struct Pace(usize);

impl Default for Pace {
    fn default() -> Self {
        Self(READ_LEAST)
    }
}

impl Pace {
    fn size(&self) -> usize {
        self.0
    }

    fn adapt(&mut self, read: usize, blocked: bool) {
        if blocked {
            self.0 = (self.0 / 2).max(READ_LEAST);
        } else if read == self.0 {
            self.0 = (self.0 * 2).min(READ_MOST);
        }
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

/// One read, and so one message, at the least and at the most: 1 MiB is what common libraries take by default.
const READ_LEAST: usize = 64 * 1024;
const READ_MOST: usize = 1 << 20;

/// A busy stream moves about so many bytes before others have their turn.
const TURN: usize = 2 << 20;

/// How long a slow local reader may take for what came before the leg was lost.
const DELIVERY_WAIT: Duration = Duration::from_secs(60);

/// How long the local end may go on sending after the stream's clean end.
const LINGER: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use bytes::BytesMut;
    use futures_util::{SinkExt as _, StreamExt as _};
    use midspan_core::frame::{self, put_frame, put_header};
    use proptest::prelude::*;
    use tokio::{
        io::{DuplexStream, duplex, split},
        task::yield_now,
    };
    use tokio_tungstenite::{
        WebSocketStream,
        tungstenite::{
            Message,
            protocol::{CloseFrame, Role, frame::coding::CloseCode},
        },
    };

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

    #[tokio::test]
    async fn bytes_follow_messages_that_came_in_the_same_read() {
        let (near_leg, mut far_leg) = duplex(16 * 1024);
        let (mut local, near_local) = duplex(16 * 1024);
        let mut wire = Vec::new();
        put_frame(&mut wire, Opcode::Text, true, b"ready?");
        put_frame(&mut wire, Opcode::Binary, false, b"the first ");
        far_leg.write_all(&wire).await.unwrap();
        let mut near = Messages::new(near_leg, BytesMut::new());
        assert_eq!(near.receive().await, Ok(Some(leg::Message::Text("ready?".to_owned()))));

        let (reader, writer) = split(near_local);
        let story = async {
            wire.clear();
            put_frame(&mut wire, Opcode::Continuation, true, b"bytes");
            frame::put_close(&mut wire, frame::CloseFrame { code: Some(1000), text: "" });
            far_leg.write_all(&wire).await.unwrap();
            let mut text = String::new();
            local.read_to_string(&mut text).await.unwrap();
            assert_eq!(text, "the first bytes");
        };
        let (result, ()) = tokio::join!(pump(near, reader, writer, true), story);
        assert_eq!(result, Ok(Traffic { sent: 0, received: 15 }));
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_local_reader_stops_the_leg_and_loses_nothing() {
        let (mut local, mut remote, pump) = pumped(true).await;
        let piece = vec![7; 8 * 1024];
        let story = async {
            let remote = remote.get_mut();
            let mut taken = 0;
            let mut wire = Vec::new();
            put_header(&mut wire, Opcode::Binary, true, 64 * READ_MOST);
            remote.write_all(&wire).await.unwrap();
            while timeout(SILENCE * 2, remote.write_all(&piece)).await.is_ok() {
                taken += piece.len();
                assert!(taken < 2 * READ_MOST, "it takes what nobody reads");
            }
            // What stands in the buffers, and one write that did not end.
            let mut count = 0;
            let mut buffer = [0; 4096];
            while let Ok(read) = timeout(Duration::from_secs(1), local.read(&mut buffer)).await {
                assert!(buffer[..read.unwrap()].iter().all(|&byte| byte == 7));
                count += buffer.len();
            }
            assert!(count >= taken, "{count} of {taken} bytes arrived");
        };
        tokio::select! {
            biased;
            () = story => {}
            result = pump => panic!("it ended with {result:?}"),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_leg_that_takes_nothing_stops_the_local_writer_and_pongs_when_it_can() {
        let (mut local, mut remote, pump) = pumped(true).await;
        let story = async {
            let piece = vec![7; 8 * 1024];
            let mut sent = 0;
            while timeout(PING_EVERY * 2 / 3, local.write_all(&piece)).await.is_ok() {
                sent += piece.len();
                assert!(sent < 2 * READ_MOST, "it takes what nobody reads");
            }
            for text in ["earlier", "later"] {
                remote.send(Message::Ping(text.into())).await.unwrap();
            }
            // The pump sees them while it cannot write.
            tokio::time::sleep(Duration::from_secs(1)).await;
            let (mut received, mut pongs) = (0, Vec::new());
            while let Ok(message) = timeout(Duration::from_secs(1), remote.next()).await {
                match message.unwrap().unwrap() {
                    Message::Binary(data) => received += data.len(),
                    Message::Pong(text) => pongs.push(text),
                    Message::Ping(_) => {}
                    Message::Text(_) | Message::Close(_) | Message::Frame(_) => panic!("not sent by a pump"),
                }
            }
            assert!(received >= sent, "{received} of {sent} bytes arrived");
            assert_eq!(pongs, ["later"], "one answer, to the last ping");
        };
        tokio::select! {
            biased;
            () = story => {}
            result = pump => panic!("it ended with {result:?}"),
        }
    }

    #[tokio::test]
    async fn frames_that_are_not_allowed_are_named_and_refused() {
        let mut reserved = Vec::new();
        put_frame(&mut reserved, Opcode::Binary, true, b"x");
        reserved[0] |= 0x40;
        let cases: [(&[u8], &str); 4] = [
            (&reserved, "a reserved bit is set"),
            (&[0x82, 0x81, 0, 0, 0, 0, b'x'], "a server's frame must not be masked"),
            (&[0x89, 0x7e, 0, 126], "a control frame has at most 125 bytes"),
            (&[0x82, 0x7f, 0xff, 0, 0, 0, 0, 0, 0, 0], "the length is not in its shortest form"),
        ];
        for (bytes, words) in cases {
            let (mut local, mut remote, pump) = pumped(true).await;
            let story = async {
                let mut wire = Vec::new();
                put_frame(&mut wire, Opcode::Binary, true, b"good");
                wire.extend_from_slice(bytes);
                remote.get_mut().write_all(&wire).await.unwrap();
                let mut good = Vec::new();
                local.read_to_end(&mut good).await.unwrap();
                assert_eq!(good, b"good", "before: {words}");
                assert_eq!(close_code(&mut remote).await, Some(CloseCode::Protocol));
            };
            let (result, ()) = tokio::join!(pump, story);
            let expected = format!("the relay broke the WebSocket protocol: {words}");
            assert_eq!(result, Err(StreamError::Lost(expected)));
        }
    }

    #[tokio::test]
    async fn every_frame_is_masked_with_a_key_of_its_own() {
        let (mut local, mut remote, pump) = pumped(true).await;
        let story = async {
            let mut keys = Vec::new();
            for _ in 0..4 {
                local.write_all(b"same").await.unwrap();
                let mut frame = [0; 2 + 4 + 4];
                remote.get_mut().read_exact(&mut frame).await.unwrap();
                assert_eq!(frame[..2], [0x82, 0x84]);
                keys.push(u32::from_be_bytes(*frame[2..].first_chunk().unwrap()));
            }
            keys.sort_unstable();
            keys.dedup();
            // Two that are equal by chance are no wonder, three are.
            assert!(keys.len() >= 3, "{keys:x?}");
        };
        tokio::select! {
            biased;
            () = story => {}
            result = pump => panic!("it ended with {result:?}"),
        }
    }

    /// What the relay sends.
    #[derive(Debug, Clone)]
    enum Sent {
        /// A message, in fragments.
        Message {
            is_text: bool,
            fragments: Vec<usize>,
        },
        Ping(u8),
        Pong,
        Close(Option<u16>),
        /// A frame that continues nothing.
        Mistake,
        /// The beginning of a frame.
        Half,
    }

    fn sent() -> impl Strategy<Value = Vec<Sent>> {
        let fragment =
            prop_oneof![3 => 0usize..300, 1 => Just(0), 1 => 60_000usize..70_000, 1 => 0usize..200_000];
        let fragments = prop::collection::vec(fragment, 1..4);
        let sent = prop_oneof![
            12 => (any::<bool>(), fragments).prop_map(|(is_text, fragments)| Sent::Message { is_text, fragments }),
            2 => any::<u8>().prop_map(Sent::Ping),
            1 => Just(Sent::Pong),
            1 => prop_oneof![Just(None), Just(Some(1000)), Just(Some(1011))].prop_map(Sent::Close),
            1 => Just(Sent::Mistake),
            1 => Just(Sent::Half),
        ];
        prop::collection::vec(sent, 0..12)
    }

    /// The bytes of what is sent, what of it is for the local connection, and what the stream comes to.
    fn reference(sent: &[Sent], half_close: bool) -> (Vec<u8>, Vec<u8>, Result<(), StreamError>) {
        let (mut wire, mut data, mut end, mut ended) = (Vec::new(), Vec::new(), None, false);
        for sent in sent {
            let mut expected = None;
            match sent {
                Sent::Message { is_text, fragments } => {
                    let length: usize = fragments.iter().sum();
                    // A pattern that shows when bytes are at the wrong place.
                    let payload: Vec<u8> =
                        (0..length).map(|at| u8::try_from((wire.len() + at) % 251).unwrap()).collect();
                    let mut rest = &payload[..];
                    for (index, &size) in fragments.iter().enumerate() {
                        let opcode = match (index, is_text) {
                            (0, true) => Opcode::Text,
                            (0, false) => Opcode::Binary,
                            _ => Opcode::Continuation,
                        };
                        let fragment;
                        (fragment, rest) = rest.split_at(size);
                        put_frame(&mut wire, opcode, index + 1 == fragments.len(), fragment);
                    }
                    if ended && length > 0 {
                        expected = Some(Err(StreamError::AfterEnd));
                    } else if end.is_none() {
                        data.extend(payload);
                        ended |= half_close && !is_text && length == 0;
                    }
                }
                Sent::Ping(byte) => put_frame(&mut wire, Opcode::Ping, true, &[*byte]),
                Sent::Pong => put_frame(&mut wire, Opcode::Pong, true, b"unasked"),
                Sent::Close(code) => {
                    frame::put_close(&mut wire, frame::CloseFrame { code: *code, text: "words" });
                    expected = Some(StreamError::of_close(*code, "words".to_owned()));
                }
                Sent::Mistake => {
                    put_frame(&mut wire, Opcode::Continuation, true, b"");
                    expected = Some(Err(frame::FrameError::NothingToContinue.into()));
                }
                Sent::Half => {
                    put_header(&mut wire, Opcode::Ping, true, 3);
                    end = end.or(Some(Err(StreamError::no_close_frame())));
                    break;
                }
            }
            end = end.or(expected);
        }
        (wire, data, end.unwrap_or_else(|| Err(StreamError::no_close_frame())))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Whatever the reads and the room in the buffers are, the local connection gets the same bytes, and the stream
        /// comes to the same end.
        #[test]
        fn what_comes_in_does_not_depend_on_the_reads(
            sent in sent(),
            half_close: bool,
            cuts in prop::collection::vec(1usize..90_000, 1..6),
            leg_room in 1usize..100_000,
            local_room in 1000usize..100_000,
        ) {
            let (wire, expected_data, expected_end) = reference(&sent, half_close);
            let (data, end) = run(async {
                let (near_leg, far_leg) = duplex(leg_room);
                let (local, near_local) = duplex(local_room);
                let (mut far_reader, mut far_writer) = split(far_leg);
                let (mut local_reader, _local_writer) = split(local);
                let write = async {
                    let mut rest = &wire[..];
                    for &size in cuts.iter().cycle() {
                        let (piece, later) = rest.split_at(size.min(rest.len()));
                        // After its end, the stream takes no more.
                        if far_writer.write_all(piece).await.is_err() || later.is_empty() {
                            break;
                        }
                        rest = later;
                        yield_now().await;
                    }
                    let _ = far_writer.shutdown().await;
                };
                let discard = async {
                    let mut answers = Vec::new();
                    let _ = far_reader.read_to_end(&mut answers).await;
                };
                let mut data = Vec::new();
                let read = async {
                    while local_reader.read_buf(&mut data).await.unwrap() > 0 {
                        yield_now().await;
                    }
                };
                let near = Messages::new(near_leg, BytesMut::new());
                let (reader, writer) = split(near_local);
                let ended = pump(near, reader, writer, half_close);
                let (end, (), (), ()) = tokio::join!(ended, write, discard, read);
                (data, end)
            });
            prop_assert!(data == expected_data, "{} bytes instead of {}", data.len(), expected_data.len());
            let received = expected_data.len() as u64;
            prop_assert_eq!(end, expected_end.map(|()| Traffic { sent: 0, received }));
        }

        /// Whatever the local connection writes at once and the leg takes, the other end gets the same bytes.
        #[test]
        fn what_goes_out_does_not_depend_on_the_reads(
            writes in prop::collection::vec(1usize..300_000, 0..8),
            leg_room in 1usize..100_000,
            local_room in 1usize..400_000,
        ) {
            let length: usize = writes.iter().sum();
            let data: Vec<u8> = (0..length).map(|at| u8::try_from(at % 251).unwrap()).collect();
            let (received, end) = run(async {
                let (near_leg, far_leg) = duplex(leg_room);
                let (mut local, near_local) = duplex(local_room);
                let write = async {
                    let mut rest = &data[..];
                    for &size in &writes {
                        let piece;
                        (piece, rest) = rest.split_at(size);
                        local.write_all(piece).await.unwrap();
                        yield_now().await;
                    }
                    local.shutdown().await.unwrap();
                };
                let mut received = Vec::new();
                let read = async {
                    let mut far = WebSocketStream::from_raw_socket(far_leg, Role::Server, None).await;
                    loop {
                        let message = far.next().await.unwrap().unwrap();
                        assert!(message.is_binary(), "{message:?}");
                        if message.is_empty() {
                            break;
                        }
                        received.extend_from_slice(&message.into_data());
                    }
                    far.close(None).await.unwrap();
                    while far.next().await.is_some() {}
                };
                let near = Messages::new(near_leg, BytesMut::new());
                let (reader, writer) = split(near_local);
                let (end, (), ()) = tokio::join!(pump(near, reader, writer, true), write, read);
                (received, end)
            });
            prop_assert!(received == data, "{} bytes instead of {length}", received.len());
            prop_assert_eq!(end, Ok(Traffic { sent: length as u64, received: 0 }));
        }
    }

    fn run<F: Future>(future: F) -> F::Output {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
        runtime.unwrap().block_on(future)
    }

    /// A local connection, the other end of the leg, and the pump between them.
    async fn pumped(
        half_close: bool,
    ) -> (DuplexStream, WebSocketStream<DuplexStream>, impl Future<Output = Result<Traffic, StreamError>>)
    {
        let (local, near_local) = duplex(16 * 1024);
        let (near_leg, far_leg) = duplex(16 * 1024);
        let near = Messages::new(near_leg, BytesMut::new());
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
