//! Moves the bytes of a joined stream, both ways, in one task, until one side ends.
//!
//! Frames are cut through: a read's frames are turned into frames for the other leg in the thread's own buffer, and
//! leave in one write. A stream has a buffer only while a leg takes nothing or a frame is not whole, and all streams of
//! a process share the memory for that; a leg that takes nothing stops the reads from its peer.

mod gathering;
mod half;
mod shared;
mod turns;

use std::{
    future::{Future, poll_fn},
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll},
    time::Instant,
};

use bytes::Bytes;
use midspan_core::{
    close::CloseReason,
    frame::{CloseFrame, FrameError},
    id::Role,
};
use midspan_platform::clock;
use tokio::time::{Sleep, sleep_until};

pub(crate) use self::shared::Kept;
pub use self::{half::Pipe, shared::Shared};
use self::{
    half::{HASTE, Half, Patience},
    turns::{LITTLE, Place, SLICE, stand_aside},
};
pub use crate::vitals::Limits;
use crate::vitals::Vitals;

/// Two joined legs.
pub struct Splice<IO> {
    service: Half<IO>,
    device: Half<IO>,
    kept: Kept,
    vitals: Vitals,
    /// Where the stream stands among those that have much to move, if it has.
    place: Option<Box<Place>>,
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

impl<IO: Pipe> Splice<IO> {
    /// Joins two legs. `early` is what was read of each already: the service's, then the device's. The stream ends at
    /// `expiry`, if there is one.
    pub fn new(
        service: IO,
        device: IO,
        early: [Bytes; 2],
        shared: Shared,
        limits: Arc<Limits>,
        expiry: Option<Instant>,
    ) -> Self {
        let [early_service, early_device] = early;
        Self {
            service: Half::new(Role::Service, service, &early_service),
            device: Half::new(Role::Device, device, &early_device),
            kept: Kept::new(shared),
            vitals: Vitals::new(limits, expiry, clock::now()),
            place: None,
        }
    }

    /// Bytes of payload that were passed on: to the device, to the service.
    pub fn payload(&self) -> (u64, u64) {
        (self.service.payload, self.device.payload)
    }

    /// Moves bytes until one of the legs ends, a limit is reached, or `end` says so.
    ///
    /// There is one of this future for each stream; so it holds references, and no copies.
    pub async fn run(&mut self, mut end: Pin<&mut impl Future<Output = CloseReason>>) -> Ending {
        let mut tick = pin!(sleep_until(self.vitals.next_tick(clock::now()).into()));
        let cause = poll_fn(|cx| self.poll_flow(cx, tick.as_mut(), end.as_mut())).await;
        self.place = None;
        self.count();
        Ending(cause)
    }

    fn poll_flow(
        &mut self,
        cx: &mut Context<'_>,
        mut tick: Pin<&mut Sleep>,
        end: Pin<&mut impl Future<Output = CloseReason>>,
    ) -> Poll<Cause> {
        if let Poll::Ready(reason) = end.poll(cx) {
            return Poll::Ready(Cause::Told(reason));
        }
        while tick.as_mut().poll(cx).is_ready() {
            let now = clock::now();
            if let Some(reason) = self.tick(now) {
                return Poll::Ready(Cause::Told(reason));
            }
            tick.as_mut().reset(self.vitals.next_tick(now).into());
        }
        self.poll_pump(cx)
    }

    /// Lets time pass, and says why the stream is over, if it is.
    fn tick(&mut self, now: Instant) -> Option<CloseReason> {
        let (service_owes, device_owes) = (self.service.owes(), self.device.owes());
        let seen = [self.service.take_seen(device_owes), self.device.take_seen(service_owes)];
        let verdict = self.vitals.tick(now, seen);
        for (half, ping) in [&mut self.service, &mut self.device].into_iter().zip(verdict.ping) {
            half.tick();
            if ping {
                half.put_ping();
            }
        }
        self.count();
        verdict.end
    }

    /// Moves bytes both ways until nothing more can be moved now, or others are to go on.
    fn poll_pump(&mut self, cx: &mut Context<'_>) -> Poll<Cause> {
        let waits = self.place.as_mut().is_some_and(|place| place.poll(clock::now(), cx).is_pending());
        let held = [&mut self.service, &mut self.device].map(|half| waits && half.hold_back());
        if held == [true; 2]
            && let Err(cause) = self.service.drain_both(&mut self.device, self.kept.shared(), cx)
        {
            return Poll::Ready(cause);
        }
        let (mut moved, mut silent, mut dry) = ([0; 2], [false; 2], [false; 2]);
        let (pumped, goes_on) = loop {
            let shared = self.kept.shared();
            // A leg from which nothing came a moment ago will wake us; one that was not looked at, because something waits
            // to be written, will not.
            let owes = self.service.owes() || self.device.owes();
            let skipped = [0, 1].map(|from| held[from] || silent[from] && !owes);
            let forth = if skipped[0] { Ok(0) } else { self.service.step(&mut self.device, shared, cx) };
            let back = if skipped[1] { Ok(0) } else { self.device.step(&mut self.service, shared, cx) };
            let steps = match (forth, back) {
                (Err(cause), _) | (_, Err(cause)) => break (Poll::Ready(cause), false),
                (Ok(forth), Ok(back)) => [forth, back],
            };
            dry = [0, 1].map(|from| dry[from] || steps[from] == 0);
            if steps == [0; 2] {
                break (Poll::Pending, false);
            }
            moved = [0, 1].map(|from| moved[from] + steps[from]);
            let in_turn = || self.place.as_ref().is_some_and(|place| place.may_go_on(clock::now()));
            if moved[0] + moved[1] >= SLICE && !in_turn() {
                break (Poll::Pending, true);
            }
            silent = steps.map(|step| step == 0 && !owes);
        };
        let [from_service, from_device] =
            [0, 1].map(|from| held[from] || !dry[from] && moved[from] >= LITTLE);
        self.service.end_slice(from_service);
        self.device.end_slice(from_device);
        if self.service.has_much() || self.device.has_much() {
            self.place.get_or_insert_with(|| Box::new(Place::new())).stand_aside(clock::now());
        } else {
            self.place = None;
        }
        if goes_on {
            stand_aside(cx);
        }
        self.keep_account();
        pumped
    }

    fn keep_account(&mut self) {
        self.kept.set(self.service.kept() + self.device.kept());
    }

    fn count(&mut self) {
        let shared = self.kept.shared();
        self.service.count(shared);
        self.device.count(shared);
    }

    /// Tells both legs. A clean end first delivers everything that was sent before it.
    pub async fn finish(self, ending: Ending) {
        let Self { mut service, mut device, kept, vitals, .. } = self;
        let limits = vitals.limits();
        let patience = Patience { pause: limits.close, whole: limits.stall.max(limits.close) };
        let shared = &kept.shared().clone();
        // From now on, each leg keeps an account of its own.
        drop(kept);
        match ending.0 {
            Cause::Closed { code, text, .. } => {
                let frame = CloseFrame { code, text: &text };
                service.put_close(frame);
                device.put_close(frame);
                tokio::join!(service.deliver(patience, shared), device.deliver(patience, shared));
            }
            Cause::Lost(role) => {
                let (lost, mut other) = match role {
                    Role::Service => (service, device),
                    Role::Device => (device, service),
                };
                drop(lost);
                other.put_reason(CloseReason::lost(role), None);
                other.deliver(HASTE, shared).await;
            }
            Cause::Protocol(role, error) => {
                for half in [&mut service, &mut device] {
                    half.put_reason(CloseReason::protocol(role), (half.role == role).then_some(error));
                }
                tokio::join!(service.deliver(HASTE, shared), device.deliver(HASTE, shared));
            }
            Cause::Told(reason) => {
                service.put_reason(reason, None);
                device.put_reason(reason, None);
                tokio::join!(service.deliver(HASTE, shared), device.deliver(HASTE, shared));
            }
        }
    }
}

impl<IO> std::fmt::Debug for Splice<IO> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Splice").finish_non_exhaustive()
    }
}
