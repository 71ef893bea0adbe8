//! Tests of TLS sessions: the listener's end against a client of rustls, over a connection in memory.

use std::{
    io::{self, IoSlice, Read as _, Write as _},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker},
};

use rand::{Rng as _, RngExt as _, SeedableRng as _, rngs::StdRng};
use rustls::{
    AlertDescription, ClientConfig, ClientConnection, ContentType, HandshakeKind, ProtocolVersion,
    RootCertStore, ServerConfig, SupportedCipherSuite, SupportedProtocolVersion,
    crypto::{
        CryptoProvider, aws_lc_rs,
        cipher::{InboundOpaqueMessage, MessageDecrypter, MessageEncrypter, OutboundChunks},
    },
    pki_types::PrivatePkcs8KeyDer,
    sign::{CertifiedKey, SingleCertAndKey},
    version::{TLS12, TLS13},
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::{
    TlsStream, Turns, configure,
    handshake::for_client,
    session::{PAYLOAD_MAX, SEALED_MAX, decrypter, encrypter, plain, record},
    stream::SEAL,
};

/// What passes between the two ends, the server's view of it.
#[derive(Default)]
struct Wire {
    /// To the server.
    input: Vec<u8>,
    /// The most that one read gets.
    cut: Option<usize>,
    ended: bool,
    /// From the server.
    output: Vec<u8>,
    /// How much more is taken from the server.
    room: Option<usize>,
    shut: bool,
}

impl AsyncRead for Wire {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        reader: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let size = self.input.len().min(reader.remaining()).min(self.cut.unwrap_or(usize::MAX));
        if size == 0 && !self.ended {
            return Poll::Pending;
        }
        reader.put_slice(&self.input[..size]);
        self.input.drain(..size);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Wire {
    fn poll_write(mut self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let size = bytes.len().min(self.room.unwrap_or(usize::MAX));
        if size == 0 {
            return Poll::Pending;
        }
        if let Some(room) = &mut self.room {
            *room -= size;
        }
        self.output.extend_from_slice(&bytes[..size]);
        Poll::Ready(Ok(size))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let bytes: Vec<u8> = slices.iter().flat_map(|slice| slice.iter().copied()).collect();
        self.as_mut().poll_write(cx, &bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.shut = true;
        Poll::Ready(Ok(()))
    }
}

/// A handle on a [`Wire`] that a future may own.
#[derive(Clone, Default)]
struct Shared(Arc<std::sync::Mutex<Wire>>);

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, Wire> {
        self.0.lock().unwrap()
    }
}

impl AsyncRead for Shared {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        reader: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.lock()).poll_read(cx, reader)
    }
}

impl AsyncWrite for Shared {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut *self.lock()).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut *self.lock()).poll_write_vectored(cx, slices)
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.lock()).poll_shutdown(cx)
    }
}

fn turns() -> Arc<Turns> {
    Arc::new(Turns::new(1))
}

fn cx() -> Context<'static> {
    Context::from_waker(Waker::noop())
}

struct Configs {
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
}

impl Configs {
    fn new(version: &'static SupportedProtocolVersion) -> Self {
        Self::with_suites(version, aws_lc_rs::default_provider().cipher_suites)
    }

    /// Of a client that offers `cipher_suites`, and a server that is set up as listeners are.
    fn with_suites(
        version: &'static SupportedProtocolVersion,
        cipher_suites: Vec<SupportedCipherSuite>,
    ) -> Self {
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(made.cert.der().clone()).unwrap();
        let key = PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
        let provider = Arc::new(CryptoProvider { cipher_suites, ..aws_lc_rs::default_provider() });
        let mut client = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[version])
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        client.enable_secret_extraction = true;
        let certificate =
            CertifiedKey::from_der(vec![made.cert.der().clone()], key.into(), &aws_lc_rs::default_provider());
        let resolver = Arc::new(SingleCertAndKey::from(certificate.unwrap()));
        let server = configure(&[version], resolver).unwrap();
        Self { client: Arc::new(client), server: Arc::new(server) }
    }

    fn client(&self) -> ClientConnection {
        let mut client =
            ClientConnection::new(Arc::clone(&self.client), "localhost".try_into().unwrap()).unwrap();
        client.set_buffer_limit(None);
        client
    }

    fn connect(&self) -> Pair {
        self.connect_with(Shared::default())
    }

    fn connect_with(&self, wire: Shared) -> Pair {
        let mut client = self.client();
        let mut accept =
            Box::pin(TlsStream::accept(wire.clone(), Arc::clone(&self.server), turns(), Vec::new()));
        for _ in 0..10_000 {
            while client.wants_write() {
                client.write_tls(&mut wire.lock().input).unwrap();
            }
            let accepted = accept.as_mut().poll(&mut cx());
            assert_eq!(receive(&mut client, &wire).1, None);
            if let Poll::Ready(server) = accepted {
                return Pair { client, wire, server: server.unwrap() };
            }
        }
        panic!("the handshake does not end");
    }
}

/// Lets the client take all that the server has sent, and gives the payload, and what the client has against it.
fn receive(client: &mut ClientConnection, wire: &Shared) -> (Vec<u8>, Option<rustls::Error>) {
    let output = std::mem::take(&mut wire.lock().output);
    let mut output = output.as_slice();
    let mut payload = Vec::new();
    while !output.is_empty() {
        client.read_tls(&mut output).unwrap();
        match client.process_new_packets() {
            Ok(state) => {
                let size = state.plaintext_bytes_to_read() as u64;
                client.reader().take(size).read_to_end(&mut payload).unwrap();
            }
            Err(error) => return (payload, Some(error)),
        }
    }
    (payload, None)
}

/// Both ends after their handshake.
struct Pair {
    client: ClientConnection,
    wire: Shared,
    server: TlsStream<Shared>,
}

impl Pair {
    fn client_sends(&mut self, payload: &[u8]) {
        self.client.writer().write_all(payload).unwrap();
        self.deliver();
    }

    /// Puts what the client says on the wire.
    fn deliver(&mut self) {
        while self.client.wants_write() {
            self.client.write_tls(&mut self.wire.lock().input).unwrap();
        }
    }

    /// One read of the server; `None` when there is nothing.
    fn server_reads(&mut self, most: usize) -> Option<io::Result<Vec<u8>>> {
        read(&mut self.server, most)
    }

    /// Everything that the server can read now.
    fn server_reads_all(&mut self) -> Vec<u8> {
        let mut all = Vec::new();
        while let Some(bytes) = self.server_reads(100_000) {
            let bytes = bytes.unwrap();
            if bytes.is_empty() {
                break;
            }
            all.extend(bytes);
        }
        all
    }

    fn server_writes(&mut self, payload: &[u8]) -> Option<io::Result<usize>> {
        write(&mut self.server, payload)
    }

    fn server_writes_all(&mut self, mut payload: &[u8]) {
        while !payload.is_empty() {
            let written = self.server_writes(payload).unwrap().unwrap();
            payload = &payload[written..];
        }
    }

    fn server_shuts_down(&mut self) {
        assert!(Pin::new(&mut self.server).poll_shutdown(&mut cx()).is_ready());
    }

    /// Everything that has come to the client, and whether the server has ended its direction.
    fn client_reads_all(&mut self) -> (Vec<u8>, bool) {
        let (payload, error) = receive(&mut self.client, &self.wire);
        assert_eq!(error, None);
        (payload, self.client.reader().read(&mut [0]).is_ok_and(|size| size == 0))
    }

    fn assert_both_ways(&mut self) {
        self.client_sends(b"to the server");
        assert_eq!(self.server_reads_all(), b"to the server");
        self.server_writes_all(b"to the client");
        assert_eq!(self.client_reads_all(), (b"to the client".to_vec(), false));
    }

    /// Takes the client's keys, to say what it would not.
    fn forger(mut self) -> Forger {
        // What the handshake has left is out of the way.
        self.assert_both_ways();
        let Self { client, wire, server } = self;
        let suite = client.negotiated_cipher_suite().unwrap();
        let secrets = client.dangerous_extract_secrets().unwrap();
        let ((sealed, tx), (opened, rx)) = (secrets.tx, secrets.rx);
        Forger {
            wire,
            server,
            sealer: encrypter(suite, tx, sealed).unwrap(),
            sealed,
            opener: decrypter(suite, rx).unwrap(),
            opened,
        }
    }
}

/// A client after its handshake that seals what it is told to.
struct Forger {
    wire: Shared,
    server: TlsStream<Shared>,
    sealer: Box<dyn MessageEncrypter>,
    sealed: u64,
    opener: Box<dyn MessageDecrypter>,
    opened: u64,
}

impl Forger {
    fn sends(&mut self, typ: ContentType, payload: &[u8]) {
        let record = self.sealer.encrypt(plain(typ, OutboundChunks::Single(payload)), self.sealed).unwrap();
        self.sealed += 1;
        self.wire.lock().input.extend(record.encode());
    }

    fn server_reads(&mut self) -> Option<io::Result<Vec<u8>>> {
        read(&mut self.server, 1000)
    }

    /// Lets the server read until it fails, and gives the alerts that it sends.
    fn refused(mut self) -> Vec<u8> {
        loop {
            match self.server_reads().expect("nothing is refused") {
                Ok(bytes) => assert!(!bytes.is_empty(), "a clean end instead of an error"),
                Err(error) => break assert_eq!(error.kind(), io::ErrorKind::InvalidData),
            }
        }
        assert!(self.server_reads().unwrap().is_err(), "an error stays");
        assert!(write(&mut self.server, b"more").unwrap().is_err(), "nothing follows an alert");
        let mut output = std::mem::take(&mut self.wire.lock().output);
        let mut alerts = Vec::new();
        let mut rest = output.as_mut_slice();
        while let Some((typ, size)) = record(rest).unwrap() {
            let (first, next) = rest.split_at_mut(size);
            let sealed = InboundOpaqueMessage::new(typ, ProtocolVersion::TLSv1_2, &mut first[5..]);
            let opened = self.opener.decrypt(sealed, self.opened).unwrap();
            assert_eq!((opened.typ, opened.payload[0]), (ContentType::Alert, 2));
            alerts.push(opened.payload[1]);
            self.opened += 1;
            rest = next;
        }
        alerts
    }
}

fn read(server: &mut TlsStream<Shared>, most: usize) -> Option<io::Result<Vec<u8>>> {
    let mut bytes = vec![0; most];
    let mut reader = ReadBuf::new(&mut bytes);
    match Pin::new(server).poll_read(&mut cx(), &mut reader) {
        Poll::Pending => None,
        Poll::Ready(read) => Some(read.map(|()| reader.filled().to_vec())),
    }
}

fn write(server: &mut TlsStream<Shared>, payload: &[u8]) -> Option<io::Result<usize>> {
    match Pin::new(server).poll_write(&mut cx(), payload) {
        Poll::Pending => None,
        Poll::Ready(written) => Some(written),
    }
}

fn random(rng: &mut StdRng, size: usize) -> Vec<u8> {
    let mut bytes = vec![0; size];
    rng.fill_bytes(&mut bytes);
    bytes
}

const VERSIONS: [&SupportedProtocolVersion; 2] = [&TLS12, &TLS13];

#[test]
fn every_cipher_carries_both_ways() {
    for suite in aws_lc_rs::ALL_CIPHER_SUITES {
        // The certificate has a key of the other kind.
        if format!("{suite:?}").contains("RSA") {
            continue;
        }
        let version = if suite.tls13().is_some() { &TLS13 } else { &TLS12 };
        let mut pair = Configs::with_suites(version, vec![*suite]).connect();
        assert_eq!(pair.client.negotiated_cipher_suite(), Some(*suite));
        for _ in 0..10 {
            pair.assert_both_ways();
        }
    }
}

#[test]
fn the_server_takes_aes_128_unless_the_client_puts_chacha20_first() {
    let offers = |version, first: &[&str]| {
        let mut suites = aws_lc_rs::default_provider().cipher_suites;
        suites.retain(|suite| suite.version() == version);
        let name = |suite: &SupportedCipherSuite| format!("{suite:?}");
        suites.sort_by_key(|suite| first.iter().position(|part| name(suite).contains(part)).unwrap_or(9));
        let mut pair = Configs::with_suites(version, suites).connect();
        pair.assert_both_ways();
        name(&pair.client.negotiated_cipher_suite().unwrap())
    };
    for version in VERSIONS {
        assert!(offers(version, &["AES_256", "CHACHA20"]).contains("AES_128"));
        assert!(offers(version, &["AES_128"]).contains("AES_128"));
        assert!(offers(version, &["CHACHA20", "AES_256"]).contains("CHACHA20"));
        // A suite that the certificate's key cannot serve.
        let chosen = offers(version, &["RSA_WITH_CHACHA20", "CHACHA20"]);
        assert!(chosen.contains("CHACHA20") && !chosen.contains("RSA"), "{chosen}");
    }
}

#[test]
fn chacha20_is_first_where_only_unknown_suites_stand_before_it() {
    let first = |suites: &[u8]| {
        let head = [&[22, 3, 1, 0, 0, 1, 0, 0, 0, 3, 3][..], &[7; 32], &[2, 7, 7]].concat();
        let size = u16::try_from(suites.len()).unwrap().to_be_bytes();
        let hello = [&head, &size[..], suites].concat();
        let config = Configs::new(&TLS13).server;
        // However it is cut, it is read no further than it goes.
        for end in 0..hello.len() {
            for_client(Arc::clone(&config), &hello[..end]);
        }
        !for_client(config, &hello).ignore_client_order
    };
    let (grease, unknown, scsv) = ([0x4a, 0x4a], [0xff, 0xfe], [0, 0xff]);
    let (aes, chacha20) = ([0x13, 2], [0x13, 3]);
    assert!(first(&[grease, unknown, scsv, chacha20, aes].concat()));
    assert!(!first(&[grease, aes, chacha20].concat()));
    assert!(!first(&[grease, unknown].concat()));
    assert!(!first(&[0x13]));
    assert!(!first(&[]));
}

#[test]
fn random_payload_arrives_however_it_is_cut() {
    for seed in 0..40 {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut pair = Configs::new(VERSIONS[rng.random_range(0..2)]).connect();
        let (mut to_server, mut at_server) = (Vec::new(), Vec::new());
        let (mut to_client, mut at_client) = (Vec::new(), Vec::new());
        for _ in 0..60 {
            let most = [1, 100, 5000, 40_000, 300_000][rng.random_range(0..5)];
            let size = rng.random_range(0..=most);
            match rng.random_range(0..6) {
                0 => {
                    let bytes = random(&mut rng, size);
                    pair.client_sends(&bytes);
                    to_server.extend(bytes);
                }
                1 => {
                    let bytes = random(&mut rng, size);
                    if let Some(written) = pair.server_writes(&bytes) {
                        to_client.extend_from_slice(&bytes[..written.unwrap()]);
                    }
                }
                2 => {
                    pair.wire.lock().cut = Some(size.max(1));
                    if let Some(bytes) = pair.server_reads(rng.random_range(1..=most)) {
                        at_server.extend(bytes.unwrap());
                    }
                }
                3 => {
                    pair.wire.lock().room = Some(size);
                    let _ = Pin::new(&mut pair.server).poll_flush(&mut cx());
                }
                4 => at_client.extend(pair.client_reads_all().0),
                _ => {
                    if pair.client.protocol_version() == Some(ProtocolVersion::TLSv1_3) {
                        pair.client.refresh_traffic_keys().unwrap();
                        pair.deliver();
                    }
                }
            }
            assert!(to_server.starts_with(&at_server) && to_client.starts_with(&at_client), "seed {seed}");
        }
        (pair.wire.lock().room, pair.wire.lock().cut) = (None, None);
        at_server.extend(pair.server_reads_all());
        assert!(Pin::new(&mut pair.server).poll_flush(&mut cx()).is_ready());
        at_client.extend(pair.client_reads_all().0);
        assert!(at_server == to_server && at_client == to_client, "seed {seed}");
        assert_eq!(pair.server.backlog(), 0, "nothing is kept of what was sent");
    }
}

#[test]
fn a_handshake_may_come_in_single_bytes() {
    for version in VERSIONS {
        let wire = Shared::default();
        (wire.lock().cut, wire.lock().room) = (Some(1), None);
        Configs::new(version).connect_with(wire).assert_both_ways();
    }
}

#[test]
fn payload_may_come_with_the_end_of_the_handshake() {
    let configs = Configs::new(&TLS13);
    let (mut client, wire) = (configs.client(), Shared::default());
    // The client has this ready, and sends it at once when it may.
    client.writer().write_all(&vec![7; 40_000]).unwrap();
    let mut accept =
        Box::pin(TlsStream::accept(wire.clone(), Arc::clone(&configs.server), turns(), Vec::new()));
    let server = loop {
        assert_eq!(receive(&mut client, &wire).1, None);
        while client.wants_write() {
            client.write_tls(&mut wire.lock().input).unwrap();
        }
        if let Poll::Ready(server) = accept.as_mut().poll(&mut cx()) {
            break server.unwrap();
        }
    };
    let mut pair = Pair { client, wire, server };
    assert_eq!(pair.server_reads_all(), vec![7; 40_000]);
    pair.assert_both_ways();
}

#[test]
fn the_end_of_the_handshake_may_come_in_pieces_with_payload_behind_it() {
    for version in VERSIONS {
        for cut in 1.. {
            let configs = Configs::new(version);
            let (mut client, wire) = (configs.client(), Shared::default());
            client.writer().write_all(b"behind").unwrap();
            let mut accept =
                Box::pin(TlsStream::accept(wire.clone(), Arc::clone(&configs.server), turns(), Vec::new()));
            client.write_tls(&mut wire.lock().input).unwrap();
            assert!(accept.as_mut().poll(&mut cx()).is_pending());
            assert_eq!(receive(&mut client, &wire).1, None);
            let mut flight = Vec::new();
            while client.wants_write() {
                client.write_tls(&mut flight).unwrap();
            }
            if cut >= flight.len() {
                break;
            }
            wire.lock().input.extend_from_slice(&flight[..cut]);
            let first = accept.as_mut().poll(&mut cx());
            wire.lock().input.extend_from_slice(&flight[cut..]);
            let accepted = if first.is_ready() { first } else { accept.as_mut().poll(&mut cx()) };
            let Poll::Ready(server) = accepted else { panic!("no handshake, cut at {cut}") };
            let mut pair = Pair { client, wire, server: server.unwrap() };
            assert_eq!(receive(&mut pair.client, &pair.wire).1, None);
            pair.deliver();
            assert_eq!(pair.server_reads_all(), b"behind", "cut at {cut}");
        }
    }
}

#[test]
fn payload_that_comes_with_the_handshake_survives_the_end_behind_it() {
    let configs = Configs::new(&TLS13);
    let (mut client, wire) = (configs.client(), Shared::default());
    client.writer().write_all(b"all").unwrap();
    let mut accept =
        Box::pin(TlsStream::accept(wire.clone(), Arc::clone(&configs.server), turns(), Vec::new()));
    client.write_tls(&mut wire.lock().input).unwrap();
    assert!(accept.as_mut().poll(&mut cx()).is_pending());
    assert_eq!(receive(&mut client, &wire).1, None);
    client.send_close_notify();
    while client.wants_write() {
        client.write_tls(&mut wire.lock().input).unwrap();
    }
    let Poll::Ready(Ok(server)) = accept.as_mut().poll(&mut cx()) else { panic!("no handshake") };
    let mut pair = Pair { client, wire, server };
    assert_eq!(pair.server_reads(2).unwrap().unwrap(), b"al");
    assert_eq!(pair.server_reads(2).unwrap().unwrap(), b"l");
    assert_eq!(pair.server_reads(2).unwrap().unwrap(), b"");
}

#[test]
fn tickets_leave_with_the_first_payload() {
    let configs = Configs::new(&TLS13);
    let mut pair = configs.connect();
    assert!(Pin::new(&mut pair.server).poll_flush(&mut cx()).is_ready());
    assert_eq!(pair.client_reads_all().0, b"");
    assert_eq!(pair.client.tls13_tickets_received(), 0);
    pair.wire.lock().room = Some(100);
    assert_eq!(pair.server_writes(b"first").unwrap().unwrap(), 5);
    assert!(pair.server_writes(b"second").is_none());
    pair.wire.lock().room = None;
    pair.server_writes_all(b"second");
    assert_eq!(pair.client_reads_all().0, b"firstsecond");
    assert_eq!(pair.client.tls13_tickets_received(), 1);

    let mut pair = configs.connect();
    pair.client.refresh_traffic_keys().unwrap();
    pair.wire.lock().room = Some(100);
    pair.client_sends(b"x");
    assert_eq!(pair.server_reads_all(), b"x");
    pair.wire.lock().room = None;
    pair.assert_both_ways();
    assert_eq!(pair.client.tls13_tickets_received(), 1);

    let mut pair = configs.connect();
    pair.server_shuts_down();
    assert_eq!(pair.client_reads_all(), (Vec::new(), true));
    assert_eq!(pair.client.tls13_tickets_received(), 1);
}

#[test]
fn a_second_connection_resumes_the_session() {
    for version in VERSIONS {
        let configs = Configs::new(version);
        configs.connect().assert_both_ways();
        let mut second = configs.connect();
        assert_eq!(second.client.handshake_kind(), Some(HandshakeKind::Resumed));
        second.assert_both_ways();
    }
}

#[test]
fn a_broken_handshake_is_answered_with_an_alert() {
    for (input, alert) in [
        (&b"GET / HTTP/1.1\r\n\r\n"[..], AlertDescription::DecodeError),
        (&[22, 3, 1, 0, 5, 1, 0, 0, 1, 0], AlertDescription::DecodeError),
        (&[22, 3, 1, 0xff, 0xff], AlertDescription::DecodeError),
        (&[20, 3, 1, 0, 1, 1], AlertDescription::UnexpectedMessage),
    ] {
        let wire = Shared::default();
        wire.lock().input.extend_from_slice(input);
        let mut accept =
            Box::pin(TlsStream::accept(wire.clone(), Configs::new(&TLS13).server, turns(), Vec::new()));
        let Poll::Ready(Err(error)) = accept.as_mut().poll(&mut cx()) else {
            panic!("{input:?} is taken");
        };
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        assert_eq!(wire.lock().output, [21, 3, 3, 0, 2, 2, u8::from(alert)], "{input:?}");
    }
}

#[test]
fn a_handshake_that_ends_early_fails() {
    for version in VERSIONS {
        let configs = Configs::new(version);
        let wire = Shared::default();
        configs.client().write_tls(&mut wire.lock().input).unwrap();
        wire.lock().ended = true;
        let mut accept = Box::pin(TlsStream::accept(wire, configs.server, turns(), Vec::new()));
        // Others have their turn in between.
        let mut polls = (0..3).map(|_| accept.as_mut().poll(&mut cx()));
        let Some(Poll::Ready(Err(error))) = polls.find(Poll::is_ready) else { panic!("no error") };
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}

#[test]
fn the_longest_records_and_empty_ones_are_taken() {
    for version in VERSIONS {
        let mut pair = Configs::new(version).connect().forger();
        for size in [PAYLOAD_MAX, 0, 1, 0, PAYLOAD_MAX] {
            pair.sends(ContentType::ApplicationData, &vec![7; size]);
            let mut all = Vec::new();
            while let Some(bytes) = pair.server_reads() {
                all.extend(bytes.unwrap());
            }
            assert_eq!(all, vec![7; size]);
        }
    }
}

#[test]
fn records_past_the_longest_are_refused() {
    for version in VERSIONS {
        let mut pair = Configs::new(version).connect().forger();
        pair.sends(ContentType::ApplicationData, &vec![0; PAYLOAD_MAX + 1]);
        assert_eq!(pair.refused(), [u8::from(AlertDescription::RecordOverflow)]);

        let pair = Configs::new(version).connect().forger();
        pair.wire.lock().input.extend([23, 3, 3, 0x48, 1]);
        assert_eq!(pair.refused(), [u8::from(AlertDescription::DecodeError)], "before its body comes");
    }
}

#[test]
fn records_without_payload_do_not_go_on_for_ever() {
    for version in VERSIONS {
        let mut pair = Configs::new(version).connect().forger();
        for _ in 0..32 {
            pair.sends(ContentType::ApplicationData, b"");
        }
        assert!(pair.server_reads().is_none());
        pair.sends(ContentType::ApplicationData, b"");
        assert_eq!(pair.refused(), [u8::from(AlertDescription::UnexpectedMessage)]);
    }
}

#[test]
fn a_record_that_was_changed_is_refused() {
    for version in VERSIONS {
        let mut pair = Configs::new(version).connect().forger();
        pair.sends(ContentType::ApplicationData, b"good");
        pair.sends(ContentType::ApplicationData, b"bad");
        *pair.wire.lock().input.last_mut().unwrap() ^= 1;
        assert_eq!(pair.server_reads().unwrap().unwrap(), b"good", "what came before it counts");
        assert_eq!(pair.refused(), [u8::from(AlertDescription::BadRecordMac)]);
    }
}

#[test]
fn a_record_that_is_sent_again_is_refused() {
    for version in VERSIONS {
        let mut pair = Configs::new(version).connect().forger();
        pair.sends(ContentType::ApplicationData, b"once");
        let again = pair.wire.lock().input.clone();
        pair.wire.lock().input.extend(again);
        assert_eq!(pair.server_reads().unwrap().unwrap(), b"once");
        assert_eq!(pair.refused(), [u8::from(AlertDescription::BadRecordMac)]);
    }
}

#[test]
fn records_that_have_no_place_are_refused() {
    for (version, record, alert) in [
        (&TLS13, &[20, 3, 3, 0, 1, 1][..], AlertDescription::UnexpectedMessage),
        (&TLS12, &[20, 3, 3, 0, 1, 1], AlertDescription::UnexpectedMessage),
        (&TLS13, &[21, 3, 3, 0, 2, 1, 0], AlertDescription::UnexpectedMessage),
        (&TLS12, &[21, 3, 3, 0, 2, 1, 0], AlertDescription::BadRecordMac),
        (&TLS13, &[22, 3, 3, 0, 5, 24, 0, 0, 1, 0], AlertDescription::UnexpectedMessage),
        (&TLS13, &[99, 3, 3, 0, 1, 1], AlertDescription::DecodeError),
        (&TLS13, &[23, 9, 3, 0, 1, 1], AlertDescription::DecodeError),
        (&TLS13, &[23, 3, 3, 0, 1, 1], AlertDescription::BadRecordMac),
        (&TLS13, &[23, 3, 3, 0, 0], AlertDescription::BadRecordMac),
    ] {
        let pair = Configs::new(version).connect().forger();
        pair.wire.lock().input.extend_from_slice(record);
        assert_eq!(pair.refused(), [u8::from(alert)], "{record:?}");
    }
}

#[test]
fn messages_that_have_no_place_are_refused() {
    let unexpected = AlertDescription::UnexpectedMessage;
    for (version, messages, alert) in [
        // A new handshake.
        (&TLS12, &[(ContentType::Handshake, &[1, 0, 0, 0][..])][..], AlertDescription::NoRenegotiation),
        (&TLS13, &[(ContentType::Handshake, &[1, 0, 0, 0])], unexpected),
        // Key updates of the wrong length, kind, and place.
        (&TLS13, &[(ContentType::Handshake, &[24, 0, 0, 2, 0, 0])], AlertDescription::DecodeError),
        (&TLS13, &[(ContentType::Handshake, &[24, 0, 0, 1, 2])], AlertDescription::IllegalParameter),
        (&TLS13, &[(ContentType::Handshake, &[24, 0, 0, 1, 0, 24, 0, 0, 1, 0])], unexpected),
        (&TLS13, &[(ContentType::Handshake, &[24, 0]), (ContentType::ApplicationData, b"x")], unexpected),
        // Alerts of no kind.
        (&TLS13, &[(ContentType::Alert, &[1])], AlertDescription::DecodeError),
        (&TLS13, &[(ContentType::Alert, &[3, 0])], AlertDescription::IllegalParameter),
        (&TLS13, &[(ContentType::Alert, &[1, 40])], AlertDescription::DecodeError),
        (&TLS13, &[(ContentType::Heartbeat, &[1])], unexpected),
    ] {
        let mut pair = Configs::new(version).connect().forger();
        for (typ, message) in messages {
            pair.sends(*typ, message);
        }
        assert_eq!(pair.refused(), [u8::from(alert)], "{messages:?}");
    }
}

#[test]
fn warnings_are_passed_over_a_few_times() {
    for (version, warning) in [(&TLS12, 41), (&TLS13, 90)] {
        let mut pair = Configs::new(version).connect().forger();
        for _ in 0..4 {
            pair.sends(ContentType::Alert, &[1, warning]);
        }
        pair.sends(ContentType::ApplicationData, b"on");
        assert_eq!(pair.server_reads().unwrap().unwrap(), b"on");
        pair.sends(ContentType::Alert, &[1, warning]);
        assert_eq!(pair.refused(), [u8::from(AlertDescription::UnexpectedMessage)]);
    }
}

#[test]
fn an_alert_of_the_peer_ends_the_session_without_an_answer() {
    for version in VERSIONS {
        let mut pair = Configs::new(version).connect().forger();
        pair.sends(ContentType::Alert, &[2, 20]);
        assert_eq!(pair.refused(), Vec::<u8>::new());
    }
}

#[test]
fn the_client_may_end_its_direction_first() {
    for version in VERSIONS {
        let mut pair = Configs::new(version).connect();
        pair.client.writer().write_all(b"last").unwrap();
        pair.client.send_close_notify();
        pair.deliver();
        // What follows the end does not count.
        pair.wire.lock().input.extend_from_slice(b"whatever");
        assert_eq!(pair.server_reads(100).unwrap().unwrap(), b"last");
        assert_eq!(pair.server_reads(100).unwrap().unwrap(), b"");
        assert_eq!(pair.server_reads(100).unwrap().unwrap(), b"");
        pair.server_writes_all(b"goes on");
        assert_eq!(pair.client_reads_all(), (b"goes on".to_vec(), false));
        pair.server_shuts_down();
        assert_eq!(pair.client_reads_all(), (Vec::new(), true));
    }
}

#[test]
fn the_server_may_end_its_direction_first() {
    for version in VERSIONS {
        let mut pair = Configs::new(version).connect();
        pair.server_writes_all(b"last");
        pair.server_shuts_down();
        pair.server_shuts_down();
        assert!(pair.wire.lock().shut);
        assert_eq!(pair.client_reads_all(), (b"last".to_vec(), true));
        assert!(pair.server_writes(b"more").unwrap().is_err());
        pair.client_sends(b"goes on");
        assert_eq!(pair.server_reads_all(), b"goes on");
    }
}

#[test]
fn an_end_of_the_connection_alone_is_an_error() {
    for version in VERSIONS {
        let mut pair = Configs::new(version).connect();
        pair.client_sends(b"all that comes");
        pair.wire.lock().ended = true;
        assert_eq!(pair.server_reads(100).unwrap().unwrap(), b"all that comes");
        assert_eq!(pair.server_reads(100).unwrap().unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}

#[test]
fn keys_are_updated_both_ways() {
    let mut pair = Configs::new(&TLS13).connect();
    for _ in 0..100 {
        pair.client.refresh_traffic_keys().unwrap();
        pair.assert_both_ways();
        assert_eq!(pair.server.session.sealed(), 1, "our keys were updated, too");
    }
}

#[test]
fn a_key_update_may_come_in_pieces() {
    let mut pair = Configs::new(&TLS13).connect().forger();
    for byte in [24, 0, 0, 1, 0] {
        pair.sends(ContentType::Handshake, &[byte]);
    }
    assert!(pair.server_reads().is_none());
    // With the old keys, which no longer count.
    pair.sends(ContentType::ApplicationData, b"x");
    assert_eq!(pair.refused(), [u8::from(AlertDescription::BadRecordMac)]);
}

#[test]
fn key_updates_are_answered_once_while_the_socket_takes_nothing() {
    let mut pair = Configs::new(&TLS13).connect();
    pair.wire.lock().room = Some(100);
    assert!(pair.server_writes(&[1; 1000]).is_some());
    for _ in 0..500 {
        pair.client.refresh_traffic_keys().unwrap();
        pair.client_sends(b"x");
        assert_eq!(pair.server_reads_all(), b"x");
    }
    assert!(pair.server.backlog() < 4096);
    pair.wire.lock().room = None;
    pair.server_writes_all(&[2; 1000]);
    assert_eq!(pair.client_reads_all().0, [[1; 1000], [2; 1000]].concat());
    pair.assert_both_ways();
}

#[test]
fn key_updates_without_payload_do_not_go_on_for_ever() {
    let mut pair = Configs::new(&TLS13).connect();
    for _ in 0..32 {
        pair.client.refresh_traffic_keys().unwrap();
    }
    pair.deliver();
    assert!(pair.server_reads(100).is_none());
    assert_eq!(receive(&mut pair.client, &pair.wire).1, None);
    pair.client.refresh_traffic_keys().unwrap();
    pair.deliver();
    assert!(pair.server_reads(100).unwrap().is_err());
    let alert = rustls::Error::AlertReceived(AlertDescription::UnexpectedMessage);
    assert_eq!(receive(&mut pair.client, &pair.wire).1, Some(alert));
}

#[test]
fn keys_that_have_sealed_enough_are_replaced() {
    let mut pair = Configs::new(&TLS13).connect();
    pair.server.session.limit(10);
    for _ in 0..100 {
        pair.server_writes_all(&vec![1; 3 * SEALED_MAX]);
        assert_eq!(pair.client_reads_all().0, vec![1; 3 * SEALED_MAX]);
        assert!(pair.server.session.sealed() < 10);
    }
    pair.assert_both_ways();
}

#[test]
fn a_session_whose_keys_cannot_be_replaced_ends_when_they_have_sealed_enough() {
    let mut pair = Configs::new(&TLS12).connect();
    pair.server.session.limit(5);
    // The handshake took the first.
    pair.server_writes_all(&vec![1; 3 * SEALED_MAX]);
    assert!(pair.server_writes(b"x").unwrap().is_err());
    pair.server_shuts_down();
    assert_eq!(pair.client_reads_all(), (vec![1; 3 * SEALED_MAX], true));
}

#[test]
fn what_is_written_at_once_is_bounded() {
    for version in VERSIONS {
        let mut pair = Configs::new(version).connect();
        let payload = random(&mut StdRng::seed_from_u64(1), 2 * SEAL);
        assert_eq!(pair.server_writes(b"").unwrap().unwrap(), 0);
        assert!(pair.wire.lock().output.is_empty(), "nothing is not sent");
        assert_eq!(pair.server_writes(&payload).unwrap().unwrap(), SEAL);
        pair.server_writes_all(&payload[SEAL..]);
        assert!(pair.client_reads_all().0 == payload);
    }
}

#[test]
fn a_socket_that_takes_little_holds_the_writer_back() {
    let mut pair = Configs::new(&TLS13).connect();
    let payload = random(&mut StdRng::seed_from_u64(1), 1 << 20);
    let mut written = 0;
    let mut arrived = Vec::new();
    while arrived.len() < payload.len() {
        pair.wire.lock().room = Some(10_000);
        if let Some(size) = pair.server_writes(&payload[written..]) {
            written += size.unwrap();
        }
        assert!(pair.server.backlog() < 2 * SEAL, "no more is kept than one write");
        arrived.extend(pair.client_reads_all().0);
    }
    assert!(arrived == payload);
}

#[test]
fn a_reader_that_takes_little_gets_it_all() {
    let mut pair = Configs::new(&TLS13).connect();
    let payload = random(&mut StdRng::seed_from_u64(1), 100_000);
    pair.client_sends(&payload);
    let mut arrived = Vec::new();
    while let Some(bytes) = pair.server_reads(777) {
        arrived.extend(bytes.unwrap());
    }
    assert!(arrived == payload);
}

#[tokio::test]
async fn between_two_handshakes_everything_else_has_its_turn() {
    let configs = Configs::new(&TLS13);
    let (turns, order) = (turns(), Arc::new(std::sync::Mutex::new(Vec::new())));
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..5 {
        let (mut client, wire) = (configs.client(), Shared::default());
        client.write_tls(&mut wire.lock().input).unwrap();
        let (config, turns, order) = (Arc::clone(&configs.server), Arc::clone(&turns), Arc::clone(&order));
        let seen = wire.clone();
        tasks.spawn(async move {
            let mut accept = Box::pin(TlsStream::accept(wire, config, turns, Vec::new()));
            let mut answered = false;
            std::future::poll_fn(|cx| {
                let done = accept.as_mut().poll(cx).is_ready();
                if !std::mem::replace(&mut answered, !seen.lock().output.is_empty()) && answered {
                    order.lock().unwrap().push("handshake");
                }
                // The client says nothing more.
                if done || answered { Poll::Ready(()) } else { Poll::Pending }
            })
            .await;
            // It holds its turn until the others have had theirs.
            tokio::task::yield_now().await;
            drop(accept);
        });
    }
    let stream = Arc::clone(&order);
    tasks.spawn(async move {
        for _ in 0..20 {
            stream.lock().unwrap().push("stream");
            tokio::task::yield_now().await;
        }
    });
    while tasks.join_next().await.is_some() {}
    let order = order.lock().unwrap();
    assert_eq!(order.iter().filter(|&&what| what == "handshake").count(), 5);
    assert!(order.windows(2).all(|two| two != ["handshake", "handshake"]), "{order:?}");
}
