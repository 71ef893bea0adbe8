//! The life of one stream at its owner: which legs are there, when they are joined, how it ends.
//!
//! ```text
//!             attach            ready (other leg ready too)
//!   waiting ----------> one leg ---------------------------> joined
//!      ^                   |  |                                 |
//!      +------ detach -----+  +------- deadline, end -------+   | end
//!      |                                                    v   v
//!      +----------------- deadline, end ------------------> ended
//! ```
//!
//! A leg is *attached* from the moment its ticket is taken, and *ready* once its WebSocket is open. Two ready legs
//! are joined, once and for good. Before that, a leg that goes away again frees its place, so that a dial that
//! broke on the way can be repeated with the same ticket.

use thiserror::Error;

use crate::{close::CloseReason, id::Role};

/// One stream at its owner. There is one of it for each stream, so it is small: it counts milliseconds from a moment that its
/// owner has chosen.
#[derive(Debug, Clone)]
pub struct Session {
    service: Leg,
    device: Leg,
    deadline: u64,
    joined: bool,
    ended: Option<CloseReason>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Leg {
    Absent,
    Attached,
    Ready,
}

/// Where a stream stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SessionState {
    /// No leg is there.
    Waiting,
    /// At least one leg is there, and they are not joined.
    OneLeg,
    /// Bytes flow.
    Joined,
    /// Over, for this reason.
    Ended(CloseReason),
}

/// Why a leg is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum AttachError {
    /// The leg of this role is there already.
    #[error("this leg is attached already")]
    Taken,
    /// The stream is over.
    #[error("the stream has ended: {0}")]
    Ended(CloseReason),
}

/// What follows when a leg's WebSocket is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ready {
    /// The other leg is not ready yet.
    Waits,
    /// Both legs are ready: join them.
    Joined,
    /// The stream ended in the meantime; tell the leg.
    Ended(CloseReason),
}

impl Session {
    /// A stream of which no leg has come yet. Both must be joined before `deadline`, in milliseconds.
    pub fn new(deadline: u64) -> Self {
        Self { service: Leg::Absent, device: Leg::Absent, deadline, joined: false, ended: None }
    }

    /// Where the stream stands.
    pub fn state(&self) -> SessionState {
        match (self.ended, self.joined) {
            (Some(reason), _) => SessionState::Ended(reason),
            (None, true) => SessionState::Joined,
            (None, false) if self.service == Leg::Absent && self.device == Leg::Absent => {
                SessionState::Waiting
            }
            (None, false) => SessionState::OneLeg,
        }
    }

    /// A leg of `role` came with a good ticket. Let time pass with [`Session::tick`] before.
    pub fn attach(&mut self, role: Role) -> Result<(), AttachError> {
        if let Some(reason) = self.ended {
            return Err(AttachError::Ended(reason));
        }
        match self.leg(role) {
            leg @ Leg::Absent => *leg = Leg::Attached,
            Leg::Attached | Leg::Ready => return Err(AttachError::Taken),
        }
        Ok(())
    }

    /// The WebSocket of the attached leg of `role` is open. Let time pass with [`Session::tick`] before.
    pub fn ready(&mut self, role: Role) -> Ready {
        if let Some(reason) = self.ended {
            return Ready::Ended(reason);
        }
        *self.leg(role) = Leg::Ready;
        if *self.leg(role.peer()) == Leg::Ready {
            self.joined = true;
            Ready::Joined
        } else {
            Ready::Waits
        }
    }

    /// The leg of `role` went away. Frees its place when the stream is not joined; else the stream ends.
    pub fn detach(&mut self, role: Role) {
        if self.joined {
            self.end(CloseReason::lost(role));
        } else {
            *self.leg(role) = Leg::Absent;
        }
    }

    /// Ends the stream. Only the first end counts: gives the reason that holds from now on, and whether it is new.
    pub fn end(&mut self, reason: CloseReason) -> (CloseReason, bool) {
        match self.ended {
            Some(first) => (first, false),
            None => {
                self.ended = Some(reason);
                (reason, true)
            }
        }
    }

    /// Lets time pass, up to `now` in milliseconds: ends a handshake that is over its deadline. Gives the reason when that
    /// happened now.
    pub fn tick(&mut self, now: u64) -> Option<CloseReason> {
        if self.joined || self.ended.is_some() || now < self.deadline {
            return None;
        }
        let reason = match (self.service, self.device) {
            (Leg::Absent, Leg::Absent) => CloseReason::BothLegsMissing,
            (Leg::Absent, _) => CloseReason::ServiceLegMissing,
            (_, Leg::Absent) => CloseReason::DeviceLegMissing,
            // Both came, and one's WebSocket is still not open.
            (Leg::Attached, _) => CloseReason::ServiceLegMissing,
            (_, _) => CloseReason::DeviceLegMissing,
        };
        self.ended = Some(reason);
        Some(reason)
    }

    /// When the handshake must be over, in milliseconds.
    pub fn deadline(&self) -> u64 {
        self.deadline
    }

    fn leg(&mut self, role: Role) -> &mut Leg {
        match role {
            Role::Service => &mut self.service,
            Role::Device => &mut self.device,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn either_leg_may_come_first() {
        for first in Role::ALL {
            let mut session = session();
            session.attach(first).unwrap();
            assert_eq!(session.ready(first), Ready::Waits);
            assert_eq!(session.state(), SessionState::OneLeg);
            session.attach(first.peer()).unwrap();
            assert_eq!(session.ready(first.peer()), Ready::Joined);
            assert_eq!(session.state(), SessionState::Joined);
        }
    }

    #[test]
    fn a_leg_attaches_once_unless_it_went_away_before_the_join() {
        let mut session = session();
        session.attach(Role::Device).unwrap();
        assert_eq!(session.attach(Role::Device), Err(AttachError::Taken));
        session.detach(Role::Device);
        assert_eq!(session.state(), SessionState::Waiting);
        session.attach(Role::Device).unwrap();
    }

    #[test]
    fn a_joined_leg_that_goes_away_ends_the_stream() {
        let mut session = session();
        for role in Role::ALL {
            session.attach(role).unwrap();
            session.ready(role);
        }
        session.detach(Role::Service);
        assert_eq!(session.state(), SessionState::Ended(CloseReason::ServiceLost));
        assert_eq!(session.attach(Role::Service), Err(AttachError::Ended(CloseReason::ServiceLost)));
    }

    #[test]
    fn the_deadline_names_who_is_missing() {
        let late = |roles: &[Role]| {
            let mut session = session();
            for &role in roles {
                session.attach(role).unwrap();
                session.ready(role);
            }
            session.tick(session.deadline())
        };
        assert_eq!(late(&[]), Some(CloseReason::BothLegsMissing));
        assert_eq!(late(&[Role::Service]), Some(CloseReason::DeviceLegMissing));
        assert_eq!(late(&[Role::Device]), Some(CloseReason::ServiceLegMissing));
        assert_eq!(late(&Role::ALL), None);
    }

    #[derive(Debug, Clone, Copy)]
    enum Event {
        Attach(Role),
        Ready(Role),
        Detach(Role),
        End,
        Wait(u64),
    }

    fn event() -> impl Strategy<Value = Event> {
        let role = prop_oneof![Just(Role::Service), Just(Role::Device)];
        prop_oneof![
            3 => role.clone().prop_map(Event::Attach),
            3 => role.clone().prop_map(Event::Ready),
            2 => role.prop_map(Event::Detach),
            1 => Just(Event::End),
            2 => (0u64..30_000).prop_map(Event::Wait),
        ]
    }

    proptest! {
        /// Whatever happens: joined at most once and only with both legs, the first end stands, and time ends all.
        #[test]
        fn always_ends_and_never_joins_twice(events in prop::collection::vec(event(), 0..60)) {
            let mut session = session();
            let (mut now, mut joins, mut end) = (START, 0, None);
            let mut attached = [false; 2];
            for event in events {
                match event {
                    Event::Attach(role) => {
                        let taken = attached[role as usize];
                        match session.attach(role) {
                            Ok(()) => {
                                prop_assert!(!taken && joins == 0);
                                attached[role as usize] = true;
                            }
                            Err(AttachError::Taken) => prop_assert!(taken),
                            Err(AttachError::Ended(_)) => {
                                prop_assert!(matches!(session.state(), SessionState::Ended(_)));
                            }
                        }
                    }
                    Event::Ready(role) if attached[role as usize] && joins == 0 => {
                        if session.ready(role) == Ready::Joined {
                            joins += 1;
                            prop_assert!(attached == [true; 2] && now < session.deadline());
                        }
                    }
                    Event::Detach(role) if attached[role as usize] => {
                        session.detach(role);
                        attached[role as usize] = joins > 0;
                    }
                    Event::Ready(_) | Event::Detach(_) => {}
                    Event::End => { session.end(CloseReason::Deleted); }
                    Event::Wait(milliseconds) => {
                        now += milliseconds;
                        session.tick(now);
                    }
                }
                if let Some(first) = end {
                    prop_assert_eq!(session.state(), SessionState::Ended(first));
                } else if let SessionState::Ended(reason) = session.state() {
                    end = Some(reason);
                }
                prop_assert!(joins <= 1);
            }
            session.tick(now + 60_000);
            let over = matches!(session.state(), SessionState::Ended(_));
            prop_assert!(over || joins == 1);
            if joins == 1 && !over {
                session.detach(Role::Device);
                prop_assert_eq!(session.state(), SessionState::Ended(CloseReason::DeviceLost));
            }
        }
    }

    const START: u64 = 1000;

    fn session() -> Session {
        Session::new(START + 60_000)
    }
}
