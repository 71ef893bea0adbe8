//! One WebSocket of a stream, before it is joined and when it is told to go.

use std::{io, time::Duration};

use bytes::Bytes;
use midspan_core::{
    close::CloseReason,
    frame::{CloseFrame, Opcode, put_close, put_frame},
    id::Role,
};
use midspan_platform::{listener::Connection, metrics::Counted};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    runtime::{self, Handle},
    sync::oneshot,
    time::{Instant, timeout},
};

use tokio_util::sync::CancellationToken;

use crate::pairing::Place;

/// An open WebSocket of one end.
#[derive(Debug)]
pub struct Leg {
    /// The connection, from which nothing has been read but [`Leg::early`].
    pub io: Connection,
    /// What came along with the upgrade request.
    pub early: Bytes,
    /// Whose leg it is.
    pub role: Role,
    /// Counts it while it is open.
    pub counted: Counted,
    /// The runtime that waits for its connection.
    pub home: runtime::Id,
}

impl Leg {
    /// Its connection, which the runtime of the caller waits for from here on.
    pub fn settle(self) -> io::Result<(Connection, Bytes, Counted)> {
        let here = self.home == Handle::current().id();
        let io = if here { self.io } else { self.io.rehome()? };
        Ok((io, self.early, self.counted))
    }
}

/// How waiting for the other leg ended.
#[derive(Debug)]
pub enum Waited {
    /// The other leg is here.
    Joined(Leg, Leg),
    /// The stream is over.
    Ended(Leg, CloseReason),
    /// This leg went away.
    Gone,
    /// The process stops.
    Stopped(Leg),
}

/// How often a waiting leg is looked at. Its end cannot wake us while early data lies unread.
const LOOK: Duration = Duration::from_millis(250);

/// How long one ping may take to be written; more means that the network is gone.
const PING_WRITE: Duration = Duration::from_secs(5);

/// How long a leg that is told to go may take to hear it, when nothing is owed to it; and to end its connection.
pub(crate) const FAREWELL: Duration = Duration::from_secs(5);

/// Keeps a leg until the other one comes. It is not read, but pinged, and its end is noticed all the same.
pub async fn wait(
    mut leg: Leg,
    mut other: oneshot::Receiver<Leg>,
    place: &mut Place,
    ping: Duration,
    stopped: &CancellationToken,
) -> Waited {
    let mut next_ping = Instant::now() + ping;
    loop {
        tokio::select! {
            biased;
            handed_over = &mut other => return match handed_over {
                Ok(other) => Waited::Joined(leg, other),
                Err(_) => Waited::Ended(leg, CloseReason::RelayFailed),
            },
            reason = place.ended() => return Waited::Ended(leg, reason),
            () = stopped.cancelled() => return Waited::Stopped(leg),
            () = tokio::time::sleep(LOOK) => {}
        }
        let alive = !leg.io.is_read_closed() && (Instant::now() < next_ping || send_ping(&mut leg.io).await);
        if Instant::now() >= next_ping {
            next_ping = Instant::now() + ping;
        }
        if !alive {
            if place.leave() {
                return Waited::Gone;
            }
            // The other leg was handed over just now: the stream is joined, and its splice will see this end.
            return match other.await {
                Ok(other) => Waited::Joined(leg, other),
                Err(_) => Waited::Gone,
            };
        }
    }
}

/// Tells a leg that its stream is over, and why.
pub async fn dismiss(mut leg: Leg, reason: CloseReason) {
    let mut farewell = Vec::new();
    let text = reason.close_text();
    put_close(&mut farewell, CloseFrame { code: Some(reason.close_code_for(leg.role)), text: &text });
    let told = async {
        leg.io.write_all(&farewell).await?;
        leg.io.flush().await?;
        leg.io.shutdown().await?;
        // Read until the peer ends its own direction, so that no reset eats what was sent last.
        let mut sink = vec![0; 4096];
        while leg.io.read(&mut sink).await? > 0 {}
        io::Result::Ok(())
    };
    // A leg that does not listen is dropped all the same.
    let _ = timeout(FAREWELL, told).await;
}

async fn send_ping(io: &mut Connection) -> bool {
    let mut ping = Vec::new();
    put_frame(&mut ping, Opcode::Ping, true, b"");
    let sent = async {
        io.write_all(&ping).await?;
        io.flush().await
    };
    matches!(timeout(PING_WRITE, sent).await, Ok(Ok(())))
}
