//! Calls to other processes.

use std::{
    collections::HashMap,
    fmt, io,
    sync::{Arc, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use http::{Request, Response, StatusCode, header::CONTENT_TYPE, header::HOST};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{
    body::Incoming,
    client::conn::{http1, http2},
    rt::Executor,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use midspan_core::{problem::Problem, ticket::Owner};
use rustls::pki_types::ServerName;
use thiserror::Error;
use tokio::{
    net::TcpStream,
    runtime::Handle,
    sync::Mutex,
    time::{timeout, timeout_at},
};
use tokio_util::sync::CancellationToken;

use super::{INCARNATION, Identity, name_of};
use crate::{lifecycle::Lifecycle, rendezvous::ServerRole, tls::TlsStream};

/// Why a call had no answer.
#[derive(Debug, Clone, PartialEq, Error)]
pub enum CallError {
    /// There was no connection, or it broke: whether the call was taken is not known.
    #[error("the process cannot be reached: {0}")]
    Unreachable(String),
    /// Another life answers at its address, or nobody does: the process that was meant has ended.
    #[error("the process has ended")]
    Gone,
    /// It refused, and said why.
    #[error("the process refused: {}", .0.detail)]
    Refused(Box<Problem>),
    /// It did not answer in time.
    #[error("the process did not answer in time")]
    TimedOut,
}

/// Calls to the other processes of the relay.
#[async_trait]
pub trait Calls: Send + Sync {
    /// Asks the process `to`, which has the role `role`, a question in JSON, and gives its answer in JSON.
    ///
    /// The call is held open for as long as the other process takes, at most `within`.
    async fn call(
        &self,
        role: ServerRole,
        to: &Owner,
        path: &'static str,
        question: Vec<u8>,
        within: Duration,
    ) -> Result<Bytes, CallError>;
}

/// For a process that is alone.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoCalls;

#[async_trait]
impl Calls for NoCalls {
    async fn call(
        &self,
        _: ServerRole,
        _: &Owner,
        _: &'static str,
        _: Vec<u8>,
        _: Duration,
    ) -> Result<Bytes, CallError> {
        Err(CallError::Unreachable("this process was started without --internal-listen".to_owned()))
    }
}

/// The connections to other processes. Clones share them.
#[derive(Clone)]
pub struct Internal {
    identity: Arc<Identity>,
    lifecycle: Lifecycle,
    replicas: Arc<std::sync::Mutex<HashMap<Owner, Arc<Slot>>>>,
}

type Sender = http2::SendRequest<Full<Bytes>>;

/// The connection to one replica, held while it is made so that it is made once.
type Slot = Mutex<Option<Sender>>;

/// How long a connection to another process may take.
const CONNECT: Duration = Duration::from_secs(2);

/// How often a connection to a control replica is tried while calls are under way, and how long it may take to answer.
const KEEP_ALIVE: Duration = Duration::from_secs(3);

/// The longest answer of a call, in bytes.
const ANSWER_MAX: usize = 256 * 1024;

/// How many calls may be under way to one control replica.
pub(crate) const CALLS_MAX: u32 = 10_000;

impl Internal {
    pub(super) fn new(identity: Arc<Identity>, lifecycle: Lifecycle) -> Self {
        Self { identity, lifecycle, replicas: Arc::default() }
    }

    /// Connects to another process, which proves that it has the role `role`.
    pub async fn dial(&self, role: ServerRole, to: &Owner) -> Result<TlsStream<TcpStream>, CallError> {
        let connected = async {
            let socket = midspan_pacing::connect(&to.address).await?;
            let name = ServerName::try_from(name_of(role)).map_err(io::Error::other)?;
            TlsStream::connect(socket, self.identity.client_config(), name).await
        };
        match timeout(CONNECT, connected).await {
            Ok(Ok(connection)) => Ok(connection),
            Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => Err(CallError::Gone),
            Ok(Err(error)) => Err(CallError::Unreachable(error.to_string())),
            Err(_) => Err(CallError::Unreachable(format!("no connection to {} in time", to.address))),
        }
    }

    async fn send(
        &self,
        role: ServerRole,
        to: &Owner,
        request: Request<Full<Bytes>>,
    ) -> Result<Response<Incoming>, CallError> {
        match role {
            ServerRole::Control => {
                let mut sender = self.replica(to).await?;
                sender.send_request(request).await.map_err(broken)
            }
            ServerRole::Edge => {
                let io = TokioIo::new(self.dial(role, to).await?);
                let (mut sender, connection) = http1::handshake(io).await.map_err(broken)?;
                self.keep(connection);
                sender.send_request(request).await.map_err(broken)
            }
        }
    }

    /// The connection to a control replica, made if there is none.
    async fn replica(&self, to: &Owner) -> Result<Sender, CallError> {
        let slot = {
            let mut replicas = self.replicas.lock().unwrap_or_else(PoisonError::into_inner);
            // Those of replicas that have gone; one that is being made is held by its makers.
            replicas.retain(|_, slot| {
                Arc::strong_count(slot) > 1
                    || slot.try_lock().is_ok_and(|sender| sender.as_ref().is_some_and(|it| !it.is_closed()))
            });
            Arc::clone(replicas.entry(to.clone()).or_default())
        };
        let mut slot = slot.lock().await;
        if let Some(sender) = slot.as_ref().filter(|sender| !sender.is_closed()) {
            return Ok(sender.clone());
        }
        let io = TokioIo::new(self.dial(ServerRole::Control, to).await?);
        let mut builder = http2::Builder::new(Tasks(self.lifecycle.clone()));
        builder.timer(TokioTimer::new()).keep_alive_interval(KEEP_ALIVE).keep_alive_timeout(KEEP_ALIVE);
        let (sender, connection) = builder.handshake(io).await.map_err(broken)?;
        self.keep(connection);
        *slot = Some(sender.clone());
        Ok(sender)
    }

    /// Drives a connection until it ends, or the process does.
    fn keep<E>(&self, connection: impl Future<Output = Result<(), E>> + Send + 'static) {
        let stopped: CancellationToken = self.lifecycle.stopped().clone();
        self.lifecycle.spawn_on(&Handle::current(), async move {
            tokio::select! {
                // Whoever waits for an answer hears of it.
                _ = connection => {}
                () = stopped.cancelled() => {}
            }
        });
    }
}

#[async_trait]
impl Calls for Internal {
    async fn call(
        &self,
        role: ServerRole,
        to: &Owner,
        path: &'static str,
        question: Vec<u8>,
        within: Duration,
    ) -> Result<Bytes, CallError> {
        let deadline = tokio::time::Instant::now() + within;
        let request = Request::post(match role {
            ServerRole::Control => format!("https://{}{path}", name_of(role)),
            ServerRole::Edge => path.to_owned(),
        })
        .header(HOST, name_of(role))
        .header(CONTENT_TYPE, "application/json")
        .header(INCARNATION, to.incarnation.to_string())
        .body(Full::from(question))
        .map_err(|error| CallError::Unreachable(error.to_string()))?;
        let answered = async {
            let response = self.send(role, to, request).await?;
            let status = response.status();
            let answer = Limited::new(response.into_body(), ANSWER_MAX).collect().await;
            let answer = answer.map_err(|error| CallError::Unreachable(error.to_string()))?.to_bytes();
            match status {
                StatusCode::OK => Ok(answer),
                StatusCode::GONE => Err(CallError::Gone),
                status => Err(match serde_json::from_slice(&answer) {
                    Ok(problem) => CallError::Refused(Box::new(problem)),
                    Err(_) => CallError::Unreachable(format!("it answered {status}")),
                }),
            }
        };
        timeout_at(deadline, answered).await.unwrap_or(Err(CallError::TimedOut))
    }
}

#[expect(clippy::needless_pass_by_value, reason = "errors are mapped by it")]
fn broken(error: hyper::Error) -> CallError {
    CallError::Unreachable(error.to_string())
}

/// hyper's own tasks, which belong to the process like all others.
#[derive(Debug, Clone)]
pub(crate) struct Tasks(pub(crate) Lifecycle);

impl<F> Executor<F> for Tasks
where
    F: Future + Send + 'static,
    F::Output: Send,
{
    fn execute(&self, task: F) {
        let stopped = self.0.stopped().clone();
        self.0.spawn_on(&Handle::current(), async move {
            tokio::select! {
                _ = task => {}
                () = stopped.cancelled() => {}
            }
        });
    }
}

impl fmt::Debug for Internal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Internal").field("identity", &self.identity).finish_non_exhaustive()
    }
}
