//! What is measured.

use clap::{ValueEnum, builder::PossibleValue};
use serde::{Deserialize, Serialize};

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
    MidspanProxies,
    Wstunnel,
    Rathole,
    Bore,
    Haproxy,
    Nginx,
}

impl Variant {
    pub(crate) const ALL: [Self; 17] = [
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
        self != Self::Direct
    }

    pub(crate) fn is_ours(self) -> bool {
        matches!(self, Self::Midspan | Self::MidspanTls | Self::MidspanProxies)
    }

    pub(crate) fn is_tls(self) -> bool {
        matches!(self, Self::TungsteniteTls | Self::MidspanTls)
    }

    /// Whether both legs connect to the relay and ask for WebSocket.
    pub(crate) fn is_websocket(self) -> bool {
        !matches!(self, Self::Direct | Self::TcpSplice | Self::TcpCopy | Self::TcpBidirectional)
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
