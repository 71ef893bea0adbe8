//! What is measured.

use clap::{ValueEnum, builder::PossibleValue};
use serde::{Deserialize, Serialize};

/// One relay in one manner of working.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Variant {
    Direct,
    DirectTls,
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
    Edges2Straight,
    Edges2Passed,
    Edges2Forwarded,
    Edges4Straight,
    Edges4Passed,
    Edges4Forwarded,
    MidspanProxies,
    Wstunnel,
    Rathole,
    Bore,
    Haproxy,
    Nginx,
}

/// How a leg comes to the edge that owns its stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// It connects to the owner.
    Straight,
    /// It connects to any edge and asks for the owner by name; its connection is passed on below TLS.
    Passed,
    /// It connects to any edge, which reads its ticket and forwards it.
    Forwarded,
}

impl Way {
    pub(crate) const ALL: [Self; 3] = [Self::Straight, Self::Passed, Self::Forwarded];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Straight => "straight",
            Self::Passed => "passed",
            Self::Forwarded => "forwarded",
        }
    }
}

impl Variant {
    pub(crate) const ALL: [Self; 24] = [
        Self::Direct,
        Self::DirectTls,
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
        Self::Edges2Straight,
        Self::Edges2Passed,
        Self::Edges2Forwarded,
        Self::Edges4Straight,
        Self::Edges4Passed,
        Self::Edges4Forwarded,
        Self::MidspanProxies,
        Self::Wstunnel,
        Self::Rathole,
        Self::Bore,
        Self::Haproxy,
        Self::Nginx,
    ];

    /// Those that carry TCP from end to end, with local proxies, and two that stand in for the best of such a relay.
    pub(crate) const END_TO_END: [Self; 6] =
        [Self::MidspanProxies, Self::Wstunnel, Self::Rathole, Self::Bore, Self::Haproxy, Self::Nginx];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::DirectTls => "direct-tls",
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
            Self::Edges2Straight => "edges-2-straight",
            Self::Edges2Passed => "edges-2-passed",
            Self::Edges2Forwarded => "edges-2-forwarded",
            Self::Edges4Straight => "edges-4-straight",
            Self::Edges4Passed => "edges-4-passed",
            Self::Edges4Forwarded => "edges-4-forwarded",
            Self::MidspanProxies => "midspan-proxies",
            Self::Wstunnel => "wstunnel",
            Self::Rathole => "rathole",
            Self::Bore => "bore",
            Self::Haproxy => "haproxy",
            Self::Nginx => "nginx",
        }
    }

    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::Direct => "no relay (direct loopback)",
            Self::DirectTls => "TLS: no relay (direct loopback)",
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
            Self::Edges2Straight => "TLS: 2 edges, legs straight to the owner",
            Self::Edges2Passed => "TLS: 2 edges, passed on below TLS",
            Self::Edges2Forwarded => "TLS: 2 edges, forwarded in one hop",
            Self::Edges4Straight => "TLS: 4 edges, legs straight to the owner",
            Self::Edges4Passed => "TLS: 4 edges, passed on below TLS",
            Self::Edges4Forwarded => "TLS: 4 edges, forwarded in one hop",
            Self::MidspanProxies => "Midspan, with both local proxies",
            Self::Wstunnel => "wstunnel, which does not mask",
            Self::Rathole => "rathole",
            Self::Bore => "bore",
            Self::Haproxy => "haproxy, WebSocket (not ranked)",
            Self::Nginx => "nginx, WebSocket (not ranked)",
        }
    }

    /// Whether there is a process between the connections.
    pub(crate) fn has_relay(self) -> bool {
        !matches!(self, Self::Direct | Self::DirectTls)
    }

    pub(crate) fn is_ours(self) -> bool {
        matches!(self, Self::Midspan | Self::MidspanTls | Self::MidspanProxies) || self.edges().is_some()
    }

    pub(crate) fn is_tls(self) -> bool {
        matches!(self, Self::DirectTls | Self::TungsteniteTls | Self::MidspanTls) || self.edges().is_some()
    }

    /// How many edges there are, and how legs come to the one that owns their stream; nothing for a relay of one process.
    pub(crate) fn edges(self) -> Option<(usize, Way)> {
        let (edges, way) = *self.name().strip_prefix("edges-")?.split_once('-').as_ref()?;
        let way = Way::ALL.into_iter().find(|one| one.name() == way)?;
        Some((edges.parse().ok()?, way))
    }

    /// Whether both legs connect to the relay and ask for WebSocket.
    pub(crate) fn is_websocket(self) -> bool {
        self.has_relay()
            && !matches!(self, Self::TcpSplice | Self::TcpCopy | Self::TcpBidirectional)
            && !self.is_end_to_end()
    }

    /// Whether one end connects to a first program, and the last program connects to the other end.
    pub(crate) fn is_end_to_end(self) -> bool {
        Self::END_TO_END.contains(&self)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_edges_and_ways() {
        assert_eq!(Variant::Edges4Passed.edges(), Some((4, Way::Passed)));
        let several = Variant::ALL.iter().filter(|variant| variant.edges().is_some());
        assert_eq!(several.count(), 2 * Way::ALL.len());
        assert_eq!(Variant::MidspanTls.edges(), None);
    }
}
