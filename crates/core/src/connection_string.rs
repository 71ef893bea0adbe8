//! Connection strings, the one line that holds all a device or a service needs to reach a relay.
//!
//! `HostName=...;DeviceId=...[;ModuleId=...];SharedAccessKey=...` for a device,
//! `HostName=...;SharedAccessKeyName=...;SharedAccessKey=...` for a service.

use std::{fmt, str::FromStr};

use secrecy::{ExposeSecret as _, SecretString};
use thiserror::Error;

use crate::{
    id::{DeviceAddress, ID_MAX_LENGTH, IdError},
    key::{Key, KeyError},
    sas::SasToken,
    time::UnixTime,
};

/// Where the relay is, and who connects to it.
#[derive(Debug, Clone)]
pub struct ConnectionString {
    /// Host name of the relay, with `:port` where it is not 443.
    pub host: String,
    /// Whose key it is.
    pub identity: Identity,
    /// The key.
    pub key: Key,
}

/// Whose key a connection string holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Identity {
    /// A device, or a module of one.
    Device(DeviceAddress),
    /// A service, by the name of its policy.
    Service(String),
}

/// Why a text is not a connection string. No variant repeats the text, which holds a key.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ConnectionStringError {
    /// A part without `=`.
    #[error("a connection string is a list of Name=Value separated by `;`")]
    Form,
    /// A part that this version does not know.
    #[error(
        "unknown part `{0}`; known are HostName, DeviceId, ModuleId, SharedAccessKeyName, SharedAccessKey"
    )]
    Unknown(String),
    /// A part stands twice.
    #[error("`{0}` stands twice")]
    Twice(&'static str),
    /// A part that is always needed is not there.
    #[error("`{0}` is missing")]
    Missing(&'static str),
    /// Both or neither of `DeviceId` and `SharedAccessKeyName`.
    #[error("give either DeviceId (a device) or SharedAccessKeyName (a service, 1 to {ID_MAX_LENGTH} bytes)")]
    Identity,
    /// The host is not a host name or address with an optional port.
    #[error("HostName must be a host name or address, optionally with `:port`, without a scheme or a path")]
    Host,
    /// The device or module id is not one.
    #[error(transparent)]
    Id(#[from] IdError),
    /// The key is not one.
    #[error("SharedAccessKey: {0}")]
    Key(#[from] KeyError),
}

impl ConnectionString {
    /// The text, with its key, for writing it to a file.
    pub fn to_text(&self) -> SecretString {
        let key = self.key.to_base64();
        let key = key.expose_secret();
        let host = &self.host;
        match &self.identity {
            Identity::Device(DeviceAddress { device, module: None }) => {
                format!("HostName={host};DeviceId={device};SharedAccessKey={key}")
            }
            Identity::Device(DeviceAddress { device, module: Some(module) }) => {
                format!("HostName={host};DeviceId={device};ModuleId={module};SharedAccessKey={key}")
            }
            Identity::Service(name) => {
                format!("HostName={host};SharedAccessKeyName={name};SharedAccessKey={key}")
            }
        }
        .into()
    }

    /// A shared access signature that is good until `expires`, for the `Authorization` header.
    pub fn sign(&self, expires: UnixTime) -> SecretString {
        match &self.identity {
            Identity::Device(address) => {
                SasToken::sign(&format!("{}/{}", self.host, address.audience()), &self.key, expires, None)
            }
            Identity::Service(name) => SasToken::sign(&self.host, &self.key, expires, Some(name)),
        }
    }
}

impl FromStr for ConnectionString {
    type Err = ConnectionStringError;

    fn from_str(text: &str) -> Result<Self, ConnectionStringError> {
        use ConnectionStringError as E;
        let (mut host, mut device, mut module, mut policy, mut key) = (None, None, None, None, None);
        for part in text.trim().split(';').filter(|part| !part.is_empty()) {
            let (name, value) = part.split_once('=').ok_or(E::Form)?;
            let (slot, name) = match name {
                "HostName" => (&mut host, "HostName"),
                "DeviceId" => (&mut device, "DeviceId"),
                "ModuleId" => (&mut module, "ModuleId"),
                "SharedAccessKeyName" => (&mut policy, "SharedAccessKeyName"),
                "SharedAccessKey" => (&mut key, "SharedAccessKey"),
                // A long "name" may be a key whose separator was lost: it is not repeated.
                other if other.len() > 32 => return Err(E::Form),
                other => return Err(E::Unknown(other.to_owned())),
            };
            if slot.replace(value).is_some() {
                return Err(E::Twice(name));
            }
        }
        let host = host.ok_or(E::Missing("HostName"))?;
        if !is_authority(host) {
            return Err(E::Host);
        }
        let identity = match (device, module, policy) {
            (Some(device), module, None) => {
                let module = module.map(str::parse).transpose()?;
                Identity::Device(DeviceAddress { device: device.parse()?, module })
            }
            (None, None, Some(policy)) if (1..=ID_MAX_LENGTH).contains(&policy.len()) => {
                Identity::Service(policy.to_owned())
            }
            _ => return Err(E::Identity),
        };
        let key = Key::from_base64(key.ok_or(E::Missing("SharedAccessKey"))?)?;
        Ok(Self { host: host.to_owned(), identity, key })
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Device(address) => write!(f, "device {address}"),
            Self::Service(name) => write!(f, "service {name}"),
        }
    }
}

/// `host`, `host:port`, `1.2.3.4:port` or `[v6]:port`.
fn is_authority(text: &str) -> bool {
    let legal = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_' | b':' | b'[' | b']');
    if text.is_empty() || text.len() > 260 || !text.bytes().all(legal) {
        return false;
    }
    let host = crate::sas::without_port(text);
    let port_is_legal = match text[host.len()..].strip_prefix(':') {
        None => text.len() == host.len(),
        Some(port) => port.parse::<u16>().is_ok_and(|port| port != 0),
    };
    let bracketed = host.starts_with('[') && host.ends_with(']');
    !host.is_empty() && port_is_legal && (bracketed || !host.contains(['[', ']', ':']))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const KEY: &str = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=";

    #[test]
    fn both_kinds_read_back() {
        for text in [
            format!("HostName=localhost:8443;DeviceId=dev1;SharedAccessKey={KEY}"),
            format!("HostName=relay.example;DeviceId=dev1;ModuleId=m;SharedAccessKey={KEY}"),
            format!("HostName=[::1]:8443;SharedAccessKeyName=service;SharedAccessKey={KEY}"),
        ] {
            let parsed: ConnectionString = text.parse().unwrap();
            assert_eq!(parsed.to_text().expose_secret(), text);
        }
    }

    #[test]
    fn mistakes_are_named() {
        use ConnectionStringError as E;
        for (text, error) in [
            (format!("DeviceId=d;SharedAccessKey={KEY}"), E::Missing("HostName")),
            ("HostName=h;DeviceId=d".to_owned(), E::Missing("SharedAccessKey")),
            (format!("HostName=h;SharedAccessKey={KEY}"), E::Identity),
            (format!("HostName=https://h;DeviceId=d;SharedAccessKey={KEY}"), E::Host),
            (format!("HostName=h:0;DeviceId=d;SharedAccessKey={KEY}"), E::Host),
            (format!("HostName=h;HostName=h;DeviceId=d;SharedAccessKey={KEY}"), E::Twice("HostName")),
            (format!("HostName=h;Device=d;SharedAccessKey={KEY}"), E::Unknown("Device".to_owned())),
            ("HostName".to_owned(), E::Form),
            ("HostName=h;DeviceId=d;SharedAccessKey=!".to_owned(), E::Key(KeyError::Base64)),
        ] {
            assert_eq!(text.parse::<ConnectionString>().unwrap_err(), error);
        }
    }

    #[test]
    fn debug_and_errors_hold_no_key() {
        let parsed: ConnectionString =
            format!("HostName=h;DeviceId=d;SharedAccessKey={KEY}").parse().unwrap();
        assert!(!format!("{parsed:?}").contains("MDEy"));
        let lost_separator = format!("HostName=h;DeviceId=d;{KEY}{KEY}=x");
        assert!(!lost_separator.parse::<ConnectionString>().unwrap_err().to_string().contains("MDEy"));
    }

    proptest! {
        #[test]
        fn parsing_never_panics(text in "(HostName=h;)?[ -~é\\[\\]:;=]{0,120}") {
            let _ = text.parse::<ConnectionString>();
        }
    }
}
