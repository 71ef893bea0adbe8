//! The relays, and pairs of connections through them.

use std::{
    net::{SocketAddr, TcpListener},
    path::Path,
    process::Command,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};

use crate::{
    connection::{Connection, Received, Scratch},
    fleet::Fleet,
    frames::Pattern,
    midspan::{Invitation, Midspan, Under},
    process::{Process, sibling},
    system,
    systems::{self, System},
    tls::Certificate,
    variants::Variant,
};

/// A relay that is up.
#[derive(Debug)]
pub(crate) struct Relay {
    pub(crate) variant: Variant,
    kind: Kind,
    tls: Option<Certificate>,
    pairs: u64,
}

#[derive(Debug)]
enum Kind {
    Direct(TcpListener),
    Tcp { process: Process, address: SocketAddr, listener: TcpListener },
    WebSocket { process: Process, address: SocketAddr },
    Midspan(Box<Midspan>),
    Fleet(Box<Fleet>),
    System(Box<System>),
}

/// Both ends of some streams: what the service sends on, and what the device receives from.
#[derive(Debug, Default)]
pub(crate) struct Pairs {
    pub(crate) senders: Vec<Connection>,
    pub(crate) receivers: Vec<Connection>,
}

/// Connections that are opened at the same time.
const BATCH: usize = 32;

impl Relay {
    /// Starts it. `name` tells its files in `folder` apart.
    pub(crate) fn start(
        variant: Variant,
        folder: &Path,
        name: &str,
        certificate: &Certificate,
    ) -> Result<Self> {
        let tls = variant.is_tls().then_some(certificate);
        let kind = Self::kind(variant, folder, name, tls)
            .with_context(|| format!("{} does not start", variant.name()))?;
        Ok(Self { variant, kind, tls: tls.cloned(), pairs: 0 })
    }

    /// Starts Midspan under something, with TLS if there is a certificate.
    pub(crate) fn start_midspan(
        folder: &Path,
        name: &str,
        tls: Option<&Certificate>,
        under: Under<'_>,
    ) -> Result<Self> {
        let variant = if tls.is_some() { Variant::MidspanTls } else { Variant::Midspan };
        let kind = Kind::Midspan(Box::new(Midspan::start(folder, name, tls, under)?));
        Ok(Self { variant, kind, tls: tls.cloned(), pairs: 0 })
    }

    /// Asks it to end, and waits until it has.
    pub(crate) fn stop(self) -> Result<()> {
        match self.kind {
            // What is left ends when it is dropped.
            Kind::Direct(_) | Kind::System(_) | Kind::Fleet(_) => Ok(()),
            Kind::Tcp { process, .. } | Kind::WebSocket { process, .. } => process.stop(),
            Kind::Midspan(midspan) => midspan.process.stop(),
        }
    }

    fn kind(variant: Variant, folder: &Path, name: &str, tls: Option<&Certificate>) -> Result<Kind> {
        let listener = || TcpListener::bind(("127.0.0.1", 0)).context("cannot listen");
        let system = |start| Ok(Kind::System(Box::new(System::start(variant, start, folder, name)?)));
        let mut command = Command::new(sibling("peer")?);
        if let (Some((edges, way)), Some(tls)) = (variant.edges(), tls) {
            return Ok(Kind::Fleet(Box::new(Fleet::start(edges, way, folder, name, tls)?)));
        }
        match variant {
            Variant::Direct | Variant::DirectTls => return Ok(Kind::Direct(listener()?)),
            Variant::Midspan | Variant::MidspanTls => {
                return Ok(Kind::Midspan(Box::new(Midspan::start(folder, name, tls, Under::Nothing)?)));
            }
            Variant::MidspanProxies => return system(systems::midspan),
            Variant::Wstunnel => return system(systems::wstunnel),
            Variant::Rathole => return system(systems::rathole),
            Variant::Bore => return system(systems::bore),
            Variant::Haproxy => return system(systems::haproxy),
            Variant::Nginx => return system(systems::nginx),
            Variant::TcpSplice | Variant::TcpCopy | Variant::TcpBidirectional => {
                let listener = listener()?;
                command.args([variant.name(), "--to", &listener.local_addr()?.to_string()]);
                let mut process = Process::start(command, folder, name)?;
                return Ok(Kind::Tcp { address: process.address()?, process, listener });
            }
            Variant::Tungstenite | Variant::TungsteniteTls => command.arg("tungstenite"),
            Variant::TungsteniteForward => command.args(["tungstenite", "--forward"]),
            Variant::Fastwebsockets => command.arg("fastwebsockets"),
            Variant::FastwebsocketsBatched => command.args(["fastwebsockets", "--batch"]),
            Variant::Edges2Straight
            | Variant::Edges2Passed
            | Variant::Edges2Forwarded
            | Variant::Edges4Straight
            | Variant::Edges4Passed
            | Variant::Edges4Forwarded => bail!("edges need a certificate"),
        };
        if let Some(tls) = tls {
            command.arg("--tls-certificate").arg(&tls.chain).arg("--tls-key").arg(&tls.key);
        }
        let mut process = Process::start(command, folder, name)?;
        Ok(Kind::WebSocket { address: process.address()?, process })
    }

    /// The relay's process, if there is exactly one.
    pub(crate) fn process(&self) -> Option<u32> {
        match &self.kind {
            Kind::Direct(_) | Kind::Fleet(_) => None,
            Kind::Tcp { process, .. } | Kind::WebSocket { process, .. } => Some(process.id()),
            Kind::Midspan(midspan) => Some(midspan.process.id()),
            Kind::System(system) => Some(system.process()),
        }
    }

    /// CPU time of the relay so far.
    pub(crate) fn cpu(&self) -> Result<Duration> {
        match &self.kind {
            Kind::Fleet(fleet) => fleet.cpu(),
            Kind::Direct(_)
            | Kind::Tcp { .. }
            | Kind::WebSocket { .. }
            | Kind::Midspan(_)
            | Kind::System(_) => self.process().map_or(Ok(Duration::ZERO), system::cpu),
        }
    }

    /// CPU time of what is between the relay and the ends so far.
    pub(crate) fn proxies_cpu(&self) -> Result<Duration> {
        if let Kind::System(system) = &self.kind { system.proxies_cpu() } else { Ok(Duration::ZERO) }
    }

    /// Opens streams. The sockets block.
    pub(crate) fn open(&mut self, count: usize) -> Result<Pairs> {
        let mut pairs = Pairs::default();
        for start in (0..count).step_by(BATCH) {
            self.open_batch(&mut pairs, BATCH.min(count - start))
                .with_context(|| format!("{} opens no streams", self.variant.name()))?;
        }
        Ok(pairs)
    }

    /// Opens streams that are known to work in both directions, with what they carry compared byte by byte.
    pub(crate) fn open_checked(&mut self, count: usize, payload: usize) -> Result<Pairs> {
        let mut pairs = self.open(count)?;
        let pattern = Pattern::single(payload);
        let masked = !self.variant.is_websocket();
        for (one, other) in pairs.senders.iter_mut().zip(&mut pairs.receivers) {
            check(one, other, &pattern, masked)
                .and_then(|()| check(other, one, &pattern, masked))
                .with_context(|| format!("{} does not carry what it is given", self.variant.name()))?;
        }
        Ok(pairs)
    }

    fn open_batch(&mut self, pairs: &mut Pairs, count: usize) -> Result<()> {
        let (first, tls) = (pairs.senders.len(), self.tls.clone());
        let legs: Vec<_> = (0..count).map(|_| self.legs()).collect::<Result<_>>()?;
        let client = tls.as_ref().map(|tls| &tls.client);
        let connect = |address| Connection::open(address, None);
        for legs in &legs {
            let (sender, receiver) = match (&self.kind, legs) {
                (Kind::Direct(listener), _) => {
                    let mut sender = Connection::open(listener.local_addr()?, client)?;
                    let mut receiver = Connection::accept(listener, tls.as_ref().map(|tls| &tls.server))?;
                    thread::scope(|scope| {
                        let accepting = scope.spawn(|| receiver.handshake());
                        sender.handshake()?;
                        accepting.join().map_err(|_| anyhow!("the handshake panicked"))?
                    })?;
                    (sender, receiver)
                }
                (Kind::Tcp { address, listener, .. }, _) => {
                    (connect(*address)?, Connection::of(listener.accept()?.0)?)
                }
                (Kind::System(system), _) => system.open()?,
                (_, Some(legs)) => {
                    let connect = |leg: &Leg| Connection::open_as(&leg.name, leg.address, client);
                    (connect(&legs[0])?, connect(&legs[1])?)
                }
                (_, None) => bail!("it takes no connections"),
            };
            pairs.senders.push(sender);
            pairs.receivers.push(receiver);
        }
        let (senders, receivers) = (&mut pairs.senders[first..], &mut pairs.receivers[first..]);
        for ((sender, receiver), legs) in senders.iter_mut().zip(receivers.iter_mut()).zip(&legs) {
            if let Some([service, device]) = legs {
                sender.request(&service.path, service.ticket.as_deref())?;
                receiver.request(&device.path, device.ticket.as_deref())?;
            }
        }
        let mut scratch = Scratch::new();
        if legs.iter().any(Option::is_some) {
            for leg in senders.iter_mut().chain(receivers.iter_mut()) {
                leg.answer(&mut scratch)?;
            }
        }
        Ok(())
    }

    /// Where the two legs of a new stream go: the service's, the device's. Nothing where they ask for no upgrade.
    fn legs(&mut self) -> Result<Option<[Leg; 2]>> {
        let local = |address, path, ticket| Leg { address, name: "localhost".to_owned(), path, ticket };
        Ok(match &mut self.kind {
            Kind::Direct(_) | Kind::Tcp { .. } | Kind::System(_) => None,
            Kind::WebSocket { address, .. } => {
                self.pairs += 1;
                Some(["a", "b"].map(|leg| local(*address, format!("/{}/{leg}", self.pairs), None)))
            }
            Kind::Midspan(midspan) => {
                let address = midspan.address;
                Some(midspan.invite()?.map(|leg| local(address, leg.path, Some(leg.ticket))))
            }
            Kind::Fleet(fleet) => Some(fleet.invite()?.map(|entry| {
                let Invitation { path, ticket } = entry.invitation;
                Leg { address: entry.address, name: entry.name, path, ticket: Some(ticket) }
            })),
        })
    }
}

struct Leg {
    address: SocketAddr,
    /// What TLS asks for.
    name: String,
    path: String,
    ticket: Option<String>,
}

impl Pairs {
    pub(crate) fn set_nonblocking(&mut self, nonblocking: bool) -> Result<()> {
        for connection in self.senders.iter_mut().chain(&mut self.receivers) {
            connection.set_nonblocking(nonblocking)?;
        }
        Ok(())
    }
}

/// Sends one frame and compares what arrives. A WebSocket relay has taken the mask off.
fn check(from: &mut Connection, to: &mut Connection, pattern: &Pattern, masked: bool) -> Result<()> {
    from.send_all(pattern.bytes())?;
    let header = pattern.frame() - pattern.payload() - if masked { 0 } else { 4 };
    let (mut arrived, mut scratch) = (Vec::new(), Scratch::new());
    while arrived.len() < header + pattern.payload() {
        let more = to.receive(&mut scratch, |bytes| {
            arrived.extend_from_slice(bytes);
            Ok(())
        })?;
        ensure!(more != Received::End, "the relay closed the stream");
    }
    let expected = if masked { pattern.bytes()[header..].to_vec() } else { pattern.plain() };
    ensure!(arrived[0] == 0x82, "not one whole binary frame");
    ensure!(arrived[header..] == expected, "the payload came out changed");
    Ok(())
}
