//! What every rendezvous store must do. A new store is one more line at the end of this file.

use std::sync::Arc;

use midspan_core::{
    close::CloseReason,
    id::{DeviceAddress, Incarnation, StreamId},
    limit::LimitName,
    record::{self, StreamEnd, StreamRecord, StreamState},
    ticket::Owner,
    time::UnixTime,
};
use midspan_platform::rendezvous::{
    CreateError, EXPIRY_SLACK_SECONDS, EdgeLease, LEASE_SECONDS, MemoryRendezvous, REMEMBER_SECONDS,
    Rendezvous, StreamLimits,
};

const NOW: UnixTime = UnixTime(1_800_000_000);
const WIDE: StreamLimits = StreamLimits { per_device: 1000, per_service: 1000 };

async fn streams_move_forward_only(store: &dyn Rendezvous) {
    store.create_stream(stream(1, "dev1"), WIDE).await.unwrap();
    let joined = StreamState::Joined { joined: NOW };
    let changed = store.advance_stream(id(1), joined.clone()).await.unwrap();
    assert_eq!(changed.map(|record| record.state), Some(joined.clone()));
    assert_eq!(store.advance_stream(id(1), StreamState::Accepted).await.unwrap(), None);
    assert_eq!(store.stream(id(1)).await.unwrap().unwrap().state, joined);
    assert_eq!(store.advance_stream(id(99), StreamState::Accepted).await.unwrap(), None);
    assert_eq!(store.stream(id(99)).await.unwrap(), None);
}

async fn the_first_end_stands_and_is_told_once(store: &dyn Rendezvous) {
    store.create_stream(stream(1, "dev1"), WIDE).await.unwrap();
    assert!(store.advance_stream(id(1), ended(CloseReason::ServiceClosed)).await.unwrap().is_some());
    assert!(store.advance_stream(id(1), ended(CloseReason::Idle)).await.unwrap().is_none());
    assert_eq!(store.stream(id(1)).await.unwrap().unwrap().state, ended(CloseReason::ServiceClosed));
}

async fn limits_are_exact_and_free_up(store: &dyn Rendezvous) {
    let limits = StreamLimits { per_device: 2, per_service: 3 };
    let limit_of = async |n, device: &str| match store.create_stream(stream(n, device), limits).await {
        Ok(()) => None,
        Err(CreateError::Limit(limit)) => Some((limit.name, limit.value, limit.scope)),
        Err(CreateError::Store(error)) => panic!("{error}"),
    };
    assert_eq!(limit_of(1, "dev1").await, None);
    assert_eq!(limit_of(2, "dev1").await, None);
    assert_eq!(limit_of(3, "dev1").await, Some((LimitName::StreamsPerDevice, 2, "device dev1".to_owned())));
    assert_eq!(limit_of(4, "dev2").await, None);
    assert_eq!(
        limit_of(5, "dev3").await,
        Some((LimitName::StreamsPerService, 3, "service support".to_owned()))
    );
    for _ in 0..2 {
        store.advance_stream(id(1), ended(CloseReason::ServiceClosed)).await.unwrap();
    }
    assert_eq!(limit_of(6, "dev1").await, None);
    assert!(limit_of(7, "dev1").await.is_some(), "an end that was told twice must free one place only");
}

async fn lists_are_ordered_paged_and_without_the_dead(store: &dyn Rendezvous) {
    let mut ids: Vec<_> = (1..=25).map(id).collect();
    for n in 1..=25 {
        store.create_stream(stream(n, "dev1"), WIDE).await.unwrap();
    }
    store.advance_stream(id(7), ended(CloseReason::Idle)).await.unwrap();
    ids.retain(|&stream| stream != id(7));
    ids.sort();
    let (mut seen, mut after) = (Vec::new(), None);
    loop {
        let page = store.streams(after, 10).await.unwrap();
        assert!(page.len() <= 10);
        let Some(last) = page.last() else { break };
        after = Some(last.stream);
        seen.extend(page.iter().map(|record| record.stream));
    }
    assert_eq!(seen, ids);
}

async fn handshakes_that_nobody_ends_expire(store: &dyn Rendezvous) {
    for n in 1..=3 {
        store.create_stream(stream(n, "dev1"), WIDE).await.unwrap();
    }
    store.advance_stream(id(2), StreamState::Joined { joined: NOW }).await.unwrap();
    store.advance_stream(id(3), StreamState::Accepted).await.unwrap();
    let last = UnixTime(NOW.0 + 60 + EXPIRY_SLACK_SECONDS);
    assert_eq!(store.expire(last).await.unwrap(), []);
    let late = UnixTime(last.0 + 1);
    let mut expired: Vec<_> =
        store.expire(late).await.unwrap().into_iter().map(|record| record.stream).collect();
    expired.sort();
    let mut both = [id(1), id(3)];
    both.sort();
    assert_eq!(expired, both);
    assert_eq!(store.expire(late).await.unwrap(), [], "an end is given once");
    let state = store.stream(id(1)).await.unwrap().unwrap().state;
    assert_eq!(state, StreamState::Ended(StreamEnd::unused(CloseReason::BothLegsMissing, late)));

    store.expire(UnixTime(late.0 + REMEMBER_SECONDS)).await.unwrap();
    assert_eq!(store.stream(id(1)).await.unwrap(), None);
    assert!(
        store.stream(id(2)).await.unwrap().is_some(),
        "a joined stream is remembered as long as it lives"
    );
}

async fn edges_are_there_while_they_renew(store: &dyn Rendezvous) {
    for name in ["edge-1", "edge-0"] {
        store.renew_edge(edge(name, true), NOW).await.unwrap();
    }
    store.renew_edge(edge("edge-0", false), UnixTime(NOW.0 + 3)).await.unwrap();
    let names = async |seconds| {
        let edges = store.edges(UnixTime(NOW.0 + seconds)).await.unwrap();
        edges.into_iter().map(|edge| (edge.owner.name, edge.takes_streams)).collect::<Vec<_>>()
    };
    let (zero, one) = (("edge-0".to_owned(), false), ("edge-1".to_owned(), true));
    assert_eq!(names(LEASE_SECONDS).await, [zero.clone(), one]);
    assert_eq!(names(LEASE_SECONDS + 1).await, [zero]);
    assert_eq!(names(LEASE_SECONDS + 4).await, []);
}

async fn the_newest_link_is_the_devices(store: &dyn Rendezvous) {
    let device = address("dev1");
    let older = store.link_up(&device, NOW).await.unwrap();
    // A clock that steps back must not make a newer link an older one.
    let newer = store.link_up(&device, UnixTime(NOW.0 - 100)).await.unwrap();
    assert!(newer > older);
    store.link_down(&device, older).await.unwrap();
    assert_eq!(store.link(&device).await.unwrap().map(|link| link.generation), Some(newer));
    store.link_down(&device, newer).await.unwrap();
    assert_eq!(store.link(&device).await.unwrap(), None);
    assert!(store.link_up(&device, NOW).await.unwrap() > newer);
}

async fn links_are_ordered_and_paged(store: &dyn Rendezvous) {
    let names = ["b", "a", "a/m", "c", "a/b"];
    for name in names {
        store.link_up(&address(name), NOW).await.unwrap();
    }
    let first = store.links(None, 3).await.unwrap();
    let last = &first.last().unwrap().0;
    let second = store.links(Some(last), 3).await.unwrap();
    let all: Vec<_> = first.iter().chain(&second).map(|(address, _)| address.to_string()).collect();
    assert_eq!(all, ["a", "a/b", "a/m", "b", "c"]);
}

async fn a_thousand_at_once_keep_the_limit(store: Arc<dyn Rendezvous>) {
    let limits = StreamLimits { per_device: 100, per_service: 1000 };
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..1000 {
        let store = Arc::clone(&store);
        tasks.spawn(async move { store.create_stream(stream(n, "dev1"), limits).await.is_ok() });
    }
    let created = tasks.join_all().await.into_iter().filter(|created| *created).count();
    assert_eq!(created, 100);
}

fn id(n: u128) -> StreamId {
    // Ids are random: their order is not the order in which they were made.
    StreamId::from_random(n.wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835))
}

fn address(text: &str) -> DeviceAddress {
    text.parse().unwrap()
}

fn ended(reason: CloseReason) -> StreamState {
    StreamState::Ended(StreamEnd::unused(reason, NOW))
}

fn edge(name: &str, takes_streams: bool) -> EdgeLease {
    EdgeLease { owner: owner(name), takes_streams }
}

fn owner(name: &str) -> Owner {
    Owner { name: name.to_owned(), incarnation: Incarnation::from_random(1), address: String::new() }
}

fn stream(n: u128, device: &str) -> StreamRecord {
    StreamRecord {
        version: record::VERSION,
        stream: id(n),
        address: address(device),
        name: "ssh".parse().unwrap(),
        credential: "support".to_owned(),
        owner: owner("edge-0"),
        created: NOW,
        expires: UnixTime(NOW.0 + 60),
        state: StreamState::Requested,
    }
}

macro_rules! suite {
    ($store:ident, $new:expr, [$($rule:ident),* $(,)?]) => {
        mod $store {
            use super::*;

            $(#[tokio::test]
            async fn $rule() {
                super::$rule(&$new).await;
            })*

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn a_thousand_at_once_keep_the_limit() {
                super::a_thousand_at_once_keep_the_limit(Arc::new($new)).await;
            }
        }
    };
}

suite!(
    memory,
    MemoryRendezvous::new(),
    [
        streams_move_forward_only,
        the_first_end_stands_and_is_told_once,
        limits_are_exact_and_free_up,
        lists_are_ordered_paged_and_without_the_dead,
        handshakes_that_nobody_ends_expire,
        edges_are_there_while_they_renew,
        the_newest_link_is_the_devices,
        links_are_ordered_and_paged,
    ]
);
