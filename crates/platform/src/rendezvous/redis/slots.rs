//! How many streams a service, and all of them, may still open, without a shared key in the path of an initiation.
//!
//! A process takes slots of a limit in blocks, ahead of need, and gives each new stream one of them. Whoever records the end
//! of a stream gives its slot back. What was taken and given back is told to the store some times a second.
//!
//! A limit is never exceeded by what is told: slots in blocks count as taken. So a service may be refused early, by at most
//! one block (a 64th of the limit, at most 64) for each other process that has opened streams under it within the last second.
//! What a process has not told when it is killed, or when the store fails, is missing from the number of streams, or too
//! much in it: at most a block again, until the streams themselves are counted. That happens each minute, when the number is
//! only raised, and before somebody is refused, when it is put right: but for streams that are being recorded at that moment.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use futures_util::future::{join_all, try_join_all};
use tokio::{sync::Notify, time::timeout};
use tracing::debug;

use super::{
    connection::Redis,
    keys::{BUCKETS, Keys},
    scripts::Script,
};
use crate::{clock, lifecycle::Lifecycle, rendezvous::StoreError};

/// Whose streams a limit counts.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Scope {
    /// All.
    Relay,
    /// Those that a service credential has opened.
    Service(String),
}

/// The slots of all limits that this process has to do with.
#[derive(Debug)]
pub(super) struct Slots {
    redis: Arc<Redis>,
    keys: Keys,
    /// Whose the blocks are. They go back to all when it has not told of itself for `keep`.
    holder: String,
    keep: Duration,
    pools: Mutex<HashMap<Scope, Arc<Pool>>>,
    few_left: Notify,
}

#[derive(Debug)]
struct Pool {
    scope: Scope,
    state: Mutex<State>,
    /// One asks for more slots; the others wait and share what it gets.
    turn: tokio::sync::Mutex<()>,
}

/// What a count may do to the number that the store has in mind.
#[derive(Debug, Clone, Copy)]
enum Correction {
    /// Take its place.
    Exact,
    /// Only be higher, as it misses streams that are being recorded.
    Raise,
}

#[derive(Debug, Default)]
struct State {
    limit: u64,
    unused: u64,
    /// Streams that began less those that ended, as far as the store does not know.
    change: i64,
    /// Whether any was taken since the store was told last.
    busy: bool,
    counted: Option<Instant>,
    refused: Option<(Instant, Result<(), StoreError>)>,
}

/// How often the store is told what was taken and given back.
const TELL: Duration = Duration::from_millis(500);

/// For how long a refusal stands for others that come at the same moment.
const REFUSED: Duration = Duration::from_millis(50);

/// The shortest time between two counts because of a refusal.
const COUNT_AT_MOST: Duration = Duration::from_secs(1);

/// The longest time without a count.
const COUNT_AT_LEAST: Duration = Duration::from_secs(60);

impl Slots {
    pub(super) fn start(redis: Arc<Redis>, keys: Keys, keep: Duration, lifecycle: &Lifecycle) -> Arc<Self> {
        let slots = Arc::new(Self {
            redis,
            keys,
            holder: format!("{:032x}", clock::random()),
            keep,
            pools: Mutex::default(),
            few_left: Notify::new(),
        });
        let span = tracing::Span::current();
        lifecycle.spawn_recorder(span, Arc::clone(&slots).keep_told(lifecycle.clone()));
        slots
    }

    /// Takes a slot for a stream. False when there are as many streams as there may be.
    pub(super) async fn take(&self, scope: Scope, limit: u64) -> Result<bool, StoreError> {
        let pool = self.pool(scope);
        if self.take_held(&pool, limit) {
            return Ok(true);
        }
        let _turn = pool.turn.lock().await;
        if self.take_held(&pool, limit) {
            return Ok(true);
        }
        if let Some((at, refused)) = pool.state().refused.clone()
            && clock::now().saturating_duration_since(at) < REFUSED
        {
            return refused.map(|()| false);
        }
        let result = self.fetch(&pool, limit).await;
        let taken = result.map(|()| self.take_held(&pool, limit));
        if !matches!(taken, Ok(true)) {
            pool.state().refused = Some((clock::now(), taken.clone().map(drop)));
        }
        taken
    }

    /// A slot was not needed after all.
    pub(super) fn give_back(&self, scope: Scope) {
        let pool = self.pool(scope);
        let mut state = pool.state();
        state.unused += 1;
        state.change -= 1;
        state.refused = None;
    }

    /// A stream has ended, and this process was the first to record it.
    pub(super) fn ended(&self, credential: &str) {
        for scope in [Scope::Relay, Scope::Service(credential.to_owned())] {
            let pool = self.pool(scope);
            let mut state = pool.state();
            state.change -= 1;
            state.refused = None;
        }
    }

    fn pool(&self, scope: Scope) -> Arc<Pool> {
        let mut pools = self.pools();
        let pool = pools.entry(scope).or_insert_with_key(|scope| {
            Arc::new(Pool {
                scope: scope.clone(),
                state: Mutex::default(),
                turn: tokio::sync::Mutex::default(),
            })
        });
        Arc::clone(pool)
    }

    fn base(&self, scope: &Scope) -> String {
        match scope {
            Scope::Relay => self.keys.relay(),
            Scope::Service(credential) => self.keys.service(credential),
        }
    }

    fn take_held(&self, pool: &Pool, limit: u64) -> bool {
        let mut state = pool.state();
        state.limit = limit;
        if state.unused == 0 {
            return false;
        }
        state.unused -= 1;
        state.change += 1;
        state.busy = true;
        if state.unused < block(limit) / 2 {
            self.few_left.notify_one();
        }
        true
    }

    /// Asks for a block, and counts when there is none.
    async fn fetch(&self, pool: &Pool, limit: u64) -> Result<(), StoreError> {
        self.settle(pool, block(limit)).await?;
        let counted = {
            let state = pool.state();
            state.unused > 0 || is_younger(state.counted, COUNT_AT_MOST)
        };
        if !counted {
            self.count(pool, Correction::Exact).await?;
            self.settle(pool, block(limit)).await?;
        }
        Ok(())
    }

    /// Tells the store what was taken and given back, and keeps `want` slots.
    async fn settle(&self, pool: &Pool, want: u64) -> Result<(), StoreError> {
        let mut granted = self.try_settle(pool, want).await?;
        if granted < 0 {
            self.count(pool, Correction::Exact).await?;
            granted = self.try_settle(pool, want).await?;
        }
        pool.state().unused += u64::try_from(granted).unwrap_or_default();
        Ok(())
    }

    async fn try_settle(&self, pool: &Pool, want: u64) -> Result<i64, StoreError> {
        let (limit, unused, change) = {
            let mut state = pool.state();
            state.unused = state.unused.min(want);
            state.busy = false;
            (state.limit, state.unused, state.change)
        };
        let arguments = [
            self.holder.clone(),
            limit.to_string(),
            unused.to_string(),
            change.to_string(),
            want.to_string(),
            self.keep.as_millis().to_string(),
        ];
        let base = self.base(&pool.scope);
        let granted: i64 = self.redis.run(Script::SettleSlots, &base, &arguments).await?;
        if granted >= 0 {
            pool.state().change -= change;
        }
        Ok(granted)
    }

    /// Counts the streams in all buckets, and corrects what the store has in mind.
    async fn count(&self, pool: &Pool, correction: Correction) -> Result<(), StoreError> {
        let counts = (0..BUCKETS).map(async |bucket| {
            let base = self.keys.streams(bucket);
            let counts: HashMap<String, u64> = self.redis.run(Script::CountServices, &base, &[]).await?;
            Ok::<_, StoreError>(match &pool.scope {
                Scope::Relay => counts.values().sum(),
                Scope::Service(credential) => counts.get(credential).copied().unwrap_or_default(),
            })
        });
        let counted: u64 = try_join_all(counts).await?.into_iter().sum();
        // Ends that are still to be told are not in the count any more; beginnings may be, and are then told twice: of the two
        // errors, the one that refuses early.
        let ends = u64::try_from(-pool.state().change).unwrap_or_default();
        let arguments = [(counted + ends).to_string(), correction.label().to_owned()];
        self.redis.run::<()>(Script::CorrectSlots, &self.base(&pool.scope), &arguments).await?;
        pool.state().counted = Some(clock::now());
        Ok(())
    }

    async fn keep_told(self: Arc<Self>, lifecycle: Lifecycle) {
        loop {
            tokio::select! {
                () = tokio::time::sleep(TELL) => {}
                () = self.few_left.notified() => {}
                () = lifecycle.silent().cancelled() => {}
            }
            let is_last = lifecycle.silent().is_cancelled();
            let pools: Vec<_> = self.pools().values().cloned().collect();
            join_all(pools.iter().map(|pool| self.tell(pool, is_last))).await;
            if is_last {
                return;
            }
            self.pools().retain(|_, pool| Arc::strong_count(pool) > 2 || pool.state().is_in_use());
        }
    }

    async fn tell(&self, pool: &Pool, is_last: bool) {
        let want = {
            let state = pool.state();
            if state.change == 0 && state.unused == 0 {
                return;
            }
            if state.busy && !is_last { block(state.limit) } else { 0 }
        };
        let told = async {
            let _turn = pool.turn.lock().await;
            let is_due = want > 0 && !is_younger(pool.state().counted, COUNT_AT_LEAST);
            if is_due {
                self.count(pool, Correction::Raise).await?;
            }
            self.settle(pool, want).await
        };
        match timeout(self.keep, told).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => debug!(%error, "slots could not be settled; the next round tells of them"),
            Err(_) => debug!("slots could not be settled in time; the next round tells of them"),
        }
    }

    fn pools(&self) -> MutexGuard<'_, HashMap<Scope, Arc<Pool>>> {
        self.pools.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Correction {
    fn label(self) -> &'static str {
        match self {
            Self::Exact => "exact",
            Self::Raise => "raise",
        }
    }
}

impl Pool {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn is_in_use(&self) -> bool {
        self.unused > 0 || self.change != 0 || self.busy || is_younger(self.counted, COUNT_AT_LEAST)
    }
}

/// How many slots a process holds ahead of need.
fn block(limit: u64) -> u64 {
    (limit / 64).clamp(1, 64)
}

fn is_younger(moment: Option<Instant>, age: Duration) -> bool {
    moment.is_some_and(|moment| clock::now().saturating_duration_since(moment) < age)
}
