//! Every outbound connection: address, proxy, TCP, TLS.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::{StreamExt as _, stream::FuturesUnordered};
use http::{Method, Request, StatusCode, Uri, header};
use http_body_util::Full;
use hyper_util::client::proxy::matcher::{Intercept, Matcher};
use midspan_pacing::connect;
use rustls::ClientConfig;
use thiserror::Error;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpStream, lookup_host},
    time::{sleep, timeout},
};

use crate::{
    exchange::{Exchanged, exchange},
    tls::{self, TlsError},
};

/// A connection of any kind: TCP, TLS, or TLS through a proxy.
pub(crate) type Connection = Box<dyn Io>;

/// What a connection can do.
pub(crate) trait Io: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

/// Why there is no connection.
#[derive(Debug, Error)]
pub enum DialError {
    /// The host name has no address.
    #[error("cannot find the address of {host}: {reason}")]
    Resolve {
        /// The name.
        host: String,
        /// Why, in the words of the system.
        reason: String,
    },
    /// No address of the host took the connection.
    #[error("cannot reach {authority}: {reason}")]
    Connect {
        /// Host and port.
        authority: String,
        /// Why, in the words of the system.
        reason: String,
    },
    /// The proxy did not let the connection through.
    #[error("the proxy {proxy} does not connect to {authority}: {reason}")]
    Proxy {
        /// The proxy, without its credentials.
        proxy: String,
        /// Host and port behind it.
        authority: String,
        /// Why.
        reason: String,
    },
    /// The proxy's URL cannot be used.
    #[error("the proxy {proxy} cannot be used: only http:// and https:// proxies can")]
    ProxyKind {
        /// The proxy, without its credentials.
        proxy: String,
    },
    /// TLS did not come about.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// TLS took too long.
    #[error("{authority} did not finish the TLS handshake within {} s", HANDSHAKE_TIMEOUT.as_secs())]
    TlsTimeout {
        /// Host and port.
        authority: String,
    },
    /// Credentials would travel in plaintext.
    #[error("{authority} offers plaintext only; allow it with --insecure-plaintext, or turn on TLS there")]
    Plaintext {
        /// Host and port.
        authority: String,
    },
}

/// Makes connections.
#[derive(Debug)]
pub(crate) struct Dialer {
    tls: Option<Arc<ClientConfig>>,
    proxies: Matcher,
    plaintext: bool,
}

impl Dialer {
    /// A dialer that asks `proxies` for the way. Without `tls` only plaintext works.
    pub(crate) fn new(tls: Option<Arc<ClientConfig>>, proxies: Matcher, plaintext: bool) -> Self {
        Self { tls, proxies, plaintext }
    }

    /// Connects to the host and port of `uri`, with TLS if its scheme is `https`.
    pub(crate) async fn dial(&self, uri: &Uri) -> Result<Connection, DialError> {
        let secure = uri.scheme_str() == Some("https");
        let host = uri.host().unwrap_or_default();
        let port = uri.port_u16().unwrap_or(if secure { 443 } else { 80 });
        let authority = format!("{host}:{port}");
        if !secure && !self.plaintext {
            return Err(DialError::Plaintext { authority });
        }
        let connection = match self.proxies.intercept(uri) {
            None => tcp(host, port).await?,
            Some(proxy) => self.tunnel(&proxy, &authority).await?,
        };
        if secure { self.secure(host, authority, connection).await } else { Ok(connection) }
    }

    async fn secure(
        &self,
        host: &str,
        authority: String,
        connection: Connection,
    ) -> Result<Connection, DialError> {
        let Some(config) = &self.tls else {
            let reason = "this machine has no certificate authorities; name the CA with --ca FILE".to_owned();
            return Err(TlsError::Other { host: host.to_owned(), reason }.into());
        };
        match timeout(HANDSHAKE_TIMEOUT, tls::connect(Arc::clone(config), host, connection)).await {
            Ok(session) => Ok(session?),
            Err(_) => Err(DialError::TlsTimeout { authority }),
        }
    }

    /// Connects to `authority` through an HTTP proxy (RFC 9110, section 9.3.6).
    async fn tunnel(&self, proxy: &Intercept, authority: &str) -> Result<Connection, DialError> {
        let (name, secure) = match proxy.uri().scheme_str() {
            Some("http") => (shown(proxy.uri()), false),
            Some("https") => (shown(proxy.uri()), true),
            _ => return Err(DialError::ProxyKind { proxy: shown(proxy.uri()) }),
        };
        let fail = |reason: String| DialError::Proxy {
            proxy: name.clone(),
            authority: authority.to_owned(),
            reason,
        };
        let host = proxy.uri().host().unwrap_or_default();
        let port = proxy.uri().port_u16().unwrap_or(if secure { 443 } else { 80 });
        let mut connection = tcp(host, port).await.map_err(|error| fail(error.to_string()))?;
        if secure {
            let proxy_authority = format!("{host}:{port}");
            connection = self
                .secure(host, proxy_authority, connection)
                .await
                .map_err(|error| fail(error.to_string()))?;
        }

        let mut request =
            Request::builder().method(Method::CONNECT).uri(authority).header(header::HOST, authority);
        if let Some(credentials) = proxy.basic_auth() {
            request = request.header(header::PROXY_AUTHORIZATION, credentials);
        }
        let request = request.body(Full::<Bytes>::default()).map_err(|error| fail(error.to_string()))?;
        let answer = timeout(HANDSHAKE_TIMEOUT, exchange(connection, request))
            .await
            .map_err(|_| fail(format!("no answer within {} s", HANDSHAKE_TIMEOUT.as_secs())))?;
        match answer.map_err(fail)? {
            Exchanged::Upgraded { connection, read, .. } if read.is_empty() => Ok(connection),
            Exchanged::Upgraded { .. } => Err(fail("it sent data of its own".to_owned())),
            Exchanged::Answer(head, _) => {
                let hint = if head.status == StatusCode::PROXY_AUTHENTICATION_REQUIRED {
                    "; put the proxy's user and password into its URL"
                } else {
                    ""
                };
                Err(fail(format!("it answered {}{hint}", head.status)))
            }
        }
    }
}

/// An I/O error in plain words: `connection refused`, without the system's number.
pub fn describe(error: &io::Error) -> String {
    let text = error.to_string();
    let text = text.split(" (os error").next().unwrap_or_default();
    let mut characters = text.chars();
    let starts_a_word = characters.clone().nth(1).is_some_and(char::is_lowercase);
    match characters.next() {
        Some(first) if starts_a_word => first.to_lowercase().chain(characters).collect(),
        _ => text.to_owned(),
    }
}

/// Tries every address of the host; a later one gets its turn while an earlier one is still silent.
async fn tcp(host: &str, port: u16) -> Result<Connection, DialError> {
    let authority = format!("{host}:{port}");
    let fail = |reason: String| DialError::Connect { authority: authority.clone(), reason };
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    let addresses = match timeout(CONNECT_TIMEOUT, lookup_host((bare, port))).await {
        Ok(Ok(addresses)) => addresses.collect(),
        Ok(Err(error)) => {
            return Err(DialError::Resolve { host: host.to_owned(), reason: describe(&error) });
        }
        Err(_) => {
            let reason = format!("the name service did not answer within {} s", CONNECT_TIMEOUT.as_secs());
            return Err(DialError::Resolve { host: host.to_owned(), reason });
        }
    };
    match timeout(CONNECT_TIMEOUT, first_of(addresses)).await {
        Ok(Ok(stream)) => Ok(Box::new(stream)),
        Ok(Err(error)) => Err(fail(describe(&error))),
        Err(_) => Err(fail(format!("no connection within {} s", CONNECT_TIMEOUT.as_secs()))),
    }
}

async fn first_of(addresses: Vec<SocketAddr>) -> io::Result<TcpStream> {
    let mut addresses = addresses.into_iter();
    let mut attempts = FuturesUnordered::new();
    let mut failure = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    attempts.extend(addresses.next().map(connect));
    loop {
        tokio::select! {
            attempt = attempts.next() => match attempt {
                Some(Ok(stream)) => return Ok(stream),
                Some(Err(error)) => {
                    failure = error;
                    attempts.extend(addresses.next().map(connect));
                }
                None => return Err(failure),
            },
            () = sleep(NEXT_ADDRESS_AFTER), if addresses.len() > 0 => {
                attempts.extend(addresses.next().map(connect));
            }
        }
    }
}

/// Scheme, host and port of a proxy, which is all that may be shown of it.
fn shown(uri: &Uri) -> String {
    let scheme = uri.scheme_str().unwrap_or("http");
    let host = uri.host().unwrap_or_default();
    uri.port_u16().map_or_else(|| format!("{scheme}://{host}"), |port| format!("{scheme}://{host}:{port}"))
}

/// For the name service, and for TCP over all addresses together.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// For the TLS handshake, and for a proxy's answer.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// RFC 8305, section 5: the recommended delay between connection attempts.
const NEXT_ADDRESS_AFTER: Duration = Duration::from_millis(250);

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpListener,
    };

    use super::*;

    #[test]
    fn system_errors_lose_number_and_capital() {
        let refused = io::Error::from_raw_os_error(111);
        assert_eq!(describe(&refused), "connection refused");
        assert_eq!(describe(&io::Error::other("TLS is off")), "TLS is off");
    }

    #[tokio::test]
    async fn a_proxy_is_told_its_credentials_and_nobody_else_is() {
        let (authority, seen) = proxy("HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\n\r\n").await;
        let error = dialer(&format!("http://user:secret@{authority}")).dial(&target()).await.err().unwrap();
        assert_eq!(
            error.to_string(),
            format!(
                "the proxy http://{authority} does not connect to relay.invalid:80: it answered 403 Forbidden"
            )
        );
        let seen = seen.await.unwrap();
        assert!(seen.starts_with("CONNECT relay.invalid:80 HTTP/1.1\r\n"), "{seen}");
        assert!(seen.contains("Basic dXNlcjpzZWNyZXQ="), "{seen}");
    }

    #[tokio::test]
    async fn a_tunnel_is_the_connection() {
        let (authority, _seen) = proxy("HTTP/1.1 200 OK\r\n\r\n").await;
        let mut connection = dialer(&format!("http://{authority}")).dial(&target()).await.unwrap();
        connection.write_all(b"ping").await.unwrap();
        let mut echoed = [0; 4];
        connection.read_exact(&mut echoed).await.unwrap();
        assert_eq!(&echoed, b"ping");
    }

    #[tokio::test]
    async fn other_proxies_and_plaintext_are_refused() {
        let error = dialer("socks5://h:1").dial(&target()).await.err().unwrap();
        assert!(matches!(error, DialError::ProxyKind { .. }), "{error}");
        let strict = Dialer::new(None, Matcher::builder().build(), false);
        let error = strict.dial(&target()).await.err().unwrap();
        assert!(matches!(error, DialError::Plaintext { .. }), "{error}");
    }

    #[tokio::test]
    async fn interactive_bytes_go_out_at_once() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let connection = first_of(vec![listener.local_addr().unwrap()]).await.unwrap();
        assert!(connection.nodelay().unwrap());
    }

    fn dialer(proxy: &str) -> Dialer {
        Dialer::new(None, Matcher::builder().all(proxy).build(), true)
    }

    fn target() -> Uri {
        Uri::from_static("http://relay.invalid/v1/endpoints")
    }

    /// A proxy that answers one request with `answer`, and echoes what comes after.
    async fn proxy(answer: &'static str) -> (SocketAddr, impl Future<Output = io::Result<String>>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (tell, told) = tokio::sync::oneshot::channel();
        #[expect(clippy::disallowed_methods, reason = "ends with the test's runtime")]
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(stream.read_u8().await.unwrap());
            }
            stream.write_all(answer.as_bytes()).await.unwrap();
            let _ = tell.send(String::from_utf8(head).unwrap());
            let (mut reader, mut writer) = stream.split();
            let _ = tokio::io::copy(&mut reader, &mut writer).await;
        });
        (address, async { told.await.map_err(io::Error::other) })
    }
}
