//! From a TCP client through a local proxy, a relay and another local proxy to a TCP server.

use std::path::Path;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use crate::{
    case::Case,
    measure::{
        idle::{self, Idle},
        relay::{self, Comparison, Plan},
    },
    relays::Relay,
    report::text,
    systems,
    tls::Certificate,
    variants::Variant,
};

/// What a run gave.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct EndToEnd {
    pub(crate) comparisons: Vec<Comparison>,
    pub(crate) idle: Vec<Idle>,
}

/// Compares those that are there, in messages of 16 KiB, and then looks at `idle` streams of each. What is missing, and why, beside
/// it.
pub(crate) fn measure(
    streams: &[usize],
    plan: Plan,
    idle: usize,
    folder: &Path,
    certificate: &Certificate,
) -> Result<(EndToEnd, Vec<String>)> {
    let (mut there, mut missing) = (Vec::new(), Vec::new());
    for variant in Variant::END_TO_END {
        if !systems::is_installed(variant) {
            missing.push(format!("end to end: {variant} is not installed"));
        } else if variant.is_ours() {
            there.push(variant);
        } else {
            // A peer that does not work here must not take the others along.
            match Relay::start(variant, folder, &format!("try-{variant}"), certificate) {
                Ok(_) => there.push(variant),
                Err(error) => missing.push(format!("end to end: {error:#}")),
            }
        }
    }
    let cases: Vec<_> = streams.iter().map(|&streams| (Case::KiB16, streams)).collect();
    let comparisons = relay::compare(&there, &cases, plan, folder, certificate, |one| {
        text::print(&text::comparison(one, Some(Variant::MidspanProxies)));
        Ok(())
    })?;
    let of = |&variant: &Variant| {
        idle::measure(variant, idle, folder, certificate).with_context(|| format!("{variant}, idle streams"))
    };
    let idle = there.iter().map(of).collect::<Result<_>>()?;
    Ok((EndToEnd { comparisons, idle }, missing))
}
