//! Placement, links, tickets and legs under a scheduler with a seed: the code that decides in the real processes, with a network
//! and a store that fail in every way that a seed can think of.
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

use std::time::Instant;

use crate::{run::run, world::Sabotage};

#[test]
#[expect(clippy::disallowed_methods, reason = "how many seeds, and how long they took")]
fn whatever_happens_the_rules_hold() {
    let number = |name: &str, default| std::env::var(name).map_or(default, |text| text.parse().unwrap());
    let (first, seeds) = (number("MIDSPAN_SIM_FIRST", 0), number("MIDSPAN_SIM_SEEDS", 300));
    let begun = Instant::now();
    let mut failed = Vec::new();
    let mut sums = [0u64; 5];
    for seed in first..first + seeds {
        let outcome = run(seed, Sabotage::None, false);
        for (sum, number) in sums.iter_mut().zip([
            outcome.granted,
            outcome.refused,
            outcome.joined,
            outcome.forwarded,
            outcome.outrun,
        ]) {
            *sum += u64::from(number);
        }
        if let Some(failure) = outcome.failure {
            println!("seed {seed}: {failure}");
            failed.push(seed);
        }
    }
    println!("{seeds} seeds in {:?}: {sums:?}; {} failed", begun.elapsed(), failed.len());
    assert!(failed.is_empty());
}

#[test]
#[expect(clippy::disallowed_methods, reason = "which seed")]
fn replay() {
    let Ok(seed) = std::env::var("MIDSPAN_SIM_SEED") else { return };
    let outcome = run(seed.parse().unwrap(), Sabotage::None, true);
    println!("{outcome:?}");
    assert_eq!(outcome.failure, None);
}
