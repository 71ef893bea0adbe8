//! What strangers say before there is TLS.

use std::net::SocketAddr;

use secrecy::ExposeSecret as _;
use testkit::{Fleet, Leg, Target, eventually, within};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};

use super::{PASSED, PASSED_TOTAL, TLS_FAILURES, beside, carries, forwarded, knows_others, tcp_from};

/// How the first record of a client is taken apart on its way.
#[derive(Debug, Clone, Copy)]
enum Cut {
    /// Into single bytes.
    Segments,
    /// Into TLS records of so many bytes (RFC 8446, section 5.1).
    Records(usize),
}

/// A way to `address` on which the first record of each client is taken apart.
async fn through(cut: Cut, address: SocketAddr, tasks: &mut JoinSet<()>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let here = listener.local_addr().unwrap();
    tasks.spawn(async move {
        let mut connections = JoinSet::new();
        loop {
            let (client, _) = listener.accept().await.unwrap();
            connections.spawn(async move { cut_up(cut, client, address).await });
        }
    });
    here
}

async fn cut_up(cut: Cut, mut client: TcpStream, address: SocketAddr) {
    let mut server = TcpStream::connect(address).await.unwrap();
    server.set_nodelay(true).unwrap();
    let mut header = [0; 5];
    client.read_exact(&mut header).await.unwrap();
    let mut hello = vec![0; u16::from_be_bytes([header[3], header[4]]).into()];
    client.read_exact(&mut hello).await.unwrap();
    match cut {
        Cut::Segments => {
            for byte in [&header[..], &hello].concat() {
                server.write_all(&[byte]).await.unwrap();
                tokio::task::yield_now().await;
            }
        }
        Cut::Records(size) => {
            for piece in hello.chunks(size) {
                header[3..].copy_from_slice(&u16::try_from(piece.len()).unwrap().to_be_bytes());
                server.write_all(&[&header[..], piece].concat()).await.unwrap();
            }
        }
    }
    // The test looks at what arrives.
    let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
}

#[tokio::test]
async fn a_hello_in_many_pieces_is_read_and_reaches_whoever_it_is_for() {
    let fleet = Fleet::with_names(2, &[]).await;
    let mut link = fleet.device("dev1", 0).await;
    let mut tasks = JoinSet::new();
    knows_others(&fleet, 0).await;
    knows_others(&fleet, 1).await;
    for cut in [Cut::Segments, Cut::Records(1), Cut::Records(100)] {
        let handshake = fleet.handshake(0, "dev1", &mut link).await;
        let owner = fleet.owner(handshake.grant.stream).await;
        let wrong = beside(&fleet, owner);
        let open = async |edge: usize, url: &str, ticket: &str, tasks: &mut JoinSet<()>| {
            let target = fleet.edges[edge].target_for(url);
            let target = Target { address: through(cut, target.address, tasks).await, ..target };
            Leg::open(&target, url, ticket).await
        };
        let (grant, invitation) = (&handshake.grant, &handshake.invitation);
        let mut service = open(wrong, &grant.url, grant.ticket.expose_secret(), &mut tasks).await;
        let mut device = open(owner, &invitation.url, invitation.ticket.expose_secret(), &mut tasks).await;
        carries(&mut service, &mut device).await;
        let (passed, hops) =
            (fleet.edges[wrong].metrics().await.count(PASSED, &[]), forwarded(&fleet, wrong));
        assert_eq!((passed, hops), (1, 0), "{cut:?}");
        device.close(1000, "").await;
        tokio::join!(service.closed(), device.closed());
        fleet.edges[wrong].counts(PASSED, &[], 0).await;
    }
}

#[tokio::test]
async fn what_is_no_hello_is_refused_and_costs_nothing() {
    let fleet = Fleet::with_names(2, &["--header-limit", "1s"]).await;
    let edge = &fleet.edges[0];
    let record = |kind: u8, length: u16, body: &[u8]| {
        let [high, low] = length.to_be_bytes();
        [&[kind, 3, 1, high, low], body].concat()
    };
    let hello = |length: [u8; 3], body: &[u8]| [&[1][..], &length, body].concat();
    let refused = [
        b"GET / HTTP/1.1\r\nHost: edge-1.streams.example\r\n\r\n".to_vec(),
        vec![0xff; 40_000],
        record(22, 0xffff, &[1; 2000]),
        record(22, 0, &[]).repeat(200),
        record(21, 2, &[2, 80]),
        record(22, 8, &hello([0, 0, 4], &[3, 3, 0, 0])),
        // A hello that claims more than anybody sends, in whole records.
        (0..3).flat_map(|_| record(22, 8000, &hello([0, 0xff, 0xff], &[0; 7996]))).collect(),
    ];
    for bytes in &refused {
        let mut tcp = tcp_from([127, 0, 0, 1], &edge.target).await;
        // It may be refused before all of it is there.
        let _ = tcp.write_all(bytes).await;
        let mut answer = Vec::new();
        let _ = within("the end of the connection", tcp.read_to_end(&mut answer)).await;
        assert!(answer.len() < 100, "{answer:?}");
        assert!(answer.is_empty() || answer[0] == 21, "not an alert: {answer:?}");
    }
    let failures = || async { edge.metrics().await.count(TLS_FAILURES, &[]) };
    let expected = i64::try_from(refused.len()).unwrap();
    eventually("each one is counted", || async { failures().await == expected }).await;
    // Half a hello, and then nothing; and a client that goes away.
    let half = record(22, 500, &hello([0, 1, 0xf0], &[3, 3]));
    let mut slow = tcp_from([127, 0, 0, 1], &edge.target).await;
    slow.write_all(&half).await.unwrap();
    let end = within("the end of a slow connection", slow.read(&mut [0; 16])).await;
    assert!(!matches!(end, Ok(1..)), "{end:?}");
    let before = edge.metrics().await.count(TLS_FAILURES, &[("cause", "timeout")]);
    assert!(before >= 1);
    let mut gone = tcp_from([127, 0, 0, 1], &edge.target).await;
    gone.write_all(&half).await.unwrap();
    drop(gone);
    eventually("all are counted", || async { failures().await == expected + 2 }).await;
    edge.counts("midspan_listener_connections", &[("listener", "public")], 0).await;
    edge.counts(PASSED_TOTAL, &[], 0).await;
    // And it is there for others.
    drop(edge.target.connect().await);
}
