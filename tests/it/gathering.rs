//! A stream that brings much, alone on its thread: it is waited for, and nothing of it stays behind. Time stands still while
//! anything moves.

use std::{
    collections::VecDeque,
    io,
    pin::{Pin, pin},
    sync::{Arc, Mutex},
    task::{Context, Poll, Waker},
    time::Duration,
};

use bytes::Bytes;
use midspan_edge::splice::{Limits, Pipe, Shared, Splice};
use midspan_platform::metrics::Metrics;
use testkit::{Frame, pattern};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    task::{JoinSet, yield_now},
    time::sleep,
};

const MIB: usize = 1024 * 1024;

/// A stream that brought so much is surely waited for.
const MUCH: usize = 20 * MIB;

/// A socket with a low-water mark, as the kernel has them: a reader that found it empty is woken at the mark.
#[derive(Clone, Default)]
struct Socket(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    incoming: VecDeque<u8>,
    /// Whether a read is worth while.
    ready: bool,
    reader: Option<Waker>,
    /// All the marks that were set, in order.
    marks: Vec<usize>,
    /// How many bytes were written to it.
    taken: usize,
}

impl State {
    fn look(&mut self) {
        self.ready |= self.incoming.len() >= self.marks.last().copied().unwrap_or(1);
        if self.ready
            && let Some(reader) = self.reader.take()
        {
            reader.wake();
        }
    }
}

impl Socket {
    fn deliver(&self, bytes: &[u8]) {
        let mut state = self.0.lock().unwrap();
        state.incoming.extend(bytes);
        state.look();
    }

    fn marks(&self) -> Vec<usize> {
        self.0.lock().unwrap().marks.clone()
    }

    fn taken(&self) -> usize {
        self.0.lock().unwrap().taken
    }

    /// Lets everything go on that can without time passing, and says how many bytes were written to it.
    async fn taken_now(&self) -> usize {
        for _ in 0..100 {
            yield_now().await;
        }
        self.taken()
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let mut state = self.0.lock().unwrap();
        if !state.ready {
            state.reader = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let length = buffer.remaining().min(state.incoming.len());
        let bytes: Vec<u8> = state.incoming.drain(..length).collect();
        buffer.put_slice(&bytes);
        state.ready = !state.incoming.is_empty();
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.0.lock().unwrap().taken += bytes.len();
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

impl Pipe for Socket {
    fn is_tls(&self) -> bool {
        false
    }

    fn backlog(&self) -> usize {
        0
    }

    fn set_low_water(&self, bytes: usize) -> bool {
        let mut state = self.0.lock().unwrap();
        state.marks.push(bytes);
        state.look();
        true
    }
}

/// A stream on this thread, which ends when `tasks` is dropped.
fn stream(tasks: &mut JoinSet<()>) -> (Socket, Socket) {
    let (service, device) = (Socket::default(), Socket::default());
    let long = Duration::from_secs(3600);
    let limits = Limits { ping: long, silence: long, idle: long, stall: long, close: long };
    let shared = Shared::new(64 * MIB, &Metrics::new());
    let early = [Bytes::new(), Bytes::new()];
    let mut splice = Splice::new(service.clone(), device.clone(), early, shared, Arc::new(limits), None);
    tasks.spawn(async move {
        let ending = splice.run(pin!(std::future::pending())).await;
        splice.finish(ending).await;
    });
    (service, device)
}

/// The service sends so many bytes, in pieces, and `meanwhile` happens after each; says how many bytes the device is to get.
async fn bring(service: &Socket, device: &Socket, bytes: usize, meanwhile: impl AsyncFn()) -> usize {
    let piece = Frame::binary(&pattern(60_000)).bytes().repeat(10);
    let (start, mut sent) = (device.taken_now().await, 0);
    while sent < bytes {
        service.deliver(&piece);
        sent += piece.len();
        // What does not come together comes later.
        sleep(Duration::from_millis(3)).await;
        meanwhile().await;
    }
    // Without its mask, each frame is shorter.
    start + sent - sent / piece.len() * 10 * 4
}

#[tokio::test(start_paused = true)]
async fn what_is_less_than_the_mark_is_fetched_when_the_wait_is_over() {
    let mut tasks = JoinSet::new();
    let (service, device) = stream(&mut tasks);
    let brought = bring(&service, &device, MUCH, async || {}).await;
    assert_eq!(device.taken_now().await, brought);
    let marks = service.marks();
    assert!(marks.len() >= 2 && marks[0] > MIB, "it was never waited for: {marks:?}");
    assert_eq!(marks.last(), Some(&1), "nothing came, and it is still waited for");
}

#[tokio::test(start_paused = true)]
async fn a_leg_that_is_waited_for_is_read_at_the_mark_at_once() {
    let mut tasks = JoinSet::new();
    let (service, device) = stream(&mut tasks);
    let brought = waited_for(&service, &device).await;
    let mark = service.marks()[0];
    // A frame is no longer than that which is held until it is whole; what is under the mark waits.
    let frame = Frame::binary(&pattern(60_000)).bytes();
    let mut sent = 0;
    while sent + frame.len() < mark {
        service.deliver(&frame);
        sent += frame.len();
        assert_eq!(device.taken_now().await, brought, "{sent} of {mark}");
    }
    service.deliver(&frame);
    sent += frame.len();
    assert_eq!(device.taken_now().await, brought + sent - sent / frame.len() * 4);
}

/// Brings much at once, so that the service's leg is waited for now; says how many bytes the device has.
async fn waited_for(service: &Socket, device: &Socket) -> usize {
    service.deliver(&Frame::binary(&pattern(60_000)).bytes().repeat(MUCH / 60_000));
    let taken = device.taken_now().await;
    assert_eq!(service.marks().len(), 1);
    taken
}

#[tokio::test(start_paused = true)]
async fn a_leg_is_not_waited_for_while_anybody_else_on_the_thread_is_heard() {
    let mut tasks = JoinSet::new();
    let (service, device) = stream(&mut tasks);
    let (other, _far) = stream(&mut tasks);
    let said = Frame::binary(b"a key stroke").bytes();
    bring(&service, &device, MUCH, async || {
        other.deliver(&said);
        other.taken_now().await;
    })
    .await;
    assert!(service.marks().is_empty());
    // Nor while it is answered.
    bring(&service, &device, MUCH, async || {
        device.deliver(&said);
        device.taken_now().await;
    })
    .await;
    assert!(service.marks().is_empty());
}

#[tokio::test(start_paused = true)]
async fn at_the_end_of_a_stream_each_byte_counts_again() {
    let mut tasks = JoinSet::new();
    let (service, device) = stream(&mut tasks);
    waited_for(&service, &device).await;
    device.deliver(&Frame::close(1000, "bye").bytes());
    device.taken_now().await;
    assert_eq!(service.marks().last(), Some(&1));
    // The answer to the close frame is read, little as it is.
    service.deliver(&Frame::close(1000, "").bytes());
    service.taken_now().await;
    assert_eq!(service.0.lock().unwrap().incoming.len(), 0);
}
