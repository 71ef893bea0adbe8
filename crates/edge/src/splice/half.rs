//! One leg of a joined stream: what is read from it, and what it is owed.

use std::{
    cell::RefCell,
    future::poll_fn,
    io,
    pin::Pin,
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use bytes::Bytes;
use midspan_core::{
    close::CloseReason,
    frame::{
        CloseFrame, Control, Event, FrameError, FrameReader, HEADER_MAX, HEADROOM, HOLD, Opcode, Passage,
        Sender, Stop, put_close, put_frame,
    },
    id::Role,
};
use midspan_platform::{
    clock,
    copy::{append, copy},
    listener::Connection,
    tls::TlsStream,
    unsent::Unsent,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf},
    net::TcpStream,
    time::timeout,
};

use super::{
    Cause,
    gathering::{self, Gathering, Wait},
    shared::{Kept, READ_MOST, READ_PLAIN, Shared},
    turns::AT_ONCE,
};
use crate::{leg::FAREWELL, moderation, vitals::Seen};

/// A leg for which so many bytes of pings and pongs wait is not read from, not even for the pings that it sends.
const OWN_MAX: usize = 64 * 1024;

/// What a stream reads at once from a leg at first, and at the least, in bytes.
const APPETITE_LEAST: usize = 64 * 1024;

/// By which part of itself that grows after a read that filled it and was passed on whole. By much, and what a slow leg does
/// not take would be much, too.
const APPETITE_GROWTH: usize = 4;

thread_local! {
    /// Where the streams of a thread read to, one after the other: what was kept of a leg's input, then one read.
    static SCRATCH: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

fn with_scratch<T>(work: impl FnOnce(&mut Vec<u8>) -> T) -> T {
    SCRATCH.with_borrow_mut(|scratch| {
        if scratch.is_empty() {
            // Zeroed by the kernel, page by page, when a page is first read to.
            *scratch = vec![0; HEADROOM + HOLD + HEADER_MAX + PAGE + READ_MOST];
        }
        work(scratch)
    })
}

const PAGE: usize = 4096;

/// Where in `scratch` a read goes to, from `least` on, with up to a page between: to the middle of a page.
///
/// What a socket holds often begins at the start of a page. Some processors copy at half their speed to where an address is
/// the same within its page, or a few bytes beyond.
fn read_start(scratch: &[u8], least: usize) -> usize {
    least + scratch[least + PAGE / 2..].as_ptr().align_offset(PAGE)
}

/// A connection that a splice can move bytes through.
pub trait Pipe: AsyncRead + AsyncWrite + Unpin {
    /// Whether what comes is opened, and what goes is sealed.
    fn is_tls(&self) -> bool;

    /// How many bytes it keeps, of what was written to it and of what came in.
    fn backlog(&self) -> usize;

    /// Has its reader woken for so many bytes at once, and not for less; or for its end. Whether that is so now: many a
    /// connection has no such mark.
    fn set_low_water(&self, _bytes: usize) -> bool {
        false
    }
}

impl Pipe for Connection {
    fn is_tls(&self) -> bool {
        Self::is_tls(self)
    }

    fn backlog(&self) -> usize {
        Self::backlog(self)
    }

    fn set_low_water(&self, bytes: usize) -> bool {
        Self::set_low_water(self, bytes)
    }
}

/// A leg at the edge that owns its stream.
impl Pipe for TlsStream<TcpStream> {
    fn is_tls(&self) -> bool {
        true
    }

    fn backlog(&self) -> usize {
        Self::backlog(self)
    }
}

impl Pipe for DuplexStream {
    fn is_tls(&self) -> bool {
        false
    }

    fn backlog(&self) -> usize {
        0
    }
}

/// How long a leg may take for what it is owed at the end.
#[derive(Debug, Clone, Copy)]
pub(super) struct Patience {
    /// Without taking a byte; and again, once the network has everything, to answer the close frame.
    pub(super) pause: Duration,
    /// In all, until the network has everything.
    pub(super) whole: Duration,
}

/// For ends that owe nothing but the close frame.
pub(super) const HASTE: Patience = Patience { pause: FAREWELL, whole: FAREWELL };

/// One leg: what came from it and is not passed on yet, and what it is owed.
pub(super) struct Half<IO> {
    pub(super) role: Role,
    io: IO,
    reader: FrameReader,
    /// What waits, if anything: apart, because a leg with nothing that waits is to be small.
    backlog: Option<Box<Backlog>>,
    /// Whether its input may be the start of a frame that is held; else it goes out as a fragment.
    hold: bool,
    /// Whether its input was there at the last tick.
    waited: bool,
    /// How much is read from it at once. Where its peer takes less than all of that, it becomes as much as the peer took, or
    /// half, and it grows from there.
    appetite: usize,
    gathering: Gathering,
    /// How often it was read from in a row, without anything from the other leg.
    unanswered: u8,
    /// In how many slices in a row there was always something to move from it.
    slices: u8,
    /// Whether a message was ever passed on to it.
    addressed: bool,
    /// Whether its close frame came, or something that is no frame: it has nothing more to say.
    closed: bool,
    /// Whether the relay has ended its own direction.
    shut: bool,
    /// Bytes of payload that came from it.
    pub(super) payload: u64,
    /// How much of it the counters do not know yet.
    uncounted_payload: u64,
    /// How many messages they do not know yet.
    uncounted_messages: u32,
    seen: Seen,
}

/// Bytes that wait, from a leg or for it.
#[derive(Default)]
struct Backlog {
    /// The start of a frame that is not whole, or what a full leg has to wait with.
    input: Vec<u8>,
    /// How long `input` has to become for another look at it to be worth while; 0 for one look at once.
    wanted: usize,
    /// What is to be sent.
    output: Unsent,
    /// How many bytes of `output` are the relay's own pings and pongs.
    own: usize,
    /// Whether the connection itself still keeps something.
    unflushed: bool,
    /// Since when the connection takes nothing.
    blocked: Option<Instant>,
    /// That it is waited for, if it is.
    wait: Option<Wait>,
}

impl Backlog {
    fn owes(&self) -> bool {
        self.unflushed || !self.output.is_empty()
    }
}

impl<IO: Pipe> Half<IO> {
    pub(super) fn new(role: Role, io: IO, early: &Bytes) -> Self {
        Self {
            role,
            io,
            reader: FrameReader::new(Sender::Client),
            backlog: (!early.is_empty())
                .then(|| Box::new(Backlog { input: early.to_vec(), ..Backlog::default() })),
            hold: true,
            waited: false,
            appetite: APPETITE_LEAST,
            gathering: Gathering::default(),
            unanswered: 0,
            slices: 0,
            addressed: false,
            closed: false,
            shut: false,
            payload: 0,
            uncounted_payload: 0,
            uncounted_messages: 0,
            seen: Seen::default(),
        }
    }

    /// Moves bytes from this leg to `to`, as far as one read goes, and says how many it looked at.
    pub(super) fn step(
        &mut self,
        to: &mut Self,
        shared: &Shared,
        cx: &mut Context<'_>,
    ) -> Result<usize, Cause> {
        // Pongs that this leg is owed are written here too, when no data comes back to carry them along.
        self.drain_both(to, shared, cx)?;
        if to.owes() || self.is_full() {
            self.seen.held_back = true;
            return Ok(0);
        }
        with_scratch(|scratch| {
            let kept = self.input().len();
            let read = if self.is_due() { 0 } else { shared.read_size().min(self.appetite) };
            if scratch.len() < HEADROOM + kept + PAGE + read {
                // Only what a full leg had to wait with is as long as that.
                scratch.resize(HEADROOM + kept + PAGE + read, 0);
            }
            let start = read_start(scratch, HEADROOM + kept);
            let mut end = start;
            if read > 0 {
                let mut buffer = ReadBuf::new(&mut scratch[start..start + read]);
                match Pin::new(&mut self.io).poll_read(cx, &mut buffer) {
                    Poll::Pending => {
                        self.wait(cx);
                        return Ok(0);
                    }
                    Poll::Ready(Err(_)) => return Err(Cause::Lost(self.role)),
                    Poll::Ready(Ok(())) => {}
                }
                let read = buffer.filled().len();
                if read == 0 {
                    return Err(Cause::Lost(self.role));
                }
                self.seen.heard = true;
                (self.unanswered, to.unanswered) = (self.unanswered.saturating_add(1), 0);
                moderation::note(read, self.unanswered);
                self.gathering.heard(read);
                end += read;
                if let Some(Backlog { input, wanted, .. }) = self.backlog.as_deref_mut()
                    && self.hold
                    && input.len() + read < *wanted
                {
                    input.reserve_exact(*wanted - input.len());
                    input.extend_from_slice(&scratch[start..end]);
                    return Ok(read);
                }
            }
            copy(&mut scratch[start - kept..start], self.input());
            let mut passage = Passage::new(start - kept..end);
            let mut wanted = 0;
            let translated = self.translate(scratch, &mut passage, shared.may_hold(), &mut wanted);
            // What stands before a close frame or a mistake goes out all the same.
            self.payload += passage.payload();
            self.uncounted_payload += passage.payload();
            // Of a few seconds: far from as many as that.
            let messages = u32::try_from(passage.messages()).unwrap_or(u32::MAX);
            self.uncounted_messages = self.uncounted_messages.saturating_add(messages);
            self.seen.payload |= passage.payload() > 0;
            self.keep(&scratch[passage.rest()], wanted);
            if !passage.output().is_empty() {
                to.seen.sent = true;
                to.addressed = true;
                let taken = to.send(&scratch[passage.output()], cx).map_err(|_| Cause::Lost(to.role))?;
                if to.owes() {
                    self.appetite = taken.max(self.appetite / 2).clamp(APPETITE_LEAST, self.appetite_most());
                } else if read > 0 && end - start > read / 2 {
                    // Half does for all: TLS gives whole records, without what they are wrapped in.
                    self.appetite =
                        (self.appetite + self.appetite / APPETITE_GROWTH).min(self.appetite_most());
                }
            }
            translated?;
            Ok(kept + end - start)
        })
    }

    /// Nothing comes from it now. If it brings much, and alone, it is woken for that.
    fn wait(&mut self, cx: &mut Context<'_>) {
        let mut wait = self.backlog.as_deref_mut().and_then(|backlog| backlog.wait.take());
        self.gathering.dry(&mut wait, &self.io, cx);
        if wait.is_some() {
            self.backlog.get_or_insert_default().wait = wait;
        }
    }

    fn appetite_most(&self) -> usize {
        if self.io.is_tls() { READ_MOST } else { READ_PLAIN }
    }

    /// Writes what both legs are owed, as far as they take it.
    pub(super) fn drain_both(
        &mut self,
        other: &mut Self,
        shared: &Shared,
        cx: &mut Context<'_>,
    ) -> Result<(), Cause> {
        for half in [other, self] {
            if half.owes() && matches!(half.poll_drain(shared, cx), Poll::Ready(Err(_))) {
                return Err(Cause::Lost(half.role));
            }
        }
        Ok(())
    }

    /// Turns frames of this leg into frames for the other, and answers its pings. What is left is worth another look
    /// once it is `wanted` long.
    fn translate(
        &mut self,
        buffer: &mut [u8],
        passage: &mut Passage,
        may_hold: bool,
        wanted: &mut usize,
    ) -> Result<(), Cause> {
        let role = self.role;
        let hold = may_hold && self.hold;
        (self.hold, self.waited) = (true, false);
        loop {
            let stop = self.reader.pass(buffer, passage, hold);
            self.closed = matches!(stop, Err(_) | Ok(Stop::Control(Control::Close(_))));
            match stop.map_err(|error| Cause::Protocol(role, error))? {
                Stop::Starved { wanted: length } => {
                    // Not zero: the next look comes after the next read.
                    *wanted = length.max(1);
                    return Ok(());
                }
                Stop::Control(Control::Ping(payload)) => {
                    self.put_own(Opcode::Pong, payload);
                }
                Stop::Control(Control::Pong) => self.seen.ponged = true,
                Stop::Control(Control::Close(CloseFrame { code, text })) => {
                    return Err(Cause::Closed { role, code, text: text.to_owned() });
                }
            }
            if self.is_full() {
                return Ok(());
            }
        }
    }

    /// Whether there is input to look at without reading more.
    fn is_due(&self) -> bool {
        self.backlog.as_deref().is_some_and(|backlog| !backlog.input.is_empty() && backlog.wanted == 0)
    }

    fn input(&self) -> &[u8] {
        self.backlog.as_deref().map_or(&[], |backlog| &backlog.input)
    }

    /// Keeps what could not be passed on.
    fn keep(&mut self, rest: &[u8], wanted: usize) {
        if !rest.is_empty() || self.backlog.is_some() {
            let mut input = Vec::new();
            append(&mut input, rest);
            let backlog = self.backlog.get_or_insert_default();
            (backlog.input, backlog.wanted) = (input, wanted);
        }
    }

    /// Writes to this leg, which owes nothing, and keeps what it does not take. About how many bytes the network took.
    fn send(&mut self, bytes: &[u8], cx: &mut Context<'_>) -> io::Result<usize> {
        let mut sent = 0;
        while sent < bytes.len() {
            match Pin::new(&mut self.io).poll_write(cx, &bytes[sent..]) {
                Poll::Ready(Ok(0)) => return Err(io::ErrorKind::WriteZero.into()),
                Poll::Ready(Ok(written)) => sent += written,
                Poll::Ready(Err(error)) => return Err(error),
                Poll::Pending => break,
            }
        }
        self.seen.took |= sent > 0;
        // TLS keeps what the socket does not take at once.
        let flushed = Pin::new(&mut self.io).poll_flush(cx)?;
        if sent < bytes.len() || flushed.is_pending() {
            let backlog = self.backlog.get_or_insert_default();
            backlog.output.append(&bytes[sent..]);
            backlog.unflushed = true;
            backlog.blocked = backlog.blocked.or(Some(clock::now()));
        }
        Ok(sent.saturating_sub(self.io.backlog()))
    }

    /// Writes what this leg is owed. Ready once nothing is.
    fn poll_drain(&mut self, shared: &Shared, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Some(backlog) = self.backlog.as_deref_mut() else { return Poll::Ready(Ok(())) };
        while !backlog.output.is_empty() {
            ready!(backlog.output.poll_write(Pin::new(&mut self.io), cx))?;
            backlog.unflushed = true;
            self.seen.took = true;
        }
        backlog.own = 0;
        if backlog.unflushed {
            ready!(Pin::new(&mut self.io).poll_flush(cx))?;
            backlog.unflushed = false;
            self.seen.took = true;
        }
        if let Some(since) = backlog.blocked.take() {
            shared.leg(self.role).blocked_for(clock::now().saturating_duration_since(since));
        }
        Poll::Ready(Ok(()))
    }

    /// Delivers what this leg is owed, then ends the connection in good order, dropping what still comes in.
    pub(super) async fn deliver(&mut self, patience: Patience, shared: &Shared) {
        let mut kept = Kept::new(shared.clone());
        if let Some(backlog) = self.backlog.as_deref_mut() {
            gathering::end(&mut backlog.wait, &self.io);
        }
        let mut input = self.input().to_vec();
        let used = self.discard(&mut input);
        self.keep(&input[used..], 0);
        drop(input);
        let delivered = async {
            loop {
                self.seen.took = false;
                let drained = poll_fn(|cx| {
                    // A peer that is itself blocked in writing would never get to read.
                    let heard = self.poll_discard(cx);
                    let drained = self.poll_drain(shared, cx);
                    kept.set(self.kept());
                    if let Poll::Ready(Err(error)) = heard { Poll::Ready(Err(error)) } else { drained }
                });
                match timeout(patience.pause, drained).await {
                    Ok(drained) => return drained.is_ok(),
                    Err(_) if self.seen.took => {}
                    Err(_) => return false,
                }
            }
        };
        if timeout(patience.whole, delivered).await == Ok(true) {
            self.linger(patience).await;
        }
    }

    /// Ends the sending direction, and reads until the peer has ended its own, so that no reset eats what was sent last.
    ///
    /// A socket that is dropped resets the connection as soon as the peer sends more, and with that goes whatever the
    /// network still holds for it. A peer has surely read all of that only when it has answered the close frame.
    async fn linger(&mut self, patience: Patience) {
        let answer = if self.addressed { patience.pause } else { FAREWELL };
        let answered = poll_fn(|cx| match self.poll_end(cx) {
            Poll::Pending if !self.closed => Poll::Pending,
            Poll::Pending => Poll::Ready(Ok(())),
            Poll::Ready(ended) => Poll::Ready(ended),
        });
        if matches!(timeout(answer, answered).await, Ok(Ok(()))) {
            // The peer may end at its leisure, but not for ever.
            let _ = timeout(FAREWELL, poll_fn(|cx| self.poll_end(cx))).await;
        }
    }

    /// Ends the sending direction, and drops what comes in. Ready once both directions are at their end.
    fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let ended = self.poll_discard(cx)?;
        if !self.shut {
            ready!(Pin::new(&mut self.io).poll_shutdown(cx))?;
            self.shut = true;
        }
        ended.map(Ok)
    }

    /// Drops what comes in, and notes a close frame. Ready at the end of what comes in.
    fn poll_discard(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        with_scratch(|scratch| {
            for _ in 0..2 {
                let start = self.input().len();
                let mut buffer = ReadBuf::new(&mut scratch[start..]);
                ready!(Pin::new(&mut self.io).poll_read(cx, &mut buffer))?;
                let end = start + buffer.filled().len();
                if end == start {
                    return Poll::Ready(Ok(()));
                }
                scratch[..start].copy_from_slice(self.input());
                let used = self.discard(&mut scratch[..end]);
                self.keep(&scratch[used..end], 0);
            }
            cx.waker().wake_by_ref();
            Poll::Pending
        })
    }

    /// Drops frames up to the close frame, and all that comes after it; says how many bytes that is.
    fn discard(&mut self, input: &mut [u8]) -> usize {
        let mut used = 0;
        while !self.closed {
            match self.reader.next(&mut input[used..]) {
                Ok(None) => return used,
                Ok(Some((taken, event))) => {
                    used += taken;
                    self.closed = matches!(event, Event::Control(Control::Close(_)));
                }
                Err(_) => self.closed = true,
            }
        }
        input.len()
    }

    pub(super) fn put_ping(&mut self) {
        if !self.is_full() {
            self.put_own(Opcode::Ping, b"");
        }
    }

    fn put_own(&mut self, opcode: Opcode, payload: &[u8]) {
        let backlog = self.backlog.get_or_insert_default();
        backlog.own += backlog.output.put(|output| put_frame(output, opcode, true, payload));
    }

    pub(super) fn put_close(&mut self, frame: CloseFrame<'_>) {
        self.backlog.get_or_insert_default().output.put(|output| put_close(output, frame));
    }

    /// Tells this leg why the stream is over; with the error, if it is this leg's.
    pub(super) fn put_reason(&mut self, reason: CloseReason, error: Option<FrameError>) {
        let (code, text) = match error {
            None => (reason.close_code_for(self.role), reason.close_text()),
            Some(error) => (error.close_code(), format!("{reason}: {error}")),
        };
        self.put_close(CloseFrame { code: Some(code), text: &text });
    }

    pub(super) fn owes(&self) -> bool {
        self.backlog.as_deref().is_some_and(Backlog::owes)
    }

    /// What it is to be told of the other leg's does not count: an end that only writes for now must get through.
    fn is_full(&self) -> bool {
        self.backlog.as_deref().is_some_and(|backlog| backlog.own >= OWN_MAX)
    }

    /// How much memory its bytes take.
    pub(super) fn kept(&self) -> usize {
        let backlog =
            self.backlog.as_deref().map_or(0, |backlog| backlog.input.capacity() + backlog.output.memory());
        backlog + self.io.backlog()
    }

    /// Lets a tick pass: the start of a frame that was there at the last one already goes out as a fragment.
    pub(super) fn tick(&mut self) {
        if self.has_much() {
            // What came after that start may have to wait for the stream's turn.
            return;
        }
        let Some(backlog) = self.backlog.as_deref_mut() else { return };
        if self.waited {
            (self.hold, backlog.wanted) = (false, 0);
        }
        self.waited = !backlog.input.is_empty();
        if !self.waited && !backlog.owes() && backlog.wait.is_none() {
            self.backlog = None;
        }
    }

    /// Brings the counters up to date.
    pub(super) fn count(&mut self, shared: &Shared) {
        let to = shared.leg(self.role.peer());
        to.payload.inc_by(std::mem::take(&mut self.uncounted_payload));
        to.messages.inc_by(std::mem::take(&mut self.uncounted_messages).into());
        if let Some(since) = self.backlog.as_deref_mut().and_then(|backlog| backlog.blocked.as_mut()) {
            let now = clock::now();
            shared.leg(self.role).blocked_for(now.saturating_duration_since(*since));
            *since = now;
        }
    }

    /// A slice of the stream's time is over, or it had nothing more to move. Whether there was always something to move from
    /// this leg, and not little.
    pub(super) fn end_slice(&mut self, goes_on: bool) {
        self.slices = if goes_on { self.slices.saturating_add(1) } else { 0 };
    }

    /// Whether so much came from it that more of it has to wait for the stream's turn.
    pub(super) fn has_much(&self) -> bool {
        self.slices >= AT_ONCE
    }

    /// Does not read from it, if it has much: others have their turn. Whether it has.
    pub(super) fn hold_back(&mut self) -> bool {
        self.seen.held_back |= self.has_much();
        self.has_much()
    }

    pub(super) fn take_seen(&mut self, peer_owes: bool) -> Seen {
        let held_back = self.seen.held_back || peer_owes || self.is_full();
        let seen = Seen { owed: self.owes(), held_back, ..self.seen };
        self.seen = Seen::default();
        seen
    }
}
