//! Who the processes of a relay are to each other.

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use arc_swap::ArcSwap;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, ServerConfig, SignatureScheme,
    client::{Resumption, danger::HandshakeSignatureValid, verify_server_name},
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, ServerName, UnixTime as PkiTime},
    server::{
        ClientHello, ParsedCertificate, ResolvesServerCert, WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
    sign::{CertifiedKey, SingleCertAndKey},
    version::TLS13,
};
use tracing::{Span, error, info};

use super::{callers_of, name_of};
use crate::{
    clock,
    lifecycle::Lifecycle,
    rendezvous::ServerRole,
    tls::{TlsFiles, TlsText, configure_client, configure_for, roots},
};

/// The certificate of this process and the CA of all, always the newest that made sense.
pub(super) struct Identity {
    role: ServerRole,
    current: ArcSwap<Material>,
}

struct Material {
    key: Arc<CertifiedKey>,
    callers: Arc<dyn ClientCertVerifier>,
    client: Arc<ClientConfig>,
}

#[derive(PartialEq, Eq)]
struct Text {
    own: TlsText,
    ca: Vec<u8>,
}

impl Identity {
    /// Reads the files, and looks every `interval` whether they have changed.
    pub(super) async fn read(
        role: ServerRole,
        ca: PathBuf,
        files: TlsFiles,
        interval: Duration,
        lifecycle: &Lifecycle,
    ) -> anyhow::Result<Arc<Self>> {
        let mut text = Text::read(&ca, &files).await?;
        let material = text.parse(role, &ca, &files)?;
        let identity = Arc::new(Self { role, current: ArcSwap::from_pointee(material) });
        let (kept, stopped) = (Arc::clone(&identity), lifecycle.stopped().clone());
        lifecycle.spawn(Span::current(), async move {
            let mut refused = None;
            while tokio::time::timeout(interval, stopped.cancelled()).await.is_err() {
                // While files are replaced one after the other, they do not belong together for a moment.
                let Ok(new) = Text::read(&ca, &files).await else { continue };
                if new == text || refused.as_ref() == Some(&new) {
                    continue;
                }
                match new.parse(role, &ca, &files) {
                    Ok(material) => {
                        kept.current.store(Arc::new(material));
                        info!(file = %files.certificate.display(), "internal certificate read again");
                        (text, refused) = (new, None);
                    }
                    Err(error) => {
                        error!(
                            error = format!("{error:#}"),
                            "changed internal certificate cannot be used, the old one stays in force"
                        );
                        refused = Some(new);
                    }
                }
            }
        });
        Ok(identity)
    }

    /// The configuration of the internal listener: callers show who they are.
    pub(super) fn server_config(self: &Arc<Self>) -> anyhow::Result<Arc<ServerConfig>> {
        let callers = Arc::clone(self) as Arc<dyn ClientCertVerifier>;
        let resolver = Arc::clone(self) as Arc<dyn ResolvesServerCert>;
        let mut config = configure_for(&[&TLS13], callers, resolver)?;
        // Nobody would use them.
        config.send_tls13_tickets = 0;
        Ok(Arc::new(config))
    }

    /// How this process calls others.
    pub(super) fn client_config(&self) -> Arc<ClientConfig> {
        Arc::clone(&self.current.load().client)
    }
}

impl Text {
    async fn read(ca: &Path, files: &TlsFiles) -> anyhow::Result<Self> {
        let own = files.read().await?;
        let ca = tokio::fs::read(ca)
            .await
            .with_context(|| format!("cannot read the internal CA {}", ca.display()))?;
        Ok(Self { own, ca })
    }

    fn parse(&self, role: ServerRole, ca: &Path, files: &TlsFiles) -> anyhow::Result<Material> {
        let key = Arc::new(self.own.parse(files, &[], clock::unix())?);
        let own = key.end_entity_cert().ok().and_then(|own| ParsedCertificate::try_from(own).ok());
        anyhow::ensure!(
            own.is_some_and(|own| is_for(&own, role)),
            "the certificate {} is not for {}",
            files.certificate.display(),
            name_of(role)
        );
        let roots = Arc::new(roots("the internal CA", ca, &self.ca)?);
        let provider = Arc::new(aws_lc_rs::default_provider());
        let callers =
            WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider)).build()?;
        let mut client = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .context("TLS cannot be set up")?
            .with_root_certificates(roots)
            .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(Arc::clone(&key))));
        // A session that is taken up again would outlive a change of the CA.
        client.resumption = Resumption::disabled();
        configure_client(&mut client);
        Ok(Material { key, callers, client: Arc::new(client) })
    }
}

fn is_for(certificate: &ParsedCertificate<'_>, role: ServerRole) -> bool {
    ServerName::try_from(name_of(role)).is_ok_and(|name| verify_server_name(certificate, &name).is_ok())
}

impl ResolvesServerCert for Identity {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.current.load().key))
    }
}

impl ClientCertVerifier for Identity {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: PkiTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let verified = self.current.load().callers.verify_client_cert(end_entity, intermediates, now)?;
        let caller = ParsedCertificate::try_from(end_entity)?;
        if callers_of(self.role).iter().any(|&role| is_for(&caller, role)) {
            Ok(verified)
        } else {
            Err(CertificateError::NotValidForName.into())
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.current.load().callers.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.current.load().callers.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.current.load().callers.supported_verify_schemes()
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity").field("role", &self.role).finish_non_exhaustive()
    }
}
