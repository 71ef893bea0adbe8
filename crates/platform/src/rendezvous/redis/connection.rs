//! The connection to Redis: one that is kept up, with a limit on the time of every call.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use futures_util::future::join_all;
use redis::{
    AsyncConnectionConfig, Client, Cmd, ConnectionAddr, ConnectionInfo, ErrorKind, FromRedisValue,
    IntoConnectionInfo as _, RedisConnectionInfo, RedisError, ServerErrorKind, TlsCertificates, TlsMode,
    Value,
    aio::{ConnectionLike as _, MultiplexedConnection},
    cluster::ClusterClientBuilder,
    cluster_async::ClusterConnection,
};
use secrecy::{ExposeSecret as _, SecretString};
use tokio::{sync::watch, time::timeout};
use tracing::{Span, info, warn};

use super::{
    scripts::{self, Script, Scripts},
    settings::{RedisAddress, RedisTarget, Topology},
};
use crate::{
    clock,
    lifecycle::Lifecycle,
    rendezvous::{StoreError, StoreFailure, metrics::StoreMetrics},
};

/// The connection of one process. Dropping the process' lifecycle ends its upkeep, not the connection.
#[derive(Debug)]
pub(super) struct Redis {
    target: RedisTarget,
    scripts: Scripts,
    metrics: StoreMetrics,
    status: watch::Sender<Status>,
    /// The last connection that was found to lead nowhere.
    broken: watch::Sender<u64>,
    /// Calls in a row that took too long, or in a Cluster that reached no server.
    in_a_row: AtomicU32,
}

#[derive(Debug, Clone)]
enum Status {
    /// A try is under way: it is worth waiting for.
    Connecting,
    Connected(Connected),
    /// The last try failed, and the next one has not begun.
    Failed(StoreError),
}

#[derive(Clone)]
struct Connected {
    /// Its place among the connections of this process.
    serial: u64,
    connection: Connection,
    /// Which life of which server; nothing in a Cluster, whose servers come and go under one connection.
    server: Option<Arc<str>>,
}

/// A connection that stands, and which life of which server answers.
struct Dialled {
    connection: Connection,
    server: Option<Arc<str>>,
    address: RedisAddress,
}

#[derive(Clone)]
enum Connection {
    Server(MultiplexedConnection),
    Cluster(ClusterConnection),
}

/// So many of them show that the connection leads nowhere.
const IN_A_ROW_MAX: u32 = 3;

/// The first pause between two tries to connect; each is twice as long as the one before.
const PAUSE_FIRST: Duration = Duration::from_millis(50);

/// The longest pause, so that service is full again within seconds of the server's return.
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// The pause after a refused password, which only a person can put right.
const PAUSE_REFUSED: Duration = Duration::from_secs(3);

/// A connection that lasted this long was worth something: the next try comes at once.
const STABLE: Duration = Duration::from_secs(5);

/// How often the sentinels are asked whether the master is still the same.
const MASTER_CHECK: Duration = Duration::from_secs(1);

/// How often a Cluster's connection itself tries a command again, where the server says that it would help.
const CLUSTER_RETRIES: u32 = 3;

impl Redis {
    pub(super) fn start(target: RedisTarget, metrics: StoreMetrics, lifecycle: &Lifecycle) -> Arc<Self> {
        let redis = Arc::new(Self {
            target,
            scripts: Scripts::new(),
            metrics,
            status: watch::channel(Status::Connecting).0,
            broken: watch::channel(0).0,
            in_a_row: AtomicU32::new(0),
        });
        lifecycle.spawn_recorder(Span::current(), Arc::clone(&redis).keep_connected(lifecycle.clone()));
        redis
    }

    /// Which life of which server answers, as far as one does.
    pub(super) fn server(&self) -> Option<Arc<str>> {
        match &*self.status.borrow() {
            Status::Connected(connected) => connected.server.clone(),
            Status::Connecting | Status::Failed(_) => None,
        }
    }

    pub(super) fn is_cluster(&self) -> bool {
        matches!(self.target.topology, Topology::Cluster(_))
    }

    /// Runs a script on the keys that begin with `base`.
    pub(super) async fn run<T: FromRedisValue>(
        &self,
        script: Script,
        base: &str,
        arguments: &[String],
    ) -> Result<T, StoreError> {
        let command = self.scripts.by_hash(script, base, arguments);
        match self.send(script.label(), &command).await {
            Err(Failed { error, no_script: false }) => Err(error),
            Err(Failed { no_script: true, .. }) => {
                let command = scripts::by_text(script, base, arguments);
                self.send(script.label(), &command).await.map_err(|failed| failed.error)
            }
            Ok(value) => Ok(value),
        }
        .and_then(read)
    }

    /// How many times a Cluster has given slots to another server, as far as the one that answers knows.
    pub(super) async fn cluster_epoch(&self) -> Result<u64, StoreError> {
        let mut command = redis::cmd("CLUSTER");
        command.arg("INFO");
        let value = self.send("cluster_info", &command).await.map_err(|failed| failed.error)?;
        let epoch =
            field(&read::<String>(value)?, "cluster_current_epoch").and_then(|text| text.parse().ok());
        epoch.ok_or_else(|| StoreError::new(StoreFailure::Other, "a Cluster without an epoch"))
    }

    async fn send(&self, operation: &'static str, command: &Cmd) -> Result<Value, Failed> {
        let started = clock::now();
        let limit = self.target.command_timeout;
        let mut serial = 0;
        let called = timeout(limit, async {
            let (of, mut connection) = self.connection().await?;
            serial = of;
            connection.send(command).await.map_err(|error| Failed::from(&error))
        });
        let result = called.await.unwrap_or_else(|_| Err(Failed::from(too_late(limit))));
        self.metrics.took(operation, clock::now().saturating_duration_since(started));
        match &result {
            Ok(_) => self.in_a_row.store(0, Ordering::Relaxed),
            Err(Failed { no_script: true, .. }) => {}
            Err(Failed { error, .. }) => {
                self.metrics.failed(error.failure);
                let in_a_row = || self.in_a_row.fetch_add(1, Ordering::Relaxed) + 1 >= IN_A_ROW_MAX;
                let leads_nowhere = match error.failure {
                    StoreFailure::TimedOut => in_a_row(),
                    // A Cluster's connection finds the servers that are left by itself.
                    StoreFailure::Unreachable if self.is_cluster() => in_a_row(),
                    StoreFailure::Unreachable | StoreFailure::ReadOnly | StoreFailure::Refused => true,
                    StoreFailure::Full | StoreFailure::Other => false,
                };
                if leads_nowhere {
                    self.broken
                        .send_if_modified(|broken| std::mem::replace(broken, (*broken).max(serial)) < serial);
                }
            }
        }
        result
    }

    /// The connection, or why there is none. Waits while one is tried.
    async fn connection(&self) -> Result<(u64, Connection), StoreError> {
        let mut status = self.status.subscribe();
        loop {
            match &*status.borrow_and_update() {
                Status::Connected(connected) => return Ok((connected.serial, connected.connection.clone())),
                Status::Failed(error) => return Err(error.clone()),
                Status::Connecting => {}
            }
            if status.changed().await.is_err() {
                return Err(StoreError::new(StoreFailure::Unreachable, "the process ends"));
            }
        }
    }

    async fn keep_connected(self: Arc<Self>, lifecycle: Lifecycle) {
        let (mut pause, mut known) = (PAUSE_FIRST, None);
        let (stopped, mut broken) = (lifecycle.silent(), self.broken.subscribe());
        for serial in 1.. {
            let dialled = tokio::select! {
                dialled = timeout(self.target.connect_timeout, self.dial()) => dialled,
                () = stopped.cancelled() => return,
            };
            let dialled = dialled.unwrap_or_else(|_| Err(too_late(self.target.connect_timeout)));
            match dialled {
                Ok(Dialled { connection, server, address }) => {
                    info!(store = %self.target, "connected to the rendezvous store");
                    self.in_a_row.store(0, Ordering::Relaxed);
                    self.status.send_replace(Status::Connected(Connected { serial, connection, server }));
                    let since = clock::now();
                    tokio::select! {
                        _ = broken.wait_for(|broken| *broken >= serial) => {}
                        () = self.master_moves(&address) => {}
                        () = stopped.cancelled() => return,
                    }
                    warn!(store = %self.target, "the connection to the rendezvous store is lost");
                    known = None;
                    if clock::now().saturating_duration_since(since) >= STABLE {
                        pause = PAUSE_FIRST;
                    }
                    self.status.send_replace(Status::Connecting);
                }
                Err(error) => {
                    if known != Some(error.failure) {
                        warn!(store = %self.target, %error, "the rendezvous store cannot be reached; trying again");
                    }
                    known = Some(error.failure);
                    self.metrics.failed(error.failure);
                    if error.failure == StoreFailure::Refused {
                        pause = PAUSE_REFUSED;
                    }
                    self.status.send_replace(Status::Failed(error));
                }
            }
            tokio::select! {
                () = tokio::time::sleep(jittered(pause)) => {}
                () = stopped.cancelled() => return,
            }
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }

    async fn dial(&self) -> Result<Dialled, StoreError> {
        let password = self.target.password().await?;
        match &self.target.topology {
            Topology::Server(address) => self.dial_server(address, password.as_ref()).await,
            Topology::Sentinel(master, sentinels) => {
                self.dial_master(master, sentinels, password.as_ref()).await
            }
            Topology::Cluster(nodes) => self.dial_cluster(nodes, password.as_ref()).await,
        }
    }

    async fn dial_server(
        &self,
        address: &RedisAddress,
        password: Option<&SecretString>,
    ) -> Result<Dialled, StoreError> {
        let mut connection = self.dial_one(address, self.target.username.as_deref(), password).await?;
        let mut command = redis::cmd("INFO");
        command.arg("server");
        let information: String =
            command.query_async(&mut connection).await.map_err(|error| fault(&error))?;
        let server = field(&information, "run_id").map(Arc::from);
        Ok(Dialled { connection: Connection::Server(connection), server, address: address.clone() })
    }

    /// Asks all sentinels for the master, and takes the first server they name that is one: a sentinel may be behind.
    async fn dial_master(
        &self,
        master: &str,
        sentinels: &[RedisAddress],
        password: Option<&SecretString>,
    ) -> Result<Dialled, StoreError> {
        let mut error = StoreError::new(StoreFailure::ReadOnly, "the sentinels name no master");
        for address in self.ask_sentinels(master, sentinels).await? {
            match self.dial_server(&address, password).await {
                Ok(mut dialled) => {
                    let role = dialled.connection.send(&redis::cmd("ROLE")).await;
                    if is_master(&role.map_err(|error| fault(&error))?) {
                        return Ok(dialled);
                    }
                }
                Err(failed) => error = failed,
            }
        }
        Err(error)
    }

    /// The servers that the sentinels take for the master, the one that most of them name first: one may be behind.
    async fn ask_sentinels(
        &self,
        master: &str,
        sentinels: &[RedisAddress],
    ) -> Result<Vec<RedisAddress>, StoreError> {
        let password = self.target.sentinel_password().await?;
        // One that is stuck must not use up the master's time.
        let limit = self.target.connect_timeout / 2;
        let asked = sentinels.iter().map(async |sentinel| {
            let asked = timeout(limit, self.ask_sentinel(sentinel, master, password.as_ref())).await;
            asked.unwrap_or_else(|_| Err(too_late(limit)))
        });
        let mut error = StoreError::new(StoreFailure::Unreachable, "no sentinel");
        let mut named: Vec<(usize, RedisAddress)> = Vec::new();
        for answer in join_all(asked).await {
            match answer {
                Ok(address) => match named.iter_mut().find(|(_, known)| *known == address) {
                    Some((votes, _)) => *votes += 1,
                    None => named.push((1, address)),
                },
                Err(failed) => error = failed,
            }
        }
        named.sort_by_key(|(votes, _)| std::cmp::Reverse(*votes));
        if named.is_empty() {
            Err(error)
        } else {
            Ok(named.into_iter().map(|(_, address)| address).collect())
        }
    }

    /// Returns when the sentinels name another server than the one at `address`: it may not know yet that it is the master no
    /// longer, and would take what is lost.
    async fn master_moves(&self, address: &RedisAddress) {
        let Topology::Sentinel(master, sentinels) = &self.target.topology else {
            return std::future::pending().await;
        };
        loop {
            tokio::time::sleep(MASTER_CHECK).await;
            let named = self.ask_sentinels(master, sentinels).await;
            if named.is_ok_and(|named| named.first().is_some_and(|first| first != address)) {
                return;
            }
        }
    }

    async fn ask_sentinel(
        &self,
        sentinel: &RedisAddress,
        master: &str,
        password: Option<&SecretString>,
    ) -> Result<RedisAddress, StoreError> {
        let mut connection = self.dial_one(sentinel, None, password).await?;
        let mut command = redis::cmd("SENTINEL");
        command.arg("get-master-addr-by-name").arg(master);
        let address: Option<(String, u16)> =
            command.query_async(&mut connection).await.map_err(|error| fault(&error))?;
        let unknown = || StoreError::new(StoreFailure::Other, "a sentinel does not know this master");
        let (host, port) = address.ok_or_else(unknown)?;
        Ok(RedisAddress { tls: sentinel.tls, host, port })
    }

    async fn dial_cluster(
        &self,
        nodes: &[RedisAddress],
        password: Option<&SecretString>,
    ) -> Result<Dialled, StoreError> {
        let is_tls = nodes.iter().any(|address| address.tls);
        let addresses: Result<Vec<_>, _> =
            nodes.iter().map(|address| information(address, None, None)).collect();
        let mut builder = ClusterClientBuilder::new(addresses.map_err(|error| fault(&error))?)
            .connection_timeout(self.target.connect_timeout)
            .response_timeout(self.target.command_timeout)
            .retries(CLUSTER_RETRIES)
            .max_retry_wait(u64::try_from(self.target.command_timeout.as_millis() / 4).unwrap_or(u64::MAX));
        if let Some(username) = &self.target.username {
            builder = builder.username(username);
        }
        if let Some(password) = password {
            builder = builder.password(password.expose_secret());
        }
        if is_tls {
            builder = builder.tls(TlsMode::Secure).certs(self.certificates().await?);
        }
        let client = builder.build().map_err(|error| fault(&error))?;
        let connection = client.get_async_connection().await.map_err(|error| fault(&error))?;
        Ok(Dialled { connection: Connection::Cluster(connection), server: None, address: nodes[0].clone() })
    }

    async fn dial_one(
        &self,
        address: &RedisAddress,
        username: Option<&str>,
        password: Option<&SecretString>,
    ) -> Result<MultiplexedConnection, StoreError> {
        let information = information(address, username, password).map_err(|error| fault(&error))?;
        let client = if address.tls {
            Client::build_with_tls(information, self.certificates().await?)
        } else {
            Client::open(information)
        };
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(self.target.connect_timeout))
            .set_response_timeout(Some(self.target.command_timeout));
        let client = client.map_err(|error| fault(&error))?;
        client.get_multiplexed_async_connection_with_config(&config).await.map_err(|error| fault(&error))
    }

    async fn certificates(&self) -> Result<TlsCertificates, StoreError> {
        let root_cert = match &self.target.ca_file {
            None => None,
            Some(file) => Some(tokio::fs::read(file).await.map_err(|error| {
                StoreError::new(StoreFailure::Other, format!("cannot read {}: {error}", file.display()))
            })?),
        };
        Ok(TlsCertificates { client_tls: None, root_cert })
    }
}

impl Connection {
    async fn send(&mut self, command: &Cmd) -> Result<Value, RedisError> {
        let answer = match self {
            Self::Server(connection) => connection.req_packed_command(command),
            Self::Cluster(connection) => connection.req_packed_command(command),
        };
        answer.await?.extract_error()
    }
}

impl std::fmt::Debug for Connected {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connected").field("server", &self.server).finish_non_exhaustive()
    }
}

/// A call that failed, and whether because the server does not know the script.
struct Failed {
    error: StoreError,
    no_script: bool,
}

impl From<StoreError> for Failed {
    fn from(error: StoreError) -> Self {
        Self { error, no_script: false }
    }
}

impl From<&RedisError> for Failed {
    fn from(error: &RedisError) -> Self {
        let no_script = error.kind() == ErrorKind::Server(ServerErrorKind::NoScript);
        Self { error: fault(error), no_script }
    }
}

/// What went wrong. Where a script fails, the server may put its own words before the cause.
fn fault(error: &RedisError) -> StoreError {
    let text = error.to_string();
    let says = |word: &str| error.code() == Some(word) || text.contains(word);
    let failure = if error.is_timeout() {
        StoreFailure::TimedOut
    } else if error.kind() == ErrorKind::AuthenticationFailed
        || ["NOAUTH", "WRONGPASS", "NOPERM"].into_iter().any(says)
    {
        StoreFailure::Refused
    } else if says("READONLY") {
        StoreFailure::ReadOnly
    } else if says("OOM") {
        StoreFailure::Full
    } else if error.is_io_error()
        || matches!(
            error.kind(),
            ErrorKind::ClusterConnectionNotFound
                | ErrorKind::Server(
                    ServerErrorKind::BusyLoading | ServerErrorKind::MasterDown | ServerErrorKind::ClusterDown
                )
        )
    {
        StoreFailure::Unreachable
    } else {
        StoreFailure::Other
    };
    StoreError::new(failure, text)
}

fn too_late(limit: Duration) -> StoreError {
    StoreError::new(StoreFailure::TimedOut, format!("no answer within {limit:?}"))
}

fn read<T: FromRedisValue>(value: Value) -> Result<T, StoreError> {
    T::from_redis_value(value)
        .map_err(|error| StoreError::new(StoreFailure::Other, format!("an answer of another form: {error}")))
}

fn information(
    address: &RedisAddress,
    username: Option<&str>,
    password: Option<&SecretString>,
) -> Result<ConnectionInfo, RedisError> {
    let host = address.host.clone();
    let address = if address.tls {
        ConnectionAddr::TcpTls { host, port: address.port, insecure: false, tls_params: None }
    } else {
        ConnectionAddr::Tcp(host, address.port)
    };
    let mut settings = RedisConnectionInfo::default();
    if let Some(username) = username {
        settings = settings.set_username(username);
    }
    if let Some(password) = password {
        settings = settings.set_password(password.expose_secret());
    }
    Ok(address.into_connection_info()?.set_redis_settings(settings))
}

/// A field of the answer to `INFO` or `CLUSTER INFO`.
fn field<'a>(information: &'a str, name: &str) -> Option<&'a str> {
    information.lines().find_map(|line| line.trim().strip_prefix(name)?.strip_prefix(':'))
}

/// Whether this is a master's answer to `ROLE`.
fn is_master(role: &Value) -> bool {
    matches!(role, Value::Array(parts) if matches!(parts.first(), Some(Value::BulkString(name)) if name == b"master"))
}

/// A time between half of `pause` and all of it, so that many processes do not come back at once.
fn jittered(pause: Duration) -> Duration {
    let share = u32::try_from(clock::random_u64() % 512).unwrap_or_default() + 512;
    pause * share / 1024
}
