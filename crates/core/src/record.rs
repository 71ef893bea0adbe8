//! The rendezvous record: what the relay remembers of one stream.

use serde::{Deserialize, Serialize};

use crate::{
    close::CloseReason,
    id::{DeviceAddress, StreamId, StreamName},
    ticket::Owner,
    time::UnixTime,
};

/// The version of the record that this release writes.
pub const VERSION: u8 = 1;

/// One stream, from the request for it until some minutes after its end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamRecord {
    /// The form of this record, [`VERSION`].
    pub version: u8,
    /// The stream.
    pub stream: StreamId,
    /// The device or module at one end.
    #[serde(flatten)]
    pub address: DeviceAddress,
    /// What the stream is for.
    pub name: StreamName,
    /// The service credential at the other end.
    pub credential: String,
    /// The edge that joins its legs.
    pub owner: Owner,
    /// When it was asked for.
    pub created: UnixTime,
    /// Until when the handshake must be over.
    pub expires: UnixTime,
    /// Where it stands.
    pub state: StreamState,
}

/// Where a stream stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum StreamState {
    /// The device has been, or will be, asked.
    Requested,
    /// The device has accepted; the legs are on their way.
    Accepted,
    /// Bytes flow.
    Joined {
        /// Since when.
        joined: UnixTime,
    },
    /// Over.
    Ended(StreamEnd),
}

impl StreamState {
    /// How far it is: 0 to 3. Records only move to a higher one. A contract between releases that share a store.
    pub fn rank(&self) -> u8 {
        match self {
            Self::Requested => 0,
            Self::Accepted => 1,
            Self::Joined { .. } => 2,
            Self::Ended(_) => 3,
        }
    }
}

/// How a stream ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamEnd {
    /// Why.
    pub reason: CloseReason,
    /// When.
    pub ended: UnixTime,
    /// Bytes of payload from the service to the device.
    pub bytes_to_device: u64,
    /// Bytes of payload from the device to the service.
    pub bytes_to_service: u64,
}

impl StreamEnd {
    /// The end of a stream that carried nothing.
    pub fn unused(reason: CloseReason, ended: UnixTime) -> Self {
        Self { reason, ended, bytes_to_device: 0, bytes_to_service: 0 }
    }

    /// Whether nobody has seen it.
    pub fn is_assumed(&self) -> bool {
        self.reason == CloseReason::EdgeLost
    }
}

impl StreamRecord {
    /// Whether the stream is over.
    pub fn is_ended(&self) -> bool {
        matches!(self.state, StreamState::Ended(_))
    }

    /// Moves the record on. A step back, or out of an end, is ignored: messages about a stream may overtake each
    /// other. Says whether the record changed.
    ///
    /// That its edge was lost is only assumed: it gives way to an end that somebody has seen.
    pub fn advance(&mut self, next: StreamState) -> bool {
        let forward = next.rank() > self.state.rank();
        let seen = self.is_thought_lost() && matches!(&next, StreamState::Ended(end) if !end.is_assumed());
        if forward || seen {
            self.state = next;
        }
        forward || seen
    }

    /// Whether the stream is over only because its edge has not been heard of.
    pub fn is_thought_lost(&self) -> bool {
        matches!(&self.state, StreamState::Ended(end) if end.is_assumed())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::Incarnation;

    #[test]
    fn records_only_move_forward() {
        let mut record = record();
        let end = StreamState::Ended(StreamEnd::unused(CloseReason::Deleted, UnixTime(5)));
        assert!(record.advance(StreamState::Joined { joined: UnixTime(3) }));
        assert!(!record.advance(StreamState::Accepted));
        assert!(record.advance(end.clone()));
        assert!(!record.advance(StreamState::Joined { joined: UnixTime(4) }));
        assert!(!record.advance(StreamState::Ended(StreamEnd::unused(CloseReason::Idle, UnixTime(9)))));
        assert_eq!(record.state, end);
    }

    #[test]
    fn an_assumed_end_gives_way_to_one_that_was_seen() {
        let mut record = record();
        let end = |reason| StreamState::Ended(StreamEnd::unused(reason, UnixTime(5)));
        assert!(record.advance(end(CloseReason::EdgeLost)));
        assert!(!record.advance(StreamState::Joined { joined: UnixTime(4) }));
        assert!(!record.advance(end(CloseReason::EdgeLost)));
        assert!(record.advance(end(CloseReason::ServiceClosed)));
        assert!(!record.advance(end(CloseReason::EdgeLost)));
        assert_eq!(record.state, end(CloseReason::ServiceClosed));
    }

    #[test]
    fn json_reads_back() {
        let mut record = record();
        record.advance(StreamState::Ended(StreamEnd::unused(CloseReason::Deleted, UnixTime(5))));
        let json = serde_json::to_string(&record).unwrap();
        assert_eq!(serde_json::from_str::<StreamRecord>(&json).unwrap(), record);
    }

    fn record() -> StreamRecord {
        StreamRecord {
            version: VERSION,
            stream: StreamId::from_random(1),
            address: "dev1/m".parse().unwrap(),
            name: "ssh".parse().unwrap(),
            credential: "support".to_owned(),
            owner: Owner {
                name: "edge-0".to_owned(),
                incarnation: Incarnation::from_random(2),
                address: String::new(),
            },
            created: UnixTime(1),
            expires: UnixTime(61),
            state: StreamState::Requested,
        }
    }
}
