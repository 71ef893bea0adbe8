//! Some control replicas in one process, with connections in memory, calls that can be broken and a store that can forget.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use clap::Parser;
use futures_util::{SinkExt as _, StreamExt as _};
use http::{Method, Request};
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::TokioIo;
use midspan_control::{Control, ControlParts, ControlSettings};
use midspan_core::{
    connection_string::{ConnectionString, Identity},
    credential::Credentials,
    deny::DenyList,
    id::{DeviceAddress, Incarnation, RequestId, StreamId},
    internal::END_STREAM,
    key::Key,
    link::{Goodbye, GoodbyeReason, Invitation, SUBPROTOCOL, ToDevice},
    record::{StreamRecord, StreamState},
    ticket::{Owner, TicketKeys},
};
use midspan_platform::{
    activity::ActivityLog,
    clock,
    http::{Handler, Peer, handler},
    internal::{CallError, Calls},
    kubernetes::Pods,
    lifecycle::Lifecycle,
    listener::{Connection, serve_http},
    metrics::Metrics,
    owners::RemoteOwners,
    rendezvous::{
        CreateError, Lease, Leases, LinkRecord, LinkUp, MemoryRendezvous, Rendezvous, Renewal, ServerRole,
        StoreError, StoreFailure, StreamLimits, Timing,
    },
    secrets::Secrets,
    watched::Watched,
};
use secrecy::ExposeSecret as _;
use serde_json::{Value, json};
use testkit::{Answer, within};
use tokio::{
    io::{DuplexStream, duplex},
    task::{AbortHandle, JoinSet},
    time::{sleep, timeout},
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{Message, client::IntoClientRequest as _, protocol::CloseFrame},
};
use tracing::Span;

/// Replicas around one store, and one edge that only has a lease.
pub(crate) struct Relay {
    pub(crate) store: Arc<Store>,
    pub(crate) mesh: Arc<Mesh>,
    edge: AbortHandle,
    _tasks: JoinSet<()>,
}

/// One control replica.
pub(crate) struct Replica {
    pub(crate) control: Arc<Control>,
    pub(crate) owner: Owner,
    lifecycle: Lifecycle,
    metrics: Metrics,
    answers: Handler,
    mesh: Arc<Mesh>,
}

/// A device's link.
pub(crate) struct Device {
    socket: WebSocketStream<DuplexStream>,
}

impl Relay {
    pub(crate) async fn start() -> Self {
        let (store, mut tasks) = (Arc::new(Store::default()), JoinSet::new());
        let lease =
            Lease { role: ServerRole::Edge, owner: owner("edge-0"), accepts: true, load: 0, passed: None };
        store.renew(&lease).await.unwrap();
        let renewing = Arc::clone(&store);
        let edge = tasks.spawn(async move {
            loop {
                sleep(Timing::default().renewal).await;
                // The store may be away.
                let _ = renewing.renew(&lease).await;
            }
        });
        Self { store, mesh: Arc::default(), edge, _tasks: tasks }
    }

    /// A replica that has seen the others, and that they have seen.
    pub(crate) async fn replica(&self, name: &str) -> Replica {
        let replica = self.replica_at_once(name).await;
        sleep(Timing::default().renewal * 2).await;
        replica
    }

    /// A replica that has just come.
    pub(crate) async fn replica_at_once(&self, name: &str) -> Replica {
        #[derive(Parser)]
        struct Defaults {
            #[command(flatten)]
            control: ControlSettings,
        }
        let (lifecycle, metrics, owner) = (Lifecycle::new(), Metrics::new(), owner(name));
        let activity = ActivityLog::start(Some("/dev/null".into()), &lifecycle, &metrics).await.unwrap();
        let calls = Caller { from: name.to_owned(), mesh: Arc::clone(&self.mesh) };
        let calls: Arc<dyn Calls> = Arc::new(calls);
        let control = Control::start(ControlParts {
            settings: Defaults::parse_from(["control"]).control,
            hosts: vec![HOST.to_owned()],
            replica: owner.clone(),
            edge_url: format!("https://{HOST}").parse().unwrap(),
            credentials: Watched::fixed(credentials()),
            secrets: Secrets {
                tickets: Watched::fixed(TicketKeys::new(&key(7), None).unwrap()),
                deny: Watched::fixed(DenyList::default()),
            },
            lifecycle: lifecycle.clone(),
            metrics: metrics.clone(),
            rendezvous: Arc::clone(&self.store) as _,
            timing: Timing::default(),
            owners: Arc::new(RemoteOwners::new(Arc::clone(&calls))),
            calls,
            pods: Watched::fixed(Pods::default()),
            activity,
        });
        self.mesh
            .replicas
            .lock()
            .unwrap()
            .insert(owner.incarnation, (Arc::clone(&control), lifecycle.clone()));
        let api = Arc::clone(&control);
        let answers = handler(move |request| Arc::clone(&api).handle(request));
        Replica { control, owner, lifecycle, metrics, answers, mesh: Arc::clone(&self.mesh) }
    }

    /// Ends the edge as a crash would: nobody renews its lease any more, and the time of that has passed.
    pub(crate) async fn lose_edge(&self) {
        self.edge.abort();
        sleep(Timing::default().lease + Timing::default().renewal * 2).await;
    }
}

impl Replica {
    /// Opens a link of `device`.
    pub(crate) async fn device(&self, device: &str) -> Device {
        let address: DeviceAddress = device.parse().unwrap();
        let mut request = format!("ws://{HOST}/v1/{}/link", address.path()).into_client_request().unwrap();
        let key = key(1).derive(&address);
        let connection = ConnectionString { host: HOST.to_owned(), identity: Identity::Device(address), key };
        let token = connection.sign(clock::unix().plus(Duration::from_secs(3600)));
        let headers = request.headers_mut();
        headers.insert("authorization", token.expose_secret().parse().unwrap());
        headers.insert("sec-websocket-protocol", SUBPROTOCOL.parse().unwrap());
        let connected = tokio_tungstenite::client_async(request, self.connect());
        let (socket, _) = within("a link", connected).await.unwrap();
        let mut device = Device { socket };
        assert!(matches!(device.next().await, ToDevice::Welcome { .. }));
        device
    }

    /// Asks `dev1` for a stream.
    pub(crate) async fn open(&self) -> Answer {
        self.open_with(&json!({ "name": "test" })).await
    }

    /// The same with a request of the test's own.
    pub(crate) async fn open_with(&self, body: &Value) -> Answer {
        self.request(Method::POST, "/v1/devices/dev1/streams", &body.to_string()).await
    }

    /// Whether `dev1` is shown as connected.
    pub(crate) async fn is_connected(&self) -> bool {
        let answer = self.request(Method::GET, "/v1/devices/dev1", "").await;
        answer.expect(200).json()["connected"].as_bool().unwrap()
    }

    pub(crate) async fn request(&self, method: Method, path: &str, body: &str) -> Answer {
        let service = Identity::Service("support".to_owned());
        let connection = ConnectionString { host: HOST.to_owned(), identity: service, key: key(2) };
        let token = connection.sign(clock::unix().plus(Duration::from_secs(3600)));
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", HOST)
            .header("authorization", token.expose_secret())
            .header("content-type", "application/json")
            .body(Full::new(Bytes::copy_from_slice(body.as_bytes())))
            .unwrap();
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(self.connect())).await.unwrap();
        let mut tasks = JoinSet::new();
        tasks.spawn(connection);
        let (parts, body) = sender.send_request(request).await.unwrap().into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        Answer { status: parts.status.as_u16(), headers: parts.headers, body }
    }

    /// What a metric counts.
    pub(crate) fn count(&self, name: &str) -> u64 {
        let text = self.metrics.render();
        let lines = text.lines().filter(|line| line.split([' ', '{']).next() == Some(name));
        lines.map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap()).sum()
    }

    /// Ends the replica in good order, with `grace` for its links.
    pub(crate) async fn drain(&self, grace: Duration) {
        self.lifecycle.draining().cancel();
        // What balancers need.
        sleep(Duration::from_secs(2)).await;
        self.lifecycle.closing().cancel();
        self.control.drain(grace).await;
        self.stop().await;
    }

    /// Ends the replica as a crash would: all connections break, and nothing is withdrawn.
    pub(crate) fn kill(&self, relay: &Relay) {
        self.mesh.replicas.lock().unwrap().remove(&self.owner.incarnation);
        relay.store.silence(&self.owner);
        self.lifecycle.closing().cancel();
        self.lifecycle.stopped().cancel();
    }

    async fn stop(&self) {
        self.lifecycle.closing().cancel();
        self.lifecycle.stopped().cancel();
        self.lifecycle.finished().await;
        self.mesh.replicas.lock().unwrap().remove(&self.owner.incarnation);
    }

    fn connect(&self) -> DuplexStream {
        let (near, far) = duplex(64 * 1024);
        let peer = Arc::new(Peer::new(SocketAddr::from(([127, 0, 0, 1], 1)), None));
        let (lifecycle, answers) = (self.lifecycle.clone(), Arc::clone(&self.answers));
        self.lifecycle.spawn(Span::none(), async move {
            let connection = Connection::memory(far);
            serve_http(connection, peer, Duration::from_secs(10), &lifecycle, &answers).await;
        });
        near
    }
}

impl Device {
    pub(crate) async fn next(&mut self) -> ToDevice {
        within("a message on the link", async {
            loop {
                match self.socket.next().await {
                    Some(Ok(Message::Text(text))) => return serde_json::from_str(&text).unwrap(),
                    Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                    end => panic!("the link ended: {end:?}"),
                }
            }
        })
        .await
    }

    pub(crate) async fn next_request(&mut self) -> Invitation {
        match self.next().await {
            ToDevice::Request(invitation) => invitation,
            other @ (ToDevice::Welcome { .. } | ToDevice::Goodbye(_) | ToDevice::Unknown) => {
                panic!("expected a request: {other:?}")
            }
        }
    }

    pub(crate) async fn next_goodbye(&mut self) -> Goodbye {
        match self.next().await {
            ToDevice::Goodbye(goodbye) => goodbye,
            other @ (ToDevice::Welcome { .. } | ToDevice::Request(_) | ToDevice::Unknown) => {
                panic!("expected a goodbye: {other:?}")
            }
        }
    }

    pub(crate) async fn accept(&mut self, request: RequestId) {
        let answer = json!({ "type": "accept", "request": request });
        self.socket.send(Message::text(answer.to_string())).await.unwrap();
    }

    /// Accepts the next request.
    pub(crate) async fn accept_next(&mut self) -> Invitation {
        let invitation = self.next_request().await;
        self.accept(invitation.request).await;
        invitation
    }

    pub(crate) async fn reject(&mut self, request: RequestId, reason: &str) {
        let answer = json!({ "type": "reject", "request": request, "reason": reason });
        self.socket.send(Message::text(answer.to_string())).await.unwrap();
    }

    /// Whether the relay has just told the device to open another link.
    pub(crate) async fn is_told_to_move(&mut self) -> bool {
        let Ok(message) = timeout(Duration::from_millis(1), self.next()).await else { return false };
        matches!(message, ToDevice::Goodbye(goodbye) if goodbye.reason == GoodbyeReason::Draining)
    }

    /// Reads on until the link is closed, and gives the code.
    pub(crate) async fn closed(mut self) -> Option<u16> {
        within("the end of the link", async {
            loop {
                match self.socket.next().await {
                    Some(Ok(Message::Close(frame))) => {
                        let code = frame.map(|CloseFrame { code, .. }| code.into());
                        while let Some(Ok(_)) = self.socket.next().await {}
                        return code;
                    }
                    Some(Ok(_)) => {}
                    Some(Err(_)) | None => return None,
                }
            }
        })
        .await
    }
}

/// What is wrong with the calls to a replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Nothing gets through.
    Unreachable,
    /// The next call gets through, but its answer does not.
    LosesAnswer,
}

/// The calls between the replicas.
#[derive(Default)]
pub(crate) struct Mesh {
    replicas: Mutex<HashMap<Incarnation, (Arc<Control>, Lifecycle)>>,
    faults: Mutex<HashMap<String, Fault>>,
    calls: Mutex<Vec<String>>,
}

impl Mesh {
    /// Breaks the calls to the replica `name`.
    pub(crate) fn break_calls(&self, name: &str, fault: Fault) {
        self.faults.lock().unwrap().insert(name.to_owned(), fault);
    }

    /// The calls since the last look, as `from -> to path`.
    pub(crate) fn calls(&self) -> Vec<String> {
        std::mem::take(&mut self.calls.lock().unwrap())
    }
}

struct Caller {
    from: String,
    mesh: Arc<Mesh>,
}

#[async_trait]
impl Calls for Caller {
    async fn call(
        &self,
        role: ServerRole,
        to: &Owner,
        path: &'static str,
        question: Vec<u8>,
        within: Duration,
    ) -> Result<Bytes, CallError> {
        self.mesh.calls.lock().unwrap().push(format!("{} -> {} {path}", self.from, to.name));
        if role == ServerRole::Edge {
            assert_eq!(path, END_STREAM);
            return Ok(Bytes::from_static(b"{}"));
        }
        let unreachable = || CallError::Unreachable("broken by the test".to_owned());
        let fault = self.mesh.faults.lock().unwrap().get(&to.name).copied();
        if fault == Some(Fault::Unreachable) {
            return Err(unreachable());
        }
        let called = self.mesh.replicas.lock().unwrap().get(&to.incarnation).cloned();
        let (control, lifecycle) = called.ok_or(CallError::Gone)?;
        let answer = tokio::select! {
            biased;
            () = lifecycle.stopped().cancelled() => return Err(unreachable()),
            answer = timeout(within, control.internal(path, &question)) => answer,
        };
        if fault == Some(Fault::LosesAnswer) {
            self.mesh.faults.lock().unwrap().remove(&to.name);
            return Err(unreachable());
        }
        match answer {
            Ok(Ok(answer)) => Ok(answer.into()),
            Ok(Err(problem)) => Err(CallError::Refused(Box::new(problem))),
            Err(_) => Err(CallError::TimedOut),
        }
    }
}

/// The memory store, which can be away and can be emptied, and counts the trips to it.
pub(crate) struct Store {
    memory: Mutex<Arc<MemoryRendezvous>>,
    away: AtomicBool,
    forgotten: Mutex<Vec<Owner>>,
    silenced: Mutex<Vec<Owner>>,
    trips: AtomicUsize,
    seen: Mutex<Vec<Owner>>,
}

impl Default for Store {
    fn default() -> Self {
        Self {
            memory: Mutex::new(Arc::new(MemoryRendezvous::alone(Timing::default()))),
            away: AtomicBool::default(),
            forgotten: Mutex::default(),
            silenced: Mutex::default(),
            trips: AtomicUsize::default(),
            seen: Mutex::default(),
        }
    }
}

impl Store {
    /// Loses everything, as a restart without persistence does.
    pub(crate) fn forget(&self) {
        *self.memory.lock().unwrap() = Arc::new(MemoryRendezvous::new(Timing::default()));
        self.forgotten.lock().unwrap().clone_from(&self.seen.lock().unwrap());
    }

    /// Answers nothing, or answers again.
    pub(crate) fn set_away(&self, away: bool) {
        self.away.store(away, Ordering::Relaxed);
    }

    /// The trips of replicas for streams and links since the last look; leases are not counted.
    pub(crate) fn trips(&self) -> usize {
        self.trips.swap(0, Ordering::Relaxed)
    }

    /// Takes nothing more from a process, which is dead.
    fn silence(&self, owner: &Owner) {
        self.silenced.lock().unwrap().push(owner.clone());
    }

    fn memory(&self) -> Arc<MemoryRendezvous> {
        Arc::clone(&self.memory.lock().unwrap())
    }

    fn trip(&self) -> Result<Arc<MemoryRendezvous>, StoreError> {
        self.trips.fetch_add(1, Ordering::Relaxed);
        self.background()
    }

    fn background(&self) -> Result<Arc<MemoryRendezvous>, StoreError> {
        if self.away.load(Ordering::Relaxed) {
            return Err(StoreError::new(StoreFailure::Unreachable, "away"));
        }
        Ok(self.memory())
    }
}

#[async_trait]
impl Rendezvous for Store {
    async fn create_stream(
        &self,
        record: StreamRecord,
        limits: StreamLimits,
    ) -> Result<Option<LinkRecord>, CreateError> {
        self.trip()?.create_stream(record, limits).await
    }

    async fn advance_stream(
        &self,
        stream: StreamId,
        next: StreamState,
    ) -> Result<Option<StreamRecord>, StoreError> {
        self.trip()?.advance_stream(stream, next).await
    }

    async fn stream(&self, stream: StreamId) -> Result<Option<StreamRecord>, StoreError> {
        self.trip()?.stream(stream).await
    }

    async fn streams(&self, after: Option<StreamId>, limit: usize) -> Result<Vec<StreamRecord>, StoreError> {
        self.trip()?.streams(after, limit).await
    }

    async fn restore_streams(&self, streams: &[StreamRecord]) -> Result<(), StoreError> {
        self.trip()?.restore_streams(streams).await
    }

    async fn expire(&self) -> Result<Vec<StreamRecord>, StoreError> {
        self.background()?.expire().await
    }

    async fn renew(&self, lease: &Lease) -> Result<Renewal, StoreError> {
        let memory = self.background()?;
        if self.silenced.lock().unwrap().contains(&lease.owner) {
            return Err(StoreError::new(StoreFailure::Unreachable, "silenced"));
        }
        if !self.seen.lock().unwrap().contains(&lease.owner) {
            self.seen.lock().unwrap().push(lease.owner.clone());
        }
        memory.renew(lease).await?;
        let mut forgotten = self.forgotten.lock().unwrap();
        let told = forgotten.iter().position(|owner| *owner == lease.owner);
        Ok(Renewal { forgotten: told.map(|index| forgotten.remove(index)).is_some() })
    }

    async fn withdraw(&self, role: ServerRole, owner: &Owner) -> Result<(), StoreError> {
        if self.silenced.lock().unwrap().contains(owner) {
            return Ok(());
        }
        self.background()?.withdraw(role, owner).await
    }

    async fn leases(&self, role: ServerRole) -> Result<Leases, StoreError> {
        self.background()?.leases(role).await
    }

    async fn link_up(&self, device: &DeviceAddress, replica: &Owner) -> Result<LinkUp, StoreError> {
        self.trip()?.link_up(device, replica).await
    }

    async fn link_up_late(
        &self,
        device: &DeviceAddress,
        replica: &Owner,
        assumed: u64,
    ) -> Result<Option<LinkUp>, StoreError> {
        self.trip()?.link_up_late(device, replica, assumed).await
    }

    async fn link_down(
        &self,
        device: &DeviceAddress,
        replica: &Owner,
        generation: u64,
    ) -> Result<(), StoreError> {
        let memory = self.trip()?;
        let link = memory.link(device).await?;
        if link.is_some_and(|link| self.silenced.lock().unwrap().contains(&link.replica)) {
            return Ok(());
        }
        memory.link_down(device, replica, generation).await
    }

    async fn link(&self, device: &DeviceAddress) -> Result<Option<LinkRecord>, StoreError> {
        self.trip()?.link(device).await
    }

    async fn await_link(
        &self,
        device: &DeviceAddress,
        replica: &Owner,
        wait: Duration,
    ) -> Result<Option<LinkRecord>, StoreError> {
        self.trip()?.await_link(device, replica, wait).await
    }

    async fn links(
        &self,
        after: Option<&DeviceAddress>,
        limit: usize,
    ) -> Result<Vec<(DeviceAddress, LinkRecord)>, StoreError> {
        self.trip()?.links(after, limit).await
    }

    async fn restore_links(
        &self,
        links: &[(DeviceAddress, LinkRecord)],
    ) -> Result<Vec<DeviceAddress>, StoreError> {
        self.trip()?.restore_links(links).await
    }
}

fn owner(name: &str) -> Owner {
    let incarnation = Incarnation::from_random(clock::random());
    Owner { name: name.to_owned(), incarnation, address: format!("{name}.test:1") }
}

fn credentials() -> Credentials {
    let json = json!({
        "devices": [],
        "group_keys": [key(1).to_base64().expose_secret()],
        "services": { "support": {
            "keys": [key(2).to_base64().expose_secret()], "allow": ["open", "list", "close"], "every_device": true,
        }},
    });
    Credentials::from_json(&json.to_string()).unwrap()
}

fn key(byte: u8) -> Key {
    Key::from_bytes(vec![byte; 32]).unwrap()
}

const HOST: &str = "relay.example";
