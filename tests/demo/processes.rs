//! The processes of the demonstration: started with a clean environment, and ended with it.

use std::{
    io::{BufRead as _, BufReader, Read},
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        mpsc::{self, Receiver, RecvTimeoutError},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::oneshot,
};

/// How long a process may take to say that it is ready.
const START_LIMIT: Duration = Duration::from_secs(15);

/// A command for a program that was built beside this one.
pub(crate) fn program(name: &str) -> Result<Command> {
    let mut path = std::env::current_exe().context("this program does not know where it is")?;
    path.set_file_name(name);
    ensure!(path.exists(), "{} is not there; `make demo` builds it", path.display());
    let mut command = Command::new(path);
    command.env_clear().stdin(Stdio::null());
    Ok(command)
}

/// All processes; they are ended when this is dropped, when the time is up, and when this program is told to stop.
pub(crate) struct Processes {
    children: Arc<Mutex<Vec<Child>>>,
    /// Tells the guard that the demonstration is over.
    over: Option<oneshot::Sender<()>>,
    guard: Option<thread::JoinHandle<Ended>>,
}

/// Why the processes were ended.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ended {
    /// They are not needed any more.
    Over,
    /// The time was up.
    Late,
    /// SIGINT or SIGTERM.
    Stopped,
}

impl Processes {
    pub(crate) fn new(time_limit: Duration) -> Result<Self> {
        let children: Arc<Mutex<Vec<Child>>> = Arc::default();
        let guarded = Arc::clone(&children);
        let (over, is_over) = oneshot::channel();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (mut interrupt, mut terminate) = {
            let _context = runtime.enter();
            (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?)
        };
        let guard = thread::Builder::new().spawn(move || {
            let ended = runtime.block_on(async {
                tokio::select! {
                    _ = is_over => Ended::Over,
                    () = tokio::time::sleep(time_limit) => Ended::Late,
                    _ = interrupt.recv() => Ended::Stopped,
                    _ = terminate.recv() => Ended::Stopped,
                }
            });
            // Every wait for them fails then.
            end_all(&mut lock(&guarded));
            ended
        })?;
        Ok(Self { children, over: Some(over), guard: Some(guard) })
    }

    pub(crate) fn start(&mut self, name: &'static str, mut command: Command) -> Result<Process> {
        command.stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().with_context(|| format!("cannot start the {name}"))?;
        let log = Arc::default();
        let lines = child.stderr.take().map(|stderr| follow(stderr, Arc::clone(&log)));
        let lines = lines.with_context(|| format!("the {name} has no standard error"))?;
        let mut children = lock(&self.children);
        let place = children.len();
        children.push(child);
        Ok(Process { name, children: Arc::clone(&self.children), place, log, lines })
    }

    /// Ends all processes; says why they were ended.
    pub(crate) fn end(&mut self) -> Ended {
        drop(self.over.take());
        let ended = self.guard.take().and_then(|guard| guard.join().ok());
        // Those that were started after the guard had done its work.
        end_all(&mut lock(&self.children));
        ended.unwrap_or(Ended::Over)
    }
}

impl Drop for Processes {
    fn drop(&mut self) {
        self.end();
    }
}

/// One process.
pub(crate) struct Process {
    name: &'static str,
    children: Arc<Mutex<Vec<Child>>>,
    place: usize,
    log: Arc<Mutex<Vec<String>>>,
    lines: Receiver<String>,
}

impl Process {
    /// Waits for a line on standard error in which `find` finds something.
    pub(crate) fn wait_for_line<T>(&self, find: impl Fn(&str) -> Option<T>) -> Result<T> {
        let until = Instant::now() + START_LIMIT;
        loop {
            match self.lines.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(line) => {
                    if let Some(found) = find(&line) {
                        return Ok(found);
                    }
                }
                Err(RecvTimeoutError::Disconnected) => {
                    bail!("the {} ended; it said: {}", self.name, self.last_words())
                }
                Err(RecvTimeoutError::Timeout) => bail!(
                    "the {} was not ready within {} s; it said: {}",
                    self.name,
                    START_LIMIT.as_secs(),
                    self.last_words()
                ),
            }
        }
    }

    pub(crate) fn has_ended(&mut self) -> Result<bool> {
        let mut children = lock(&self.children);
        let ended = children.get_mut(self.place).map(Child::try_wait).transpose()?;
        Ok(ended.flatten().is_some())
    }

    /// The last line that it wrote.
    pub(crate) fn last_words(&self) -> String {
        lock(&self.log).last().cloned().unwrap_or_else(|| "nothing".to_owned())
    }
}

fn end_all(children: &mut [Child]) {
    for child in &mut *children {
        // It may be gone already.
        let _ = child.kill();
    }
    for child in children {
        let _ = child.wait();
    }
}

/// Reads lines for as long as there are any, so that no process waits for its log to be read.
fn follow(stderr: impl Read + Send + 'static, log: Arc<Mutex<Vec<String>>>) -> Receiver<String> {
    let (sender, lines) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(stderr).lines().map_while(Result::ok) {
            lock(&log).push(line.clone());
            // Nobody reads after the process was ready.
            let _ = sender.send(line);
        }
    });
    lines
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
