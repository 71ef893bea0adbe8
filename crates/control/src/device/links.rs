//! Which devices are here, what is asked of them, and who waits for their answers.

use std::{
    collections::HashMap,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use midspan_core::{
    capability::Capabilities,
    deny::DenyList,
    id::{DeviceAddress, RequestId},
    link::{FromDevice, GoodbyeReason, Invitation, REASON_MAX, cut},
};
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

/// The links, and the requests whose answers are awaited.
#[derive(Debug, Default)]
pub(crate) struct Links {
    inner: Arc<Mutex<Inner>>,
    turns: [tokio::sync::Mutex<()>; 16],
}

#[derive(Debug, Default)]
struct Inner {
    link_by_device: HashMap<DeviceAddress, Handle>,
    arrival_by_device: HashMap<DeviceAddress, Arc<Notify>>,
    pending_by_request: HashMap<RequestId, Pending>,
    last_serial: u64,
}

#[derive(Debug)]
struct Handle {
    serial: u64,
    invitations: mpsc::Sender<Invitation>,
    goodbye: watch::Sender<Option<GoodbyeReason>>,
    gone: CancellationToken,
}

#[derive(Debug)]
struct Pending {
    address: DeviceAddress,
    answer: oneshot::Sender<Answer>,
}

/// What a device said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Answer {
    Accepted(Capabilities),
    Rejected(String),
}

/// Why a request did not get to a device's link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum InviteError {
    /// The device has no link.
    Offline,
    /// The device does not take what is queued for it.
    QueueFull,
}

/// A link's side of its registration. Dropping it takes the link off the list.
#[derive(Debug)]
pub(crate) struct Registration {
    invitations: mpsc::Receiver<Invitation>,
    goodbye: watch::Receiver<Option<GoodbyeReason>>,
    address: DeviceAddress,
    serial: u64,
    gone: CancellationToken,
    inner: Arc<Mutex<Inner>>,
}

/// What the relay wants of a link.
#[derive(Debug)]
pub(crate) enum Order {
    Ask(Invitation),
    Goodbye(GoodbyeReason),
}

/// A service's side of a request. Dropping it makes a later answer one that nobody waits for.
#[derive(Debug)]
pub(crate) struct Question {
    pub(crate) request: RequestId,
    answer: oneshot::Receiver<Answer>,
    inner: Arc<Mutex<Inner>>,
}

/// How many requests may wait for one device to take them.
const INVITATIONS: usize = 64;

impl Links {
    /// A device's new link. An older one is told that it was replaced.
    pub(crate) fn register(&self, address: &DeviceAddress) -> Registration {
        let mut inner = self.lock();
        inner.last_serial += 1;
        let serial = inner.last_serial;
        let (sender, invitations) = mpsc::channel(INVITATIONS);
        let (goodbye, goodbyes) = watch::channel(None);
        let gone = CancellationToken::new();
        let handle = Handle { serial, invitations: sender, goodbye, gone: gone.clone() };
        if let Some(older) = inner.link_by_device.insert(address.clone(), handle) {
            older.goodbye.send_replace(Some(GoodbyeReason::Replaced));
        }
        if let Some(arrival) = inner.arrival_by_device.get(address) {
            arrival.notify_waiters();
        }
        Registration {
            invitations,
            goodbye: goodbyes,
            address: address.clone(),
            serial,
            gone,
            inner: Arc::clone(&self.inner),
        }
    }

    /// Registers a request whose answer is awaited.
    pub(crate) fn ask(&self, request: RequestId, address: &DeviceAddress) -> Question {
        let (sender, answer) = oneshot::channel();
        let pending = Pending { address: address.clone(), answer: sender };
        self.lock().pending_by_request.insert(request, pending);
        Question { request, answer, inner: Arc::clone(&self.inner) }
    }

    /// Hands a request to the device's link. The token is cancelled when that link is gone.
    pub(crate) fn invite(
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

    /// Waits until the device has a link. Returns at once when it has one.
    pub(crate) async fn wait_for(&self, address: &DeviceAddress) {
        let arrival = Arrival::new(address, &self.inner);
        loop {
            // Register first, look second: an arrival in between is not missed.
            let notified = arrival.notify.notified();
            tokio::pin!(notified);
            notified.as_mut().enable();
            if self.lock().link_by_device.contains_key(address) {
                return;
            }
            notified.await;
        }
    }

    /// Says goodbye to every device.
    pub(crate) fn dismiss_all(&self, reason: GoodbyeReason) {
        for link in self.lock().link_by_device.values() {
            link.goodbye.send_replace(Some(reason));
        }
    }

    /// Says goodbye to the devices that have been revoked.
    pub(crate) fn dismiss_denied(&self, deny: &DenyList) {
        for (address, link) in &self.lock().link_by_device {
            if deny.has_device(address) {
                link.goodbye.send_replace(Some(GoodbyeReason::Revoked));
            }
        }
    }

    /// A lock that all links of one device, and some others, share while they are announced.
    pub(crate) fn turn(&self, address: &DeviceAddress) -> &tokio::sync::Mutex<()> {
        let mut hasher = DefaultHasher::new();
        address.hash(&mut hasher);
        let turn = usize::try_from(hasher.finish() % self.turns.len() as u64).unwrap_or_default();
        &self.turns[turn]
    }

    /// Whether the device has a link.
    pub(crate) fn has(&self, address: &DeviceAddress) -> bool {
        self.lock().link_by_device.contains_key(address)
    }

    pub(crate) fn count(&self) -> usize {
        self.lock().link_by_device.len()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        lock(&self.inner)
    }
}

impl Registration {
    /// Waits for what the relay wants of the link: to ask the device, or to close.
    pub(crate) async fn next_order(&mut self) -> Order {
        tokio::select! {
            biased;
            goodbye = self.goodbye.wait_for(Option::is_some) => {
                // The sender goes with the replaced link's registration, after it has said why.
                Order::Goodbye(goodbye.ok().and_then(|reason| *reason).unwrap_or(GoodbyeReason::Replaced))
            }
            Some(invitation) = self.invitations.recv() => Order::Ask(invitation),
        }
    }

    /// Takes an answer of the device. False when nobody waits for it.
    pub(crate) fn answer(&self, message: FromDevice) -> bool {
        let (request, answer) = match message {
            FromDevice::Accept { request, capabilities } => (request, Answer::Accepted(capabilities)),
            FromDevice::Reject { request, reason } => {
                (request, Answer::Rejected(cut(&reason, REASON_MAX).to_owned()))
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
    pub(crate) fn owes_answers(&self) -> bool {
        lock(&self.inner).pending_by_request.values().any(|pending| pending.address == self.address)
    }
}

impl Registration {
    /// Takes the link off the list: nothing more is asked here, but answers still count.
    pub(crate) fn withdraw(&self) {
        let mut inner = lock(&self.inner);
        if inner.link_by_device.get(&self.address).is_some_and(|link| link.serial == self.serial) {
            inner.link_by_device.remove(&self.address);
        }
        // Whoever had asked here asks the device's next link.
        self.gone.cancel();
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.withdraw();
    }
}

impl Question {
    /// Waits for the device's answer.
    pub(crate) async fn answer(&mut self) -> Option<Answer> {
        (&mut self.answer).await.ok()
    }
}

impl Drop for Question {
    fn drop(&mut self) {
        lock(&self.inner).pending_by_request.remove(&self.request);
    }
}

/// Somebody who waits for a device; the last one takes the notice board down.
struct Arrival<'a> {
    address: &'a DeviceAddress,
    notify: Arc<Notify>,
    inner: &'a Mutex<Inner>,
}

impl<'a> Arrival<'a> {
    fn new(address: &'a DeviceAddress, inner: &'a Mutex<Inner>) -> Self {
        let notify = Arc::clone(lock(inner).arrival_by_device.entry(address.clone()).or_default());
        Self { address, notify, inner }
    }
}

impl Drop for Arrival<'_> {
    fn drop(&mut self) {
        let mut inner = lock(self.inner);
        // Two: the map's and this one's.
        if Arc::strong_count(&self.notify) == 2 {
            inner.arrival_by_device.remove(self.address);
        }
    }
}

fn lock(inner: &Mutex<Inner>) -> MutexGuard<'_, Inner> {
    inner.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use midspan_core::{id::StreamId, link::Metadata, time::UnixTime, trace::TraceParent};

    use super::*;

    #[tokio::test]
    async fn a_newer_link_replaces_the_older_one() {
        let links = Links::default();
        let mut older = links.register(&dev1());
        let newer = links.register(&dev1());
        assert!(matches!(older.next_order().await, Order::Goodbye(GoodbyeReason::Replaced)));
        drop(older);
        assert_eq!(links.count(), 1);
        drop(newer);
        assert_eq!(links.count(), 0);
    }

    #[tokio::test]
    async fn who_waits_hears_of_an_arrival() {
        let (links, address) = (Links::default(), dev1());
        let wait = tokio::time::timeout(Duration::from_secs(5), links.wait_for(&address));
        let arrive = async {
            tokio::time::sleep(Duration::from_millis(20)).await;
            links.register(&dev1())
        };
        let (waited, _registration) = tokio::join!(wait, arrive);
        assert!(waited.is_ok());
        assert!(links.lock().arrival_by_device.is_empty());
    }

    #[tokio::test]
    async fn an_answer_counts_once_and_only_from_the_device_that_was_asked() {
        let links = Links::default();
        let (device, other) = (links.register(&dev1()), links.register(&"dev2".parse().unwrap()));
        let request = RequestId::from_random(1);
        let mut question = links.ask(request, &dev1());
        let reject = || FromDevice::Reject { request, reason: "é".repeat(5000) };
        assert!(!other.answer(reject()));
        assert!(device.owes_answers() && !other.owes_answers());
        assert!(device.answer(reject()));
        assert!(!device.answer(reject()));
        assert_eq!(question.answer().await, Some(Answer::Rejected("é".repeat(512))));
        drop(question);
        assert!(links.lock().pending_by_request.is_empty());
    }

    #[tokio::test]
    async fn a_device_that_takes_nothing_is_not_asked_for_ever() {
        let links = Links::default();
        assert_eq!(links.invite(&dev1(), invitation()).unwrap_err(), InviteError::Offline);
        let link = links.register(&dev1());
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
        let link = links.register(&dev1());
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

    fn dev1() -> DeviceAddress {
        "dev1".parse().unwrap()
    }
}
