//! Errors of the HTTP API, as problem documents (RFC 9457).

use serde::{Deserialize, Serialize};

use crate::{
    close::{CloseReason, Side},
    limit::LimitReached,
};

/// What went wrong with a request. The table gives type, status, title, whose fault it is and whether a retry helps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProblemKind {
    /// The request is not of the form that is expected.
    BadRequest,
    /// No, or no good, credential.
    Unauthorized,
    /// The credential is good, but does not allow this.
    NotAllowed,
    /// There is nothing at this path.
    NotFound,
    /// The device is not registered, and no group key could make it known.
    DeviceUnknown,
    /// No such stream, or it ended too long ago to be remembered.
    StreamUnknown,
    /// Another method is needed here.
    MethodNotAllowed,
    /// The body is too long.
    BodyTooLarge,
    /// The body is not announced as JSON.
    NotJson,
    /// A WebSocket upgrade is needed here.
    UpgradeRequired,
    /// The leg's ticket is no ticket of this relay, or was altered.
    TicketInvalid,
    /// The leg's ticket was good once.
    TicketExpired,
    /// The leg's ticket is for another stream or the other role.
    TicketMismatch,
    /// The leg is attached already.
    LegTaken,
    /// The ticket names another owner, or another life of this one.
    OwnerGone,
    /// A limit was reached.
    LimitReached,
    /// The relay cannot take this now.
    Unavailable,
    /// The relay failed.
    Internal,
    /// The stream, or its handshake, ended.
    Stream(CloseReason),
}

/// The text before the name of a problem's type.
pub const TYPE_PREFIX: &str = "urn:midspan:problem:";

/// One row of the table of problems.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProblemRow {
    /// The last part of `type`.
    pub name: &'static str,
    /// HTTP status.
    pub status: u16,
    /// `title`: the same for every problem of this type.
    pub title: &'static str,
    /// Whose fault it is.
    pub side: Side,
    /// Whether the same request may succeed later.
    pub retry: bool,
}

impl ProblemKind {
    /// Every kind but those that come from a [`CloseReason`].
    pub const OWN: [Self; 18] = [
        Self::BadRequest,
        Self::Unauthorized,
        Self::NotAllowed,
        Self::NotFound,
        Self::DeviceUnknown,
        Self::StreamUnknown,
        Self::MethodNotAllowed,
        Self::BodyTooLarge,
        Self::NotJson,
        Self::UpgradeRequired,
        Self::TicketInvalid,
        Self::TicketExpired,
        Self::TicketMismatch,
        Self::LegTaken,
        Self::OwnerGone,
        Self::LimitReached,
        Self::Unavailable,
        Self::Internal,
    ];

    /// The kind's row in the table.
    pub fn row(self) -> ProblemRow {
        let row = |name, status, title, side, retry| ProblemRow { name, status, title, side, retry };
        let caller = Side::Service;
        match self {
            Self::BadRequest => row("bad_request", 400, "the request is malformed", caller, false),
            Self::Unauthorized => row("unauthorized", 401, "who are you?", caller, false),
            Self::NotAllowed => row("not_allowed", 403, "this credential does not allow that", caller, false),
            Self::NotFound => row("not_found", 404, "there is nothing here", caller, false),
            Self::DeviceUnknown => row("device_unknown", 404, "no such device", caller, false),
            Self::StreamUnknown => row("stream_unknown", 404, "no such stream", caller, false),
            Self::MethodNotAllowed => {
                row("method_not_allowed", 405, "another method is needed", caller, false)
            }
            Self::BodyTooLarge => row("body_too_large", 413, "the body is too long", caller, false),
            Self::NotJson => row("not_json", 415, "the body must be JSON", caller, false),
            Self::UpgradeRequired => row("upgrade_required", 426, "a WebSocket is needed", caller, false),
            Self::TicketInvalid => row("ticket_invalid", 401, "not a ticket of this relay", caller, false),
            Self::TicketExpired => row("ticket_expired", 401, "the ticket has expired", caller, true),
            Self::TicketMismatch => {
                row("ticket_mismatch", 403, "the ticket is for something else", caller, false)
            }
            Self::LegTaken => row("leg_taken", 409, "this leg is attached already", caller, false),
            Self::OwnerGone => row("owner_gone", 410, "the edge of this stream is gone", Side::Relay, true),
            Self::LimitReached => row("limit_reached", 429, "a limit is reached", caller, true),
            Self::Unavailable => row("unavailable", 503, "the relay cannot take this now", Side::Relay, true),
            Self::Internal => row("internal", 500, "the relay failed", Side::Relay, true),
            Self::Stream(reason) => {
                let close = reason.row();
                row(close.label, close.http_status, close.text, close.side, close.retry)
            }
        }
    }
}

impl From<CloseReason> for ProblemKind {
    fn from(reason: CloseReason) -> Self {
        Self::Stream(reason)
    }
}

/// The body of an error answer, `application/problem+json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// `urn:midspan:problem:` and a name that stays the same over releases.
    #[serde(rename = "type")]
    pub kind: String,
    /// The same for every problem of this type.
    pub title: String,
    /// The HTTP status.
    pub status: u16,
    /// What happened this time, and what to do.
    pub detail: String,
    /// Whose fault it is.
    pub fault: Side,
    /// Whether the same request may succeed later.
    pub retry: bool,
    /// What to quote when asking about it: the id in the relay's log.
    pub request_id: String,
    /// What the device gave as its reason.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device_reason: Option<String>,
    /// Which limit was reached.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<LimitReached>,
    /// How long to wait before another try, in seconds; also in `Retry-After`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after_seconds: Option<u64>,
    /// The methods that are allowed, for the header `Allow` of a 405.
    #[serde(skip)]
    pub allow: Option<&'static str>,
}

impl Problem {
    /// A problem of `kind`. The request id is filled in where the answer is sent.
    pub fn new(kind: ProblemKind, detail: impl Into<String>) -> Self {
        let row = kind.row();
        let retry_after_seconds = (row.status == 503).then_some(1);
        Self {
            kind: format!("{TYPE_PREFIX}{}", row.name),
            title: row.title.to_owned(),
            status: row.status,
            detail: detail.into(),
            fault: row.side,
            retry: row.retry,
            request_id: String::new(),
            device_reason: None,
            limit: None,
            retry_after_seconds,
            allow: None,
        }
    }

    /// The end of a stream, or of its handshake, in its own words.
    pub fn from_close(reason: CloseReason) -> Self {
        Self::new(reason.into(), reason.row().text)
    }

    /// The end of a stream that this problem tells of, if it does.
    pub fn close_reason(&self) -> Option<CloseReason> {
        let name = self.name()?;
        CloseReason::ALL.iter().copied().find(|reason| reason.label() == name)
    }

    /// The name at the end of `type`, when it is one of Midspan's.
    pub fn name(&self) -> Option<&str> {
        self.kind.strip_prefix(TYPE_PREFIX)
    }
}

impl From<LimitReached> for Problem {
    fn from(limit: LimitReached) -> Self {
        let mut problem = Self::new(ProblemKind::LimitReached, limit.to_string());
        problem.retry_after_seconds = Some(limit.retry_after_seconds);
        problem.limit = Some(limit);
        problem
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn names_are_unique() {
        let own = ProblemKind::OWN.into_iter();
        let all: Vec<_> = own.chain(CloseReason::ALL.iter().map(|&reason| reason.into())).collect();
        let names: BTreeSet<_> = all.iter().map(|kind| kind.row().name).collect();
        assert_eq!(names.len(), all.len());
    }

    #[test]
    fn the_answers_of_a_handshake_have_each_their_own_status() {
        let kinds = [
            ProblemKind::Stream(CloseReason::DeviceOffline),
            ProblemKind::Stream(CloseReason::DeviceRejected),
            ProblemKind::Stream(CloseReason::DeviceSilent),
            ProblemKind::LimitReached,
            ProblemKind::NotAllowed,
            ProblemKind::Unauthorized,
        ];
        let statuses: BTreeSet<_> = kinds.iter().map(|kind| kind.row().status).collect();
        assert_eq!(statuses.len(), kinds.len());
    }

    #[test]
    fn problems_read_back() {
        let problem = Problem::from_close(CloseReason::DeviceRejected);
        let json = serde_json::to_string(&problem).unwrap();
        assert!(json.contains("\"type\":\"urn:midspan:problem:device_rejected\""), "{json}");
        assert_eq!(serde_json::from_str::<Problem>(&json).unwrap(), problem);
    }
}
