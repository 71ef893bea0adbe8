//! Finding a device's link, on whatever replica it is, and asking over it until there is an answer.

use std::{sync::Arc, time::Duration};

use midspan_core::{
    api::{Timeouts, answer_by},
    capability::Capabilities,
    close::CloseReason,
    id::{RequestId, Role},
    internal::Outcome,
    link::Invitation,
    problem::Problem,
    ticket::{Owner, Ticket},
};
use midspan_platform::{
    clock,
    internal::CallError,
    rendezvous::{LinkRecord, ServerRole},
};
use secrecy::SecretString;
use tokio::time::{Instant, sleep};
use tracing::warn;

use super::{Attempt, cannot_sign};
use crate::{api::in_time, view::Presence};

/// How long requests under way may still take when the process closes.
const CLOSING_GRACE: Duration = Duration::from_secs(4);

/// How often a link is looked for that nobody has told of: the store may have forgotten who waits.
const LOOK_AGAIN: Duration = Duration::from_secs(2);

/// How long a device has to turn up elsewhere when the replica that was asked does not answer.
const LOST_LIMIT: Duration = Duration::from_secs(5);

/// What is known of where a device's link is.
struct Search {
    /// What the store said last.
    found: Option<LinkRecord>,
    /// Links up to this generation are gone, whatever the store says.
    passed: u64,
    /// The replica that may or may not have been asked, and until when that may clear up.
    lost: Option<(Owner, Instant)>,
    /// Whether nothing was learned since the store was asked.
    looked: bool,
}

/// Where a device's link is.
enum Place {
    Here,
    There(LinkRecord),
    Nowhere,
}

impl Attempt {
    /// Waits for the device, asks it, and waits for its answer.
    ///
    /// A device whose link is replaced or lost in between, on whatever replica, is asked again.
    pub(super) async fn ask(
        &mut self,
        service_ticket: &Ticket,
        link: Option<LinkRecord>,
        timeouts: Timeouts,
    ) -> Result<Capabilities, Problem> {
        let control = Arc::clone(&self.control);
        let device_ticket = Ticket { role: Role::Device, ..service_ticket.clone() };
        let ticket = control.secrets.ticket_keys().sign(&device_ticket).map_err(|_| cannot_sign())?;
        let mut arrivals = control.links.arrivals(&self.address);
        let mut question = control.links.ask(RequestId::from_random(clock::random()), &self.address);
        let mut search = Search { found: link, passed: 0, lost: None, looked: false };
        let last = self.started + answer_by(control.settings.handshake_limit);
        let mut deadline = self.started + timeouts.connect;
        let closing = async {
            control.lifecycle.closing().cancelled().await;
            sleep(CLOSING_GRACE).await;
        };
        tokio::pin!(closing);
        loop {
            let mut place = self.place(&search);
            let until = search.lost.as_ref().map_or(deadline, |(_, until)| deadline.min(*until));
            let left = until.saturating_duration_since(Instant::now());
            if matches!(place, Place::Nowhere) && left.is_zero() {
                // Who seems to be gone may only have come since the last look.
                control.look().await?;
                place = self.place(&search);
                if matches!(place, Place::Nowhere) {
                    return Err(self.not_found(&search));
                }
            }
            if matches!(place, Place::Nowhere) {
                if search.looked {
                    tokio::select! {
                        biased;
                        answer = question.answer() => return verdict(answer.unwrap_or(Outcome::Unknown)),
                        () = arrivals.next() => {}
                        () = sleep(left.min(LOOK_AGAIN)) => {}
                        () = &mut closing => return Err(Problem::from_close(CloseReason::InvitationFailed)),
                    }
                    search.looked = false;
                } else {
                    let waiting = control.rendezvous.await_link(&self.address, &control.replica, left);
                    search.found = in_time(waiting).await?;
                    search.looked = true;
                }
                continue;
            }
            if !self.asked {
                self.asked = true;
                deadline = (Instant::now() + timeouts.response).min(last);
            }
            let invitation = self.invitation(question.request, &ticket, deadline);
            search.looked = false;
            let outcome = match &place {
                Place::Here | Place::Nowhere => tokio::select! {
                    outcome = control.put(&mut question, &self.address, invitation) => Ok(outcome),
                    () = &mut closing => Err(None),
                },
                Place::There(link) => tokio::select! {
                    biased;
                    // Over a link that has come here since.
                    answer = question.answer() => Ok(answer.unwrap_or(Outcome::Unknown)),
                    outcome = control.put_elsewhere(&link.replica, &self.address, invitation) => outcome.map_err(Some),
                    () = arrivals.next_here() => continue,
                    () = &mut closing => Err(None),
                },
            };
            match outcome {
                Ok(Outcome::NoLink) => {
                    search.lost = None;
                    match place {
                        Place::There(link) => search.passed = link.generation,
                        // It left between the look and the call.
                        Place::Here | Place::Nowhere => tokio::task::yield_now().await,
                    }
                }
                Ok(outcome) => return verdict(outcome),
                Err(Some(error @ (CallError::Gone | CallError::Unreachable(_)))) => {
                    warn!(%error, "an invitation was lost on the way");
                    let Place::There(link) = place else { continue };
                    if error == CallError::Gone {
                        search.passed = link.generation;
                    } else {
                        // The same replica is tried again, but not at once.
                        search.found = None;
                        search.looked = true;
                    }
                    let until = search.lost.map_or_else(|| Instant::now() + LOST_LIMIT, |(_, until)| until);
                    search.lost = Some((link.replica, until));
                }
                Err(error) => {
                    if let Some(error) = error {
                        warn!(%error, "a replica could not ask its device");
                    }
                    return Err(Problem::from_close(CloseReason::InvitationFailed));
                }
            }
        }
    }

    /// Where the device's link is, as far as that is known.
    fn place(&self, search: &Search) -> Place {
        let control = &self.control;
        let found = search.found.as_ref().filter(|link| link.generation > search.passed);
        let elsewhere = found.filter(|link| link.replica != control.replica);
        let elsewhere = elsewhere.filter(|link| {
            control.view().presence(ServerRole::Control, &link.replica, clock::now()) != Presence::Gone
        });
        match (control.links.held(&self.address), elsewhere) {
            (Some((held, certain)), Some(link)) if certain && held.generation < link.generation => {
                // Nobody has told the link here yet.
                control.links.replaced_elsewhere(&self.address, link.generation);
                Place::There(link.clone())
            }
            (Some(_), _) => Place::Here,
            (None, Some(link)) => Place::There(link.clone()),
            (None, None) => Place::Nowhere,
        }
    }

    fn invitation(&self, request: RequestId, ticket: &SecretString, deadline: Instant) -> Invitation {
        let left = deadline.saturating_duration_since(Instant::now());
        Invitation {
            request,
            stream: self.stream,
            name: self.request.name.clone(),
            url: self.leg_url(Role::Device),
            ticket: ticket.clone(),
            expires: self.expires,
            answer_within_ms: u64::try_from(left.as_millis()).unwrap_or(u64::MAX),
            capabilities: self.request.capabilities.clone(),
            metadata: self.request.metadata.clone(),
            traceparent: self.trace.child(clock::random_u64()),
        }
    }

    /// What the service hears when the device was not found in time.
    fn not_found(&self, search: &Search) -> Problem {
        let (view, now) = (self.control.view(), clock::now());
        match &search.lost {
            Some((replica, _)) if view.presence(ServerRole::Control, replica, now) != Presence::Gone => {
                Problem::from_close(CloseReason::InvitationFailed)
            }
            _ if !view.is_settled(now) => crate::api::not_known_yet(),
            _ => {
                let detail = format!(
                    "device {} is not connected to the relay; start it, or wait longer with connect_timeout_seconds",
                    self.address
                );
                Problem::new(CloseReason::DeviceOffline.into(), detail)
            }
        }
    }
}

fn verdict(outcome: Outcome) -> Result<Capabilities, Problem> {
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
