//! Where a device's link is, and what to do next to have the device asked: a value that does no I/O.

use std::time::{Duration, Instant};

use midspan_core::{
    capability::Capabilities,
    close::CloseReason,
    id::DeviceAddress,
    internal::Outcome,
    problem::{Problem, ProblemKind},
    ticket::Owner,
};
use midspan_platform::{
    internal::CallError,
    rendezvous::{LinkRecord, ServerRole},
};

use crate::{
    device::Held,
    view::{Presence, View},
};

/// How often a link is looked for that nobody has told of: the store may have forgotten who waits.
const LOOK_AGAIN: Duration = Duration::from_secs(2);

/// How long a device has to turn up elsewhere when the replica that was asked does not answer.
const LOST_LIMIT: Duration = Duration::from_secs(5);

/// The search for one device's link, until the device has answered.
#[derive(Debug)]
pub struct Search {
    replica: Owner,
    address: DeviceAddress,
    times: Times,
    /// Until when the device must be found, and then, until when it must have answered.
    deadline: Instant,
    asked: bool,
    /// What the store said last.
    found: Option<LinkRecord>,
    /// Links up to this generation are gone, whatever the store says.
    passed: u64,
    /// The replica that may or may not have been asked, and until when that may clear up.
    lost: Option<(Owner, Instant)>,
    /// Whether nothing was learned since the store was asked.
    looked: bool,
    /// Whether the processes have been looked up because the device was about to be said to be absent.
    looked_around: bool,
}

/// The times of one handshake.
#[derive(Debug, Clone, Copy)]
pub struct Times {
    /// Until when the device may connect.
    pub connect: Instant,
    /// How long it may think.
    pub response: Duration,
    /// Until when it must have answered in any case.
    pub last: Instant,
}

/// What to do next.
#[derive(Debug)]
pub enum Step {
    /// Look up which processes are there.
    LookAround,
    /// Ask the store for the link, register to be told of one for this time, and tell [`Search::found`].
    Find(Duration),
    /// Wait for news of the device, so long at the most, and tell [`Search::waited`].
    Wait(Duration),
    /// Ask the device over its link here, give it this time, and tell [`Search::heard`].
    AskHere(Duration),
    /// Ask the device over its link elsewhere, give it this time, and tell [`Search::heard`]. An older link here is replaced.
    AskThere(LinkRecord, Duration),
    /// Give up.
    GiveUp(Box<Problem>),
}

/// Where a device's link is.
enum Place {
    Here,
    There(LinkRecord),
    Nowhere,
}

impl Search {
    /// The search that `replica` begins, when the store has given `link`.
    pub fn new(replica: Owner, address: DeviceAddress, link: Option<LinkRecord>, times: Times) -> Self {
        Self {
            replica,
            address,
            times,
            deadline: times.connect,
            asked: false,
            found: link,
            passed: 0,
            lost: None,
            looked: false,
            looked_around: false,
        }
    }

    /// Whether the device may have been asked.
    pub fn has_asked(&self) -> bool {
        self.asked
    }

    /// What to do next. `here` is the device's link at this replica, and whether the store has given its generation.
    pub fn next(&mut self, here: Option<(Held, bool)>, view: &View, now: Instant) -> Step {
        let looked_around = std::mem::take(&mut self.looked_around);
        let link = match self.place(here, view, now) {
            Place::Here => None,
            Place::There(link) => Some(link),
            Place::Nowhere => {
                let until = self.lost.as_ref().map_or(self.deadline, |(_, until)| self.deadline.min(*until));
                let left = until.saturating_duration_since(now);
                return match left.is_zero() {
                    true if looked_around => Step::GiveUp(Box::new(self.not_found(view, now))),
                    // Who seems to be gone may only have come since the last look.
                    true => {
                        self.looked_around = true;
                        Step::LookAround
                    }
                    false if self.looked => Step::Wait(left.min(LOOK_AGAIN)),
                    false => Step::Find(left),
                };
            }
        };
        if !self.asked {
            self.asked = true;
            self.deadline = (now + self.times.response).min(self.times.last);
        }
        self.looked = false;
        let left = self.deadline.saturating_duration_since(now);
        match link {
            None => Step::AskHere(left),
            Some(link) => Step::AskThere(link, left),
        }
    }

    /// The store has said where the link is.
    pub fn found(&mut self, link: Option<LinkRecord>) {
        self.found = link;
        self.looked = true;
    }

    /// There may be news, or it is time to look again.
    pub fn waited(&mut self) {
        self.looked = false;
    }

    /// What came of asking: over `link` elsewhere, or here. `None` when the search goes on.
    pub fn heard(
        &mut self,
        link: Option<LinkRecord>,
        outcome: Result<Outcome, CallError>,
        now: Instant,
    ) -> Option<Result<Capabilities, Problem>> {
        match (outcome, link) {
            (Ok(Outcome::NoLink), link) => {
                self.lost = None;
                // A link that was here left between the look and the question.
                if let Some(link) = link {
                    self.passed = link.generation;
                }
                None
            }
            (Ok(outcome), _) => Some(verdict(outcome)),
            (Err(error @ (CallError::Gone | CallError::Unreachable(_))), Some(link)) => {
                if error == CallError::Gone {
                    self.passed = link.generation;
                } else {
                    // The same replica is tried again, but not at once.
                    self.found = None;
                    self.looked = true;
                }
                let until = self.lost.take().map_or_else(|| now + LOST_LIMIT, |(_, until)| until);
                self.lost = Some((link.replica, until));
                None
            }
            (Err(_), _) => Some(Err(Problem::from_close(CloseReason::InvitationFailed))),
        }
    }

    /// Where the device's link is, as far as that is known.
    fn place(&self, here: Option<(Held, bool)>, view: &View, now: Instant) -> Place {
        let found = self.found.as_ref().filter(|link| link.generation > self.passed);
        let elsewhere = found.filter(|link| link.replica != self.replica);
        let elsewhere =
            elsewhere.filter(|link| view.presence(ServerRole::Control, &link.replica, now) != Presence::Gone);
        match (here, elsewhere) {
            // Nobody has told the link here yet.
            (Some((held, certain)), Some(link)) if certain && held.generation < link.generation => {
                Place::There(link.clone())
            }
            (Some(_), _) => Place::Here,
            (None, Some(link)) => Place::There(link.clone()),
            (None, None) => Place::Nowhere,
        }
    }

    /// What the service hears when the device was not found in time.
    fn not_found(&self, view: &View, now: Instant) -> Problem {
        match &self.lost {
            Some((replica, _)) if view.presence(ServerRole::Control, replica, now) != Presence::Gone => {
                Problem::from_close(CloseReason::InvitationFailed)
            }
            _ if !view.is_settled(now) => crate::api::not_known_yet(),
            _ => {
                let detail = format!(
                    "device {} is not connected to the relay; start it, or wait longer with connect_timeout_seconds",
                    self.address
                );
                Problem::new(ProblemKind::from(CloseReason::DeviceOffline), detail)
            }
        }
    }
}

/// What the service hears when the device has answered, or cannot.
pub fn verdict(outcome: Outcome) -> Result<Capabilities, Problem> {
    match outcome {
        Outcome::Accepted { capabilities } => Ok(capabilities),
        Outcome::Rejected { reason } => {
            let said = if reason.is_empty() {
                "the device gave no reason".to_owned()
            } else {
                format!("the device said: {reason}")
            };
            let mut problem = Problem::new(CloseReason::DeviceRejected.into(), said);
            problem.device_reason = Some(reason);
            Err(problem)
        }
        Outcome::Silent => Err(Problem::from_close(CloseReason::DeviceSilent)),
        Outcome::NoLink | Outcome::QueueFull | Outcome::Unknown => {
            Err(Problem::from_close(CloseReason::InvitationFailed))
        }
    }
}
