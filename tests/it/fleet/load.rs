//! Three control replicas and four edges with many streams, while processes die and are restarted.
//!
//! `MIDSPAN_FLEET_STREAMS` says how many; a small machine without optimisation can do some hundreds beside other tests.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    hash::{BuildHasher as _, RandomState},
    sync::Arc,
    time::Duration,
};

use midspan_core::{id::StreamId, placement::owner_of};
use serde_json::Value;
use testkit::{
    Devices, End, Entrances, Failure, Fleet, Member, Random, Rolled, Seen, Session, eventually, need_files,
    within,
};
use tokio::{
    sync::watch,
    task::JoinSet,
    time::{Instant, interval, sleep},
};

use crate::soak::setting;

const CONTROLS: usize = 3;
const EDGES: usize = 4;
const DEVICES: usize = 60;

/// How many streams are opened at the same time.
const OPENERS: usize = 16;

const LONGEST_MESSAGE: usize = 16 * 1024;

/// The longest pause between two messages.
const PAUSE: Duration = Duration::from_secs(1);

#[tokio::test(flavor = "multi_thread")]
async fn all_streams_join_wherever_they_come_in_and_hashing_says_how_many_legs_are_forwarded() {
    let count = streams();
    let (fleet, crowd) = start(&[], count).await;
    let begun = Instant::now();
    let sessions = crowd.open(count).await;
    let opened = begun.elapsed();

    let sum = async |name: &str, labels: &[(&str, &str)]| {
        let mut sum = 0;
        for edge in &fleet.edges {
            sum += edge.metrics().await.count(name, labels);
        }
        usize::try_from(sum).unwrap()
    };
    eventually("all streams are joined", || async {
        sum("midspan_edge_streams", &[("state", "joined")]).await == count
    })
    .await;
    let forwarded = sum("midspan_edge_forwarded_legs", &[]).await;

    let mut talks = JoinSet::new();
    for mut session in sessions {
        let mut random = crowd.random();
        talks.spawn(async move {
            for _ in 0..3 {
                session.talk(random.length(LONGEST_MESSAGE)).await.unwrap();
            }
            session.close().await
        });
    }
    let streams = crowd.both(talks.join_all().await).await;
    let names: Vec<_> = fleet.edges.iter().map(|edge| &edge.name).collect();
    let mut owned = [0; EDGES];
    let mut elsewhere = 0;
    for stream in &streams {
        stream.went_well();
        assert_eq!(owner_of(stream.id(), &names), Some(stream.owner()));
        owned[stream.owner()] += 1;
        elsewhere += stream.entries().into_iter().filter(|&edge| edge != stream.owner()).count();
    }
    let bytes: usize = streams.iter().map(|stream| stream.service.bytes + stream.device.bytes).sum();
    println!(
        "{count} streams joined in {opened:?}, {bytes} bytes, {forwarded} of {} legs forwarded, owners {owned:?}",
        2 * count
    );
    assert_eq!(streams.len(), count);
    assert_eq!(forwarded, elsewhere, "a leg is passed on when it comes in at another edge than the owner");
    assert_share("legs that were forwarded", forwarded, 2 * count, [EDGES - 1, EDGES]);
    for streams in owned {
        assert_share("streams of an edge", streams, count, [1, EDGES]);
    }
    assert_eq!(crowd.devices.refused_legs(), [""; 0]);
    eventually("nothing is left", || async { sum("midspan_edge_legs", &[]).await == 0 }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_edge_costs_the_streams_that_it_owned_or_forwarded_and_no_other() {
    let count = streams() / 2;
    let (mut fleet, crowd) = start(&["--drain-grace", "1s"], count).await;
    let held = crowd.hold(count).await;
    fleet.edges[0].kill();
    let killed = Instant::now();
    let tries = crowd.start_anew(count / 4, Failure::may_retry).await;
    println!("{} new streams within {:?}, tries each: {tries:?}", count / 4, killed.elapsed());

    let streams = crowd.both(held.end().await).await;
    let mut expected = HashMap::new();
    let mut touched = [0, 0];
    for stream in &streams {
        let [service, device] = stream.entries();
        let reasons: &[&str] = match (stream.owner() == 0, service == 0, device == 0) {
            (true, _, _) => &["edge_lost"],
            (false, true, true) => &["service_lost", "device_lost"],
            (false, true, false) => &["service_lost"],
            (false, false, true) => &["device_lost"],
            (false, false, false) => &["service_closed"],
        };
        if reasons == ["service_closed"] {
            stream.went_well();
        } else {
            touched[usize::from(stream.owner() != 0)] += 1;
            let lost = [(&stream.service, "device_lost: "), (&stream.device, "service_lost: ")];
            for (seen, other) in lost {
                // Only an owner that lives can say what happened to the other leg.
                let told = matches!(&seen.end, End::Closed(1011, text) if text.starts_with(other));
                let cut = seen.edge == 0 || stream.owner() == 0;
                assert!(if cut { seen.end == End::Lost } else { told }, "{stream:?}");
            }
        }
        expected.insert(stream.id().to_string(), reasons);
    }
    println!("{count} streams; the edge owned {}, and forwarded for {} more", touched[0], touched[1]);
    assert!(touched.iter().all(|&some| some > 0), "{touched:?}");
    eventually("each end is recorded", || async {
        let ends = recorded_ends(&fleet);
        expected.keys().all(|stream| ends.contains_key(stream))
    })
    .await;
    // Whoever looks for late streams has looked, and written down what there was.
    fleet.controls.iter().for_each(Member::terminate);
    for control in &mut fleet.controls {
        control.wait_exit().await;
    }
    let ends = recorded_ends(&fleet);
    for (stream, reasons) in expected {
        let told = &ends[&stream];
        assert!(
            told.len() == 1 && reasons.contains(&told[0].as_str()),
            "{stream}: {told:?}, not {reasons:?}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_devices_of_a_killed_control_replica_come_back_and_no_stream_is_touched() {
    let count = streams() / 2;
    let (mut fleet, crowd) = start(&[], count).await;
    let held = crowd.hold(count).await;
    let cut = crowd.devices.linked_to(1);
    assert!(!cut.is_empty());
    fleet.controls[1].kill();
    let killed = Instant::now();
    // Who asked the dead replica has no answer, and asks another one.
    let may_retry = |failure: &Failure| failure.may_retry() || matches!(failure, Failure::Broken(_));
    let back = async {
        eventually("the links are cut", || async { crowd.devices.linked_to(1).is_empty() }).await;
        crowd.devices.all_linked().await;
        for (number, control) in cut.iter().zip([0, 2].into_iter().cycle()) {
            let path = format!("/v1/devices/{}", Devices::name(*number));
            eventually("a device is back", || async {
                let answer = fleet.service(control).get(&path).await;
                answer.status == 200 && answer.json()["connected"] == true
            })
            .await;
        }
        killed.elapsed()
    };
    let (back, tries) =
        tokio::join!(within("all devices are back", back), crowd.start_anew(count / 4, may_retry));
    println!(
        "{} of {DEVICES} devices were cut off, and back in {back:?}; {} new streams, tries each: {tries:?}",
        cut.len(),
        count / 4
    );
    for stream in crowd.both(held.end().await).await {
        stream.went_well();
    }
    assert_eq!(crowd.devices.refused_legs(), [""; 0]);
}

/// What a roll in this test gives streams: the time in which balancers look elsewhere, and the time to end by themselves.
const DELAY: Duration = Duration::from_secs(1);
const GRACE: Duration = Duration::from_secs(3);

/// How long each stream of the constant load echoes.
const ECHO: Duration = Duration::from_secs(2);

#[tokio::test(flavor = "multi_thread")]
async fn a_roll_of_every_process_fails_no_initiation_and_cuts_only_what_outlasts_the_grace() {
    let each_second = u32::try_from(streams() / 40).unwrap();
    let spanning = streams() / 10;
    let (mut fleet, crowd) = start(&["--drain-delay", "1s", "--drain-grace", "3s"], 8 * spanning).await;
    let (rolling, rolled) = watch::channel(true);

    let mut long = JoinSet::new();
    for _ in 0..spanning {
        long.spawn(crowd.client().follow(rolled.clone(), crowd.random()));
    }
    let (client, random) = (crowd.client(), crowd.random());
    let mut constant = JoinSet::new();
    constant.spawn(client.constant(each_second, rolled, random));

    let mut rolls: BTreeMap<String, Rolled> = BTreeMap::new();
    for member in fleet.controls.iter_mut().chain(&mut fleet.edges) {
        let roll = member.roll().await;
        println!("{} rolled in {:?}", member.name, roll.back - roll.told);
        rolls.insert(member.name.clone(), roll);
    }
    rolling.send(false).unwrap();
    let short = constant.join_next().await.unwrap().unwrap();
    let mut tally = Tally::default();
    for streams in long.join_all().await {
        tally.add(streams);
    }
    let reopened = tally.streams.len() - spanning;
    let [failed, retried] = [(&short.failed, &tally.failed), (&short.retries, &tally.retries)]
        .map(|(short, long)| [&short[..], long].concat());
    println!(
        "{} short streams; {spanning} long ones, {reopened} times anew; {} retries: {:?}; {} failed",
        short.streams.len(),
        retried.len(),
        BTreeSet::from_iter(&retried),
        failed.len(),
    );
    let refused = crowd.devices.refused_legs();
    println!("{} legs of devices were refused: {:?}", refused.len(), BTreeSet::from_iter(&refused));
    assert!(failed.is_empty(), "{failed:?}");

    let mut cut = [0, 0];
    let (short, long) = (short.streams, tally.streams);
    for (kind, opened) in [short, long].into_iter().enumerate() {
        let begun: HashMap<_, _> = opened.iter().map(|(begun, seen)| (seen.stream, *begun)).collect();
        for stream in crowd.both(opened.into_iter().map(|(_, seen)| seen).collect()).await {
            if matches!(stream.service.end, End::Closed(1000, _)) {
                stream.went_well();
                continue;
            }
            cut[kind] += 1;
            let [service, device] = stream.entries();
            let on_its_way = [stream.owner(), service, device].map(|edge| rolls[&format!("edge-{edge}")]);
            for seen in [&stream.service, &stream.device] {
                assert!(
                    matches!(&seen.end, End::Closed(1012, text) if text.starts_with("draining: ")),
                    "{stream:?}"
                );
                let due =
                    |roll: &Rolled| roll.back >= begun[&seen.stream] && seen.at >= roll.told + DELAY + GRACE;
                assert!(on_its_way.iter().any(due), "cut, and nobody was due: {stream:?}, {rolls:?}");
            }
        }
    }
    println!("cut with 1012 after the grace: {} of the short ones, {} of the long ones", cut[0], cut[1]);
    assert!(cut[1] >= spanning, "each edge was restarted, and with it the owner of each long stream");
}

/// The reasons in the records of ends, by stream.
fn recorded_ends(fleet: &Fleet) -> HashMap<String, Vec<String>> {
    let mut ends: HashMap<_, Vec<_>> = HashMap::new();
    for record in fleet.activity().iter().filter(|record| record["operationName"] == "end") {
        let properties: Value = serde_json::from_str(record["properties"].as_str().unwrap()).unwrap();
        let stream = properties["streamId"].as_str().unwrap().to_owned();
        ends.entry(stream).or_default().push(record["resultType"].as_str().unwrap().to_owned());
    }
    ends
}

/// How many streams the tests open.
fn streams() -> usize {
    setting("MIDSPAN_FLEET_STREAMS").map_or(300, |streams| usize::try_from(streams).unwrap())
}

/// A fleet and its clients, with room for `streams` at a time.
async fn start(arguments: &[&str], streams: usize) -> (Fleet, Crowd) {
    need_files(1000 + 3 * streams);
    let seed = RandomState::new().hash_one("fleet");
    let fleet = Fleet::with(CONTROLS, EDGES, arguments).await;
    let devices = Arc::new(Devices::start(&fleet, DEVICES, seed).await);
    let client = Client { entrances: fleet.entrances(), devices: Arc::clone(&devices) };
    (fleet, Crowd { client, devices, random: Random::new(seed ^ 1).into() })
}

/// Checks that `part` of `whole` is what chance makes of `share`, five standard deviations either way.
fn assert_share(what: &str, part: usize, whole: usize, share: [usize; 2]) {
    let [part, whole, of, all] =
        [part, whole, share[0], share[1]].map(|n| f64::from(u32::try_from(n).unwrap()));
    let share = of / all;
    let deviation = (whole * share * (1.0 - share)).sqrt();
    assert!((part - whole * share).abs() <= 5.0 * deviation, "{what}: {part} of {whole}, not {share}");
}

/// Services and devices.
struct Crowd {
    client: Client,
    devices: Arc<Devices>,
    random: std::sync::Mutex<Random>,
}

/// Streams that carry messages until they are told to end.
struct Held {
    streams: JoinSet<Seen>,
    on: watch::Sender<bool>,
}

/// A stream as both of its ends have seen it.
#[derive(Debug)]
struct Stream {
    service: Seen,
    device: Seen,
}

/// What became of many streams, one after the other.
#[derive(Debug, Default)]
struct Tally {
    /// When each was asked for, and what the service has seen of it.
    streams: Vec<(Instant, Seen)>,
    /// Why a service had to ask once more.
    retries: Vec<String>,
    /// Why it got no stream in the end.
    failed: Vec<String>,
}

/// A service.
#[derive(Debug, Clone)]
struct Client {
    entrances: Arc<Entrances>,
    devices: Arc<Devices>,
}

impl Crowd {
    fn random(&self) -> Random {
        Random::new(self.random.lock().unwrap().number())
    }

    fn client(&self) -> Client {
        self.client.clone()
    }

    /// Opens streams, some at a time; each must come about at once.
    async fn open(&self, count: usize) -> Vec<Session> {
        let mut openers = JoinSet::new();
        for opener in 0..OPENERS {
            let (client, mut random) = (self.client(), self.random());
            let share = (count + opener) / OPENERS;
            openers.spawn(async move {
                let mut sessions = Vec::new();
                for _ in 0..share {
                    let device = client.devices.any(&mut random);
                    sessions.push(client.entrances.open(&device, &mut random).await.unwrap());
                }
                sessions
            });
        }
        openers.join_all().await.into_iter().flatten().collect()
    }

    /// Opens streams, and lets them carry messages.
    async fn hold(&self, count: usize) -> Held {
        let (on, go_on) = watch::channel(true);
        let mut streams = JoinSet::new();
        for mut session in self.open(count).await {
            let (go_on, random) = (go_on.clone(), self.random());
            // From here on, both legs are there.
            session.talk(1).await.unwrap();
            streams.spawn(keep_talking(session, random, move || *go_on.borrow()));
        }
        Held { streams, on }
    }

    /// Opens streams until each has come about and carried a message; counts how many needed how many tries.
    async fn start_anew(&self, count: usize, may_retry: fn(&Failure) -> bool) -> BTreeMap<usize, usize> {
        let mut openers = JoinSet::new();
        for _ in 0..count {
            let (client, mut random) = (self.client(), self.random());
            openers.spawn(within("a new stream", async move {
                for tries in 1.. {
                    let device = client.devices.any(&mut random);
                    match client.entrances.open(&device, &mut random).await {
                        Ok(mut session) => {
                            session.talk(100).await.unwrap();
                            let seen = session.close().await;
                            assert!(matches!(seen.end, End::Closed(1000, _)), "{seen:?}");
                            return tries;
                        }
                        Err(failure) => assert!(may_retry(&failure), "{failure:?}"),
                    }
                    sleep(random.time(Duration::from_millis(200))).await;
                }
                unreachable!("there is always another try")
            }));
        }
        let mut tries = BTreeMap::new();
        for each in openers.join_all().await {
            *tries.entry(each).or_default() += 1;
        }
        tries
    }

    /// Adds what the devices have seen.
    async fn both(&self, services: Vec<Seen>) -> Vec<Stream> {
        let mut streams = Vec::new();
        for service in services {
            let device = self.devices.seen(service.stream).await;
            assert_eq!(service.owner, device.owner, "stream {}", service.stream);
            streams.push(Stream { service, device });
        }
        streams
    }
}

impl Held {
    /// Closes those that still stand.
    async fn end(self) -> Vec<Seen> {
        self.on.send(false).unwrap();
        self.streams.join_all().await
    }
}

impl Stream {
    fn id(&self) -> StreamId {
        self.service.stream
    }

    fn owner(&self) -> usize {
        self.service.owner
    }

    /// The edges at which the legs came in: the service's, the device's.
    fn entries(&self) -> [usize; 2] {
        [self.service.edge, self.device.edge]
    }

    /// Checks that the service closed it, and that both ends have what the other one sent.
    fn went_well(&self) {
        let Self { service, device } = self;
        for seen in [service, device] {
            assert!(matches!(seen.end, End::Closed(1000, _)), "{self:?}");
        }
        assert_eq!((service.sent, device.sent), (device.received, service.received), "{}", self.id());
    }
}

impl Tally {
    fn add(&mut self, other: Self) {
        self.streams.extend(other.streams);
        self.retries.extend(other.retries);
        self.failed.extend(other.failed);
    }
}

impl Client {
    /// One stream to any device, which carries messages for as long as `go_on` says.
    async fn stream(&self, random: &mut Random, go_on: impl Fn() -> bool) -> Tally {
        let begun = Instant::now();
        let device = self.devices.any(random);
        let mut tally = Tally::default();
        match self.entrances.open_or_retry(&device, random).await {
            Ok((session, first)) => {
                tally.retries.extend(first.map(|failure| failure.to_string()));
                tally.streams.push((begun, keep_talking(session, random.clone(), go_on).await));
            }
            Err(failure) => tally.failed.push(failure.to_string()),
        }
        tally
    }

    /// A stream that is opened anew whenever it is cut.
    async fn follow(self, go_on: watch::Receiver<bool>, mut random: Random) -> Tally {
        let mut tally = Tally::default();
        while *go_on.borrow() {
            tally.add(self.stream(&mut random, || *go_on.borrow()).await);
        }
        tally
    }

    /// So many new streams a second, each for [`ECHO`].
    async fn constant(self, each_second: u32, go_on: watch::Receiver<bool>, mut random: Random) -> Tally {
        let mut streams = JoinSet::new();
        let mut ticks = interval(Duration::from_secs(1) / each_second);
        while *go_on.borrow() {
            ticks.tick().await;
            let (client, mut random) = (self.clone(), Random::new(random.number()));
            let end = Instant::now() + ECHO;
            streams.spawn(async move { client.stream(&mut random, || Instant::now() < end).await });
        }
        let mut tally = Tally::default();
        for stream in streams.join_all().await {
            tally.add(stream);
        }
        tally
    }
}

/// Sends messages and checks the answers, until it is time to close the stream or it ends.
async fn keep_talking(mut session: Session, mut random: Random, go_on: impl Fn() -> bool) -> Seen {
    while go_on() {
        let talk = async {
            session.talk(random.length(LONGEST_MESSAGE)).await?;
            session.rest(Instant::now() + random.time(PAUSE)).await
        };
        if let Err(end) = talk.await {
            return session.seen(end).await;
        }
    }
    session.close().await
}
