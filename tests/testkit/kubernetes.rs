use std::{
    collections::BTreeMap,
    fs,
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, Mutex},
    time::Duration,
};

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::{
    ServerConfig,
    pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer},
};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinSet,
    time::Instant,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

/// Stands in for the API server of Kubernetes: it lists and watches the `EndpointSlice`s of one namespace, and misbehaves when
/// told to, as no real one can be made to.
#[derive(Debug)]
pub struct ApiServer {
    address: SocketAddr,
    folder: TempDir,
    shared: Arc<Shared>,
    _tasks: JoinSet<()>,
}

/// How the server behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mood {
    /// As it should.
    Well,
    /// Every connection breaks, those that are open as well.
    Away,
    /// Requests are read, and never answered.
    Silent,
    /// Every request is answered with this status.
    Answers(u16),
    /// Watches are, lists are not.
    AnswersWatches(u16),
    /// Watches begin and tell that what they ask for is gone.
    GoneEvents,
    /// What it says is no JSON.
    Nonsense,
    /// What it says has no end.
    Endless,
    /// Watches end at once.
    ShortWatches,
    /// It knows nothing newer than what it knew when [`ApiServer::remember`] was called.
    Stale,
}

/// A request that came.
#[derive(Debug, Clone)]
pub struct Asked {
    /// Method, path and query.
    pub what: String,
    /// When.
    pub at: Instant,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// Counts changes of the state.
    changes: watch::Sender<u64>,
}

#[derive(Debug, Clone)]
struct State {
    mood: Mood,
    token: String,
    version: u64,
    slices: BTreeMap<String, Value>,
    events: Vec<(u64, Value)>,
    remembered: (u64, BTreeMap<String, Value>),
    /// How often all watches were cut.
    cuts: u64,
    asked: Vec<Asked>,
}

/// The namespace that it knows.
const NAMESPACE: &str = "relay";

/// The Service that it knows.
const SERVICE: &str = "edges";

/// What it tells clients to wait that get 429, in seconds.
const RETRY_AFTER: u64 = 1;

/// How often a watch tells how far it has come.
const BOOKMARK: Duration = Duration::from_millis(100);

impl ApiServer {
    /// A server without slices, and a service account for it.
    pub async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let tls = make_account(&folder);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let state = State {
            mood: Mood::Well,
            token: String::new(),
            version: 1,
            slices: BTreeMap::new(),
            events: Vec::new(),
            remembered: (1, BTreeMap::new()),
            cuts: 0,
            asked: Vec::new(),
        };
        let shared = Arc::new(Shared { state: Mutex::new(state), changes: watch::Sender::new(0) });
        let mut tasks = JoinSet::new();
        tasks.spawn(accept(listener, TlsAcceptor::from(tls), Arc::clone(&shared)));
        let server = Self { address, folder, shared, _tasks: tasks };
        server.give_token("first");
        server.take_token("first");
        server
    }

    /// The flags that lead a control plane here.
    pub fn flags(&self) -> [String; 6] {
        let folder = self.account().display().to_string();
        [
            "--kubernetes-edges-service",
            SERVICE,
            "--kubernetes-api",
            &self.url(),
            "--kubernetes-account-dir",
            &folder,
        ]
        .map(str::to_owned)
    }

    /// Where it is.
    pub fn url(&self) -> String {
        format!("https://localhost:{}", self.address.port())
    }

    /// The folder of the service account.
    pub fn account(&self) -> PathBuf {
        self.folder.path().to_owned()
    }

    /// The Service that it knows.
    pub fn service(&self) -> &'static str {
        SERVICE
    }

    /// Writes another token into the service account.
    pub fn give_token(&self, token: &str) {
        fs::write(self.folder.path().join("token"), token).unwrap();
    }

    /// From now on, takes this token alone.
    pub fn take_token(&self, token: &str) {
        self.change(|state| token.clone_into(&mut state.token));
    }

    /// Behaves like that from now on.
    pub fn set_mood(&self, mood: Mood) {
        self.change(|state| state.mood = mood);
    }

    /// Keeps what it knows now, for [`Mood::Stale`].
    pub fn remember(&self) {
        self.change(|state| state.remembered = (state.version, state.slices.clone()));
    }

    /// Breaks all watches off in the middle of a line.
    pub fn cut(&self) {
        self.change(|state| state.cuts += 1);
    }

    /// Makes a slice, or changes it: pods with their conditions.
    pub fn put(&self, slice: &str, pods: &[(&str, Value)]) {
        self.change(|state| {
            state.version += 1;
            let kind = if state.slices.contains_key(slice) { "MODIFIED" } else { "ADDED" };
            let object = slice_object(slice, state.version, pods);
            state.slices.insert(slice.to_owned(), object.clone());
            state.events.push((state.version, json!({ "type": kind, "object": object })));
        });
    }

    /// Takes a slice away.
    pub fn delete(&self, slice: &str) {
        self.change(|state| {
            state.version += 1;
            let mut object = state.slices.remove(slice).unwrap();
            object["metadata"]["resourceVersion"] = json!(state.version.to_string());
            state.events.push((state.version, json!({ "type": "DELETED", "object": object })));
        });
    }

    /// All requests so far.
    pub fn asked(&self) -> Vec<Asked> {
        self.shared.state.lock().unwrap().asked.clone()
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.shared.state.lock().unwrap());
        self.shared.changes.send_modify(|changes| *changes += 1);
    }
}

/// Conditions of a pod.
pub fn conditions(ready: bool, terminating: bool) -> Value {
    json!({ "ready": ready, "serving": true, "terminating": terminating })
}

fn slice_object(name: &str, version: u64, pods: &[(&str, Value)]) -> Value {
    let endpoint = |(number, (pod, conditions)): (usize, &(&str, Value))| {
        json!({
            "addresses": [format!("10.0.0.{}", number + 1)],
            "conditions": conditions,
            "targetRef": { "kind": "Pod", "namespace": NAMESPACE, "name": pod, "uid": pod },
            "nodeName": "node-0",
            "zone": "north",
        })
    };
    json!({
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": name,
            "namespace": NAMESPACE,
            "uid": name,
            "resourceVersion": version.to_string(),
            "labels": { "kubernetes.io/service-name": SERVICE },
        },
        "addressType": "IPv4",
        "endpoints": pods.iter().enumerate().map(endpoint).collect::<Vec<_>>(),
        "ports": [{ "name": "internal", "port": 8445, "protocol": "TCP" }],
    })
}

/// Writes CA and namespace of the service account, and gives the server's side.
fn make_account(folder: &TempDir) -> Arc<ServerConfig> {
    let mut parameters = CertificateParams::default();
    parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    let ca = parameters.self_signed(&key).unwrap();
    fs::write(folder.path().join("ca.crt"), ca.pem()).unwrap();
    fs::write(folder.path().join("namespace"), NAMESPACE).unwrap();
    let issuer = Issuer::new(parameters, key);
    let key = KeyPair::generate().unwrap();
    let certificate =
        CertificateParams::new(["localhost".to_owned()]).unwrap().signed_by(&key, &issuer).unwrap();
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder =
        ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    Arc::new(builder.with_no_client_auth().with_single_cert(vec![certificate.der().clone()], key).unwrap())
}

async fn accept(listener: TcpListener, tls: TlsAcceptor, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
    loop {
        let (socket, _) = listener.accept().await.unwrap();
        let (tls, shared) = (tls.clone(), Arc::clone(&shared));
        connections.spawn(async move {
            if shared.mood() != Mood::Away
                && let Ok(connection) = tls.accept(socket).await
            {
                let _ = Box::pin(Connection { io: connection, shared }.serve()).await;
            }
        });
        while connections.try_join_next().is_some() {}
    }
}

impl Shared {
    fn mood(&self) -> Mood {
        self.state.lock().unwrap().mood
    }
}

/// One request and its answer.
struct Connection {
    io: TlsStream<TcpStream>,
    shared: Arc<Shared>,
}

impl Connection {
    async fn serve(mut self) -> std::io::Result<()> {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(self.io.read_u8().await?);
        }
        let head = String::from_utf8(head).unwrap();
        let what = head.lines().next().unwrap().trim_end_matches(" HTTP/1.1").to_owned();
        let (is_watch, state) = (what.contains("watch=true"), {
            let mut state = self.shared.state.lock().unwrap();
            state.asked.push(Asked { what: what.clone(), at: Instant::now() });
            state.clone()
        });
        let authorization = format!("authorization: bearer {}", state.token);
        let path = format!("GET /apis/discovery.k8s.io/v1/namespaces/{NAMESPACE}/endpointslices?");
        let selector = format!("labelSelector=kubernetes.io%2Fservice-name%3D{SERVICE}");
        match state.mood {
            _ if !head.lines().any(|line| line.eq_ignore_ascii_case(&authorization)) => {
                self.refuse(401).await
            }
            _ if !what.starts_with(&path) || !what.contains(&selector) => self.refuse(403).await,
            Mood::Silent => self.away().await,
            Mood::Answers(status) => self.refuse(status).await,
            Mood::AnswersWatches(status) if is_watch => self.refuse(status).await,
            Mood::Nonsense => {
                self.begin(200, "").await?;
                self.send(b"{\"type\": \"ADDED\", \"object\": 5}\n").await?;
                self.end().await
            }
            Mood::Endless => {
                self.begin(200, "").await?;
                let part = vec![b' '; 64 * 1024];
                while self.shared.mood() == Mood::Endless {
                    self.send(&part).await?;
                }
                Ok(())
            }
            Mood::GoneEvents if is_watch => {
                self.begin(200, "").await?;
                let event = json!({ "type": "ERROR", "object": status(410) });
                self.send(format!("{event}\n").as_bytes()).await?;
                self.end().await
            }
            Mood::ShortWatches if is_watch => {
                self.begin(200, "").await?;
                self.end().await
            }
            Mood::Stale if is_watch && version_of(&what) > state.remembered.0 => self.refuse(504).await,
            Mood::Stale if !is_watch => self.list(&state.remembered).await,
            _ if is_watch => self.watch(version_of(&what), seconds_of(&what), state.cuts).await,
            _ => self.list(&(state.version, state.slices)).await,
        }
    }

    async fn list(&mut self, (version, slices): &(u64, BTreeMap<String, Value>)) -> std::io::Result<()> {
        let list = json!({
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSliceList",
            "metadata": { "resourceVersion": version.to_string() },
            "items": slices.values().collect::<Vec<_>>(),
        });
        self.begin(200, "").await?;
        self.send(list.to_string().as_bytes()).await?;
        self.end().await
    }

    async fn watch(&mut self, mut version: u64, seconds: u64, cuts: u64) -> std::io::Result<()> {
        let end = Instant::now() + Duration::from_secs(seconds);
        let mut changes = self.shared.changes.subscribe();
        self.begin(200, "").await?;
        while Instant::now() < end {
            let state = self.shared.state.lock().unwrap().clone();
            if state.mood == Mood::Away {
                return Ok(());
            }
            if state.cuts > cuts {
                return self.send(b"{\"type\": \"MODIFIED\", \"obj").await;
            }
            if state.mood != Mood::Stale {
                for (_, event) in state.events.iter().filter(|(of, _)| *of > version) {
                    self.send(format!("{event}\n").as_bytes()).await?;
                }
                version = state.version;
            }
            let bookmark = json!({ "type": "BOOKMARK", "object": {
                "apiVersion": "discovery.k8s.io/v1",
                "kind": "EndpointSlice",
                "metadata": { "resourceVersion": version.to_string() },
            }});
            self.send(format!("{bookmark}\n").as_bytes()).await?;
            let _ = tokio::time::timeout(BOOKMARK, changes.changed()).await;
        }
        self.end().await
    }

    /// Waits until the mood is another one.
    async fn away(&mut self) -> std::io::Result<()> {
        let mut changes = self.shared.changes.subscribe();
        while self.shared.mood() == Mood::Silent {
            let _ = changes.changed().await;
        }
        Ok(())
    }

    async fn refuse(&mut self, code: u16) -> std::io::Result<()> {
        let header = if code == 429 { format!("retry-after: {RETRY_AFTER}\r\n") } else { String::new() };
        self.begin(code, &header).await?;
        self.send(status(code).to_string().as_bytes()).await?;
        self.end().await
    }

    async fn begin(&mut self, status: u16, header: &str) -> std::io::Result<()> {
        let head = format!(
            "HTTP/1.1 {status} .\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n{header}\r\n"
        );
        self.io.write_all(head.as_bytes()).await
    }

    async fn send(&mut self, part: &[u8]) -> std::io::Result<()> {
        self.io.write_all(format!("{:x}\r\n", part.len()).as_bytes()).await?;
        self.io.write_all(part).await?;
        self.io.write_all(b"\r\n").await?;
        self.io.flush().await
    }

    async fn end(&mut self) -> std::io::Result<()> {
        self.io.write_all(b"0\r\n\r\n").await?;
        self.io.shutdown().await
    }
}

fn status(code: u16) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Status",
        "metadata": {},
        "status": "Failure",
        "message": format!("the stand-in says {code}"),
        "reason": "Test",
        "code": code,
    })
}

fn version_of(what: &str) -> u64 {
    parameter(what, "resourceVersion").unwrap_or(0)
}

fn seconds_of(what: &str) -> u64 {
    parameter(what, "timeoutSeconds").unwrap_or(30)
}

fn parameter(what: &str, name: &str) -> Option<u64> {
    let query = what.split_once('?')?.1;
    query.split('&').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('=')?.parse().ok())
}
