//! The messages of the device link: one JSON object per WebSocket text message.

use std::collections::BTreeMap;

use secrecy::{ExposeSecret as _, SecretString};
use serde::{Deserialize, Serialize, Serializer};

use crate::{
    capability::Capabilities,
    close::CLOSE_TEXT_MAX,
    id::{RequestId, StreamId, StreamName},
    time::UnixTime,
    trace::TraceParent,
};

/// The subprotocol that both sides name, so that the link can change some day.
pub const SUBPROTOCOL: &str = "midspan.link.v1";

/// The longest message that either side of a link takes, in bytes.
pub const MESSAGE_MAX: usize = 64 * 1024;

/// The longest reason of a rejection that is passed on, in bytes; the rest is cut off at a character's end.
pub const REASON_MAX: usize = 1024;

/// What the relay tells a device.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ToDevice {
    /// The first message on every link.
    Welcome {
        /// The relay's clock, for noticing that one's own is wrong.
        now: UnixTime,
        /// How often the relay pings, in seconds.
        ping_seconds: u64,
        /// After how long without any message or pong the relay gives the link up, in seconds.
        silence_seconds: u64,
        /// When the credential of this link ends; a new link should stand before that.
        expires: UnixTime,
    },
    /// A service asks for a stream.
    Request(Invitation),
    /// The relay closes the link next.
    Goodbye(Goodbye),
    /// A message of a later version, to be ignored.
    #[serde(other)]
    Unknown,
}

/// A service's request for a stream, as the device hears it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Invitation {
    /// What the answer must name.
    pub request: RequestId,
    /// The stream.
    pub stream: StreamId,
    /// What it is for.
    pub name: StreamName,
    /// Where the device's leg goes.
    pub url: String,
    /// The ticket of the device's leg.
    #[serde(serialize_with = "expose")]
    pub ticket: SecretString,
    /// Until when the leg must be there.
    pub expires: UnixTime,
    /// How long the relay waits for the answer, in milliseconds.
    pub answer_within_ms: u64,
    /// What the service can do.
    #[serde(default)]
    pub capabilities: Capabilities,
    /// What the service wants the device to know.
    #[serde(default, skip_serializing_if = "Metadata::is_empty")]
    pub metadata: Metadata,
    /// The trace that the stream belongs to.
    pub traceparent: TraceParent,
}

/// Why the relay closes a link, and when to come back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Goodbye {
    /// Why.
    pub reason: GoodbyeReason,
    /// The reason in a sentence.
    pub message: String,
    /// How long to stay away, in seconds, before some jitter.
    pub come_back_seconds: u64,
}

/// Why the relay closes a device link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GoodbyeReason {
    /// A newer link with the same identity took over.
    Replaced,
    /// The relay is going away.
    Draining,
    /// The link's credential came to its end.
    CredentialExpired,
    /// The device's credential was revoked.
    Revoked,
    /// The device sent something that is not a message of this protocol.
    BadMessage,
    /// The device took no message for too long.
    Stalled,
    /// A reason of a later version.
    #[serde(other)]
    Unknown,
}

impl GoodbyeReason {
    /// The reasons that this release gives.
    pub const ALL: [Self; 6] = [
        Self::Replaced,
        Self::Draining,
        Self::CredentialExpired,
        Self::Revoked,
        Self::BadMessage,
        Self::Stalled,
    ];

    /// The reason in metrics, logs and close frames.
    pub fn label(self) -> &'static str {
        match self {
            Self::Replaced => "replaced",
            Self::Draining => "draining",
            Self::CredentialExpired => "credential_expired",
            Self::Revoked => "revoked",
            Self::BadMessage => "bad_message",
            Self::Stalled => "stalled",
            Self::Unknown => "unknown",
        }
    }

    /// The WebSocket close code that follows the goodbye (RFC 6455, section 7.4).
    pub fn close_code(self) -> u16 {
        match self {
            Self::Draining => 1012,
            Self::Replaced | Self::CredentialExpired | Self::Revoked | Self::Unknown => 1008,
            Self::BadMessage => 1007,
            Self::Stalled => 1013,
        }
    }
}

/// What a device tells the relay.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum FromDevice {
    /// The device takes the stream, and opens its leg.
    Accept {
        /// Which request.
        request: RequestId,
        /// What the device can do.
        #[serde(default)]
        capabilities: Capabilities,
    },
    /// The device does not take the stream.
    Reject {
        /// Which request.
        request: RequestId,
        /// Why, in a sentence.
        #[serde(default)]
        reason: String,
    },
    /// A message of a later version, to be ignored.
    #[serde(other)]
    Unknown,
}

/// Small facts that a service gives a device along with a request: at most 2 KiB in all.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "BTreeMap<String, String>", into = "BTreeMap<String, String>")]
pub struct Metadata(BTreeMap<String, String>);

impl Metadata {
    /// The most bytes that keys and values may have together.
    pub const MAX_BYTES: usize = 2048;

    /// Whether there is nothing.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Keys and values.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(key, value)| (key.as_str(), value.as_str()))
    }
}

impl TryFrom<BTreeMap<String, String>> for Metadata {
    type Error = String;

    fn try_from(map: BTreeMap<String, String>) -> Result<Self, String> {
        let bytes: usize = map.iter().map(|(key, value)| key.len() + value.len()).sum();
        if bytes > Self::MAX_BYTES {
            return Err(format!("metadata has at most {} bytes, this has {bytes}", Self::MAX_BYTES));
        }
        Ok(Self(map))
    }
}

impl From<Metadata> for BTreeMap<String, String> {
    fn from(metadata: Metadata) -> Self {
        metadata.0
    }
}

/// The front of `text`, at most `max` bytes and ending with a whole character.
pub fn cut(text: &str, max: usize) -> &str {
    &text[..text.floor_char_boundary(max)]
}

/// Fits a text into a close frame.
pub fn close_text(text: &str) -> &str {
    cut(text, CLOSE_TEXT_MAX)
}

fn expose<S: Serializer>(secret: &SecretString, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(secret.expose_secret())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_forms_in_the_protocol_document() {
        let accept =
            r#"{"type":"accept","request":"0123456789abcdef0123456789abcdef","capabilities":["half-close"]}"#;
        let parsed: FromDevice = serde_json::from_str(accept).unwrap();
        assert_eq!(serde_json::to_string(&parsed).unwrap(), accept);
        let reject = r#"{"type":"reject","request":"0123456789abcdef0123456789abcdef"}"#;
        assert!(
            matches!(serde_json::from_str(reject).unwrap(), FromDevice::Reject { reason, .. } if reason.is_empty())
        );
    }

    #[test]
    fn messages_of_later_versions_are_recognized() {
        let later = r#"{"type":"telemetry","load":3}"#;
        assert_eq!(serde_json::from_str::<FromDevice>(later).unwrap(), FromDevice::Unknown);
        assert!(matches!(serde_json::from_str::<ToDevice>(later).unwrap(), ToDevice::Unknown));
        let goodbye = r#"{"reason":"moon_phase","message":"x","come_back_seconds":1}"#;
        assert_eq!(serde_json::from_str::<Goodbye>(goodbye).unwrap().reason, GoodbyeReason::Unknown);
    }

    #[test]
    fn invitations_do_not_show_their_ticket() {
        let json = r#"{"type":"request","request":"0123456789abcdef0123456789abcdef",
            "stream":"0123456789abcdef0123456789abcdef","name":"ssh","url":"wss://h/bridges/x/device","ticket":"SECRET",
            "expires":"2026-11-21T09:00:00Z","answer_within_ms":20000,
            "traceparent":"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}"#;
        let parsed: ToDevice = serde_json::from_str(json).unwrap();
        assert!(!format!("{parsed:?}").contains("SECRET"));
        assert!(serde_json::to_string(&parsed).unwrap().contains("SECRET"));
    }

    #[test]
    fn metadata_is_bounded() {
        let json = format!(r#"{{"k":"{}"}}"#, "v".repeat(2048));
        assert!(serde_json::from_str::<Metadata>(&json).is_err());
    }

    proptest! {
        #[test]
        fn cutting_keeps_whole_characters(text in ".{0,100}", max in 0usize..120) {
            let front = cut(&text, max);
            prop_assert!(front.len() <= max && text.starts_with(front));
            prop_assert!(front.len() == text.len() || max - front.len() < 4);
        }

        #[test]
        fn parsing_never_panics(text in ".{0,200}") {
            let _ = serde_json::from_str::<FromDevice>(&text);
            let _ = serde_json::from_str::<ToDevice>(&text);
        }
    }
}
