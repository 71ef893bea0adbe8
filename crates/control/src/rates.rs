//! How often each service credential may ask for a stream.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::Instant,
};

use midspan_core::limit::{LimitName, LimitReached, TokenBucket};

#[derive(Debug)]
pub(crate) struct Rates {
    per_second: u32,
    bucket_by_service: Mutex<HashMap<String, TokenBucket>>,
}

impl Rates {
    pub(crate) fn new(per_second: u32) -> Self {
        Self { per_second, bucket_by_service: Mutex::default() }
    }

    /// Counts one request of `service`, unless it has made too many.
    pub(crate) fn take(&self, service: &str, now: Instant) -> Result<(), LimitReached> {
        let mut buckets = self.bucket_by_service.lock().unwrap_or_else(PoisonError::into_inner);
        if !buckets.contains_key(service) {
            buckets.retain(|_, bucket| !bucket.is_full(now));
            buckets.insert(service.to_owned(), TokenBucket::new(self.per_second, now));
        }
        let Some(bucket) = buckets.get_mut(service) else { return Ok(()) };
        bucket.take(now).map_err(|wait| LimitReached {
            name: LimitName::InitiationsPerSecond,
            value: self.per_second.into(),
            scope: format!("service {service}"),
            retry_after_seconds: wait.as_secs() + 1,
        })
    }
}
