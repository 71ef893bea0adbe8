//! Real servers as stores, one of each kind for all tests of this process, each store with a prefix of its own.

use std::sync::{
    Arc, OnceLock,
    atomic::{AtomicU32, Ordering},
};

use clap::Parser;
use midspan_platform::{
    lifecycle::Lifecycle,
    metrics::Metrics,
    rendezvous::{RedisRendezvous, RedisSettings, Rendezvous, StoreMetrics, Timing},
};
use tempfile::TempDir;
use testkit::{RedisCluster, RedisSentinels, RedisServer};

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
    static SERVER: OnceLock<RedisServer> = OnceLock::new();
    let server = SERVER.get_or_init(|| RedisServer::start(&[]));
    let arguments = arguments(&format!("--redis-url {}", server.url()));
    let view = View::open(&arguments, Timing::default());
    super::a_life(&*view.store, 1).await;
    let trips = |names: &[&str]| view.trips(names);
    // The first life also makes the scripts and the service known.
    let path = ["reserve", "create_stream", "advance_stream", "release"];
    let (before, slots) = (trips(&path), trips(&["settle_slots", "correct_slots", "count_services"]));
    for n in 2..12 {
        super::a_life(&*view.store, n).await;
    }
    assert_eq!(trips(&path) - before, 50, "two to begin, one when joined, two at the end");
    println!(
        "{} round trips for slots in ten lives",
        trips(&["settle_slots", "correct_slots", "count_services"]) - slots
    );
}
