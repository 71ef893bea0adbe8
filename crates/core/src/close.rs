//! Why a stream ended: one reason, told to both legs, logged and counted.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::id::Role;

/// Whose doing something was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Side {
    /// The service, or its network.
    Service,
    /// The device, or its network.
    Device,
    /// The relay, or its operator.
    Relay,
}

impl From<Role> for Side {
    fn from(role: Role) -> Self {
        match role {
            Role::Service => Self::Service,
            Role::Device => Self::Device,
        }
    }
}

/// How loud the log line about an end is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// As it should be.
    Info,
    /// Worth a look when it comes often.
    Warn,
    /// The relay failed somebody.
    Error,
}

/// One row of the table of reasons.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CloseRow {
    /// The reason in metrics, logs, records and at the start of the close text.
    pub label: &'static str,
    /// What an HTTP request hears that comes for a stream which ended so, or which failed so.
    pub http_status: u16,
    /// The close code (RFC 6455, section 7.4) that a leg hears.
    pub close_code: u16,
    /// One sentence for people.
    pub text: &'static str,
    /// Whose doing it was.
    pub side: Side,
    /// Whether asking for a new stream may help.
    pub retry: bool,
    /// The level of the log line.
    pub level: Level,
}

macro_rules! reasons {
    ($($(#[$doc:meta])* $name:ident: $label:literal, $http:literal, $code:literal, $side:ident, $retry:literal, $level:ident, $text:literal;)*) => {
        /// Why a stream ended, in mid-handshake or after it was joined.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        pub enum CloseReason {
            $($(#[$doc])* $name,)*
        }

        impl CloseReason {
            /// Every reason there is.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// The reason's row in the table.
            pub fn row(self) -> CloseRow {
                match self {
                    $(Self::$name => CloseRow {
                        label: $label, http_status: $http, close_code: $code, text: $text,
                        side: Side::$side, retry: $retry, level: Level::$level,
                    },)*
                }
            }
        }
    };
}

reasons! {
    // Ends of the handshake.
    /// The device had no link to the relay, and none came up in time.
    DeviceOffline: "device_offline", 404, 1013, Device, true, Info, "the device is not connected to the relay";
    /// The device said no.
    DeviceRejected: "device_rejected", 409, 1008, Device, false, Info, "the device rejected the stream";
    /// The device had a link, but did not answer in time.
    DeviceSilent: "device_silent", 504, 1013, Device, true, Warn, "the device did not answer in time";
    /// The service hung up before the device had answered.
    ServiceGaveUp: "service_gave_up", 410, 1001, Service, true, Info, "the service did not wait for the device's answer";
    /// The request reached the relay, but not the device's link.
    InvitationFailed: "invitation_failed", 503, 1013, Relay, true, Warn, "the relay could not pass the request on to the device";
    /// The device accepted, and its leg never came or went away again.
    DeviceLegMissing: "device_leg_missing", 410, 1013, Device, true, Warn, "the device's leg did not arrive in time";
    /// The service's leg never came or went away again.
    ServiceLegMissing: "service_leg_missing", 410, 1013, Service, true, Info, "the service's leg did not arrive in time";
    /// Neither leg was there when the handshake's time was over.
    BothLegsMissing: "both_legs_missing", 410, 1013, Service, true, Info, "neither leg was there in time";

    // Ends of a joined stream.
    /// The service closed its leg with a close frame, after all its bytes.
    ServiceClosed: "service_closed", 410, 1000, Service, false, Info, "the service closed the stream";
    /// The device closed its leg with a close frame, after all its bytes.
    DeviceClosed: "device_closed", 410, 1000, Device, false, Info, "the device closed the stream";
    /// The service's leg ended without a close frame.
    ServiceLost: "service_lost", 410, 1011, Service, true, Info, "the service's connection was lost";
    /// The device's leg ended without a close frame.
    DeviceLost: "device_lost", 410, 1011, Device, true, Info, "the device's connection was lost";
    /// The service broke the WebSocket protocol.
    ServiceProtocol: "service_protocol", 410, 1002, Service, false, Warn, "the service broke the WebSocket protocol";
    /// The device broke the WebSocket protocol.
    DeviceProtocol: "device_protocol", 410, 1002, Device, false, Warn, "the device broke the WebSocket protocol";
    /// The service's leg gave no sign of life for the silence limit.
    ServiceUnresponsive: "service_unresponsive", 410, 1011, Service, true, Info, "the service's leg answered no ping";
    /// The device's leg gave no sign of life for the silence limit.
    DeviceUnresponsive: "device_unresponsive", 410, 1011, Device, true, Info, "the device's leg answered no ping";
    /// The service took no byte for the stall limit, although some waited.
    ServiceStalled: "service_stalled", 410, 1008, Service, true, Warn, "the service took no data for too long";
    /// The device took no byte for the stall limit, although some waited.
    DeviceStalled: "device_stalled", 410, 1008, Device, true, Warn, "the device took no data for too long";
    /// No byte of payload passed either way for the idle limit.
    Idle: "idle", 410, 1001, Relay, true, Info, "nothing was sent for longer than the idle limit";
    /// Somebody ended the stream through the API.
    Deleted: "deleted", 410, 1001, Service, false, Info, "the stream was ended through the API";
    /// The credential of the device or the service was revoked.
    Revoked: "revoked", 403, 1008, Relay, false, Warn, "a credential of this stream was revoked";
    /// The credential that opened the stream came to its end.
    CredentialExpired: "credential_expired", 410, 1008, Service, true, Info, "the credential that opened this stream has expired";
    /// The edge is going away in good order.
    Draining: "draining", 503, 1012, Relay, true, Info, "the relay is restarting; open a new stream";
    /// The edge that carried the stream has not renewed its lease.
    EdgeLost: "edge_lost", 503, 1012, Relay, true, Error, "the edge that carried this stream was lost; open a new stream";
    /// The relay itself failed.
    RelayFailed: "relay_failed", 500, 1011, Relay, true, Error, "the relay failed";
}

/// The longest text of a close frame, in bytes: a control frame's 125 less the code's two (RFC 6455, section 5.5).
pub const CLOSE_TEXT_MAX: usize = 123;

impl CloseReason {
    /// The reason in metrics, logs and records.
    pub fn label(self) -> &'static str {
        self.row().label
    }

    /// The text of the close frame: the label, then a sentence.
    pub fn close_text(self) -> String {
        let row = self.row();
        format!("{}: {}", row.label, row.text)
    }

    /// The close code that the leg of `listener` hears: a leg that did nothing wrong is not told of a protocol error.
    pub fn close_code_for(self, listener: Role) -> u16 {
        if self == Self::protocol(listener.peer()) { 1011 } else { self.row().close_code }
    }

    /// `role` closed in good order.
    pub fn closed_by(role: Role) -> Self {
        match role {
            Role::Service => Self::ServiceClosed,
            Role::Device => Self::DeviceClosed,
        }
    }

    /// The connection of `role` ended without a close frame.
    pub fn lost(role: Role) -> Self {
        match role {
            Role::Service => Self::ServiceLost,
            Role::Device => Self::DeviceLost,
        }
    }

    /// `role` sent something that RFC 6455 forbids.
    pub fn protocol(role: Role) -> Self {
        match role {
            Role::Service => Self::ServiceProtocol,
            Role::Device => Self::DeviceProtocol,
        }
    }

    /// `role` gave no sign of life.
    pub fn unresponsive(role: Role) -> Self {
        match role {
            Role::Service => Self::ServiceUnresponsive,
            Role::Device => Self::DeviceUnresponsive,
        }
    }

    /// `role` took no data.
    pub fn stalled(role: Role) -> Self {
        match role {
            Role::Service => Self::ServiceStalled,
            Role::Device => Self::DeviceStalled,
        }
    }

    /// The leg of `role` was not there at the end of the handshake, while the other was.
    pub fn leg_missing(role: Role) -> Self {
        match role {
            Role::Service => Self::ServiceLegMissing,
            Role::Device => Self::DeviceLegMissing,
        }
    }
}

impl fmt::Display for CloseReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.label())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_is_legal_on_the_wire() {
        for &reason in CloseReason::ALL {
            let row = reason.row();
            assert!(reason.close_text().len() <= CLOSE_TEXT_MAX, "{reason}: {}", reason.close_text().len());
            assert!(row.label.bytes().all(|b| b.is_ascii_lowercase() || b == b'_'), "{reason}");
            assert!(matches!(row.close_code, 1000..=1003 | 1007..=1014), "{reason}");
            assert!((400..600).contains(&row.http_status), "{reason}");
        }
    }

    #[test]
    fn json_and_label_are_the_same_word() {
        for &reason in CloseReason::ALL {
            assert_eq!(serde_json::to_value(reason).unwrap(), reason.label());
        }
    }
}
