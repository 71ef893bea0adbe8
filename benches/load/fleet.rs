//! Several edges around one store, started as a user starts them.

use std::{
    ffi::OsString,
    fs,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::Path,
    process::Command,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};

use crate::{
    midspan::{Invitation, Midspan, Under},
    process::Process,
    system,
    tls::{Certificate, OWNER_DOMAIN},
    variants::Way,
};

/// After this time the edges know of each other.
const ACQUAINTED: Duration = Duration::from_secs(3);
/// A port that was free a moment ago may be taken.
const TRIES: usize = 3;

/// Edges that own a stream in turn, and are where legs come in in turn.
#[derive(Debug)]
pub(crate) struct Fleet {
    edges: Vec<Midspan>,
    way: Way,
    next: usize,
    _store: Redis,
}

/// Where a leg connects, and what name it asks for.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) address: SocketAddr,
    pub(crate) name: String,
    pub(crate) invitation: Invitation,
}

impl Fleet {
    pub(crate) fn start(
        edges: usize,
        way: Way,
        folder: &Path,
        name: &str,
        certificate: &Certificate,
    ) -> Result<Self> {
        let store = Redis::start(folder, name)?;
        internal_certificates(folder)?;
        let edges = (0..edges)
            .map(|number| {
                let mut flags = internal_flags(folder, "edge", &store);
                flags.extend(["--edge-name", &edge_name(number)].map(OsString::from));
                if way == Way::Passed {
                    let passing = ["--owner-domain", OWNER_DOMAIN, "--passed-listen", "127.0.0.1:0"];
                    flags.extend(passing.map(OsString::from));
                }
                let name = format!("{name}-{number}");
                Midspan::start_with(folder, &name, Some(certificate), Under::Nothing, &flags)
            })
            .collect::<Result<_>>()?;
        thread::sleep(ACQUAINTED);
        Ok(Self { edges, way, next: 0, _store: store })
    }

    /// CPU time of all edges so far.
    pub(crate) fn cpu(&self) -> Result<Duration> {
        self.edges.iter().map(|edge| system::cpu(edge.process.id())).sum()
    }

    /// Both legs of a new stream: service, device. Of as many streams as the cube of the number of edges, each edge owns as
    /// many, and to each come as many legs of each role, as if a balancer had spread them evenly.
    pub(crate) fn invite(&mut self) -> Result<[Entry; 2]> {
        let (number, count) = (self.next, self.edges.len());
        self.next += 1;
        let owner = number % count;
        let [service, device] = self.edges[owner].invite()?;
        let entry = |at: usize, invitation| {
            let (at, name) = match self.way {
                Way::Straight => (owner, edge_domain(owner)),
                Way::Passed => (at, edge_domain(owner)),
                Way::Forwarded => (at, "localhost".to_owned()),
            };
            Entry { address: self.edges[at].address, name, invitation }
        };
        Ok([entry((number / count) % count, service), entry((number / count / count) % count, device)])
    }
}

fn edge_name(number: usize) -> String {
    format!("edge-{number}")
}

fn edge_domain(number: usize) -> String {
    format!("{}.{OWNER_DOMAIN}", edge_name(number))
}

/// A store for the time of a measurement, which keeps nothing.
#[derive(Debug)]
pub(crate) struct Redis {
    pub(crate) process: Process,
    pub(crate) address: SocketAddr,
}

impl Redis {
    pub(crate) fn start(folder: &Path, name: &str) -> Result<Self> {
        let mut result = Self::start_once(folder, name);
        for _ in 1..TRIES {
            result = result.or_else(|_| Self::start_once(folder, name));
        }
        result.context("no redis-server starts; is it installed?")
    }

    fn start_once(folder: &Path, name: &str) -> Result<Self> {
        let address = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?;
        let mut command = Command::new("redis-server");
        command.args(["--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--port"]);
        command.arg(address.port().to_string());
        let mut process = Process::start(command, folder, &format!("{name}-redis"))?;
        process
            .find("word that it is ready", |log| log.contains("Ready to accept connections").then_some(()))?;
        Ok(Self { process, address })
    }
}

/// What every process of a relay of several needs.
pub(crate) fn internal_flags(folder: &Path, role: &str, store: &Redis) -> Vec<OsString> {
    let file = |name: &str| folder.join(name).into_os_string();
    vec![
        "--redis-url".into(),
        format!("redis://{}", store.address).into(),
        "--internal-listen".into(),
        "127.0.0.1:0".into(),
        "--internal-ca".into(),
        file("internal-ca.pem"),
        "--internal-certificate".into(),
        file(&format!("internal-{role}.pem")),
        "--internal-key".into(),
        file(&format!("internal-{role}.key")),
    ]
}

/// A CA for the processes, and a certificate for each role, unless they are there.
pub(crate) fn internal_certificates(folder: &Path) -> Result<()> {
    if folder.join("internal-ca.pem").exists() {
        return Ok(());
    }
    let mut parameters = CertificateParams::default();
    parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate()?;
    fs::write(folder.join("internal-ca.pem"), parameters.self_signed(&key)?.pem())?;
    let issuer = Issuer::new(parameters, key);
    for role in ["control", "edge"] {
        let key = KeyPair::generate()?;
        let certificate =
            CertificateParams::new([format!("{role}.midspan.internal")])?.signed_by(&key, &issuer)?;
        fs::write(folder.join(format!("internal-{role}.pem")), certificate.pem())?;
        fs::write(folder.join(format!("internal-{role}.key")), key.serialize_pem())?;
    }
    Ok(())
}
