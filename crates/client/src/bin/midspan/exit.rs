//! Exit codes, and how every failure comes to its own.

use std::{fmt::Write as _, io, process::ExitCode};

use midspan_client::{OpenError, Problem, RequestError, SetupError, StreamError, describe};

/// How `midspan` ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    Ok,
    Other,
    Usage,
    Unreachable,
    NotAllowed,
    Unknown,
    Rejected,
    Silent,
    Limit,
    Unavailable,
    Cut,
}

impl Exit {
    pub(crate) const ALL: [Self; 11] = [
        Self::Ok,
        Self::Other,
        Self::Usage,
        Self::Unreachable,
        Self::NotAllowed,
        Self::Unknown,
        Self::Rejected,
        Self::Silent,
        Self::Limit,
        Self::Unavailable,
        Self::Cut,
    ];

    pub(crate) fn code(self) -> u8 {
        self.row().0
    }

    pub(crate) fn meaning(self) -> &'static str {
        self.row().1
    }

    fn row(self) -> (u8, &'static str) {
        match self {
            Self::Ok => (0, "all went well"),
            Self::Other => (1, "another failure"),
            Self::Usage => (2, "wrong usage: a flag, a file or the connection string"),
            Self::Unreachable => (3, "the relay cannot be reached: name, TCP, proxy or TLS"),
            Self::NotAllowed => (4, "the credential is not accepted, or does not allow this"),
            Self::Unknown => (5, "no such device or stream, or the device is not connected"),
            Self::Rejected => (6, "the device rejected the stream"),
            Self::Silent => (7, "the device did not answer in time"),
            Self::Limit => (8, "a limit was reached"),
            Self::Unavailable => (9, "the relay cannot take this now"),
            Self::Cut => (10, "the stream was cut in the middle"),
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        exit.code().into()
    }
}

/// The exit codes as they stand below `midspan --help`.
pub(crate) fn help() -> String {
    let mut text = "Exit codes:\n".to_owned();
    for exit in Exit::ALL {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "  {:>2}  {}", exit.code(), exit.meaning());
    }
    text.push_str(
        "\nProxies are taken from HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY, in capitals or not.\nSee `midspan COMMAND --help` for each command.",
    );
    text
}

/// Why a command failed: one line for people, and the exit code.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) exit: Exit,
    pub(crate) message: String,
}

impl Failure {
    pub(crate) fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self { exit, message: message.into() }
    }

    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self::new(Exit::Usage, message)
    }

    pub(crate) fn other(message: impl Into<String>) -> Self {
        Self::new(Exit::Other, message)
    }

    /// A failed request about `device`, with the next step where there is one.
    pub(crate) fn opening(device: &impl std::fmt::Display, error: &OpenError) -> Self {
        let exit = Exit::from(error.request());
        let name = error.request().problem().and_then(Problem::name);
        let message = match name {
            Some("device_offline") => format!(
                "device {device} is not connected to the relay; start 'midspan device' there, or wait with --connect-timeout"
            ),
            Some("device_silent") => format!(
                "device {device} is connected but did not answer in time; look at its log, or wait with --response-timeout"
            ),
            _ => error.to_string(),
        };
        Self { exit, message }
    }
}

impl From<&RequestError> for Exit {
    fn from(error: &RequestError) -> Self {
        match error {
            RequestError::Dial(_) | RequestError::Lost { .. } | RequestError::Timeout { .. } => {
                Self::Unreachable
            }
            RequestError::Refused(problem) => match problem.name() {
                Some("device_rejected") => Self::Rejected,
                _ => by_status(problem.status),
            },
            RequestError::Status { status, .. } => by_status(status.as_u16()),
            RequestError::Answer { .. } | RequestError::Url(_) | RequestError::Request(_) => Self::Other,
        }
    }
}

fn by_status(status: u16) -> Exit {
    match status {
        401 | 403 => Exit::NotAllowed,
        404 => Exit::Unknown,
        429 => Exit::Limit,
        502 | 503 => Exit::Unavailable,
        504 => Exit::Silent,
        _ => Exit::Other,
    }
}

impl From<RequestError> for Failure {
    fn from(error: RequestError) -> Self {
        Self::new(Exit::from(&error), error.to_string())
    }
}

impl From<SetupError> for Failure {
    fn from(error: SetupError) -> Self {
        let exit = match &error {
            SetupError::Tls(_) => Exit::Other,
            SetupError::Identity { .. }
            | SetupError::Authorities { .. }
            | SetupError::NoAuthorities
            | SetupError::Host(_) => Exit::Usage,
        };
        Self::new(exit, error.to_string())
    }
}

impl From<StreamError> for Failure {
    fn from(error: StreamError) -> Self {
        let exit = match &error {
            StreamError::Ended { .. }
            | StreamError::Lost(_)
            | StreamError::Silent
            | StreamError::AfterEnd => Exit::Cut,
            StreamError::Local { .. } => Exit::Other,
        };
        Self::new(exit, error.to_string())
    }
}

/// A failure to print a result.
impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::other(format!("cannot write the result: {}", describe(&error)))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use midspan_client::DialError;
    use midspan_core::{
        close::CloseReason,
        problem::ProblemKind::{self, LimitReached, NotAllowed, Unauthorized, Unavailable},
    };

    use super::*;

    #[test]
    fn every_code_is_its_own() {
        let codes: BTreeSet<_> = Exit::ALL.iter().map(|exit| exit.code()).collect();
        assert_eq!(codes.into_iter().collect::<Vec<_>>(), (0..11).collect::<Vec<u8>>());
        for exit in Exit::ALL {
            assert!(help().contains(exit.meaning()), "{exit:?}");
        }
    }

    #[test]
    fn what_the_relay_says_has_its_code() {
        let refused =
            |kind: ProblemKind| Exit::from(&RequestError::Refused(Box::new(Problem::new(kind, "because"))));
        for (kind, exit) in [
            (Unauthorized, Exit::NotAllowed),
            (NotAllowed, Exit::NotAllowed),
            (ProblemKind::DeviceUnknown, Exit::Unknown),
            (ProblemKind::StreamUnknown, Exit::Unknown),
            (CloseReason::DeviceOffline.into(), Exit::Unknown),
            (CloseReason::DeviceRejected.into(), Exit::Rejected),
            (CloseReason::DeviceSilent.into(), Exit::Silent),
            (LimitReached, Exit::Limit),
            (Unavailable, Exit::Unavailable),
            (CloseReason::Draining.into(), Exit::Unavailable),
            (ProblemKind::LegTaken, Exit::Other),
            (ProblemKind::Internal, Exit::Other),
        ] {
            assert_eq!(refused(kind), exit, "{kind:?}");
        }
    }

    #[test]
    fn what_the_network_does_has_its_code() {
        let plaintext = DialError::Plaintext { authority: "h:80".to_owned() };
        assert_eq!(Exit::from(&RequestError::Dial(plaintext)), Exit::Unreachable);
        let cut = StreamError::Ended {
            code: 1011,
            text: "device_lost: the device's connection was lost".to_owned(),
        };
        assert_eq!(Failure::from(cut).exit, Exit::Cut);
        let local = StreamError::Local { kind: io::ErrorKind::Other, reason: "no space left".to_owned() };
        assert_eq!(Failure::from(local).exit, Exit::Other);
    }

    #[test]
    fn an_offline_device_comes_with_the_next_step() {
        let problem = Problem::from_close(CloseReason::DeviceOffline);
        let error = OpenError::Request(RequestError::Refused(Box::new(problem)));
        assert_eq!(
            Failure::opening(&"dev1", &error).message,
            "device dev1 is not connected to the relay; start 'midspan device' there, or wait with --connect-timeout"
        );
    }
}
