//! The splice on its own, over connections in memory: whatever the sizes and the moments, no byte is lost, repeated or moved.

use std::{pin::pin, sync::Arc, time::Duration};

use bytes::Bytes;
use midspan_core::{close::CloseReason, id::Role};
use midspan_edge::splice::{Limits, Shared, Splice};
use midspan_platform::metrics::Metrics;
use proptest::{collection::vec, prelude::*};
use testkit::{Frame, pattern, within};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, ReadHalf, WriteHalf, duplex, split},
    task::yield_now,
};

/// What one end does.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    /// Opcode, payload's length and number of fragments of each message.
    pub(crate) messages: Vec<(bool, usize, usize)>,
    /// How many bytes are written at once, and how often others have their turn in between. Used in turn.
    pub(crate) writes: Vec<(usize, usize)>,
    /// The same for reading.
    pub(crate) reads: Vec<(usize, usize)>,
    /// How many bytes the network holds in each direction.
    pub(crate) pipe: usize,
    /// How many bytes were read by whoever did the upgrade.
    pub(crate) early: usize,
}

/// How the first end to be through with its messages ends.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum End {
    Close,
    Abort,
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn nothing_is_lost_repeated_or_moved(
        service in plan(), device in plan(), service_ends: bool, end in prop_oneof![Just(End::Close), Just(End::Abort)],
    ) {
        // Time stands still while anything moves: a hang is noticed at once, and a busy machine is no hang.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        runtime.block_on(within("the splice", run(service, device, service_ends, end)));
    }
}

#[tokio::test]
async fn a_reader_that_takes_nothing_at_a_clean_end_is_not_waited_for_for_ever() {
    let (mut service, relay_service) = duplex(64 * 1024);
    // The network to the device holds next to nothing, and the device never reads.
    let (device, relay_device) = duplex(16);
    let bytes = [Frame::binary(&pattern(10_000)).bytes(), Frame::close(1000, "bye").bytes()].concat();
    service.write_all(&bytes).await.unwrap();
    let limits = Limits { close: Duration::from_millis(200), ..limits() };
    let early = [Bytes::new(), Bytes::new()];
    let splicing = splice(relay_service, relay_device, early, limits, std::future::pending());
    let closing = async {
        // The service is told all the same, and at once.
        let mut buffer = Vec::new();
        while Frame::take(&mut buffer.clone()).is_none() {
            service.read_buf(&mut buffer).await.unwrap();
        }
        drop(service);
        Frame::take(&mut buffer).unwrap().close_reason()
    };
    let (spliced, close) = within("the end", async { tokio::join!(splicing, closing) }).await;
    assert_eq!((spliced.reason, spliced.bytes_to_device), (CloseReason::ServiceClosed, 10_000));
    assert_eq!(close, Some((1000, "bye".to_owned())));
    drop(device);
}

#[tokio::test]
async fn an_end_that_reads_nothing_may_write_all_the_same() {
    const SIZE: usize = 256 * 1024;
    let (mut service, relay_service) = duplex(4096);
    let (mut device, relay_device) = duplex(64 * 1024);
    // More than a service that does not read takes.
    let early = [Bytes::new(), Bytes::from(Frame::binary(&pattern(SIZE)).bytes())];
    let talking = async {
        let said = Frame::binary(&pattern(SIZE)).bytes();
        let (mut heard, mut read) = (0, vec![0; 64 * 1024]);
        let hearing = async {
            while heard < SIZE {
                heard += device.read(&mut read).await.unwrap();
            }
        };
        let (written, ()) = tokio::join!(service.write_all(&said), hearing);
        written.unwrap();
    };
    let splicing = splice(relay_service, relay_device, early, limits(), std::future::pending());
    tokio::select! {
        _ = splicing => panic!("the stream ended"),
        () = within("all that the service writes", talking) => {}
    }
}

#[tokio::test]
async fn an_end_from_outside_is_told_to_both() {
    let (service, relay_service) = duplex(1024);
    let (device, relay_device) = duplex(1024);
    let early = [Bytes::new(), Bytes::new()];
    let end = async { CloseReason::Deleted };
    let read = async |end: DuplexStream| {
        let (mut end, mut buffer) = (end, Vec::new());
        end.read_buf(&mut buffer).await.unwrap();
        Frame::take(&mut buffer).unwrap().close_reason().unwrap()
    };
    let (spliced, service, device) = within("the end", async {
        tokio::join!(splice(relay_service, relay_device, early, limits(), end), read(service), read(device))
    })
    .await;
    assert_eq!(spliced.reason, CloseReason::Deleted);
    let told = (1001, CloseReason::Deleted.close_text());
    assert_eq!((service, device), (told.clone(), told));
}

/// Room for all that these streams ever keep.
const BUFFERED: usize = 64 * 1024 * 1024;

/// What a stream carried, and why it ended.
struct Spliced {
    reason: CloseReason,
    bytes_to_device: u64,
}

async fn splice(
    service: DuplexStream,
    device: DuplexStream,
    early: [Bytes; 2],
    limits: Limits,
    end: impl Future<Output = CloseReason>,
) -> Spliced {
    let shared = Shared::new(BUFFERED, &Metrics::new());
    let mut stream = Splice::new(service, device, early, shared, Arc::new(limits), None);
    let ending = stream.run(pin!(end)).await;
    let spliced = Spliced { reason: ending.reason(), bytes_to_device: stream.payload().0 };
    stream.finish(ending).await;
    spliced
}

fn limits() -> Limits {
    let long = Duration::from_secs(3600);
    Limits { ping: long, silence: long, idle: long, stall: long, close: long }
}

pub(crate) fn plan() -> impl Strategy<Value = Plan> {
    let length = prop_oneof![0usize..300, 65_000usize..66_000, 0usize..200_000];
    let steps = || vec((prop_oneof![1usize..20, 1usize..70_000], 0usize..4), 1..6);
    let pipe = prop_oneof![1usize..200, 1000usize..100_000];
    (vec((any::<bool>(), length, 1usize..4), 0..6), steps(), steps(), pipe, 0usize..100)
        .prop_map(|(messages, writes, reads, pipe, early)| Plan { messages, writes, reads, pipe, early })
}

async fn run(service: Plan, device: Plan, service_ends: bool, end: End) {
    let (service_end, relay_service) = duplex(service.pipe);
    let (device_end, relay_device) = duplex(device.pipe);
    let (service_bytes, device_bytes) = (service.bytes(), device.bytes());
    let early = |plan: &Plan, bytes: &[u8]| Bytes::copy_from_slice(&bytes[..plan.early.min(bytes.len())]);
    let earlies = [early(&service, &service_bytes), early(&device, &device_bytes)];

    let (spliced, at_service, at_device) = tokio::join!(
        splice(relay_service, relay_device, earlies, limits(), std::future::pending()),
        play(&service, &service_bytes, service_end, service_ends.then_some(end)),
        play(&device, &device_bytes, device_end, (!service_ends).then_some(end)),
    );

    check(&service, &device, service_ends, end, spliced.reason, &at_service, &at_device);
}

/// Checks what arrived at both ends against what was sent.
pub(crate) fn check(
    service: &Plan,
    device: &Plan,
    service_ends: bool,
    end: End,
    reason: CloseReason,
    at_service: &Arrived,
    at_device: &Arrived,
) {
    let role = if service_ends { Role::Service } else { Role::Device };
    let (from, to) = if service_ends { (service, at_device) } else { (device, at_service) };
    let (other, back) = if service_ends { (device, at_service) } else { (service, at_device) };
    let sent = from.received_whole();
    match end {
        End::Close => {
            assert_eq!(reason, CloseReason::closed_by(role));
            // All that was sent before the close arrives, then the close.
            assert!(to.messages == sent, "{} of {} messages", to.messages.len(), sent.len());
            assert_eq!(to.close, Some((4000, "that was all".to_owned())));
            assert_eq!(back.close, to.close);
        }
        End::Abort => {
            assert_eq!(reason, CloseReason::lost(role));
            assert!(sent.starts_with(&to.messages), "what arrived is not the front of what was sent");
            assert_eq!(to.close.as_ref().map(|close| close.0), Some(1011));
        }
    }
    // The other way, an end may cut off what was under way, and nothing else.
    let sent = other.received_whole();
    assert!(sent.starts_with(&back.messages), "what arrived is not the front of what was sent");
}

/// What arrived at one end.
#[derive(Debug, Default)]
pub(crate) struct Arrived {
    pub(crate) messages: Vec<(u8, Vec<u8>)>,
    pub(crate) close: Option<(u16, String)>,
}

pub(crate) async fn play(plan: &Plan, bytes: &[u8], io: DuplexStream, end: Option<End>) -> Arrived {
    let (read, write) = split(io);
    let reading = receive(plan, read);
    let writing = send(plan, &bytes[plan.early.min(bytes.len())..], write, end);
    tokio::pin!(reading);
    // Who has heard the close does not go on writing; who aborts does not go on reading.
    tokio::select! {
        biased;
        arrived = &mut reading => arrived,
        write = writing => match end {
            Some(End::Abort) => Arrived::default(),
            Some(End::Close) | None => {
                let arrived = reading.await;
                drop(write);
                arrived
            }
        },
    }
}

async fn send(
    plan: &Plan,
    bytes: &[u8],
    mut io: WriteHalf<DuplexStream>,
    end: Option<End>,
) -> WriteHalf<DuplexStream> {
    let mut bytes = bytes.to_vec();
    if end == Some(End::Close) {
        bytes.extend(Frame::close(4000, "that was all").bytes());
    }
    let mut steps = plan.writes.iter().cycle();
    let mut rest = bytes.as_slice();
    while let (false, Some(&(length, turns))) = (rest.is_empty(), steps.next()) {
        let (now, later) = rest.split_at(length.min(rest.len()));
        if io.write_all(now).await.is_err() {
            break;
        }
        rest = later;
        for _ in 0..turns {
            yield_now().await;
        }
    }
    io
}

async fn receive(plan: &Plan, mut io: ReadHalf<DuplexStream>) -> Arrived {
    let (mut arrived, mut buffer, mut message) = (Arrived::default(), Vec::new(), None);
    for &(length, turns) in plan.reads.iter().cycle() {
        let mut piece = vec![0; length];
        let Ok(read @ 1..) = io.read(&mut piece).await else { break };
        buffer.extend_from_slice(&piece[..read]);
        while let Some(frame) = Frame::take(&mut buffer) {
            assert_eq!((frame.reserved, frame.mask), (0, None));
            match (frame.opcode, &mut message) {
                (1 | 2, None) => message = Some((frame.opcode, frame.payload)),
                (0, Some((_, payload))) => payload.extend(frame.payload),
                (8, _) => {
                    arrived.close = frame.close_reason();
                    return arrived;
                }
                (opcode, message) => panic!("opcode {opcode} in {:?}", message.is_some()),
            }
            if frame.fin {
                arrived.messages.extend(message.take());
            }
        }
        for _ in 0..turns {
            yield_now().await;
        }
    }
    arrived
}

impl Plan {
    pub(crate) fn received_whole(&self) -> Vec<(u8, Vec<u8>)> {
        let messages = self.messages.iter().enumerate();
        messages
            .map(|(index, &(text, length, _))| (if text { 1 } else { 2 }, payload(index, length)))
            .collect()
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (index, &(text, length, fragments)) in self.messages.iter().enumerate() {
            let payload = payload(index, length);
            let mut pieces = payload.chunks(length.div_ceil(fragments).max(1)).collect::<Vec<_>>();
            if pieces.is_empty() {
                pieces.push(&[]);
            }
            let last = pieces.len() - 1;
            for (number, piece) in pieces.into_iter().enumerate() {
                let opcode = match (number, text) {
                    (0, true) => 1,
                    (0, false) => 2,
                    _ => 0,
                };
                let frame = Frame { fin: number == last, ..Frame::new(opcode, piece) };
                bytes.extend(frame.bytes());
            }
        }
        bytes
    }
}

/// Payloads that differ from message to message.
fn payload(index: usize, length: usize) -> Vec<u8> {
    pattern(length + index)[index..].to_vec()
}
