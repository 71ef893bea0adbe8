//! Placement, links, tickets and legs under a scheduler with a seed: the code that decides in the real processes, with a network
//! and a store that fail in every way that a seed can think of.
//!
//! What decides is what ships: `core` (placement, tickets, admission, session, records), the edge's pairing and announcements, the
//! control plane's links, view and search for a device, the store's records. What is around it in the processes (tasks, calls,
//! time limits) is written down here once more, on the time and the network of the simulation.
#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test fails by a panic, and shows what it did"
)]

mod clients;
mod control;
mod edge;
mod executor;
mod network;
mod run;
mod store;
mod world;

use std::{
    ops::Range,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use crate::{
    run::{Counts, run},
    world::Sabotage,
};

/// As many as take some ten seconds without optimisation. `make test-long` runs 100,000.
const SEEDS: u64 = 500;

/// In how many seeds it must show that something is taken out.
const FEW: u64 = 2000;

/// How many seeds are run at a time: other tests run as well.
const THREADS: usize = 2;

#[test]
#[expect(clippy::disallowed_methods, reason = "says how long it took")]
fn the_rules_hold() {
    if let Some(seed) = number("MIDSPAN_SIM_SEED") {
        let outcome = run(seed, Sabotage::None, true);
        println!("{outcome:?}");
        assert_eq!(outcome.failure, None);
        return;
    }
    let seeds = number("MIDSPAN_SIM_SEEDS").unwrap_or(SEEDS);
    let (begun, sums, failures) = (Instant::now(), Mutex::new(Counts::default()), Mutex::new(Vec::new()));
    each(0..seeds, |seed| {
        let outcome = run(seed, Sabotage::None, false);
        sums.lock().unwrap().add(&outcome.counts);
        if let Some(failure) = outcome.failure {
            println!("seed {seed}, {failure}\n{}", replay(seed));
            failures.lock().unwrap().push((seed, outcome.broken));
        }
        true
    });
    let (sums, failures) = (sums.into_inner().unwrap(), failures.into_inner().unwrap());
    println!("{seeds} seeds in {:.1} s: {sums:?}", begun.elapsed().as_secs_f64());
    if let Some((seed, rule)) = failures.first() {
        panic!("{} of {seeds} seeds break a rule, the first one {rule:?}; {}", failures.len(), replay(*seed));
    }
    let Counts { granted, refused, joined, forwarded, .. } = sums;
    assert!([granted, refused, joined, forwarded].iter().all(|&count| count >= seeds / 2), "{sums:?}");
}

#[test]
fn one_seed_is_one_run() {
    for seed in 0..10 {
        let outcome = run(seed, Sabotage::None, false);
        assert_eq!(outcome, run(seed, Sabotage::None, false), "seed {seed}");
        assert_ne!(outcome.trace, run(seed + 1, Sabotage::None, false).trace);
    }
}

#[test]
fn without_the_check_of_the_owner_two_edges_join_one_stream() {
    assert_missed(Sabotage::Ownership);
}

#[test]
fn without_the_incarnation_an_edge_takes_legs_of_its_earlier_life() {
    assert_missed(Sabotage::Incarnation);
}

#[test]
fn without_the_deadline_handshakes_do_not_end() {
    assert_missed(Sabotage::Deadline);
}

#[test]
fn without_announcing_again_lists_stay_wrong() {
    assert_missed(Sabotage::Restore);
}

/// Some seed breaks the rule that is to miss what is taken out.
fn assert_missed(sabotage: Sabotage) {
    let first = Mutex::new(None);
    each(0..FEW, |seed| {
        let outcome = run(seed, sabotage, false);
        let broken = outcome.failure.map(|failure| (seed, failure));
        let found = broken.is_some();
        if found {
            *first.lock().unwrap() = broken;
        }
        !found
    });
    let first = first.into_inner().unwrap();
    println!("{sabotage:?}: {first:?}");
    assert!(first.is_some(), "{sabotage:?} is not missed in {FEW} seeds");
}

/// Goes through the seeds in no certain order, until one says that it is enough.
fn each(seeds: Range<u64>, run: impl Fn(u64) -> bool + Sync) {
    let next = AtomicU64::new(seeds.start);
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end {
                        break;
                    }
                    if !run(seed) {
                        next.store(seeds.end, Ordering::Relaxed);
                    }
                }
            });
        }
    });
}

fn replay(seed: u64) -> String {
    format!(
        "MIDSPAN_SIM_SEED={seed} cargo test --package midspan-tests --test sim -- the_rules_hold --nocapture"
    )
}

#[expect(clippy::disallowed_methods, reason = "which seeds")]
fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap())
}
