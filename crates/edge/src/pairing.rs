//! Which legs are there, and who waits for whom.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use midspan_core::{
    close::CloseReason,
    id::{DeviceAddress, Role, StreamId, StreamName},
    session::{AttachError, Ready, Session, SessionState},
    ticket::Ticket,
    time::UnixTime,
};
use tokio::sync::{oneshot, watch};
use tokio_util::sync::CancellationToken;

use crate::leg::Leg;

/// The streams that this edge owns: those with a leg, and those that ended while their tickets are still good.
#[derive(Debug, Default)]
pub struct Pairing {
    entry_by_stream: Mutex<HashMap<StreamId, Entry>>,
}

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
    pub credential: String,
    /// When that credential ends.
    pub credential_expires: UnixTime,
    /// When the first leg came.
    pub first_leg: Instant,
}

#[derive(Debug)]
struct Entry {
    session: Session,
    /// Absent for a stream that ended before any leg came.
    facts: Option<Arc<StreamFacts>>,
    waiting: Option<oneshot::Sender<Leg>>,
    end: watch::Sender<Option<CloseReason>>,
    told: CancellationToken,
    forget_at: Instant,
}

/// A leg's place in a stream. Frees it when dropped.
#[derive(Debug)]
pub struct Place {
    /// The stream.
    pub facts: Arc<StreamFacts>,
    /// The leg's role.
    pub role: Role,
    pairing: Arc<Pairing>,
    end: watch::Receiver<Option<CloseReason>>,
    told: CancellationToken,
    left: bool,
}

/// What a leg whose WebSocket is open does next.
#[derive(Debug)]
pub enum Next {
    /// Wait for the other leg to be handed over.
    Wait(Leg, oneshot::Receiver<Leg>),
    /// Nothing: it was handed over to the other leg, which had waited.
    HandedOver,
    /// Close: the stream is over.
    Ended(Leg, CloseReason),
}

/// What it took to end a stream.
#[derive(Debug)]
pub enum End {
    /// It was joined: its splice ends it, and reports. The token is cancelled once its legs have been told.
    BySplice(CancellationToken),
    /// It was half open: the caller reports. The token, if there is one, is cancelled once the waiting leg has been told.
    Here(Arc<StreamFacts>, Option<CancellationToken>),
    /// No leg had come. Legs that come later are refused.
    Unseen,
    /// It had ended before.
    Already,
}

impl Pairing {
    /// A leg came with a good ticket. `forget_at` is when that ticket is past use; `None` means there is no room.
    pub fn attach(
        self: &Arc<Self>,
        ticket: &Ticket,
        now: Instant,
        deadline: Instant,
        forget_at: Instant,
        most: usize,
    ) -> Option<Result<Place, AttachError>> {
        let mut entries = self.entries();
        if entries.len() >= most && !entries.contains_key(&ticket.stream) {
            return None;
        }
        let entry = entries.entry(ticket.stream).or_insert_with(|| Entry::new(deadline, forget_at));
        let facts = Arc::clone(entry.facts.get_or_insert_with(|| {
            Arc::new(StreamFacts {
                stream: ticket.stream,
                address: ticket.address.clone(),
                name: ticket.name.clone(),
                credential: ticket.credential.clone(),
                credential_expires: ticket.credential_expires,
                first_leg: now,
            })
        }));
        Some(entry.session.attach(ticket.role, now).map(|()| Place {
            facts,
            role: ticket.role,
            pairing: Arc::clone(self),
            end: entry.end.subscribe(),
            told: entry.told.clone(),
            left: false,
        }))
    }

    /// Ends a stream, whether it is known here or not.
    pub fn end(&self, stream: StreamId, reason: CloseReason, deadline: Instant) -> End {
        let mut entries = self.entries();
        let entry = entries.entry(stream).or_insert_with(|| Entry::new(deadline, deadline));
        let joined = entry.session.state() == SessionState::Joined;
        let (_, new) = entry.session.end(reason);
        if !new {
            return End::Already;
        }
        entry.end.send_replace(Some(reason));
        match &entry.facts {
            _ if joined => End::BySplice(entry.told.clone()),
            Some(facts) => End::Here(Arc::clone(facts), entry.waiting.as_ref().map(|_| entry.told.clone())),
            None => End::Unseen,
        }
    }

    /// Lets time pass: gives the streams whose handshake is over its time, and forgets those that nobody can ask for.
    pub fn sweep(&self, now: Instant) -> Vec<(Arc<StreamFacts>, CloseReason)> {
        let mut late = Vec::new();
        self.entries().retain(|_, entry| {
            if let Some(reason) = entry.session.tick(now) {
                entry.end.send_replace(Some(reason));
                late.extend(entry.facts.clone().map(|facts| (facts, reason)));
            }
            !matches!(entry.session.state(), SessionState::Ended(_)) || now < entry.forget_at
        });
        late
    }

    /// The streams that are not over.
    pub fn live(&self) -> Vec<Arc<StreamFacts>> {
        let live = |entry: &Entry| match entry.session.state() {
            SessionState::Ended(_) => None,
            SessionState::Waiting | SessionState::OneLeg | SessionState::Joined => entry.facts.clone(),
        };
        self.entries().values().filter_map(live).collect()
    }

    /// How many streams are half open, and how many joined.
    pub fn counts(&self) -> (usize, usize) {
        self.entries().values().fold((0, 0), |(half_open, joined), entry| match entry.session.state() {
            SessionState::Waiting | SessionState::OneLeg => (half_open + 1, joined),
            SessionState::Joined => (half_open, joined + 1),
            SessionState::Ended(_) => (half_open, joined),
        })
    }

    fn entries(&self) -> MutexGuard<'_, HashMap<StreamId, Entry>> {
        self.entry_by_stream.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Entry {
    fn new(deadline: Instant, forget_at: Instant) -> Self {
        Self {
            session: Session::new(deadline),
            facts: None,
            waiting: None,
            end: watch::channel(None).0,
            told: CancellationToken::new(),
            forget_at,
        }
    }
}

impl Place {
    /// The leg's WebSocket is open.
    pub fn ready(&self, leg: Leg, now: Instant) -> Next {
        let mut entries = self.pairing.entries();
        let Some(entry) = entries.get_mut(&self.facts.stream) else {
            return Next::Ended(leg, CloseReason::RelayFailed);
        };
        match entry.session.ready(self.role, now) {
            Ready::Ended(reason) => Next::Ended(leg, reason),
            Ready::Waits => {
                let (sender, receiver) = oneshot::channel();
                entry.waiting = Some(sender);
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
                    Err(leg) => Next::Ended(leg, entry.session.end(CloseReason::RelayFailed).0),
                }
            }
        }
    }

    /// The waiting leg went away. True when its place is free again; false when the other leg has been handed over.
    pub fn leave(&mut self) -> bool {
        self.left = true;
        let mut entries = self.pairing.entries();
        let Some(entry) = entries.get_mut(&self.facts.stream) else { return true };
        if entry.session.state() == SessionState::Joined {
            return false;
        }
        entry.session.detach(self.role);
        entry.waiting = None;
        true
    }

    /// The splice is over for `reason`. Gives the reason that holds: an end from outside may have come first.
    pub fn conclude(&self, reason: CloseReason) -> CloseReason {
        let mut entries = self.pairing.entries();
        entries.get_mut(&self.facts.stream).map_or(reason, |entry| entry.session.end(reason).0)
    }

    /// The legs have been told of the end.
    pub fn told(&self) {
        self.told.cancel();
    }

    /// Waits until somebody ends the stream from outside.
    pub async fn ended(&mut self) -> CloseReason {
        match self.end.wait_for(Option::is_some).await.map(|reason| *reason) {
            Ok(Some(reason)) => reason,
            // The entry is gone, so the stream is over; `ready` and `conclude` know why.
            _ => std::future::pending().await,
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if self.left {
            return;
        }
        let mut entries = self.pairing.entries();
        if let Some(entry) = entries.get_mut(&self.facts.stream)
            && entry.session.state() != SessionState::Joined
        {
            entry.session.detach(self.role);
        }
    }
}
