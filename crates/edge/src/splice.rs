//! Moves the bytes of a joined stream, both ways, in one task, until one side ends.
//!
//! Frames are cut through: headers are read, payload is unmasked and passed on as it arrives. At most one held frame and one
//! read wait in each direction; a leg that takes nothing stops the reads from its peer. An idle stream holds no buffer.

use std::{
    cell::RefCell,
    future::{Future, poll_fn},
    io,
    pin::{Pin, pin},
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use midspan_core::{
    close::CloseReason,
    frame::{CloseFrame, Event, FrameError, FrameReader, Opcode, Sender, put_close, put_frame},
    id::Role,
};
use midspan_platform::clock;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::timeout,
};

pub use crate::vitals::Limits;
use crate::{
    leg::{FAREWELL, linger},
    vitals::{Seen, Vitals},
};

/// Read at once from a leg, in bytes. One buffer of this size per thread serves all its streams.
const READ: usize = 64 * 1024;

/// A leg that owes this much output is not read from, not even for the pings that it sends.
const OUTPUT_MAX: usize = 64 * 1024;

/// How many rounds a busy stream gets before others have their turn.
const ROUNDS: usize = 16;

thread_local! {
    static SCRATCH: RefCell<Vec<u8>> = RefCell::new(vec![0; READ]);
}

/// Two joined legs.
pub struct Splice<IO> {
    service: Half<IO>,
    device: Half<IO>,
}

/// Why bytes no longer flow.
#[derive(Debug)]
pub struct Ending(Cause);

#[derive(Debug)]
enum Cause {
    /// A close frame came.
    Closed { role: Role, code: Option<u16>, text: String },
    /// A connection ended without one.
    Lost(Role),
    /// A leg broke the protocol.
    Protocol(Role, FrameError),
    /// A limit, or somebody outside.
    Told(CloseReason),
}

impl Ending {
    /// The reason of the end.
    pub fn reason(&self) -> CloseReason {
        self.0.reason()
    }
}

impl Cause {
    fn reason(&self) -> CloseReason {
        match self {
            Self::Closed { role, .. } => CloseReason::closed_by(*role),
            Self::Lost(role) => CloseReason::lost(*role),
            Self::Protocol(role, _) => CloseReason::protocol(*role),
            Self::Told(reason) => *reason,
        }
    }
}

/// How long a leg may take for what it is owed at the end.
#[derive(Debug, Clone, Copy)]
struct Patience {
    /// Without taking a byte.
    pause: Duration,
    /// In all.
    whole: Duration,
}

/// For ends that owe nothing but the close frame.
const HASTE: Patience = Patience { pause: FAREWELL, whole: FAREWELL };

/// One leg: what came from it and is no whole frame yet, and what it is owed.
struct Half<IO> {
    role: Role,
    io: IO,
    reader: FrameReader,
    input: Vec<u8>,
    output: Vec<u8>,
    written: usize,
    unflushed: bool,
    payload: u64,
    seen: Seen,
}

impl<IO: AsyncRead + AsyncWrite + Unpin> Splice<IO> {
    /// Joins two legs. `early` is what was read of each already: the service's, then the device's.
    pub fn new(service: IO, device: IO, early: [Bytes; 2]) -> Self {
        let [early_service, early_device] = early;
        Self {
            service: Half::new(Role::Service, service, &early_service),
            device: Half::new(Role::Device, device, &early_device),
        }
    }

    /// Bytes of payload that were passed on: to the device, to the service.
    pub fn payload(&self) -> (u64, u64) {
        (self.service.payload, self.device.payload)
    }

    /// Moves bytes until one of the legs ends, a limit is reached, or `end` says so.
    pub async fn run(&mut self, limits: Limits, end: impl Future<Output = CloseReason>) -> Ending {
        Ending(self.flow(limits, end).await)
    }

    async fn flow(&mut self, limits: Limits, end: impl Future<Output = CloseReason>) -> Cause {
        let mut vitals = Vitals::new(limits, clock::now());
        let mut end = pin!(end);
        let mut ticks = tokio::time::interval(limits.tick());
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                reason = &mut end => return Cause::Told(reason),
                _ = ticks.tick() => {
                    let (service_owes, device_owes) = (self.service.owes(), self.device.owes());
                    let seen = [self.service.take_seen(device_owes), self.device.take_seen(service_owes)];
                    let verdict = vitals.tick(clock::now(), seen);
                    if let Some(reason) = verdict.end {
                        return Cause::Told(reason);
                    }
                    for (half, ping) in [&mut self.service, &mut self.device].into_iter().zip(verdict.ping) {
                        if ping && !half.is_full() {
                            put_frame(&mut half.output, Opcode::Ping, true, b"");
                        }
                    }
                }
                ending = poll_fn(|cx| self.poll_pump(cx)) => return ending,
            }
        }
    }

    /// Moves bytes both ways until nothing more can be moved now.
    fn poll_pump(&mut self, cx: &mut Context<'_>) -> Poll<Cause> {
        for _ in 0..ROUNDS {
            let forth = self.service.step(&mut self.device, cx);
            let back = self.device.step(&mut self.service, cx);
            match (forth, back) {
                (Err(ending), _) | (_, Err(ending)) => return Poll::Ready(ending),
                (Ok(false), Ok(false)) => return Poll::Pending,
                (Ok(_), Ok(_)) => {}
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Tells both legs. A clean end first delivers everything that was sent before it.
    pub async fn finish(mut self, ending: Ending, limits: Limits) {
        let patience = Patience { pause: limits.close, whole: limits.stall.max(limits.close) };
        match ending.0 {
            Cause::Closed { role, code, text } => {
                let frame = CloseFrame { code, text: &text };
                let (closer, other) = self.split(role);
                put_close(&mut closer.output, frame);
                put_close(&mut other.output, frame);
                tokio::join!(closer.deliver(patience), other.deliver(patience));
            }
            Cause::Lost(role) => {
                let (lost, mut other) = self.into_split(role);
                drop(lost);
                other.put_reason(CloseReason::lost(role), None);
                other.deliver(HASTE).await;
            }
            Cause::Protocol(role, error) => {
                let (offender, other) = self.split(role);
                offender.put_reason(CloseReason::protocol(role), Some(error));
                other.put_reason(CloseReason::protocol(role), None);
                tokio::join!(offender.deliver(HASTE), other.deliver(HASTE));
            }
            Cause::Told(reason) => {
                self.service.put_reason(reason, None);
                self.device.put_reason(reason, None);
                tokio::join!(self.service.deliver(HASTE), self.device.deliver(HASTE));
            }
        }
    }

    fn split(&mut self, role: Role) -> (&mut Half<IO>, &mut Half<IO>) {
        match role {
            Role::Service => (&mut self.service, &mut self.device),
            Role::Device => (&mut self.device, &mut self.service),
        }
    }

    fn into_split(self, role: Role) -> (Half<IO>, Half<IO>) {
        match role {
            Role::Service => (self.service, self.device),
            Role::Device => (self.device, self.service),
        }
    }
}

impl<IO> std::fmt::Debug for Splice<IO> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Splice").finish_non_exhaustive()
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> Half<IO> {
    fn new(role: Role, io: IO, early: &[u8]) -> Self {
        Self {
            role,
            io,
            reader: FrameReader::new(Sender::Client),
            input: early.to_vec(),
            output: Vec::new(),
            written: 0,
            unflushed: false,
            payload: 0,
            seen: Seen::default(),
        }
    }

    /// Moves bytes from this leg to `to`, as far as one read goes. Says whether anything moved.
    fn step(&mut self, to: &mut Self, cx: &mut Context<'_>) -> Result<bool, Cause> {
        // Pongs that this leg is owed are written here too, when no data comes back to carry them along.
        for half in [&mut *to, &mut *self] {
            if let Poll::Ready(Err(_)) = half.poll_drain(cx) {
                return Err(Cause::Lost(half.role));
            }
        }
        if to.owes() || self.is_full() {
            self.seen.held_back = true;
            return Ok(false);
        }
        if !self.input.is_empty() {
            let mut input = std::mem::take(&mut self.input);
            let taken = self.translate(&mut input, to)?;
            input.drain(..taken);
            if !input.is_empty() {
                self.input = input;
            }
            if taken > 0 {
                return Ok(true);
            }
        }
        SCRATCH.with_borrow_mut(|scratch| {
            let mut buffer = ReadBuf::new(scratch);
            match Pin::new(&mut self.io).poll_read(cx, &mut buffer) {
                Poll::Pending => return Ok(false),
                Poll::Ready(Err(_)) => return Err(Cause::Lost(self.role)),
                Poll::Ready(Ok(())) => {}
            }
            let read = buffer.filled_mut();
            if read.is_empty() {
                return Err(Cause::Lost(self.role));
            }
            self.seen.heard = true;
            if self.input.is_empty() {
                let taken = self.translate(read, to)?;
                self.input.extend_from_slice(&read[taken..]);
            } else {
                self.input.extend_from_slice(read);
            }
            Ok(true)
        })
    }

    /// Turns this leg's frames into frames for `to`, and says how many bytes of `input` that took.
    fn translate(&mut self, input: &mut [u8], to: &mut Self) -> Result<usize, Cause> {
        let role = self.role;
        let mut at = 0;
        while to.output.len() < OUTPUT_MAX && !self.is_full() {
            let next = self.reader.next(&mut input[at..]).map_err(|error| Cause::Protocol(role, error))?;
            let Some((taken, event)) = next else { break };
            at += taken;
            match event {
                Event::Data { opcode, fin, payload } => {
                    self.payload += payload.len() as u64;
                    self.seen.payload = true;
                    put_frame(&mut to.output, opcode, fin, payload);
                    to.seen.sent = true;
                }
                Event::Ping(payload) => put_frame(&mut self.output, Opcode::Pong, true, payload),
                Event::Pong => self.seen.ponged = true,
                Event::Close(CloseFrame { code, text }) => {
                    return Err(Cause::Closed { role, code, text: text.to_owned() });
                }
            }
        }
        Ok(at)
    }

    /// Writes what this leg is owed. Ready once nothing is.
    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.written < self.output.len() {
            let written = ready!(Pin::new(&mut self.io).poll_write(cx, &self.output[self.written..]))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.written += written;
            self.seen.took = true;
            self.unflushed = true;
        }
        if self.written > 0 {
            (self.output, self.written) = (Vec::new(), 0);
        }
        if self.unflushed {
            // TLS keeps what the socket does not take at once.
            ready!(Pin::new(&mut self.io).poll_flush(cx))?;
            self.unflushed = false;
            self.seen.took = true;
        }
        Poll::Ready(Ok(()))
    }

    /// Delivers what this leg is owed, then ends the connection in good order, dropping what still comes in.
    async fn deliver(&mut self, patience: Patience) {
        let delivered = async {
            loop {
                self.seen.took = false;
                match timeout(patience.pause, poll_fn(|cx| self.poll_drain_discarding(cx))).await {
                    Ok(drained) => return drained.is_ok(),
                    Err(_) if self.seen.took => {}
                    Err(_) => return false,
                }
            }
        };
        if timeout(patience.whole, delivered).await == Ok(true) {
            // The peer may end at its leisure, but not for ever.
            let _ = timeout(FAREWELL, linger(&mut self.io)).await;
        }
    }

    fn poll_drain_discarding(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // A peer that is itself blocked in writing would never get to read.
        let discarded = SCRATCH.with_borrow_mut(|scratch| {
            for _ in 0..ROUNDS {
                let mut buffer = ReadBuf::new(scratch);
                match Pin::new(&mut self.io).poll_read(cx, &mut buffer) {
                    Poll::Ready(Ok(())) if buffer.filled().is_empty() => return Ok(()),
                    Poll::Ready(Ok(())) => {}
                    Poll::Ready(Err(error)) => return Err(error),
                    Poll::Pending => return Ok(()),
                }
            }
            cx.waker().wake_by_ref();
            Ok(())
        });
        if let Err(error) = discarded {
            return Poll::Ready(Err(error));
        }
        self.poll_drain(cx)
    }

    fn put_reason(&mut self, reason: CloseReason, error: Option<FrameError>) {
        let text = match error {
            None => reason.close_text(),
            Some(error) => format!("{reason}: {error}"),
        };
        put_close(&mut self.output, CloseFrame { code: Some(reason.close_code_for(self.role)), text: &text });
    }

    fn owes(&self) -> bool {
        self.written < self.output.len() || self.unflushed
    }

    fn is_full(&self) -> bool {
        self.output.len() - self.written >= OUTPUT_MAX
    }

    fn take_seen(&mut self, peer_owes: bool) -> Seen {
        let held_back = self.seen.held_back || peer_owes || self.is_full();
        let seen = Seen { owed: self.owes(), held_back, ..self.seen };
        self.seen = Seen::default();
        seen
    }
}
