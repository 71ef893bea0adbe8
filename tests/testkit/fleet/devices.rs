use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex},
    time::Duration,
};

use futures_util::{SinkExt as _, StreamExt as _};
use midspan_core::{
    id::StreamId,
    link::{GoodbyeReason, Invitation, SUBPROTOCOL, ToDevice},
};
use secrecy::ExposeSecret as _;
use serde_json::json;
use tokio::{
    sync::{mpsc, oneshot},
    task::JoinSet,
    time::sleep,
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{Message, protocol::Role},
};

use super::{Entrances, Fleet, Seen};
use crate::{Random, eventually, now, until};

/// Devices that look after themselves: each keeps a link to any control replica, goes to another one when it is told or cut off,
/// accepts every stream, opens its leg at any edge, and answers each message with as many bytes of its own.
#[derive(Debug)]
pub struct Devices {
    shared: Arc<Shared>,
    _tasks: JoinSet<()>,
}

#[derive(Debug)]
struct Shared {
    entrances: Arc<Entrances>,
    /// The control replicas that each device has a link to.
    links: Vec<Mutex<Vec<usize>>>,
    seen: Mutex<HashMap<StreamId, Seen>>,
    refused_legs: Mutex<Vec<String>>,
}

/// One device.
#[derive(Debug, Clone)]
struct Device {
    shared: Arc<Shared>,
    number: usize,
    path: String,
    authorization: String,
}

/// Invitations that a device has not looked at yet.
const INVITATIONS: usize = 64;

/// The longest wait before a link is tried again.
const RETRY: Duration = Duration::from_secs(1);

impl Devices {
    /// Starts `count` devices, and waits until all are linked.
    pub async fn start(fleet: &Fleet, count: usize, seed: u64) -> Self {
        let shared = Arc::new(Shared {
            entrances: fleet.entrances(),
            links: (0..count).map(|_| Mutex::default()).collect(),
            seen: Mutex::default(),
            refused_legs: Mutex::default(),
        });
        let expires = now().plus(Duration::from_secs(3600));
        let mut random = Random::new(seed);
        let mut tasks = JoinSet::new();
        for number in 0..count {
            let connection = fleet.device_connection(&Self::name(number));
            let device = Device {
                shared: Arc::clone(&shared),
                number,
                path: format!("/v1/devices/{}/link", Self::name(number)),
                authorization: connection.sign(expires).expose_secret().to_owned(),
            };
            tasks.spawn(device.run(Random::new(random.number())));
        }
        let devices = Self { shared, _tasks: tasks };
        devices.all_linked().await;
        devices
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.shared.links.len()
    }

    /// The name of a device.
    pub fn name(number: usize) -> String {
        format!("dev{number}")
    }

    /// The name of any device.
    pub fn any(&self, random: &mut Random) -> String {
        Self::name(random.below(self.count()))
    }

    /// The devices that have a link to a control replica.
    pub fn linked_to(&self, control: usize) -> Vec<usize> {
        let linked = |number: &usize| self.shared.links[*number].lock().unwrap().contains(&control);
        (0..self.count()).filter(linked).collect()
    }

    /// Waits until each device has a link.
    pub async fn all_linked(&self) {
        let unlinked = || self.shared.links.iter().filter(|links| links.lock().unwrap().is_empty()).count();
        eventually("all devices are linked", || async { unlinked() == 0 }).await;
    }

    /// What the device has seen of a stream; waits until it is over.
    pub async fn seen(&self, stream: StreamId) -> Seen {
        until("the device has seen the end of a stream", || async {
            self.shared.seen.lock().unwrap().remove(&stream)
        })
        .await
    }

    /// Why legs of devices were refused, or broke before they were open.
    pub fn refused_legs(&self) -> Vec<String> {
        self.shared.refused_legs.lock().unwrap().clone()
    }
}

impl Device {
    async fn run(self, mut random: Random) {
        let (invitations, mut invited) = mpsc::channel(INVITATIONS);
        let mut tasks = JoinSet::new();
        tasks.spawn(self.clone().keep_linked(invitations, Random::new(random.number())));
        let mut streams = HashSet::new();
        loop {
            tokio::select! {
                // The relay may ask twice for the same stream.
                Some(invitation) = invited.recv() => if streams.insert(invitation.stream) {
                    tasks.spawn(self.clone().leg(invitation, Random::new(random.number())));
                },
                Some(ended) = tasks.join_next() => ended.unwrap(),
            }
        }
    }

    /// Opens one link after the other. One that is told to move lives on until the relay ends it.
    async fn keep_linked(self, invitations: mpsc::Sender<Invitation>, mut random: Random) {
        let mut links = JoinSet::new();
        loop {
            let headers =
                [("authorization", self.authorization.as_str()), ("sec-websocket-protocol", SUBPROTOCOL)];
            let Ok((control, upgraded)) = self.shared.entrances.link(&self.path, &headers, &mut random).await
            else {
                sleep(random.time(RETRY)).await;
                continue;
            };
            let (io, early) = (upgraded.io, upgraded.early);
            let socket = WebSocketStream::from_partially_read(io, early.into(), Role::Client, None).await;
            let (moves, told) = oneshot::channel();
            let (device, invitations) = (self.clone(), invitations.clone());
            links.spawn(async move {
                device.links().push(control);
                device.serve(socket, invitations, moves).await;
                let mut links = device.links();
                let this = links.iter().position(|&other| other == control).unwrap();
                links.swap_remove(this);
            });
            let come_back = told.await.unwrap_or(RETRY);
            sleep(random.time(come_back)).await;
            while links.try_join_next().is_some() {}
        }
    }

    fn links(&self) -> std::sync::MutexGuard<'_, Vec<usize>> {
        self.shared.links[self.number].lock().unwrap()
    }

    /// Accepts everything that is asked over a link, until it ends.
    async fn serve(
        &self,
        mut socket: WebSocketStream<crate::Io>,
        invitations: mpsc::Sender<Invitation>,
        moves: oneshot::Sender<Duration>,
    ) {
        let mut moves = Some(moves);
        while let Some(Ok(message)) = socket.next().await {
            let Message::Text(text) = message else { continue };
            match serde_json::from_str(&text).unwrap() {
                ToDevice::Request(invitation) => {
                    let accept = json!({ "type": "accept", "request": invitation.request });
                    if socket.send(Message::text(accept.to_string())).await.is_err() {
                        return;
                    }
                    invitations.send(invitation).await.unwrap();
                }
                ToDevice::Goodbye(goodbye) if goodbye.reason == GoodbyeReason::Draining => {
                    if let Some(moves) = moves.take() {
                        moves.send(Duration::from_secs(goodbye.come_back_seconds)).unwrap();
                    }
                }
                ToDevice::Goodbye(_) | ToDevice::Welcome { .. } | ToDevice::Unknown => {}
            }
        }
    }

    async fn leg(self, invitation: Invitation, mut random: Random) {
        let Invitation { stream, url, ticket, .. } = invitation;
        match self.shared.entrances.leg(&url, &ticket, &mut random).await {
            Ok(session) => {
                let seen = session.answer().await;
                self.shared.seen.lock().unwrap().insert(stream, seen);
            }
            Err(failure) => self.shared.refused_legs.lock().unwrap().push(failure.to_string()),
        }
    }
}
