//! Which local targets a device offers, by stream name.

use std::{collections::BTreeMap, str::FromStr};

use midspan_client::StreamName;

/// One `--allow NAME=HOST:PORT`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Allowed {
    pub(crate) name: StreamName,
    pub(crate) target: Target,
}

/// A local address, looked up anew for every stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Target {
    pub(crate) host: String,
    pub(crate) port: u16,
}

/// All of a device's targets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct AllowList(BTreeMap<StreamName, Target>);

impl AllowList {
    pub(crate) fn new(allowed: Vec<Allowed>) -> Result<Self, String> {
        let mut targets = BTreeMap::new();
        for Allowed { name, target } in allowed {
            if targets.insert(name.clone(), target).is_some() {
                return Err(format!("--allow {name}=... stands twice"));
            }
        }
        Ok(Self(targets))
    }

    /// The target of `name`, or the reason for the service.
    pub(crate) fn target(&self, name: &StreamName) -> Result<&Target, String> {
        self.0.get(name).ok_or_else(|| format!("no such service here: {name}"))
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&StreamName, &Target)> {
        self.0.iter()
    }
}

impl FromStr for Allowed {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, target) = text.split_once('=').ok_or("write NAME=HOST:PORT, as in ssh=127.0.0.1:22")?;
        Ok(Self { name: name.parse().map_err(|error| format!("{error}"))?, target: target.parse()? })
    }
}

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (host, port) = text.rsplit_once(':').ok_or("a target is HOST:PORT, as in 127.0.0.1:22")?;
        let bracketed = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        if host.is_empty() || (bracketed.is_none() && host.contains(':')) {
            return Err("write an IPv6 target in brackets, as in [::1]:22".to_owned());
        }
        let port = port.parse().ok().filter(|&port| port != 0).ok_or("a port is a number from 1 to 65535")?;
        Ok(Self { host: bracketed.unwrap_or(host).to_owned(), port })
    }
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_picked_by_name() {
        let allowed = ["ssh=127.0.0.1:22", "web=[::1]:80"].map(|text| text.parse().unwrap());
        let list = AllowList::new(allowed.to_vec()).unwrap();
        assert_eq!(list.target(&"ssh".parse().unwrap()).unwrap().to_string(), "127.0.0.1:22");
        assert_eq!(list.target(&"web".parse().unwrap()).unwrap().to_string(), "[::1]:80");
        assert_eq!(list.target(&"telnet".parse().unwrap()).unwrap_err(), "no such service here: telnet");
    }

    #[test]
    fn mistakes_are_named() {
        for (text, part) in [
            ("ssh", "NAME=HOST:PORT"),
            ("ssh=22", "HOST:PORT"),
            ("ssh=127.0.0.1:0", "1 to 65535"),
            ("ssh=127.0.0.1:ssh", "1 to 65535"),
            ("ssh=::1:22", "brackets"),
            ("ssh=:22", "brackets"),
            ("a/b=127.0.0.1:22", "must not contain '/'"),
        ] {
            let error = text.parse::<Allowed>().unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
        let twice = ["ssh=127.0.0.1:22", "ssh=127.0.0.1:23"].map(|text| text.parse().unwrap());
        assert_eq!(AllowList::new(twice.to_vec()).unwrap_err(), "--allow ssh=... stands twice");
    }
}
