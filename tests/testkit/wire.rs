use std::{net::SocketAddr, path::Path, sync::Arc};

use bytes::Bytes;
use http::{HeaderMap, Method, Request, header};
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::TokioIo;
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, ServerName, pem::PemObject as _},
};
use tokio::{net::TcpStream, task::JoinSet};
use tokio_rustls::{TlsConnector, client::TlsStream};

use crate::{Answer, within};

/// The connection below every client here.
pub type Io = TlsStream<TcpStream>;

/// Where a relay listens, and how to trust it.
#[derive(Debug, Clone)]
pub struct Target {
    /// The public port.
    pub address: SocketAddr,
    /// The relay's name in `Host` headers, signatures and its certificate, with the port.
    pub authority: String,
    /// Trusts the relay's own CA.
    pub tls: Arc<ClientConfig>,
}

/// A connection after its WebSocket upgrade.
#[derive(Debug)]
pub struct Upgraded {
    /// The connection.
    pub io: Io,
    /// What came right after the header of the answer.
    pub early: Bytes,
    /// The header of the answer.
    pub headers: HeaderMap,
}

/// A TLS configuration that trusts the certificates of a PEM file, and nothing else.
pub fn trusting(pem: &Path) -> Arc<ClientConfig> {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(pem).unwrap() {
        roots.add(certificate.unwrap()).unwrap();
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder =
        ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    Arc::new(builder.with_root_certificates(roots).with_no_client_auth())
}

impl Target {
    /// The host name without its port.
    pub fn host(&self) -> &str {
        midspan_core::sas::without_port(&self.authority)
    }

    /// A TCP connection without TLS.
    pub async fn tcp(&self) -> TcpStream {
        let stream = within("a TCP connection", TcpStream::connect(self.address)).await.unwrap();
        stream.set_nodelay(true).unwrap();
        stream
    }

    /// A TLS connection on which nothing has been sent yet.
    pub async fn connect(&self) -> Io {
        self.try_connect().await.expect("the TLS handshake failed")
    }

    /// Like [`Target::connect`], for when it may fail.
    pub async fn try_connect(&self) -> std::io::Result<Io> {
        let name = ServerName::try_from(self.host().to_owned()).unwrap();
        let tcp = within("a TCP connection", TcpStream::connect(self.address)).await?;
        tcp.set_nodelay(true)?;
        // On the heap, as below: these futures are large, and tests put many into one.
        let handshake = Box::pin(TlsConnector::from(Arc::clone(&self.tls)).connect(name, tcp));
        within("a TLS handshake", handshake).await
    }

    /// Sends one request on a connection of its own. When the future is dropped, so is the connection.
    pub async fn request(&self, request: Request<Full<Bytes>>) -> Answer {
        Self::request_over(self.connect().await, request).await.expect("no answer to a request")
    }

    /// Sends one request on a connection that is there already, and that may break.
    pub async fn request_over(io: Io, request: Request<Full<Bytes>>) -> hyper::Result<Answer> {
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(io)).await?;
        let mut tasks = JoinSet::new();
        tasks.spawn(connection);
        Ok(Answer::read(sender.send_request(request).await?).await)
    }

    /// A request to this relay, with its `Host` header.
    pub fn build(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Request<Full<Bytes>> {
        let mut request =
            Request::builder().method(method).uri(path).header(header::HOST, self.authority.as_str());
        for &(name, value) in headers {
            request = request.header(name, value);
        }
        request.body(Full::new(Bytes::copy_from_slice(body))).unwrap()
    }

    /// Asks for a WebSocket. Gives the refusal when the relay does not switch protocols.
    pub async fn upgrade(&self, path: &str, headers: &[(&str, &str)]) -> Result<Upgraded, Answer> {
        self.upgrade_over(self.connect().await, path, headers).await.expect("no answer to an upgrade")
    }

    /// Does the same on a connection that is there already, and that may break.
    pub async fn upgrade_over(
        &self,
        io: Io,
        path: &str,
        headers: &[(&str, &str)],
    ) -> hyper::Result<Result<Upgraded, Answer>> {
        let mut all = vec![
            ("connection", "Upgrade"),
            ("upgrade", "websocket"),
            ("sec-websocket-version", "13"),
            ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
        ];
        all.extend_from_slice(headers);
        let request = self.build(Method::GET, path, &all, b"");
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(io)).await?;
        let mut tasks = JoinSet::new();
        tasks.spawn(connection.with_upgrades());
        let response = within("the answer to an upgrade", sender.send_request(request)).await?;
        if response.status() != http::StatusCode::SWITCHING_PROTOCOLS {
            return Ok(Err(Answer::read(response).await));
        }
        let headers = response.headers().clone();
        // RFC 6455, section 1.3 gives this answer to the key above.
        assert_eq!(headers["sec-websocket-accept"], "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
        let upgraded = hyper::upgrade::on(response).await?;
        let parts = upgraded.downcast::<TokioIo<Io>>().unwrap();
        Ok(Ok(Upgraded { io: parts.io.into_inner(), early: parts.read_buf, headers }))
    }
}

impl Answer {
    pub(crate) async fn read(response: http::Response<hyper::body::Incoming>) -> Self {
        let (parts, body) = response.into_parts();
        let body = within("the body of an answer", body.collect()).await.unwrap().to_bytes();
        Self { status: parts.status.as_u16(), headers: parts.headers, body }
    }
}
