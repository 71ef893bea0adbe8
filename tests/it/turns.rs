//! Streams on one thread, some of which never run out of bytes: who goes on, and when. Time stands still, so that it does not
//! matter how busy the machine is.

use std::{
    future::pending,
    io,
    pin::{Pin, pin},
    sync::{Arc, Mutex},
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use midspan_edge::splice::{Limits, Pipe, Shared, Splice};
use midspan_platform::metrics::Metrics;
use testkit::{Frame, pattern, within};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, DuplexStream, ReadBuf, duplex},
    task::{JoinSet, yield_now},
    time::advance,
};

const MIB: usize = 1024 * 1024;

/// What a busy stream moves before others go on.
const SLICE: usize = MIB;

/// Which stream moved how many bytes, in the order in which that happened.
type Log = Arc<Mutex<Vec<(usize, usize)>>>;

/// One end of a stream, which takes everything.
struct End {
    name: usize,
    source: Source,
    tls: bool,
    log: Log,
}

/// What an end sends.
enum Source {
    /// The same, again and again, and where in it the next read begins.
    Endless(Arc<[u8]>, usize),
    /// What comes out of this.
    Now(DuplexStream),
}

impl AsyncRead for End {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match &mut self.get_mut().source {
            Source::Now(source) => Pin::new(source).poll_read(cx, buffer),
            Source::Endless(bytes, position) => {
                while buffer.remaining() > 0 {
                    let piece = &bytes[*position..][..buffer.remaining().min(bytes.len() - *position)];
                    buffer.put_slice(piece);
                    *position = (*position + piece.len()) % bytes.len();
                }
                Poll::Ready(Ok(()))
            }
        }
    }
}

impl AsyncWrite for End {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.log.lock().unwrap().push((self.name, bytes.len()));
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

impl Pipe for End {
    fn is_tls(&self) -> bool {
        self.tls
    }

    fn backlog(&self) -> usize {
        0
    }
}

/// Streams on this thread, which stop when this is dropped.
struct Streams {
    tasks: JoinSet<()>,
    /// What the devices of the heavy ones say goes in here.
    devices: Vec<DuplexStream>,
    shared: Shared,
    log: Log,
}

impl Streams {
    /// So many that never run out of bytes, and have moved some already. With TLS, so that one read is a slice.
    async fn start(heavy: usize) -> Self {
        Self::start_with(heavy, true).await
    }

    async fn start_with(heavy: usize, tls: bool) -> Self {
        let shared = Shared::new(64 * MIB, &Metrics::new());
        let mut streams = Self { tasks: JoinSet::new(), devices: Vec::new(), shared, log: Log::default() };
        let frames: Arc<[u8]> = Frame::binary(&pattern(60_000)).bytes().repeat(20).into();
        for name in 0..heavy {
            let log = Arc::clone(&streams.log);
            let end = move |source| End { name, source, tls, log: Arc::clone(&log) };
            let (device, far) = duplex(1024);
            streams.splice(end(Source::Endless(Arc::clone(&frames), 0)), end(Source::Now(far)));
            streams.devices.push(device);
        }
        streams.moves(heavy * 10 * MIB).await;
        streams
    }

    fn splice<IO: Pipe + Send + 'static>(&mut self, service: IO, device: IO) {
        let long = Duration::from_secs(3600);
        let limits = Limits { ping: long, silence: long, idle: long, stall: long, close: long };
        let early = [Bytes::new(), Bytes::new()];
        let mut splice = Splice::new(service, device, early, self.shared.clone(), Arc::new(limits), None);
        self.tasks.spawn(async move {
            splice.run(pin!(pending())).await;
        });
    }

    /// How many bytes the heavy ones have moved in all.
    fn moved(&self) -> usize {
        self.log.lock().unwrap().iter().map(|(_, bytes)| bytes).sum()
    }

    /// Waits until they have moved so many more.
    async fn moves(&self, bytes: usize) {
        let end = self.moved() + bytes;
        while self.moved() < end {
            yield_now().await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_message_waits_for_one_slice_however_many_streams_are_busy() {
    let mut streams = Streams::start(8).await;
    let ((mut service, near), (mut device, far)) = (duplex(1024), duplex(1024));
    streams.splice(near, far);
    for _ in 0..10 {
        streams.moves(MIB).await;
        let before = streams.moved();
        let message = Frame::binary(b"a key stroke").bytes();
        within("a message", async {
            service.write_all(&message).await.unwrap();
            device.read_exact(&mut [0; 14]).await.unwrap();
        })
        .await;
        let waited = streams.moved() - before;
        // A slice ends with the read that reaches its length.
        assert!(waited <= 2 * SLICE, "{waited} bytes of others went before it");
    }
}

#[tokio::test(start_paused = true)]
async fn what_a_busy_stream_says_the_other_way_does_not_wait_for_its_turn() {
    const ANSWER: &[u8] = b"stop";
    let mut streams = Streams::start(3).await;
    // Whoever has the turn now keeps it for longer than this test.
    for name in 0..3 {
        let before = streams.log.lock().unwrap().len();
        streams.devices[name].write_all(&Frame::binary(ANSWER).bytes()).await.unwrap();
        let answer = (name, 2 + ANSWER.len());
        while !streams.log.lock().unwrap()[before..].contains(&answer) {
            yield_now().await;
        }
        let waited: usize = streams.log.lock().unwrap()[before..].iter().map(|(_, bytes)| bytes).sum();
        assert!(waited <= 3 * SLICE, "{waited} bytes went before the answer of {name}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_busy_stream_with_a_little_to_say_all_the_time_says_it_all_the_time() {
    const ACKNOWLEDGEMENT: &[u8] = b"so far, so good";
    let mut streams = Streams::start(3).await;
    let mut devices = std::mem::take(&mut streams.devices);
    for _ in 0..50 {
        let before = streams.log.lock().unwrap().len();
        for device in &mut devices {
            device.write_all(&Frame::binary(ACKNOWLEDGEMENT).bytes()).await.unwrap();
        }
        streams.moves(3 * SLICE).await;
        let log = streams.log.lock().unwrap();
        let heard = (0..3).filter(|name| log[before..].contains(&(*name, 2 + ACKNOWLEDGEMENT.len())));
        assert_eq!(heard.count(), 3, "{:?}", &log[before..]);
    }
}

#[tokio::test(start_paused = true)]
async fn busy_streams_take_turns_in_one_order() {
    /// A turn is no longer than this.
    const TURN: Duration = Duration::from_millis(30);
    let streams = Streams::start(3).await;
    let mut turns = Vec::new();
    for _ in 0..9 {
        let before = streams.log.lock().unwrap().len();
        streams.moves(20 * SLICE).await;
        let seen = streams.log.lock().unwrap()[before..].to_vec();
        // The slice that was under way when the time was over belongs to the turn before.
        let (name, _) = seen[seen.len() - 1];
        assert!(seen.iter().skip(2).all(|(other, _)| *other == name), "{seen:?}");
        turns.push(name);
        advance(TURN).await;
    }
    assert!(turns.iter().zip(&turns[3..]).all(|(turn, later)| turn == later), "{turns:?}");
    let mut all = turns[..3].to_vec();
    all.sort_unstable();
    assert_eq!(all, [0, 1, 2], "{turns:?}");
}

#[tokio::test(start_paused = true)]
async fn reads_grow_to_a_mib_with_tls_and_to_a_quarter_of_that_without() {
    for (tls, longest) in [(true, MIB), (false, MIB / 4)] {
        let streams = Streams::start_with(1, tls).await;
        // What one read gave leaves in one write, and a part of a frame waits for the next.
        let (_, most) = *streams.log.lock().unwrap().iter().max_by_key(|(_, bytes)| *bytes).unwrap();
        assert!(most > longest / 2 && most < longest * 3 / 2, "{most} bytes at once, TLS: {tls}");
    }
}
