//! Balancers and proxies in front of a listener, and what they say of whose connections and requests they bring.

use std::{io, net::IpAddr, sync::Arc};

use clap::Args;
use ipnet::IpNet;
use midspan_core::{
    forwarded::{self, ForwardedHeader},
    id::Incarnation,
    passed,
    proxy::{self, Addresses, Parsed},
    ticket::TicketKeys,
};
use tokio::{io::AsyncReadExt as _, net::TcpStream};

use crate::{clock, watched::Watched};

/// Who stands in front of the public listener.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Balancers and proxies in front")]
pub struct ProxySettings {
    /// Networks of balancers that put a PROXY header (version 1 or 2) before each connection; from others none is read
    #[arg(long, env = "MIDSPAN_PROXY_PROTOCOL_FROM", value_name = "CIDR", value_delimiter = ',', value_parser = network)]
    pub proxy_protocol_from: Vec<IpNet>,
    /// Networks of HTTP proxies whose word is taken for where a request comes from
    #[arg(long, env = "MIDSPAN_FORWARDED_FROM", value_name = "CIDR", value_delimiter = ',', value_parser = network)]
    pub forwarded_from: Vec<IpNet>,
    /// The header in which they say it: `x-forwarded-for`, or `forwarded` (RFC 7239); the other one is not read
    #[arg(long, env = "MIDSPAN_FORWARDED_HEADER", default_value = "x-forwarded-for", value_name = "NAME", value_parser = header)]
    pub forwarded_header: ForwardedHeader,
}

fn network(text: &str) -> Result<IpNet, String> {
    let network = text.parse().or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
    network.map_err(|_| "expected a network such as 10.0.0.0/8, or an address".to_owned())
}

fn header(text: &str) -> Result<ForwardedHeader, String> {
    let known = [ForwardedHeader::XForwardedFor, ForwardedHeader::Forwarded];
    let found = known.into_iter().find(|header| header.name() == text);
    found.ok_or_else(|| "expected x-forwarded-for or forwarded".to_owned())
}

/// Whether one of the networks has the address, which a socket for both families may show in IPv6's form.
fn contains(networks: &[IpNet], address: IpAddr) -> bool {
    let address = address.to_canonical();
    networks.iter().any(|network| network.contains(&address))
}

impl ProxySettings {
    pub(super) fn expected(&self) -> Expected {
        match self.proxy_protocol_from.as_slice() {
            [] => Expected::Nothing,
            networks => Expected::FromProxies(networks.into()),
        }
    }

    pub(super) fn forwarders(&self) -> Option<Arc<Forwarders>> {
        let forwarders =
            || Arc::new(Forwarders { networks: self.forwarded_from.clone(), header: self.forwarded_header });
        (!self.forwarded_from.is_empty()).then(forwarders)
    }
}

/// Proxies that speak HTTP, and how they say whose requests they bring.
#[derive(Debug)]
pub(crate) struct Forwarders {
    networks: Vec<IpNet>,
    header: ForwardedHeader,
}

impl Forwarders {
    /// Whose request this is that came from `peer`; `None` when that is nobody whose word is taken.
    pub(crate) fn client(&self, peer: IpAddr, headers: &http::HeaderMap) -> Option<IpAddr> {
        let is_trusted = |address| contains(&self.networks, address);
        // What is not text breaks the chain off.
        let values =
            || headers.get_all(self.header.name()).iter().map(|value| value.to_str().unwrap_or_default());
        is_trusted(peer).then(|| forwarded::client(self.header, values(), peer, is_trusted))
    }
}

/// What the one in front of a connection says of it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Told {
    /// Its ends; `None` for a connection of the proxy's own.
    pub(crate) addresses: Option<Addresses>,
    /// The edge that passes it on.
    pub(crate) passer: Option<Incarnation>,
}

/// The PROXY header that a connection must begin with.
#[derive(Debug)]
pub(super) enum Expected {
    /// None, and none is read.
    Nothing,
    /// Any, from these networks.
    FromProxies(Arc<[IpNet]>),
    /// One that another edge of this relay has made, from everywhere.
    FromEdges(Watched<TicketKeys>),
}

/// Why a PROXY header was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum HeaderFailure {
    /// It is none, or the connection ended.
    Malformed,
    /// It was not made by an edge of this relay, or too long ago.
    Forged,
    /// It took too long.
    Timeout,
}

impl HeaderFailure {
    pub(super) const ALL: [Self; 3] = [Self::Malformed, Self::Forged, Self::Timeout];

    pub(super) fn label(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::Forged => "forged",
            Self::Timeout => "timeout",
        }
    }
}

impl From<io::Error> for HeaderFailure {
    fn from(_: io::Error) -> Self {
        Self::Malformed
    }
}

impl Expected {
    pub(super) fn applies_to(&self, peer: IpAddr) -> bool {
        match self {
            Self::Nothing => false,
            Self::FromProxies(networks) => contains(networks, peer),
            Self::FromEdges(_) => true,
        }
    }

    /// Reads the header, and nothing behind it.
    pub(super) async fn read(&self, socket: &mut TcpStream) -> Result<Told, HeaderFailure> {
        let mut header = Vec::new();
        loop {
            match proxy::parse(&header).map_err(|_| HeaderFailure::Malformed)? {
                Parsed::Missing(count) => {
                    let kept = header.len();
                    header.resize(kept + count, 0);
                    socket.read_exact(&mut header[kept..]).await?;
                }
                whole @ Parsed::Whole { addresses, .. } => {
                    let Self::FromEdges(keys) = self else { return Ok(Told { addresses, passer: None }) };
                    let opened = passed::open(&header, &whole, clock::unix(), &keys.current());
                    let (passer, addresses) = opened.map_err(|_| HeaderFailure::Forged)?;
                    return Ok(Told { addresses: Some(addresses), passer: Some(passer) });
                }
            }
        }
    }
}
