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
    ticket::Ticket,
};
use midspan_platform::{clock, rendezvous::LinkRecord};
use secrecy::SecretString;
use tokio::time::sleep;
use tracing::warn;

use super::{
    Attempt, cannot_sign,
    search::{Search, Step, Times, verdict},
};
use crate::api::in_time;

/// How long requests under way may still take when the process closes.
const CLOSING_GRACE: Duration = Duration::from_secs(4);

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
        let started = self.started.into_std();
        let times = Times {
            connect: started + timeouts.connect,
            response: timeouts.response,
            last: started + answer_by(control.settings.handshake_limit),
        };
        let mut search = Search::new(control.replica.clone(), self.address.clone(), link, times);
        let closing = async {
            control.lifecycle.closing().cancelled().await;
            sleep(CLOSING_GRACE).await;
        };
        tokio::pin!(closing);
        loop {
            let step = search.next(control.links.held(&self.address), &control.view(), clock::now());
            self.asked = search.has_asked();
            let (link, outcome) = match step {
                Step::LookAround => {
                    control.look().await?;
                    continue;
                }
                Step::Find(wait) => {
                    let waiting = control.rendezvous.await_link(&self.address, &control.replica, wait);
                    search.found(in_time(waiting).await?);
                    continue;
                }
                Step::Wait(at_most) => {
                    tokio::select! {
                        biased;
                        answer = question.answer() => return verdict(answer.unwrap_or(Outcome::Unknown)),
                        () = arrivals.next() => {}
                        () = sleep(at_most) => {}
                        () = &mut closing => return Err(Problem::from_close(CloseReason::InvitationFailed)),
                    }
                    search.waited();
                    continue;
                }
                Step::AskHere(within) => {
                    let invitation = self.invitation(question.request, &ticket, within);
                    let outcome = tokio::select! {
                        outcome = control.put(&mut question, &self.address, invitation) => outcome,
                        () = &mut closing => return Err(Problem::from_close(CloseReason::InvitationFailed)),
                    };
                    (None, Ok(outcome))
                }
                Step::AskThere(link, within) => {
                    control.links.replaced_elsewhere(&self.address, link.generation);
                    let invitation = self.invitation(question.request, &ticket, within);
                    let outcome = tokio::select! {
                        biased;
                        // Over a link that has come here since.
                        answer = question.answer() => Ok(answer.unwrap_or(Outcome::Unknown)),
                        outcome = control.put_elsewhere(&link.replica, &self.address, invitation) => outcome,
                        () = arrivals.next_here() => continue,
                        () = &mut closing => return Err(Problem::from_close(CloseReason::InvitationFailed)),
                    };
                    (Some(link), outcome)
                }
                Step::GiveUp(problem) => return Err(*problem),
            };
            if let Err(error) = &outcome {
                warn!(%error, "an invitation was lost on the way");
            }
            if let Some(answer) = search.heard(link, outcome, clock::now()) {
                return answer;
            }
            // A link that has left is off the list once its task has had a turn.
            tokio::task::yield_now().await;
        }
    }

    fn invitation(&self, request: RequestId, ticket: &SecretString, within: Duration) -> Invitation {
        Invitation {
            request,
            stream: self.stream,
            name: self.request.name.clone(),
            url: self.leg_url(Role::Device),
            ticket: ticket.clone(),
            expires: self.expires,
            answer_within_ms: u64::try_from(within.as_millis()).unwrap_or(u64::MAX),
            capabilities: self.request.capabilities.clone(),
            metadata: self.request.metadata.clone(),
            traceparent: self.trace.child(clock::random_u64()),
        }
    }
}
