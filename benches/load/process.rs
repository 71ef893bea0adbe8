//! The relays as processes.

use std::{
    fs::{self, File},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

use crate::clock;

const START: Duration = Duration::from_secs(20);

/// A program that writes its output to files, and is killed when this is dropped.
#[derive(Debug)]
pub(crate) struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts a program. Standard output and standard error go to one file in `folder`.
    pub(crate) fn start(mut command: Command, folder: &Path, name: &str) -> Result<Self> {
        let log = folder.join(format!("{name}.log"));
        let file = File::create(&log)?;
        command.env_clear().stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        for name in ["PATH", "TOKIO_WORKER_THREADS"] {
            command.envs(std::env::var_os(name).map(|value| (name, value)));
        }
        let child = command.spawn().with_context(|| format!("cannot start {command:?}"))?;
        Ok(Self { child, log })
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Asks it to end, twice as impatient people do, and waits until it has.
    pub(crate) fn stop(mut self) -> Result<()> {
        let id = i32::try_from(self.id()).ok().and_then(Pid::from_raw).context("no process id")?;
        let end = clock::now() + START;
        kill_process(id, Signal::TERM)?;
        thread::sleep(Duration::from_millis(300));
        if self.child.try_wait()?.is_none() {
            kill_process(id, Signal::TERM)?;
        }
        while self.child.try_wait()?.is_none() {
            if clock::now() > end {
                bail!("it does not end");
            }
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Waits until the log says something.
    pub(crate) fn find<T>(&mut self, what: &str, find: impl Fn(&str) -> Option<T>) -> Result<T> {
        let end = clock::now() + START;
        loop {
            let log = fs::read_to_string(&self.log)?;
            if let Some(found) = find(&log) {
                return Ok(found);
            }
            if let Some(status) = self.child.try_wait()? {
                bail!("it ended ({status}) without {what}; its log:\n{log}");
            }
            if clock::now() > end {
                bail!("no {what}; its log:\n{log}");
            }
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// The address in `listening on {address}`.
    pub(crate) fn address(&mut self) -> Result<SocketAddr> {
        self.find("address", |log| {
            log.lines().find_map(|line| line.strip_prefix("listening on ")?.trim().parse().ok())
        })
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A program that was built beside this one.
pub(crate) fn sibling(name: &str) -> Result<PathBuf> {
    let mut path = std::env::current_exe()?;
    path.set_file_name(name);
    if !path.exists() {
        bail!("{} is not there; build it first", path.display());
    }
    Ok(path)
}
