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
    /// When the last renewal began that was answered; before that, the first one that was not.
    renewed: Option<Instant>,
    under_way: bool,
    /// Whether a renewal since then had no answer.
    unanswered: bool,
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
    /// A renewal begins. Should its answer be lost, the lease may have begun, and ended, all the same.
    pub fn renews(&mut self, began: Instant) {
        self.unanswered |= self.under_way;
        self.under_way = true;
        self.renewed.get_or_insert(began);
    }

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
        self.under_way = false;
        let unanswered = std::mem::take(&mut self.unanswered);
        let before = self.renewed.replace(began).filter(|before| *before != began);
        let lapsed = before.is_some_and(|before| {
            // The answer that told of it may have been lost.
            look.lapsed || (unanswered && now.saturating_duration_since(before) > lease)
        });
        differs || lapsed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock;

    const LEASE: Duration = Duration::from_secs(5);

    #[test]
    fn a_lapse_is_noticed_although_the_answer_that_told_of_it_was_lost() {
        let (mut seen, start) = (Seen::default(), clock::now());
        let later = |seconds| start + Duration::from_secs(seconds);
        let look = |lapsed| Look { lapsed, ..Look::default() };
        seen.renews(start);
        assert!(!seen.renewed(look(true), LEASE, start, start), "the first lease of a life lapses nothing");
        seen.renews(later(1));
        assert!(!seen.renewed(look(false), LEASE, later(1), later(1)));
        seen.renews(later(7));
        seen.renews(later(8));
        assert!(seen.renewed(look(false), LEASE, later(8), later(8)));
        seen.renews(later(15));
        assert!(
            !seen.renewed(look(false), LEASE, later(15), later(15)),
            "it would have been told of a lapse"
        );
    }

    #[test]
    fn the_first_lease_of_a_life_may_have_been_lost_before_it_was_answered() {
        let (mut seen, start) = (Seen::default(), clock::now());
        seen.renews(start);
        let again = start + Duration::from_secs(1);
        seen.renews(again);
        assert!(seen.renewed(Look { lapsed: true, ..Look::default() }, LEASE, again, again));
    }

    #[test]
    fn another_server_or_mark_is_noticed() {
        let (mut seen, now) = (Seen::default(), clock::now());
        let mut look = |server: &str, epoch, mark| {
            let marks = vec![("streams".to_owned(), mark)];
            seen.renewed(Look { server: Some(server.into()), epoch, marks, lapsed: false }, LEASE, now, now)
        };
        assert!(!look("one", 1, 7));
        assert!(!look("one", 1, 7));
        assert!(look("two", 1, 7));
        assert!(look("two", 2, 7));
        assert!(look("two", 2, 8));
        assert!(!look("two", 2, 8));
    }
}
