//! What every rendezvous store must do. A new store is one more line at the end of this file.

mod faults;
mod redis;
#[path = "../../sim/store.rs"]
#[expect(dead_code, reason = "its faults are for the simulation")]
mod simulated_store;

use std::{sync::Arc, time::Duration};

use self::{
    redis::{Behind, Cluster, Single, Tls},
    simulated_store::SimStore,
};
use midspan_core::{
    close::CloseReason,
    id::{DeviceAddress, Incarnation, StreamId},
    limit::LimitName,
    record::{self, StreamEnd, StreamRecord, StreamState},
    ticket::Owner,
    time::UnixTime,
};
use midspan_platform::{
    clock,
    rendezvous::{
        CreateError, Lease, LinkRecord, MemoryRendezvous, Moment, Rendezvous, ServerRole, StreamLimits,
        Timing,
    },
};
use testkit::{eventually, until, within};

const NOW: UnixTime = UnixTime(1_800_000_000);
const WIDE: StreamLimits = StreamLimits { per_device: 1000, per_service: 1000, per_relay: 1000 };

/// Times short enough to wait for.
const SHORT: Timing = Timing {
    lease: Duration::from_millis(600),
    renewal: Duration::from_millis(100),
    remember: Duration::from_millis(300),
    slack: Duration::from_millis(100),
};

/// Where a rule gets its store from.
trait Stores {
    /// An empty store, as `N` processes of one relay see it.
    async fn open<const N: usize>(&self, timing: Timing) -> [Arc<dyn Rendezvous>; N];
}

async fn streams_move_forward_only(stores: &impl Stores) {
    let [store] = stores.open(Timing::default()).await;
    store.create_stream(stream(1, "dev1"), WIDE).await.unwrap();
    let joined = StreamState::Joined { joined: NOW };
    let changed = store.advance_stream(id(1), joined.clone()).await.unwrap();
    assert_eq!(changed.map(|record| record.state), Some(joined.clone()));
    assert_eq!(store.advance_stream(id(1), StreamState::Accepted).await.unwrap(), None);
    assert_eq!(store.stream(id(1)).await.unwrap(), Some(StreamRecord { state: joined, ..stream(1, "dev1") }));
    assert_eq!(store.advance_stream(id(99), StreamState::Accepted).await.unwrap(), None);
    assert_eq!(store.stream(id(99)).await.unwrap(), None);
}

async fn the_first_end_stands_and_is_told_once(stores: &impl Stores) {
    let [store, other] = stores.open(Timing::default()).await;
    store.create_stream(stream(1, "dev1"), WIDE).await.unwrap();
    assert!(other.advance_stream(id(1), ended(CloseReason::ServiceClosed)).await.unwrap().is_some());
    assert!(store.advance_stream(id(1), ended(CloseReason::Idle)).await.unwrap().is_none());
    assert_eq!(store.stream(id(1)).await.unwrap().unwrap().state, ended(CloseReason::ServiceClosed));
}

async fn limits_are_exact_and_free_up(stores: &impl Stores) {
    let [store] = stores.open(Timing::default()).await;
    let limits = StreamLimits { per_device: 2, per_service: 3, per_relay: 1000 };
    let limit_of = async |n, device: &str| match store.create_stream(stream(n, device), limits).await {
        Ok(_) => None,
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

async fn all_services_share_the_limit_of_the_relay(stores: &impl Stores) {
    let [store] = stores.open(Timing::default()).await;
    let limits = StreamLimits { per_relay: 2, ..WIDE };
    let of = |n, service: &str| StreamRecord { credential: service.to_owned(), ..stream(n, "dev1") };
    store.create_stream(of(1, "support"), limits).await.unwrap();
    store.create_stream(of(2, "operator"), limits).await.unwrap();
    let Err(CreateError::Limit(limit)) = store.create_stream(of(3, "guest"), limits).await else {
        panic!("one too many")
    };
    assert_eq!((limit.name, limit.value), (LimitName::StreamsPerRelay, 2));
    store.advance_stream(id(1), ended(CloseReason::Idle)).await.unwrap();
    store.create_stream(of(4, "guest"), limits).await.unwrap();
}

async fn lists_are_ordered_paged_and_without_the_dead(stores: &impl Stores) {
    let [store] = stores.open(Timing::default()).await;
    let mut ids: Vec<_> = (1..=100).map(id).collect();
    for n in 1..=100 {
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

async fn handshakes_that_nobody_ends_expire(stores: &impl Stores) {
    let [store, other] = stores.open(SHORT).await;
    for n in 1..=4 {
        let expires = if n == 4 { NOW.plus(Duration::from_secs(60)) } else { NOW };
        store.create_stream(StreamRecord { expires, ..stream(n, "dev1") }, WIDE).await.unwrap();
    }
    store.advance_stream(id(2), StreamState::Joined { joined: NOW }).await.unwrap();
    store.advance_stream(id(3), StreamState::Accepted).await.unwrap();
    let expired = expire_two([&store, &other], &lease("edge-0", 1)).await;
    let mut both = [id(1), id(3)];
    both.sort();
    assert_eq!(expired.iter().map(|record| record.stream).collect::<Vec<_>>(), both, "each is given once");
    for record in expired {
        let StreamState::Ended(end) = record.state else { panic!("{record:?}") };
        assert_eq!(end.reason, CloseReason::BothLegsMissing);
    }
    eventually("an ended stream is forgotten", async || {
        store.renew(&lease("edge-0", 1)).await.unwrap();
        assert_eq!(store.expire().await.unwrap(), []);
        store.stream(id(1)).await.unwrap().is_none()
    })
    .await;
    let state =
        store.stream(id(2)).await.unwrap().expect("a joined stream is remembered while it lives").state;
    assert_eq!(state, StreamState::Joined { joined: NOW });
    assert_eq!(store.streams(None, 10).await.unwrap().len(), 2);
}

async fn leases_are_there_while_they_are_renewed(stores: &impl Stores) {
    let [store, other] = stores.open(SHORT).await;
    let late = Lease { accepts: false, load: 7, ..lease("edge-0", 2) };
    eventually("one lease ends and the other does not", async || {
        store.renew(&late).await.unwrap();
        other.leases(ServerRole::Edge).await.unwrap().alive == [late.clone()]
    })
    .await;
    store.renew(&lease("edge-1", 1)).await.unwrap();
    eventually("one lease ends and the other does not", async || {
        store.renew(&late).await.unwrap();
        other.leases(ServerRole::Edge).await.unwrap().alive == [late.clone()]
    })
    .await;
    store.renew(&late).await.unwrap();
    assert_eq!(store.leases(ServerRole::Control).await.unwrap().alive, []);
    eventually("all leases end", async || store.leases(ServerRole::Edge).await.unwrap().alive.is_empty())
        .await;
}

async fn lives_of_one_name_have_leases_of_their_own(stores: &impl Stores) {
    let [store] = stores.open(Timing::default()).await;
    let (older, newer) = (lease("edge-0", 1), lease("edge-0", 2));
    let control = Lease { role: ServerRole::Control, ..lease("control-0", 1) };
    for lease in [&older, &newer, &control] {
        store.renew(lease).await.unwrap();
    }
    assert_eq!(store.leases(ServerRole::Edge).await.unwrap().alive.len(), 2);
    // Whatever the incarnations are, and in whatever order the store keeps them.
    for latest in [&older, &newer, &older, &newer] {
        // The store's clock counts milliseconds.
        tokio::time::sleep(Duration::from_millis(2)).await;
        store.renew(latest).await.unwrap();
        assert_eq!(store.leases(ServerRole::Edge).await.unwrap().alive.last(), Some(latest));
    }
    store.withdraw(ServerRole::Edge, &older.owner).await.unwrap();
    assert_eq!(store.leases(ServerRole::Edge).await.unwrap().alive, [newer]);
    assert_eq!(store.leases(ServerRole::Control).await.unwrap().alive, [control]);
}

async fn a_missing_lease_proves_nothing_after_an_outage(stores: &impl Stores) {
    let [store, other] = stores.open(SHORT).await;
    let settled = async || other.leases(ServerRole::Edge).await.unwrap().settled;
    assert!(!settled().await, "nobody has come round yet");
    let renewed_and_settled = async || {
        store.renew(&lease("edge-0", 1)).await.unwrap();
        settled().await
    };
    assert!(!renewed_and_settled().await);
    eventually("it settles", renewed_and_settled).await;
    eventually("nobody renews", async || !settled().await).await;
    assert!(!renewed_and_settled().await, "the first one that is back does not speak for the others");
    eventually("it settles again", renewed_and_settled).await;
}

async fn streams_of_a_lost_edge_end(stores: &impl Stores) {
    let [store, other] = stores.open(SHORT).await;
    let of = |n, edge: &Lease| StreamRecord { owner: edge.owner.clone(), ..stream(n, "dev1") };
    let (lost, alive) = (lease("edge-0", 1), lease("edge-0", 2));
    assert!(!store.renew(&lost).await.unwrap().forgotten);
    for (n, edge) in [(1, &lost), (2, &lost), (3, &alive)] {
        store.create_stream(of(n, edge), WIDE).await.unwrap();
    }
    store.advance_stream(id(2), StreamState::Joined { joined: NOW }).await.unwrap();
    let over = expire_two([&store, &other], &alive).await;
    let mut both = [id(1), id(2)];
    both.sort();
    assert_eq!(over.iter().map(|record| record.stream).collect::<Vec<_>>(), both, "each is given once");
    for record in over {
        assert!(matches!(record.state, StreamState::Ended(end) if end.reason == CloseReason::EdgeLost));
    }

    // It was only cut off from the store for a while, and is asked to announce its streams again.
    assert!(store.renew(&lost).await.unwrap().forgotten);
    let joined = StreamRecord { state: StreamState::Joined { joined: NOW }, ..of(2, &lost) };
    store.restore_streams(std::slice::from_ref(&joined)).await.unwrap();
    assert_eq!(other.stream(id(2)).await.unwrap().as_ref(), Some(&joined));

    // What the edge knows of an end counts more than that it was thought lost, and comes last, although it may be overtaken.
    let closed = ended(CloseReason::ServiceClosed);
    let true_end = store.advance_stream(id(1), closed.clone()).await.unwrap();
    assert_eq!(true_end, None, "its places are free, and its end is recorded");
    store.restore_streams(&[StreamRecord { state: joined.state, ..of(1, &lost) }]).await.unwrap();
    assert_eq!(store.stream(id(1)).await.unwrap().unwrap().state, closed);
    let limits = StreamLimits { per_device: 3, per_service: 3, per_relay: 3 };
    store.create_stream(of(4, &alive), limits).await.unwrap();
}

async fn streams_are_announced_again(stores: &impl Stores) {
    let [store] = stores.open(Timing::default()).await;
    let joined = |n| StreamRecord { state: StreamState::Joined { joined: NOW }, ..stream(n, "dev1") };
    store.create_stream(stream(1, "dev1"), WIDE).await.unwrap();
    store.create_stream(stream(2, "dev1"), WIDE).await.unwrap();
    store.advance_stream(id(2), ended(CloseReason::Idle)).await.unwrap();
    for _ in 0..2 {
        store.restore_streams(&[joined(1), joined(2), joined(3)]).await.unwrap();
    }
    assert_eq!(store.stream(id(1)).await.unwrap(), Some(joined(1)), "moved on");
    assert_eq!(store.stream(id(2)).await.unwrap().unwrap().state, ended(CloseReason::Idle), "known better");
    assert_eq!(store.stream(id(3)).await.unwrap(), Some(joined(3)), "forgotten");
    assert_eq!(store.streams(None, 10).await.unwrap().len(), 2);
    let limits = StreamLimits { per_device: 3, ..WIDE };
    store.create_stream(stream(4, "dev1"), limits).await.unwrap();
    let refused = store.create_stream(stream(5, "dev1"), limits).await;
    assert!(matches!(refused, Err(CreateError::Limit(_))), "what was announced again counts once");
}

async fn the_newest_link_is_the_devices(stores: &impl Stores) {
    let [store, other] = stores.open(Timing::default()).await;
    let (device, [first, second]) = (address("dev1"), [owner("control-0", 1), owner("control-1", 2)]);
    let older = store.link_up(&device, &first).await.unwrap();
    assert_eq!(older.replaced, None);
    let newer = other.link_up(&device, &second).await.unwrap();
    assert!(newer.generation > older.generation);
    let replaced = newer.replaced.unwrap();
    assert_eq!((replaced.replica, replaced.generation), (first.clone(), older.generation));

    store.link_down(&device, &first, older.generation).await.unwrap();
    store.link_down(&device, &first, newer.generation + 9).await.unwrap();
    let link = store.link(&device).await.unwrap().unwrap();
    assert_eq!((&link.replica, link.generation), (&second, newer.generation));
    let of_stream = store.create_stream(stream(1, "dev1"), WIDE).await.unwrap();
    assert_eq!(of_stream.map(|link| link.generation), Some(newer.generation));

    other.link_down(&device, &second, newer.generation).await.unwrap();
    assert_eq!(store.link(&device).await.unwrap(), None);
    assert_eq!(store.links(None, 10).await.unwrap(), []);
    assert_eq!(store.create_stream(stream(2, "dev1"), WIDE).await.unwrap(), None);
    let newest = store.link_up(&device, &first).await.unwrap();
    assert!(newest.generation > newer.generation);
    assert_eq!(newest.replaced, None);
}

async fn who_waits_for_a_device_is_named(stores: &impl Stores) {
    let [store, other] = stores.open(Timing::default()).await;
    let (device, replica, waiter) = (address("dev1"), owner("control-0", 1), owner("control-1", 2));
    let minute = Duration::from_secs(60);
    for _ in 0..2 {
        assert_eq!(store.await_link(&device, &waiter, minute).await.unwrap(), None);
    }
    store.await_link(&device, &owner("control-2", 3), Duration::from_millis(1)).await.unwrap();
    store.await_link(&address("dev2"), &replica, minute).await.unwrap();
    eventually("a registration expires", async || {
        let up = other.link_up(&device, &replica).await.unwrap();
        up.waiting == [waiter.clone()]
    })
    .await;
    let link = store.await_link(&device, &waiter, minute).await.unwrap();
    assert_eq!(link.map(|link| link.replica), Some(replica));
}

async fn links_are_ordered_and_paged(stores: &impl Stores) {
    let [store] = stores.open(Timing::default()).await;
    let replica = owner("control-0", 1);
    let mut names: Vec<_> = (0..300).map(|n| address(&format!("dev{n}"))).collect();
    names.extend(["b", "a", "a/m", "c", "a/b"].map(address));
    for name in &names {
        store.link_up(name, &replica).await.unwrap();
    }
    names.sort();
    let (mut seen, mut after) = (Vec::new(), None);
    loop {
        let page = store.links(after.as_ref(), 70).await.unwrap();
        assert!(page.len() <= 70);
        let Some((last, _)) = page.last() else { break };
        after = Some(last.clone());
        seen.extend(page.into_iter().map(|(device, link)| {
            assert_eq!(link.replica, replica);
            device
        }));
    }
    assert_eq!(seen, names);
}

async fn links_are_announced_again(stores: &impl Stores) {
    let [store] = stores.open(Timing::default()).await;
    let (replica, other) = (owner("control-0", 1), owner("control-1", 2));
    let moved = store.link_up(&address("moved"), &replica).await.unwrap();
    store.link_up(&address("moved"), &other).await.unwrap();
    let held = |generation| LinkRecord { replica: replica.clone(), generation, since: NOW };
    let ahead = moved.generation + 1_000_000;
    let links = [(address("moved"), held(moved.generation)), (address("forgotten"), held(ahead))];
    for _ in 0..2 {
        assert_eq!(store.restore_links(&links).await.unwrap(), [address("moved")]);
    }
    assert_eq!(store.link(&address("moved")).await.unwrap().map(|link| link.replica), Some(other));
    assert_eq!(store.link(&address("forgotten")).await.unwrap(), Some(held(ahead)));
    assert_eq!(store.links(None, 10).await.unwrap().len(), 2);
    // Also over a store whose clock is behind.
    assert!(store.link_up(&address("forgotten"), &replica).await.unwrap().generation > ahead);
}

async fn links_are_announced_late(stores: &impl Stores) {
    let [store] = stores.open(Timing::default()).await;
    let (device, [first, second]) = (address("dev1"), [owner("control-0", 1), owner("control-1", 2)]);
    let late = async |replica, assumed| store.link_up_late(&device, replica, assumed).await.unwrap();
    let older = late(&first, 1).await.unwrap();
    assert_eq!(older.replaced, None);
    assert!(older.generation > 1_000_000, "it is the store that gives generations");
    assert_eq!(late(&second, older.generation - 1).await, None, "the other replica's link is newer");
    let newer = late(&second, older.generation).await.unwrap();
    assert_eq!(
        newer.replaced.map(|link| (link.replica, link.generation)),
        Some((first.clone(), older.generation))
    );
    // One whose announcement was not answered may stand in its own way.
    let again = late(&second, 1).await.unwrap();
    assert!(again.generation > newer.generation);
    assert_eq!(store.link(&device).await.unwrap().unwrap().generation, again.generation);
    assert_eq!(store.links(None, 10).await.unwrap().len(), 1);
    store.link_down(&device, &second, again.generation + 9).await.unwrap();
    assert!(late(&owner("control-2", 3), 1).await.is_some(), "nobody holds a link");
}

async fn links_of_a_lost_replica_go(stores: &impl Stores) {
    let [store] = stores.open(SHORT).await;
    let control = |name, n| Lease { role: ServerRole::Control, ..lease(name, n) };
    let (lost, alive) = (control("control-0", 1), control("control-1", 2));
    for (device, lease) in [("dev1", &lost), ("dev2", &alive), ("dev3", &lost)] {
        store.link_up(&address(device), &lease.owner).await.unwrap();
    }
    store.link_up(&address("dev3"), &alive.owner).await.unwrap();
    let left = until("the links of the lost replica go", async || {
        store.renew(&alive).await.unwrap();
        store.expire().await.unwrap();
        let links = store.links(None, 10).await.unwrap();
        (links.len() < 3).then_some(links)
    })
    .await;
    assert_eq!(left.iter().map(|(device, _)| device.to_string()).collect::<Vec<_>>(), ["dev2", "dev3"]);
    assert_eq!(store.link(&address("dev1")).await.unwrap(), None);
}

async fn a_thousand_at_once_keep_the_limit(stores: &impl Stores) {
    let [store, other] = stores.open(Timing::default()).await;
    let limits = StreamLimits { per_device: 100, ..WIDE };
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..1000 {
        let store = Arc::clone(if n % 2 == 0 { &store } else { &other });
        tasks.spawn(async move { store.create_stream(stream(n, "dev1"), limits).await.is_ok() });
    }
    let created = tasks.join_all().await.into_iter().filter(|created| *created).count();
    assert_eq!(created, 100);
}

/// A stream from its beginning to its end.
async fn a_life(store: &dyn Rendezvous, n: u128) {
    store.create_stream(stream(n, "dev1"), WIDE).await.unwrap();
    store.advance_stream(id(n), StreamState::Joined { joined: NOW }).await.unwrap();
    store.advance_stream(id(n), ended(CloseReason::ServiceClosed)).await.unwrap();
}

/// Lets two processes end what is to be ended, until two streams are, and gives them in the order of their ids.
async fn expire_two(stores: [&Arc<dyn Rendezvous>; 2], alive: &Lease) -> Vec<StreamRecord> {
    within("two streams end", async {
        let mut ended = Vec::new();
        while ended.len() < 2 {
            for store in stores {
                store.renew(alive).await.unwrap();
                ended.extend(store.expire().await.unwrap());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        ended.sort_by_key(|record: &StreamRecord| record.stream);
        ended
    })
    .await
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

fn lease(name: &str, n: u128) -> Lease {
    Lease { role: ServerRole::Edge, owner: owner(name, n), accepts: true, load: 0, passed: None }
}

fn owner(name: &str, n: u128) -> Owner {
    Owner { name: name.to_owned(), incarnation: Incarnation::from_random(n), address: "h:1".to_owned() }
}

fn stream(n: u128, device: &str) -> StreamRecord {
    StreamRecord {
        version: record::VERSION,
        stream: id(n),
        address: address(device),
        name: "ssh".parse().unwrap(),
        credential: "support".to_owned(),
        owner: owner("edge-0", 1),
        created: NOW,
        expires: NOW.plus(Duration::from_secs(60)),
        state: StreamState::Requested,
    }
}

struct Memory;

impl Stores for Memory {
    async fn open<const N: usize>(&self, timing: Timing) -> [Arc<dyn Rendezvous>; N] {
        let store = Arc::new(MemoryRendezvous::new(timing));
        std::array::from_fn(|_| Arc::clone(&store) as _)
    }
}

/// What the simulation goes by, on the clock of the wall.
struct Simulated;

impl Stores for Simulated {
    async fn open<const N: usize>(&self, timing: Timing) -> [Arc<dyn Rendezvous>; N] {
        let now = || Moment { now: clock::now(), unix_milliseconds: clock::unix_milliseconds() };
        let store = SimStore::new(timing, now);
        std::array::from_fn(|_| store.client() as _)
    }
}

macro_rules! suite {
    ($module:ident, $stores:expr, $rules:tt) => {
        mod $module {
            use super::*;

            suite!(@rules $stores, $rules);
        }
    };
    (@rules $stores:expr, [$($rule:ident),* $(,)?]) => {
        $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $rule() {
            super::$rule(&$stores).await;
        })*
    };
}

macro_rules! suites {
    ({ $($module:ident: $stores:expr),* $(,)? } $rules:tt) => {
        $(suite!($module, $stores, $rules);)*
    };
}

suites! {
    {
        memory: Memory,
        simulated: Simulated,
        single: Single,
        tls: Tls,
        sentinel: Behind,
        cluster: Cluster,
    }
    [
        streams_move_forward_only,
        the_first_end_stands_and_is_told_once,
        limits_are_exact_and_free_up,
        all_services_share_the_limit_of_the_relay,
        lists_are_ordered_paged_and_without_the_dead,
        handshakes_that_nobody_ends_expire,
        leases_are_there_while_they_are_renewed,
        lives_of_one_name_have_leases_of_their_own,
        a_missing_lease_proves_nothing_after_an_outage,
        streams_of_a_lost_edge_end,
        streams_are_announced_again,
        the_newest_link_is_the_devices,
        who_waits_for_a_device_is_named,
        links_are_ordered_and_paged,
        links_are_announced_again,
        links_are_announced_late,
        links_of_a_lost_replica_go,
        a_thousand_at_once_keep_the_limit,
    ]
}
