//! The real edge over connections in memory: upgrade, pairing and splice, with legs that come in any order and send at once.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use clap::Parser;
use midspan_core::{
    close::CloseReason,
    deny::DenyList,
    id::{Incarnation, Role, StreamId},
    key::Key,
    record::{self, StreamRecord, StreamState},
    ticket::{Owner, Ticket, TicketKeys},
    time::UnixTime,
    trace::TraceParent,
};
use midspan_edge::{DataThreads, Edge, EdgeParts, EdgeSettings};
use midspan_platform::{
    activity::ActivityLog,
    clock,
    http::{Handler, Peer, handler},
    lifecycle::Lifecycle,
    listener::{Connection, serve_http},
    metrics::Metrics,
    rendezvous::{MemoryRendezvous, Rendezvous, StreamLimits},
    secrets::Secrets,
    watched::Watched,
};
use proptest::prelude::*;
use secrecy::ExposeSecret as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};

use crate::splice::{Arrived, End, Plan, check, plan, play};

/// Shorter than the stall limit, by which the relay itself would end a stream that stands.
const PATIENCE: Duration = Duration::from_secs(600);

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]

    #[test]
    fn nothing_is_lost_repeated_or_moved_from_the_first_byte_on(
        service in plan(), device in plan(), service_ends: bool, end in prop_oneof![Just(End::Close), Just(End::Abort)],
        delays in (0u64..400, 0u64..400),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
        // Time stands still while anybody works; a pipe of a few bytes may take a message of many in thousands of rests.
        let run = async { tokio::time::timeout(PATIENCE, run(service, device, service_ends, end, delays)).await };
        runtime.block_on(run).expect("the stream ends in time");
    }
}

/// Brings both legs to one edge, `delays` milliseconds after the start, and checks what arrives.
async fn run(service: Plan, device: Plan, service_ends: bool, end: End, delays: (u64, u64)) {
    let relay = Relay::start().await;
    let (at_service, at_device) = tokio::join!(
        relay.leg(Role::Service, &service, service_ends.then_some(end), delays.0),
        relay.leg(Role::Device, &device, (!service_ends).then_some(end), delays.1),
    );
    let reason = relay.end().await;
    check(&service, &device, service_ends, end, reason, &at_service, &at_device);
    relay.lifecycle.closing().cancel();
    relay.lifecycle.stopped().cancel();
    relay.lifecycle.finished().await;
}

struct Relay {
    lifecycle: Lifecycle,
    rendezvous: Arc<MemoryRendezvous>,
    keys: TicketKeys,
    answers: Handler,
    owner: Owner,
}

impl Relay {
    async fn start() -> Self {
        #[derive(Parser)]
        struct Defaults {
            #[command(flatten)]
            edge: EdgeSettings,
        }
        let (lifecycle, metrics) = (Lifecycle::new(), Metrics::new());
        let keys = TicketKeys::new(&Key::from_bytes(vec![7; 32]).unwrap(), None).unwrap();
        let rendezvous = Arc::new(MemoryRendezvous::default());
        let owner = Owner {
            name: "edge-0".to_owned(),
            incarnation: Incarnation::from_random(1),
            address: String::new(),
        };
        let activity = ActivityLog::start(Some("/dev/null".into()), &lifecycle, &metrics).await.unwrap();
        let edge = Edge::start(EdgeParts {
            settings: Defaults::parse_from(["edge"]).edge,
            owner: owner.clone(),
            secrets: Secrets {
                tickets: Watched::fixed(keys.clone()),
                deny: Watched::fixed(DenyList::default()),
            },
            lifecycle: lifecycle.clone(),
            metrics,
            rendezvous: Arc::clone(&rendezvous) as _,
            activity,
            threads: DataThreads::current(),
            internal: None,
            passing: midspan_edge::Passing::default(),
        });
        let answers = handler(move |request| {
            let edge = Arc::clone(&edge);
            async move { edge.handle(&request).await }
        });
        let relay = Self { lifecycle, rendezvous, keys, answers, owner };
        let limits = StreamLimits { per_device: 1, per_service: 1, per_relay: 1 };
        relay.rendezvous.create_stream(relay.record(), limits).await.unwrap();
        relay
    }

    /// Opens a leg, sends the plan's early bytes along with the request, and plays the plan.
    async fn leg(&self, role: Role, plan: &Plan, end: Option<End>, delay: u64) -> Arrived {
        tokio::time::sleep(Duration::from_millis(delay)).await;
        // A request must fit in; a plan's pipe may be smaller.
        let (mut io, far) = duplex(plan.pipe.max(1));
        let peer = Arc::new(Peer::new(SocketAddr::from(([127, 0, 0, 1], 1)), None));
        let (lifecycle, answers) = (self.lifecycle.clone(), Arc::clone(&self.answers));
        self.lifecycle.spawn(tracing::Span::none(), async move {
            let connection = Connection::memory(far);
            serve_http(connection, peer, Duration::from_secs(10), &lifecycle, &answers).await;
        });
        let bytes = plan.bytes();
        let mut request = self.request(role).into_bytes();
        request.extend_from_slice(&bytes[..plan.early.min(bytes.len())]);
        let (sent, ()) = {
            let (mut read, mut write) = tokio::io::split(&mut io);
            tokio::join!(write.write_all(&request), read_answer(&mut read))
        };
        sent.unwrap();
        play(plan, &bytes, io, end).await
    }

    fn request(&self, role: Role) -> String {
        let record = self.record();
        let ticket = Ticket {
            stream: record.stream,
            role,
            owner: record.owner,
            address: record.address,
            name: record.name,
            credential: record.credential,
            credential_expires: UnixTime(u64::MAX / 2),
            expires: clock::unix().plus(Duration::from_secs(60)),
            trace: TraceParent::new(1, 1),
        };
        let ticket = self.keys.sign(&ticket).unwrap();
        format!(
            "GET /bridges/{}/{role} HTTP/1.1\r\nHost: relay\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nAuthorization: Bearer {}\r\n\r\n",
            record.stream,
            ticket.expose_secret()
        )
    }

    /// Waits until the stream's end is recorded.
    async fn end(&self) -> CloseReason {
        loop {
            let record = self.rendezvous.stream(stream()).await.unwrap().unwrap();
            if let StreamState::Ended(end) = record.state {
                return end.reason;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    fn record(&self) -> StreamRecord {
        StreamRecord {
            version: record::VERSION,
            stream: stream(),
            address: "dev1".parse().unwrap(),
            name: "ssh".parse().unwrap(),
            credential: "support".to_owned(),
            owner: self.owner.clone(),
            created: UnixTime(1),
            expires: UnixTime(u64::MAX / 2),
            state: StreamState::Requested,
        }
    }
}

fn stream() -> StreamId {
    StreamId::from_random(1)
}

/// Reads the answer to the upgrade and nothing behind it.
async fn read_answer(io: &mut tokio::io::ReadHalf<&mut DuplexStream>) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(io.read_u8().await.unwrap());
    }
    assert!(head.starts_with(b"HTTP/1.1 101 "), "{}", String::from_utf8_lossy(&head));
}
