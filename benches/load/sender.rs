//! The half of the generator that sends.

use std::{io::ErrorKind, time::Duration};

use anyhow::{Context as _, Result, ensure};

use crate::{
    clock,
    connection::Connection,
    frames::Pattern,
    number::count,
    poller::{Poller, Until},
    receiver::Progress,
};

/// Writes of one stream in a row, when each holds one small frame.
const UNBATCHED_TURN: usize = 64;
const WAIT: Duration = Duration::from_millis(20);
/// A relay that takes nothing for so long at the end does not work.
const END: Duration = Duration::from_secs(30);

/// Sends frames on all connections until it is to stop, each to the end of a frame. The messages sent on each.
pub(crate) fn run(
    connections: &mut [Connection],
    pattern: &Pattern,
    batched: bool,
    progress: &Progress,
) -> Result<Vec<u64>> {
    let mut poller = Poller::new(connections, Until::Writable)?;
    let mut streams: Vec<Stream> = connections.iter().map(|_| Stream::default()).collect();
    while !progress.is_stopped() {
        for place in poller.wait(WAIT)? {
            let turn = if batched { 1 } else { UNBATCHED_TURN };
            for _ in 0..turn {
                if !streams[place].send(&mut connections[place], pattern, batched)? {
                    break;
                }
            }
        }
    }
    finish(connections, &mut streams, pattern, progress)?;
    Ok(streams.iter().map(|stream| stream.sent / count(pattern.frame())).collect())
}

/// Ends every stream between two frames, unless that is abandoned.
fn finish(
    connections: &mut [Connection],
    streams: &mut [Stream],
    pattern: &Pattern,
    progress: &Progress,
) -> Result<()> {
    let mut poller = Poller::new(connections, Until::Writable)?;
    let (mut left, end) = (connections.len(), clock::now() + END);
    while left > 0 && !progress.is_abandoned() {
        ensure!(clock::now() < end, "the relay takes no more");
        let ready: Vec<_> = poller.wait(WAIT)?.collect();
        for place in ready {
            let (stream, connection) = (&mut streams[place], &mut connections[place]);
            if stream.position % pattern.frame() != 0 {
                stream.send(connection, pattern, false)?;
            } else if connection.flush()? {
                poller.forget(connection)?;
                left -= 1;
            }
        }
    }
    Ok(())
}

#[derive(Debug, Default)]
struct Stream {
    position: usize,
    sent: u64,
}

impl Stream {
    /// One write; whether all of it was taken.
    fn send(&mut self, connection: &mut Connection, pattern: &Pattern, batched: bool) -> Result<bool> {
        let bytes = pattern.bytes();
        let end = if batched { bytes.len() } else { (self.position / pattern.frame() + 1) * pattern.frame() };
        match connection.send(&bytes[self.position..end]) {
            Ok(taken) => {
                self.sent += count(taken);
                self.position += taken;
                let all = self.position == end;
                self.position %= bytes.len();
                Ok(all)
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(error).context("the relay takes no more"),
        }
    }
}
