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
