//! A relay of which the test plays every step.

use futures_util::{SinkExt as _, StreamExt as _};
use midspan_client::{ConnectionString, Device, DeviceSettings, Options};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};
use tokio_tungstenite::{
    WebSocketStream, accept_hdr_async,
    tungstenite::{
        Message,
        handshake::server::{Request, Response},
    },
};

pub(crate) const STREAM: &str = "9c02000000000000000000000000000a";

/// Takes one connection at a time, in the order in which they come.
pub(crate) struct Relay {
    listener: TcpListener,
}

/// A link or a leg that the client opened.
pub(crate) struct Incoming {
    pub(crate) path: String,
    pub(crate) authorization: String,
    pub(crate) socket: WebSocketStream<TcpStream>,
}

impl Relay {
    pub(crate) async fn start() -> Self {
        Self { listener: TcpListener::bind("127.0.0.1:0").await.unwrap() }
    }

    pub(crate) fn connection_text(&self, identity: &str) -> String {
        let key = "SharedAccessKey=MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=";
        format!("HostName={};{identity};{key}", self.address())
    }

    pub(crate) fn connection(&self, identity: &str) -> ConnectionString {
        self.connection_text(identity).parse().unwrap()
    }

    pub(crate) fn device(&self, settings: DeviceSettings) -> Device {
        Device::new(self.connection("DeviceId=dev1"), options(), settings).unwrap()
    }

    pub(crate) async fn accept(&self) -> Incoming {
        let (stream, _) = self.listener.accept().await.unwrap();
        let (mut path, mut authorization) = (String::new(), String::new());
        let look = |request: &Request, mut response: Response| {
            path = request.uri().to_string();
            request.headers()["authorization"].to_str().unwrap().clone_into(&mut authorization);
            if let Some(subprotocol) = request.headers().get("sec-websocket-protocol") {
                response.headers_mut().insert("sec-websocket-protocol", subprotocol.clone());
            }
            Ok(response)
        };
        let socket = accept_hdr_async(stream, look).await.unwrap();
        Incoming { path, authorization, socket }
    }

    /// Takes a link and welcomes it for `life` seconds.
    pub(crate) async fn link(&self, life: u32) -> Incoming {
        let mut welcome = link_message("welcome");
        welcome["expires"] =
            json!(format!("2026-11-21T{:02}:{:02}:{:02}Z", 9 + life / 3600, life / 60 % 60, life % 60));
        self.welcome(&welcome).await
    }

    /// Takes a link with a welcome of the test's own.
    pub(crate) async fn welcome(&self, welcome: &Value) -> Incoming {
        let mut link = self.accept().await;
        link.tell(welcome).await;
        link
    }

    pub(crate) fn invitation(&self, name: &str, number: u32) -> Value {
        json!({
            "type": "request", "request": format!("{number:032x}"), "stream": STREAM, "name": name,
            "url": format!("ws://{}/bridges/{STREAM}/device", self.address()), "ticket": "TICKET",
            "expires": "2026-11-21T09:01:00Z", "answer_within_ms": 20000,
            "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00",
        })
    }

    /// Grants the next request for a stream, and hands out what was sent.
    pub(crate) async fn grant(&self) -> String {
        let grant = json!({
            "stream": STREAM, "url": format!("ws://{}/bridges/{STREAM}/service", self.address()), "ticket": "TICKET",
            "expires": "2026-11-21T09:01:00Z", "capabilities": ["half-close"], "connect_timeout_seconds": 10,
            "response_timeout_seconds": 20, "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00",
        });
        self.answer("201 Created", "application/json", &grant).await
    }

    /// Refuses the next request, whatever it is, and hands out what was sent.
    pub(crate) async fn refuse(&self, status: u16, name: &str) -> String {
        self.refuse_with(status, name, None).await
    }

    /// Refuses the next request, and says when to come back.
    pub(crate) async fn refuse_for(&self, seconds: u64, status: u16, name: &str) -> String {
        self.refuse_with(status, name, Some(seconds)).await
    }

    async fn refuse_with(&self, status: u16, name: &str, retry_after: Option<u64>) -> String {
        let mut problem = json!({
            "type": format!("urn:midspan:problem:{name}"), "title": "t", "status": status,
            "detail": "what happened this time", "fault": "relay", "retry": true, "request_id": "41f7",
        });
        if let Some(seconds) = retry_after {
            problem["retry_after_seconds"] = json!(seconds);
        }
        self.answer(&format!("{status} No"), "application/problem+json", &problem).await
    }

    /// Takes the next request, and drops its connection without an answer.
    pub(crate) async fn drop_one(&self) -> String {
        let (mut stream, _) = self.listener.accept().await.unwrap();
        head(&mut stream).await
    }

    async fn answer(&self, status: &str, kind: &str, body: &Value) -> String {
        let (mut stream, _) = self.listener.accept().await.unwrap();
        let head = head(&mut stream).await;
        let length = head
            .lines()
            .find_map(|line| line.strip_prefix("content-length: "))
            .map(|text| text.parse().unwrap());
        let mut sent = vec![0; length.unwrap_or(0)];
        stream.read_exact(&mut sent).await.unwrap();
        let body = body.to_string();
        let answer = format!(
            "HTTP/1.1 {status}\r\ncontent-type: {kind}\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(answer.as_bytes()).await.unwrap();
        head + &String::from_utf8(sent).unwrap()
    }

    fn address(&self) -> std::net::SocketAddr {
        self.listener.local_addr().unwrap()
    }
}

impl Incoming {
    pub(crate) async fn tell(&mut self, message: &Value) {
        self.socket.send(Message::text(message.to_string())).await.unwrap();
    }

    pub(crate) async fn hear(&mut self) -> Value {
        loop {
            if let Message::Text(text) = self.socket.next().await.unwrap().unwrap() {
                return serde_json::from_str(&text).unwrap();
            }
        }
    }
}

async fn head(stream: &mut TcpStream) -> String {
    let mut request = Vec::new();
    while !request.ends_with(b"\r\n\r\n") {
        request.push(stream.read_u8().await.unwrap());
    }
    String::from_utf8(request).unwrap()
}

pub(crate) fn options() -> Options {
    Options { plaintext: true, ..Options::default() }
}

pub(crate) fn link_message(name: &str) -> Value {
    match name {
        "welcome" => json!({
            "type": "welcome", "now": "2026-11-21T09:00:00Z", "ping_seconds": 25, "silence_seconds": 60,
            "expires": "2026-11-21T10:00:00Z",
        }),
        "goodbye_replaced" => json!({
            "type": "goodbye", "reason": "replaced", "message": "a newer link took over", "come_back_seconds": 300,
        }),
        "goodbye_draining" => json!({
            "type": "goodbye", "reason": "draining", "message": "the relay is restarting", "come_back_seconds": 1,
        }),
        other => panic!("no message {other}"),
    }
}
