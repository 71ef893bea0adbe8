//! What becomes of a shared store when its server fails, and of what the processes hold.

use std::time::Duration;

use midspan_core::{
    close::CloseReason,
    record::{StreamEnd, StreamState},
};
use midspan_platform::rendezvous::{
    CreateError, Lease, LinkRecord, Rendezvous, ServerRole, StoreFailure, StreamLimits, Timing,
};
use testkit::{RedisCluster, RedisSentinels, RedisServer, eventually, until};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::mpsc,
    task::JoinSet,
    time::Instant,
};

use super::{
    NOW, WIDE, address, id, lease, owner,
    redis::{View, arguments},
    stream,
};

/// One process with a stream and a link, and the store that it told of them.
struct Holder {
    view: View,
    lease: Lease,
    link: LinkRecord,
}

impl Holder {
    async fn start(arguments: &[String]) -> Self {
        let view = View::open(arguments, Timing::default());
        let lease = lease("edge-0", 1);
        view.store.renew(&lease).await.unwrap();
        view.store.create_stream(stream(1, "dev1"), WIDE).await.unwrap();
        let replica = owner("control-0", 2);
        let up = view.store.link_up(&address("dev1"), &replica).await.unwrap();
        let link = view.store.link(&address("dev1")).await.unwrap().unwrap();
        assert_eq!(link.generation, up.generation);
        assert!(!view.store.renew(&lease).await.unwrap().forgotten, "nothing has happened yet");
        Self { view, lease, link }
    }

    /// Renews until the store says that it has forgotten, announces everything again, and finds it there.
    async fn recover(&self) {
        let store = &self.view.store;
        until("the store has forgotten", async || {
            store.renew(&self.lease).await.ok().filter(|renewal| renewal.forgotten)
        })
        .await;
        let joined = super::StreamRecord { state: StreamState::Joined { joined: NOW }, ..stream(1, "dev1") };
        eventually("everything is announced", async || {
            store.restore_streams(std::slice::from_ref(&joined)).await.is_ok()
                && store.restore_links(&[(address("dev1"), self.link.clone())]).await.is_ok()
        })
        .await;
        assert_eq!(store.stream(id(1)).await.unwrap(), Some(joined));
        assert_eq!(store.link(&address("dev1")).await.unwrap().as_ref(), Some(&self.link));
        assert_eq!(store.streams(None, 10).await.unwrap().len(), 1);
        assert_eq!(store.links(None, 10).await.unwrap().len(), 1);
        // The servers of a Cluster may come back one after the other.
        eventually("it is said no more", async || {
            store.renew(&self.lease).await.is_ok_and(|renewal| !renewal.forgotten)
        })
        .await;
    }

    async fn failure(&self) -> StoreFailure {
        let store = &self.view.store;
        until("the store fails", async || store.stream(id(1)).await.err()).await.failure
    }
}

/// Arguments of a process that waits for 300 ms.
fn impatient(url: &str) -> Vec<String> {
    let words = arguments(&format!("--redis-url {url}"));
    words.into_iter().map(|word| if word == "5s" { "300ms".to_owned() } else { word }).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_was_killed_comes_back_empty() {
    let mut server = RedisServer::start(&[]);
    let holder = Holder::start(&arguments(&format!("--redis-url {}", server.url()))).await;
    server.kill();
    assert_eq!(holder.failure().await, StoreFailure::Unreachable);
    server.restart();
    holder.recover().await;
    let store = &holder.view.store;
    assert!(!store.leases(ServerRole::Edge).await.unwrap().settled, "the others have not come round yet");
    let newer = store.link_up(&address("dev1"), &holder.link.replica).await.unwrap();
    assert!(newer.generation > holder.link.generation);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_was_emptied_is_noticed() {
    let server = RedisServer::start(&[]);
    let holder = Holder::start(&arguments(&format!("--redis-url {}", server.url()))).await;
    server.command(&["FLUSHALL"]);
    holder.recover().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shard_that_was_emptied_is_noticed() {
    let cluster = RedisCluster::start();
    let holder = Holder::start(&arguments(&format!("--redis-cluster --redis-url {}", cluster.urls()))).await;
    for server in &cluster.servers {
        server.command(&["FLUSHALL"]);
        holder.recover().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shard_that_was_killed_comes_back_empty() {
    let mut cluster = RedisCluster::start();
    let holder = Holder::start(&arguments(&format!("--redis-cluster --redis-url {}", cluster.urls()))).await;
    cluster.servers[0].kill();
    cluster.servers[0].restart();
    holder.recover().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_stands_still_is_not_waited_for() {
    let server = RedisServer::start(&[]);
    let holder = Holder::start(&impatient(&server.url())).await;
    server.pause();
    assert_eq!(holder.failure().await, StoreFailure::TimedOut);
    // A thousand at once fail together, not one after the other.
    let store = &holder.view.store;
    let calls = (0..1000).map(|_| store.stream(id(1)));
    assert!(futures_util::future::join_all(calls).await.iter().all(Result::is_err));
    // An end that nobody could hear of is told later.
    let end = super::ended(CloseReason::ServiceClosed);
    assert!(store.advance_stream(id(1), end.clone()).await.is_err());
    server.resume();
    eventually("the end is told", async || {
        store.stream(id(1)).await.is_ok_and(|found| found.unwrap().state == end)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deletion_that_is_told_late_is_given_once_to_be_recorded() {
    let server = RedisServer::start(&[]);
    let holder = Holder::start(&impatient(&server.url())).await;
    let store = &holder.view.store;
    store.create_stream(stream(2, "dev1"), WIDE).await.unwrap();
    server.pause();
    assert_eq!(holder.failure().await, StoreFailure::TimedOut);
    let end = |reason| StreamEnd::unused(reason, NOW);
    assert!(store.delete_stream(id(1), end(CloseReason::Deleted)).await.is_err());
    // Who ends this one has recorded it.
    let idle = StreamState::Ended(end(CloseReason::Idle));
    assert!(store.advance_stream(id(2), idle).await.is_err());
    server.resume();
    let late =
        until("the deletion is given", async || store.expire().await.ok().filter(|ended| !ended.is_empty()))
            .await;
    assert_eq!(late.iter().map(|record| record.stream).collect::<Vec<_>>(), [id(1)]);
    assert_eq!(late[0].state, StreamState::Ended(end(CloseReason::Deleted)));
    eventually("both ends are told", async || {
        store.streams(None, 10).await.is_ok_and(|streams| streams.is_empty())
    })
    .await;
    assert_eq!(store.expire().await.unwrap(), []);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_server_is_good_enough() {
    let server = RedisServer::start(&[]);
    let (port, _proxy) = delayed(server.port(), Duration::from_millis(200)).await;
    let words = arguments(&format!("--redis-url redis://127.0.0.1:{port}"));
    let words: Vec<_> =
        words.into_iter().map(|word| if word == "5s" { "1s".to_owned() } else { word }).collect();
    let holder = Holder::start(&words).await;
    let store = &holder.view.store;
    super::a_life(&**store, 2).await;
    assert_eq!(store.streams(None, 10).await.unwrap().len(), 1);
    assert_eq!(store.links(None, 10).await.unwrap().len(), 1);
    assert_eq!(store.expire().await.unwrap(), []);
    assert_eq!(store.leases(ServerRole::Edge).await.unwrap().alive.len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shard_that_fails_over_is_noticed() {
    let cluster = RedisCluster::start();
    let holder = Holder::start(&arguments(&format!("--redis-cluster --redis-url {}", cluster.urls()))).await;
    // What every failover does, and nothing else.
    assert!(cluster.servers[1].command(&["CLUSTER", "BUMPEPOCH"]).starts_with("BUMPED"));
    holder.recover().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn records_of_a_newer_release_are_read_as_far_as_they_can_be() {
    let server = RedisServer::start(&[]);
    let holder = Holder::start(&arguments(&format!("--redis-url {}", server.url()))).await;
    let store = &holder.view.store;
    let key = server.command(&["KEYS", "*:stream:*"]);
    let record = server.command(&["HGET", &key, "record"]);
    let newer = record.replacen('{', r#"{"colour":"green","#, 1).replace(r#""version":1"#, r#""version":2"#);
    server.command(&["HSET", &key, "record", &newer]);
    assert_eq!(store.stream(id(1)).await.unwrap().map(|record| record.version), Some(2));
    server.command(&["HSET", &key, "state", r#"{"state":"dreaming"}"#]);
    store.create_stream(stream(2, "dev1"), WIDE).await.unwrap();
    let listed = store.streams(None, 10).await.unwrap();
    assert_eq!(listed.iter().map(|record| record.stream).collect::<Vec<_>>(), [id(2)]);
    let metrics = testkit::Metrics::parse(&holder.view.metrics.render());
    assert_eq!(metrics.count("midspan_store_unreadable_records_total", &[]), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failover_by_sentinel_is_followed_and_noticed() {
    let servers = RedisSentinels::start();
    let words = format!("--redis-sentinel-master midspan --redis-url {}", servers.urls());
    let holder = Holder::start(&arguments(&words)).await;
    servers.fail_over();
    holder.recover().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_master_that_dies_is_replaced() {
    let mut servers = RedisSentinels::start();
    let words = format!("--redis-sentinel-master midspan --redis-url {}", servers.urls());
    let holder = Holder::start(&arguments(&words)).await;
    servers.servers[0].kill();
    holder.recover().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_master_that_slept_through_its_replacement_is_not_believed() {
    let servers = RedisSentinels::start();
    let words = format!("--redis-sentinel-master midspan --redis-url {}", servers.urls());
    let words = arguments(&words).into_iter().map(|word| if word == "5s" { "1s".to_owned() } else { word });
    let holder = Holder::start(&words.collect::<Vec<_>>()).await;
    servers.servers[0].pause();
    holder.recover().await;
    servers.servers[0].resume();
    holder.view.store.create_stream(stream(2, "dev2"), WIDE).await.unwrap();
    let key = format!("*:stream:{}", id(2));
    assert_ne!(servers.servers[1].command(&["KEYS", &key]), "");
    assert_eq!(servers.servers[0].command(&["KEYS", &key]), "");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_takes_no_writes_is_told_apart() {
    let server = RedisServer::start(&[]);
    let holder = Holder::start(&arguments(&format!("--redis-url {}", server.url()))).await;
    let store = &holder.view.store;
    // A replica of a server that is not there.
    server.command(&["REPLICAOF", "127.0.0.1", "1"]);
    let failed = until("a write fails", async || store.renew(&holder.lease).await.err()).await;
    assert_eq!(failed.failure, StoreFailure::ReadOnly, "{failed}");
    server.command(&["REPLICAOF", "NO", "ONE"]);
    eventually("it takes writes again", async || store.renew(&holder.lease).await.is_ok()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_server_is_told_apart_and_stays_connected() {
    let server = RedisServer::start(&[]);
    let holder = Holder::start(&arguments(&format!("--redis-url {}", server.url()))).await;
    let store = &holder.view.store;
    let create = async |n| store.create_stream(stream(n, "dev2"), WIDE).await;
    server.command(&["CONFIG", "SET", "maxmemory", "1"]);
    let connections = || -> u64 {
        let answer = server.command(&["INFO", "stats"]);
        let count = answer.lines().find_map(|line| line.strip_prefix("total_connections_received:"));
        count.unwrap().parse().unwrap()
    };
    let failed = create(2).await.unwrap_err();
    let CreateError::Store(failed) = failed else { panic!("{failed}") };
    assert_eq!(failed.failure, StoreFailure::Full, "{failed}");
    assert!(store.stream(id(1)).await.unwrap().is_some(), "what is there can be read");
    let before = connections();
    assert!(create(3).await.is_err());
    assert_eq!(connections(), before + 1, "the question is a connection, and there is no other");
    server.command(&["CONFIG", "SET", "maxmemory", "0"]);
    create(4).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_password_is_told_and_tried_again() {
    let server = RedisServer::start(&["--requirepass", "right"]);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("password");
    std::fs::write(&file, "wrong").unwrap();
    let words = format!("--redis-url {} --redis-password-file {}", server.url(), file.display());
    let view = View::open(&arguments(&words), Timing::default());
    let failed = view.store.stream(id(1)).await.unwrap_err();
    assert_eq!(failed.failure, StoreFailure::Refused, "{failed}");
    assert!(!failed.to_string().contains("wrong "), "{failed}");
    std::fs::write(&file, "right\n").unwrap();
    eventually("the file is read again", async || view.store.stream(id(1)).await.is_ok()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_place_that_nobody_freed_is_free_when_it_is_needed() {
    let server = RedisServer::start(&[]);
    let view = View::open(&impatient(&server.url()), Timing::default());
    let limits = StreamLimits { per_device: 1, per_service: 1, per_relay: 1 };
    view.store.create_stream(stream(1, "dev1"), limits).await.unwrap();
    // The process that recorded the end died before it freed the place of the device and the slot of the service.
    let record = server.command(&["KEYS", "*:stream:*"]);
    assert_eq!(server.command(&["DEL", &record]), "1");
    let count = server.command(&["KEYS", "*:services"]);
    assert_eq!(server.command(&["DEL", &count]), "1");
    eventually("the place is free", async || {
        view.store.create_stream(stream(2, "dev1"), limits).await.is_ok()
    })
    .await;
    let refused = view.store.create_stream(stream(3, "dev1"), limits).await;
    assert!(matches!(refused, Err(CreateError::Limit(_))), "a place that is taken stays so: {refused:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slots_of_a_service_come_back_from_a_process_that_is_gone() {
    let server = RedisServer::start(&[]);
    let arguments = arguments(&format!("--redis-url {}", server.url()));
    let timing = Timing { lease: Duration::from_millis(500), ..Timing::default() };
    // A process takes 10 slots at a time, and this one uses one of them.
    let limits = StreamLimits { per_service: 640, ..WIDE };
    let words = arguments.clone();
    // With its runtime, all of it ends at once, and nothing more is told.
    let killed = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let create =
            async { View::open(&words, timing).store.create_stream(stream(1, "dev1"), limits).await.is_ok() };
        runtime.block_on(create)
    });
    assert!(killed.join().unwrap());
    let left = View::open(&arguments, timing);
    for n in 2..=640 {
        until("there is a slot", async || left.store.create_stream(stream(n, "dev1"), limits).await.ok())
            .await;
    }
    let refused = left.store.create_stream(stream(641, "dev1"), limits).await;
    assert!(matches!(refused, Err(CreateError::Limit(_))), "{refused:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn limits_hold_over_a_store_that_came_back_empty() {
    let server = RedisServer::start(&[]);
    let arguments = arguments(&format!("--redis-url {}", server.url()));
    let [holder, other, third] = [(); 3].map(|()| View::open(&arguments, Timing::default()));
    holder.store.create_stream(stream(1, "dev1"), WIDE).await.unwrap();
    server.command(&["FLUSHALL"]);
    holder.store.restore_streams(&[stream(1, "dev1")]).await.unwrap();
    for (view, per_device, per_service) in [(&other, 1, 1000), (&third, 1000, 1)] {
        let limits = StreamLimits { per_device, per_service, ..WIDE };
        let refused = view.store.create_stream(stream(2, "dev1"), limits).await;
        assert!(matches!(refused, Err(CreateError::Limit(_))), "{limits:?}: {refused:?}");
    }
    other.store.create_stream(stream(3, "dev1"), WIDE).await.unwrap();
}

/// A port that leads to another one, and gives its answers back after `delay`, for as long as the set is kept.
async fn delayed(port: u16, delay: Duration) -> (u16, JoinSet<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let mut proxy = JoinSet::new();
    proxy.spawn(async move {
        let mut connections = JoinSet::new();
        while let Ok((near, _)) = listener.accept().await {
            connections.spawn(async move {
                let far = TcpStream::connect(("127.0.0.1", port)).await?;
                let ((mut near_read, mut near_write), (mut far_read, mut far_write)) =
                    (near.into_split(), far.into_split());
                let (sender, mut late) = mpsc::channel(1000);
                let answers = async move {
                    loop {
                        let mut bytes = vec![0; 65536];
                        let length = far_read.read(&mut bytes).await?;
                        bytes.truncate(length);
                        if length == 0 || sender.send((Instant::now() + delay, bytes)).await.is_err() {
                            return Ok(());
                        }
                    }
                };
                let give_back = async move {
                    while let Some((at, bytes)) = late.recv().await {
                        tokio::time::sleep_until(at).await;
                        near_write.write_all(&bytes).await?;
                    }
                    Ok(())
                };
                tokio::try_join!(tokio::io::copy(&mut near_read, &mut far_write), answers, give_back)
                    .map(drop)
            });
        }
    });
    (address.port(), proxy)
}
