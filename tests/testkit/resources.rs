use std::{
    fs,
    process::{self, Command},
};

use crate::Relay;

impl Relay {
    /// Makes [`Relay::peak_kib`] begin anew.
    pub fn forget_peak(&self) {
        fs::write(format!("/proc/{}/clear_refs", self.process().id()), "5").unwrap();
    }

    /// The most resident memory that the relay ever had, in KiB, since its start or [`Relay::forget_peak`].
    pub fn peak_kib(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.process().id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }
}

/// Lets this process have as many files and sockets open as the system allows, which must be `needed` at least.
pub fn need_files(needed: usize) {
    // The system's own `prlimit`: a limit cannot be set from safe Rust's standard library.
    let script =
        format!("prlimit --pid {} --nofile=$(ulimit -Hn):$(ulimit -Hn) && ulimit -Hn", process::id());
    let output = Command::new("sh").args(["-c", &script]).output().unwrap();
    let limit = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
    let enough = limit == "unlimited" || limit.parse::<usize>().unwrap() >= needed;
    assert!(enough, "{needed} open files are needed, and {limit} are allowed: raise `ulimit -Hn`");
}
