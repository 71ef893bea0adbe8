use std::time::Duration;

use bytes::Bytes;
use futures_util::{SinkExt as _, StreamExt as _};
use http::Method;
use http_body_util::Full;
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use midspan_core::link::{SUBPROTOCOL, ToDevice};
use secrecy::ExposeSecret as _;
use serde_json::json;
use tokio::{task::JoinSet, time::Instant};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{Message, protocol::Role},
};

use crate::{Answer, Dial, FlowLeg, Relay, Socket, now, within};

/// A service and a device that open one stream after another over connections which they keep, with or without TLS.
#[derive(Debug)]
pub struct Opener {
    dial: Dial,
    authorization: String,
    path: String,
    link: WebSocketStream<Socket>,
    api: Option<Api>,
}

/// A connection of the service.
#[derive(Debug)]
struct Api {
    requests: SendRequest<Full<Bytes>>,
    used: Instant,
    _connection: JoinSet<hyper::Result<()>>,
}

impl Opener {
    /// Connects `device` to `relay`.
    pub async fn connect(relay: &Relay, dial: &Dial, device: &str) -> Self {
        let expires = now().plus(Duration::from_secs(3600));
        let signature = relay.device_connection(device).sign(expires);
        let headers = [("authorization", signature.expose_secret()), ("sec-websocket-protocol", SUBPROTOCOL)];
        let (socket, early) = dial.upgrade(&format!("/v1/devices/{device}/link"), &headers).await;
        let link = WebSocketStream::from_partially_read(socket, early, Role::Client, None).await;
        let authorization = relay.service_connection().sign(expires).expose_secret().to_owned();
        let path = format!("/v1/devices/{device}/streams");
        Self { dial: dial.clone(), authorization, path, link, api: None }
    }

    /// Opens a stream: the service's leg and the device's.
    pub async fn open(&mut self) -> (FlowLeg, FlowLeg) {
        // The relay closes a connection that no request has come over for a while.
        let mut api = match self.api.take() {
            Some(api) if api.used.elapsed() < Duration::from_secs(2) => api,
            _ => self.call().await,
        };
        let headers = [("authorization", self.authorization.as_str()), ("content-type", "application/json")];
        let request = self.dial.target.build(Method::POST, &self.path, &headers, br#"{"name":"test"}"#);
        let (answer, invitation) = within("the opening of a stream", async {
            let answer = async { Answer::read(api.requests.send_request(request).await.unwrap()).await };
            let accept = async {
                let invitation = loop {
                    let message = self.link.next().await.expect("the link ended").unwrap();
                    let Message::Text(text) = message else { continue };
                    if let Ok(ToDevice::Request(invitation)) = serde_json::from_str(&text) {
                        break invitation;
                    }
                };
                let accept = json!({ "type": "accept", "request": invitation.request });
                self.link.send(Message::text(accept.to_string())).await.unwrap();
                invitation
            };
            tokio::join!(answer, accept)
        })
        .await;
        let grant = answer.grant();
        assert_eq!(grant.stream, invitation.stream);
        self.api = Some(Api { used: Instant::now(), ..api });
        tokio::join!(
            self.leg(&grant.url, grant.ticket.expose_secret()),
            self.leg(&invitation.url, invitation.ticket.expose_secret())
        )
    }

    async fn leg(&self, url: &str, ticket: &str) -> FlowLeg {
        let scheme = if self.dial.tls { "wss://" } else { "ws://" };
        let rest = url.strip_prefix(scheme).unwrap_or_else(|| panic!("a leg's URL must be {scheme}: {url}"));
        let path = &rest[rest.find('/').expect("a leg's URL needs a path")..];
        let authorization = format!("Bearer {ticket}");
        let (socket, early) = self.dial.upgrade(path, &[("authorization", &authorization)]).await;
        FlowLeg::new(socket, early)
    }

    async fn call(&self) -> Api {
        let socket = TokioIo::new(self.dial.connect().await);
        let (requests, connection) = http1::handshake(socket).await.unwrap();
        let mut tasks = JoinSet::new();
        tasks.spawn(connection);
        Api { requests, used: Instant::now(), _connection: tasks }
    }
}
