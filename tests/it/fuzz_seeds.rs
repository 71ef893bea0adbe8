//! The committed seeds of the fuzz targets, replayed on the stable compiler.

use std::{collections::BTreeSet, fs};

use crate::tools::repository;

#[path = "../fuzz_targets/mod.rs"]
mod fuzz_targets;

#[test]
fn every_seed_holds() {
    for &(name, target) in fuzz_targets::TARGETS {
        let seeds = fs::read_dir(repository().join("fuzz/corpus").join(name)).unwrap();
        let mut count = 0;
        for seed in seeds {
            // A target that fails says what, and the test's output ends with the seed that it was given.
            let path = seed.unwrap().path();
            println!("{}", path.display());
            target(&fs::read(&path).unwrap());
            count += 1;
        }
        assert!(count >= 3, "{name} has {count} seeds");
    }
}

#[test]
fn every_target_can_be_fuzzed() {
    let names = |folder: &str| -> BTreeSet<String> {
        let entries = fs::read_dir(repository().join("fuzz").join(folder)).unwrap();
        entries.map(|entry| entry.unwrap().path().file_stem().unwrap().to_str().unwrap().to_owned()).collect()
    };
    let targets: BTreeSet<_> = fuzz_targets::TARGETS.iter().map(|&(name, _)| name.to_owned()).collect();
    assert_eq!(names("fuzz_targets"), targets);
    assert_eq!(names("corpus"), targets);
    let manifest = fs::read_to_string(repository().join("fuzz/Cargo.toml")).unwrap();
    for name in targets {
        assert!(manifest.contains(&format!("\nname = \"{name}\"\n")), "{name} is not in fuzz/Cargo.toml");
    }
}

/// Bytes that no one chose: a little of what the fuzzer does, in every run.
#[test]
fn perturbed_seeds_hold() {
    let mut state: u64 = 0x9e37_79b9_7f4a_7c15;
    let mut random = |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        usize::try_from(state % u64::try_from(below.max(1)).unwrap()).unwrap()
    };
    for &(name, target) in fuzz_targets::TARGETS {
        for seed in fs::read_dir(repository().join("fuzz/corpus").join(name)).unwrap() {
            let seed = fs::read(seed.unwrap().path()).unwrap();
            for _ in 0..100 {
                let mut bytes = seed.clone();
                for _ in 0..=random(4) {
                    let at = random(bytes.len());
                    match (random(4), bytes.get_mut(at)) {
                        (0, _) => bytes.truncate(at),
                        (1, _) => bytes.insert(at, random(256).to_le_bytes()[0]),
                        (2, Some(byte)) => *byte ^= 1 << random(8),
                        (_, Some(byte)) => *byte = random(256).to_le_bytes()[0],
                        (_, None) => {}
                    }
                }
                target(&bytes);
            }
        }
    }
}
