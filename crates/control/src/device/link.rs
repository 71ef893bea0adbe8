//! One device link: from its upgrade to its goodbye.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::{SinkExt as _, StreamExt as _};
use http::{HeaderValue, header};
use midspan_core::{
    credential::{CLOCK_LEEWAY_SECONDS, DeviceIdentity},
    id::DeviceAddress,
    json,
    limit::{LimitName, LimitReached},
    link::{FromDevice, Goodbye, GoodbyeReason, MESSAGE_MAX, SUBPROTOCOL, ToDevice, close_text},
    problem::{Problem, ProblemKind},
};
use midspan_platform::{
    clock,
    http::{HttpRequest, HttpResponse, client_address, websocket},
    listener::Connection,
    metrics::Counted,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    time::{Instant, sleep_until, timeout},
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        Error, Message,
        error::ProtocolError,
        handshake::derive_accept_key,
        protocol::{CloseFrame, Role, WebSocketConfig},
    },
};
use tracing::{debug, info, info_span, warn};

use super::links::{Held, Order, Registration};
use crate::control::{Control, STORE_LIMIT};

type Socket = WebSocketStream<Connection>;

/// How long one message to a device may take to be written.
const WRITE_LIMIT: Duration = Duration::from_secs(10);

/// How long a link that was told to go may take, answers that it owes included.
const FAREWELL: Duration = Duration::from_secs(5);

/// How long a device that was told to open another link may take before this one is cut: some tries.
const MOVE_LIMIT: Duration = Duration::from_secs(30);

/// When a device that was told to open another link does so, in seconds, before some jitter.
const MOVE_SECONDS: u64 = 1;

/// Why a link ended.
#[derive(Debug)]
enum End {
    /// The device closed it, or its connection ended.
    Gone(&'static str),
    /// The relay closes it.
    Goodbye(GoodbyeReason),
    /// The device was told to open another link, and has done so or has had its time.
    Moved,
}

impl Control {
    /// Upgrades `request` to the link of the device or module `address`.
    pub(crate) fn open_link(
        self: &Arc<Self>,
        request: &HttpRequest,
        address: &DeviceAddress,
    ) -> Result<HttpResponse, Problem> {
        let device = self.device(request, address)?;
        let accept = check_upgrade(request)?;
        if self.lifecycle.closing().is_cancelled() {
            return Err(Problem::new(ProblemKind::Unavailable, "this relay process is going away"));
        }
        if self.links.count() >= self.settings.limit_device_links && !self.links.has(address) {
            return Err(Problem::from(LimitReached {
                name: LimitName::DeviceLinks,
                value: self.settings.limit_device_links as u64,
                scope: "this relay process".to_owned(),
                retry_after_seconds: 5,
            }));
        }
        let control = Arc::clone(self);
        let span =
            info_span!(parent: None, "link", device.id = %address, client.address = client_address(request));
        let protocol = HeaderValue::from_static(SUBPROTOCOL);
        Ok(websocket(accept, Some(protocol), move |connection, early| {
            let lifecycle = control.lifecycle.clone();
            lifecycle.spawn(span, async move { control.run_link(device, connection, early).await });
        }))
    }

    async fn run_link(&self, device: DeviceIdentity, connection: Connection, early: Bytes) {
        let config = WebSocketConfig::default()
            .read_buffer_size(4096)
            .max_message_size(Some(MESSAGE_MAX))
            .max_frame_size(Some(MESSAGE_MAX));
        let mut socket =
            WebSocketStream::from_partially_read(connection, early.into(), Role::Server, Some(config)).await;
        let _counted = Counted::new(&self.metrics.device_links);
        let mut registration = self.announce_link(&device.address).await;
        info!("device connected");
        // The deny list may have changed since the credential was checked.
        let end = if self.secrets.deny.current().has_device(&device.address) {
            End::Goodbye(GoodbyeReason::Revoked)
        } else {
            self.serve_link(&device, &mut registration, &mut socket).await
        };
        match end {
            End::Gone(why) => {
                registration.withdraw();
                info!(why, "device disconnected");
            }
            End::Goodbye(reason) => {
                registration.withdraw();
                info!(reason = reason.label(), "device link closed by the relay");
                self.metrics.goodbye(reason);
                self.say_goodbye(&registration, &mut socket, reason).await;
            }
            End::Moved => {
                // Who asked here is answered here, for as long as that may take.
                registration.unlist();
                info!("device moved to another link");
                self.close_in_good_order(&registration, &mut socket, GoodbyeReason::Draining, MOVED).await;
                registration.withdraw();
            }
        }
        let generation = registration.generation();
        drop(registration);
        self.link_down(device.address, generation).await;
    }

    /// Registers a new link here and in the store, and tells the replicas that wait for it or hold an older one.
    ///
    /// A store that does not answer is told later: what holds the link is its connection.
    async fn announce_link(&self, address: &DeviceAddress) -> Registration {
        // Two links of one device get their generations in the order in which they replace each other.
        let _turn = self.links.turn(address).lock().await;
        let held = Held::new(clock::unix_milliseconds());
        let registration = self.links.register(address, held);
        let forgets = self.forgets();
        let up = if self.store_answers() {
            timeout(STORE_LIMIT, self.rendezvous.link_up(address, &self.replica))
                .await
                .ok()
                .and_then(Result::ok)
        } else {
            None
        };
        registration.set_generation(up.as_ref().map(|up| up.generation));
        match up {
            Some(up) => {
                self.announced(forgets);
                self.tell_others(address, up);
            }
            None => warn!("a link could not be announced; it will be, once the store answers"),
        }
        registration
    }

    async fn serve_link(&self, device: &DeviceIdentity, link: &mut Registration, socket: &mut Socket) -> End {
        let welcome = ToDevice::Welcome {
            now: clock::unix(),
            ping_seconds: self.settings.link_ping.as_secs().max(1),
            silence_seconds: self.settings.link_silence.as_secs().max(1),
            expires: device.expires,
        };
        if let Err(end) = send(socket, &welcome).await {
            return end;
        }
        let leeway = Duration::from_secs(CLOCK_LEEWAY_SECONDS);
        let expiry = tokio::time::sleep(device.expires.plus(leeway).since(clock::unix()));
        tokio::pin!(expiry);
        let mut pings = tokio::time::interval(self.settings.link_ping);
        pings.reset();
        let mut heard = Instant::now();
        let mut move_by = None;
        loop {
            tokio::select! {
                order = link.next_order() => match order {
                    Order::Goodbye(GoodbyeReason::Replaced) if move_by.is_some() => return End::Moved,
                    Order::Goodbye(reason) => return End::Goodbye(reason),
                    Order::Move => {
                        self.metrics.goodbye(GoodbyeReason::Draining);
                        move_by = Some(Instant::now() + MOVE_LIMIT);
                        let goodbye = Goodbye {
                            reason: GoodbyeReason::Draining,
                            message: MOVED.to_owned(),
                            come_back_seconds: MOVE_SECONDS,
                        };
                        if let Err(end) = send(socket, &ToDevice::Goodbye(goodbye)).await {
                            return end;
                        }
                    }
                    Order::Ask(invitation) => {
                        debug!(stream.id = %invitation.stream, request = %invitation.request, "device asked");
                        if let Err(end) = send(socket, &ToDevice::Request(invitation)).await {
                            return end;
                        }
                    }
                },
                () = self.lifecycle.stopped().cancelled() => return End::Goodbye(GoodbyeReason::Draining),
                () = at(move_by) => return End::Moved,
                () = &mut expiry => return End::Goodbye(GoodbyeReason::CredentialExpired),
                message = socket.next() => {
                    heard = Instant::now();
                    if let Some(end) = self.take_message(link, message) {
                        return end;
                    }
                }
                () = sleep_until(heard + self.settings.link_silence) => return End::Gone("it gave no sign of life"),
                _ = pings.tick() => {
                    if let Err(end) = write(socket, Message::Ping(Vec::new().into())).await {
                        return end;
                    }
                }
            }
        }
    }

    fn take_message(&self, link: &Registration, message: Option<Result<Message, Error>>) -> Option<End> {
        let bad = Some(End::Goodbye(GoodbyeReason::BadMessage));
        match message {
            None => Some(End::Gone("its connection ended")),
            Some(Ok(Message::Text(text))) => match json::parse::<FromDevice>(text.as_bytes()) {
                Ok(message) => {
                    if !link.answer(message) {
                        self.metrics.unexpected_answers.inc();
                        debug!("an answer that nobody waits for");
                    }
                    None
                }
                Err(error) => {
                    info!(%error, "not a message of this protocol");
                    bad
                }
            },
            Some(Ok(Message::Close(_))) => Some(End::Gone("it closed the link")),
            Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_))) => None,
            Some(Ok(Message::Binary(_)) | Err(Error::Capacity(_) | Error::Utf8(_))) => bad,
            Some(Err(Error::Protocol(ProtocolError::ResetWithoutClosingHandshake))) => {
                Some(End::Gone("its connection ended"))
            }
            Some(Err(Error::Protocol(error))) => {
                info!(%error, "not a message of this protocol");
                bad
            }
            Some(Err(error)) => {
                debug!(%error, "link broke");
                Some(End::Gone("its connection broke"))
            }
        }
    }

    /// Tells the device why and for how long it has to go. Answers that it owes are still taken.
    async fn say_goodbye(&self, link: &Registration, socket: &mut Socket, reason: GoodbyeReason) {
        let (seconds, message) = match reason {
            GoodbyeReason::Replaced => (300, "a newer link of this device took over"),
            GoodbyeReason::Draining | GoodbyeReason::Unknown => (1, "the relay is restarting"),
            GoodbyeReason::CredentialExpired => (0, "the credential of this link has expired"),
            GoodbyeReason::Revoked => (300, "the credential of this device was revoked"),
            GoodbyeReason::BadMessage => (30, "the device sent what is not a message of this protocol"),
            GoodbyeReason::Stalled => (1, "the device took no message for too long"),
        };
        let goodbye = Goodbye { reason, message: message.to_owned(), come_back_seconds: seconds };
        if let Ok(Ok(())) = timeout(FAREWELL, send(socket, &ToDevice::Goodbye(goodbye))).await {
            self.close_in_good_order(link, socket, reason, message).await;
        }
    }

    /// Closes a link whose device has been told why.
    async fn close_in_good_order(
        &self,
        link: &Registration,
        socket: &mut Socket,
        reason: GoodbyeReason,
        message: &str,
    ) {
        let farewell = async {
            let answers_count = matches!(reason, GoodbyeReason::Draining | GoodbyeReason::CredentialExpired);
            while answers_count && link.owes_answers() {
                let message = timeout(Duration::from_millis(100), socket.next()).await;
                if let Ok(message) = message
                    && self.take_message(link, message).is_some()
                {
                    return Err(());
                }
            }
            let text = format!("{}: {message}", reason.label());
            let frame =
                CloseFrame { code: reason.close_code().into(), reason: close_text(&text).to_owned().into() };
            socket.close(Some(frame)).await.map_err(drop)?;
            while let Some(Ok(_)) = socket.next().await {}
            // What is still on the way is read, so that no reset eats the goodbye.
            let connection = socket.get_mut();
            connection.shutdown().await.map_err(drop)?;
            let mut rest = vec![0; 4096];
            while connection.read(&mut rest).await.map_err(drop)? > 0 {}
            Ok::<(), ()>(())
        };
        // A device that does not listen is dropped all the same.
        let _ = timeout(FAREWELL, farewell).await;
    }
}

/// What a device is told that is to open another link.
const MOVED: &str = "this link moves to another process of the relay";

async fn at(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time).await,
        None => std::future::pending().await,
    }
}

async fn send(socket: &mut Socket, message: &ToDevice) -> Result<(), End> {
    match serde_json::to_string(message) {
        Ok(text) => write(socket, Message::Text(text.into())).await,
        Err(_) => Err(End::Gone("a message could not be written")),
    }
}

async fn write(socket: &mut Socket, message: Message) -> Result<(), End> {
    match timeout(WRITE_LIMIT, socket.send(message)).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(_)) => Err(End::Gone("its connection ended")),
        Err(_) => Err(End::Goodbye(GoodbyeReason::Stalled)),
    }
}

/// Checks the upgrade's headers (RFC 6455, section 4.2.1) and gives the value of `Sec-WebSocket-Accept`.
fn check_upgrade(request: &HttpRequest) -> Result<HeaderValue, Problem> {
    let required = |detail: &str| Problem::new(ProblemKind::UpgradeRequired, detail);
    let key = midspan_platform::http::websocket_key(request.headers()).map_err(|what| {
        required(&format!("a device link is a WebSocket: send `{what}` (RFC 6455, section 4.1)"))
    })?;
    let offered = request.headers().get_all(header::SEC_WEBSOCKET_PROTOCOL).iter();
    let offered = offered.filter_map(|value| value.to_str().ok()).flat_map(|value| value.split(','));
    if !offered.into_iter().any(|protocol| protocol.trim() == SUBPROTOCOL) {
        return Err(required("a device link needs `Sec-WebSocket-Protocol: midspan.link.v1`"));
    }
    HeaderValue::from_str(&derive_accept_key(key.as_bytes()))
        .map_err(|_| required("Sec-WebSocket-Key is malformed"))
}
