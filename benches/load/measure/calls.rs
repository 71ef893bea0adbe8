//! System calls of Midspan, counted by strace.

use std::{collections::BTreeMap, fs, path::Path, thread, time::Duration};

use anyhow::{Result, bail};

use crate::{
    case::Case,
    clock,
    connection::Scratch,
    frames::Pattern,
    measure::{instructions::carry, latency::round_trip},
    midspan::Under,
    number::{GIB, count, float},
    relays::{Pairs, Relay},
    tls::Certificate,
};

/// What a run gave.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Calls {
    /// All calls for each message of 64 bytes, there and back in turn: a thread rests for messages that nobody answers, which is
    /// one more call or not, as time has it.
    pub(crate) per_small_message: f64,
    /// All calls for each GiB in messages of 16 KiB, as many of them as a socket takes.
    pub(crate) per_gib: f64,
    /// Writes for each read there, those without success left out. A write that a socket takes in two parts counts twice.
    pub(crate) writes_per_read: f64,
    /// All calls for each GiB in the same messages with TLS.
    pub(crate) per_gib_tls: f64,
}

/// Repetitions. What a process needs once falls out of the difference.
const FEW: u64 = 100;
const MANY: u64 = 600;
const PATIENCE: Duration = Duration::from_secs(20);

const READS: [&str; 4] = ["read", "readv", "recvfrom", "recvmsg"];
const WRITES: [&str; 4] = ["write", "writev", "sendto", "sendmsg"];

/// Calls and errors by name.
type Counts = BTreeMap<String, [u64; 2]>;

pub(crate) fn measure(folder: &Path, certificate: &Certificate) -> Result<Calls> {
    let small = Pattern::single(Case::Bytes64.payload());
    let one_by_one = difference(|times| run(folder, None, |pairs| in_turn(pairs, &small, times)))?;
    let large = Pattern::new(Case::KiB16.payload());
    let stream = |tls| difference(|times| run(folder, tls, |pairs| carry(pairs, &large, times)));
    let (streaming, with_tls) = (stream(None)?, stream(Some(certificate))?);
    let succeeded = |names: [&str; 4]| {
        let of = |name| streaming.get(name).map_or(0, |[calls, errors]| calls.saturating_sub(*errors));
        float(names.into_iter().map(of).sum())
    };
    let messages = count(large.bytes().len() / large.frame());
    let gib = float((MANY - FEW) * messages * count(large.payload())) / GIB;
    Ok(Calls {
        per_small_message: total(&one_by_one) / float(2 * (MANY - FEW)),
        per_gib: total(&streaming) / gib,
        writes_per_read: succeeded(WRITES) / succeeded(READS),
        per_gib_tls: total(&with_tls) / gib,
    })
}

fn total(counts: &Counts) -> f64 {
    float(counts.values().map(|[calls, _]| calls).sum())
}

/// Each message is answered, and the next one is sent when the answer has arrived.
fn in_turn(pairs: &mut Pairs, pattern: &Pattern, times: u64) -> Result<()> {
    let mut scratch = Scratch::new();
    for _ in 0..times {
        round_trip(&mut pairs.senders[0], &mut pairs.receivers[0], pattern, &mut scratch)?;
    }
    Ok(())
}

fn difference(run: impl Fn(u64) -> Result<Counts>) -> Result<Counts> {
    let (few, mut many) = (run(FEW)?, run(MANY)?);
    for (name, counts) in &mut many {
        let [calls, errors] = few.get(name).copied().unwrap_or_default();
        *counts = [counts[0].saturating_sub(calls), counts[1].saturating_sub(errors)];
    }
    Ok(many)
}

/// All calls of a relay's life in which it did some work.
fn run(
    folder: &Path,
    tls: Option<&Certificate>,
    work: impl FnOnce(&mut Pairs) -> Result<()>,
) -> Result<Counts> {
    let out = folder.join("strace.out");
    fs::write(&out, "")?;
    let mut relay = Relay::start_midspan(folder, "calls", tls, Under::Strace(&out))?;
    let mut pairs = relay.open(1)?;
    work(&mut pairs)?;
    drop(pairs);
    relay.stop()?;
    // strace outlives the relay for the moment in which it writes this.
    let end = clock::now() + PATIENCE;
    loop {
        if let Some(counts) = counts(&fs::read_to_string(&out)?) {
            return Ok(counts);
        }
        if clock::now() > end {
            bail!("strace wrote no counts");
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// The table of `strace -c`: share, seconds, time a call, calls, errors if there are any, name. Nothing before its last line.
fn counts(text: &str) -> Option<Counts> {
    let mut counts = Counts::new();
    for line in text.lines() {
        let fields: Vec<_> = line.split_whitespace().collect();
        let (Some(calls), Some(&name)) = (fields.get(3).and_then(|calls| calls.parse().ok()), fields.last())
        else {
            continue;
        };
        if name == "total" {
            return Some(counts);
        }
        let errors = if fields.len() > 5 { fields[4].parse().ok()? } else { 0 };
        counts.insert(name.to_owned(), [calls, errors]);
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_read() {
        let text = "% time     seconds  usecs/call     calls    errors syscall\n\
            ------ ----------- ----------- --------- --------- ----------------\n \
            60.00    0.000300           1       300       100 recvfrom\n \
            40.00    0.000200           2       100           sendto\n\
            ------ ----------- ----------- --------- --------- ----------------\n";
        assert_eq!(counts(text), None, "it is not there to its end");
        let counts =
            counts(&format!("{text}100.00    0.000500           1       400       100 total\n")).unwrap();
        assert_eq!((counts["recvfrom"], counts["sendto"]), ([300, 100], [100, 0]));
        assert!((total(&counts) - 400.0).abs() < 0.5);
    }
}
