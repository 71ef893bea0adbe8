//! Where Redis is, and how to get in.

use std::{convert::Infallible, fmt, path::PathBuf, str::FromStr, time::Duration};

use anyhow::{Context as _, bail};
use clap::Args;
use secrecy::SecretString;

use crate::rendezvous::{StoreError, StoreFailure};

/// The rendezvous store that all processes of a relay share.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Store")]
pub struct RedisSettings {
    /// `redis://host:port` of Redis (6.2 or later) or Valkey, `rediss://` for TLS; several nodes of a Cluster, or several sentinels, by comma. Without it, records are kept in memory and no other process sees them
    #[arg(long, env = "MIDSPAN_REDIS_URL", value_name = "URL", value_delimiter = ',')]
    pub redis_url: Vec<RedisUrl>,
    /// The URLs are nodes of a Redis Cluster
    #[arg(long, env = "MIDSPAN_REDIS_CLUSTER", conflicts_with = "redis_sentinel_master")]
    pub redis_cluster: bool,
    /// The URLs are sentinels, which know the master by this name
    #[arg(long, env = "MIDSPAN_REDIS_SENTINEL_MASTER", value_name = "NAME")]
    pub redis_sentinel_master: Option<String>,
    /// The sentinels' password, when they have one; read again at each connection
    #[arg(long, env = "MIDSPAN_REDIS_SENTINEL_PASSWORD_FILE", value_name = "FILE")]
    pub redis_sentinel_password_file: Option<PathBuf>,
    /// The ACL user; the default user without it
    #[arg(long, env = "MIDSPAN_REDIS_USERNAME", value_name = "NAME")]
    pub redis_username: Option<String>,
    /// The user's password; read again at each connection
    #[arg(long, env = "MIDSPAN_REDIS_PASSWORD_FILE", value_name = "FILE")]
    pub redis_password_file: Option<PathBuf>,
    /// The CA that has signed the server's certificate (PEM); those of the system without it
    #[arg(long, env = "MIDSPAN_REDIS_CA_FILE", value_name = "FILE")]
    pub redis_ca_file: Option<PathBuf>,
    /// What all keys begin with; another one for each relay that shares the server
    #[arg(long, env = "MIDSPAN_REDIS_PREFIX", default_value = "midspan:", value_name = "TEXT")]
    pub redis_prefix: String,
    /// How long one try to connect may take
    #[arg(long, env = "MIDSPAN_REDIS_CONNECT_TIMEOUT", default_value = "1s", value_name = "TIME", value_parser = crate::duration::positive)]
    pub redis_connect_timeout: Duration,
    /// How long one call may take
    #[arg(long, env = "MIDSPAN_REDIS_COMMAND_TIMEOUT", default_value = "1s", value_name = "TIME", value_parser = crate::duration::positive)]
    pub redis_command_timeout: Duration,
}

/// A URL, or why it is none: an error of the command line would show a password that should not stand there.
#[derive(Debug, Clone)]
pub struct RedisUrl(Result<RedisAddress, &'static str>);

/// Where one server is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RedisAddress {
    pub(super) tls: bool,
    pub(super) host: String,
    pub(super) port: u16,
}

/// What the addresses are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Topology {
    /// A single server.
    Server(RedisAddress),
    /// Sentinels that know the master by a name.
    Sentinel(String, Vec<RedisAddress>),
    /// Some servers of a Cluster.
    Cluster(Vec<RedisAddress>),
}

/// Where to connect to.
#[derive(Debug, Clone)]
pub(super) struct RedisTarget {
    pub(super) topology: Topology,
    pub(super) username: Option<String>,
    password_file: Option<PathBuf>,
    sentinel_password_file: Option<PathBuf>,
    pub(super) ca_file: Option<PathBuf>,
    pub(super) connect_timeout: Duration,
    pub(super) command_timeout: Duration,
}

const PORT: u16 = 6379;

impl RedisSettings {
    pub(super) fn target(&self) -> anyhow::Result<RedisTarget> {
        let addresses: Result<Vec<_>, _> = self.redis_url.iter().map(|url| url.0.clone()).collect();
        let addresses = addresses.map_err(anyhow::Error::msg).context("--redis-url cannot be used")?;
        if self.redis_prefix.contains(['{', '}']) {
            bail!(
                "--redis-prefix must not contain braces, which mark the part of a key that a Cluster hashes"
            );
        }
        let topology = match (&self.redis_sentinel_master, addresses.as_slice()) {
            (_, []) => bail!("--redis-url is missing"),
            (Some(master), _) => Topology::Sentinel(master.clone(), addresses),
            (None, _) if self.redis_cluster => Topology::Cluster(addresses),
            (None, [address]) => Topology::Server(address.clone()),
            (None, _) => bail!(
                "several --redis-url are nodes of a Cluster (--redis-cluster) or sentinels (--redis-sentinel-master)"
            ),
        };
        Ok(RedisTarget {
            topology,
            username: self.redis_username.clone(),
            password_file: self.redis_password_file.clone(),
            sentinel_password_file: self.redis_sentinel_password_file.clone(),
            ca_file: self.redis_ca_file.clone(),
            connect_timeout: self.redis_connect_timeout,
            command_timeout: self.redis_command_timeout,
        })
    }
}

impl RedisTarget {
    pub(super) async fn password(&self) -> Result<Option<SecretString>, StoreError> {
        secret(self.password_file.as_ref()).await
    }

    pub(super) async fn sentinel_password(&self) -> Result<Option<SecretString>, StoreError> {
        secret(self.sentinel_password_file.as_ref()).await
    }
}

async fn secret(file: Option<&PathBuf>) -> Result<Option<SecretString>, StoreError> {
    let Some(file) = file else { return Ok(None) };
    match tokio::fs::read_to_string(file).await {
        Ok(text) => Ok(Some(text.trim().to_owned().into())),
        Err(error) => {
            Err(StoreError::new(StoreFailure::Refused, format!("cannot read {}: {error}", file.display())))
        }
    }
}

impl fmt::Display for RedisTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (what, addresses) = match &self.topology {
            Topology::Server(address) => ("redis", std::slice::from_ref(address)),
            Topology::Sentinel(_, sentinels) => ("sentinels", sentinels.as_slice()),
            Topology::Cluster(nodes) => ("cluster", nodes.as_slice()),
        };
        f.write_str(what)?;
        addresses.iter().try_for_each(|address| write!(f, " {}:{}", address.host, address.port))
    }
}

impl FromStr for RedisUrl {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(Self(text.parse()))
    }
}

impl FromStr for RedisAddress {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.contains('@') {
            return Err(
                "it holds a user or a password, which everybody on this machine can read on a command line; \
                        use --redis-username and --redis-password-file",
            );
        }
        let (tls, rest) = match text.split_once("://") {
            Some(("redis", rest)) => (false, rest),
            Some(("rediss", rest)) => (true, rest),
            _ => return Err("it begins with neither redis:// nor rediss://"),
        };
        let authority: http::uri::Authority = rest
            .trim_end_matches('/')
            .parse()
            .map_err(|_| "it is not redis://host:port, without anything behind")?;
        let host = authority.host().trim_start_matches('[').trim_end_matches(']');
        if host.is_empty() {
            return Err("it has no host");
        }
        Ok(Self { tls, host: host.to_owned(), port: authority.port_u16().unwrap_or(PORT) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_name_hosts_and_nothing_secret() {
        let address = |tls, host: &str, port| Ok(RedisAddress { tls, host: host.to_owned(), port });
        assert_eq!("redis://cache".parse(), address(false, "cache", 6379));
        assert_eq!("rediss://cache.example:7000/".parse(), address(true, "cache.example", 7000));
        assert_eq!("redis://[::1]:7000".parse(), address(false, "::1", 7000));
        for text in ["", "cache:6379", "http://cache", "redis://", "redis://cache/1", "redis://:6379"] {
            assert!(text.parse::<RedisAddress>().is_err(), "{text:?}");
        }
        let Ok(url) = "redis://:hunter2@cache".parse::<RedisUrl>();
        assert!(url.0.as_ref().unwrap_err().contains("--redis-password-file"));
        assert!(!format!("{url:?}").contains("hunter2"));
    }
}
