//! Relays that know nothing but bytes: each accepted connection leads to one address.

use std::{
    cell::RefCell,
    io,
    net::SocketAddr,
    os::fd::{AsFd, OwnedFd},
};

use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};
use tokio::{
    io::Interest,
    net::{TcpListener, TcpStream},
};
use tokio_util::task::TaskTracker;

/// How bytes get from one socket to the other.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Copy {
    Splice,
    Scratch,
    Bidirectional,
}

/// What one read takes at most, and what an unprivileged process may ask of a pipe.
const CHUNK: usize = 1 << 20;

thread_local! {
    static SCRATCH: RefCell<Vec<u8>> = RefCell::new(vec![0; CHUNK]);
}

pub(crate) async fn serve(listener: TcpListener, to: SocketAddr, copy: Copy) -> anyhow::Result<()> {
    let tasks = TaskTracker::new();
    loop {
        let (near, _) = listener.accept().await?;
        tasks.spawn(async move {
            // A stream that breaks has ended; nobody waits for its result.
            let _ = relay(near, to, copy).await;
        });
    }
}

async fn relay(mut near: TcpStream, to: SocketAddr, copy: Copy) -> io::Result<()> {
    let mut far = TcpStream::connect(to).await?;
    near.set_nodelay(true)?;
    far.set_nodelay(true)?;
    match copy {
        Copy::Splice => tokio::try_join!(splice_all(&near, &far), splice_all(&far, &near)).map(drop),
        Copy::Scratch => tokio::try_join!(copy_all(&near, &far), copy_all(&far, &near)).map(drop),
        Copy::Bidirectional => tokio::io::copy_bidirectional(&mut near, &mut far).await.map(drop),
    }
}

async fn splice_all(from: &TcpStream, to: &TcpStream) -> io::Result<()> {
    // Made when the first byte comes, so that a stream that was never used keeps no pipe.
    from.readable().await?;
    let (out, into) = pipe()?;
    loop {
        from.readable().await?;
        let read = from.try_io(Interest::READABLE, || move_bytes(from, &into, CHUNK));
        let mut left = match read {
            Ok(0) => return shut(to),
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(error) => return Err(error),
        };
        while left > 0 {
            match to.try_io(Interest::WRITABLE, || move_bytes(&out, to, left)) {
                Ok(length) => left -= length,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => to.writable().await?,
                Err(error) => return Err(error),
            }
        }
    }
}

fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let (out, into) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
    fcntl_setpipe_size(&into, CHUNK)?;
    Ok((out, into))
}

fn move_bytes(from: impl AsFd, to: impl AsFd, most: usize) -> io::Result<usize> {
    Ok(splice(from, None, to, None, most, SpliceFlags::MOVE | SpliceFlags::NONBLOCK)?)
}

async fn copy_all(from: &TcpStream, to: &TcpStream) -> io::Result<()> {
    loop {
        from.readable().await?;
        // What the other socket does not take at once leaves the scratch, so that other streams can have it.
        let rest = SCRATCH.with_borrow_mut(|scratch| {
            let length = match from.try_read(scratch) {
                Ok(0) => return Ok(None),
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Some(Vec::new())),
                Err(error) => return Err(error),
            };
            let mut written = 0;
            while written < length {
                match to.try_write(&scratch[written..length]) {
                    Ok(more) => written += more,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) => return Err(error),
                }
            }
            Ok(Some(scratch[written..length].to_vec()))
        })?;
        match rest {
            None => return shut(to),
            Some(rest) => write_all(to, &rest).await?,
        }
    }
}

async fn write_all(to: &TcpStream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        to.writable().await?;
        match to.try_write(bytes) {
            Ok(length) => bytes = &bytes[length..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn shut(socket: &TcpStream) -> io::Result<()> {
    Ok(rustix::net::shutdown(socket, rustix::net::Shutdown::Write)?)
}
