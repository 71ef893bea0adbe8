//! A relay, its clients and their raw sockets, as real processes and real connections on the loopback interface.
//!
//! Everything here panics with a message when it fails or takes too long: it is for tests only. What a test starts is ended
//! when its handle is dropped.
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::missing_panics_doc,
    clippy::wildcard_enum_match_arm,
    clippy::disallowed_methods,
    reason = "a test fails by a panic, and lives by the clock"
)]

mod api;
mod fleet;
mod flow;
mod frame;
mod kubernetes;
mod leg;
mod link;
mod metrics;
mod midspan;
mod opener;
mod process;
mod random;
mod redis;
mod relay;
mod resources;
mod socket;
mod wire;

use std::{
    future::Future,
    time::{Duration, SystemTime},
};

pub use api::{Answer, ServiceApi};
pub use fleet::{Devices, End, Entrances, Failure, Flags, Fleet, Member, Rolled, Seen, Session};
pub use flow::{FlowLeg, FlowReader, FlowWriter, Incoming};
pub use frame::Frame;
pub use kubernetes::{ApiServer, Asked, Mood, conditions};
pub use leg::{Joined, Leg, RawLeg};
pub use link::{Bye, DeviceLink};
pub use metrics::Metrics;
pub use midspan::Midspan;
use midspan_core::time::UnixTime;
pub use opener::Opener;
pub use process::{Process, binary};
pub use random::{Message, Random, Script};
pub use redis::{RedisCluster, RedisSentinels, RedisServer};
pub use relay::{Handshake, Relay, admin, listening};
pub use resources::need_files;
pub use socket::{Dial, Socket};
pub use wire::{Io, Target, Upgraded, trusting};

/// How long anything may take that should happen at once, on a machine that is busy.
pub const DEADLINE: Duration = Duration::from_secs(10);

/// Waits for `future`, and fails the test when that takes longer than [`DEADLINE`].
pub async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    let result = tokio::time::timeout(DEADLINE, Box::pin(future)).await;
    result.unwrap_or_else(|_| panic!("{what}: not within {DEADLINE:?}"))
}

/// Asks again and again until the answer is yes, and fails the test when it is still no after [`DEADLINE`].
pub async fn eventually<Check: Future<Output = bool>>(what: &str, mut check: impl FnMut() -> Check) {
    until(what, || {
        let answer = check();
        async { answer.await.then_some(()) }
    })
    .await;
}

/// Asks again and again until there is an answer, and fails the test when there is none after [`DEADLINE`].
pub async fn until<T, Check: Future<Output = Option<T>>>(what: &str, mut check: impl FnMut() -> Check) -> T {
    within(what, async {
        loop {
            if let Some(answer) = Box::pin(check()).await {
                return answer;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await
}

/// The time now.
pub fn now() -> UnixTime {
    UnixTime(SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs())
}

/// `length` bytes without a period that a buffer's size would divide, so that loss, repetition and exchange show.
pub fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|index| ((index * 31) ^ (index >> 8) ^ (index >> 16)).to_le_bytes()[0]).collect()
}
