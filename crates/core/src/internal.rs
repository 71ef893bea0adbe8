//! The messages between the processes of one relay: one JSON object as the body of a `POST`, and one as its answer.
//!
//! Neighbouring releases run side by side during a roll: fields that are not known are ignored, and a result that is not
//! known is an error of the relay.

use serde::{Deserialize, Serialize};

use crate::{
    capability::Capabilities,
    close::CloseReason,
    id::{DeviceAddress, Incarnation, StreamId},
    link::Invitation,
};

/// The version of the messages that this release writes.
pub const VERSION: u8 = 1;

/// Control plane: [`Ask`] a device, answered with an [`Answer`].
pub const INVITATIONS: &str = "/internal/v1/invitations";

/// Control plane: a device that the replica waits for came online somewhere, [`DeviceOnline`].
pub const DEVICE_ONLINE: &str = "/internal/v1/devices/online";

/// Control plane: a device has a newer link at another replica, [`LinkReplaced`].
pub const LINK_REPLACED: &str = "/internal/v1/links/replaced";

/// Edge: [`EndStream`].
pub const END_STREAM: &str = "/internal/v1/streams/end";

/// Edge: [`EndPassed`].
pub const END_PASSED: &str = "/internal/v1/passed/end";

/// Asks a device over the link that the called replica holds.
///
/// The call stays open until the device has answered, and the question is dropped with it. To ask twice does no harm: a
/// request has an id, and a device answers the same one in the same way.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Ask {
    /// The form of this message, [`VERSION`].
    pub v: u8,
    /// Whom.
    #[serde(flatten)]
    pub address: DeviceAddress,
    /// What. Its `answer_within_ms` is also how long the called replica waits.
    pub invitation: Invitation,
}

/// What came of an [`Ask`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// The form of this message, [`VERSION`].
    pub v: u8,
    /// What.
    #[serde(flatten)]
    pub outcome: Outcome,
}

/// What came of a request to a device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum Outcome {
    /// The device takes the stream.
    Accepted {
        /// What the device can do.
        #[serde(default)]
        capabilities: Capabilities,
    },
    /// The device does not take the stream.
    Rejected {
        /// Why, in a sentence.
        #[serde(default)]
        reason: String,
    },
    /// The replica has no link of the device, or it ended before the answer.
    NoLink,
    /// The device does not take what is queued for it.
    QueueFull,
    /// The device did not answer in time.
    Silent,
    /// An outcome of a later version.
    #[serde(other)]
    Unknown,
}

/// Wakes those who wait for a device at the called replica.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceOnline {
    /// The form of this message, [`VERSION`].
    pub v: u8,
    /// Which.
    #[serde(flatten)]
    pub address: DeviceAddress,
}

/// Ends the link of a device at the called replica, unless it is as new as the one that is told of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkReplaced {
    /// The form of this message, [`VERSION`].
    pub v: u8,
    /// Whose.
    #[serde(flatten)]
    pub address: DeviceAddress,
    /// The generation of the newer link.
    pub generation: u64,
}

/// Ends a stream at its owner. Answered once its legs have been told; a leg that comes later is refused with the reason.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndStream {
    /// The form of this message, [`VERSION`].
    pub v: u8,
    /// Which.
    pub stream: StreamId,
    /// Why.
    pub reason: CloseReason,
}

/// Ends the streams of the called edge that have a leg on a connection which another edge passes on below TLS. Answered once
/// their legs have been told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndPassed {
    /// The form of this message, [`VERSION`].
    pub v: u8,
    /// Which edge passes the connections on.
    pub passer: Incarnation,
    /// Why.
    pub reason: CloseReason,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::json;

    #[test]
    fn messages_read_back() {
        let answer = |outcome| Answer { v: VERSION, outcome };
        for message in [
            answer(Outcome::Accepted { capabilities: Capabilities::of_this_client() }),
            answer(Outcome::Rejected { reason: "no".to_owned() }),
            answer(Outcome::NoLink),
            answer(Outcome::QueueFull),
            answer(Outcome::Silent),
        ] {
            reads_back(&message);
        }
        let address: DeviceAddress = "dev1/camera".parse().unwrap();
        reads_back(&DeviceOnline { v: VERSION, address: address.clone() });
        reads_back(&LinkReplaced { v: VERSION, address, generation: u64::MAX });
        reads_back(&EndPassed {
            v: VERSION,
            passer: Incarnation::from_random(1),
            reason: CloseReason::Draining,
        });
        reads_back(&EndStream { v: VERSION, stream: StreamId::from_random(1), reason: CloseReason::Deleted });
    }

    #[test]
    fn a_question_keeps_its_ticket_and_does_not_show_it() {
        let text = r#"{"v":1,"device":"dev1","invitation":{"request":"0123456789abcdef0123456789abcdef",
            "stream":"0123456789abcdef0123456789abcdef","name":"ssh","url":"wss://h/bridges/x/device","ticket":"SECRET",
            "expires":"2026-11-21T09:00:00Z","answer_within_ms":20000,
            "traceparent":"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}}"#;
        let ask: Ask = json::parse(text.as_bytes()).unwrap();
        assert!(!format!("{ask:?}").contains("SECRET"));
        let written = serde_json::to_value(&ask).unwrap();
        assert_eq!(written["invitation"]["ticket"], "SECRET");
        assert_eq!(written["device"], "dev1");
    }

    #[test]
    fn what_a_later_release_adds_is_ignored_or_recognized() {
        let later = r#"{"v":2,"outcome":"asked_back","how":"kindly"}"#;
        assert_eq!(json::parse::<Answer>(later.as_bytes()).unwrap().outcome, Outcome::Unknown);
        let later = r#"{"v":2,"outcome":"accepted","mood":"good"}"#;
        let accepted = Outcome::Accepted { capabilities: Capabilities::none() };
        assert_eq!(json::parse::<Answer>(later.as_bytes()).unwrap().outcome, accepted);
        let later = r#"{"v":2,"device":"dev1","since":3}"#;
        assert_eq!(json::parse::<DeviceOnline>(later.as_bytes()).unwrap().address, "dev1".parse().unwrap());
    }

    fn reads_back<T: PartialEq + std::fmt::Debug + Serialize + serde::de::DeserializeOwned>(message: &T) {
        assert_eq!(json::parse::<T>(&serde_json::to_vec(message).unwrap()).as_ref(), Ok(message));
    }
}
