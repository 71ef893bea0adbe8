//! The flags of `midspan`, and what every command makes of them.

use std::{fs, path::PathBuf, time::Duration};

use clap::{ArgAction, Args, Parser, ValueEnum};
use midspan_client::{ConnectionString, Identity, Options, Service, Trust, describe};
use secrecy::{ExposeSecret as _, SecretString};

use crate::{
    commands::Command,
    exit::{self, Failure},
};

/// Reach a device by its id alone, through a Midspan relay.
#[derive(Debug, Parser)]
#[command(name = "midspan", version, max_term_width = 110, after_help = exit::help())]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What every command takes.
#[derive(Debug, Args)]
#[command(next_help_heading = "Options of every command")]
pub(crate) struct Global {
    /// Read the connection string from this file; else it is taken from `MIDSPAN_CONNECTION_STRING`
    #[arg(long, global = true, value_name = "FILE", env = "MIDSPAN_CONNECTION_STRING_FILE")]
    pub(crate) connection_string_file: Option<PathBuf>,
    /// Trust only the certificate authorities in this PEM file, instead of the machine's
    #[arg(long, global = true, value_name = "FILE", env = "MIDSPAN_CA")]
    pub(crate) ca: Option<PathBuf>,
    /// Speak plaintext with the relay; credentials and data can be read on the way
    #[arg(long, global = true)]
    pub(crate) insecure_plaintext: bool,
    /// How long a credential that is signed here is good for [default: 12h for a service, 1h for a device]
    #[arg(long, global = true, value_name = "TIME", value_parser = seconds)]
    pub(crate) token_ttl: Option<Duration>,
    /// How to print results
    #[arg(short, long, global = true, value_enum, default_value_t = Format::Text, value_name = "FORMAT")]
    pub(crate) output: Format,
    /// How to write log lines to standard error
    #[arg(long, global = true, value_enum, default_value_t = Format::Text, value_name = "FORMAT")]
    pub(crate) log_format: Format,
    /// Log more; twice for everything
    #[arg(short, long, global = true, action = ArgAction::Count, conflicts_with = "quiet")]
    pub(crate) verbose: u8,
    /// Log warnings only
    #[arg(short, long, global = true)]
    pub(crate) quiet: bool,
}

/// Of results or of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// For people.
    Text,
    /// For programs.
    Json,
}

impl Global {
    /// The connection string, which is never taken from a flag: every user of the machine can read those.
    pub(crate) fn connection_string(&self) -> Result<ConnectionString, Failure> {
        let text: SecretString = match &self.connection_string_file {
            Some(path) => fs::read_to_string(path)
                .map_err(|error| Failure::usage(format!("cannot read {}: {}", path.display(), describe(&error))))?
                .into(),
            None => from_environment().ok_or_else(|| {
                Failure::usage(
                    "no connection string: give --connection-string-file FILE, or set MIDSPAN_CONNECTION_STRING",
                )
            })?,
        };
        let parsed = text.expose_secret().parse();
        parsed.map_err(|error| Failure::usage(format!("the connection string is unusable: {error}")))
    }

    /// How to reach the relay.
    pub(crate) fn options(&self, connection: &ConnectionString) -> Result<Options, Failure> {
        let trust = match &self.ca {
            Some(path) => Trust::from_pem_file(path)?,
            None => Trust::System,
        };
        let life = match connection.identity {
            // A stream is cut when the credential that opened it ends.
            Identity::Service(_) => SERVICE_TOKEN_LIFE,
            Identity::Device(_) => DEVICE_TOKEN_LIFE,
        };
        Ok(Options {
            trust,
            plaintext: self.insecure_plaintext,
            token_life: self.token_ttl.unwrap_or(life),
            ..Options::default()
        })
    }

    /// The service that the connection string names.
    pub(crate) fn service(&self) -> Result<Service, Failure> {
        let connection = self.connection_string()?;
        let options = self.options(&connection)?;
        Ok(Service::new(connection, options)?)
    }
}

/// Reads `10s`, `5m` or `1h`, at least one second.
pub(crate) fn seconds(text: &str) -> Result<Duration, String> {
    let time =
        humantime::parse_duration(text).map_err(|error| format!("{error}; write a time as in 10s or 1h"))?;
    if time < Duration::from_secs(1) || time > LONGEST {
        return Err("a time is at least 1s and at most 365days".to_owned());
    }
    Ok(time)
}

/// Reads a time that may also be none at all: `0s`, `10s`, `1m`.
pub(crate) fn seconds_or_none(text: &str) -> Result<Duration, String> {
    if text == "0" || text == "0s" { Ok(Duration::ZERO) } else { seconds(text) }
}

#[expect(
    clippy::disallowed_methods,
    reason = "a flag for a secret would show it to every user of the machine"
)]
fn from_environment() -> Option<SecretString> {
    std::env::var("MIDSPAN_CONNECTION_STRING").ok().filter(|text| !text.is_empty()).map(SecretString::from)
}

const SERVICE_TOKEN_LIFE: Duration = Duration::from_secs(12 * 3600);
const DEVICE_TOKEN_LIFE: Duration = Duration::from_secs(3600);
const LONGEST: Duration = Duration::from_secs(365 * 24 * 3600);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read() {
        assert_eq!(seconds("90s").unwrap().as_secs(), 90);
        assert_eq!(seconds("1h 30m").unwrap().as_secs(), 5400);
        assert!(seconds("0s").is_err());
        assert!(seconds("10").is_err());
        assert_eq!(seconds_or_none("0s").unwrap(), Duration::ZERO);
    }
}
