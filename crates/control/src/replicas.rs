//! Calls between control replicas: asking a device over the link that another one holds, and news of links.

use std::{sync::Arc, time::Duration};

use midspan_core::{
    api::HANDSHAKE_MAX,
    id::DeviceAddress,
    internal::{
        self, Answer, Ask, DEVICE_ONLINE, DeviceOnline, INVITATIONS, LINK_REPLACED, LinkReplaced, Outcome,
    },
    json,
    link::Invitation,
    problem::{Problem, ProblemKind},
    ticket::Owner,
};
use midspan_platform::{
    internal::{CallError, question as parse},
    rendezvous::{LinkUp, ServerRole},
};
use serde::Serialize;
use tokio::time::sleep;
use tracing::{Span, debug, warn};

use crate::{
    control::Control,
    device::{InviteError, Question},
};

/// How much longer a call may take than the device whose answer it brings.
const CALL_SLACK: Duration = Duration::from_secs(1);

/// How long news of a link may take.
const NEWS_LIMIT: Duration = Duration::from_secs(2);

impl Control {
    /// Answers a call of another replica, which has shown that it is one.
    pub async fn internal(self: &Arc<Self>, path: &str, question: &[u8]) -> Result<Vec<u8>, Problem> {
        match path {
            INVITATIONS => {
                let Ask { address, invitation, .. } = parse(question)?;
                let mut asked = self.links.ask(invitation.request, &address);
                let outcome = self.put(&mut asked, &address, invitation).await;
                Ok(written(&Answer { v: internal::VERSION, outcome }))
            }
            DEVICE_ONLINE => {
                self.links.online_elsewhere(&parse::<DeviceOnline>(question)?.address);
                Ok(b"{}".to_vec())
            }
            LINK_REPLACED => {
                let LinkReplaced { address, generation, .. } = parse(question)?;
                self.links.replaced_elsewhere(&address, generation);
                Ok(b"{}".to_vec())
            }
            _ => Err(Problem::new(ProblemKind::NotFound, "no call of this release")),
        }
    }

    /// Asks a device over its link here, and waits for the answer for as long as the invitation says.
    pub(crate) async fn put(
        &self,
        question: &mut Question,
        address: &DeviceAddress,
        invitation: Invitation,
    ) -> Outcome {
        let within = Duration::from_millis(invitation.answer_within_ms).min(HANDSHAKE_MAX);
        let gone = match self.links.invite(address, invitation) {
            Ok(gone) => gone,
            Err(InviteError::Offline) => return Outcome::NoLink,
            Err(InviteError::QueueFull) => return Outcome::QueueFull,
        };
        tokio::select! {
            biased;
            answer = question.answer() => answer.unwrap_or(Outcome::NoLink),
            () = gone.cancelled() => Outcome::NoLink,
            () = sleep(within) => Outcome::Silent,
        }
    }

    /// Asks a device over the link that `replica` holds.
    pub(crate) async fn put_elsewhere(
        &self,
        replica: &Owner,
        address: &DeviceAddress,
        invitation: Invitation,
    ) -> Result<Outcome, CallError> {
        let within = Duration::from_millis(invitation.answer_within_ms) + CALL_SLACK;
        let ask = written(&Ask { v: internal::VERSION, address: address.clone(), invitation });
        let answered = self.calls.call(ServerRole::Control, replica, INVITATIONS, ask, within).await;
        let outcome = answered.map(|answer| match json::parse::<Answer>(&answer) {
            Ok(answer) => answer.outcome,
            Err(error) => {
                warn!(%error, replica = replica.name, "the answer of a replica is not understood");
                Outcome::Unknown
            }
        });
        self.metrics.asked_elsewhere(match &outcome {
            Ok(Outcome::Accepted { .. }) => "accepted",
            Ok(Outcome::Rejected { .. }) => "rejected",
            Ok(Outcome::NoLink) => "no_link",
            Ok(Outcome::QueueFull) => "queue_full",
            Ok(Outcome::Silent) => "silent",
            Ok(Outcome::Unknown) => "unknown",
            Err(CallError::Unreachable(_)) => "unreachable",
            Err(CallError::Gone) => "gone",
            Err(CallError::Refused(_)) => "refused",
            Err(CallError::TimedOut) => "timed_out",
        });
        outcome
    }

    /// Tells of a new link here: the replicas that wait for the device, and the one that holds an older link.
    ///
    /// In the background: who waits looks for itself from time to time, and an older link is not asked any more.
    pub(crate) fn tell_others(&self, address: &DeviceAddress, up: LinkUp) {
        let v = internal::VERSION;
        let online = written(&DeviceOnline { v, address: address.clone() });
        let replaced = written(&LinkReplaced { v, address: address.clone(), generation: up.generation });
        let waiting = up.waiting.into_iter().map(|replica| (replica, DEVICE_ONLINE, online.clone()));
        let older = up.replaced.map(|older| (older.replica, LINK_REPLACED, replaced));
        for (replica, path, news) in waiting.chain(older) {
            // Those here know.
            if replica == self.replica {
                continue;
            }
            let calls = Arc::clone(&self.calls);
            self.lifecycle.spawn(Span::current(), async move {
                let told = calls.call(ServerRole::Control, &replica, path, news, NEWS_LIMIT).await;
                if let Err(error) = told {
                    debug!(%error, replica = replica.name, path, "a replica could not be told of a link");
                }
            });
        }
    }
}

fn written(message: &impl Serialize) -> Vec<u8> {
    // Text keys and numbers always have a JSON form.
    serde_json::to_vec(message).unwrap_or_default()
}
