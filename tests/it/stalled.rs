//! Memory when readers do not read, and when messages are large: the relay holds back the writer, and not the payload.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use testkit::{Dial, FlowLeg, Incoming, Message, Opener, Random, Relay, Script, need_files};
use tokio::{
    sync::watch,
    task::JoinSet,
    time::{Instant, sleep, timeout},
};

use crate::soak::setting;

/// What the relay may hold for streams whose reader does not read, in KiB: its budget for all of them together...
const BUDGET_KIB: u64 = 64 * 1024;

/// ...and what each of them has beside that: its state, a frame that has begun, TLS.
const REMAINS_KIB: u64 = 32;

/// What four streams of large messages may take, in KiB. It is the same without optimisation: buffers have the same sizes.
const LARGE_KIB: u64 = 16 * 1024;

/// Without optimisation, the messages are shorter to save time, and all the same much longer than what the relay may hold.
const LARGE: usize = if cfg!(debug_assertions) { 16 << 20 } else { 64 << 20 };

/// The kernel's buffers at each client: small ones, so that many streams do not fill the machine's memory there.
const BUFFERS: u32 = 16 * 1024;

/// All is over by then.
const LIMIT: Duration = Duration::from_secs(120);

/// What everybody does at the moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd)]
enum Phase {
    Idle,
    Sending,
    Reading,
}

#[tokio::test(flavor = "multi_thread")]
async fn stalled_readers_share_one_budget() {
    // Each fills megabytes of the kernel's buffers, and all of that passes through the relay: a thousand are not for every day.
    let stalled = setting("MIDSPAN_STALLED_READERS").unwrap_or(100);
    let readers = usize::try_from(stalled).unwrap();
    need_files(2 * readers + 1000);
    let relay = Relay::with(&[
        "--limit-streams-per-device",
        "2000",
        "--limit-initiations-per-second",
        "100000",
        "--leg-ping",
        "10m",
        "--leg-silence",
        "30m",
    ])
    .await;
    let before = (relay.tasks().await, relay.open_files());
    // Shorter and longer than what arrives as one frame, and than all that is on the way.
    let lengths = [10_000, 65_000, 200_000];
    let (phase, now) = watch::channel(Phase::Idle);
    let begun = Arc::new(AtomicU64::new(0));
    let mut streams = JoinSet::new();
    for (number, (service, device)) in open(&relay, readers, Some(BUFFERS)).await.into_iter().enumerate() {
        let script = Script::even(number as u64, lengths[number % lengths.len()]);
        // Half of them go the other way.
        let (from, to) = if number % 2 == 0 { (service, device) } else { (device, service) };
        let (now, begun) = (now.clone(), Arc::clone(&begun));
        streams.spawn(async move {
            let (mut start, mut read) = (now.clone(), now.clone());
            let messages = script.clone().take_while(|_| {
                begun.fetch_add(1, Ordering::Relaxed);
                *now.borrow() != Phase::Reading
            });
            let sending = async {
                start.wait_for(|phase| *phase != Phase::Idle).await.unwrap();
                send(from, messages).await
            };
            let receiving = async {
                read.wait_for(|phase| *phase == Phase::Reading).await.unwrap();
                receive(to, script).await
            };
            let (sent, (received, bytes)) = tokio::join!(sending, receiving);
            assert_eq!(received, sent, "messages of stream {number}");
            bytes
        });
    }

    let idle = relay.resident_kib();
    relay.forget_peak();
    phase.send(Phase::Sending).unwrap();
    let (mut last, mut taken) = (Instant::now(), 0);
    while last.elapsed() < Duration::from_secs(2) {
        sleep(Duration::from_millis(100)).await;
        let now = begun.load(Ordering::Relaxed);
        if now > taken {
            (last, taken) = (Instant::now(), now);
        }
        assert!(taken < 4 << 20, "the writers are not held back");
    }
    let grown = relay.peak_kib().saturating_sub(idle);
    println!("{stalled} stalled readers: {idle} KiB when idle, {grown} KiB more after {taken} messages");
    phase.send(Phase::Reading).unwrap();
    let bytes = finish(streams).await;
    let most = relay.peak_kib().saturating_sub(idle);
    println!("then {bytes} bytes of payload came, all of them right; {most} KiB more at the most");
    relay.assert_quiet().await;
    relay.shrinks_to(before).await;
    assert!(taken >= stalled, "only {taken} messages were begun");
    assert!(most < BUDGET_KIB + stalled * REMAINS_KIB, "the relay grew by {most} KiB");
}

#[tokio::test(flavor = "multi_thread")]
async fn large_messages_take_no_more_memory_than_small_ones() {
    let relay = Relay::start().await;
    let mut grown = 0;
    // The first round loads code, and little else.
    for (length, messages) in [(100, 20), (LARGE, 1)] {
        let streams = open(&relay, 4, None).await;
        let idle = relay.resident_kib();
        relay.forget_peak();
        let mut talks = JoinSet::new();
        for (number, (service, device)) in streams.into_iter().enumerate() {
            let script = Script::even(number as u64, length);
            let (from, to) = if number % 2 == 0 { (service, device) } else { (device, service) };
            talks.spawn(async move {
                let (sent, (received, bytes)) =
                    tokio::join!(send(from, script.clone().take(messages)), receive(to, script));
                assert_eq!(received, sent, "messages of stream {number}");
                bytes
            });
        }
        let bytes = finish(talks).await;
        assert_eq!(bytes, 4 * (messages * length) as u64);
        grown = relay.peak_kib().saturating_sub(idle);
        println!(
            "four streams of messages of {length} bytes: {idle} KiB when idle, {grown} KiB more at the most"
        );
    }
    assert!(grown <= LARGE_KIB, "the relay grew by {grown} KiB");
    relay.assert_quiet().await;
}

/// Joined streams: the service's leg of each, and the device's.
async fn open(relay: &Relay, streams: usize, buffers: Option<u32>) -> Vec<(FlowLeg, FlowLeg)> {
    const OPENERS: usize = 4;
    let dial = Dial { target: relay.target().clone(), tls: true, buffers };
    let mut opening = JoinSet::new();
    for number in 0..OPENERS {
        let mut opener = Opener::connect(relay, &dial, &format!("stalled-{number}")).await;
        opening.spawn(async move {
            let mut legs = Vec::new();
            for _ in (number..streams).step_by(OPENERS) {
                legs.push(opener.open().await);
            }
            legs
        });
    }
    opening.join_all().await.into_iter().flatten().collect()
}

/// Sends messages, then closes. Gives how many there were.
async fn send(from: FlowLeg, messages: impl Iterator<Item = Message>) -> u64 {
    let (mut answers, mut writer) = from.split(Script::even(0, 0));
    let (mut random, mut sent) = (Random::new(1), 0);
    for message in messages {
        writer.message(&message, &mut random).await.unwrap();
        sent += 1;
    }
    writer.close(Some((1000, "all sent")), &mut random).await.unwrap();
    assert_eq!(answers.next().await, all_sent());
    answers.ended().await;
    writer.shutdown().await;
    sent
}

/// Reads until the close frame. Gives how many messages came, and their bytes.
async fn receive(to: FlowLeg, script: Script) -> (u64, u64) {
    let (mut reader, mut writer) = to.split(script);
    let close = loop {
        match reader.next().await {
            Incoming::Data(_) => {}
            other @ (Incoming::Ping(_) | Incoming::Pong(_) | Incoming::Close(_)) => break other,
        }
    };
    assert_eq!(close, all_sent());
    let ((messages, rest), bytes) = (reader.received(), reader.bytes());
    assert_eq!(rest, 0, "bytes of a message that has no end");
    reader.ended().await;
    writer.shutdown().await;
    (messages, bytes)
}

fn all_sent() -> Incoming {
    Incoming::Close(Some((1000, "all sent".to_owned())))
}

/// Waits for all, and gives the sum of their bytes.
async fn finish(mut streams: JoinSet<u64>) -> u64 {
    let all = async {
        let mut bytes = 0;
        while let Some(carried) = streams.join_next().await {
            bytes += carried.unwrap();
        }
        bytes
    };
    timeout(LIMIT, all).await.expect("the streams do not end")
}
