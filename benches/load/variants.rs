//! What is measured: the relays, and pairs of connections through them.

use std::{
    net::{SocketAddr, TcpListener},
    path::Path,
    process::Command,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use clap::{ValueEnum, builder::PossibleValue};
use rustls::ClientConfig;
use serde::{Deserialize, Serialize};

use crate::{
    connection::{Connection, Received, Scratch},
    frames::Pattern,
    midspan::{Midspan, Under},
    process::{Process, sibling},
    system,
    tls::Certificate,
};

/// One relay in one manner of working.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Variant {
    Direct,
    TcpSplice,
    TcpCopy,
    TcpBidirectional,
    Tungstenite,
    TungsteniteForward,
    Fastwebsockets,
    FastwebsocketsBatched,
    Midspan,
    TungsteniteTls,
    MidspanTls,
}

impl Variant {
    pub(crate) const ALL: [Self; 11] = [
        Self::Direct,
        Self::TcpSplice,
        Self::TcpCopy,
        Self::TcpBidirectional,
        Self::Tungstenite,
        Self::TungsteniteForward,
        Self::Fastwebsockets,
        Self::FastwebsocketsBatched,
        Self::Midspan,
        Self::TungsteniteTls,
        Self::MidspanTls,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::TcpSplice => "tcp-splice",
            Self::TcpCopy => "tcp-copy",
            Self::TcpBidirectional => "tcp-bidirectional",
            Self::Tungstenite => "tungstenite",
            Self::TungsteniteForward => "tungstenite-forward",
            Self::Fastwebsockets => "fastwebsockets",
            Self::FastwebsocketsBatched => "fastwebsockets-batched",
            Self::Midspan => "midspan",
            Self::TungsteniteTls => "tungstenite-tls",
            Self::MidspanTls => "midspan-tls",
        }
    }

    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::Direct => "no relay (direct loopback)",
            Self::TcpSplice => "TCP, splice(2)",
            Self::TcpCopy => "TCP, read and write, shared 1 MiB",
            Self::TcpBidirectional => "TCP, copy_bidirectional 8 KiB",
            Self::Tungstenite => "tokio-tungstenite, message by message",
            Self::TungsteniteForward => "tokio-tungstenite, forward()",
            Self::Fastwebsockets => "fastwebsockets, frame by frame",
            Self::FastwebsocketsBatched => "fastwebsockets, output collected",
            Self::Midspan => "Midspan",
            Self::TungsteniteTls => "TLS: tokio-tungstenite, message by message",
            Self::MidspanTls => "TLS: Midspan",
        }
    }

    /// Whether there is a process between the connections.
    pub(crate) fn has_relay(self) -> bool {
        self != Self::Direct
    }

    pub(crate) fn is_ours(self) -> bool {
        matches!(self, Self::Midspan | Self::MidspanTls)
    }

    pub(crate) fn is_tls(self) -> bool {
        matches!(self, Self::TungsteniteTls | Self::MidspanTls)
    }

    /// Whether both legs connect to the relay and ask for WebSocket.
    pub(crate) fn is_websocket(self) -> bool {
        !matches!(self, Self::Direct | Self::TcpSplice | Self::TcpCopy | Self::TcpBidirectional)
    }
}

impl std::fmt::Display for Variant {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl ValueEnum for Variant {
    fn value_variants<'a>() -> &'a [Self] {
        &Self::ALL
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        Some(PossibleValue::new(self.name()).help(self.title()))
    }
}

/// A relay that is up.
#[derive(Debug)]
pub(crate) struct Relay {
    pub(crate) variant: Variant,
    kind: Kind,
    tls: Option<Arc<ClientConfig>>,
    pairs: u64,
}

#[derive(Debug)]
enum Kind {
    Direct(TcpListener),
    Tcp { process: Process, address: SocketAddr, listener: TcpListener },
    WebSocket { process: Process, address: SocketAddr },
    Midspan(Box<Midspan>),
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
        Ok(Self { variant, kind, tls: tls.map(|tls| Arc::clone(&tls.client)), pairs: 0 })
    }

    /// Starts Midspan without TLS under something.
    pub(crate) fn start_midspan(folder: &Path, name: &str, under: Under<'_>) -> Result<Self> {
        let kind = Kind::Midspan(Box::new(Midspan::start(folder, name, None, under)?));
        Ok(Self { variant: Variant::Midspan, kind, tls: None, pairs: 0 })
    }

    /// Asks it to end, and waits until it has.
    pub(crate) fn stop(self) -> Result<()> {
        match self.kind {
            Kind::Direct(_) => Ok(()),
            Kind::Tcp { process, .. } | Kind::WebSocket { process, .. } => process.stop(),
            Kind::Midspan(midspan) => midspan.process.stop(),
        }
    }

    fn kind(variant: Variant, folder: &Path, name: &str, tls: Option<&Certificate>) -> Result<Kind> {
        let listener = || TcpListener::bind(("127.0.0.1", 0)).context("cannot listen");
        let mut command = Command::new(sibling("peer")?);
        match variant {
            Variant::Direct => return Ok(Kind::Direct(listener()?)),
            Variant::Midspan | Variant::MidspanTls => {
                return Ok(Kind::Midspan(Box::new(Midspan::start(folder, name, tls, Under::Nothing)?)));
            }
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
        };
        if let Some(tls) = tls {
            command.arg("--tls-certificate").arg(&tls.chain).arg("--tls-key").arg(&tls.key);
        }
        let mut process = Process::start(command, folder, name)?;
        Ok(Kind::WebSocket { address: process.address()?, process })
    }

    /// The relay's process.
    pub(crate) fn process(&self) -> Option<u32> {
        match &self.kind {
            Kind::Direct(_) => None,
            Kind::Tcp { process, .. } | Kind::WebSocket { process, .. } => Some(process.id()),
            Kind::Midspan(midspan) => Some(midspan.process.id()),
        }
    }

    /// CPU time of the relay so far.
    pub(crate) fn cpu(&self) -> Result<Duration> {
        self.process().map_or(Ok(Duration::ZERO), system::cpu)
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
        let invitations = self.invitations(count)?;
        let (tls, mut scratch) = (self.tls.as_ref(), Scratch::new());
        let (first, address) = (
            pairs.senders.len(),
            match &self.kind {
                Kind::Direct(listener) => listener.local_addr()?,
                Kind::Tcp { address, .. } | Kind::WebSocket { address, .. } => *address,
                Kind::Midspan(midspan) => midspan.address,
            },
        );
        for _ in 0..count {
            pairs.senders.push(Connection::open(address, tls)?);
            pairs.receivers.push(match &self.kind {
                Kind::Direct(listener) | Kind::Tcp { listener, .. } => Connection::of(listener.accept()?.0)?,
                Kind::WebSocket { .. } | Kind::Midspan(_) => Connection::open(address, tls)?,
            });
        }
        let (senders, receivers) = (&mut pairs.senders[first..], &mut pairs.receivers[first..]);
        for ((sender, receiver), [service, device]) in
            senders.iter_mut().zip(receivers.iter_mut()).zip(&invitations)
        {
            sender.request(&service.path, service.ticket.as_deref())?;
            receiver.request(&device.path, device.ticket.as_deref())?;
        }
        if !invitations.is_empty() {
            for leg in senders.iter_mut().chain(receivers.iter_mut()) {
                leg.answer(&mut scratch)?;
            }
        }
        Ok(())
    }

    fn invitations(&mut self, count: usize) -> Result<Vec<[Leg; 2]>> {
        match &self.kind {
            Kind::Direct(_) | Kind::Tcp { .. } => Ok(Vec::new()),
            Kind::WebSocket { .. } => Ok((0..count)
                .map(|_| {
                    self.pairs += 1;
                    ["a", "b"].map(|leg| Leg { path: format!("/{}/{leg}", self.pairs), ticket: None })
                })
                .collect()),
            Kind::Midspan(midspan) => (0..count)
                .map(|_| {
                    let legs = midspan.invite()?;
                    Ok(legs.map(|leg| Leg { path: leg.path, ticket: Some(leg.ticket) }))
                })
                .collect(),
        }
    }
}

struct Leg {
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
