//! Where what stands.
//!
//! A script gets the beginning of its keys, which holds their hash tag: all keys of one script lie in one slot of a Cluster.
//! Streams and links are spread over [`BUCKETS`] each: few enough that a list, a sweep or a look for what was forgotten asks
//! all of them at once, and enough for every server of a Cluster to have its share.

use midspan_core::id::{DeviceAddress, StreamId};
use xxhash_rust::xxh3::xxh3_64;

/// How many buckets there are of streams, and of links. A contract between releases, like the hash.
pub(super) const BUCKETS: usize = 64;

/// The beginnings of all keys.
#[derive(Debug, Clone)]
pub(super) struct Keys {
    prefix: String,
}

impl Keys {
    pub(super) fn new(prefix: String) -> Self {
        Self { prefix }
    }

    /// Who is there.
    pub(super) fn membership(&self) -> String {
        self.tagged("m")
    }

    /// One device: its link, its streams, who waits for it.
    pub(super) fn device(&self, device: &DeviceAddress) -> String {
        self.tagged(&format!("d:{device}"))
    }

    /// How many streams a service may still open.
    pub(super) fn service(&self, credential: &str) -> String {
        self.tagged(&format!("c:{credential}"))
    }

    /// How many streams all services may still open.
    pub(super) fn relay(&self) -> String {
        self.tagged("r")
    }

    pub(super) fn streams(&self, bucket: usize) -> String {
        self.tagged(&format!("s:{bucket:02x}"))
    }

    pub(super) fn links(&self, bucket: usize) -> String {
        self.tagged(&format!("l:{bucket:02x}"))
    }

    fn tagged(&self, tag: &str) -> String {
        format!("{}{{{tag}}}:", self.prefix)
    }
}

/// The bucket of a stream: ids that follow each other stand in the same bucket, or in one that follows.
pub(super) fn stream_bucket(stream: StreamId) -> usize {
    usize::try_from(stream.as_u128() >> (128 - BUCKETS.ilog2())).unwrap_or_default()
}

/// The bucket of a device's link.
pub(super) fn link_bucket(device: &DeviceAddress) -> usize {
    usize::try_from(xxh3_64(device.to_string().as_bytes()) % BUCKETS as u64).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_never_move() {
        let stream = |text: &str| stream_bucket(text.parse().unwrap());
        assert_eq!(stream("00000000000040008000000000000000"), 0);
        assert_eq!(stream("04000000000040008000000000000000"), 1);
        assert_eq!(stream("fc000000000040008000000000000000"), 63);
        let links = ["dev1", "dev2", "dev1/m"].map(|device| link_bucket(&device.parse().unwrap()));
        assert_eq!(links, [31, 20, 40]);
    }

    #[test]
    fn keys_of_one_step_share_their_tag() {
        let keys = Keys::new("midspan:".to_owned());
        assert_eq!(keys.device(&"dev1/m".parse().unwrap()), "midspan:{d:dev1/m}:");
        assert_eq!(keys.streams(10), "midspan:{s:0a}:");
    }
}
