//! The bodies of the HTTP API.

use std::time::Duration;

use secrecy::{ExposeSecret as _, SecretString};
use serde::{Deserialize, Serialize, Serializer};

use crate::{
    capability::Capabilities,
    id::{DeviceAddress, StreamId, StreamName},
    link::Metadata,
    record::StreamRecord,
    time::UnixTime,
    trace::TraceParent,
};

/// From the request until both legs are joined, at the most.
pub const HANDSHAKE_MAX: Duration = Duration::from_secs(60);

/// By when the device must have answered, so that a sixth of the handshake's time (10 s of 60) remains for the legs to join.
pub fn answer_by(handshake: Duration) -> Duration {
    handshake * 5 / 6
}

/// How long an absent device is waited for, unless the request says otherwise, in seconds.
pub const DEFAULT_CONNECT_TIMEOUT_SECONDS: u64 = 10;

/// How long a connected device may think, unless the request says otherwise, in seconds.
pub const DEFAULT_RESPONSE_TIMEOUT_SECONDS: u64 = 20;

/// `POST /v1/devices/{device}/streams`: ask a device for a stream.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StreamRequest {
    /// What the stream is for.
    pub name: StreamName,
    /// How long to wait for a device that is not connected, in seconds; clamped to 50.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connect_timeout_seconds: Option<u64>,
    /// How long to wait for the answer of a connected device, in seconds; clamped to 50 in all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub response_timeout_seconds: Option<u64>,
    /// What the service can do.
    #[serde(default, skip_serializing_if = "Capabilities::is_empty")]
    pub capabilities: Capabilities,
    /// What the device should know.
    #[serde(default, skip_serializing_if = "Metadata::is_empty")]
    pub metadata: Metadata,
}

/// The time-outs of one handshake, after clamping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    /// How long an absent device is waited for.
    pub connect: Duration,
    /// How long a connected device may think.
    pub response: Duration,
}

impl Timeouts {
    /// Fits what was asked for into [`answer_by`]: first the time to connect, then the time to answer into what that leaves.
    ///
    /// A fiftieth of the whole (1 s of 50) is left for the answer, even to a device that connects at the last moment.
    pub fn clamp(handshake: Duration, connect_seconds: Option<u64>, response_seconds: Option<u64>) -> Self {
        let whole = answer_by(handshake);
        let least = whole / 50;
        let connect = Duration::from_secs(connect_seconds.unwrap_or(DEFAULT_CONNECT_TIMEOUT_SECONDS));
        let connect = connect.min(whole.saturating_sub(least));
        let response = Duration::from_secs(response_seconds.unwrap_or(DEFAULT_RESPONSE_TIMEOUT_SECONDS));
        let response = response.clamp(least, whole.saturating_sub(connect));
        Self { connect, response }
    }
}

/// The answer to a [`StreamRequest`] that the device accepted.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct StreamGrant {
    /// The stream.
    pub stream: StreamId,
    /// Where the service's leg goes.
    pub url: String,
    /// The ticket of the service's leg, for `Authorization: Bearer`.
    #[serde(serialize_with = "expose")]
    pub ticket: SecretString,
    /// Until when the leg must be there.
    pub expires: UnixTime,
    /// What the device can do.
    pub capabilities: Capabilities,
    /// How long an absent device would have been waited for, in seconds, after clamping.
    pub connect_timeout_seconds: u64,
    /// How long the device could have thought, in seconds, after clamping.
    pub response_timeout_seconds: u64,
    /// The trace that the stream belongs to.
    pub traceparent: TraceParent,
}

/// `GET /v1/endpoints`: the public base URLs of the streaming edge.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoints {
    /// `https://` URLs, without a path.
    #[serde(rename = "streamingEndpoints")]
    pub streaming_endpoints: Vec<String>,
}

/// One device or module, as it is listed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceStatus {
    /// Which.
    #[serde(flatten)]
    pub address: DeviceAddress,
    /// Whether it has a link now.
    pub connected: bool,
    /// Since when it has that link.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connected_since: Option<UnixTime>,
    /// Whether it has keys of its own; else its key is derived from a group key.
    pub registered: bool,
}

/// One page of a list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Page<Item> {
    /// The items.
    pub items: Vec<Item>,
    /// What to send as `after` for the next page; absent on the last one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

/// A page of [`DeviceStatus`].
pub type DevicePage = Page<DeviceStatus>;

/// A page of [`StreamRecord`].
pub type StreamPage = Page<StreamRecord>;

/// The most items on a page.
pub const PAGE_MAX: usize = 1000;

/// The items on a page, unless `limit` says otherwise.
pub const PAGE_DEFAULT: usize = 100;

fn expose<S: Serializer>(secret: &SecretString, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(secret.expose_secret())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn time_outs_are_clamped() {
        let seconds = |connect, response| {
            let timeouts = Timeouts::clamp(HANDSHAKE_MAX, connect, response);
            (timeouts.connect.as_secs(), timeouts.response.as_secs())
        };
        assert_eq!(seconds(None, None), (10, 20));
        assert_eq!(seconds(Some(60), Some(60)), (49, 1));
        assert_eq!(seconds(Some(0), Some(60)), (0, 50));
        assert_eq!(seconds(Some(40), Some(20)), (40, 10));
        assert_eq!(seconds(Some(0), Some(0)), (0, 1));
    }

    #[test]
    fn grants_do_not_show_their_ticket() {
        let json = r#"{"stream":"0123456789abcdef0123456789abcdef","url":"wss://h/x","ticket":"SECRET",
            "expires":"2026-11-21T09:00:00Z","capabilities":[],"connect_timeout_seconds":1,"response_timeout_seconds":1,
            "traceparent":"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}"#;
        let grant: StreamGrant = serde_json::from_str(json).unwrap();
        assert!(!format!("{grant:?}").contains("SECRET"));
        assert!(serde_json::to_string(&grant).unwrap().contains("SECRET"));
    }

    #[test]
    fn unknown_fields_of_a_request_are_refused() {
        let error = serde_json::from_str::<StreamRequest>(r#"{"name":"ssh","timeout":5}"#).unwrap_err();
        assert!(error.to_string().contains("unknown field `timeout`"), "{error}");
    }

    proptest! {
        #[test]
        fn the_answer_always_comes_in_time(connect: Option<u64>, response: Option<u64>) {
            let timeouts = Timeouts::clamp(HANDSHAKE_MAX, connect, response);
            prop_assert!(timeouts.connect + timeouts.response <= answer_by(HANDSHAKE_MAX));
            prop_assert!(timeouts.response >= Duration::from_secs(1));
        }
    }
}
