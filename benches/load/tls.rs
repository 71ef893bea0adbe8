//! A certificate for the relays, and clients that trust it.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::Result;
use rustls::{ClientConfig, RootCertStore, client::Resumption};

/// What the public names of edges end with.
pub(crate) const OWNER_DOMAIN: &str = "streams.localhost";

/// A self-signed certificate for `localhost` and the names of edges, in files.
#[derive(Debug, Clone)]
pub(crate) struct Certificate {
    pub(crate) chain: PathBuf,
    pub(crate) key: PathBuf,
    pub(crate) client: Arc<ClientConfig>,
}

impl Certificate {
    pub(crate) fn new(folder: &Path) -> Result<Self> {
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned(), format!("*.{OWNER_DOMAIN}")])?;
        let (chain, key) = (folder.join("tls.pem"), folder.join("tls.key"));
        fs::write(&chain, made.cert.pem())?;
        fs::write(&key, made.signing_key.serialize_pem())?;
        let mut roots = RootCertStore::empty();
        roots.add(made.cert.der().clone())?;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut client = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_no_client_auth();
        // Every handshake is a full one.
        client.resumption = Resumption::disabled();
        Ok(Self { chain, key, client: Arc::new(client) })
    }
}
