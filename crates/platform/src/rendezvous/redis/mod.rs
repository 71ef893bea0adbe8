//! The rendezvous store that many processes share: Redis or Valkey, single, behind Sentinel, or as a Cluster.
//!
//! Every transition is one script on the keys of one hash tag. A step that spans tags is several scripts, each of which may be
//! repeated, in an order that leaves nothing wrong where it breaks off:
//!
//! | step | scripts | broken off |
//! |---|---|---|
//! | a stream begins | device: reserve a place; bucket: the record | the place is freed when the device's limit is reached |
//! | a stream ends | bucket: the end; device: free the place | likewise |
//! | a link comes | device: the link; bucket: its place in lists | the device is found, and in no list until it comes again |
//! | a link goes | device: the link; bucket: its place in lists | it goes from lists with its replica |
//!
//! The server's clock is the relay's: leases, handshakes and generations need no other. Round trips of a stream's life: two to
//! begin, with the look for its device's link; one when it is joined; two at its end.

mod connection;
mod keys;
mod scripts;
mod settings;
mod slots;
mod untold;

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use futures_util::future::{join_all, try_join_all};
use midspan_core::{
    close::CloseReason,
    id::{DeviceAddress, Incarnation, StreamId},
    record::{StreamEnd, StreamRecord, StreamState},
    ticket::Owner,
    time::UnixTime,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tracing::{Span, debug, warn};

pub use self::settings::{RedisSettings, RedisUrl};
use self::{
    connection::Redis,
    keys::{BUCKETS, Keys, link_bucket, stream_bucket},
    scripts::Script,
    slots::{Scope, Slots},
    untold::Untold,
};
use super::{
    CreateError, Ends, Lease, Leases, LinkRecord, LinkUp, Look, Rendezvous, Renewal, Seen, ServerRole,
    StoreError, StoreFailure, StoreMetrics, StreamLimits, Timing,
};
use crate::{clock, lifecycle::Lifecycle};

/// Records in Redis.
#[derive(Debug)]
pub struct RedisRendezvous {
    redis: Arc<Redis>,
    keys: Keys,
    timing: Timing,
    /// From the reservation of a device's place until its stream must be recorded.
    creation_limit: Duration,
    slots: Arc<Slots>,
    ends: Mutex<Ends<Untold>>,
    /// Deletions that could not be told at once, and have been since.
    deleted_late: Mutex<Vec<StreamRecord>>,
    metrics: StoreMetrics,
    seen_by_incarnation: Mutex<HashMap<Incarnation, Seen>>,
}

/// The form of what this release writes. A newer one may have more fields.
const VERSION: u8 = 1;

#[derive(Serialize, Deserialize)]
struct Stored<T> {
    version: u8,
    #[serde(flatten)]
    value: T,
}

/// One piece of a list of streams.
struct Chunk {
    last: Option<StreamId>,
    is_full: bool,
    records: Vec<StreamRecord>,
}

/// A bucket of links on its way into a list.
struct Queue {
    bucket: usize,
    links: VecDeque<(DeviceAddress, LinkRecord)>,
    last: Option<String>,
    has_more: bool,
}

/// How long what nobody ends or frees is kept, as a last resort.
const ABANDONED: Duration = Duration::from_secs(25 * 3600);

/// How long the generation of a device's last link is kept, by which the next one is higher although a clock went back.
const GENERATION_KEPT: Duration = Duration::from_secs(3600);

/// The most streams or links that one sweep of one bucket ends.
const SWEEP_MAX: usize = 200;

/// How many streams or links are announced again at the same time.
const RESTORE_AT_ONCE: usize = 64;

/// What each bucket is asked for beyond its share of a list, so that few have to be asked twice.
const SHARE_SPARE: usize = 8;

/// The names of all operations, for metrics.
pub(super) fn operations() -> impl Iterator<Item = &'static str> {
    Script::ALL.iter().map(|script| script.label()).chain(["cluster_info"])
}

impl RedisRendezvous {
    /// Begins to connect, and goes on for as long as the process lives. Fails when the settings make no sense.
    pub fn start(
        settings: &RedisSettings,
        timing: Timing,
        metrics: StoreMetrics,
        lifecycle: &Lifecycle,
    ) -> anyhow::Result<Arc<Self>> {
        let keys = Keys::new(settings.redis_prefix.clone());
        let redis = Redis::start(settings.target()?, metrics.clone(), lifecycle);
        let store = Arc::new(Self {
            slots: Slots::start(Arc::clone(&redis), keys.clone(), timing.lease, lifecycle),
            redis,
            keys,
            timing,
            creation_limit: settings.redis_command_timeout * 2,
            metrics,
            ends: Mutex::default(),
            deleted_late: Mutex::default(),
            seen_by_incarnation: Mutex::default(),
        });
        lifecycle.spawn_recorder(Span::current(), Arc::clone(&store).tell_again(lifecycle.clone()));
        Ok(store)
    }

    /// Takes a place among the streams of a device. Gives the device's link, or nothing when all places are taken.
    async fn reserve(
        &self,
        record: &StreamRecord,
        limit: u64,
    ) -> Result<Option<Option<LinkRecord>>, StoreError> {
        let base = self.keys.device(&record.address);
        let arguments = [record.stream.to_string(), limit.to_string(), milliseconds(ABANDONED)];
        for is_last in [false, true] {
            let mut answer: Vec<Option<String>> = self.redis.run(Script::Reserve, &base, &arguments).await?;
            if answer.first().and_then(Option::as_deref) == Some("1") {
                return Ok(Some(self.link_of(answer.get_mut(1..).unwrap_or_default())));
            }
            if is_last || !self.free_places(&base, &answer[1..]).await? {
                break;
            }
        }
        Ok(None)
    }

    /// Frees the places of streams that are over: whoever ended them did not come to it. Says whether there were any.
    async fn free_places(&self, base: &str, held: &[Option<String>]) -> Result<bool, StoreError> {
        let mut streams = Vec::new();
        for pair in held.chunks_exact(2) {
            let [Some(stream), Some(age)] = pair else { continue };
            let is_old = age.parse().is_ok_and(|age| Duration::from_millis(age) > self.creation_limit);
            if let (true, Ok(stream)) = (is_old, stream.parse::<StreamId>()) {
                streams.push(stream);
            }
        }
        let records = try_join_all(streams.iter().map(|stream| self.stream(*stream))).await?;
        let over: Vec<_> = streams
            .iter()
            .zip(records)
            .filter(|(_, record)| record.as_ref().is_none_or(StreamRecord::is_ended))
            .map(|(stream, _)| stream.to_string())
            .collect();
        if over.is_empty() {
            return Ok(false);
        }
        self.redis.run::<()>(Script::Release, base, &over).await?;
        Ok(true)
    }

    /// Frees what a stream took that has ended.
    async fn release(&self, record: &StreamRecord) {
        self.slots.ended(&record.credential);
        let base = self.keys.device(&record.address);
        if let Err(error) = self.redis.run::<()>(Script::Release, &base, &[record.stream.to_string()]).await {
            debug!(stream.id = %record.stream, %error, "a place is freed when it is needed");
        }
    }

    /// Moves a stream on, or keeps its end to tell it again.
    async fn advance(
        &self,
        stream: StreamId,
        next: StreamState,
        is_deletion: bool,
    ) -> Result<Option<StreamRecord>, StoreError> {
        let arguments =
            [stream.to_string(), next.rank().to_string(), json(&next)?, milliseconds(self.timing.remember)];
        let base = self.keys.streams(stream_bucket(stream));
        let forgets = self.ends().forgets();
        let advanced = self.redis.run::<Option<String>>(Script::AdvanceStream, &base, &arguments).await;
        if matches!(next, StreamState::Ended(_)) {
            let end = next.clone();
            if advanced.is_ok() {
                // Whoever tells it again has been heard before.
                self.ends().told(Untold { stream, end, is_deletion: false }, forgets, clock::now());
            } else if !self.ends().failed(Untold { stream, end, is_deletion }) {
                warn!("too many ends that the store has not heard of; the oldest is left out");
            }
        }
        let Some(record) = advanced?.and_then(|record| self.read::<StreamRecord>(&record)) else {
            return Ok(None);
        };
        let record = StreamRecord { state: next, ..record };
        if record.is_ended() {
            self.release(&record).await;
        }
        Ok(Some(record))
    }

    async fn restore_stream(&self, record: &StreamRecord) -> Result<(), StoreError> {
        let arguments = [
            record.stream.to_string(),
            record.state.rank().to_string(),
            json(&record.state)?,
            milliseconds(self.timing.remember),
            json(record)?,
            record.owner.incarnation.to_string(),
            record.credential.clone(),
            milliseconds(self.timing.given_up_after(record)),
            milliseconds(ABANDONED),
        ];
        let base = self.keys.streams(stream_bucket(record.stream));
        let is_live: bool = self.redis.run(Script::RestoreStream, &base, &arguments).await?;
        let device = self.keys.device(&record.address);
        let stream = record.stream.to_string();
        if is_live {
            self.redis.run(Script::Hold, &device, &[stream, milliseconds(ABANDONED)]).await
        } else {
            self.redis.run(Script::Release, &device, &[stream]).await
        }
    }

    async fn list_streams(
        &self,
        bucket: usize,
        after: Option<StreamId>,
        most: usize,
    ) -> Result<Chunk, StoreError> {
        let behind = after.map_or_else(|| "-".to_owned(), |after| format!("({after}"));
        let arguments = [behind, most.to_string()];
        let base = self.keys.streams(bucket);
        let answer: Vec<String> = self.redis.run(Script::ListStreams, &base, &arguments).await?;
        let [last, looked_at, pairs @ ..] = answer.as_slice() else {
            return Err(StoreError::new(StoreFailure::Other, "a list of another form"));
        };
        let records = pairs.chunks_exact(2).filter_map(|pair| self.record(&pair[0], &pair[1])).collect();
        Ok(Chunk { last: last.parse().ok(), is_full: looked_at == &most.to_string(), records })
    }

    async fn list_links(&self, queue: &mut Queue, most: usize) -> Result<(), StoreError> {
        let behind = queue.last.as_ref().map_or_else(|| "-".to_owned(), |last| format!("({last}"));
        let base = self.keys.links(queue.bucket);
        let answer: Vec<String> =
            self.redis.run(Script::ListLinks, &base, &[behind, most.to_string()]).await?;
        for pair in answer.chunks_exact(2) {
            let (member, record) = (&pair[0], &pair[1]);
            if let (Some(device), Some(link)) = (device_of(member), self.read_stored(record)) {
                queue.links.push_back((device, link));
            }
            queue.last = Some(member.clone());
        }
        queue.has_more = answer.len() / 2 == most;
        Ok(())
    }

    /// Ends what is to be ended in one bucket of streams.
    async fn sweep_streams(
        &self,
        bucket: usize,
        settled: &str,
        alive: &[String],
    ) -> Result<Vec<StreamRecord>, StoreError> {
        let now = clock::unix();
        let end = |reason| StreamState::Ended(StreamEnd::unused(reason, now));
        let (missing, lost) = (end(CloseReason::BothLegsMissing), end(CloseReason::EdgeLost));
        let mut arguments = vec![
            json(&missing)?,
            json(&lost)?,
            milliseconds(self.timing.remember),
            SWEEP_MAX.to_string(),
            settled.to_owned(),
        ];
        arguments.extend_from_slice(alive);
        let base = self.keys.streams(bucket);
        let answer: Vec<String> = self.redis.run(Script::SweepStreams, &base, &arguments).await?;
        let Some((count, records)) = answer.split_first() else { return Ok(Vec::new()) };
        let count: usize = count.parse().unwrap_or_default();
        let states = std::iter::repeat_n(&missing, count).chain(std::iter::repeat(&lost));
        let ended: Vec<_> = records
            .iter()
            .zip(states)
            .filter_map(|(record, state)| {
                Some(StreamRecord { state: state.clone(), ..self.read::<StreamRecord>(record)? })
            })
            .collect();
        join_all(ended.iter().map(|record| self.release(record))).await;
        Ok(ended)
    }

    /// Takes down links of replicas that are gone.
    async fn sweep_links(&self, bucket: usize, alive: &[String]) -> Result<(), StoreError> {
        let mut arguments = vec![SWEEP_MAX.to_string()];
        arguments.extend_from_slice(alive);
        let base = self.keys.links(bucket);
        let lost: Vec<String> = self.redis.run(Script::LostLinks, &base, &arguments).await?;
        let lost = lost.chunks_exact(3).filter_map(|link| Some((device_of(&link[0])?, &link[1], &link[2])));
        try_join_all(lost.map(|(device, generation, owner)| self.take_down_link(device, generation, owner)))
            .await?;
        Ok(())
    }

    async fn list_link(&self, device: &DeviceAddress, link: &LinkRecord) -> Result<(), StoreError> {
        let arguments = [
            member_of(device),
            link.generation.to_string(),
            link.replica.incarnation.to_string(),
            stored(link)?,
        ];
        self.redis.run(Script::ListLink, &self.keys.links(link_bucket(device)), &arguments).await
    }

    /// Takes up a link; where a generation is assumed, unless another replica has a newer one.
    async fn take_up_link(
        &self,
        device: &DeviceAddress,
        replica: &Owner,
        assumed: String,
    ) -> Result<Option<LinkUp>, StoreError> {
        type Before = (u64, u64, Option<String>, Option<String>, Option<String>, Vec<String>);
        let arguments = [stored(replica)?, replica.incarnation.to_string(), assumed];
        let answer: Option<Before> =
            self.redis.run(Script::LinkUp, &self.keys.device(device), &arguments).await?;
        let Some((generation, since, before, before_generation, before_since, waiting)) = answer else {
            return Ok(None);
        };
        let link = LinkRecord { replica: replica.clone(), generation, since: UnixTime(since) };
        if let Err(error) = self.list_link(device, &link).await {
            // The caller will not hold this link. If nobody can be told, the device's next one takes its place.
            let _ = self.link_down(device, replica, generation).await;
            return Err(error);
        }
        Ok(Some(LinkUp {
            generation,
            replaced: self.link_of(&mut [before, before_generation, before_since]),
            waiting: waiting.iter().filter_map(|replica| self.read_stored(replica)).collect(),
        }))
    }

    async fn take_down_link(
        &self,
        device: DeviceAddress,
        generation: &str,
        owner: &str,
    ) -> Result<(), StoreError> {
        let arguments = [generation.to_owned(), owner.to_owned(), milliseconds(GENERATION_KEPT)];
        self.redis.run::<()>(Script::LinkDown, &self.keys.device(&device), &arguments).await?;
        let arguments = [member_of(&device), generation.to_owned(), owner.to_owned()];
        self.redis.run(Script::UnlistLink, &self.keys.links(link_bucket(&device)), &arguments).await
    }

    async fn restore_link(&self, device: &DeviceAddress, link: &LinkRecord) -> Result<bool, StoreError> {
        let arguments = [stored(&link.replica)?, link.generation.to_string(), link.since.0.to_string()];
        let is_newest = self.redis.run(Script::RestoreLink, &self.keys.device(device), &arguments).await?;
        if is_newest {
            self.list_link(device, link).await?;
        }
        Ok(is_newest)
    }

    /// Whether the servers look otherwise than at the last renewal of `incarnation`, or took it for lost in between.
    async fn has_forgotten(&self, incarnation: Incarnation, mark: u64, lapsed: bool, began: Instant) -> bool {
        let mut marks = vec![(self.keys.membership(), mark)];
        let mut epoch = 0;
        if self.redis.is_cluster() {
            // Any server may have lost its part, or another may have taken its place.
            epoch = self.redis.cluster_epoch().await.unwrap_or_default();
            let bases = (0..BUCKETS).flat_map(|bucket| [self.keys.streams(bucket), self.keys.links(bucket)]);
            let seen = bases
                .map(async |base| Some((base.clone(), self.redis.run(Script::Mark, &base, &[]).await.ok()?)));
            marks.extend(join_all(seen).await.into_iter().flatten());
        }
        let look = Look { server: self.redis.server(), epoch, marks, lapsed };
        let mut seen_by_incarnation = self.seen_by_incarnation();
        let seen = seen_by_incarnation.entry(incarnation).or_default();
        seen.renewed(look, self.timing.lease, began, clock::now())
    }

    fn seen_by_incarnation(&self) -> MutexGuard<'_, HashMap<Incarnation, Seen>> {
        self.seen_by_incarnation.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A device's link out of replica, generation and time.
    fn link_of(&self, fields: &mut [Option<String>]) -> Option<LinkRecord> {
        let [replica, generation, since] = fields else { return None };
        Some(LinkRecord {
            replica: self.read_stored(replica.as_deref()?)?,
            generation: generation.as_deref()?.parse().ok()?,
            since: UnixTime(since.as_deref()?.parse().ok()?),
        })
    }

    fn record(&self, record: &str, state: &str) -> Option<StreamRecord> {
        Some(StreamRecord { state: self.read(state)?, ..self.read(record)? })
    }

    fn read_stored<T: DeserializeOwned>(&self, text: &str) -> Option<T> {
        self.read::<Stored<T>>(text).map(|stored| stored.value)
    }

    /// Reads what another release may have written.
    fn read<T: DeserializeOwned>(&self, text: &str) -> Option<T> {
        match serde_json::from_str::<T>(text) {
            Ok(value) => Some(value),
            Err(error) => {
                if self.metrics.unreadable() {
                    warn!(%error, "a record in the store cannot be read and is left out, as others will be");
                }
                None
            }
        }
    }
}

#[async_trait]
impl Rendezvous for RedisRendezvous {
    async fn create_stream(
        &self,
        record: StreamRecord,
        limits: StreamLimits,
    ) -> Result<Option<LinkRecord>, CreateError> {
        let arguments = [
            record.stream.to_string(),
            json(&record)?,
            json(&record.state)?,
            record.owner.incarnation.to_string(),
            record.credential.clone(),
            milliseconds(self.timing.given_up_after(&record)),
            milliseconds(ABANDONED),
        ];
        if !self.slots.take(Scope::Relay, limits.per_relay).await? {
            return Err(CreateError::relay_limit(limits));
        }
        let service = Scope::Service(record.credential.clone());
        match self.slots.take(service.clone(), limits.per_service).await {
            Ok(true) => {}
            refused => {
                self.slots.give_back(Scope::Relay);
                return Err(
                    refused.map_or_else(CreateError::from, |_| CreateError::service_limit(&record, limits))
                );
            }
        }
        let created = async {
            let Some(link) = self.reserve(&record, limits.per_device).await? else {
                return Err(CreateError::device_limit(&record, limits));
            };
            let base = self.keys.streams(stream_bucket(record.stream));
            self.redis.run::<()>(Script::CreateStream, &base, &arguments).await?;
            Ok(link)
        };
        let created = created.await;
        if created.is_err() {
            self.slots.give_back(Scope::Relay);
            self.slots.give_back(service);
        }
        created
    }

    async fn advance_stream(
        &self,
        stream: StreamId,
        next: StreamState,
    ) -> Result<Option<StreamRecord>, StoreError> {
        self.advance(stream, next, false).await
    }

    async fn delete_stream(
        &self,
        stream: StreamId,
        end: StreamEnd,
    ) -> Result<Option<StreamRecord>, StoreError> {
        self.advance(stream, StreamState::Ended(end), true).await
    }

    async fn stream(&self, stream: StreamId) -> Result<Option<StreamRecord>, StoreError> {
        let base = self.keys.streams(stream_bucket(stream));
        let found: Vec<String> = self.redis.run(Script::ReadStream, &base, &[stream.to_string()]).await?;
        let [record, state] = found.as_slice() else { return Ok(None) };
        Ok(self.record(record, state))
    }

    async fn streams(&self, after: Option<StreamId>, limit: usize) -> Result<Vec<StreamRecord>, StoreError> {
        let first = after.map_or(0, stream_bucket);
        let share = limit / (BUCKETS - first) + SHARE_SPARE;
        let chunks = (first..BUCKETS).map(async |bucket| {
            let after = after.filter(|_| bucket == first);
            Ok::<_, StoreError>((bucket, self.list_streams(bucket, after, share).await?))
        });
        let mut found = Vec::new();
        for (bucket, mut chunk) in try_join_all(chunks).await? {
            found.append(&mut chunk.records);
            while chunk.is_full && found.len() < limit {
                chunk = self.list_streams(bucket, chunk.last, limit - found.len()).await?;
                found.append(&mut chunk.records);
            }
            if found.len() >= limit {
                break;
            }
        }
        found.truncate(limit);
        Ok(found)
    }

    async fn restore_streams(&self, streams: &[StreamRecord]) -> Result<(), StoreError> {
        let mut restored = Vec::new();
        for some in streams.chunks(RESTORE_AT_ONCE) {
            restored.extend(join_all(some.iter().map(|record| self.restore_stream(record))).await);
        }
        first_error(restored)
    }

    async fn expire(&self) -> Result<Vec<StreamRecord>, StoreError> {
        // A little less than the time between two calls, so that one process keeps the claim as long as it lives.
        let period = self.timing.renewal * 9 / 10;
        let arguments = [milliseconds(self.timing.lease), milliseconds(period)];
        let claim: Option<Vec<String>> =
            self.redis.run(Script::ClaimSweep, &self.keys.membership(), &arguments).await?;
        let Some((settled, alive)) = claim.as_deref().and_then(<[String]>::split_first) else {
            return Ok(std::mem::take(&mut *self.deleted_late()));
        };
        let streams = (0..BUCKETS).map(|bucket| self.sweep_streams(bucket, settled, alive));
        let links = async {
            let buckets = 0..if settled == "1" { BUCKETS } else { 0 };
            first_error(join_all(buckets.map(|bucket| self.sweep_links(bucket, alive))).await)
        };
        let (streams, links) = tokio::join!(join_all(streams), links);
        // Only now, behind all that is waited for: whoever gives up waiting leaves them for the next call.
        let mut ended = std::mem::take(&mut *self.deleted_late());
        let mut failed = links.err();
        for result in streams {
            match result {
                Ok(mut records) => ended.append(&mut records),
                Err(error) => failed = Some(error),
            }
        }
        match failed {
            // What has ended is told, whatever else has failed: nobody hears of it again.
            Some(error) if ended.is_empty() => Err(error),
            _ => Ok(ended),
        }
    }

    async fn renew(&self, lease: &Lease) -> Result<Renewal, StoreError> {
        let began = clock::now();
        self.seen_by_incarnation().entry(lease.owner.incarnation).or_default().renews(began);
        let arguments = [
            role(lease.role).to_owned(),
            lease.owner.incarnation.to_string(),
            stored(lease)?,
            milliseconds(self.timing.lease),
            milliseconds(self.timing.renewal),
        ];
        let (mark, lapsed) = self.redis.run(Script::Renew, &self.keys.membership(), &arguments).await?;
        let forgotten = self.has_forgotten(lease.owner.incarnation, mark, lapsed, began).await;
        self.ends().renewed(forgotten, clock::now());
        Ok(Renewal { forgotten })
    }

    async fn withdraw(&self, of: ServerRole, owner: &Owner) -> Result<(), StoreError> {
        let arguments = [role(of).to_owned(), owner.incarnation.to_string()];
        self.redis.run(Script::Withdraw, &self.keys.membership(), &arguments).await
    }

    async fn leases(&self, of: ServerRole) -> Result<Leases, StoreError> {
        let arguments = [role(of).to_owned(), milliseconds(self.timing.lease)];
        let answer: Vec<String> = self.redis.run(Script::Leases, &self.keys.membership(), &arguments).await?;
        let Some((settled, leases)) = answer.split_first() else {
            return Err(StoreError::new(StoreFailure::Other, "leases of another form"));
        };
        let mut alive: Vec<Lease> = leases.iter().filter_map(|lease| self.read_stored(lease)).collect();
        alive.sort_by(|a, b| a.owner.name.cmp(&b.owner.name));
        Ok(Leases { alive, settled: settled == "1" })
    }

    async fn link_up(&self, device: &DeviceAddress, replica: &Owner) -> Result<LinkUp, StoreError> {
        let up = self.take_up_link(device, replica, String::new()).await?;
        up.ok_or_else(|| StoreError::new(StoreFailure::Other, "a link was not taken up"))
    }

    async fn link_up_late(
        &self,
        device: &DeviceAddress,
        replica: &Owner,
        assumed: u64,
    ) -> Result<Option<LinkUp>, StoreError> {
        self.take_up_link(device, replica, assumed.to_string()).await
    }

    async fn link_down(
        &self,
        device: &DeviceAddress,
        replica: &Owner,
        generation: u64,
    ) -> Result<(), StoreError> {
        let (generation, owner) = (generation.to_string(), replica.incarnation.to_string());
        self.take_down_link(device.clone(), &generation, &owner).await
    }

    async fn link(&self, device: &DeviceAddress) -> Result<Option<LinkRecord>, StoreError> {
        let mut fields: Vec<Option<String>> =
            self.redis.run(Script::Link, &self.keys.device(device), &[]).await?;
        Ok(self.link_of(&mut fields))
    }

    async fn await_link(
        &self,
        device: &DeviceAddress,
        replica: &Owner,
        wait: Duration,
    ) -> Result<Option<LinkRecord>, StoreError> {
        let arguments = [stored(replica)?, milliseconds(wait)];
        let mut fields: Vec<Option<String>> =
            self.redis.run(Script::AwaitLink, &self.keys.device(device), &arguments).await?;
        Ok(self.link_of(&mut fields))
    }

    /// Each bucket is in order; what comes first of all their beginnings comes first in the list.
    async fn links(
        &self,
        after: Option<&DeviceAddress>,
        limit: usize,
    ) -> Result<Vec<(DeviceAddress, LinkRecord)>, StoreError> {
        let share = limit / BUCKETS + SHARE_SPARE;
        let queues = (0..BUCKETS).map(async |bucket| {
            let last = after.map(member_of);
            let mut queue = Queue { bucket, links: VecDeque::new(), last, has_more: true };
            self.list_links(&mut queue, share).await?;
            Ok::<_, StoreError>(queue)
        });
        let mut queues = try_join_all(queues).await?;
        let mut found = Vec::new();
        while found.len() < limit {
            for queue in &mut queues {
                while queue.links.is_empty() && queue.has_more {
                    self.list_links(queue, share).await?;
                }
            }
            let heads = queues.iter_mut().filter(|queue| !queue.links.is_empty());
            let first = heads.min_by(|a, b| a.links[0].0.cmp(&b.links[0].0));
            let Some(link) = first.and_then(|queue| queue.links.pop_front()) else { break };
            found.push(link);
        }
        Ok(found)
    }

    async fn restore_links(
        &self,
        links: &[(DeviceAddress, LinkRecord)],
    ) -> Result<Vec<DeviceAddress>, StoreError> {
        let mut outdated = Vec::new();
        for some in links.chunks(RESTORE_AT_ONCE) {
            let restored = join_all(some.iter().map(|(device, link)| self.restore_link(device, link))).await;
            for ((device, _), is_newest) in some.iter().zip(restored) {
                if !is_newest? {
                    outdated.push(device.clone());
                }
            }
        }
        Ok(outdated)
    }
}

fn first_error(results: Vec<Result<(), StoreError>>) -> Result<(), StoreError> {
    results.into_iter().collect()
}

/// A device in a bucket's lists. A space comes before every character of an id, as the end of a device's id has to come
/// before its modules.
fn member_of(device: &DeviceAddress) -> String {
    device.to_string().replace('/', " ")
}

fn device_of(member: &str) -> Option<DeviceAddress> {
    member.replace(' ', "/").parse().ok()
}

fn role(role: ServerRole) -> &'static str {
    match role {
        ServerRole::Control => "control",
        ServerRole::Edge => "edge",
    }
}

fn milliseconds(time: Duration) -> String {
    time.as_millis().to_string()
}

fn stored<T: Serialize>(value: &T) -> Result<String, StoreError> {
    json(&Stored { version: VERSION, value })
}

fn json<T: Serialize>(value: &T) -> Result<String, StoreError> {
    serde_json::to_string(value).map_err(|error| StoreError::new(StoreFailure::Other, error.to_string()))
}
