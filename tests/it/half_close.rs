//! Each direction of a stream ends by itself when both ends can do so, and both together when one cannot.

use midspan_core::api::StreamGrant;
use secrecy::ExposeSecret as _;
use serde_json::json;
use testkit::{Leg, Midspan, Relay, pattern, until, within};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};
use tokio_tungstenite::tungstenite::Message;

use crate::web::local_address;

#[tokio::test]
async fn who_has_sent_all_still_gets_the_whole_answer() {
    let (question, answer) = (pattern(1_000_000), pattern(3_000_000));
    let site = Site::start().await;
    let (mut client, mut server) = site.connection().await;
    let asking = async {
        client.write_all(&question).await.unwrap();
        client.shutdown().await.unwrap();
        let mut received = Vec::new();
        client.read_to_end(&mut received).await.unwrap();
        received
    };
    let answering = async {
        let mut received = Vec::new();
        server.read_to_end(&mut received).await.unwrap();
        server.write_all(&answer).await.unwrap();
        drop(server);
        received
    };
    let (at_client, at_server) = within("the exchange", async { tokio::join!(asking, answering) }).await;
    assert!(at_server == question, "{} of {} bytes", at_server.len(), question.len());
    assert!(at_client == answer, "{} of {} bytes", at_client.len(), answer.len());
    site.relay.assert_quiet().await;
    let record = until("the record of the end", || async {
        site.relay.activity().into_iter().find(|record| record["operationName"] == "end")
    })
    .await;
    assert_eq!(
        record["resultType"].as_str().map(|reason| reason.ends_with("_closed")),
        Some(true),
        "{record}"
    );
}

#[tokio::test]
async fn the_devices_side_may_end_first_too() {
    let site = Site::start().await;
    let (mut client, mut server) = site.connection().await;
    server.write_all(b"all that I have to say").await.unwrap();
    server.shutdown().await.unwrap();
    let mut heard = String::new();
    within("the server's end", client.read_to_string(&mut heard)).await.unwrap();
    assert_eq!(heard, "all that I have to say");
    client.write_all(&pattern(500_000)).await.unwrap();
    drop(client);
    let mut received = Vec::new();
    within("the client's end", server.read_to_end(&mut received)).await.unwrap();
    assert!(received == pattern(500_000), "{} bytes", received.len());
    drop(server);
    site.relay.assert_quiet().await;
}

#[tokio::test]
async fn an_empty_message_ends_one_direction() {
    let relay = Relay::start().await;
    let mut link = relay.device("dev1").await;
    let service = Midspan::service(&relay, &["connect", "dev1", "test", "-L", "127.0.0.1:0"]);
    let mut client = TcpStream::connect(local_address(&service).await).await.unwrap();
    let invitation = link.next_request().await;
    assert!(invitation.capabilities.has("half-close"));
    let answer = json!({ "type": "accept", "request": invitation.request, "capabilities": ["half-close"] });
    link.send(&answer).await;
    let mut device = Leg::open(relay.target(), &invitation.url, invitation.ticket.expose_secret()).await;

    client.write_all(b"question").await.unwrap();
    assert_eq!(device.next_binary().await, "question");
    client.shutdown().await.unwrap();
    assert_eq!(device.next_binary().await, "");
    device.send_binary("answer").await;
    device.send_binary("").await;
    let mut heard = String::new();
    within("the answer", client.read_to_string(&mut heard)).await.unwrap();
    assert_eq!(heard, "answer");
    assert_eq!(device.closed().await.0, 1000);
    relay.assert_quiet().await;
}

#[tokio::test]
async fn without_the_capability_one_end_ends_both() {
    let relay = Relay::start().await;
    let mut link = relay.device("dev1").await;
    let service = Midspan::service(&relay, &["connect", "dev1", "test", "-L", "127.0.0.1:0"]);
    let address = local_address(&service).await;

    // The client's end closes the stream.
    let mut client = TcpStream::connect(&address).await.unwrap();
    let invitation = link.next_request().await;
    link.accept(invitation.request).await;
    let mut device = Leg::open(relay.target(), &invitation.url, invitation.ticket.expose_secret()).await;
    client.write_all(b"question").await.unwrap();
    client.shutdown().await.unwrap();
    assert_eq!(device.next_binary().await, "question");
    assert_eq!(device.closed().await.0, 1000);
    within("the client's end", client.read_to_end(&mut Vec::new())).await.unwrap();

    // An empty message means nothing; the device's close ends the client's connection.
    let mut client = TcpStream::connect(&address).await.unwrap();
    let invitation = link.next_request().await;
    link.accept(invitation.request).await;
    let mut device = Leg::open(relay.target(), &invitation.url, invitation.ticket.expose_secret()).await;
    for message in ["", "answer", ""] {
        device.send_binary(message).await;
    }
    device.close(1000, "").await;
    let mut heard = String::new();
    within("the answer", client.read_to_string(&mut heard)).await.unwrap();
    assert_eq!(heard, "answer");
    device.closed().await;
    relay.assert_quiet().await;
}

#[tokio::test]
async fn a_device_proxy_follows_the_service_that_cannot_half_close() {
    let site = Site::start().await;
    let body = json!({ "name": "local" });
    let service = site.relay.service();
    let (answer, accepted) = tokio::join!(service.open_with("dev1", body), site.server.accept());
    let (grant, mut server): (StreamGrant, _) = (answer.grant(), accepted.unwrap().0);
    let mut service = Leg::open(site.relay.target(), &grant.url, grant.ticket.expose_secret()).await;
    service.send_text("text is bytes too").await;
    let mut buffer = [0; 17];
    within("the bytes", server.read_exact(&mut buffer)).await.unwrap();
    assert_eq!(&buffer, b"text is bytes too");
    server.write_all(b"bye").await.unwrap();
    drop(server);
    assert_eq!(service.next().await, Message::binary("bye"));
    assert_eq!(service.closed().await.0, 1000);
    site.relay.assert_quiet().await;
}

/// A server behind the device proxy, and the service proxy before it.
struct Site {
    relay: Relay,
    server: TcpListener,
    address: String,
    _processes: [testkit::Process; 2],
}

impl Site {
    async fn start() -> Self {
        let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let relay = Relay::start().await;
        let allow = format!("local={}", server.local_addr().unwrap());
        let device = Midspan::device(&relay, &["--allow", &allow]).await;
        let service = Midspan::service(&relay, &["connect", "dev1", "local", "-L", "127.0.0.1:0"]);
        let address = local_address(&service).await;
        Self { relay, server, address, _processes: [device, service] }
    }

    /// Both ends of a connection through the relay.
    async fn connection(&self) -> (TcpStream, TcpStream) {
        let (client, accepted) = tokio::join!(TcpStream::connect(&self.address), self.server.accept());
        (client.unwrap(), accepted.unwrap().0)
    }
}
