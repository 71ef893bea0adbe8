//! Streams on which nothing happens: what each costs, and that all of them still work.

use std::{sync::Arc, time::Duration};

use testkit::{Dial, FlowLeg, FlowReader, FlowWriter, Incoming, Opener, Random, Relay, Script, need_files};
use tokio::{
    sync::Barrier,
    task::JoinSet,
    time::{sleep, timeout},
};

/// So many ask for streams side by side, each with a device of its own.
const OPENERS: usize = 8;

/// Room for the test's other files and sockets, and those of tests beside it.
const OTHER_FILES: usize = 1000;

#[tokio::test(flavor = "multi_thread")]
async fn idle_streams_cost_little_and_all_work_at_once() {
    let pairs =
        crate::soak::setting("MIDSPAN_IDLE_PAIRS").map_or(500, |pairs| usize::try_from(pairs).unwrap());
    need_files(2 * pairs + OTHER_FILES);
    let relay = Relay::with(
        &[
            // Nothing at all is to happen while memory is looked at.
            &["--leg-ping", "30m", "--leg-silence", "90m", "--link-ping", "30m", "--link-silence", "90m"][..],
            &["--max-streams", "20000", "--max-connections", "40000", "--max-unauthenticated", "40000"],
            &["--limit-streams-per-device", "20000", "--limit-streams-per-service", "20000"],
            &["--limit-initiations-per-second", "100000", "--limit-waiting-initiations", "20000"],
        ]
        .concat(),
    )
    .await;
    let before = (relay.tasks().await, relay.open_files());
    // A few streams that have come and gone: what is made once and kept is no cost of the others.
    let few = open(&relay, 2 * OPENERS).await;
    use_all(few).await;
    relay.assert_quiet().await;

    let empty = relay.resident_kib();
    let streams = open(&relay, pairs).await;
    sleep(Duration::from_millis(500)).await;
    let idle = relay.resident_kib();
    let open_files = relay.open_files();
    let tenths = idle.saturating_sub(empty) * 10 / pairs as u64;
    let (each, tenth) = (tenths / 10, tenths % 10);
    println!(
        "{pairs} idle streams: {empty} KiB without and {idle} KiB with them, {each}.{tenth} KiB for each"
    );
    assert!(open_files >= 2 * pairs, "{open_files} open files cannot be {pairs} streams");
    relay.counts("midspan_edge_streams", &[("state", "joined")], i64::try_from(pairs).unwrap()).await;

    let bytes = use_all(streams).await;
    println!("all used at once: {bytes} bytes of payload; {} KiB", relay.resident_kib());
    relay.assert_quiet().await;
    relay.shrinks_to(before).await;
}

/// A joined stream: what is sent at each end, and received at the other.
type Pair = [(FlowReader, FlowWriter, Script); 2];

async fn open(relay: &Relay, pairs: usize) -> Vec<Pair> {
    let dial = Dial { target: relay.target().clone(), tls: true, buffers: None };
    let mut opening = JoinSet::new();
    for number in 0..OPENERS {
        let mut opener = Opener::connect(relay, &dial, &format!("idle-{number}")).await;
        opening.spawn(async move {
            let mut streams = Vec::new();
            for stream in (number..pairs).step_by(OPENERS) {
                let (service, device) = opener.open().await;
                streams.push(pair(service, device, stream as u64));
            }
            streams
        });
    }
    let mut all = Vec::new();
    while let Some(streams) = opening.join_next().await {
        all.extend(streams.unwrap());
    }
    assert_eq!(all.len(), pairs);
    all
}

fn pair(service: FlowLeg, device: FlowLeg, seed: u64) -> Pair {
    let script = |seed| Script::mixed(seed, 16 * 1024);
    let (forth, back) = (script(2 * seed), script(2 * seed + 1));
    let ((service_reader, service_writer), (device_reader, device_writer)) =
        (service.split(back.clone()), device.split(forth.clone()));
    [(service_reader, service_writer, forth), (device_reader, device_writer, back)]
}

/// Sends a message each way on every stream at the same moment, and ends them; gives the bytes that were carried.
async fn use_all(streams: Vec<Pair>) -> u64 {
    let together = Arc::new(Barrier::new(2 * streams.len()));
    let mut talks = JoinSet::new();
    for pair in streams {
        for ((mut reader, mut writer, mut sends), closes) in pair.into_iter().zip([true, false]) {
            let together = Arc::clone(&together);
            talks.spawn(async move {
                let mut random = Random::new(1);
                let message = sends.next().unwrap();
                together.wait().await;
                writer.message(&message, &mut random).await.unwrap();
                while reader.received().0 == 0 {
                    assert!(matches!(reader.next().await, Incoming::Data(_)), "no message");
                }
                if closes {
                    writer.close(Some((1000, "all said")), &mut random).await.unwrap();
                }
                let close = reader.next().await;
                assert_eq!(close, Incoming::Close(Some((1000, "all said".to_owned()))));
                reader.ended().await;
                writer.shutdown().await;
                reader.bytes()
            });
        }
    }
    let all = async {
        let mut bytes = 0;
        while let Some(carried) = talks.join_next().await {
            bytes += carried.unwrap();
        }
        bytes
    };
    timeout(Duration::from_secs(120), all).await.expect("not every stream was of use")
}
