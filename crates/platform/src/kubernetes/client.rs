use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, anyhow, bail};
use bytes::Bytes;
use http::{
    HeaderValue, Request, Response, Uri,
    header::{AUTHORIZATION, HOST, RETRY_AFTER, USER_AGENT},
};
use http_body_util::{BodyExt as _, Either, Full, Limited};
use hyper::{body::Incoming, client::conn::http1, rt::Executor as _};
use hyper_util::rt::TokioIo;
use kube::{Client, client::Body};
use rustls::{ClientConfig, crypto::aws_lc_rs, pki_types::ServerName};
use tokio::{
    net::TcpStream,
    sync::Mutex,
    time::{Instant, timeout},
};
use tokio_rustls::TlsConnector;
use tower::BoxError;

use super::KubernetesTiming;
use crate::{internal::Tasks, lifecycle::Lifecycle, tls};

/// How the API server is reached: kube's requests over a connection for each.
///
/// kube's own connections would neither limit the size of an answer nor the time to it, know the CA and the token of now, nor
/// belong to the process.
#[derive(Debug)]
pub(super) struct ApiServer {
    authority: String,
    address: String,
    name: ServerName<'static>,
    account: Account,
    timing: KubernetesTiming,
    lifecycle: Lifecycle,
    /// When the next request may begin.
    next: Mutex<Instant>,
}

/// The folder of the service account, which Kubernetes keeps up to date.
#[derive(Debug, Clone)]
pub(super) struct Account(pub(super) PathBuf);

/// An answer did not come in time.
#[derive(Debug, thiserror::Error)]
#[error("no answer within {0:?}")]
pub(super) struct TimedOut(Duration);

/// The longest answer; a watch that has told more begins anew.
const ANSWER_MAX: usize = 16 * 1024 * 1024;

/// A server cannot send us away for longer than this.
const LONGEST_RETRY_AFTER: Duration = Duration::from_secs(60);

type Answer = Either<Full<Bytes>, Limited<Incoming>>;

impl ApiServer {
    pub(super) fn new(
        api: &Uri,
        account: Account,
        timing: KubernetesTiming,
        lifecycle: Lifecycle,
    ) -> anyhow::Result<Self> {
        let (Some("https"), Some(host), "" | "/", None) =
            (api.scheme_str(), api.host(), api.path(), api.query())
        else {
            bail!("expected https://host or https://host:port");
        };
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let port = api.port_u16().unwrap_or(443);
        Ok(Self {
            authority: api.authority().map(ToString::to_string).unwrap_or_default(),
            address: if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") },
            name: ServerName::try_from(host.to_owned())?,
            account,
            timing,
            lifecycle,
            next: Mutex::new(Instant::now()),
        })
    }

    /// The client of kube that asks this server. It has one task, which ends when it is dropped.
    pub(super) fn client(self, namespace: &str) -> Client {
        let server = Arc::new(self);
        let service = tower::service_fn(move |request| {
            let server = Arc::clone(&server);
            async move { server.ask(request).await }
        });
        Client::new(service, namespace)
    }

    async fn ask(&self, request: Request<Body>) -> Result<Response<Answer>, BoxError> {
        self.turn().await;
        let is_watch =
            request.uri().query().is_some_and(|query| query.split('&').any(|it| it == "watch=true"));
        let answered = async {
            let (head, body) = self.send(request).await?.into_parts();
            let body = Limited::new(body, ANSWER_MAX);
            let body = if is_watch && head.status.is_success() {
                Either::Right(body)
            } else {
                Either::Left(Full::new(body.collect().await?.to_bytes()))
            };
            Ok(Response::from_parts(head, body))
        };
        let limit = self.timing.answer;
        let response: Result<_, BoxError> = timeout(limit, answered).await.map_err(|_| TimedOut(limit))?;
        if let Ok(response) = &response
            && let Some(wait) = retry_after(response.headers())
        {
            *self.next.lock().await = Instant::now() + wait;
        }
        response
    }

    /// Waits for the next request's time: whatever the server answers, it is not asked all the time.
    async fn turn(&self) {
        let at = {
            let mut next = self.next.lock().await;
            let at = (*next).max(Instant::now());
            *next = at + self.timing.between_requests;
            at
        };
        tokio::time::sleep_until(at).await;
    }

    async fn send(&self, mut request: Request<Body>) -> Result<Response<Incoming>, BoxError> {
        let headers = request.headers_mut();
        headers.insert(HOST, HeaderValue::from_str(&self.authority)?);
        headers.insert(AUTHORIZATION, self.account.authorization().await?);
        headers.insert(USER_AGENT, HeaderValue::from_static(concat!("midspan/", env!("CARGO_PKG_VERSION"))));
        let tls = TlsConnector::from(self.account.tls().await?);
        let socket = TcpStream::connect(&self.address).await?;
        let socket = tls.connect(self.name.clone(), socket).await?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(socket)).await?;
        Tasks(self.lifecycle.clone()).execute(connection);
        Ok(sender.send_request(request).await?)
    }
}

impl Account {
    /// The namespace of this pod.
    pub(super) async fn namespace(&self) -> anyhow::Result<String> {
        Ok(self.read("namespace").await?.trim().to_owned())
    }

    /// The token of now: it expires within the hour, and another one takes its place before.
    pub(super) async fn authorization(&self) -> anyhow::Result<HeaderValue> {
        let token = self.read("token").await?;
        let header = HeaderValue::try_from(format!("Bearer {}", token.trim()));
        // Not the error of the library, which may tell what it was given.
        let mut header = header.map_err(|_| anyhow!("the token of the service account is broken"))?;
        header.set_sensitive(true);
        Ok(header)
    }

    /// The server must show a certificate of the cluster's CA.
    pub(super) async fn tls(&self) -> anyhow::Result<Arc<ClientConfig>> {
        let roots =
            tls::roots("the cluster's CA", &self.0.join("ca.crt"), self.read("ca.crt").await?.as_bytes())?;
        let client = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()
            .context("TLS cannot be set up")?
            .with_root_certificates(roots)
            .with_no_client_auth();
        Ok(Arc::new(client))
    }

    async fn read(&self, name: &str) -> anyhow::Result<String> {
        let file: &Path = &self.0.join(name);
        tokio::fs::read_to_string(file).await.with_context(|| format!("cannot read {}", file.display()))
    }
}

/// How long the server asks to be left alone.
fn retry_after(headers: &http::HeaderMap) -> Option<Duration> {
    let seconds = headers.get(RETRY_AFTER)?.to_str().ok()?.parse().ok()?;
    Some(Duration::from_secs(seconds).min(LONGEST_RETRY_AFTER))
}
