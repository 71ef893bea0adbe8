//! Connections for another edge, which are passed on below TLS by the name that they ask for.
//!
//! A client that dials `edge-3.streams.example` means the edge `edge-3`, wherever a balancer has sent its connection. Nobody
//! but that edge opens the TLS session: bytes pass through here as they are. Only edges that are known by their leases get
//! connections; what is for anybody else is taken here, and the ticket says where the leg goes.

mod splice;

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use async_trait::async_trait;
use clap::Args;
use futures_util::future::join_all;
use midspan_core::{
    close::CloseReason,
    id::{Incarnation, Role},
    internal::{self, END_PASSED, EndPassed},
    owner_name::{NotALabel, OwnerDomain},
    passed,
    proxy::Addresses,
    ticket::Owner,
};
use midspan_platform::{
    clock,
    internal::{Calls as _, advertised},
    listener::Passer,
    metrics::Counted,
    rendezvous::{Lease, ServerRole, Timing},
};
use tokio::{
    io::AsyncWriteExt as _,
    net::TcpStream,
    time::{error::Elapsed, timeout},
};
use tracing::{debug, warn};

use crate::edge::Edge;

/// How connections reach the edge that they are for, below TLS.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Straight to the owner")]
pub struct PassingSettings {
    /// The domain below which each edge has its own name, such as `streams.example`: connections for another edge are passed on to it below TLS
    #[arg(long, env = "MIDSPAN_OWNER_DOMAIN", value_name = "DOMAIN")]
    pub owner_domain: Option<OwnerDomain>,
    /// Address for connections that other edges pass on
    #[arg(long, env = "MIDSPAN_PASSED_LISTEN", value_name = "ADDRESS")]
    pub passed_listen: Option<SocketAddr>,
    /// Where other edges find that address, `host:port`; the address itself if it names one
    #[arg(long, env = "MIDSPAN_PASSED_ADDRESS", value_name = "HOST:PORT", requires = "passed_listen")]
    pub passed_address: Option<String>,
}

/// What an edge does with connections that are for another one.
#[derive(Debug, Clone, Default)]
pub struct Passing {
    /// The domain below which each edge has its own name; without one, all connections are taken.
    pub domain: Option<OwnerDomain>,
    /// Where other edges find this one, `host:port`.
    pub address: Option<String>,
}

impl PassingSettings {
    /// The public name of the edge `name`, when each has its own. Fails when that is no name for it.
    pub fn public_name(&self, name: &str) -> Result<Option<String>, NotALabel> {
        self.owner_domain.as_ref().map(|domain| domain.name_of(name)).transpose()
    }

    /// Where others find the listener at `address`, `host:port`.
    pub fn address(&self, address: SocketAddr) -> anyhow::Result<String> {
        advertised("--passed-address", self.passed_address.as_deref(), address)
    }
}

/// Where connections for other edges go, by the edges' names.
pub(crate) type Ways = ArcSwap<HashMap<String, Way>>;

/// An edge that takes connections from others.
#[derive(Debug)]
pub(crate) struct Way {
    owner: Owner,
    /// Where it takes them, `host:port`.
    address: String,
}

/// The edges that pass the legs of one stream on, as far as that is needed to know them again: half of each one's
/// incarnation, and 0 for none.
#[derive(Debug, Default)]
pub(crate) struct Passers([AtomicU64; 2]);

impl Passers {
    pub(crate) fn set(&self, role: Role, passer: Incarnation) {
        let of_role = match role {
            Role::Service => &self.0[0],
            Role::Device => &self.0[1],
        };
        of_role.store(half(passer), Ordering::Relaxed);
    }

    pub(crate) fn has(&self, passer: Incarnation) -> bool {
        self.0.iter().any(|known| known.load(Ordering::Relaxed) == half(passer))
    }
}

#[expect(clippy::cast_possible_truncation, reason = "half of the random bits tell two edges apart")]
fn half(incarnation: Incarnation) -> u64 {
    incarnation.as_u128() as u64
}

/// How long an edge may take to take a connection.
const CONNECT_LIMIT: Duration = Duration::from_secs(2);

/// How long an edge may take to tell the legs of its streams.
const END_LIMIT: Duration = Duration::from_secs(10);

/// How long the store may take to say which edges there are.
const STORE_LIMIT: Duration = Duration::from_secs(3);

/// What came of a connection for another edge.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Passed {
    /// Both ends have ended it.
    Ended,
    /// It broke, or an end was silent or late.
    Broken,
    /// The edge could not be reached in time. It was taken here.
    Unreachable,
}

impl Passed {
    pub(crate) const ALL: [Self; 3] = [Self::Ended, Self::Broken, Self::Unreachable];

    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Ended => "ended",
            Self::Broken => "broken",
            Self::Unreachable => "unreachable",
        }
    }
}

impl Edge {
    /// Keeps up with who is there, as long as the process runs.
    pub(crate) async fn watch_ways(self: Arc<Self>) {
        let period = Timing::default().renewal;
        loop {
            // While the store is away the ways of before stay: who has gone since then is found out by dialling.
            let leases = timeout(STORE_LIMIT, self.rendezvous.leases(ServerRole::Edge)).await;
            if let Ok(Ok(leases)) = leases {
                let others = leases.alive.into_iter().filter(|lease| lease.owner.name != self.owner.name);
                let way = |lease: Lease| {
                    let address = lease.passed?;
                    Some((lease.owner.name.clone(), Way { owner: lease.owner, address }))
                };
                self.ways.store(Arc::new(others.filter_map(way).collect()));
            }
            if timeout(period, self.lifecycle.stopped().cancelled()).await.is_ok() {
                return;
            }
        }
    }

    /// Asks the other edges to end the streams whose legs come through here: nothing can be put into a TLS session from
    /// outside.
    pub(crate) async fn end_passed(&self) {
        let Some(internal) = &self.internal else { return };
        if self.metrics.passed_now.get() == 0 {
            return;
        }
        let passer = self.owner.incarnation;
        let end = EndPassed { v: internal::VERSION, passer, reason: CloseReason::Draining };
        let question = serde_json::to_vec(&end).unwrap_or_default();
        let ways = self.ways.load_full();
        let calls = ways.values().map(|Way { owner, .. }| {
            let question = question.clone();
            async move {
                let called = internal.call(ServerRole::Edge, owner, END_PASSED, question, END_LIMIT).await;
                if let Err(error) = called {
                    warn!(edge = owner.name, %error, "an edge could not be told that connections end which it gets through here");
                }
            }
        });
        join_all(calls).await;
    }
}

#[async_trait]
impl Passer for Edge {
    async fn open(&self, name: &str, addresses: Addresses, hello: &[u8]) -> Option<TcpStream> {
        let edge = self.passing.domain.as_ref()?.edge_in(name)?;
        let ways = self.ways.load_full();
        let Way { address, .. } = ways.get(&edge)?;
        let keys = self.secrets.ticket_keys();
        let opened = async {
            let mut socket = midspan_pacing::connect(address).await?;
            let mut first = passed::seal(addresses, self.owner.incarnation, clock::unix(), &keys);
            first.extend(hello);
            socket.write_all(&first).await?;
            std::io::Result::Ok(socket)
        };
        match timeout(CONNECT_LIMIT, opened)
            .await
            .unwrap_or_else(|Elapsed { .. }| Err(std::io::ErrorKind::TimedOut.into()))
        {
            Ok(socket) => {
                debug!(edge, client.address = %addresses.client, "connection passed on");
                Some(socket)
            }
            Err(error) => {
                // The client gets an answer here: its ticket leads to the edge by another way, or nowhere. Counted, and not
                // warned of: strangers could fill the log.
                debug!(edge, %error, "an edge does not take a connection that is for it");
                self.metrics.passed(Passed::Unreachable);
                None
            }
        }
    }

    async fn carry(&self, client: TcpStream, owner: TcpStream) {
        let _counted = Counted::new(&self.metrics.passed_now);
        let ended = splice::carry(&client, &owner, &self.limits).await;
        self.metrics.passed_bytes(ended.bytes);
        match ended.result {
            Ok(()) => self.metrics.passed(Passed::Ended),
            Err(error) => {
                debug!(%error, "passed connection broke");
                self.metrics.passed(Passed::Broken);
            }
        }
    }
}
