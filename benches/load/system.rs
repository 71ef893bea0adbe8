//! What the kernel knows of a process.

use std::{fs, io, path::Path, time::Duration};

use anyhow::{Context as _, Result};
use rustix::{
    process::{Pid, Resource, getrlimit, setrlimit},
    thread::{CpuSet, sched_getaffinity, sched_setaffinity},
};

/// CPU time that the threads of a process have used.
pub(crate) fn cpu(pid: u32) -> Result<Duration> {
    let mut total = 0;
    for task in tasks(pid)? {
        match fs::read_to_string(task.join("schedstat")) {
            Ok(text) => {
                let spent = text.split(' ').next().and_then(|first| first.parse::<u64>().ok());
                total += spent.context("schedstat says something else")?;
            }
            // A thread may have ended since it was listed.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).context("the kernel tells no schedstat"),
        }
    }
    Ok(Duration::from_nanos(total))
}

fn tasks(pid: u32) -> Result<Vec<std::path::PathBuf>> {
    let entries = fs::read_dir(format!("/proc/{pid}/task")).context("the process has ended")?;
    entries.map(|entry| Ok(entry?.path())).collect()
}

/// Memory of a process in KiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Memory {
    /// Anonymous pages: what the program itself asked for.
    pub(crate) anonymous: u64,
    pub(crate) resident: u64,
    /// The most that was resident at any time.
    pub(crate) peak: u64,
}

pub(crate) fn memory(pid: u32) -> Result<Memory> {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    Ok(Memory {
        anonymous: kib(&rollup, "Anonymous:")?,
        resident: kib(&status, "VmRSS:")?,
        peak: kib(&status, "VmHWM:")?,
    })
}

fn kib(text: &str, name: &str) -> Result<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name)).with_context(|| format!("no {name}"))?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

/// As many open files as the hard limit lets.
pub(crate) fn raise_open_files() -> Result<u64> {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit).context("cannot raise the limit on open files")?;
    Ok(limit.current.unwrap_or(u64::MAX))
}

/// The last CPU that this thread may run on.
pub(crate) fn last_cpu() -> Result<usize> {
    let allowed = sched_getaffinity(None)?;
    (0..CpuSet::MAX_CPU).rev().find(|&cpu| allowed.is_set(cpu)).context("no CPU to run on")
}

/// Ties this thread to one CPU.
pub(crate) fn pin_thread(cpu: usize) -> Result<()> {
    Ok(sched_setaffinity(None, &only(cpu))?)
}

/// Ties all threads of a process to one CPU.
pub(crate) fn pin_process(pid: u32, cpu: usize) -> Result<()> {
    for task in tasks(pid)? {
        let id = task.file_name().and_then(|name| name.to_str()?.parse().ok()).and_then(Pid::from_raw);
        sched_setaffinity(id, &only(cpu))?;
    }
    Ok(())
}

fn only(cpu: usize) -> CpuSet {
    let mut set = CpuSet::new();
    set.set(cpu);
    set
}

/// The machine, for the record.
pub(crate) fn machine() -> (String, usize, String) {
    let read = |path: &str| fs::read_to_string(Path::new(path)).unwrap_or_default();
    let info = read("/proc/cpuinfo");
    let field = |line: &str| line.split_once(':').map(|(_, value)| value.trim().to_owned());
    let model = info.lines().find(|line| line.starts_with("model name")).and_then(field);
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    (
        model.unwrap_or_else(|| "unknown".to_owned()),
        cores,
        read("/proc/sys/kernel/osrelease").trim().to_owned(),
    )
}

/// The name of TCP's congestion control.
pub(crate) fn congestion_control() -> String {
    let name = fs::read_to_string("/proc/sys/net/ipv4/tcp_congestion_control");
    name.map_or_else(|_| "unknown".to_owned(), |name| name.trim().to_owned())
}

/// The load average of the last minute for each CPU.
pub(crate) fn load() -> f64 {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load: f64 = text.split(' ').next().and_then(|first| first.parse().ok()).unwrap_or(f64::NAN);
    load / std::thread::available_parallelism().map_or(1.0, |cores| crate::number::float(cores.get() as u64))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn memory_fields_are_read() {
        let text = "Rss:  300 kB\nAnonymous:           1204 kB\n";
        assert_eq!(kib(text, "Anonymous:").unwrap(), 1204);
        assert!(kib(text, "VmHWM:").is_err());
    }

    #[test]
    fn a_process_that_works_uses_time_and_memory() {
        // A process of its own: threads of other tests end here meanwhile, and take their time along.
        let mut busy = Command::new("sh").args(["-c", "while :; do :; done"]).spawn().unwrap();
        let (start, mut spent) = (crate::clock::now(), Duration::ZERO);
        while spent < Duration::from_millis(20) && start.elapsed() < Duration::from_secs(20) {
            spent = cpu(busy.id()).unwrap();
        }
        let memory = memory(busy.id());
        busy.kill().unwrap();
        busy.wait().unwrap();
        assert!(spent >= Duration::from_millis(20), "{spent:?}");
        let memory = memory.unwrap();
        assert!(memory.peak >= memory.resident && memory.resident > 0);
    }
}
