//! Real servers as stores, one of each kind for all tests of this process, each store with a prefix of its own.

use std::{
    process::Command,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU32, Ordering},
    },
};

use clap::Parser;
use midspan_platform::{
    lifecycle::Lifecycle,
    metrics::Metrics,
    rendezvous::{RedisRendezvous, RedisSettings, Rendezvous, ServerRole, StoreMetrics, Timing},
};
use tempfile::TempDir;
use testkit::{Process, RedisCluster, RedisSentinels, RedisServer, binary, until};

use super::Stores;

/// A single server.
pub(super) struct Single;

/// A single server that takes TLS and one user with a password.
pub(super) struct Tls;

/// A server that sentinels name.
pub(super) struct Behind;

/// Three servers.
pub(super) struct Cluster;

#[derive(Debug, Parser)]
struct Arguments {
    #[command(flatten)]
    redis: RedisSettings,
}

/// A process' view of a store.
pub(super) struct View {
    pub(super) store: Arc<RedisRendezvous>,
    pub(super) metrics: Metrics,
}

impl View {
    /// A process that has been given `arguments`.
    pub(super) fn open(arguments: &[String], timing: Timing) -> Self {
        let arguments = std::iter::once("test").chain(arguments.iter().map(String::as_str));
        let settings = Arguments::try_parse_from(arguments).unwrap().redis;
        let metrics = Metrics::new();
        let store = RedisRendezvous::start(&settings, timing, StoreMetrics::new(&metrics), &Lifecycle::new())
            .unwrap();
        Self { store, metrics }
    }

    /// How many round trips there have been of these kinds.
    pub(super) fn trips(&self, operations: &[&str]) -> i64 {
        let metrics = testkit::Metrics::parse(&self.metrics.render());
        let count = |name: &&str| metrics.count("midspan_store_operations_total", &[("operation", name)]);
        operations.iter().map(count).sum()
    }
}

/// Arguments, by words, and a prefix that nobody else has.
pub(super) fn arguments(words: &str) -> Vec<String> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let prefix = format!("test{}:", NEXT.fetch_add(1, Ordering::Relaxed));
    // A machine that is busy is no fault of the store.
    let patience =
        ["--redis-connect-timeout", "5s", "--redis-command-timeout", "5s", "--redis-prefix", &prefix];
    words.split(' ').chain(patience).map(str::to_owned).collect()
}

fn views<const N: usize>(words: &str, timing: Timing) -> [Arc<dyn Rendezvous>; N] {
    let arguments = arguments(words);
    std::array::from_fn(|_| View::open(&arguments, timing).store as _)
}

impl Stores for Single {
    async fn open<const N: usize>(&self, timing: Timing) -> [Arc<dyn Rendezvous>; N] {
        static SERVER: OnceLock<RedisServer> = OnceLock::new();
        views(&format!("--redis-url {}", SERVER.get_or_init(|| RedisServer::start(&[])).url()), timing)
    }
}

impl Stores for Tls {
    async fn open<const N: usize>(&self, timing: Timing) -> [Arc<dyn Rendezvous>; N] {
        static SERVER: OnceLock<TlsServer> = OnceLock::new();
        views(&SERVER.get_or_init(TlsServer::start).words(), timing)
    }
}

impl Stores for Behind {
    async fn open<const N: usize>(&self, timing: Timing) -> [Arc<dyn Rendezvous>; N] {
        static SERVERS: OnceLock<RedisSentinels> = OnceLock::new();
        let urls = SERVERS.get_or_init(RedisSentinels::start).urls();
        views(&format!("--redis-sentinel-master midspan --redis-url {urls}"), timing)
    }
}

impl Stores for Cluster {
    async fn open<const N: usize>(&self, timing: Timing) -> [Arc<dyn Rendezvous>; N] {
        static SERVERS: OnceLock<RedisCluster> = OnceLock::new();
        let urls = SERVERS.get_or_init(RedisCluster::start).urls();
        views(&format!("--redis-cluster --redis-url {urls}"), timing)
    }
}

/// A server with a certificate, and a user `relay` who may do what a relay needs, on its own keys.
pub(super) struct TlsServer {
    _server: RedisServer,
    folder: TempDir,
    port: u16,
}

impl TlsServer {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut ca = rcgen::CertificateParams::default();
        ca.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let ca_key = rcgen::KeyPair::generate().unwrap();
        let ca_certificate = ca.self_signed(&ca_key).unwrap();
        let key = rcgen::KeyPair::generate().unwrap();
        let issuer = rcgen::Issuer::new(ca, ca_key);
        let names = vec!["127.0.0.1".to_owned()];
        let certificate = rcgen::CertificateParams::new(names).unwrap().signed_by(&key, &issuer).unwrap();
        let file = |name: &str, text: &str| {
            let path = folder.path().join(name);
            std::fs::write(&path, text).unwrap();
            path.to_str().unwrap().to_owned()
        };
        let ca = file("ca.pem", &ca_certificate.pem());
        let certificate = file("server.pem", &certificate.pem());
        let key = file("server.key", &key.serialize_pem());
        file("password", "relay-secret\n");
        let users = file(
            "users.acl",
            &format!("user default on nopass ~* &* +@all\nuser relay on >relay-secret ~test* {COMMANDS}\n"),
        );
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let server = RedisServer::start(&[
            "--tls-port",
            &port.to_string(),
            "--tls-cert-file",
            &certificate,
            "--tls-key-file",
            &key,
            "--tls-ca-cert-file",
            &ca,
            "--tls-auth-clients",
            "no",
            "--aclfile",
            &users,
        ]);
        Self { _server: server, folder, port }
    }

    fn words(&self) -> String {
        let folder = self.folder.path().display();
        format!(
            "--redis-url rediss://127.0.0.1:{} --redis-ca-file {folder}/ca.pem --redis-username relay \
             --redis-password-file {folder}/password",
            self.port
        )
    }
}

/// What a relay's user must be allowed to do.
const COMMANDS: &str = "+@read +@write +@scripting +@connection +info +time -@dangerous +info";

#[tokio::test]
async fn a_stream_costs_at_most_six_round_trips() {
    let server = RedisServer::start(&[]);
    let view = View::open(&arguments(&format!("--redis-url {}", server.url())), Timing::default());
    // The first life also makes the scripts known. The slots of the service are settled in the background.
    let path = ["reserve", "create_stream", "advance_stream", "release"];
    super::a_life(&*view.store, 1).await;
    let before = view.trips(&path);
    for n in 2..12 {
        super::a_life(&*view.store, n).await;
    }
    assert_eq!(view.trips(&path) - before, 50, "two to begin, one when joined, two at the end");
}

#[test]
fn a_password_in_a_url_is_refused_and_not_repeated() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = midspand("edge", &folder);
    let output = command.args(["--redis-url", "redis://:hunter2@127.0.0.1"]).output().unwrap();
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(!output.status.success());
    assert!(said.contains("--redis-password-file") && !said.contains("hunter2"), "{said}");
}

#[tokio::test]
async fn the_roles_meet_in_the_store_and_leave_it_in_good_order() {
    let server = RedisServer::start(&[]);
    let arguments = arguments(&format!("--redis-url {}", server.url()));
    let view = View::open(&arguments, Timing::default());
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("credentials.json"), "{}").unwrap();
    let credentials = folder.path().join("credentials.json");
    let mut edge = midspand("edge", &folder);
    edge.args(["--edge-name", "edge-7", "--drain-delay", "0s"]);
    let mut control = midspand("control", &folder);
    control.args([
        "--control-name",
        "control-7",
        "--public-host",
        "h",
        "--edge-url",
        "https://h",
        "--drain-delay",
        "0s",
    ]);
    control.arg("--credentials-file").arg(credentials);
    let processes = [(ServerRole::Edge, edge), (ServerRole::Control, control)].map(|(role, mut command)| {
        command.args(&arguments);
        (role, Process::spawn(command))
    });
    for (role, mut process) in processes {
        let lease =
            until("its lease is there", async || view.store.leases(role).await.unwrap().alive.pop()).await;
        assert!(lease.accepts && lease.owner.name.ends_with("-7"), "{lease:?}");
        process.terminate();
        assert!(process.wait_exit().await.success(), "{}", process.stderr());
        assert_eq!(view.store.leases(role).await.unwrap().alive, [], "taken back, not run out");
    }
}

/// A role with what it needs, on ports that are free.
fn midspand(role: &str, folder: &TempDir) -> Command {
    let key = folder.path().join("ticket.key");
    std::fs::write(&key, "MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE=\n").unwrap();
    let mut command = binary("midspand");
    command.args([role, "--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0", "--insecure-plaintext"]);
    command.arg("--ticket-key-file").arg(key);
    command
}
