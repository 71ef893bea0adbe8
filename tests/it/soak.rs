//! Many streams for a long time, with everything at random: every byte is checked, and nothing is left behind.

use std::{
    collections::{BTreeMap, VecDeque},
    hash::{BuildHasher as _, RandomState},
    io,
    sync::Mutex,
    time::Duration,
};

use testkit::{Dial, FlowReader, FlowWriter, Incoming, Message, Opener, Random, Relay, Script};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep, timeout, timeout_at},
};

/// How many streams there are at a time: half of them over TLS, at a relay of their own. One more, in plaintext, has a relay
/// for itself, and a device that says little, so that the relay waits for much to come together.
const STREAMS: usize = 8;

/// What the relays are called.
const NAMES: [&str; 3] = ["with TLS", "in plaintext", "of one stream"];

/// How much resident memory a relay may have gained since the first part of the test, when no stream is there. The allocator gives
/// freed memory back when it likes: in the short form, the figure differs by up to 15 MiB, either way. What is lost
/// with every message or stream grows with the length of the test, and goes beyond any bound.
const GROWTH_KIB: u64 = 24 * 1024;

/// A stream that makes no end is stuck.
const STUCK: Duration = Duration::from_secs(90);

/// How much happens, and how fast.
#[derive(Debug, Clone, Copy)]
struct Pace {
    whole: Duration,
    longest_message: usize,
    longest_life: Duration,
    /// Of a hundred messages sent, how many have a pause behind them; and how long it may be. First for services.
    sending: (usize, Duration),
    answering: (usize, Duration),
    /// The same for pieces received; first on streams that end by an abort, for which nobody waits.
    receiving: (usize, Duration),
    unhurried: (usize, Duration),
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_at_random_for_a_while() {
    let pace = Pace::from_environment();
    let seed = setting("MIDSPAN_SOAK_SEED").unwrap_or_else(|| RandomState::new().hash_one("soak"));
    println!("soak of {:?}, MIDSPAN_SOAK_SEED={seed}", pace.whole);

    // Pings often, so that there are some between all the rest; nothing here is silent for long unless it hangs.
    let common = ["--leg-ping", "300ms", "--leg-silence", "30s", "--link-silence", "10m"];
    let secure = Relay::with(&common).await;
    let open = Relay::with(&[&common[..], &["--insecure-plaintext"]].concat()).await;
    let lonely = Relay::with(&["--link-silence", "10m", "--insecure-plaintext"]).await;
    let relays = [(&secure, true), (&open, false), (&lonely, false)];
    let mut before = Vec::new();
    for (relay, _) in relays {
        before.push((relay.tasks().await, relay.open_files()));
    }

    let mut total = Tally::default();
    let mut memory = Vec::new();
    // The first part finds what is made once, and kept: code that is loaded, buffers of each thread.
    for (part, length) in [pace.whole / 4, pace.whole * 3 / 4].into_iter().enumerate() {
        let until = Instant::now() + length;
        let mut slots = JoinSet::new();
        for slot in 0..=STREAMS {
            let lonely = Pace { answering: (100, Duration::from_secs(4)), ..pace };
            let (at, pace) = if slot < STREAMS { (slot % 2, pace) } else { (2, lonely) };
            let (relay, tls) = relays[at];
            let dial = Dial { target: relay.target().clone(), tls, buffers: None };
            let opener = Opener::connect(relay, &dial, &format!("soak-{slot}")).await;
            let random = Random::new(seed ^ ((part * (STREAMS + 1) + slot) as u64) << 32);
            slots.spawn(keep_busy(opener, random, pace, until));
        }
        while let Some(tally) = slots.join_next().await {
            total.add(tally.unwrap());
        }
        for (relay, _) in relays {
            relay.assert_quiet().await;
        }
        memory.push([settled_kib(&secure).await, settled_kib(&open).await, settled_kib(&lonely).await]);
        println!("KiB resident without a stream ({NAMES:?}): {:?}; {total:?}", memory[part]);
    }

    for ((relay, _), before) in relays.into_iter().zip(before) {
        relay.shrinks_to(before).await;
    }
    for (relay, (first, last)) in NAMES.iter().zip(memory[0].iter().zip(memory[1])) {
        assert!(last <= first + GROWTH_KIB, "the relay {relay} grew from {first} to {last} KiB");
    }
    let mut ends = BTreeMap::new();
    for (relay, _) in relays {
        let metrics = relay.metrics().await;
        for reason in ["service_closed", "device_closed", "service_lost", "device_lost"] {
            *ends.entry(reason).or_default() +=
                metrics.count("midspan_edge_stream_ends_total", &[("reason", reason)]);
        }
        for listener in ["half_open", "joined"] {
            assert_eq!(metrics.count("midspan_edge_streams", &[("state", listener)]), 0, "{listener}");
        }
    }
    ends.retain(|_, count| *count > 0);
    assert_eq!(ends, total.ends, "the relay counts other ends");
    assert!(total.streams > STREAMS as u64 && total.bytes > 0 && total.pings > 0, "{total:?}");
}

/// What was done.
#[derive(Debug, Default)]
struct Tally {
    streams: u64,
    messages: u64,
    bytes: u64,
    pings: u64,
    ends: BTreeMap<&'static str, i64>,
}

impl Tally {
    fn add(&mut self, other: Self) {
        self.streams += other.streams;
        self.messages += other.messages;
        self.bytes += other.bytes;
        self.pings += other.pings;
        for (reason, count) in other.ends {
            *self.ends.entry(reason).or_default() += count;
        }
    }
}

/// How a stream ends.
#[derive(Debug, Clone)]
enum End {
    /// With a close frame, behind a message or within one.
    Close { reason: Option<(u16, String)>, within_message: bool },
    /// The connection is reset, or just gone, in the middle of whatever is sent.
    Abort { reset: bool },
}

/// What one end does.
#[derive(Debug)]
struct Party {
    reader: FlowReader,
    writer: FlowWriter,
    sends: Script,
    /// How the stream ends, and when, if it is this end that ends it.
    ends: Option<(End, Instant)>,
    random: Random,
    pace: Pace,
}

/// What an end has seen.
#[derive(Debug)]
struct Seen {
    /// Messages sent, and bytes of the one begun.
    sent: (u64, usize),
    /// The same for what was received.
    received: (u64, usize),
    bytes: u64,
    pings: u64,
    /// The close frame, if there was one.
    close: Option<Incoming>,
}

/// What the two halves of an end tell each other.
#[derive(Debug, Default)]
struct Between {
    /// Pings that were sent and not answered.
    pings: Mutex<VecDeque<Vec<u8>>>,
    /// The last ping of the relay, which is not answered yet.
    owed: Mutex<Option<Vec<u8>>>,
}

/// Opens one stream after the other.
async fn keep_busy(mut opener: Opener, mut random: Random, pace: Pace, until: Instant) -> Tally {
    let mut tally = Tally::default();
    while Instant::now() < until {
        let stream = random.number();
        let seen = timeout(pace.longest_life + STUCK, stream_of(&mut opener, stream, pace)).await;
        let (reason, service, device) = seen.unwrap_or_else(|_| panic!("stream {stream} is stuck"));
        tally.add(Tally {
            streams: 1,
            messages: service.received.0 + device.received.0,
            bytes: service.bytes + device.bytes,
            pings: service.pings + device.pings,
            ends: [(reason, 1)].into(),
        });
    }
    tally
}

/// One stream from its beginning to its end: for which reason it ended, and what the service and the device have seen.
async fn stream_of(opener: &mut Opener, seed: u64, pace: Pace) -> (&'static str, Seen, Seen) {
    let mut random = Random::new(seed);
    let (forth, back) = (random.number(), random.number());
    let by_service = random.chance(50);
    let end = End::any(&mut random);
    let life = random.time(pace.longest_life);
    let receiving = if matches!(end, End::Close { .. }) { pace.unhurried } else { pace.receiving };
    let pace = Pace { receiving, ..pace };
    let (service, device) = opener.open().await;
    let when = Instant::now() + life;

    let mut party = |leg: testkit::FlowLeg, pace: Pace, sends, receives, ends: bool| {
        let (reader, writer) = leg.split(Script::mixed(receives, pace.longest_message));
        let sends = Script::mixed(sends, pace.longest_message);
        let ends = ends.then(|| (end.clone(), when));
        Party { reader, writer, sends, ends, random: Random::new(random.number()), pace }
    };
    let service = party(service, pace, forth, back, by_service);
    let device = party(device, Pace { sending: pace.answering, ..pace }, back, forth, !by_service);
    let (service, device) = tokio::join!(service.run(), device.run());

    let (ender, other) = if by_service { (&service, &device) } else { (&device, &service) };
    let reason = match (&end, by_service) {
        (End::Close { reason, .. }, _) => {
            let close = Some(Incoming::Close(reason.clone()));
            assert_eq!(ender.close, close, "the answer to a close frame; stream {seed}");
            assert_eq!(other.close, close, "the close frame; stream {seed}");
            // All that was sent before the close frame has come, the piece of a message included.
            assert_eq!(other.received, ender.sent, "stream {seed}");
            if by_service { "service_closed" } else { "device_closed" }
        }
        (End::Abort { .. }, _) => {
            let reason = if by_service { "service_lost" } else { "device_lost" };
            let Some(Incoming::Close(Some((1011, text)))) = &other.close else {
                panic!("{:?} instead of 1011; stream {seed}", other.close);
            };
            assert!(text.starts_with(reason), "{text:?} instead of {reason}; stream {seed}");
            assert!(ender.close.is_none() && other.received <= ender.sent, "{other:?}; stream {seed}");
            reason
        }
    };
    assert!(ender.received <= other.sent, "{ender:?}, {other:?}; stream {seed}");
    (reason, service, device)
}

impl End {
    fn any(random: &mut Random) -> Self {
        if random.chance(40) {
            return Self::Abort { reset: random.chance(50) };
        }
        let code = [1000, 1001, 1008, 1011, 3000, 4999][random.below(6)];
        let text: String =
            (0..random.below(124)).map(|_| char::from(b"etaoin shrdlu"[random.below(13)])).collect();
        let reason = random.chance(80).then_some((code, text));
        Self::Close { reason, within_message: random.chance(50) }
    }
}

impl Party {
    async fn run(self) -> Seen {
        let Self { mut reader, mut writer, sends, ends, random, pace } = self;
        let between = Between::default();
        let mut sent = (0, 0);
        let mut pings = 0;
        let aborts = ends.clone().filter(|(end, _)| matches!(end, End::Abort { .. }));
        let mut listening =
            Listening { reader: &mut reader, between: &between, random: random.clone(), pace };
        let mut talking = Talking {
            writer: &mut writer,
            between: &between,
            sent: &mut sent,
            random,
            pace,
            pings: &mut pings,
        };
        let both = async {
            tokio::select! {
                close = listening.run() => close,
                () = talking.run(sends, ends) => unreachable!("who has nothing more to say still listens"),
            }
        };
        let close = match &aborts {
            Some((_, when)) => timeout_at(*when, both).await.ok(),
            None => Some(both.await),
        };
        let received = reader.received();
        let bytes = reader.bytes();
        if let Some((End::Abort { reset }, _)) = aborts {
            assert_eq!(close, None, "the other end never closes");
            let socket = writer.unsplit(reader);
            if reset {
                socket.abort();
            }
        } else {
            reader.ended().await;
            writer.shutdown().await;
        }
        Seen { sent, received, bytes, pings, close }
    }
}

/// The reading half of an end.
struct Listening<'a> {
    reader: &'a mut FlowReader,
    between: &'a Between,
    random: Random,
    pace: Pace,
}

impl Listening<'_> {
    /// Reads until the close frame, and gives that.
    async fn run(&mut self) -> Incoming {
        loop {
            match self.reader.next().await {
                Incoming::Data(_) => pause(self.pace.receiving, &mut self.random).await,
                Incoming::Ping(payload) => *self.between.owed.lock().unwrap() = Some(payload),
                Incoming::Pong(payload) => {
                    let ping = self.between.pings.lock().unwrap().pop_front();
                    assert_eq!(ping, Some(payload), "a pong, but not the next one");
                }
                close @ Incoming::Close(_) => return close,
            }
        }
    }
}

/// The writing half of an end.
struct Talking<'a> {
    writer: &'a mut FlowWriter,
    between: &'a Between,
    sent: &'a mut (u64, usize),
    pings: &'a mut u64,
    random: Random,
    pace: Pace,
}

impl Talking<'_> {
    /// Sends messages until it is time to close, if it ever is.
    async fn run(&mut self, sends: Script, ends: Option<(End, Instant)>) {
        // When the connection does not take any more, the reading half hears why.
        let _ = self.talk(sends, ends).await;
        std::future::pending::<()>().await;
    }

    async fn talk(&mut self, sends: Script, ends: Option<(End, Instant)>) -> io::Result<()> {
        for message in sends {
            let closing = match &ends {
                Some((End::Close { reason, within_message }, when)) if Instant::now() >= *when => {
                    Some((reason, *within_message))
                }
                _ => None,
            };
            if let Some((reason, within_message)) = closing {
                if within_message {
                    let part = self.random.below(message.length + 1);
                    self.part(&message, part).await?;
                }
                let reason = reason.as_ref().map(|(code, text)| (*code, text.as_str()));
                return self.writer.close(reason, &mut self.random).await;
            }
            self.message(&message).await?;
            self.aside().await?;
            pause(self.pace.sending, &mut self.random).await;
        }
        Ok(())
    }

    /// Sends a message, in one frame or in several.
    async fn message(&mut self, message: &Message) -> io::Result<()> {
        let pieces = if self.random.chance(60) { 1 } else { self.random.below(6) + 1 };
        let mut at = 0;
        for piece in 1..=pieces {
            let last = piece == pieces;
            let end = if last { message.length } else { at + self.random.below(message.length - at + 1) };
            let chopped = self.random.chance(20) && end - at < 256 * 1024;
            // Counted before it is sent: an end that aborts may have sent any part of it.
            self.sent.1 = end;
            self.writer.fragment(message, at..end, (piece == 1, last), chopped, &mut self.random).await?;
            at = end;
            if !last {
                self.aside().await?;
                if self.random.chance(10) {
                    pause(self.pace.sending, &mut self.random).await;
                }
            }
        }
        *self.sent = (message.index + 1, 0);
        Ok(())
    }

    /// Sends the beginning of a message, and never the rest.
    async fn part(&mut self, message: &Message, length: usize) -> io::Result<()> {
        self.sent.1 = length;
        self.writer.fragment(message, 0..length, (true, false), false, &mut self.random).await?;
        self.aside().await
    }

    /// Sends control frames: a ping now and then, and the pong that the relay waits for.
    async fn aside(&mut self) -> io::Result<()> {
        let owed = self.between.owed.lock().unwrap().take();
        if let Some(owed) = owed {
            self.writer.control(10, &owed, &mut self.random).await?;
        }
        if self.random.chance(20) {
            let payload = self.random.bytes(125);
            self.between.pings.lock().unwrap().push_back(payload.clone());
            *self.pings += 1;
            self.writer.control(9, &payload, &mut self.random).await?;
        }
        Ok(())
    }
}

impl Pace {
    /// Without `MIDSPAN_SOAK_SECONDS`, a short form that leaves a small machine time for other tests.
    fn from_environment() -> Self {
        match setting("MIDSPAN_SOAK_SECONDS") {
            Some(seconds) => Self {
                whole: Duration::from_secs(seconds),
                longest_message: 64 << 20,
                longest_life: Duration::from_secs(8),
                sending: (5, Duration::from_millis(400)),
                answering: (5, Duration::from_millis(400)),
                receiving: (1, Duration::from_millis(400)),
                unhurried: (5, Duration::from_millis(400)),
            },
            None => Self {
                whole: Duration::from_secs(12),
                longest_message: 512 << 10,
                longest_life: Duration::from_secs(2),
                sending: (70, Duration::from_millis(120)),
                answering: (70, Duration::from_millis(120)),
                receiving: (5, Duration::from_millis(120)),
                unhurried: (15, Duration::from_millis(120)),
            },
        }
    }
}

/// The least resident memory within a second in which there is a little to do: the allocator gives nothing back while there is not.
async fn settled_kib(relay: &Relay) -> u64 {
    let mut least = u64::MAX;
    for _ in 0..50 {
        relay.metrics().await;
        least = least.min(relay.resident_kib());
        sleep(Duration::from_millis(20)).await;
    }
    least
}

async fn pause((percent, longest): (usize, Duration), random: &mut Random) {
    if random.chance(percent) {
        sleep(random.time(longest)).await;
    }
}

pub(crate) fn setting(name: &str) -> Option<u64> {
    let value = std::env::var_os(name)?;
    Some(value.to_str().and_then(|text| text.parse().ok()).unwrap_or_else(|| panic!("{name} is no number")))
}
