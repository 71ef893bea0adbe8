use std::{
    fmt, io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use http::Method;
use midspan_core::{
    api::StreamGrant, connection_string::ConnectionString, id::DeviceAddress, ticket::TicketKeys,
};
use secrecy::{ExposeSecret as _, SecretString};
use tokio::time::sleep;

use super::{Member, Session};
use crate::{Answer, Io, Leg, Random, Target, Upgraded, leg::path_of, now, within};

/// The processes of a fleet as clients find them behind a balancer: any that is open, at random, by role.
#[derive(Debug)]
pub struct Entrances {
    controls: Vec<Entrance>,
    edges: Vec<Entrance>,
    authorization: String,
    /// Tickets say who owns a stream, which clients have no need to know.
    tickets: TicketKeys,
}

#[derive(Debug)]
struct Entrance {
    name: String,
    target: Target,
    open: Arc<AtomicBool>,
}

/// Why a client did not get what it asked for.
#[derive(Debug)]
pub enum Failure {
    /// The relay said no.
    Refused(Box<Answer>),
    /// The connection broke.
    Broken(String),
}

impl Failure {
    /// Whether a client tries again with a fresh stream: the relay cannot take it now (503), or the edge has gone (410).
    pub fn may_retry(&self) -> bool {
        matches!(self, Self::Refused(answer) if matches!(answer.status, 503 | 410))
    }

    fn broken(error: impl std::error::Error) -> Self {
        Self::Broken(format!("{error}: {:?}", error.source().map(ToString::to_string)))
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused(answer) => write!(f, "{}: {}", answer.status, answer.json()["detail"]),
            Self::Broken(how) => f.write_str(how),
        }
    }
}

impl Entrances {
    pub(super) fn new(
        controls: &[Member],
        edges: &[Member],
        service: &ConnectionString,
        tickets: TicketKeys,
    ) -> Self {
        let entrances = |members: &[Member]| -> Vec<_> {
            let of = |member: &Member| Entrance {
                name: member.name.clone(),
                target: member.target.clone(),
                open: Arc::clone(&member.open),
            };
            members.iter().map(of).collect()
        };
        let expires = now().plus(Duration::from_secs(3600));
        let authorization = service.sign(expires).expose_secret().to_owned();
        Self { controls: entrances(controls), edges: entrances(edges), authorization, tickets }
    }

    /// Asks any control replica for a stream to `device`, and opens the service's leg at any edge.
    pub async fn open(&self, device: &str, random: &mut Random) -> Result<Session, Failure> {
        let address: DeviceAddress = device.parse().unwrap();
        let (at, io) = enter(&self.controls, random).await?;
        let headers = [("authorization", self.authorization.as_str()), ("content-type", "application/json")];
        let path = format!("/v1/{}/streams", address.path());
        let target = &self.controls[at].target;
        let request = target.build(Method::POST, &path, &headers, br#"{"name":"test"}"#);
        let answer = within("the answer to a service", Target::request_over(io, request)).await;
        let answer = answer.map_err(Failure::broken)?;
        if answer.status != 201 {
            return Err(Failure::Refused(Box::new(answer)));
        }
        let StreamGrant { url, ticket, .. } = answer.grant();
        self.leg(&url, &ticket, random).await
    }

    /// Opens a stream, and tries once more where a client may.
    pub async fn open_or_retry(
        &self,
        device: &str,
        random: &mut Random,
    ) -> Result<(Session, Option<Failure>), Failure> {
        match self.open(device, random).await {
            Ok(session) => Ok((session, None)),
            Err(first) if first.may_retry() => Ok((self.open(device, random).await?, Some(first))),
            Err(failure) => Err(failure),
        }
    }

    /// Opens a leg at any edge.
    pub(super) async fn leg(
        &self,
        url: &str,
        ticket: &SecretString,
        random: &mut Random,
    ) -> Result<Session, Failure> {
        let claims = self.tickets.verify(ticket.expose_secret(), now()).unwrap();
        let owner = self.edges.iter().position(|edge| edge.name == claims.owner.name).unwrap();
        let authorization = format!("Bearer {}", ticket.expose_secret());
        let headers = [("authorization", authorization.as_str())];
        let (edge, upgraded) = upgrade(&self.edges, path_of(url), &headers, random).await?;
        let leg = Leg::from_upgraded(upgraded).await;
        Ok(Session::new(claims.stream, [owner, edge], leg, random.number()))
    }

    /// Opens a device's link at any control replica; tells which one it is.
    pub(super) async fn link(
        &self,
        path: &str,
        headers: &[(&str, &str)],
        random: &mut Random,
    ) -> Result<(usize, Upgraded), Failure> {
        upgrade(&self.controls, path, headers, random).await
    }
}

async fn upgrade(
    entrances: &[Entrance],
    path: &str,
    headers: &[(&str, &str)],
    random: &mut Random,
) -> Result<(usize, Upgraded), Failure> {
    let (at, io) = enter(entrances, random).await?;
    let upgraded = entrances[at].target.upgrade_over(io, path, headers).await.map_err(Failure::broken)?;
    Ok((at, upgraded.map_err(|answer| Failure::Refused(Box::new(answer)))?))
}

/// A connection with any of the processes that are open. One where nobody listens is passed over.
async fn enter(entrances: &[Entrance], random: &mut Random) -> Result<(usize, Io), Failure> {
    within("a process that listens", async {
        loop {
            let at = random.below(entrances.len());
            if !entrances[at].open.load(Ordering::Relaxed) {
                continue;
            }
            match entrances[at].target.try_connect().await {
                Ok(io) => return Ok((at, io)),
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    sleep(Duration::from_millis(10)).await;
                }
                Err(error) => return Err(Failure::broken(error)),
            }
        }
    })
    .await
}
