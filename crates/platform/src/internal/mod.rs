//! How the processes of one relay call each other: HTTP over mutual TLS, on a port that only they reach.
//!
//! Each process shows a certificate of the relay's internal CA with the fixed name of its role, whatever its address is.
//! Control replicas are called over one HTTP/2 connection each, because a call may be held open for as long as a device
//! thinks. Edges speak HTTP/1.1, because what they mostly get is legs, each of which becomes a `WebSocket`.

mod calls;
mod tls;

#[cfg(test)]
mod tests;

use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use anyhow::bail;
use bytes::Bytes;
use clap::Args;
use futures_util::future::BoxFuture;
use http::{Method, StatusCode};
use midspan_core::{
    id::Incarnation,
    json,
    problem::{Problem, ProblemKind},
};
use rustls::ServerConfig;

pub(crate) use self::calls::{CALLS_MAX, Tasks};
pub use self::calls::{CallError, Calls, Internal, NoCalls};
use self::tls::Identity;
use crate::{
    http::{HttpRequest, HttpResponse, body, header, problem, with_body},
    lifecycle::Lifecycle,
    rendezvous::ServerRole,
    tls::TlsFiles,
};

/// Where other processes of the relay reach this one, and who they are.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Other processes of the relay")]
pub struct InternalSettings {
    /// Address for other processes of the relay (mutual TLS); without one this process is alone
    #[arg(
        long,
        env = "MIDSPAN_INTERNAL_LISTEN",
        value_name = "ADDRESS",
        requires_all = ["internal_ca", "internal_certificate", "internal_key"]
    )]
    pub internal_listen: Option<SocketAddr>,
    /// Where others find that address, `host:port`; the address itself if it names one
    #[arg(long, env = "MIDSPAN_INTERNAL_ADDRESS", value_name = "HOST:PORT", requires = "internal_listen")]
    pub internal_address: Option<String>,
    /// The CA of the relay's processes (PEM), read again when it changes
    #[arg(long, env = "MIDSPAN_INTERNAL_CA", value_name = "FILE", requires = "internal_listen")]
    pub internal_ca: Option<PathBuf>,
    /// This process' certificate of that CA (PEM), for `control.midspan.internal` or `edge.midspan.internal`
    #[arg(long, env = "MIDSPAN_INTERNAL_CERTIFICATE", value_name = "FILE", requires = "internal_listen")]
    pub internal_certificate: Option<PathBuf>,
    /// Private key of that certificate (PEM)
    #[arg(long, env = "MIDSPAN_INTERNAL_KEY", value_name = "FILE", requires = "internal_listen")]
    pub internal_key: Option<PathBuf>,
}

/// The longest question of a call, in bytes.
const QUESTION_MAX: usize = 256 * 1024;

/// The header that names the life that a call is for.
const INCARNATION: &str = "midspan-incarnation";

impl InternalSettings {
    /// Reads the certificates, and again whenever they change. `None` for a process that is alone.
    pub async fn start(
        &self,
        role: ServerRole,
        interval: Duration,
        lifecycle: &Lifecycle,
    ) -> anyhow::Result<Option<(Internal, Arc<ServerConfig>)>> {
        let (Some(ca), Some(certificate), Some(key)) =
            (&self.internal_ca, &self.internal_certificate, &self.internal_key)
        else {
            return Ok(None);
        };
        let files = TlsFiles { certificate: certificate.clone(), key: key.clone() };
        let identity = Identity::read(role, ca.clone(), files, interval, lifecycle).await?;
        let server = identity.server_config()?;
        Ok(Some((Internal::new(identity, lifecycle.clone()), server)))
    }

    /// Where others find the listener at `address`, `host:port`.
    pub fn address(&self, address: SocketAddr) -> anyhow::Result<String> {
        advertised("--internal-address", self.internal_address.as_deref(), address)
    }
}

/// Where others find a listener at `address`: what the `flag` for that says, or the address itself if it names one.
pub fn advertised(flag: &str, told: Option<&str>, address: SocketAddr) -> anyhow::Result<String> {
    match told {
        Some(told) => {
            let valid = told.rsplit_once(':').is_some_and(|(host, port)| {
                !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port > 0)
            });
            anyhow::ensure!(valid, "{flag} {told}: expected host:port");
            Ok(told.to_owned())
        }
        None if address.ip().is_unspecified() => {
            bail!("{flag} is missing: others cannot find {address}; give host:port")
        }
        None => Ok(address.to_string()),
    }
}

/// The name that certificates of a role are for.
fn name_of(role: ServerRole) -> &'static str {
    match role {
        ServerRole::Control => "control.midspan.internal",
        ServerRole::Edge => "edge.midspan.internal",
    }
}

/// Who may call a process of `role`.
fn callers_of(role: ServerRole) -> &'static [ServerRole] {
    match role {
        ServerRole::Control => &[ServerRole::Control],
        ServerRole::Edge => &[ServerRole::Control, ServerRole::Edge],
    }
}

/// Answers a call that is meant for the life `incarnation`: `answer` gets its path and question.
pub async fn answer_call(
    request: HttpRequest,
    incarnation: Incarnation,
    answer: impl FnOnce(String, Bytes) -> BoxFuture<'static, Result<Vec<u8>, Problem>> + Send,
) -> HttpResponse {
    let answered = async {
        if request.method() != Method::POST {
            let mut problem = Problem::new(ProblemKind::MethodNotAllowed, "calls are made with POST");
            problem.allow = Some("POST");
            return Err(problem);
        }
        if header(&request, INCARNATION) != Some(&incarnation.to_string()) {
            return Err(Problem::new(ProblemKind::OwnerGone, "another life of this process was called"));
        }
        let path = request.uri().path().to_owned();
        let question = body(request, QUESTION_MAX).await?;
        answer(path, question).await
    };
    match answered.await {
        Ok(json) => with_body(StatusCode::OK, "application/json", json.into()),
        Err(refusal) => problem(&refusal),
    }
}

/// Reads the question of a call.
pub fn question<T: serde::de::DeserializeOwned>(text: &[u8]) -> Result<T, Problem> {
    json::parse(text).map_err(|error| Problem::new(ProblemKind::BadRequest, error.to_string()))
}
