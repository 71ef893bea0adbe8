//! Requests to the relay, each over a connection of its own.

use std::{path::PathBuf, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderValue, Method, Request, StatusCode, Uri, header, request, response};
use http_body_util::Full;
use hyper_util::client::proxy::matcher::Matcher;
use midspan_core::{connection_string::ConnectionString, problem::Problem, time::UnixTime};
use secrecy::{ExposeSecret as _, SecretString};
use serde::de::DeserializeOwned;
use thiserror::Error;
use time::{OffsetDateTime, format_description::well_known::Rfc2822};
use tokio::time::timeout;
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        handshake::{client::generate_key, derive_accept_key},
        protocol::{Role, WebSocketConfig},
    },
};
use tracing::debug;

use crate::{
    clock::{Clock, SystemClock, difference},
    dial::{Connection, DialError, Dialer},
    exchange::{Exchanged, exchange},
    tls::{self, Trust},
};

/// How to reach a relay, beyond what the connection string says.
#[derive(Debug, Clone)]
pub struct Options {
    /// Who may vouch for the relay's certificate.
    pub trust: Trust,
    /// Whether to speak plaintext HTTP, and to follow plaintext URLs of legs: credentials are readable on the way.
    pub plaintext: bool,
    /// How long each credential that is signed here is good for.
    pub token_life: Duration,
    /// The clock to sign by.
    pub clock: Arc<dyn Clock>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            trust: Trust::System,
            plaintext: false,
            token_life: Duration::from_secs(3600),
            clock: Arc::new(SystemClock),
        }
    }
}

/// Why a client cannot be made.
#[derive(Debug, Error)]
pub enum SetupError {
    /// A device's connection string where a service's is needed, or the other way round.
    #[error("this needs the connection string of a {needed}, and was given that of {given}")]
    Identity {
        /// `device` or `service`.
        needed: &'static str,
        /// Whose it is.
        given: String,
    },
    /// The file with certificate authorities cannot be used.
    #[error("cannot use the certificate authorities in {}: {reason}", path.display())]
    Authorities {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The machine trusts nobody.
    #[error("this machine has no certificate authorities; name the relay's CA with --ca FILE")]
    NoAuthorities,
    /// The TLS library refuses its configuration.
    #[error("TLS cannot be set up: {0}")]
    Tls(String),
    /// The host of the connection string does not make a URL.
    #[error("{0} is not a host that a URL could hold")]
    Host(String),
}

/// Why a request had no success.
#[derive(Debug, Error)]
pub enum RequestError {
    /// There was no connection.
    #[error(transparent)]
    Dial(#[from] DialError),
    /// The relay refused, and says why.
    #[error("{}", .0.detail)]
    Refused(Box<Problem>),
    /// Somebody answered who is no Midspan relay, such as a proxy or a load balancer on the way.
    #[error("{authority} answered {status}, without saying why in a relay's words")]
    Status {
        /// Host and port.
        authority: String,
        /// The HTTP status.
        status: StatusCode,
    },
    /// The answer is not understood.
    #[error("the answer of {authority} is not understood: {reason}")]
    Answer {
        /// Host and port.
        authority: String,
        /// Why.
        reason: String,
    },
    /// The connection ended before the answer.
    #[error("the connection to {authority} was lost: {reason}")]
    Lost {
        /// Host and port.
        authority: String,
        /// Why.
        reason: String,
    },
    /// There was no answer in time.
    #[error("{authority} did not answer within {} s", .waited.as_secs())]
    Timeout {
        /// Host and port.
        authority: String,
        /// How long it had.
        waited: Duration,
    },
    /// The relay handed out a URL that is none.
    #[error("the relay handed out a URL that cannot be used: {0}")]
    Url(String),
    /// The request cannot be put on the wire.
    #[error("the request cannot be sent: {0}")]
    Request(String),
}

impl RequestError {
    /// Whether the connection broke, and another one may do: the relay did not refuse.
    fn is_broken_dial(&self) -> bool {
        match self {
            Self::Dial(_) | Self::Lost { .. } | Self::Timeout { .. } => true,
            // The relay has not noticed yet that the connection before this one is gone.
            Self::Refused(problem) => problem.name() == Some("leg_taken"),
            Self::Status { .. } | Self::Answer { .. } | Self::Url(_) | Self::Request(_) => false,
        }
    }

    /// The relay's problem document, when it was the relay that refused.
    pub fn problem(&self) -> Option<&Problem> {
        if let Self::Refused(problem) = self { Some(problem) } else { None }
    }
}

/// A connection that speaks WebSocket from here on.
pub(crate) struct Upgraded {
    pub(crate) connection: Connection,
    /// What came with the answer to the upgrade.
    pub(crate) early: Bytes,
}

/// One relay, as one identity.
#[derive(Debug)]
pub(crate) struct Relay {
    pub(crate) connection: ConnectionString,
    pub(crate) clock: Arc<dyn Clock>,
    dialer: Dialer,
    scheme: &'static str,
    token_life: Duration,
}

impl Relay {
    pub(crate) fn new(connection: ConnectionString, options: Options) -> Result<Self, SetupError> {
        let tls = match tls::config(&options.trust) {
            Ok(config) => Some(config),
            Err(_) if options.plaintext => None,
            Err(error) => return Err(error),
        };
        let dialer = Dialer::new(tls, Matcher::from_env(), options.plaintext);
        let scheme = if options.plaintext { "http" } else { "https" };
        let relay = Self { connection, clock: options.clock, dialer, scheme, token_life: options.token_life };
        match relay.uri("/") {
            Ok(uri) if uri.host().is_some() => Ok(relay),
            _ => Err(SetupError::Host(relay.connection.host)),
        }
    }

    /// Calls the API. `path` begins with `/v1`.
    pub(crate) async fn call(
        &self,
        method: Method,
        path: &str,
        body: Option<Vec<u8>>,
        deadline: Duration,
    ) -> Result<Bytes, RequestError> {
        let uri = self.uri(path)?;
        let mut request = Request::builder().method(method).header(header::AUTHORIZATION, self.credential()?);
        if body.is_some() {
            request = request.header(header::CONTENT_TYPE, "application/json");
        }
        let body = Full::from(body.unwrap_or_default());
        match self.exchange(&uri, request, body, deadline).await? {
            Exchanged::Answer(head, body) if head.status.is_success() => Ok(body),
            Exchanged::Answer(head, body) => Err(self.refusal(&uri, &head, &body)),
            Exchanged::Upgraded { head, .. } => {
                Err(RequestError::Status { authority: authority(&uri), status: head.status })
            }
        }
    }

    /// Calls the API for something to read.
    pub(crate) async fn fetch<T: DeserializeOwned>(&self, path: &str) -> Result<T, RequestError> {
        let body = self.call(Method::GET, path, None, CALL_TIMEOUT).await?;
        self.parse(&body)
    }

    pub(crate) fn parse<T: DeserializeOwned>(&self, body: &[u8]) -> Result<T, RequestError> {
        serde_json::from_slice(body).map_err(|error| RequestError::Answer {
            authority: self.connection.host.clone(),
            reason: error.to_string(),
        })
    }

    /// Opens the device link.
    pub(crate) async fn link(
        &self,
        path: &str,
        subprotocol: &'static str,
        config: WebSocketConfig,
    ) -> Result<WebSocketStream<Connection>, RequestError> {
        let request = Request::builder()
            .header(header::AUTHORIZATION, self.credential()?)
            .header(header::SEC_WEBSOCKET_PROTOCOL, subprotocol);
        let (link, head) = self.upgrade(&self.uri(path)?, request).await?;
        let agreed = head.headers.get(header::SEC_WEBSOCKET_PROTOCOL).map(HeaderValue::as_bytes);
        if agreed == Some(subprotocol.as_bytes()) {
            let early = link.early.into();
            let link =
                WebSocketStream::from_partially_read(link.connection, early, Role::Client, Some(config));
            return Ok(link.await);
        }
        let reason = format!("it does not speak {subprotocol}");
        Err(RequestError::Answer { authority: self.connection.host.clone(), reason })
    }

    /// Opens a leg with its ticket. A dial that breaks on the way is repeated: until the legs are joined, the ticket stays good.
    pub(crate) async fn leg(&self, url: &str, ticket: &SecretString) -> Result<Upgraded, RequestError> {
        let uri = leg_uri(url).ok_or_else(|| RequestError::Url(url.to_owned()))?;
        let bearer = SecretString::from(format!("Bearer {}", ticket.expose_secret()));
        let mut pauses = LEG_PAUSES.into_iter();
        loop {
            let request = Request::builder().header(header::AUTHORIZATION, secret_header(&bearer)?);
            match Box::pin(self.upgrade(&uri, request)).await {
                Ok((leg, _)) => return Ok(leg),
                Err(error) if !error.is_broken_dial() => return Err(error),
                Err(error) => match pauses.next() {
                    None => return Err(error),
                    Some(pause) => {
                        debug!("the leg could not be opened: {error}; trying again");
                        tokio::time::sleep(pause).await;
                    }
                },
            }
        }
    }

    async fn upgrade(
        &self,
        uri: &Uri,
        request: request::Builder,
    ) -> Result<(Upgraded, response::Parts), RequestError> {
        let key = generate_key();
        let request = request
            .header(header::CONNECTION, "Upgrade")
            .header(header::UPGRADE, "websocket")
            .header(header::SEC_WEBSOCKET_VERSION, "13")
            .header(header::SEC_WEBSOCKET_KEY, &key);
        match self.exchange(uri, request, Full::default(), CALL_TIMEOUT).await? {
            Exchanged::Upgraded { head, connection, read } => {
                let accept = head.headers.get(header::SEC_WEBSOCKET_ACCEPT).map(HeaderValue::as_bytes);
                if accept != Some(derive_accept_key(key.as_bytes()).as_bytes()) {
                    let reason = "its Sec-WebSocket-Accept does not fit".to_owned();
                    return Err(RequestError::Answer { authority: authority(uri), reason });
                }
                Ok((Upgraded { connection, early: read }, head))
            }
            Exchanged::Answer(head, body) => Err(self.refusal(uri, &head, &body)),
        }
    }

    /// Dials, sends and waits for the answer; dialling has its own deadlines.
    async fn exchange(
        &self,
        uri: &Uri,
        request: request::Builder,
        body: Full<Bytes>,
        deadline: Duration,
    ) -> Result<Exchanged, RequestError> {
        let authority = authority(uri);
        let path = uri.path_and_query().map_or("/", |path| path.as_str());
        let request = request
            .uri(path)
            .header(header::HOST, &authority)
            .header(header::USER_AGENT, concat!("midspan/", env!("CARGO_PKG_VERSION")))
            .body(body)
            .map_err(|error| RequestError::Request(error.to_string()))?;
        debug!(%authority, path, "asking");
        let connection = self.dialer.dial(uri).await?;
        match timeout(deadline, exchange(connection, request)).await {
            Ok(Ok(exchanged)) => {
                debug!(%authority, path, status = exchanged.status().as_u16(), "answered");
                Ok(exchanged)
            }
            Ok(Err(reason)) => Err(RequestError::Lost { authority, reason }),
            Err(_) => Err(RequestError::Timeout { authority, waited: deadline }),
        }
    }

    fn refusal(&self, uri: &Uri, head: &response::Parts, body: &[u8]) -> RequestError {
        refusal(uri, head, body, self.clock.unix_now())
    }

    fn credential(&self) -> Result<HeaderValue, RequestError> {
        secret_header(&self.connection.sign(self.clock.unix_now().plus(self.token_life)))
    }

    fn uri(&self, path: &str) -> Result<Uri, RequestError> {
        let url = format!("{}://{}{path}", self.scheme, self.connection.host);
        url.parse().map_err(|_| RequestError::Url(url))
    }
}

/// `wss://` and `ws://` as the schemes that proxies and ports are looked up by.
fn leg_uri(url: &str) -> Option<Uri> {
    let url = match url.split_once("://")? {
        ("wss" | "https", rest) => format!("https://{rest}"),
        ("ws" | "http", rest) => format!("http://{rest}"),
        _ => return None,
    };
    url.parse().ok().filter(|uri: &Uri| uri.host().is_some_and(|host| !host.is_empty()))
}

fn authority(uri: &Uri) -> String {
    match (uri.host().unwrap_or_default(), uri.port_u16()) {
        (host, Some(port)) => format!("{host}:{port}"),
        (host, None) => host.to_owned(),
    }
}

fn secret_header(text: &SecretString) -> Result<HeaderValue, RequestError> {
    // The library's error does not repeat the text.
    let mut value = HeaderValue::from_str(text.expose_secret()).map_err(|_| {
        RequestError::Request("the credential holds a character that no header can".to_owned())
    })?;
    value.set_sensitive(true);
    Ok(value)
}

fn refusal(uri: &Uri, head: &response::Parts, body: &[u8], here: UnixTime) -> RequestError {
    let Ok(mut problem) = serde_json::from_slice::<Problem>(body) else {
        return RequestError::Status { authority: authority(uri), status: head.status };
    };
    // A wrong clock makes credentials that are over already, or too early.
    if problem.status == 401
        && let Some(words) = date(head).and_then(|relay| difference(here, relay))
    {
        problem.detail = format!("{}; {words}", problem.detail);
    }
    RequestError::Refused(Box::new(problem))
}

/// The relay's clock, from the header `Date` (RFC 9110, section 6.6.1).
fn date(head: &response::Parts) -> Option<UnixTime> {
    let text = head.headers.get(header::DATE)?.to_str().ok()?;
    let time = OffsetDateTime::parse(text, &Rfc2822).ok()?;
    u64::try_from(time.unix_timestamp()).ok().map(UnixTime)
}

/// For an answer that the relay gives by itself, once the connection stands.
pub(crate) const CALL_TIMEOUT: Duration = Duration::from_secs(15);

/// The pauses before a leg is dialled again.
const LEG_PAUSES: [Duration; 2] = [Duration::from_millis(300), Duration::from_millis(1500)];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_of_legs() {
        let scheme = |url| leg_uri(url).and_then(|uri| uri.scheme_str().map(str::to_owned));
        assert_eq!(scheme("wss://relay.example/bridges/x/device").as_deref(), Some("https"));
        assert_eq!(scheme("ws://127.0.0.1:8080/bridges/x/device").as_deref(), Some("http"));
        assert_eq!(scheme("ftp://relay.example/"), None);
        assert_eq!(scheme("wss:///bridges"), None);
        assert_eq!(scheme("relay.example"), None);
    }

    #[test]
    fn nothing_secret_shows() {
        let text = "HostName=h;DeviceId=d;SharedAccessKey=MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=";
        let options = Options { plaintext: true, ..Options::default() };
        let relay = Relay::new(text.parse().unwrap(), options).unwrap();
        assert!(!format!("{relay:?}").contains("MDEy"), "{relay:?}");
        let credential = format!("{:?}", relay.credential().unwrap());
        assert!(!credential.contains("sig"), "{credential}");
        let error = secret_header(&"SECRET\n".to_owned().into()).unwrap_err();
        assert!(!error.to_string().contains("SECRET"), "{error}");
    }

    #[test]
    fn an_answer_without_a_problem_keeps_its_status() {
        let (head, ()) = http::Response::builder().status(502).body(()).unwrap().into_parts();
        let error = refusal(&Uri::from_static("https://relay.example/v1"), &head, b"<html>", UnixTime(0));
        assert_eq!(
            error.to_string(),
            "relay.example answered 502 Bad Gateway, without saying why in a relay's words"
        );
    }

    #[test]
    fn a_refused_credential_comes_with_the_clocks_difference() {
        let problem =
            Problem::new(midspan_core::problem::ProblemKind::Unauthorized, "the signature has expired");
        let body = serde_json::to_vec(&problem).unwrap();
        let (head, ()) = http::Response::builder()
            .status(401)
            .header("date", "Sat, 21 Nov 2026 09:00:00 GMT")
            .body(())
            .unwrap()
            .into_parts();
        let relay = date(&head).unwrap();
        let text = |here| refusal(&Uri::from_static("https://h/"), &head, &body, here).to_string();
        assert_eq!(text(relay), "the signature has expired");
        assert_eq!(
            text(UnixTime(relay.0 - 600)),
            "the signature has expired; this machine's clock is 600 s behind the relay's"
        );
    }
}
