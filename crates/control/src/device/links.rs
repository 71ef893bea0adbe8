//! Which devices are here, what is asked of them, and who waits for their answers.

use std::{
    collections::HashMap,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
};

use midspan_core::{
    credential::CLOCK_LEEWAY_SECONDS,
    deny::DenyList,
    id::{DeviceAddress, RequestId},
    internal::Outcome,
    link::{FromDevice, GoodbyeReason, Invitation, REASON_MAX, cut},
    time::UnixTime,
};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

/// The links, and the requests whose answers are awaited.
#[derive(Debug)]
pub struct Links {
    inner: Arc<Mutex<Inner>>,
    turns: Vec<tokio::sync::Mutex<()>>,
}

#[derive(Debug, Default)]
struct Inner {
    link_by_device: HashMap<DeviceAddress, Handle>,
    arrival_by_device: HashMap<DeviceAddress, watch::Sender<()>>,
    pending_by_request: HashMap<RequestId, Pending>,
    last_serial: u64,
}

#[derive(Debug)]
struct Handle {
    serial: u64,
    held: Held,
    standing: Standing,
    given: Arc<OnceLock<u64>>,
    invitations: mpsc::Sender<Invitation>,
    order: watch::Sender<Stay>,
    gone: CancellationToken,
}

/// A link that this replica holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Held {
    /// The store's, or of the clock at the beginning of the link for as long as the store has given none.
    pub generation: u64,
    /// When it began.
    pub since: UnixTime,
}

impl Held {
    /// A link that begins at this time, by the clock here.
    ///
    /// Generations are the store's times. Its clock may be behind this one, and a link must not push out one that the store has
    /// given a generation since: so this link is taken to be older than it is.
    pub fn new(unix_milliseconds: u64) -> Self {
        let generation = unix_milliseconds.saturating_sub(CLOCK_LEEWAY_SECONDS * 1000);
        Self { generation, since: UnixTime(unix_milliseconds / 1000) }
    }
}

/// What the store knows of a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Standing {
    /// It is being told.
    New,
    Announced,
    /// It could not be told.
    Unannounced,
}

/// Whether a link may stay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stay {
    Yes,
    /// Until the device has another link.
    ForNow,
    No(GoodbyeReason),
}

#[derive(Debug)]
struct Pending {
    serial: u64,
    address: DeviceAddress,
    answer: oneshot::Sender<Outcome>,
}

/// Why a request did not get to a device's link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InviteError {
    /// The device has no link.
    Offline,
    /// The device does not take what is queued for it.
    QueueFull,
}

/// A link's side of its registration. Dropping it takes the link off the list.
#[derive(Debug)]
pub struct Registration {
    invitations: mpsc::Receiver<Invitation>,
    order: watch::Receiver<Stay>,
    told_to_move: bool,
    address: DeviceAddress,
    serial: u64,
    given: Arc<OnceLock<u64>>,
    gone: CancellationToken,
    inner: Arc<Mutex<Inner>>,
}

/// What the relay wants of a link.
#[derive(Debug)]
pub enum Order {
    /// The device is to be asked.
    Ask(Invitation),
    /// The device is to open another link, and then to let this one go.
    Move,
    /// The link is to end.
    Goodbye(GoodbyeReason),
}

/// A service's side of a request. Dropping it makes a later answer one that nobody waits for.
#[derive(Debug)]
pub struct Question {
    /// Which request.
    pub request: RequestId,
    serial: u64,
    answer: oneshot::Receiver<Outcome>,
    inner: Arc<Mutex<Inner>>,
}

/// Somebody who waits for a device; the last one takes the notice board down.
#[derive(Debug)]
pub struct Arrivals {
    address: DeviceAddress,
    news: watch::Receiver<()>,
    inner: Arc<Mutex<Inner>>,
}

/// How many requests may wait for one device to take them.
const INVITATIONS: usize = 64;

/// How many links may be announced at the same time: enough that many devices come back quickly over a slow store.
const TURNS: usize = 256;

impl Links {
    /// A device's new link. An older one is told that it was replaced.
    pub fn register(&self, address: &DeviceAddress, held: Held) -> Registration {
        let mut inner = self.lock();
        let serial = inner.next_serial();
        let (sender, invitations) = mpsc::channel(INVITATIONS);
        let (order, orders) = watch::channel(Stay::Yes);
        let gone = CancellationToken::new();
        let (standing, given) = (Standing::New, Arc::default());
        let handle = Handle {
            serial,
            held,
            standing,
            given: Arc::clone(&given),
            invitations: sender,
            order,
            gone: gone.clone(),
        };
        if let Some(older) = inner.link_by_device.insert(address.clone(), handle) {
            older.order.send_replace(Stay::No(GoodbyeReason::Replaced));
        }
        inner.tell_arrival(address);
        Registration {
            invitations,
            order: orders,
            told_to_move: false,
            address: address.clone(),
            serial,
            given,
            gone,
            inner: Arc::clone(&self.inner),
        }
    }

    /// Registers a request whose answer is awaited.
    pub fn ask(&self, request: RequestId, address: &DeviceAddress) -> Question {
        let mut inner = self.lock();
        let serial = inner.next_serial();
        let (sender, answer) = oneshot::channel();
        let pending = Pending { serial, address: address.clone(), answer: sender };
        inner.pending_by_request.insert(request, pending);
        Question { request, serial, answer, inner: Arc::clone(&self.inner) }
    }

    /// Hands a request to the device's link. The token is cancelled when that link is gone.
    pub fn invite(
        &self,
        address: &DeviceAddress,
        invitation: Invitation,
    ) -> Result<CancellationToken, InviteError> {
        let inner = self.lock();
        let link = inner.link_by_device.get(address).ok_or(InviteError::Offline)?;
        match link.invitations.try_send(invitation) {
            Ok(()) => Ok(link.gone.clone()),
            Err(mpsc::error::TrySendError::Full(_)) => Err(InviteError::QueueFull),
            Err(mpsc::error::TrySendError::Closed(_)) => Err(InviteError::Offline),
        }
    }

    /// Begins to wait for links of a device, here or elsewhere: those that come from now on are told of.
    pub fn arrivals(&self, address: &DeviceAddress) -> Arrivals {
        let mut inner = self.lock();
        let board = inner.arrival_by_device.entry(address.clone()).or_insert_with(|| watch::Sender::new(()));
        Arrivals { address: address.clone(), news: board.subscribe(), inner: Arc::clone(&self.inner) }
    }

    /// The device has a link at another replica.
    pub fn online_elsewhere(&self, address: &DeviceAddress) {
        self.lock().tell_arrival(address);
    }

    /// The device has a link of this generation at another replica: an older one here is told that it was replaced.
    pub fn replaced_elsewhere(&self, address: &DeviceAddress, generation: u64) {
        if let Some(link) = self.lock().link_by_device.get(address)
            // Which one is newer is not known before the store has said so.
            && link.standing == Standing::Announced
            && link.held.generation < generation
        {
            link.order.send_replace(Stay::No(GoodbyeReason::Replaced));
        }
    }

    /// The link of this device, and whether the store has given its generation.
    pub fn held(&self, address: &DeviceAddress) -> Option<(Held, bool)> {
        let inner = self.lock();
        let link = inner.link_by_device.get(address)?;
        Some((link.held, link.standing == Standing::Announced))
    }

    /// The links that the store has given no generation: it could not be told, or its answer was lost.
    pub fn unannounced(&self) -> Vec<(DeviceAddress, Held)> {
        self.standing_so(Standing::Unannounced)
    }

    /// The links that the store knew when it was told of them.
    pub fn announced(&self) -> Vec<(DeviceAddress, Held)> {
        self.standing_so(Standing::Announced)
    }

    fn standing_so(&self, standing: Standing) -> Vec<(DeviceAddress, Held)> {
        let inner = self.lock();
        let links = inner.link_by_device.iter().filter(|(_, link)| link.standing == standing);
        links.map(|(address, link)| (address.clone(), link.held)).collect()
    }

    /// The store has given this link a generation after all. False when the link is not here any more.
    pub fn announced_late(&self, address: &DeviceAddress, held: Held, generation: u64) -> bool {
        let mut inner = self.lock();
        let link = inner.link_by_device.get_mut(address).filter(|link| link.held == held);
        link.map(|link| link.announced(generation)).is_some()
    }

    /// Whether exactly this link is here.
    pub fn holds(&self, address: &DeviceAddress, held: Held) -> bool {
        self.lock().link_by_device.get(address).is_some_and(|link| link.held == held)
    }

    /// Says goodbye to one link.
    pub fn dismiss(&self, address: &DeviceAddress, held: Held, reason: GoodbyeReason) {
        if let Some(link) = self.lock().link_by_device.get(address).filter(|link| link.held == held) {
            link.order.send_replace(Stay::No(reason));
        }
    }

    /// Tells up to `count` devices to open another link. Gives how many were told.
    pub fn let_go(&self, count: usize) -> usize {
        let told = |link: &&Handle| -> bool {
            link.order.send_if_modified(|stay| {
                let stays = *stay == Stay::Yes;
                if stays {
                    *stay = Stay::ForNow;
                }
                stays
            })
        };
        self.lock().link_by_device.values().filter(told).take(count).count()
    }

    /// Says goodbye to every device.
    pub fn dismiss_all(&self, reason: GoodbyeReason) {
        for link in self.lock().link_by_device.values() {
            link.order.send_replace(Stay::No(reason));
        }
    }

    /// Says goodbye to the devices that have been revoked.
    pub fn dismiss_denied(&self, deny: &DenyList) {
        for (address, link) in &self.lock().link_by_device {
            if deny.has_device(address) {
                link.order.send_replace(Stay::No(GoodbyeReason::Revoked));
            }
        }
    }

    /// A lock that all links of one device, and some others, share while they are announced.
    pub fn turn(&self, address: &DeviceAddress) -> &tokio::sync::Mutex<()> {
        let mut hasher = DefaultHasher::new();
        address.hash(&mut hasher);
        let turn = usize::try_from(hasher.finish() % self.turns.len() as u64).unwrap_or_default();
        &self.turns[turn]
    }

    /// Whether the device has a link.
    pub fn has(&self, address: &DeviceAddress) -> bool {
        self.lock().link_by_device.contains_key(address)
    }

    /// How many links are here.
    pub fn count(&self) -> usize {
        self.lock().link_by_device.len()
    }

    /// How many links have not been told to go.
    pub fn staying(&self) -> usize {
        self.lock().link_by_device.values().filter(|link| *link.order.borrow() == Stay::Yes).count()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        lock(&self.inner)
    }
}

impl Default for Links {
    fn default() -> Self {
        Self { inner: Arc::default(), turns: std::iter::repeat_with(Default::default).take(TURNS).collect() }
    }
}

impl Handle {
    fn announced(&mut self, generation: u64) {
        self.held.generation = generation;
        self.standing = Standing::Announced;
        // It is given once.
        let _ = self.given.set(generation);
    }
}

impl Inner {
    fn next_serial(&mut self) -> u64 {
        self.last_serial += 1;
        self.last_serial
    }

    fn tell_arrival(&self, address: &DeviceAddress) {
        if let Some(board) = self.arrival_by_device.get(address) {
            board.send_replace(());
        }
    }
}

impl Registration {
    /// Waits for what the relay wants of the link: to ask the device, or to close.
    pub async fn next_order(&mut self) -> Order {
        let told_to_move = self.told_to_move;
        tokio::select! {
            biased;
            stay = self.order.wait_for(|stay| match stay {
                Stay::Yes => false,
                Stay::ForNow => !told_to_move,
                Stay::No(_) => true,
            }) => match stay.map(|stay| *stay) {
                Ok(Stay::ForNow) => {
                    self.told_to_move = true;
                    Order::Move
                }
                Ok(Stay::No(reason)) => Order::Goodbye(reason),
                // The sender goes with the replaced link's registration, after it has said why.
                Ok(Stay::Yes) | Err(_) => Order::Goodbye(GoodbyeReason::Replaced),
            },
            Some(invitation) = self.invitations.recv() => Order::Ask(invitation),
        }
    }

    /// The store knows the link by this generation, or could not be told.
    pub fn set_generation(&self, generation: Option<u64>) {
        let mut inner = lock(&self.inner);
        let link = inner.link_by_device.get_mut(&self.address).filter(|link| link.serial == self.serial);
        if let Some(link) = link {
            match generation {
                Some(generation) => link.announced(generation),
                None => link.standing = Standing::Unannounced,
            }
        }
    }

    /// The generation that the store has given the link, once it has.
    pub fn generation(&self) -> Option<u64> {
        self.given.get().copied()
    }

    /// Takes an answer of the device. False when nobody waits for it.
    pub fn answer(&self, message: FromDevice) -> bool {
        let (request, answer) = match message {
            FromDevice::Accept { request, capabilities } => (request, Outcome::Accepted { capabilities }),
            FromDevice::Reject { request, reason } => {
                (request, Outcome::Rejected { reason: cut(&reason, REASON_MAX).to_owned() })
            }
            FromDevice::Unknown => return true,
        };
        let mut inner = lock(&self.inner);
        // Another device's request is none of this one's business, even if it has guessed its id.
        match inner.pending_by_request.get(&request) {
            Some(pending) if pending.address == self.address => {}
            _ => return false,
        }
        let pending = inner.pending_by_request.remove(&request);
        pending.is_some_and(|pending| pending.answer.send(answer).is_ok())
    }

    /// Whether the device owes an answer.
    pub fn owes_answers(&self) -> bool {
        lock(&self.inner).pending_by_request.values().any(|pending| pending.address == self.address)
    }
}

impl Registration {
    /// Takes the link off the list: nothing more is asked here, but answers still count.
    pub fn unlist(&self) {
        let mut inner = lock(&self.inner);
        if inner.link_by_device.get(&self.address).is_some_and(|link| link.serial == self.serial) {
            inner.link_by_device.remove(&self.address);
        }
    }

    /// Does the same, and lets whoever had asked here ask the device's next link.
    pub fn withdraw(&self) {
        self.unlist();
        self.gone.cancel();
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.withdraw();
    }
}

impl Question {
    /// Waits for the device's answer. `None` when the same request was registered once more.
    pub async fn answer(&mut self) -> Option<Outcome> {
        (&mut self.answer).await.ok()
    }
}

impl Drop for Question {
    fn drop(&mut self) {
        let mut inner = lock(&self.inner);
        if inner.pending_by_request.get(&self.request).is_some_and(|pending| pending.serial == self.serial) {
            inner.pending_by_request.remove(&self.request);
        }
    }
}

impl Arrivals {
    /// Waits for the next link of the device, here or elsewhere.
    pub async fn next(&mut self) {
        if self.news.changed().await.is_err() {
            // The board stays for as long as somebody reads it.
            std::future::pending::<()>().await;
        }
    }

    /// Waits for the next link of the device here.
    pub async fn next_here(&mut self) {
        loop {
            self.next().await;
            if lock(&self.inner).link_by_device.contains_key(&self.address) {
                return;
            }
        }
    }
}

impl Drop for Arrivals {
    fn drop(&mut self) {
        let mut inner = lock(&self.inner);
        if inner.arrival_by_device.get(&self.address).is_some_and(|board| board.receiver_count() == 1) {
            inner.arrival_by_device.remove(&self.address);
        }
    }
}

fn lock(inner: &Mutex<Inner>) -> MutexGuard<'_, Inner> {
    inner.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;
    use midspan_core::{capability::Capabilities, id::StreamId, link::Metadata, trace::TraceParent};

    use super::*;

    #[tokio::test]
    async fn a_newer_link_replaces_the_older_one() {
        let links = Links::default();
        let mut older = links.register(&dev1(), held(1));
        let newer = links.register(&dev1(), held(1));
        assert!(matches!(older.next_order().await, Order::Goodbye(GoodbyeReason::Replaced)));
        drop(older);
        assert_eq!(links.count(), 1);
        drop(newer);
        assert_eq!(links.count(), 0);
    }

    #[tokio::test]
    async fn who_waits_hears_of_arrivals_here_and_elsewhere() {
        let (links, address) = (Links::default(), dev1());
        let mut arrivals = links.arrivals(&address);
        links.online_elsewhere(&"dev2".parse().unwrap());
        assert!(arrivals.next().now_or_never().is_none());
        links.online_elsewhere(&address);
        assert!(arrivals.next_here().now_or_never().is_none(), "it is elsewhere");
        let _registration = links.register(&address, held(1));
        assert!(arrivals.next_here().now_or_never().is_some());
        let other = links.arrivals(&address);
        drop(arrivals);
        assert_eq!(links.lock().arrival_by_device.len(), 1);
        drop(other);
        assert!(links.lock().arrival_by_device.is_empty());
    }

    #[tokio::test]
    async fn only_an_older_link_is_replaced_from_elsewhere() {
        let links = Links::default();
        let mut link = links.register(&dev1(), held(1));
        links.replaced_elsewhere(&dev1(), 9);
        assert!(link.next_order().now_or_never().is_none(), "which one is newer is not known yet");
        link.set_generation(Some(5));
        links.replaced_elsewhere(&dev1(), 5);
        assert!(link.next_order().now_or_never().is_none());
        links.replaced_elsewhere(&dev1(), 6);
        assert!(matches!(link.next_order().await, Order::Goodbye(GoodbyeReason::Replaced)));
    }

    #[tokio::test]
    async fn a_link_that_is_let_go_is_told_once_and_still_asked() {
        let links = Links::default();
        let mut link = links.register(&dev1(), held(1));
        assert_eq!(links.let_go(5), 1);
        assert_eq!(links.let_go(5), 0);
        assert!(matches!(link.next_order().await, Order::Move));
        links.invite(&dev1(), invitation()).unwrap();
        assert!(matches!(link.next_order().await, Order::Ask(_)));
        links.dismiss_all(GoodbyeReason::Draining);
        assert!(matches!(link.next_order().await, Order::Goodbye(GoodbyeReason::Draining)));
        assert_eq!(links.let_go(5), 0);
    }

    #[test]
    fn what_the_store_may_have_forgotten_is_announced_again() {
        let links = Links::default();
        let (one, two) =
            (links.register(&dev1(), held(1)), links.register(&"dev2".parse().unwrap(), held(2)));
        let dev2: DeviceAddress = "dev2".parse().unwrap();
        assert!(links.unannounced().is_empty() && links.announced().is_empty(), "both are being told");
        one.set_generation(Some(7));
        two.set_generation(None);
        assert_eq!(links.unannounced(), [(dev2.clone(), held(2))]);
        assert_eq!(links.announced(), [(dev1(), held(7))]);
        assert_eq!((one.generation(), two.generation()), (Some(7), None));
        assert!(!links.announced_late(&dev1(), held(1), 9), "its generation is another one");
        assert!(links.announced_late(&dev2, held(2), 9));
        assert_eq!(two.generation(), Some(9));
        assert!(links.holds(&dev2, held(9)) && !links.holds(&dev2, held(2)));
        assert!(links.unannounced().is_empty());
    }

    #[tokio::test]
    async fn a_request_that_is_registered_twice_is_answered_to_the_later_one() {
        let links = Links::default();
        let device = links.register(&dev1(), held(1));
        let request = RequestId::from_random(1);
        let mut earlier = links.ask(request, &dev1());
        let mut later = links.ask(request, &dev1());
        assert_eq!(earlier.answer().await, None);
        drop(earlier);
        assert!(device.answer(FromDevice::Reject { request, reason: String::new() }));
        assert!(later.answer().await.is_some());
    }

    #[tokio::test]
    async fn an_answer_counts_once_and_only_from_the_device_that_was_asked() {
        let links = Links::default();
        let (device, other) =
            (links.register(&dev1(), held(1)), links.register(&"dev2".parse().unwrap(), held(2)));
        let request = RequestId::from_random(1);
        let mut question = links.ask(request, &dev1());
        let reject = || FromDevice::Reject { request, reason: "é".repeat(5000) };
        assert!(!other.answer(reject()));
        assert!(device.owes_answers() && !other.owes_answers());
        assert!(device.answer(reject()));
        assert!(!device.answer(reject()));
        assert_eq!(question.answer().await, Some(Outcome::Rejected { reason: "é".repeat(512) }));
        drop(question);
        assert!(links.lock().pending_by_request.is_empty());
    }

    #[tokio::test]
    async fn a_device_that_takes_nothing_is_not_asked_for_ever() {
        let links = Links::default();
        assert_eq!(links.invite(&dev1(), invitation()).unwrap_err(), InviteError::Offline);
        let link = links.register(&dev1(), held(1));
        for _ in 0..INVITATIONS {
            links.invite(&dev1(), invitation()).unwrap();
        }
        assert_eq!(links.invite(&dev1(), invitation()).unwrap_err(), InviteError::QueueFull);
        link.withdraw();
        assert_eq!(links.invite(&dev1(), invitation()).unwrap_err(), InviteError::Offline);
    }

    #[tokio::test]
    async fn who_asked_over_a_link_hears_that_it_is_gone() {
        let links = Links::default();
        let link = links.register(&dev1(), held(1));
        let gone = links.invite(&dev1(), invitation()).unwrap();
        assert!(!gone.is_cancelled());
        link.withdraw();
        assert!(gone.is_cancelled());
    }

    fn invitation() -> Invitation {
        Invitation {
            request: RequestId::from_random(1),
            stream: StreamId::from_random(2),
            name: "ssh".parse().unwrap(),
            url: "wss://relay.example/bridges/x/device".to_owned(),
            ticket: "ticket".to_owned().into(),
            expires: UnixTime(60),
            answer_within_ms: 1000,
            capabilities: Capabilities::none(),
            metadata: Metadata::default(),
            traceparent: TraceParent::new(1, 1),
        }
    }

    fn held(generation: u64) -> Held {
        Held { generation, since: UnixTime(1) }
    }

    fn dev1() -> DeviceAddress {
        "dev1".parse().unwrap()
    }
}
