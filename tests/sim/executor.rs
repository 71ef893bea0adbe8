//! Time, tasks and chance of one run: one thread, a clock that jumps to the next thing that happens, and a seed.

use std::{
    cell::{Cell, RefCell},
    cmp::{Ordering, Reverse},
    collections::{BTreeSet, BinaryHeap},
    future::Future,
    pin::Pin,
    rc::Rc,
    sync::{
        Arc, LazyLock, Mutex,
        atomic::{self, AtomicU64},
    },
    task::{Context, Poll, Wake, Waker},
    time::{Duration, Instant},
};

use midspan_core::time::UnixTime;
use midspan_platform::rendezvous::Moment;
use testkit::Random;

/// One run. Clones are the same run.
#[derive(Clone)]
pub(crate) struct Sim(Rc<Inner>);

struct Inner {
    /// Microseconds since the beginning.
    now: Arc<AtomicU64>,
    tasks: RefCell<Vec<Option<Task>>>,
    free: RefCell<Vec<usize>>,
    ready: Arc<Mutex<BTreeSet<usize>>>,
    timers: RefCell<BinaryHeap<Reverse<Timer>>>,
    next: Cell<u64>,
    random: RefCell<Random>,
    trace: Cell<u64>,
    talks: bool,
    failure: RefCell<Option<String>>,
}

struct Task {
    life: Life,
    /// Absent while it runs.
    future: Option<Pin<Box<dyn Future<Output = ()>>>>,
    waker: Waker,
}

struct Timer {
    at: u64,
    number: u64,
    waker: Waker,
}

struct Ready {
    task: usize,
    ready: Arc<Mutex<BTreeSet<usize>>>,
}

/// Whose tasks end together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Life(pub u64);

/// Where all runs begin: nothing depends on which moment it is.
#[expect(clippy::disallowed_methods, reason = "an arbitrary point in time")]
static START: LazyLock<Instant> = LazyLock::new(|| Instant::now() + Duration::from_secs(86_400));

/// When all runs begin on the wall.
const START_UNIX: u64 = 1_800_000_000_000;

impl Sim {
    /// The run of `seed`, which says what happens if it `talks`.
    pub(crate) fn new(seed: u64, talks: bool) -> Self {
        Self(Rc::new(Inner {
            now: Arc::default(),
            tasks: RefCell::default(),
            free: RefCell::default(),
            ready: Arc::default(),
            timers: RefCell::default(),
            next: Cell::new(0),
            random: RefCell::new(Random::new(seed)),
            trace: Cell::new(0xcbf2_9ce4_8422_2325),
            talks,
            failure: RefCell::default(),
        }))
    }

    /// How long the run has lasted.
    pub(crate) fn elapsed(&self) -> Duration {
        Duration::from_micros(self.micros())
    }

    /// The clock that never goes back.
    pub(crate) fn now(&self) -> Instant {
        *START + self.elapsed()
    }

    /// The clock on the wall, where it is `skew` milliseconds ahead.
    pub(crate) fn unix(&self, skew: i64) -> UnixTime {
        UnixTime(self.unix_milliseconds(skew) / 1000)
    }

    pub(crate) fn unix_milliseconds(&self, skew: i64) -> u64 {
        START_UNIX.saturating_add(self.micros() / 1000).saturating_add_signed(skew)
    }

    /// The clock of a store.
    pub(crate) fn clock(&self) -> impl Fn() -> Moment + Send + Sync + 'static {
        let now = Arc::clone(&self.0.now);
        move || {
            let micros = now.load(atomic::Ordering::Relaxed);
            Moment {
                now: *START + Duration::from_micros(micros),
                unix_milliseconds: START_UNIX + micros / 1000,
            }
        }
    }

    /// A number that no one else gets in this run.
    pub(crate) fn number(&self) -> u64 {
        let next = self.0.next.get() + 1;
        self.0.next.set(next);
        next
    }

    /// A life of its own.
    pub(crate) fn life(&self) -> Life {
        Life(self.number())
    }

    /// 128 bits by chance.
    pub(crate) fn bits(&self) -> u128 {
        let mut random = self.0.random.borrow_mut();
        u128::from(random.number()) << 64 | u128::from(random.number())
    }

    /// A number from 0 to one less than `end`.
    pub(crate) fn below(&self, end: usize) -> usize {
        self.0.random.borrow_mut().below(end)
    }

    /// Yes in `percent` of 100 cases.
    pub(crate) fn chance(&self, percent: usize) -> bool {
        self.0.random.borrow_mut().chance(percent)
    }

    /// A time between the two.
    pub(crate) fn time(&self, shortest: Duration, longest: Duration) -> Duration {
        let span = usize::try_from(longest.saturating_sub(shortest).as_micros()).unwrap();
        shortest + Duration::from_micros(self.below(span.max(1)) as u64)
    }

    /// Says what happens, where somebody listens.
    pub(crate) fn say(&self, what: impl FnOnce() -> String) {
        if self.0.talks {
            println!("{:>10.3} s  {}", self.elapsed().as_secs_f64(), what());
        }
    }

    /// A rule is broken: the run ends here.
    pub(crate) fn fail(&self, what: impl FnOnce() -> String) {
        let mut failure = self.0.failure.borrow_mut();
        if failure.is_none() {
            let text = format!("after {:.3} s: {}", self.elapsed().as_secs_f64(), what());
            self.say(|| format!("BROKEN: {text}"));
            *failure = Some(text);
        }
    }

    /// What was broken.
    pub(crate) fn failure(&self) -> Option<String> {
        self.0.failure.borrow().clone()
    }

    /// A number that is the same for two runs only if the same happened in both.
    pub(crate) fn trace(&self) -> u64 {
        self.0.trace.get()
    }

    /// Starts a task, which ends with `life`.
    pub(crate) fn spawn(&self, life: Life, future: impl Future<Output = ()> + 'static) {
        let mut tasks = self.0.tasks.borrow_mut();
        let task = self.0.free.borrow_mut().pop().unwrap_or(tasks.len());
        let ready = Ready { task, ready: Arc::clone(&self.0.ready) };
        let started = Task { life, future: Some(Box::pin(future)), waker: Waker::from(Arc::new(ready)) };
        match tasks.get_mut(task) {
            Some(slot) => *slot = Some(started),
            None => tasks.push(Some(started)),
        }
        self.0.ready.lock().unwrap().insert(task);
    }

    /// Ends all tasks of a life.
    pub(crate) fn end(&self, life: Life) {
        let mut ended = Vec::new();
        for (index, slot) in self.0.tasks.borrow_mut().iter_mut().enumerate() {
            // No task ends its own life.
            if slot.as_ref().is_some_and(|task| task.life == life && task.future.is_some()) {
                ended.push(slot.take());
                self.0.free.borrow_mut().push(index);
            }
        }
        // What they held may speak to the run when it is dropped.
        drop(ended);
    }

    /// Ends all tasks.
    pub(crate) fn clear(&self) {
        let tasks = std::mem::take(&mut *self.0.tasks.borrow_mut());
        drop(tasks);
        self.0.timers.borrow_mut().clear();
    }

    /// Waits.
    pub(crate) fn sleep(&self, time: Duration) -> Sleep {
        self.sleep_until(self.micros() + u64::try_from(time.as_micros()).unwrap())
    }

    /// Waits for a moment, in microseconds since the beginning.
    pub(crate) fn sleep_until(&self, at: u64) -> Sleep {
        Sleep { sim: self.clone(), at, registered: false }
    }

    /// Waits for `future`, so long at the most.
    pub(crate) async fn timeout<F: Future>(&self, time: Duration, future: F) -> Option<F::Output> {
        tokio::select! {
            biased;
            output = future => Some(output),
            () = self.sleep(time) => None,
        }
    }

    /// Lets everything happen for `time`, or until a rule is broken.
    pub(crate) fn run_for(&self, time: Duration) {
        let end = self.micros() + u64::try_from(time.as_micros()).unwrap();
        while self.0.failure.borrow().is_none() {
            // Any of them, and the same one for the same seed.
            let picked = {
                let mut ready = self.0.ready.lock().unwrap();
                let chosen = if ready.len() > 1 { self.below(ready.len()) } else { 0 };
                let picked = ready.iter().nth(chosen).copied();
                picked.filter(|task| ready.remove(task))
            };
            match picked {
                Some(task) => self.poll(task),
                None => {
                    let mut timers = self.0.timers.borrow_mut();
                    let due = timers.peek().is_some_and(|Reverse(timer)| timer.at <= end);
                    let Some(Reverse(timer)) = (if due { timers.pop() } else { None }) else {
                        self.0.now.store(end, atomic::Ordering::Relaxed);
                        return;
                    };
                    self.0.now.store(timer.at.max(self.micros()), atomic::Ordering::Relaxed);
                    drop(timers);
                    timer.waker.wake();
                }
            }
        }
    }

    fn poll(&self, index: usize) {
        let taken = self
            .0
            .tasks
            .borrow_mut()
            .get_mut(index)
            .and_then(Option::as_mut)
            .and_then(|task| Some((task.future.take()?, task.waker.clone())));
        let Some((mut future, waker)) = taken else { return };
        let trace = self.0.trace.get() ^ (self.micros() << 8) ^ index as u64;
        self.0.trace.set(trace.wrapping_mul(0x0000_0100_0000_01b3).rotate_left(23));
        let over = future.as_mut().poll(&mut Context::from_waker(&waker)).is_ready();
        let mut tasks = self.0.tasks.borrow_mut();
        if over {
            tasks[index] = None;
            self.0.free.borrow_mut().push(index);
            drop(tasks);
            drop(future);
        } else if let Some(task) = &mut tasks[index] {
            task.future = Some(future);
        }
    }

    /// Microseconds since the beginning.
    pub(crate) fn micros(&self) -> u64 {
        self.0.now.load(atomic::Ordering::Relaxed)
    }
}

/// Waits for a moment.
pub(crate) struct Sleep {
    sim: Sim,
    at: u64,
    registered: bool,
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if self.sim.micros() >= self.at {
            return Poll::Ready(());
        }
        if !self.registered {
            self.registered = true;
            let timer = Timer { at: self.at, number: self.sim.number(), waker: cx.waker().clone() };
            self.sim.0.timers.borrow_mut().push(Reverse(timer));
        }
        Poll::Pending
    }
}

impl Wake for Ready {
    fn wake(self: Arc<Self>) {
        self.ready.lock().unwrap().insert(self.task);
    }
}

impl Timer {
    fn key(&self) -> (u64, u64) {
        (self.at, self.number)
    }
}

impl PartialEq for Timer {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl Eq for Timer {}

impl PartialOrd for Timer {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Timer {
    fn cmp(&self, other: &Self) -> Ordering {
        self.key().cmp(&other.key())
    }
}
