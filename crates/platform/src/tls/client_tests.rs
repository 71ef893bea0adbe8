//! Tests of TLS sessions that begin here: our client against a server of rustls, and against our own.

use std::{io, sync::Arc};

use rustls::{
    AlertDescription, ClientConfig, RootCertStore, ServerConfig, SupportedProtocolVersion,
    crypto::aws_lc_rs,
    pki_types::PrivatePkcs8KeyDer,
    sign::{CertifiedKey, SingleCertAndKey},
    version::{TLS12, TLS13},
};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, DuplexStream, duplex},
    join,
};
use tokio_rustls::TlsAcceptor;

use super::{TlsStream, Turns, configure, configure_client};

const MIB: usize = 1024 * 1024;

fn configs(version: &'static SupportedProtocolVersion) -> (Arc<ClientConfig>, Arc<ServerConfig>) {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(made.cert.der().clone()).unwrap();
    let mut client = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_protocol_versions(&[version])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    configure_client(&mut client);
    let key = PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
    let certificate =
        CertifiedKey::from_der(vec![made.cert.der().clone()], key.into(), &aws_lc_rs::default_provider());
    let resolver = Arc::new(SingleCertAndKey::from(certificate.unwrap()));
    (Arc::new(client), Arc::new(configure(&[version], resolver).unwrap()))
}

fn payload(size: usize) -> Vec<u8> {
    (0..=250).cycle().take(size).collect()
}

/// Sends in both directions at once, ends both, and compares.
async fn exchange(a: impl AsyncRead + AsyncWrite, b: impl AsyncRead + AsyncWrite) {
    let data = payload(3 * MIB);
    let (at_a, at_b) = join!(send_and_receive(a, &data), send_and_receive(b, &data));
    assert!(at_a == data && at_b == data);
}

async fn send_and_receive(end: impl AsyncRead + AsyncWrite, data: &[u8]) -> Vec<u8> {
    let (mut read, mut write) = tokio::io::split(end);
    let send = async {
        write.write_all(data).await.unwrap();
        write.shutdown().await.unwrap();
    };
    let mut got = Vec::new();
    let (result, ()) = join!(read.read_to_end(&mut got), send);
    result.unwrap();
    got
}

async fn connected(
    version: &'static SupportedProtocolVersion,
) -> (TlsStream<DuplexStream>, tokio_rustls::server::TlsStream<DuplexStream>) {
    let (client, server) = configs(version);
    let (near, far) = duplex(64 * 1024);
    let name = "localhost".try_into().unwrap();
    let connecting = async {
        let mut stream = TlsStream::connect(near, client, name).await.unwrap();
        stream.write_all(b"first").await.unwrap();
        stream.flush().await.unwrap();
        stream
    };
    let accepting = async {
        let mut stream = TlsAcceptor::from(server).accept(far).await.unwrap();
        let mut first = [0; 5];
        stream.read_exact(&mut first).await.unwrap();
        assert_eq!(&first, b"first");
        stream
    };
    join!(connecting, accepting)
}

#[tokio::test]
async fn both_versions_carry_both_ways_and_tickets_are_passed_over() {
    for version in [&TLS12, &TLS13] {
        let (client, server) = connected(version).await;
        exchange(client, server).await;
    }
}

#[tokio::test]
async fn our_client_and_our_server_understand_each_other() {
    for version in [&TLS12, &TLS13] {
        let (client, server) = configs(version);
        let (near, far) = duplex(1024);
        let (near, far) = join!(
            async {
                let mut near =
                    TlsStream::connect(near, client, "localhost".try_into().unwrap()).await.unwrap();
                near.write_all(b"x").await.unwrap();
                near
            },
            async {
                let turns = Arc::new(Turns::new(1));
                let mut far = TlsStream::accept(far, server, turns, Vec::new()).await.unwrap();
                far.read_exact(&mut [0]).await.unwrap();
                far
            }
        );
        exchange(near, far).await;
    }
}

#[tokio::test]
async fn keys_are_updated_both_ways() {
    let (mut client, mut server) = connected(&TLS13).await;
    for round in 0..5_u8 {
        server.get_mut().1.refresh_traffic_keys().unwrap();
        server.write_all(&[round]).await.unwrap();
        server.flush().await.unwrap();
        assert_eq!(client.read_u8().await.unwrap(), round);
        let update = client.session.update_keys().unwrap();
        client.socket.write_all(&update).await.unwrap();
        client.write_all(&[round]).await.unwrap();
        assert_eq!(server.read_u8().await.unwrap(), round);
    }
    exchange(client, server).await;
}

#[tokio::test]
async fn a_server_that_is_another_is_refused_and_told() {
    let (client, server) = configs(&TLS13);
    let (near, far) = duplex(64 * 1024);
    let (near, far) = join!(
        TlsStream::connect(near, client, "elsewhere.example".try_into().unwrap()),
        TlsAcceptor::from(server).accept(far)
    );
    assert_eq!(near.unwrap_err().kind(), io::ErrorKind::InvalidData);
    let error = far.unwrap_err();
    let told = error.get_ref().and_then(|error| error.downcast_ref::<rustls::Error>());
    assert_eq!(told, Some(&rustls::Error::AlertReceived(AlertDescription::BadCertificate)));
}

#[tokio::test]
async fn a_server_that_goes_away_or_speaks_no_tls_is_an_error() {
    for (said, kind) in
        [(&b""[..], io::ErrorKind::UnexpectedEof), (b"HTTP/1.1 200 OK\r\n", io::ErrorKind::InvalidData)]
    {
        let (client, _) = configs(&TLS13);
        let (near, mut far) = duplex(64 * 1024);
        far.write_all(said).await.unwrap();
        far.shutdown().await.unwrap();
        let name = "localhost".try_into().unwrap();
        assert_eq!(TlsStream::connect(near, client, name).await.unwrap_err().kind(), kind);
    }
}

#[tokio::test]
async fn tickets_without_payload_do_not_go_on_for_ever() {
    let (client, server) = configs(&TLS13);
    let mut server = Arc::unwrap_or_clone(server);
    server.send_tls13_tickets = 64;
    let (near, far) = duplex(MIB);
    let (near, far) = join!(
        async {
            let mut near = TlsStream::connect(near, client, "localhost".try_into().unwrap()).await.unwrap();
            near.write_all(b"x").await.unwrap();
            near
        },
        async {
            let mut far = TlsAcceptor::from(Arc::new(server)).accept(far).await.unwrap();
            far.read_exact(&mut [0]).await.unwrap();
            far.flush().await.unwrap();
            far
        }
    );
    let mut near = near;
    assert_eq!(near.read_u8().await.unwrap_err().kind(), io::ErrorKind::InvalidData);
    drop(far);
}
