//! TLS 1.2 and 1.3 for listeners, with certificates that are read again while running, and for calls to other processes.

mod handshake;
mod hello;
mod secrets;
mod session;
mod stream;

#[cfg(test)]
mod client_tests;
#[cfg(test)]
mod tests;

pub use self::{handshake::Turns, stream::TlsStream};
pub(crate) use self::{hello::asked_name, session::SEALED_MAX};

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, bail};
use arc_swap::ArcSwap;
use midspan_core::time::UnixTime;
use rustls::{
    CertificateError, CipherSuite, ClientConfig, RootCertStore, ServerConfig, SupportedProtocolVersion,
    client::verify_server_cert_signed_by_trust_anchor,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime as PkiTime, pem::PemObject as _},
    server::{ClientHello, NoClientAuth, ParsedCertificate, ResolvesServerCert, danger::ClientCertVerifier},
    sign::CertifiedKey,
    version::{TLS12, TLS13},
};
use tracing::{Span, error, info, warn};

use self::secrets::HandOut;
use crate::{clock, lifecycle::Lifecycle};

/// The certificate chain and the key of a listener, both PEM.
#[derive(Debug, Clone)]
pub struct TlsFiles {
    /// The chain, the server's own certificate first.
    pub certificate: PathBuf,
    /// The private key of the first certificate.
    pub key: PathBuf,
}

/// Reads the certificate, and again whenever it changes, and makes a TLS configuration of it.
///
/// Fails when a file is missing, the certificate is not valid now, or the key is another's. `hosts` are the public
/// names that it should cover; one that it does not cover is warned of.
pub async fn server_config(
    files: TlsFiles,
    hosts: Vec<String>,
    interval: Duration,
    lifecycle: &Lifecycle,
) -> anyhow::Result<Arc<ServerConfig>> {
    let mut text = files.read().await?;
    let certificate = Arc::new(Reloaded(ArcSwap::from_pointee(text.parse(&files, &hosts, clock::unix())?)));
    let resolver = Arc::clone(&certificate);
    let stopped = lifecycle.stopped().clone();
    lifecycle.spawn(Span::current(), async move {
        let mut refused = None;
        loop {
            tokio::select! {
                () = stopped.cancelled() => return,
                () = tokio::time::sleep(interval) => {}
            }
            // While a certificate and its key are replaced one after the other, the pair does not match for a moment.
            let Ok(new) = files.read().await else { continue };
            if new == text {
                continue;
            }
            match new.parse(&files, &hosts, clock::unix()) {
                Ok(key) => {
                    certificate.0.store(Arc::new(key));
                    info!(file = %files.certificate.display(), "certificate read again");
                    (text, refused) = (new, None);
                }
                // Tried again each time, since it may only be not valid yet; said once.
                Err(_) if refused.as_ref() == Some(&new) => {}
                Err(error) => {
                    error!(
                        error = format!("{error:#}"),
                        "changed certificate cannot be used, the old one stays in force"
                    );
                    refused = Some(new);
                }
            }
        }
    });
    Ok(Arc::new(configure(&[&TLS13, &TLS12], resolver)?))
}

fn configure(
    versions: &[&'static SupportedProtocolVersion],
    resolver: Arc<dyn ResolvesServerCert>,
) -> anyhow::Result<ServerConfig> {
    let mut config = configure_for(versions, Arc::new(NoClientAuth), resolver)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}

/// The configuration of a listener whose clients `callers` judges.
pub(crate) fn configure_for(
    versions: &[&'static SupportedProtocolVersion],
    callers: Arc<dyn ClientCertVerifier>,
    resolver: Arc<dyn ResolvesServerCert>,
) -> anyhow::Result<ServerConfig> {
    let mut provider = aws_lc_rs::default_provider();
    // AES-128 takes 10 rounds where AES-256 takes 14, and its key schedule has SHA-256, for which processors have
    // instructions, where the other one's has SHA-384. `handshake` says who gets ChaCha20.
    provider.cipher_suites.sort_by_key(|suite| {
        !matches!(
            suite.suite(),
            CipherSuite::TLS13_AES_128_GCM_SHA256
                | CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256
                | CipherSuite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256
        )
    });
    let mut config = ServerConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(versions)
        .context("TLS cannot be set up")?
        .with_client_cert_verifier(callers)
        .with_cert_resolver(resolver);
    config.ignore_client_order = true;
    // See `session`.
    config.enable_secret_extraction = true;
    config.key_log = Arc::new(HandOut);
    // A resumed session gets another one in place of the one that it used.
    config.send_tls13_tickets = 1;
    Ok(config)
}

/// Makes a configuration fit for [`TlsStream::connect`].
pub(crate) fn configure_client(config: &mut ClientConfig) {
    // See `session`.
    config.enable_secret_extraction = true;
    config.key_log = Arc::new(HandOut);
}

/// The files' contents.
#[derive(PartialEq, Eq)]
pub(crate) struct TlsText {
    certificate: Vec<u8>,
    key: Vec<u8>,
}

struct Reloaded(ArcSwap<CertifiedKey>);

impl ResolvesServerCert for Reloaded {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.load_full())
    }
}

impl fmt::Debug for Reloaded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Reloaded")
    }
}

impl TlsFiles {
    pub(crate) async fn read(&self) -> anyhow::Result<TlsText> {
        let read = async |what: &str, file: &Path| {
            tokio::fs::read(file).await.with_context(|| format!("cannot read the {what} {}", file.display()))
        };
        Ok(TlsText {
            certificate: read("TLS certificate", &self.certificate).await?,
            key: read("TLS key", &self.key).await?,
        })
    }
}

impl TlsText {
    pub(crate) fn parse(
        &self,
        files: &TlsFiles,
        hosts: &[String],
        now: UnixTime,
    ) -> anyhow::Result<CertifiedKey> {
        let name = files.certificate.display();
        let chain: Vec<_> = CertificateDer::pem_slice_iter(&self.certificate)
            .collect::<Result<_, _>>()
            .with_context(|| format!("the TLS certificate {name} is not PEM"))?;
        let Some(own) = chain.first() else { bail!("the TLS certificate {name} holds no certificate") };
        check_validity(own, now).with_context(|| format!("the TLS certificate {name}"))?;
        let own = ParsedCertificate::try_from(own)
            .with_context(|| format!("the TLS certificate {name} is broken"))?;
        for host in hosts {
            let bare = host.trim_matches(['[', ']']);
            let covered = ServerName::try_from(bare)
                .is_ok_and(|server| rustls::client::verify_server_name(&own, &server).is_ok());
            if !covered {
                warn!(certificate = %name, host, "the certificate does not cover this public host; clients will refuse it");
            }
        }
        let key = PrivateKeyDer::from_pem_slice(&self.key)
            .map_err(|_| anyhow::anyhow!("the TLS key {} is not a PEM private key", files.key.display()))?;
        CertifiedKey::from_der(chain.clone(), key, &aws_lc_rs::default_provider()).with_context(|| {
            format!("the TLS key {} does not belong to the certificate {name}", files.key.display())
        })
    }
}

/// The CAs in the PEM text of `file`, which errors call `what`.
pub(crate) fn roots(what: &str, file: &Path, pem: &[u8]) -> anyhow::Result<RootCertStore> {
    let file = file.display();
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(pem) {
        let certificate = certificate.with_context(|| format!("{what} {file} is not PEM"))?;
        roots.add(certificate).with_context(|| format!("{what} {file} is broken"))?;
    }
    anyhow::ensure!(!roots.is_empty(), "{what} {file} holds no certificate");
    Ok(roots)
}

/// Says whether a certificate is valid now, and since or until when when it is not.
fn check_validity(certificate: &CertificateDer<'_>, now: UnixTime) -> anyhow::Result<()> {
    let parsed = ParsedCertificate::try_from(certificate)?;
    let now = PkiTime::since_unix_epoch(Duration::from_secs(now.0));
    let algorithms = aws_lc_rs::default_provider().signature_verification_algorithms.all;
    // Nobody is trusted here: a certificate that is valid now fails for its unknown issuer, after its dates were checked.
    let nobody = RootCertStore::empty();
    match verify_server_cert_signed_by_trust_anchor(&parsed, &nobody, &[], now, algorithms) {
        Err(rustls::Error::InvalidCertificate(CertificateError::ExpiredContext { not_after, .. })) => {
            bail!("expired on {}; renew it", UnixTime(not_after.as_secs()))
        }
        Err(rustls::Error::InvalidCertificate(CertificateError::NotValidYetContext {
            not_before, ..
        })) => {
            bail!("is not valid before {}; check this machine's clock", UnixTime(not_before.as_secs()))
        }
        _ => Ok(()),
    }
}
