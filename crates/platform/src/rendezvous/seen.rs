use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

/// What one life of a process has seen of a store when it renewed its lease; another sight means that it may have forgotten.
#[derive(Debug, Default)]
pub struct Seen {
    server: Option<Arc<str>>,
    epoch: u64,
    mark_by_base: HashMap<String, u64>,
    /// When the last renewal began that was answered.
    renewed: Option<Instant>,
}

/// One look at a store.
#[derive(Debug, Default)]
pub struct Look {
    /// Which server answers, where there is one.
    pub server: Option<Arc<str>>,
    /// The epoch of a Cluster, or 0.
    pub epoch: u64,
    /// Numbers that stand in a store with each part of the records, and change when it is lost.
    pub marks: Vec<(String, u64)>,
    /// Whether the lease had ended, or had not been there.
    pub lapsed: bool,
}

impl Seen {
    /// Takes a new look, and says whether the store may have forgotten, or had taken the process for lost, since the one before.
    /// The renewal began at `began` and was answered at `now`.
    pub fn renewed(&mut self, look: Look, lease: Duration, began: Instant, now: Instant) -> bool {
        let mut differs = false;
        if let Some(server) = look.server {
            let before = self.server.replace(Arc::clone(&server));
            differs |= before.is_some_and(|before| before != server);
        }
        // Servers of a Cluster hear of a new epoch one after the other.
        differs |= self.epoch > 0 && look.epoch > self.epoch;
        self.epoch = self.epoch.max(look.epoch);
        for (base, mark) in look.marks {
            let before = self.mark_by_base.insert(base, mark);
            differs |= before.is_some_and(|before| before != mark);
        }
        let before = self.renewed.replace(began);
        // The answer that told of a lapse may have been lost.
        let lapsed =
            before.is_some_and(|before| look.lapsed || now.saturating_duration_since(before) > lease);
        differs || lapsed
    }
}
