mod devices;
mod entrances;
mod session;

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::ExitStatus,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use midspan_core::{
    connection_string::{ConnectionString, Identity},
    key::Key,
    ticket::TicketKeys,
};
use rcgen::{BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, Issuer, KeyPair};
use secrecy::ExposeSecret as _;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::time::Instant;

pub use self::{
    devices::Devices,
    entrances::{Entrances, Failure},
    session::{End, Seen, Session},
};
use crate::{
    DeviceLink, Leg, Metrics, Process, RedisServer, ServiceApi, Target, admin, binary, eventually, listening,
    relay::Handshake, trusting, until,
};

/// A relay of many processes around a Redis: control replicas and edges, each with ports of its own.
#[derive(Debug)]
pub struct Fleet {
    /// Where they meet.
    pub redis: RedisServer,
    /// The control replicas.
    pub controls: Vec<Member>,
    /// The edges.
    pub edges: Vec<Member>,
    folder: TempDir,
    group_key: Key,
    service: ConnectionString,
}

/// One process of a fleet.
#[derive(Debug)]
pub struct Member {
    /// Its name, the same after a restart.
    pub name: String,
    /// Its public port.
    pub target: Target,
    process: Process,
    admin: SocketAddr,
    arguments: Vec<String>,
    /// Whether a balancer sends anybody here.
    open: Arc<AtomicBool>,
}

/// Flags of a fleet's processes, beside those that they need.
#[derive(Debug, Clone, Copy, Default)]
pub struct Flags<'a> {
    /// For every process.
    pub all: &'a [&'a str],
    /// For control replicas.
    pub control: &'a [&'a str],
    /// For edges.
    pub edge: &'a [&'a str],
}

/// When a process was restarted.
#[derive(Debug, Clone, Copy)]
pub struct Rolled {
    /// When it was sent SIGTERM.
    pub told: Instant,
    /// When the next one was ready.
    pub back: Instant,
}

const HOST: &str = "localhost";
const OWNER_DOMAIN: &str = "streams.example";
const TICKET_KEY: u8 = 3;

impl Fleet {
    /// Starts everything, and waits until each process knows of the others.
    pub async fn start(controls: usize, edges: usize) -> Self {
        Self::with(controls, edges, &[]).await
    }

    /// The same with flags more for every process.
    pub async fn with(controls: usize, edges: usize, all: &[&str]) -> Self {
        Self::with_flags(controls, edges, Flags { all, ..Flags::default() }).await
    }

    /// The same where each edge has a name of its own, `{edge}.streams.example`, and passes on what is for another one. With
    /// flags more for the edges.
    pub async fn with_names(edges: usize, arguments: &[&str]) -> Self {
        let names = ["--owner-domain", OWNER_DOMAIN, "--passed-listen", "127.0.0.1:0"];
        let url = format!("https://{{owner}}.{OWNER_DOMAIN}");
        let edge = [&names, arguments].concat();
        let flags = Flags { control: &["--edge-url", &url], edge: &edge, ..Flags::default() };
        Self::with_flags(1, edges, flags).await
    }

    /// The same with flags for each role.
    pub async fn with_flags(controls: usize, edges: usize, flags: Flags<'_>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let redis = RedisServer::start(&[]);
        let (group_key, service_key) = (key(1), key(2));
        let credentials = json!({
            "group_keys": [group_key.to_base64().expose_secret()],
            "services": { "service": {
                "keys": [service_key.to_base64().expose_secret()],
                "allow": ["open", "list", "close"],
                "every_device": true,
            }},
        });
        fs::write(folder.path().join("credentials.json"), credentials.to_string()).unwrap();
        fs::write(folder.path().join("ticket.key"), key(TICKET_KEY).to_base64().expose_secret()).unwrap();
        make_certificates(folder.path());
        let service = ConnectionString {
            host: HOST.to_owned(),
            identity: Identity::Service("service".to_owned()),
            key: service_key,
        };
        let mut fleet = Self { redis, controls: Vec::new(), edges: Vec::new(), folder, group_key, service };
        for number in 0..edges {
            let member = fleet.member("edge", number, &[flags.all, flags.edge].concat()).await;
            fleet.edges.push(member);
        }
        for number in 0..controls {
            let member = fleet.member("control", number, &[flags.all, flags.control].concat()).await;
            fleet.controls.push(member);
        }
        fleet
    }

    /// One control replica more, with flags of its own.
    pub async fn add_control(&mut self, arguments: &[&str]) {
        let member = self.member("control", self.controls.len(), arguments).await;
        self.controls.push(member);
    }

    async fn member(&self, role: &str, number: usize, more: &[&str]) -> Member {
        let file = |name: &str| self.folder.path().join(name).to_str().unwrap().to_owned();
        let name = format!("{role}-{number}");
        let activity = file(&format!("{name}.activity.jsonl"));
        let (certificate, certificate_key) = (file(&format!("{role}.pem")), file(&format!("{role}.key")));
        let (public, public_key, ca, tickets) =
            (file("public.pem"), file("public.key"), file("ca.pem"), file("ticket.key"));
        let redis = self.redis.url();
        let mut arguments: Vec<String> = [
            role,
            "--internal-listen",
            "127.0.0.1:0",
            "--internal-ca",
            &ca,
            "--internal-certificate",
            &certificate,
            "--internal-key",
            &certificate_key,
            "--tls-certificate",
            &public,
            "--tls-key",
            &public_key,
            "--ticket-key-file",
            &tickets,
            "--redis-url",
            &redis,
            "--activity-log",
            &activity,
            "--log-format",
            "json",
            "--log-level",
            "debug",
        ]
        .map(str::to_owned)
        .into();
        match role {
            "control" => {
                let credentials = file("credentials.json");
                let flags = [
                    "--control-name",
                    &name,
                    "--credentials-file",
                    &credentials,
                    "--public-host",
                    HOST,
                    "--limit-initiations-per-second",
                    "10000",
                ];
                arguments.extend(flags.map(str::to_owned));
                if !more.contains(&"--edge-url") {
                    arguments.extend(["--edge-url", "https://localhost"].map(str::to_owned));
                }
            }
            _ => arguments.extend(["--edge-name", &name].map(str::to_owned)),
        }
        if !more.contains(&"--drain-delay") {
            arguments.extend(["--drain-delay", "0s"].map(str::to_owned));
        }
        arguments.extend(more.iter().map(|&flag| flag.to_owned()));
        let tls = trusting(&self.ca_file());
        let any = "127.0.0.1:0";
        Member::start(name, arguments, [any, any], tls, Arc::new(AtomicBool::new(true))).await
    }

    /// The keys that tickets are signed with.
    pub fn ticket_keys() -> TicketKeys {
        TicketKeys::new(&key(TICKET_KEY), None).unwrap()
    }

    /// What clients see of it: they come in at any process that is open to them.
    pub fn entrances(&self) -> Arc<Entrances> {
        let tickets = Self::ticket_keys();
        Arc::new(Entrances::new(&self.controls, &self.edges, &self.service, tickets))
    }

    /// A service that calls one of the control replicas.
    pub fn service(&self, control: usize) -> ServiceApi {
        ServiceApi::new(self.controls[control].target.clone(), &self.service)
    }

    /// The connection string of a device.
    pub fn device_connection(&self, device: &str) -> ConnectionString {
        let address = device.parse().unwrap();
        let key = self.group_key.derive(&address);
        ConnectionString { host: HOST.to_owned(), identity: Identity::Device(address), key }
    }

    /// The connection string of the service.
    pub fn service_connection(&self) -> &ConnectionString {
        &self.service
    }

    /// The key from which devices' keys are derived.
    pub fn group_key(&self) -> &Key {
        &self.group_key
    }

    /// The CA of everything here.
    pub fn ca_file(&self) -> PathBuf {
        self.folder.path().join("ca.pem")
    }

    /// The certificate of the public ports, and its key. It is good for `localhost` and `streams.localhost`.
    pub fn public_files(&self) -> [PathBuf; 2] {
        ["public.pem", "public.key"].map(|name| self.folder.path().join(name))
    }

    /// A link of `device` with one of the control replicas.
    pub async fn device(&self, device: &str, control: usize) -> DeviceLink {
        DeviceLink::connect(&self.controls[control].target, &self.device_connection(device)).await
    }

    /// Lets a service ask one of the control replicas, and the device that holds `link` accept.
    pub async fn handshake(&self, control: usize, device: &str, link: &mut DeviceLink) -> Handshake {
        let body = json!({ "name": "test", "connect_timeout_seconds": 5 });
        let service = self.service(control);
        let (answer, invitation) = tokio::join!(service.open_with(device, body), async {
            let invitation = link.next_request().await;
            link.accept(invitation.request).await;
            invitation
        });
        let grant = answer.grant();
        assert_eq!(grant.stream, invitation.stream);
        Handshake { grant, invitation }
    }

    /// Opens both legs of a stream, the service's at one edge, the device's at another: service, device.
    pub async fn legs(&self, handshake: &Handshake, [service, device]: [usize; 2]) -> (Leg, Leg) {
        let (grant, invitation) = (&handshake.grant, &handshake.invitation);
        tokio::join!(
            Leg::open_patiently(&self.edges[service].target, &grant.url, grant.ticket.expose_secret()),
            Leg::open_patiently(
                &self.edges[device].target,
                &invitation.url,
                invitation.ticket.expose_secret()
            )
        )
    }

    /// The records of all activity logs.
    pub fn activity(&self) -> Vec<Value> {
        let members = self.controls.iter().chain(&self.edges);
        let logs = members.map(|member| {
            fs::read_to_string(self.folder.path().join(format!("{}.activity.jsonl", member.name)))
                .unwrap_or_default()
        });
        logs.flat_map(|log| log.lines().map(|line| serde_json::from_str(line).unwrap()).collect::<Vec<_>>())
            .collect()
    }

    /// The edge that owns a stream, by its number.
    pub async fn owner(&self, stream: midspan_core::id::StreamId) -> usize {
        let record = until("the record of the stream", || async {
            let answer = self.service(0).get(&format!("/v1/streams/{stream}")).await;
            (answer.status == 200).then(|| answer.json())
        })
        .await;
        let name = record["owner"]["name"].as_str().unwrap();
        self.edges.iter().position(|edge| edge.name == name).unwrap()
    }
}

impl Member {
    async fn start(
        name: String,
        arguments: Vec<String>,
        [listen, admin_listen]: [&str; 2],
        tls: Arc<rustls::ClientConfig>,
        open: Arc<AtomicBool>,
    ) -> Self {
        let mut command = binary("midspand");
        command.args(&arguments).args(["--listen", listen, "--admin-listen", admin_listen]);
        let process = Process::spawn(command);
        let (address, admin) = (listening(&process, "public").await, listening(&process, "admin").await);
        let target = Target { address, authority: HOST.to_owned(), tls };
        Self { name, target, process, admin, arguments, open }
    }

    /// Its public port, for a client that asks for the host of `url`.
    pub fn target_for(&self, url: &str) -> Target {
        let host = url.split(['/', ':']).find(|part| part.contains('.')).expect("a URL with a host");
        Target { authority: host.to_owned(), ..self.target.clone() }
    }

    /// Where it takes connections that other edges pass on.
    pub async fn passed_address(&self) -> SocketAddr {
        listening(&self.process, "passed").await
    }

    /// Everything on standard error so far.
    pub fn log(&self) -> String {
        self.process.stderr()
    }

    /// Its admin port.
    pub fn admin(&self) -> SocketAddr {
        self.admin
    }

    /// What it measures now.
    pub async fn metrics(&self) -> Metrics {
        Metrics::parse(&admin(self.admin, "/metrics").await.expect(200).text())
    }

    /// Waits until a metric has a value.
    pub async fn counts(&self, name: &str, labels: &[(&str, &str)], value: i64) {
        let what = format!("{}: {name}{labels:?} = {value}", self.name);
        eventually(&what, || async { self.metrics().await.count(name, labels) == value }).await;
    }

    /// Sends SIGTERM.
    pub fn terminate(&self) {
        self.process.terminate();
    }

    /// Sends SIGKILL, and waits until the process is gone.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// Waits until it ends by itself.
    pub async fn wait_exit(&mut self) -> ExitStatus {
        self.process.wait_exit().await
    }

    /// Starts it again after its end, under the same name and on the same ports.
    pub async fn restart(&mut self) {
        let (name, arguments) = (self.name.clone(), self.arguments.clone());
        let (listen, admin) = (self.target.address.to_string(), self.admin.to_string());
        let (tls, open) = (Arc::clone(&self.target.tls), Arc::clone(&self.open));
        *self = Self::start(name, arguments, [&listen, &admin], tls, open).await;
    }

    /// Restarts it as a roll does: SIGTERM, its own end, a new process. Nobody new is sent to it while it says that it is not ready.
    pub async fn roll(&mut self) -> Rolled {
        let told = Instant::now();
        self.terminate();
        eventually("a process that was told to end is not ready", || async { !self.is_ready().await }).await;
        self.open.store(false, Ordering::Relaxed);
        let status = self.wait_exit().await;
        assert!(status.success(), "{}: {status}", self.name);
        self.restart().await;
        eventually("a process that was started is ready", || async { self.is_ready().await }).await;
        self.open.store(true, Ordering::Relaxed);
        Rolled { told, back: Instant::now() }
    }

    async fn is_ready(&self) -> bool {
        admin(self.admin, "/readyz").await.status == 200
    }
}

fn key(number: u8) -> Key {
    Key::from_bytes(vec![number; 32]).unwrap()
}

/// One CA for the public port and for the processes among themselves.
fn make_certificates(folder: &Path) {
    let mut parameters = CertificateParams::default();
    parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    let certificate = parameters.self_signed(&key).unwrap();
    fs::write(folder.join("ca.pem"), certificate.pem()).unwrap();
    let issuer = Issuer::new(parameters, key);
    let every_edge = format!("*.{OWNER_DOMAIN}");
    let certificates: [(&str, &[&str]); 3] = [
        ("public", &[HOST, "streams.localhost", &every_edge]),
        ("control", &["control.midspan.internal"]),
        ("edge", &["edge.midspan.internal"]),
    ];
    for (file, names) in certificates {
        let key = KeyPair::generate().unwrap();
        let names: Vec<_> = names.iter().map(|&name| name.to_owned()).collect();
        let mut parameters = CertificateParams::new(names).unwrap();
        // OpenSSL takes a certificate whose subject is its issuer's for one that has signed itself.
        parameters.distinguished_name = DistinguishedName::new();
        parameters.distinguished_name.push(DnType::CommonName, file);
        let certificate = parameters.signed_by(&key, &issuer).unwrap();
        fs::write(folder.join(format!("{file}.pem")), certificate.pem()).unwrap();
        fs::write(folder.join(format!("{file}.key")), key.serialize_pem()).unwrap();
    }
}
