//! Which legs are there, and who waits for whom.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::{Duration, Instant},
};

use midspan_core::{
    admission::LEEWAY,
    close::CloseReason,
    id::{DeviceAddress, Role, StreamId, StreamName},
    problem::{Problem, ProblemKind},
    session::{AttachError, Ready, Session, SessionState},
    ticket::Ticket,
    time::UnixTime,
    trace::TraceParent,
};
use tokio::sync::oneshot;

use crate::{
    leg::Leg,
    milestones::{Milestone, Milestones},
    passing::Passers,
};

/// The streams that this edge owns: those with a leg, and those that ended while their tickets are still good.
///
/// What is known of a leg's connection, `L`, is handed from one leg to the other and not looked at.
#[derive(Debug)]
pub struct Pairing<L = Leg> {
    /// What the milliseconds of its sessions are counted from.
    start: Instant,
    streams: Mutex<Streams<L>>,
}

#[derive(Debug)]
struct Streams<L> {
    /// A tree: a table is up to half empty, and keeps everybody waiting while it grows.
    entry_by_stream: BTreeMap<StreamId, Entry<L>>,
    /// How many of them are not over.
    live: usize,
    /// Streams whose handshake was found to be over its time, and whose end is not reported yet.
    late: Vec<(Arc<StreamFacts>, CloseReason)>,
}

/// The most ended streams that are remembered, so that a leg which comes too late hears why. Beyond it, a leg of a stream
/// that ended before any leg came waits until its ticket's time is over.
const REMEMBERED_MAX: usize = 100_000;

/// What the edge knows of a stream, out of its ticket.
#[derive(Debug)]
pub struct StreamFacts {
    /// The stream.
    pub stream: StreamId,
    /// The device or module.
    pub address: DeviceAddress,
    /// What it is for.
    pub name: StreamName,
    /// The service credential.
    pub credential: Box<str>,
    /// When that credential ends.
    pub credential_expires: UnixTime,
    /// What its traces are found by.
    pub trace: TraceParent,
    /// When the first leg came.
    pub first_leg: UnixTime,
    /// How far it has come.
    pub milestones: Milestones,
    /// The edges that pass its legs on below TLS, if any do.
    pub(crate) passers: Passers,
}

/// There is one for each stream, so it is small.
#[derive(Debug)]
struct Entry<L> {
    session: Session,
    /// Absent for a stream that ended before any leg came.
    facts: Option<Arc<StreamFacts>>,
    /// A leg that waits for the other one. Apart, because most streams have both.
    waiting: Option<Box<oneshot::Sender<L>>>,
}

/// A leg's place in a stream. Frees it when dropped.
#[derive(Debug)]
pub struct Place<L = Leg> {
    /// The stream.
    pub facts: Arc<StreamFacts>,
    /// The leg's role.
    pub role: Role,
    pairing: Arc<Pairing<L>>,
    left: bool,
}

/// What a leg whose WebSocket is open does next.
#[derive(Debug)]
pub enum Next<L = Leg> {
    /// Wait for the other leg to be handed over.
    Wait(L, oneshot::Receiver<L>),
    /// Nothing: it was handed over to the other leg, which had waited.
    HandedOver,
    /// Close: the stream is over.
    Ended(L, CloseReason),
}

/// What it took to end a stream.
#[derive(Debug)]
pub enum End {
    /// It was joined: its splice ends it, tells both legs, and reports.
    BySplice(Arc<StreamFacts>),
    /// It was half open: the caller reports.
    Here {
        /// The stream.
        facts: Arc<StreamFacts>,
        /// Whether there is a leg that will be told.
        waiting: bool,
    },
    /// No leg had come. Legs that come later are refused.
    Unseen,
    /// It had ended before, and that is or will be reported, if a leg had ever come.
    Already(Option<Arc<StreamFacts>>),
}

impl<L> Pairing<L> {
    /// Without streams. No moment that it is given later may be before `now`.
    pub fn new(now: Instant) -> Self {
        let streams = Streams { entry_by_stream: BTreeMap::new(), live: 0, late: Vec::new() };
        Self { start: now, streams: Mutex::new(streams) }
    }

    /// Takes a leg with a good ticket, at the moment `now`, when it is `unix` by the clock on the wall. An edge has `most`
    /// streams, half-open ones included.
    pub fn take(
        self: &Arc<Self>,
        ticket: &Ticket,
        now: Instant,
        unix: UnixTime,
        most: usize,
    ) -> Result<Place<L>, Problem> {
        let deadline = now + ticket.expires.since(unix);
        match self.attach(ticket, now, unix, deadline, most) {
            Some(Ok(place)) => Ok(place),
            Some(Err(AttachError::Taken)) => {
                let detail = format!("the {} leg of this stream is attached already", ticket.role);
                Err(Problem::new(ProblemKind::LegTaken, detail))
            }
            Some(Err(AttachError::Ended(reason))) => Err(Problem::from_close(reason)),
            None => {
                Err(Problem::new(ProblemKind::Unavailable, "this edge has as many streams as it can take"))
            }
        }
    }

    /// Gives a leg its place, in a stream that must be joined before `deadline`; `None` means there is no room.
    fn attach(
        self: &Arc<Self>,
        ticket: &Ticket,
        now: Instant,
        unix: UnixTime,
        deadline: Instant,
        most: usize,
    ) -> Option<Result<Place<L>, AttachError>> {
        let mut streams = self.streams();
        if streams.live >= most && !streams.entry_by_stream.contains_key(&ticket.stream) {
            return None;
        }
        let entry = streams.entry(ticket.stream, self.moment(now), || Entry::new(self.moment(deadline)));
        let facts = Arc::clone(entry.facts.get_or_insert_with(|| {
            Arc::new(StreamFacts {
                stream: ticket.stream,
                address: ticket.address.clone(),
                name: ticket.name.clone(),
                credential: ticket.credential.as_str().into(),
                credential_expires: ticket.credential_expires,
                trace: ticket.trace,
                first_leg: unix,
                milestones: Milestones::default(),
                passers: Passers::default(),
            })
        }));
        Some(entry.session.attach(ticket.role).map(|()| Place {
            facts,
            role: ticket.role,
            pairing: Arc::clone(self),
            left: false,
        }))
    }

    /// Ends a stream, whether it is known here or not. One that is not is remembered while its tickets may be good, which is
    /// until `expiry`.
    pub fn end(&self, stream: StreamId, reason: CloseReason, now: Instant, expiry: Instant) -> End {
        let mut streams = self.streams();
        let ended = streams.entry_by_stream.len() - streams.live;
        if ended >= REMEMBERED_MAX && !streams.entry_by_stream.contains_key(&stream) {
            return End::Unseen;
        }
        let entry = streams.entry(stream, self.moment(now), || Entry::new(self.moment(expiry)));
        let joined = entry.session.state() == SessionState::Joined;
        let (_, new) = entry.session.end(reason);
        let facts = entry.facts.clone();
        if !new {
            return End::Already(facts);
        }
        let waiting = entry.waiting.is_some();
        streams.live -= 1;
        let Some(facts) = facts else { return End::Unseen };
        facts.milestones.reach(Milestone::Ended);
        if joined { End::BySplice(facts) } else { End::Here { facts, waiting } }
    }

    /// Lets time pass: gives the streams whose handshake is over its time, and forgets those that nobody can ask for.
    pub fn sweep(&self, now: Instant) -> Vec<(Arc<StreamFacts>, CloseReason)> {
        let now = self.moment(now);
        let mut streams = self.streams();
        let Streams { entry_by_stream, live, late } = &mut *streams;
        entry_by_stream.retain(|_, entry| {
            entry.expire(now, live, late);
            !entry.is_over() || now < entry.forget_at()
        });
        std::mem::take(late)
    }

    /// The streams that are not over.
    pub fn live(&self) -> Vec<Arc<StreamFacts>> {
        let streams = self.streams();
        let live = streams.entry_by_stream.values().filter(|entry| !entry.is_over());
        live.filter_map(|entry| entry.facts.clone()).collect()
    }

    /// The streams that are joined.
    pub fn joined(&self) -> Vec<Arc<StreamFacts>> {
        let streams = self.streams();
        let joined =
            streams.entry_by_stream.values().filter(|entry| entry.session.state() == SessionState::Joined);
        joined.filter_map(|entry| entry.facts.clone()).collect()
    }

    /// How many streams are half open, and how many joined.
    pub fn counts(&self) -> (usize, usize) {
        let streams = self.streams();
        let is_joined = |entry: &&Entry<L>| entry.session.state() == SessionState::Joined;
        let joined = streams.entry_by_stream.values().filter(is_joined).count();
        (streams.live - joined, joined)
    }

    fn moment(&self, at: Instant) -> u64 {
        milliseconds(at.saturating_duration_since(self.start))
    }

    fn streams(&self) -> MutexGuard<'_, Streams<L>> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<L> Streams<L> {
    /// The entry of a stream, made if there is none, with the time of `now`.
    fn entry(&mut self, stream: StreamId, now: u64, new: impl FnOnce() -> Entry<L>) -> &mut Entry<L> {
        let Self { entry_by_stream, live, late } = self;
        let entry = entry_by_stream.entry(stream).or_insert_with(|| {
            *live += 1;
            new()
        });
        entry.expire(now, live, late);
        entry
    }
}

impl<L> Entry<L> {
    fn new(deadline: u64) -> Self {
        Self { session: Session::new(deadline), facts: None, waiting: None }
    }

    /// When nobody can have a good ticket for it any more.
    fn forget_at(&self) -> u64 {
        self.session.deadline().saturating_add(milliseconds(LEEWAY))
    }

    /// Ends the handshake if it is over its time: waiting legs are told, and the end is put aside to be reported.
    fn expire(&mut self, now: u64, live: &mut usize, late: &mut Vec<(Arc<StreamFacts>, CloseReason)>) {
        if let Some(reason) = self.session.tick(now) {
            if let Some(facts) = self.facts.clone() {
                facts.milestones.reach(Milestone::Ended);
                late.push((facts, reason));
            }
            *live -= 1;
        }
    }

    fn is_over(&self) -> bool {
        matches!(self.session.state(), SessionState::Ended(_))
    }
}

impl<L> Place<L> {
    /// The leg's WebSocket is open.
    pub fn ready(&self, leg: L, now: Instant) -> Next<L> {
        let now = self.pairing.moment(now);
        let mut streams = self.pairing.streams();
        let Streams { entry_by_stream, live, late } = &mut *streams;
        let Some(entry) = entry_by_stream.get_mut(&self.facts.stream) else {
            return Next::Ended(leg, CloseReason::RelayFailed);
        };
        entry.expire(now, live, late);
        match entry.session.ready(self.role) {
            Ready::Ended(reason) => Next::Ended(leg, reason),
            Ready::Waits => {
                let (sender, receiver) = oneshot::channel();
                entry.waiting = Some(Box::new(sender));
                Next::Wait(leg, receiver)
            }
            Ready::Joined => {
                // A ready leg waits, and gives up its place before it stops to: there is somebody to take this one.
                let refused = match entry.waiting.take() {
                    Some(waiting) => waiting.send(leg),
                    None => Err(leg),
                };
                match refused {
                    Ok(()) => Next::HandedOver,
                    Err(leg) => {
                        let (reason, new) = entry.session.end(CloseReason::RelayFailed);
                        if new {
                            *live -= 1;
                            late.push((Arc::clone(&self.facts), reason));
                        }
                        Next::Ended(leg, reason)
                    }
                }
            }
        }
    }

    /// The waiting leg went away. True when its place is free again; false when the other leg has been handed over.
    pub fn leave(&mut self) -> bool {
        self.left = true;
        let mut streams = self.pairing.streams();
        let Some(entry) = streams.entry_by_stream.get_mut(&self.facts.stream) else { return true };
        if entry.session.state() == SessionState::Joined {
            return false;
        }
        entry.session.detach(self.role);
        entry.waiting = None;
        true
    }

    /// The splice is over for `reason`. Gives the reason that holds: an end from outside may have come first.
    pub fn conclude(&self, reason: CloseReason) -> CloseReason {
        let mut streams = self.pairing.streams();
        let Some(entry) = streams.entry_by_stream.get_mut(&self.facts.stream) else { return reason };
        let (reason, new) = entry.session.end(reason);
        if new {
            streams.live -= 1;
        }
        reason
    }

    /// The legs have been told of the end.
    pub fn told(&self) {
        self.facts.milestones.reach(Milestone::Told);
    }

    /// Waits until somebody ends the stream from outside.
    pub async fn ended(&self) -> CloseReason {
        self.facts.milestones.wait_for(Milestone::Ended).await;
        self.reason()
    }

    /// The same for the splice, of which there is one.
    pub fn poll_ended(&self, cx: &Context<'_>) -> Poll<CloseReason> {
        self.facts.milestones.poll_ended(cx).map(|()| self.reason())
    }

    fn reason(&self) -> CloseReason {
        let streams = self.pairing.streams();
        match streams.entry_by_stream.get(&self.facts.stream).map(|entry| entry.session.state()) {
            Some(SessionState::Ended(reason)) => reason,
            // Only what has ended is ended from outside, and it is remembered for longer than this takes.
            _ => CloseReason::RelayFailed,
        }
    }
}

impl<L> Drop for Place<L> {
    fn drop(&mut self) {
        if self.left {
            return;
        }
        let mut streams = self.pairing.streams();
        if let Some(entry) = streams.entry_by_stream.get_mut(&self.facts.stream)
            && matches!(entry.session.state(), SessionState::Waiting | SessionState::OneLeg)
        {
            entry.session.detach(self.role);
        }
    }
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use midspan_core::{id::Incarnation, ticket::Owner, trace::TraceParent};
    use midspan_platform::{
        clock,
        listener::Connection,
        metrics::{Counted, Metrics},
    };

    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    #[test]
    fn ended_streams_take_no_room() {
        let now = clock::now();
        let pairing = Arc::new(Pairing::new(now));
        for n in 0..100 {
            let end = pairing.end(StreamId::from_random(n), CloseReason::DeviceOffline, now, now + HOUR);
            assert!(matches!(end, End::Unseen));
        }
        let place = attach(&pairing, 1000, Role::Service, now, 1).unwrap().unwrap();
        assert_eq!(pairing.counts(), (1, 0));
        assert!(attach(&pairing, 1001, Role::Service, now, 1).is_none(), "there is room for one");
        pairing.end(place.facts.stream, CloseReason::Deleted, now, now + HOUR);
        assert_eq!(pairing.counts(), (0, 0));
        assert!(attach(&pairing, 1001, Role::Service, now, 1).is_some());
        // What ended before its leg came is remembered all the same.
        let late = attach(&pairing, 1, Role::Device, now, 10).unwrap();
        assert_eq!(late.unwrap_err(), AttachError::Ended(CloseReason::DeviceOffline));
    }

    #[tokio::test]
    async fn a_leg_that_comes_behind_the_deadline_does_not_hide_that_the_other_one_waited_in_vain() {
        let now = clock::now();
        let pairing = Arc::new(Pairing::new(now));
        let waiting = attach(&pairing, 1, Role::Service, now, 10).unwrap().unwrap();
        assert!(matches!(waiting.ready(leg(Role::Service), now), Next::Wait(..)));
        let late = attach(&pairing, 1, Role::Device, now + HOUR, 10).unwrap();
        assert_eq!(late.unwrap_err(), AttachError::Ended(CloseReason::DeviceLegMissing));
        // The one that waited hears of it, and the end is reported once.
        assert_eq!(waiting.ended().await, CloseReason::DeviceLegMissing);
        let reports = pairing.sweep(now + HOUR);
        assert_eq!(
            reports.iter().map(|(_, reason)| *reason).collect::<Vec<_>>(),
            [CloseReason::DeviceLegMissing]
        );
        assert!(pairing.sweep(now + HOUR).is_empty());
        assert_eq!(pairing.counts(), (0, 0));
    }

    #[tokio::test]
    async fn the_second_leg_is_handed_to_the_first_and_the_first_end_stands() {
        let now = clock::now();
        let pairing = Arc::new(Pairing::new(now));
        let first = attach(&pairing, 1, Role::Device, now, 10).unwrap().unwrap();
        let Next::Wait(_, other) = first.ready(leg(Role::Device), now) else { panic!("it does not wait") };
        let second = attach(&pairing, 1, Role::Service, now, 10).unwrap().unwrap();
        assert!(matches!(second.ready(leg(Role::Service), now), Next::HandedOver));
        drop(second);
        assert_eq!(other.await.unwrap().role, Role::Service);
        assert_eq!(pairing.counts(), (0, 1));
        assert!(matches!(pairing.end(first.facts.stream, CloseReason::Deleted, now, now), End::BySplice(_)));
        assert!(matches!(
            pairing.end(first.facts.stream, CloseReason::Idle, now, now),
            End::Already(Some(_))
        ));
        assert_eq!(first.conclude(CloseReason::DeviceLost), CloseReason::Deleted);
        assert_eq!(pairing.counts(), (0, 0));
    }

    #[tokio::test]
    async fn a_place_that_was_left_is_not_freed_again() {
        let now = clock::now();
        let pairing = Arc::new(Pairing::new(now));
        let mut broken = attach(&pairing, 1, Role::Device, now, 10).unwrap().unwrap();
        assert!(broken.leave());
        let again = attach(&pairing, 1, Role::Device, now, 10).unwrap().unwrap();
        drop(broken);
        assert_eq!(attach(&pairing, 1, Role::Device, now, 10).unwrap().unwrap_err(), AttachError::Taken);
        drop(again);
        assert!(attach(&pairing, 1, Role::Device, now, 10).unwrap().is_ok());
    }

    fn attach(
        pairing: &Arc<Pairing>,
        stream: u128,
        role: Role,
        now: Instant,
        most: usize,
    ) -> Option<Result<Place, AttachError>> {
        let ticket = Ticket {
            stream: StreamId::from_random(stream),
            role,
            owner: Owner {
                name: "edge-0".to_owned(),
                incarnation: Incarnation::from_random(1),
                address: String::new(),
            },
            address: "dev1".parse().unwrap(),
            name: "ssh".parse().unwrap(),
            credential: "support".to_owned(),
            credential_expires: UnixTime(1),
            expires: UnixTime(1),
            trace: TraceParent::new(1, 1),
        };
        pairing.attach(&ticket, now, UnixTime(1), now + HOUR, most)
    }

    fn leg(role: Role) -> Leg {
        let gauge = Metrics::new().gauge("midspan_edge_legs", "Open legs.");
        let (io, _) = tokio::io::duplex(1);
        let home = tokio::runtime::Handle::current().id();
        let io = Connection::memory(io);
        Leg { io, early: bytes::Bytes::new(), role, counted: Counted::new(&gauge), home }
    }
}
