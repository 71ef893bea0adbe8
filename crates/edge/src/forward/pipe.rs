//! Bytes both ways between two connections, as they are.

use std::{
    cell::RefCell,
    io,
    pin::Pin,
    task::{Context, Poll},
    time::Instant,
};

use bytes::Bytes;
use midspan_platform::{clock, unsent::Unsent};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::{
    relaying::{Ended, Way, run},
    splice::{Kept, Limits, Pipe, Shared},
};

/// The most that is read at once, in bytes.
const READ_MOST: usize = 256 * 1024;

thread_local! {
    /// Where the pipes of a thread read to, one after the other.
    static SCRATCH: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Carries bytes between a leg and the edge that owns its stream, `early` ones first, until both have ended.
///
/// It is given up as [`run`] says.
pub(super) async fn pipe<Leg, Owner>(
    mut leg: Leg,
    mut owner: Owner,
    early: [Bytes; 2],
    shared: Shared,
    limits: &Limits,
) -> Ended
where
    Leg: Pipe,
    Owner: Pipe,
{
    let [from_leg, from_owner] = early;
    let mut ways = [Piped::new(from_leg, shared.clone()), Piped::new(from_owner, shared)];
    let result = run(&mut ways, limits, |[inward, outward], cx| {
        let inward = inward.poll(cx, Pin::new(&mut leg), Pin::new(&mut owner))?;
        let outward = outward.poll(cx, Pin::new(&mut owner), Pin::new(&mut leg))?;
        if inward.is_ready() && outward.is_ready() { Poll::Ready(Ok(())) } else { Poll::Pending }
    })
    .await;
    Ended { bytes: ways.map(|way| way.bytes), result }
}

/// One direction.
struct Piped {
    /// What the other side has not taken yet.
    rest: Unsent,
    kept: Kept,
    unflushed: bool,
    ended: bool,
    shut: bool,
    bytes: u64,
    /// When bytes came, or were taken, last.
    moved: Instant,
}

impl Way for Piped {
    fn is_blocked(&self) -> bool {
        self.unflushed || !self.rest.is_empty()
    }

    fn has_ended(&self) -> bool {
        self.ended
    }

    fn is_shut(&self) -> bool {
        self.shut
    }

    fn moved(&self) -> Instant {
        self.moved
    }
}

impl Piped {
    fn new(early: Bytes, shared: Shared) -> Self {
        let mut kept = Kept::new(shared);
        kept.set(early.len());
        let bytes = early.len() as u64;
        let (mut rest, moved) = (Unsent::default(), clock::now());
        rest.push(early.into());
        Self { rest, kept, unflushed: false, ended: false, shut: false, bytes, moved }
    }

    /// Moves bytes until one side is not ready. Ready once `from` has ended and `to` knows it. What `to` keeps counts as
    /// kept, too.
    fn poll<From, To>(
        &mut self,
        cx: &mut Context<'_>,
        from: Pin<&mut From>,
        mut to: Pin<&mut To>,
    ) -> Poll<io::Result<()>>
    where
        From: AsyncRead + ?Sized,
        To: Pipe + ?Sized,
    {
        let polled = self.poll_both(cx, from, to.as_mut());
        self.kept.set(self.rest.memory() + to.backlog());
        polled
    }

    fn poll_both<From, To>(
        &mut self,
        cx: &mut Context<'_>,
        mut from: Pin<&mut From>,
        mut to: Pin<&mut To>,
    ) -> Poll<io::Result<()>>
    where
        From: AsyncRead + ?Sized,
        To: AsyncWrite + ?Sized,
    {
        if self.shut {
            return Poll::Ready(Ok(()));
        }
        loop {
            std::task::ready!(self.poll_rest(cx, to.as_mut()))?;
            if self.ended {
                std::task::ready!(to.poll_shutdown(cx))?;
                self.shut = true;
                return Poll::Ready(Ok(()));
            }
            std::task::ready!(self.poll_move(cx, from.as_mut(), to.as_mut()))?;
        }
    }

    /// Writes what was left.
    fn poll_rest<To>(&mut self, cx: &mut Context<'_>, mut to: Pin<&mut To>) -> Poll<io::Result<()>>
    where
        To: AsyncWrite + ?Sized,
    {
        while !self.rest.is_empty() {
            std::task::ready!(self.rest.poll_write(to.as_mut(), cx))?;
            self.moved = clock::now();
            self.unflushed = true;
        }
        if self.unflushed {
            std::task::ready!(to.poll_flush(cx))?;
            self.unflushed = false;
        }
        Poll::Ready(Ok(()))
    }

    /// Reads once, and writes what that gave. What is not taken stays here.
    fn poll_move<From, To>(
        &mut self,
        cx: &mut Context<'_>,
        from: Pin<&mut From>,
        to: Pin<&mut To>,
    ) -> Poll<io::Result<()>>
    where
        From: AsyncRead + ?Sized,
        To: AsyncWrite + ?Sized,
    {
        SCRATCH.with_borrow_mut(|scratch| {
            if scratch.is_empty() {
                scratch.resize(READ_MOST, 0);
            }
            let most = self.kept.shared().read_size().min(READ_MOST);
            let mut buffer = ReadBuf::new(&mut scratch[..most]);
            std::task::ready!(from.poll_read(cx, &mut buffer))?;
            let read = buffer.filled();
            self.moved = clock::now();
            if read.is_empty() {
                self.ended = true;
                return Poll::Ready(Ok(()));
            }
            self.bytes += read.len() as u64;
            let taken = match to.poll_write(cx, read)? {
                Poll::Ready(taken) => taken,
                Poll::Pending => 0,
            };
            self.unflushed = true;
            if taken < read.len() {
                self.rest.append(&read[taken..]);
            }
            Poll::Ready(Ok(()))
        })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use midspan_platform::metrics::Metrics;
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex},
        task::JoinSet,
    };

    use super::*;

    const MIB: usize = 1024 * 1024;

    fn limits() -> Limits {
        let minute = Duration::from_secs(60);
        Limits { ping: minute, silence: minute, idle: minute, stall: 10 * minute, close: minute }
    }

    struct Piped {
        leg: DuplexStream,
        owner: DuplexStream,
        shared: Shared,
        ended: JoinSet<Ended>,
    }

    fn piped(room: usize, early: [&'static str; 2]) -> Piped {
        piped_within(room, early, limits())
    }

    fn piped_within(room: usize, early: [&'static str; 2], limits: Limits) -> Piped {
        let shared = Shared::new(16 * MIB, &Metrics::new());
        let ((leg, leg_here), (owner, owner_here)) = (duplex(room), duplex(room));
        let (share, early) = (shared.clone(), early.map(|text| Bytes::from_static(text.as_bytes())));
        let mut ended = JoinSet::new();
        ended.spawn(async move { pipe(leg_here, owner_here, early, share, &limits).await });
        Piped { leg, owner, shared, ended }
    }

    #[tokio::test]
    async fn bytes_go_both_ways_early_ones_first_and_ends_are_passed_on() {
        let Piped { mut leg, mut owner, mut ended, .. } = piped(64, ["in-", "out-"]);
        let data: Vec<u8> = (0..=250).cycle().take(MIB).collect();
        let exchange = async |end: DuplexStream| {
            let (mut read, mut write) = tokio::io::split(end);
            let send = async {
                write.write_all(&data).await.unwrap();
                write.shutdown().await.unwrap();
            };
            let mut got = Vec::new();
            let (_, ()) = tokio::join!(read.read_to_end(&mut got), send);
            got
        };
        let mut start = [0; 4];
        leg.read_exact(&mut start).await.unwrap();
        assert_eq!(&start, b"out-");
        owner.read_exact(&mut start[..3]).await.unwrap();
        assert_eq!(&start[..3], b"in-");
        let (at_leg, at_owner) = tokio::join!(exchange(leg), exchange(owner));
        assert!(at_leg == data && at_owner == data);
        let ended = ended.join_next().await.unwrap().unwrap();
        ended.result.unwrap();
        assert_eq!(ended.bytes, [MIB as u64 + 3, MIB as u64 + 4]);
    }

    #[tokio::test]
    async fn a_side_that_is_gone_ends_the_other() {
        let Piped { mut leg, owner, mut ended, .. } = piped(64, ["", ""]);
        drop(owner);
        let mut rest = Vec::new();
        leg.read_to_end(&mut rest).await.unwrap();
        assert!(rest.is_empty());
        drop(leg);
        drop(ended.join_next().await.unwrap().unwrap());
    }

    #[tokio::test]
    async fn what_is_kept_for_a_side_that_takes_nothing_counts_in_the_budget() {
        let Piped { mut leg, owner, shared, mut ended } = piped(64, ["", ""]);
        let before = shared.read_size();
        let filled = tokio::time::timeout(Duration::from_millis(50), leg.write_all(&vec![1; MIB])).await;
        assert!(filled.is_err(), "nobody takes it");
        assert!(shared.read_size() < before, "what waits is counted");
        drop((leg, owner));
        assert!(ended.join_next().await.unwrap().unwrap().result.is_err());
        assert_eq!(shared.read_size(), before);
    }

    /// What TLS is to a socket that takes nothing: it takes a write, and keeps it.
    struct Keeper(usize);

    impl AsyncRead for Keeper {
        fn poll_read(self: Pin<&mut Self>, _: &mut Context<'_>, _: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
            Poll::Pending
        }
    }

    impl AsyncWrite for Keeper {
        fn poll_write(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            bytes: &[u8],
        ) -> Poll<io::Result<usize>> {
            self.0 += bytes.len();
            Poll::Ready(Ok(bytes.len()))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Pending
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Pending
        }
    }

    impl Pipe for Keeper {
        fn is_tls(&self) -> bool {
            true
        }

        fn backlog(&self) -> usize {
            self.0
        }
    }

    #[tokio::test]
    async fn what_a_side_keeps_itself_counts_in_the_budget() {
        let shared = Shared::new(16 * MIB, &Metrics::new());
        let before = shared.read_size();
        let (mut leg, leg_here) = duplex(MIB);
        leg.write_all(&vec![1; MIB]).await.unwrap();
        let mut ended = JoinSet::new();
        let share = shared.clone();
        ended.spawn(async move {
            pipe(leg_here, Keeper(0), [Bytes::new(), Bytes::new()], share, &limits()).await
        });
        let counted = async {
            while shared.read_size() == before {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), counted).await.expect("what it keeps is counted");
        ended.shutdown().await;
        assert_eq!(shared.read_size(), before);
    }

    #[tokio::test]
    async fn an_owner_that_says_nothing_is_given_up() {
        let short = Limits { silence: Duration::from_millis(40), ..limits() };
        let Piped { leg, owner, mut ended, .. } = piped_within(64, ["", ""], short);
        assert_eq!(
            ended.join_next().await.unwrap().unwrap().result.unwrap_err().kind(),
            io::ErrorKind::TimedOut
        );
        drop((leg, owner));
    }

    #[tokio::test]
    async fn a_side_that_does_not_end_after_the_other_is_not_waited_for() {
        let short = Limits { close: Duration::ZERO, ..limits() };
        let Piped { leg, owner, mut ended, .. } = piped_within(64, ["", ""], short);
        drop(owner);
        // The leg hears of the end, and says nothing: FAREWELL is over some seconds later.
        assert_eq!(
            ended.join_next().await.unwrap().unwrap().result.unwrap_err().kind(),
            io::ErrorKind::TimedOut
        );
        drop(leg);
    }

    #[tokio::test]
    async fn a_leg_that_takes_nothing_is_given_up() {
        let short = Limits { stall: Duration::from_millis(40), ..limits() };
        let Piped { leg, mut owner, mut ended, .. } = piped_within(64, ["", ""], short);
        let sent =
            tokio::time::timeout(Duration::from_secs(20), owner.write_all(&vec![1; MIB])).await.unwrap();
        assert!(sent.is_err(), "nobody takes it");
        assert_eq!(
            ended.join_next().await.unwrap().unwrap().result.unwrap_err().kind(),
            io::ErrorKind::TimedOut
        );
        drop(leg);
    }
}
