//! User instructions of Midspan, counted by callgrind, which no noise disturbs.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use crate::{
    case::Case,
    connection::Scratch,
    frames::Pattern,
    measure::latency::receive_messages,
    midspan::Under,
    number::{count, float},
    relays::{Pairs, Relay},
};

/// What a run gave.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(crate) struct Instructions {
    /// For each message of 64 bytes, many of them a write.
    pub(crate) per_small_message: f64,
    /// For each byte of payload in messages of 16 KiB.
    pub(crate) per_byte: f64,
}

/// Repetitions of a pattern of 1 MiB. What a process needs once falls out of the difference.
const FEW: u64 = 4;
const MANY: u64 = 20;

/// Nothing when there is no valgrind.
pub(crate) fn measure(folder: &Path) -> Result<Option<Instructions>> {
    let there =
        Command::new("valgrind").arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    if there.is_err() {
        return Ok(None);
    }
    let difference = |case: Case| {
        let pattern = Pattern::new(case.payload());
        let few = run(folder, &pattern, FEW)?;
        let many = run(folder, &pattern, MANY)?;
        let messages = (MANY - FEW) * count(pattern.bytes().len() / pattern.frame());
        anyhow::Ok(float(many.saturating_sub(few)) / float(messages))
    };
    Ok(Some(Instructions {
        per_small_message: difference(Case::Bytes64)?,
        per_byte: difference(Case::KiB16)? / float(count(Case::KiB16.payload())),
    }))
}

/// All instructions of a relay's life in which it carried the pattern some times.
fn run(folder: &Path, pattern: &Pattern, times: u64) -> Result<u64> {
    let out = folder.join("callgrind.out");
    let mut relay = Relay::start_midspan(folder, "instructions", None, Under::Callgrind(&out))?;
    let mut pairs = relay.open(1)?;
    carry(&mut pairs, pattern, times)?;
    drop(pairs);
    relay.stop()?;
    let text = fs::read_to_string(&out).context("callgrind wrote nothing")?;
    total(&text).context("callgrind wrote no total")
}

/// Sends the pattern some times on the first stream, and waits until all of it has arrived.
pub(crate) fn carry(pairs: &mut Pairs, pattern: &Pattern, times: u64) -> Result<()> {
    let messages = times * count(pattern.bytes().len() / pattern.frame());
    std::thread::scope(|scope| {
        let (sender, receiver) = (&mut pairs.senders[0], &mut pairs.receivers[0]);
        let sending = scope.spawn(|| (0..times).try_for_each(|_| sender.send_all(pattern.bytes())));
        receive_messages(receiver, messages, &mut Scratch::new())?;
        sending.join().map_err(|_| anyhow::anyhow!("the sender panicked"))??;
        Ok(())
    })
}

fn total(text: &str) -> Option<u64> {
    text.lines()
        .find_map(|line| line.strip_prefix("totals: ").or(line.strip_prefix("summary: ")))?
        .trim()
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_total_is_read() {
        assert_eq!(total("events: Ir\nfn=x\n1 2\nsummary: 12345\n\ntotals: 12345\n"), Some(12_345));
        assert_eq!(total("events: Ir\n"), None);
    }
}
