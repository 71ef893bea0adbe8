//! Who is there, as it was a moment ago: looked up in the background, so that nobody waits for it.

use std::{
    collections::HashSet,
    sync::Arc,
    time::{Duration, Instant},
};

use midspan_core::{id::StreamId, placement, ticket::Owner};
use midspan_platform::{
    kubernetes::Pods,
    rendezvous::{Lease, Leases, ServerRole},
};

/// The processes of the relay: who has a lease, and what Kubernetes says of the edges' pods.
#[derive(Debug, Clone)]
pub struct View {
    /// The edges.
    pub edges: Leases,
    /// The control replicas.
    pub replicas: Leases,
    /// What Kubernetes says of the edges' pods, where it is asked.
    pub pods: Arc<Pods>,
    /// When the leases were looked up.
    pub seen: Instant,
}

/// Whether a process is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Presence {
    /// It has a lease.
    Alive,
    /// Its lease is missing.
    Gone,
    /// Its lease is missing, but that means nothing now.
    Unknown,
}

/// A view that is older than this proves nobody's absence.
const MAX_AGE: Duration = Duration::from_secs(3);

impl View {
    /// Nobody has been looked for yet.
    pub fn empty(now: Instant) -> Self {
        let nobody = || Leases { alive: Vec::new(), settled: false };
        Self { edges: nobody(), replicas: nobody(), pods: Arc::default(), seen: now }
    }

    /// What was looked up after the view `before`.
    ///
    /// Who is missing while that means nothing is taken to be as before: a store that has forgotten is no reason to place no
    /// stream until all have come round.
    pub fn new(edges: Leases, replicas: Leases, seen: Instant, before: &Self) -> Self {
        Self {
            edges: with_missing(edges, &before.edges),
            replicas: with_missing(replicas, &before.replicas),
            pods: Arc::clone(&before.pods),
            seen,
        }
    }

    /// The same with what Kubernetes says now.
    pub(crate) fn with_pods(&self, pods: Arc<Pods>) -> Self {
        Self { pods, ..self.clone() }
    }

    /// Whether the process `owner` is there.
    pub fn presence(&self, role: ServerRole, owner: &Owner, now: Instant) -> Presence {
        let leases = match role {
            ServerRole::Edge => &self.edges,
            ServerRole::Control => &self.replicas,
        };
        if leases.alive.iter().any(|lease| lease.owner.incarnation == owner.incarnation) {
            Presence::Alive
        } else if self.is_settled(now) {
            Presence::Gone
        } else {
            Presence::Unknown
        }
    }

    /// Whether what is missing here is gone.
    pub fn is_settled(&self, now: Instant) -> bool {
        self.edges.settled && self.replicas.settled && now.saturating_duration_since(self.seen) <= MAX_AGE
    }

    /// The edge that is to own a new stream. `None` when none can take it.
    ///
    /// One whose lease is alive and accepts, and which Kubernetes, where it is asked, calls ready. If that leaves nobody the
    /// lease is enough: a Service that was named wrongly, or probes that fail everywhere, must not stop the relay. An edge that was
    /// killed and started again has two leases for a while, of which the last to be renewed counts.
    pub fn owner_of(&self, stream: StreamId) -> Option<Owner> {
        let (ready, others) = self.candidates();
        let edges = if ready.is_empty() { others } else { ready };
        let names: Vec<_> = edges.iter().map(|lease| lease.owner.name.as_str()).collect();
        placement::owner_of(stream, &names).map(|index| edges[index].owner.clone())
    }

    /// How many edges would take streams that Kubernetes does not call ready, when it calls none of them ready.
    pub(crate) fn overruled(&self) -> usize {
        let (ready, others) = self.candidates();
        if ready.is_empty() { others.len() } else { 0 }
    }

    /// The edges whose leases accept streams: those that Kubernetes lets have some, and the others.
    fn candidates(&self) -> (Vec<&Lease>, Vec<&Lease>) {
        let accepting = self.edges.alive.iter().filter(|lease| lease.accepts);
        accepting.partition(|lease| self.pods.may_take(&lease.owner.name))
    }

    /// How many links each other replica has that can take more.
    pub fn loads_beside(&self, replica: &Owner) -> Vec<u64> {
        let others = self.replicas.alive.iter();
        let others = others.filter(|lease| lease.accepts && lease.owner.incarnation != replica.incarnation);
        others.map(|lease| lease.load).collect()
    }
}

fn with_missing(mut leases: Leases, before: &Leases) -> Leases {
    if !leases.settled {
        let known: HashSet<_> = leases.alive.iter().map(|lease| lease.owner.incarnation).collect();
        let missing = before.alive.iter().filter(|lease| !known.contains(&lease.owner.incarnation));
        // First, since of several lives of one name the last one counts.
        leases.alive = missing.chain(&leases.alive).cloned().collect();
    }
    leases
}

#[cfg(test)]
mod tests {
    use midspan_core::id::Incarnation;
    use midspan_platform::clock;

    use super::*;

    #[test]
    fn a_missing_lease_means_something_only_in_a_settled_and_fresh_view() {
        let (now, role) = (clock::now(), ServerRole::Control);
        let view = |settled| View {
            edges: Leases { alive: Vec::new(), settled: true },
            replicas: Leases { alive: vec![lease(1, true, 10)], settled },
            pods: Arc::default(),
            seen: now,
        };
        let presence = |settled, owner, after| {
            view(settled).presence(role, &self::owner(owner), now + Duration::from_secs(after))
        };
        assert_eq!(presence(true, 1, 0), Presence::Alive);
        assert_eq!(presence(true, 2, 0), Presence::Gone);
        assert_eq!(presence(false, 2, 0), Presence::Unknown);
        assert_eq!(presence(true, 2, 60), Presence::Unknown);
        assert_eq!(presence(false, 1, 60), Presence::Alive);
    }

    #[test]
    fn who_is_missing_before_all_have_come_round_is_kept() {
        let leases = |numbers: &[u128], settled| Leases {
            alive: numbers.iter().map(|&number| lease(number, true, 0)).collect(),
            settled,
        };
        let now = clock::now();
        let before = View::new(leases(&[1, 2], true), leases(&[3], true), now, &View::empty(now));
        let after = View::new(leases(&[2], false), leases(&[], true), now, &before);
        assert_eq!((after.edges.alive.len(), after.replicas.alive.len()), (2, 0));
    }

    #[test]
    fn streams_and_links_go_where_there_is_room() {
        let (full, open, own) = (lease(1, false, 10), lease(2, true, 20), lease(3, true, 30));
        let leases = |alive: &[&Lease]| Leases {
            alive: alive.iter().map(|lease| (*lease).clone()).collect(),
            settled: true,
        };
        let view = |edges: &[&Lease], replicas: &[&Lease]| View {
            edges: leases(edges),
            replicas: leases(replicas),
            pods: Arc::default(),
            seen: clock::now(),
        };
        let stream = StreamId::from_random(1);
        assert_eq!(view(&[&full, &open], &[]).owner_of(stream), Some(open.owner.clone()));
        assert_eq!(view(&[&full], &[]).owner_of(stream), None);
        assert_eq!(view(&[], &[&full, &open, &own]).loads_beside(&own.owner), [20]);
    }

    #[test]
    fn an_edge_needs_a_lease_and_kubernetes_has_a_say_unless_it_leaves_nobody() {
        let (ready, leaving) = ((true, false), (false, true));
        for (case, leases, pods, expected, overruled) in [
            ("both are ready", [true, true], [Some(ready), Some(ready)], [1, 2].as_slice(), 0),
            (
                "one is terminating, and its lease does not know yet",
                [true, true],
                [Some(ready), Some(leaving)],
                &[1],
                0,
            ),
            ("one has gone without a word", [true, true], [None, Some(ready)], &[2], 0),
            ("one is not ready yet", [true, true], [Some((false, false)), Some(ready)], &[2], 0),
            ("a lease that is full counts", [false, true], [Some(ready), Some(ready)], &[2], 0),
            ("nobody is ready", [true, true], [Some((false, false)), Some(leaving)], &[1, 2], 2),
            ("the Service has no pods", [true, true], [None, None], &[1, 2], 2),
            ("nobody is ready, and one has no room", [false, true], [Some(leaving), Some(leaving)], &[2], 1),
            ("nobody has room", [false, false], [Some(ready), Some(ready)], &[], 0),
        ] {
            let alive = (1..).zip(leases).map(|(number, accepts)| lease(number, accepts, 0)).collect();
            let pods = (1..).zip(pods).filter_map(|(number, pod)| Some((owner(number).name, pod?)));
            let now = clock::now();
            let view = View { edges: Leases { alive, settled: true }, ..View::empty(now) };
            let view = view.with_pods(Arc::new(Pods::current(pods)));
            let chosen: HashSet<_> =
                (0..64).filter_map(|number| view.owner_of(StreamId::from_random(number))).collect();
            assert_eq!(chosen, expected.iter().map(|&number| owner(number)).collect(), "{case}");
            assert_eq!(view.overruled(), overruled, "{case}");
        }
    }

    #[test]
    fn of_two_lives_of_an_edge_the_last_to_renew_is_given_streams() {
        let now = clock::now();
        let life = |number| Lease {
            owner: Owner { name: "edge".to_owned(), ..owner(number) },
            ..lease(number, true, 0)
        };
        let leases = |numbers: &[u128], settled| Leases {
            alive: numbers.iter().map(|&number| life(number)).collect(),
            settled,
        };
        let owner_in = |view: &View| view.owner_of(StreamId::from_random(1)).unwrap().incarnation;
        for (dead, living) in [(1, 2), (2, 1)] {
            let both = View { edges: leases(&[dead, living], true), ..View::empty(now) };
            assert_eq!(owner_in(&both), life(living).owner.incarnation);
            let forgotten = View::new(leases(&[living], false), leases(&[], true), now, &both);
            assert_eq!(
                owner_in(&forgotten),
                life(living).owner.incarnation,
                "a store that has forgotten one"
            );
        }
    }

    fn lease(number: u128, accepts: bool, load: u64) -> Lease {
        Lease { role: ServerRole::Control, owner: owner(number), accepts, load, passed: None }
    }

    fn owner(number: u128) -> Owner {
        let incarnation = Incarnation::from_random(number);
        Owner { name: format!("process-{number}"), incarnation, address: String::new() }
    }
}
