//! Bytes both ways between two sockets, which stay in the kernel (splice(2)).
//!
//! Between two sockets there must be a pipe. A direction has one only while bytes are in it: a quiet connection costs its two
//! sockets, and a thread's pipes are used by all of its connections.

use std::{
    cell::RefCell,
    io,
    os::fd::OwnedFd,
    task::{Context, Poll, ready},
    time::Instant,
};

use midspan_platform::clock;
use rustix::{
    net::{Shutdown, shutdown},
    pipe::{PipeFlags, SpliceFlags, pipe_with, splice},
};
use tokio::{io::Interest, net::TcpStream};

use crate::{
    relaying::{Ended, Way, run},
    splice::Limits,
};

/// The most that is moved at once, in bytes: what a pipe holds, unless the system says otherwise.
const MOST: usize = 64 * 1024;

/// How many empty pipes a thread keeps.
const SPARE: usize = 16;

const FLAGS: SpliceFlags = SpliceFlags::MOVE.union(SpliceFlags::NONBLOCK);

thread_local! {
    static PIPES: RefCell<Vec<Pipe>> = const { RefCell::new(Vec::new()) };
}

/// Carries bytes between a client and the edge that its connection is for, until both have ended.
///
/// The owner judges the connection, and pings its legs: so the same times count as for a forwarded leg.
pub(super) async fn carry(client: &TcpStream, owner: &TcpStream, limits: &Limits) -> Ended {
    let mut ways = [Spliced::new(client, owner), Spliced::new(owner, client)];
    let result = run(&mut ways, limits, |[inward, outward], cx| {
        let (inward, outward) = (inward.poll(cx)?, outward.poll(cx)?);
        if inward.is_ready() && outward.is_ready() { Poll::Ready(Ok(())) } else { Poll::Pending }
    })
    .await;
    Ended { bytes: ways.map(|way| way.bytes), result }
}

/// One direction.
struct Spliced<'a> {
    from: &'a TcpStream,
    to: &'a TcpStream,
    /// With the bytes that the other side has not taken yet.
    held: Option<(Pipe, usize)>,
    ended: bool,
    shut: bool,
    bytes: u64,
    moved: Instant,
}

impl Way for Spliced<'_> {
    fn is_blocked(&self) -> bool {
        self.held.is_some()
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

impl<'a> Spliced<'a> {
    fn new(from: &'a TcpStream, to: &'a TcpStream) -> Self {
        Self { from, to, held: None, ended: false, shut: false, bytes: 0, moved: clock::now() }
    }

    /// Moves bytes until one side is not ready. Ready once `from` has ended and `to` knows it.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.shut {
            return Poll::Ready(Ok(()));
        }
        loop {
            ready!(self.poll_out(cx))?;
            if self.ended {
                shutdown(self.to, Shutdown::Write)?;
                self.shut = true;
                return Poll::Ready(Ok(()));
            }
            ready!(self.from.poll_read_ready(cx))?;
            self.take_in()?;
        }
    }

    /// Empties the pipe.
    fn poll_out(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while let Some((pipe, held)) = &mut self.held {
            let out = || Ok(splice(&pipe.read, None, self.to, None, *held, FLAGS)?);
            match self.to.try_io(Interest::WRITABLE, out) {
                Ok(0) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Ok(count) => {
                    *held -= count;
                    self.moved = clock::now();
                    if *held == 0
                        && let Some((pipe, _)) = self.held.take()
                    {
                        pipe.put_back();
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    ready!(self.to.poll_write_ready(cx))?;
                }
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Fills an empty pipe with what has come.
    fn take_in(&mut self) -> io::Result<()> {
        let pipe = Pipe::take()?;
        let taken = self
            .from
            .try_io(Interest::READABLE, || Ok(splice(self.from, None, &pipe.write, None, MOST, FLAGS)?));
        match taken {
            Ok(0) => self.ended = true,
            Ok(count) => {
                self.moved = clock::now();
                self.bytes += count as u64;
                self.held = Some((pipe, count));
                return Ok(());
            }
            // The pipe is empty, so it is the socket that has nothing.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
        pipe.put_back();
        Ok(())
    }
}

struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
}

impl Pipe {
    fn take() -> io::Result<Self> {
        if let Some(pipe) = PIPES.with_borrow_mut(Vec::pop) {
            return Ok(pipe);
        }
        let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        Ok(Self { read, write })
    }

    /// Gives an empty pipe to whoever needs one next.
    fn put_back(self) {
        PIPES.with_borrow_mut(|pipes| {
            if pipes.len() < SPARE {
                pipes.push(self);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpListener,
        task::JoinSet,
    };

    use super::*;

    const MIB: usize = 1024 * 1024;

    fn limits() -> Limits {
        let minute = Duration::from_secs(60);
        Limits { ping: minute, silence: minute, idle: minute, stall: minute, close: minute }
    }

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        (near, listener.accept().await.unwrap().0)
    }

    /// A client and an owner with the splice between them.
    async fn spliced(limits: Limits) -> (TcpStream, TcpStream, JoinSet<Ended>) {
        let ((client, here), (owner, there)) = (pair().await, pair().await);
        let mut ended = JoinSet::new();
        ended.spawn(async move { carry(&here, &there, &limits).await });
        (client, owner, ended)
    }

    async fn end(mut ended: JoinSet<Ended>) -> Ended {
        let joined = tokio::time::timeout(Duration::from_secs(30), ended.join_next()).await;
        joined.unwrap().unwrap().unwrap()
    }

    #[tokio::test]
    async fn an_end_of_one_direction_leaves_the_other_one_open() {
        let (mut client, mut owner, ended) = spliced(limits()).await;
        client.write_all(b"question").await.unwrap();
        client.shutdown().await.unwrap();
        let mut question = String::new();
        owner.read_to_string(&mut question).await.unwrap();
        assert_eq!(question, "question");
        // Much more than any buffer on the way, while nobody reads.
        let answer: Vec<u8> = (0..8 * MIB).map(|at| (at ^ (at >> 9)).to_le_bytes()[0]).collect();
        let mut read = Vec::new();
        let write = async {
            owner.write_all(&answer).await.unwrap();
            owner.shutdown().await.unwrap();
        };
        let late_read = async {
            tokio::time::sleep(Duration::from_millis(100)).await;
            client.read_to_end(&mut read).await.unwrap();
        };
        tokio::join!(write, late_read);
        assert!(read == answer, "other bytes came out, {} of {}", read.len(), answer.len());
        let ended = end(ended).await;
        assert!(ended.result.is_ok(), "{ended:?}");
        assert_eq!(ended.bytes, [8, 8 * MIB as u64]);
    }

    #[tokio::test]
    async fn pipes_are_used_again_and_never_hold_what_is_not_theirs() {
        let mut all = Vec::new();
        for _ in 0..8 {
            all.push(spliced(limits()).await);
        }
        for round in 0..50u8 {
            for (at, (client, owner, _)) in all.iter_mut().enumerate() {
                let said = [round, u8::try_from(at).unwrap()];
                client.write_all(&said).await.unwrap();
                let mut heard = [0; 2];
                owner.read_exact(&mut heard).await.unwrap();
                assert_eq!(heard, said);
            }
        }
        // A quiet connection has none.
        let pipes = PIPES.with_borrow(Vec::len);
        assert!((1..=SPARE).contains(&pipes), "{pipes} pipes");
    }

    #[tokio::test]
    async fn a_reset_ends_both_sides() {
        let (client, mut owner, ended) = spliced(limits()).await;
        owner.write_all(b"x").await.unwrap();
        client.set_zero_linger().unwrap();
        drop(client);
        assert!(end(ended).await.result.is_err());
        let read = owner.read(&mut [0; 16]).await;
        assert!(matches!(read, Ok(0) | Err(_)), "{read:?}");
    }

    #[tokio::test]
    async fn who_takes_nothing_says_nothing_or_never_ends_is_given_up() {
        let short = Duration::from_millis(200);
        let (client, mut owner, stalled) = spliced(Limits { stall: short, ..limits() }).await;
        let flood = async { while owner.write_all(&vec![0; MIB]).await.is_ok() {} };
        let (ended, ()) = tokio::join!(end(stalled), flood);
        assert_eq!(ended.result.unwrap_err().kind(), io::ErrorKind::TimedOut);
        drop(client);

        let (mut client, owner, silent) = spliced(Limits { silence: short, ..limits() }).await;
        client.write_all(b"is anybody there").await.unwrap();
        assert_eq!(end(silent).await.result.unwrap_err().kind(), io::ErrorKind::TimedOut);
        drop((client, owner));

        let (mut client, owner, late) = spliced(Limits { close: short, ..limits() }).await;
        client.shutdown().await.unwrap();
        assert_eq!(end(late).await.result.unwrap_err().kind(), io::ErrorKind::TimedOut);
        drop(owner);
    }
}
