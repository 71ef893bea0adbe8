//! What lies between hosts: delays, partitions, connections that break, and calls.

use std::{
    cell::RefCell,
    collections::{BTreeMap, VecDeque},
    future::{Future, pending, poll_fn},
    pin::Pin,
    rc::Rc,
    task::{Poll, Waker},
    time::Duration,
};

use futures_util::FutureExt as _;
use midspan_core::ticket::Owner;
use midspan_platform::{internal::CallError, rendezvous::ServerRole};
use tokio::sync::oneshot;

use crate::{
    executor::Sim,
    world::{Process, World},
};

/// A machine of its own.
pub(crate) type Host = usize;

/// Which hosts cannot reach each other, and until when.
#[derive(Default)]
pub(crate) struct Network {
    cuts: RefCell<BTreeMap<(Host, Host), u64>>,
}

/// How long a connection to another process may take.
const CONNECT: Duration = Duration::from_secs(2);

/// When the ends of a connection notice that it is broken.
const NOTICE: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(6));

impl Network {
    /// Cuts two hosts off from each other.
    pub(crate) fn cut(&self, a: Host, b: Host, until: u64) {
        self.cuts.borrow_mut().insert((a.min(b), a.max(b)), until);
    }

    pub(crate) fn heal(&self) {
        self.cuts.borrow_mut().clear();
    }

    pub(crate) fn is_cut(&self, sim: &Sim, a: Host, b: Host) -> bool {
        self.cuts.borrow().get(&(a.min(b), a.max(b))).is_some_and(|until| sim.micros() < *until)
    }
}

/// How long a message takes.
pub(crate) fn delay(sim: &Sim) -> Duration {
    let longest = if sim.chance(4) { 500_000 } else { 3000 };
    Duration::from_micros(100 + sim.below(longest) as u64)
}

impl World {
    /// One message on its way. False when it was lost and that is noticed; or it is never noticed.
    pub(crate) async fn trip(&self, from: Host, to: Host) -> bool {
        let cut = self.network.is_cut(&self.sim, from, to);
        self.sim.sleep(delay(&self.sim)).await;
        if !cut && !self.network.is_cut(&self.sim, from, to) {
            return true;
        }
        if self.sim.chance(50) {
            pending::<()>().await;
        }
        self.sim.sleep(self.sim.time(NOTICE.0, NOTICE.1)).await;
        false
    }

    /// Calls a process, as `midspan_platform::internal` does: another life at its address is not the one that was meant.
    pub(crate) async fn call<R: 'static>(
        self: &Rc<Self>,
        from: Host,
        role: ServerRole,
        to: &Owner,
        within: Duration,
        answer: impl FnOnce(Process) -> Pin<Box<dyn Future<Output = R>>>,
    ) -> Result<R, CallError> {
        let unreachable = |why: &str| CallError::Unreachable(why.to_owned());
        let answered = async {
            let host = self.host_of(&to.address);
            if self.sim.timeout(CONNECT, self.trip(from, host)).await != Some(true) {
                return Err(unreachable("no connection"));
            }
            let process = self.process_at(&to.address).filter(|process| process.role() == role);
            let meant = process.filter(|process| process.owner().incarnation == to.incarnation);
            let Some(process) = meant else {
                let told = self.trip(host, from).await;
                return Err(if told { CallError::Gone } else { unreachable("the connection broke") });
            };
            let (tell, told) = oneshot::channel();
            let (held, dropped) = oneshot::channel::<()>();
            let (life, answer) = (process.life(), answer(process));
            self.sim.spawn(life, async move {
                tokio::select! {
                    biased;
                    answer = answer => drop(tell.send(answer)),
                    _ = dropped => {}
                }
            });
            let answer = told.await.map_err(|_| unreachable("the connection broke"))?;
            drop(held);
            if self.trip(host, from).await { Ok(answer) } else { Err(unreachable("the connection broke")) }
        };
        self.sim.timeout(within, answered).await.unwrap_or(Err(CallError::TimedOut))
    }
}

/// A connection of two ends, which keeps the order of its messages.
struct Wire<T> {
    world: Rc<World>,
    hosts: [Host; 2],
    ends: [Inbox<T>; 2],
}

struct Inbox<T> {
    messages: VecDeque<(u64, T)>,
    last: u64,
    /// When this end hears that the connection is over.
    over: Option<u64>,
    waker: Option<Waker>,
}

/// One end of a connection. The other one hears when it is dropped.
pub(crate) struct End<T> {
    wire: Rc<RefCell<Wire<T>>>,
    side: usize,
}

/// What breaks a connection when it is dropped: a process that it passes through.
pub(crate) struct Through<T>(Rc<RefCell<Wire<T>>>);

/// A connection between two hosts.
pub(crate) fn connect<T>(world: &Rc<World>, hosts: [Host; 2]) -> (End<T>, End<T>) {
    let inbox = || Inbox { messages: VecDeque::new(), last: 0, over: None, waker: None };
    let wire = Wire { world: Rc::clone(world), hosts, ends: [inbox(), inbox()] };
    let wire = Rc::new(RefCell::new(wire));
    (End { wire: Rc::clone(&wire), side: 0 }, End { wire, side: 1 })
}

impl<T> End<T> {
    /// Sends a message; whether it arrives is not known.
    pub(crate) fn send(&self, message: T) {
        let mut wire = self.wire.borrow_mut();
        let sim = wire.world.sim.clone();
        if wire.world.network.is_cut(&sim, wire.hosts[0], wire.hosts[1]) {
            wire.break_off();
            return;
        }
        let inbox = &mut wire.ends[1 - self.side];
        if inbox.over.is_none() {
            let at = arrival(&sim, inbox.last);
            inbox.last = at;
            inbox.messages.push_back((at, message));
            inbox.wake();
        }
    }

    /// Waits for a message, or the end of the connection.
    pub(crate) async fn receive(&self) -> Option<T> {
        let sim = self.wire.borrow().world.sim.clone();
        poll_fn(|cx| {
            let mut wire = self.wire.borrow_mut();
            let inbox = &mut wire.ends[self.side];
            loop {
                let now = sim.micros();
                if inbox.messages.front().is_some_and(|(at, _)| *at <= now) {
                    return Poll::Ready(inbox.messages.pop_front().map(|(_, message)| message));
                }
                if inbox.over.is_some_and(|over| over <= now) {
                    return Poll::Ready(None);
                }
                inbox.waker = Some(cx.waker().clone());
                let next = inbox.messages.front().map(|(at, _)| *at).into_iter().chain(inbox.over).min();
                match next {
                    Some(next) if sim.sleep_until(next).poll_unpin(cx).is_ready() => {}
                    _ => return Poll::Pending,
                }
            }
        })
        .await
    }

    /// Whether the other end has gone.
    pub(crate) fn is_over(&self) -> bool {
        let wire = self.wire.borrow();
        wire.ends[self.side].over.is_some_and(|over| over <= wire.world.sim.micros())
    }

    /// What breaks the connection when it is dropped.
    pub(crate) fn through(&self) -> Through<T> {
        Through(Rc::clone(&self.wire))
    }
}

impl<T> Drop for End<T> {
    fn drop(&mut self) {
        let mut wire = self.wire.borrow_mut();
        let sim = wire.world.sim.clone();
        if wire.world.network.is_cut(&sim, wire.hosts[0], wire.hosts[1]) {
            wire.break_off();
            return;
        }
        let inbox = &mut wire.ends[1 - self.side];
        if inbox.over.is_none() {
            inbox.over = Some(arrival(&sim, inbox.last));
            inbox.wake();
        }
    }
}

impl<T> Drop for Through<T> {
    fn drop(&mut self) {
        self.0.borrow_mut().break_off();
    }
}

impl<T> Wire<T> {
    /// Both ends notice some time.
    fn break_off(&mut self) {
        let sim = self.world.sim.clone();
        for inbox in &mut self.ends {
            if inbox.over.is_none() {
                let notice = sim.time(NOTICE.0, NOTICE.1);
                inbox.over = Some(inbox.last.max(sim.micros() + u64::try_from(notice.as_micros()).unwrap()));
                inbox.wake();
            }
        }
    }
}

impl<T> Inbox<T> {
    fn wake(&mut self) {
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }
}

/// When what is sent now arrives: not before what was sent earlier.
fn arrival(sim: &Sim, last: u64) -> u64 {
    last.max(sim.micros() + u64::try_from(delay(sim).as_micros()).unwrap())
}
