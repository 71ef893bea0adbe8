use std::time::Duration;

use futures_util::{SinkExt as _, StreamExt as _};
use midspan_core::{
    connection_string::ConnectionString,
    id::RequestId,
    link::{Goodbye, Invitation, SUBPROTOCOL, ToDevice},
};
use secrecy::ExposeSecret as _;
use serde_json::{Value, json};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        Message,
        protocol::{CloseFrame, Role},
    },
};

use crate::{Answer, Io, Target, Upgraded, now, within};

/// How a link ended: the relay's goodbye, if there was one, and the code of the close frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bye {
    /// The last message.
    pub goodbye: Option<Goodbye>,
    /// The close code, or `None` for a connection that ended without a close frame.
    pub code: Option<u16>,
}

/// A device's link, spoken by hand.
#[derive(Debug)]
pub struct DeviceLink {
    socket: WebSocketStream<Io>,
    /// The first message.
    pub welcome: ToDevice,
}

impl DeviceLink {
    /// Connects with a signature that is good for an hour.
    pub async fn connect(target: &Target, connection: &ConnectionString) -> Self {
        let authorization = connection.sign(now().plus(Duration::from_secs(3600)));
        let address = match &connection.identity {
            midspan_core::connection_string::Identity::Device(address) => address,
            midspan_core::connection_string::Identity::Service(name) => panic!("{name} is a service"),
        };
        let path = format!("/v1/{}/link", address.path());
        let headers = [("authorization", authorization.expose_secret())];
        Self::try_connect(target, &path, &headers)
            .await
            .unwrap_or_else(|answer| panic!("refused: {answer:?}"))
    }

    /// Connects to `path` with the subprotocol and `headers`, or gives the refusal.
    pub async fn try_connect(target: &Target, path: &str, headers: &[(&str, &str)]) -> Result<Self, Answer> {
        let mut all = vec![("sec-websocket-protocol", SUBPROTOCOL)];
        all.extend_from_slice(headers);
        let Upgraded { io, early, headers } = target.upgrade(path, &all).await?;
        assert_eq!(headers["sec-websocket-protocol"], SUBPROTOCOL);
        let socket = WebSocketStream::from_partially_read(io, early.into(), Role::Client, None).await;
        let mut link = Self { socket, welcome: ToDevice::Unknown };
        link.welcome = link.next().await;
        assert!(matches!(link.welcome, ToDevice::Welcome { .. }), "not welcome: {:?}", link.welcome);
        Ok(link)
    }

    /// The next message of the relay.
    pub async fn next(&mut self) -> ToDevice {
        match self.next_frame().await {
            Message::Text(text) => {
                serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
            }
            other => panic!("expected a message: {other:?}"),
        }
    }

    /// The next message of the relay, which must be a request.
    pub async fn next_request(&mut self) -> Invitation {
        match self.next().await {
            ToDevice::Request(invitation) => invitation,
            other @ (ToDevice::Welcome { .. } | ToDevice::Goodbye(_) | ToDevice::Unknown) => {
                panic!("expected a request: {other:?}")
            }
        }
    }

    /// Whether no message comes for `time`.
    pub async fn is_quiet_for(&mut self, time: Duration) -> bool {
        tokio::time::timeout(time, self.next()).await.is_err()
    }

    /// Accepts a request.
    pub async fn accept(&mut self, request: RequestId) {
        self.send(&json!({ "type": "accept", "request": request })).await;
    }

    /// Rejects a request.
    pub async fn reject(&mut self, request: RequestId, reason: &str) {
        self.send(&json!({ "type": "reject", "request": request, "reason": reason })).await;
    }

    /// Sends a message.
    pub async fn send(&mut self, message: &Value) {
        self.send_frame(Message::text(message.to_string())).await;
    }

    /// Sends anything.
    pub async fn send_frame(&mut self, message: Message) {
        within("sending to the relay", self.socket.send(message)).await.unwrap();
    }

    /// Closes the link in good order.
    pub async fn close(mut self) {
        // The relay may have closed it already.
        let _ = self.socket.close(None).await;
        within("the end of the link", async { while let Some(Ok(_)) = self.socket.next().await {} }).await;
    }

    /// Reads on until the link ends. Requests on the way are skipped.
    pub async fn ended(mut self) -> Bye {
        within("the end of the link", async {
            let mut goodbye = None;
            loop {
                match self.socket.next().await {
                    Some(Ok(Message::Text(text))) => {
                        if let Ok(ToDevice::Goodbye(said)) = serde_json::from_str(&text) {
                            goodbye = Some(said);
                        }
                    }
                    Some(Ok(Message::Close(frame))) => {
                        while let Some(Ok(_)) = self.socket.next().await {}
                        let code = frame.map_or(1005, |CloseFrame { code, .. }| code.into());
                        return Bye { goodbye, code: Some(code) };
                    }
                    Some(Ok(_)) => {}
                    Some(Err(_)) | None => return Bye { goodbye, code: None },
                }
            }
        })
        .await
    }

    async fn next_frame(&mut self) -> Message {
        within("the next message on the device link", async {
            loop {
                match self.socket.next().await {
                    Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                    Some(Ok(message)) => return message,
                    end => panic!("the device link ended: {end:?}"),
                }
            }
        })
        .await
    }
}
