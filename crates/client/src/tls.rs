//! TLS towards the relay, with errors that say what to do.

use std::{
    fmt, io,
    path::Path,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::{Buf as _, BytesMut};
use midspan_core::time::UnixTime;
use rustls::{
    CertificateError, ClientConfig, RootCertStore,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, ServerName, pem::PemObject as _},
};
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_rustls::TlsConnector;

use crate::{
    dial::{Connection, describe},
    http::SetupError,
    scratch,
};

/// Whose word about the relay's certificate counts.
#[derive(Clone, Default)]
pub enum Trust {
    /// The certificate authorities of the machine.
    #[default]
    System,
    /// These authorities, and no other.
    Only(Vec<CertificateDer<'static>>),
}

impl Trust {
    /// Trusts only the certificates in a PEM file.
    pub fn from_pem_file(path: &Path) -> Result<Self, SetupError> {
        let fail = |reason: String| SetupError::Authorities { path: path.to_owned(), reason };
        let text = std::fs::read(path).map_err(|error| fail(describe(&error)))?;
        let certificates: Vec<_> = CertificateDer::pem_slice_iter(&text)
            .collect::<Result<_, _>>()
            .map_err(|error| fail(error.to_string()))?;
        if certificates.is_empty() {
            return Err(fail("it holds no certificate in PEM form".to_owned()));
        }
        Ok(Self::Only(certificates))
    }
}

impl fmt::Debug for Trust {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::System => f.write_str("System"),
            Self::Only(certificates) => write!(f, "Only({} certificates)", certificates.len()),
        }
    }
}

/// Why no TLS session came about.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum TlsError {
    /// The certificate's time is over, by this machine's clock.
    #[error("the certificate of {host} expired{}; renew it, or check this machine's clock", at(.not_after.as_ref()))]
    Expired {
        /// Whose certificate.
        host: String,
        /// When it expired.
        not_after: Option<UnixTime>,
    },
    /// The certificate's time has not begun, by this machine's clock.
    #[error(
        "the certificate of {host} is not valid before{}; check this machine's clock",
        at(.not_before.as_ref())
    )]
    NotValidYet {
        /// Whose certificate.
        host: String,
        /// When its time begins.
        not_before: Option<UnixTime>,
    },
    /// The certificate is for other names.
    #[error("the certificate of {host} is not for that name; it is for {names}")]
    Name {
        /// Whose certificate.
        host: String,
        /// The names in it.
        names: String,
    },
    /// Nobody who is trusted has signed the certificate.
    #[error(
        "the certificate of {host} comes from an authority that is not trusted here; name its CA with --ca FILE"
    )]
    UnknownIssuer {
        /// Whose certificate.
        host: String,
    },
    /// Anything else.
    #[error("no TLS with {host}: {reason}")]
    Other {
        /// With whom.
        host: String,
        /// Why, in the words of the TLS library.
        reason: String,
    },
}

impl TlsError {
    fn new(host: &str, error: &io::Error) -> Self {
        let host = host.to_owned();
        let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
        match inner {
            Some(rustls::Error::InvalidCertificate(certificate)) => Self::from_certificate(host, certificate),
            Some(other) => Self::Other { host, reason: other.to_string() },
            None if error.kind() == io::ErrorKind::UnexpectedEof => Self::Other {
                host,
                reason: "the connection was closed in the middle of the handshake".to_owned(),
            },
            None => Self::Other { host, reason: describe(error) },
        }
    }

    fn from_certificate(host: String, error: &CertificateError) -> Self {
        #[expect(
            clippy::wildcard_enum_match_arm,
            reason = "every other certificate error keeps rustls' words"
        )]
        match error {
            CertificateError::Expired => Self::Expired { host, not_after: None },
            CertificateError::ExpiredContext { not_after, .. } => {
                Self::Expired { host, not_after: Some(UnixTime(not_after.as_secs())) }
            }
            CertificateError::NotValidYet => Self::NotValidYet { host, not_before: None },
            CertificateError::NotValidYetContext { not_before, .. } => {
                Self::NotValidYet { host, not_before: Some(UnixTime(not_before.as_secs())) }
            }
            CertificateError::NotValidForName => Self::Name { host, names: "other names".to_owned() },
            CertificateError::NotValidForNameContext { presented, .. } => {
                let names: Vec<_> = presented.iter().map(|name| readable_name(name)).collect();
                let names = if names.is_empty() { "no name at all".to_owned() } else { names.join(", ") };
                Self::Name { host, names }
            }
            CertificateError::UnknownIssuer => Self::UnknownIssuer { host },
            other => Self::Other { host, reason: other.to_string() },
        }
    }
}

/// Makes the configuration of every TLS session with the relay.
pub(crate) fn config(trust: &Trust) -> Result<Arc<ClientConfig>, SetupError> {
    let mut roots = RootCertStore::empty();
    match trust {
        Trust::System => {
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        }
        Trust::Only(certificates) => {
            for certificate in certificates {
                roots.add(certificate.clone()).map_err(|error| {
                    SetupError::Tls(format!("a certificate authority is unusable: {error}"))
                })?;
            }
        }
    }
    if roots.is_empty() {
        return Err(SetupError::NoAuthorities);
    }
    let mut config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|error| SetupError::Tls(error.to_string()))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

/// Puts TLS over a connection to `host`, which may be a name, an address, or an address in brackets.
pub(crate) async fn connect(
    config: Arc<ClientConfig>,
    host: &str,
    connection: Connection,
) -> Result<Connection, TlsError> {
    let bare = host.trim_start_matches('[').trim_end_matches(']').to_owned();
    let name = ServerName::try_from(bare).map_err(|_| TlsError::Other {
        host: host.to_owned(),
        reason: "this is no host name that a certificate could hold".to_owned(),
    })?;
    match TlsConnector::from(config).connect(name, ReadAhead::new(connection)).await {
        Ok(mut stream) => {
            stream.get_mut().1.set_buffer_limit(Some(SEALED_MOST));
            Ok(Box::new(stream))
        }
        Err(error) => Err(TlsError::new(host, &error)),
    }
}

/// Reads much at once, where TLS asks for a record at a time. Has a buffer only for records that came with others.
struct ReadAhead {
    connection: Connection,
    ahead: BytesMut,
}

impl ReadAhead {
    fn new(connection: Connection) -> Self {
        Self { connection, ahead: BytesMut::new() }
    }
}

impl AsyncRead for ReadAhead {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        reader: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let Self { connection, ahead } = &mut *self;
        if !ahead.is_empty() {
            let size = ahead.len().min(reader.remaining());
            reader.put_slice(&ahead[..size]);
            ahead.advance(size);
            if ahead.is_empty() {
                *ahead = BytesMut::new();
            }
            return Poll::Ready(Ok(()));
        }
        scratch::with(&scratch::RECORDS, READ_AHEAD, |buffer| {
            let mut read = ReadBuf::new(buffer);
            ready!(Pin::new(connection).poll_read(cx, &mut read))?;
            let (now, later) = read.filled().split_at(read.filled().len().min(reader.remaining()));
            reader.put_slice(now);
            ahead.extend_from_slice(later);
            Poll::Ready(Ok(()))
        })
    }
}

impl AsyncWrite for ReadAhead {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.connection).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.connection).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.connection.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.connection).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.connection).poll_shutdown(cx)
    }
}

/// The most that is read from the connection at once, in bytes.
const READ_AHEAD: usize = 256 * 1024;

/// The most payload that is sealed before it is written, in bytes.
const SEALED_MOST: usize = 256 * 1024;

fn at(time: Option<&UnixTime>) -> String {
    time.map_or_else(String::new, |time| format!(" {time}"))
}

/// `DnsName("relay.example")`, as rustls lists names, without its wrapping.
fn readable_name(name: &str) -> String {
    name.split('"').nth(1).unwrap_or(name).to_owned()
}

#[cfg(test)]
mod tests {
    use rustls::pki_types::UnixTime as PkiTime;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};

    use super::*;

    #[tokio::test]
    async fn what_is_read_ahead_comes_in_order_and_leaves_no_buffer() {
        let data: Vec<u8> = (0..READ_AHEAD + 1000).map(|at| u8::try_from(at % 251).unwrap()).collect();
        let (near, mut far) = duplex(data.len());
        far.write_all(&data).await.unwrap();
        drop(far);
        let mut near = ReadAhead::new(Box::new(near));
        let (mut read, mut buffer) = (Vec::new(), vec![0; 5000]);
        for size in [1, 300, 5000].into_iter().cycle() {
            let count = near.read(&mut buffer[..size]).await.unwrap();
            if count == 0 {
                break;
            }
            read.extend_from_slice(&buffer[..count]);
        }
        assert!(read == data, "{} bytes of {}", read.len(), data.len());
        assert_eq!(near.ahead.capacity(), 0);
    }

    #[test]
    fn certificate_errors_say_what_to_do() {
        let second = |seconds| PkiTime::since_unix_epoch(std::time::Duration::from_secs(seconds));
        let text = |error| TlsError::from_certificate("h".to_owned(), &error).to_string();
        assert_eq!(
            text(CertificateError::ExpiredContext { time: second(2), not_after: second(1) }),
            "the certificate of h expired 1970-01-01T00:00:01Z; renew it, or check this machine's clock"
        );
        assert_eq!(
            text(CertificateError::NotValidYetContext { time: second(1), not_before: second(2) }),
            "the certificate of h is not valid before 1970-01-01T00:00:02Z; check this machine's clock"
        );
        let name = CertificateError::NotValidForNameContext {
            expected: ServerName::try_from("h").unwrap(),
            presented: vec![r#"DnsName("relay.example")"#.to_owned(), "IpAddress(127.0.0.1)".to_owned()],
        };
        assert_eq!(
            text(name),
            "the certificate of h is not for that name; it is for relay.example, IpAddress(127.0.0.1)"
        );
        assert!(text(CertificateError::UnknownIssuer).contains("--ca FILE"));
    }
}
