//! tokio-tungstenite: each message is read whole and written again.

use std::sync::Arc;

use anyhow::Context as _;
use clap::Args;
use futures_util::{
    SinkExt as _, StreamExt as _,
    stream::{SplitSink, SplitStream},
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
};
use tokio_rustls::TlsAcceptor;
use tokio_tungstenite::{
    WebSocketStream, accept_hdr_async_with_config,
    tungstenite::{
        Error, Message,
        handshake::server::{ErrorResponse, Request, Response},
        protocol::WebSocketConfig,
    },
};
use tokio_util::task::TaskTracker;

use crate::{TlsArguments, pairing::Pairing};

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Write what has piled up with one flush (`StreamExt::forward`), instead of each message by itself
    #[arg(long)]
    forward: bool,
    #[command(flatten)]
    tls: TlsArguments,
}

struct Relay<S> {
    pairing: Pairing<WebSocketStream<S>>,
    tasks: TaskTracker,
    forward: bool,
}

pub(crate) async fn serve(listener: TcpListener, arguments: Arguments) -> anyhow::Result<()> {
    let forward = arguments.forward;
    match acceptor(&arguments.tls)? {
        None => {
            let relay = Arc::new(Relay { pairing: Pairing::new(), tasks: TaskTracker::new(), forward });
            loop {
                let (socket, _) = listener.accept().await?;
                socket.set_nodelay(true)?;
                relay.tasks.spawn(Arc::clone(&relay).leg(socket));
            }
        }
        Some(tls) => {
            let relay = Arc::new(Relay { pairing: Pairing::new(), tasks: TaskTracker::new(), forward });
            loop {
                let (socket, _) = listener.accept().await?;
                socket.set_nodelay(true)?;
                let (relay, tls) = (Arc::clone(&relay), tls.clone());
                relay.tasks.clone().spawn(async move {
                    if let Ok(stream) = tls.accept(socket).await {
                        relay.leg(stream).await;
                    }
                });
            }
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Send + Unpin + 'static> Relay<S> {
    async fn leg(self: Arc<Self>, stream: S) {
        let mut path = String::new();
        let see = |request: &Request, response: Response| -> Result<Response, ErrorResponse> {
            request.uri().path().clone_into(&mut path);
            Ok(response)
        };
        // The largest messages of the measurements are beyond its limits.
        let config = WebSocketConfig::default().max_message_size(None).max_frame_size(None);
        let Ok(leg) = accept_hdr_async_with_config(stream, see, Some(config)).await else { return };
        if let Some((one, other)) = self.pairing.join(&path, leg) {
            let (one_out, one_in) = one.split();
            let (other_out, other_in) = other.split();
            let forward = self.forward;
            self.tasks.spawn(copy(one_in, other_out, forward));
            self.tasks.spawn(copy(other_in, one_out, forward));
        }
    }
}

async fn copy<S: AsyncRead + AsyncWrite + Unpin>(
    mut from: SplitStream<WebSocketStream<S>>,
    mut to: SplitSink<WebSocketStream<S>, Message>,
    forward: bool,
) {
    // An end, clean or not, has nothing more to say.
    let _: Result<(), Error> = async {
        if forward {
            return from.forward(to).await;
        }
        while let Some(message) = from.next().await {
            to.send(message?).await?;
        }
        to.close().await
    }
    .await;
}

fn acceptor(arguments: &TlsArguments) -> anyhow::Result<Option<TlsAcceptor>> {
    let (Some(certificate), Some(key)) = (&arguments.tls_certificate, &arguments.tls_key) else {
        return Ok(None);
    };
    let chain = CertificateDer::pem_file_iter(certificate)?.collect::<Result<_, _>>()?;
    let key = PrivateKeyDer::from_pem_file(key)?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .context("the certificate cannot be used")?;
    Ok(Some(TlsAcceptor::from(Arc::new(config))))
}
