//! The library against a relay that is played by the test.

#![expect(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test that cannot go on fails")]

mod command;
mod relay;

use std::{sync::Arc, time::Duration};

use futures_util::{SinkExt as _, StreamExt as _};
use midspan_client::{
    Capabilities, Device, DeviceSettings, Handler, Invitation, Message, OpenError, Service, Stream,
    StreamError, stream_request,
};
use serde_json::json;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    time::{Instant, timeout},
};
use tokio_tungstenite::tungstenite::Message as Frame;
use tokio_util::sync::CancellationToken;

use crate::relay::{Relay, STREAM, link_message, options};

#[tokio::test]
async fn a_device_answers_twice_and_opens_one_leg() {
    let relay = Relay::start().await;
    let stop = CancellationToken::new();
    let device = relay.device(DeviceSettings::default()).run(Echo, stop.clone());
    let story = async {
        let mut link = relay.link(3600).await;
        assert_eq!(link.path, "/v1/devices/dev1/link");
        assert!(link.authorization.starts_with("SharedAccessSignature sr="), "{}", link.authorization);

        let request = relay.invitation("echo", 1);
        link.tell(&request).await;
        link.tell(&request).await;
        let accept = json!({"type": "accept", "request": request["request"], "capabilities": ["half-close"]});
        assert_eq!(link.hear().await, accept);
        assert_eq!(link.hear().await, accept);

        let mut leg = relay.accept().await;
        assert_eq!(leg.path, format!("/bridges/{STREAM}/device"));
        assert_eq!(leg.authorization, "Bearer TICKET");
        assert!(timeout(Duration::from_millis(300), relay.accept()).await.is_err(), "a second leg came");
        leg.socket.send(Frame::text("hello")).await.unwrap();
        assert_eq!(leg.socket.next().await.unwrap().unwrap(), Frame::text("hello"));
        leg.socket.close(None).await.unwrap();

        stop.cancel();
        assert!(link.socket.next().await.unwrap().unwrap().is_close());
    };
    within(10, async { tokio::join!(device, story) }).await;
}

#[tokio::test]
async fn a_device_rejects_with_its_reason_and_at_its_limit() {
    let relay = Relay::start().await;
    let stop = CancellationToken::new();
    let settings = DeviceSettings { max_streams: 1, grace: Duration::ZERO };
    let device = relay.device(settings).run(Echo, stop.clone());
    let story = async {
        let mut link = relay.link(3600).await;
        link.tell(&relay.invitation("telnet", 1)).await;
        assert_eq!(link.hear().await["reason"], "no such service here: telnet");

        // The task of the rejected stream may need a moment to be gone.
        tokio::time::sleep(Duration::from_millis(50)).await;
        link.tell(&relay.invitation("echo", 2)).await;
        assert_eq!(link.hear().await["type"], "accept");
        let _leg = relay.accept().await;
        link.tell(&relay.invitation("echo", 3)).await;
        assert_eq!(link.hear().await["reason"], "the device is at its limit of 1 streams");
        stop.cancel();
    };
    within(10, async { tokio::join!(device, story) }).await;
}

#[tokio::test]
async fn a_device_renews_its_link_before_the_credential_ends() {
    let relay = Relay::start().await;
    let stop = CancellationToken::new();
    let device = relay.device(DeviceSettings::default()).run(Echo, stop.clone());
    let story = async {
        let mut first = relay.link(2).await;
        let mut second = relay.link(3600).await;
        // What the relay says to the older link is the device's own doing, and no reason to stay away.
        first.tell(&link_message("goodbye_replaced")).await;
        first.socket.close(None).await.unwrap();
        second.tell(&relay.invitation("telnet", 1)).await;
        assert_eq!(second.hear().await["type"], "reject");
        drop(second);
        let _third = relay.link(3600).await;
        stop.cancel();
    };
    within(10, async { tokio::join!(device, story) }).await;
}

#[tokio::test]
async fn a_device_stays_away_as_it_is_told() {
    let relay = Relay::start().await;
    let stop = CancellationToken::new();
    let device = relay.device(DeviceSettings::default()).run(Echo, stop.clone());
    let story = async {
        let mut link = relay.link(3600).await;
        link.tell(&link_message("goodbye_draining")).await;
        drop(link);
        let begin = Instant::now();
        let mut link = relay.link(3600).await;
        assert!(begin.elapsed() > Duration::from_millis(900), "{:?}", begin.elapsed());
        // Another machine with the same identity: five minutes, and here a part of that.
        link.tell(&link_message("goodbye_replaced")).await;
        drop(link);
        assert!(timeout(Duration::from_secs(2), relay.accept()).await.is_err(), "it came back");
        stop.cancel();
    };
    within(15, async { tokio::join!(device, story) }).await;
}

#[tokio::test]
async fn a_device_that_is_told_to_move_keeps_its_link_until_it_has_another() {
    let relay = Relay::start().await;
    let stop = CancellationToken::new();
    let device = relay.device(DeviceSettings::default()).run(Echo, stop.clone());
    let story = async {
        let mut old = relay.link(3600).await;
        old.tell(&link_message("goodbye_draining")).await;
        old.tell(&relay.invitation("telnet", 1)).await;
        assert_eq!(old.hear().await["type"], "reject");
        // A place where it cannot go does not cost it the link that it has.
        relay.refuse(503, "unavailable").await;
        old.tell(&relay.invitation("telnet", 2)).await;
        assert_eq!(old.hear().await["type"], "reject");
        let mut new = relay.link(3600).await;
        old.socket.close(None).await.unwrap();
        new.tell(&relay.invitation("telnet", 3)).await;
        assert_eq!(new.hear().await["type"], "reject");
        stop.cancel();
    };
    within(15, async { tokio::join!(device, story) }).await;
}

#[tokio::test]
async fn a_device_survives_a_relay_that_is_not_there_yet() {
    let relay = Relay::start().await;
    let stop = CancellationToken::new();
    let device = relay.device(DeviceSettings::default()).run(Echo, stop.clone());
    let story = async {
        relay.refuse(401, "unauthorized").await;
        relay.refuse(503, "unavailable").await;
        let _link = relay.link(3600).await;
        stop.cancel();
    };
    within(15, async { tokio::join!(device, story) }).await;
}

#[tokio::test]
async fn a_device_dials_again_with_the_same_ticket() {
    let relay = Relay::start().await;
    let stop = CancellationToken::new();
    let device = relay.device(DeviceSettings::default()).run(Echo, stop.clone());
    let story = async {
        let mut link = relay.link(3600).await;
        link.tell(&relay.invitation("echo", 1)).await;
        assert_eq!(link.hear().await["type"], "accept");
        let first = relay.drop_one().await;
        // The relay has not noticed yet.
        let second = relay.refuse(409, "leg_taken").await;
        for head in [first, second] {
            assert!(head.starts_with(&format!("GET /bridges/{STREAM}/device HTTP/1.1\r\n")), "{head}");
            assert!(head.contains("authorization: Bearer TICKET\r\n"), "{head}");
        }
        let mut leg = relay.accept().await;
        assert_eq!(
            (leg.path.as_str(), leg.authorization.as_str()),
            (format!("/bridges/{STREAM}/device").as_str(), "Bearer TICKET")
        );
        leg.socket.send(Frame::text("hello")).await.unwrap();
        assert_eq!(leg.socket.next().await.unwrap().unwrap(), Frame::text("hello"));
        leg.socket.close(None).await.unwrap();
        stop.cancel();
    };
    within(15, async { tokio::join!(device, story) }).await;
}

#[tokio::test]
async fn a_service_dials_again_with_the_same_ticket() {
    let relay = Relay::start().await;
    let service = Service::new(relay.connection("SharedAccessKeyName=support"), options()).unwrap();
    let story = async {
        relay.grant().await;
        let head = relay.drop_one().await;
        assert!(head.contains("authorization: Bearer TICKET\r\n"), "{head}");
        let mut leg = relay.accept().await;
        assert_eq!(leg.authorization, "Bearer TICKET");
        leg.socket.send(Frame::text("hello")).await.unwrap();
        leg
    };
    let opening = async {
        let request = stream_request("ssh".parse().unwrap(), Capabilities::none());
        let mut stream = service.open(&"dev1".parse().unwrap(), &request).await.unwrap();
        assert_eq!(stream.receive().await.unwrap(), Some(Message::Text("hello".to_owned())));
    };
    within(15, async { tokio::join!(story, Box::pin(opening)) }).await;
}

#[tokio::test]
async fn a_leg_that_is_refused_for_good_is_not_dialled_again() {
    let relay = Relay::start().await;
    let service = Service::new(relay.connection("SharedAccessKeyName=support"), options()).unwrap();
    let request = stream_request("ssh".parse().unwrap(), Capabilities::none());
    let device = "dev1".parse().unwrap();
    let refused = async {
        relay.grant().await;
        relay.refuse(410, "device_lost").await;
    };
    let (opened, ()) = within(10, async { tokio::join!(service.open(&device, &request), refused) }).await;
    let error = opened.unwrap_err();
    assert!(matches!(error, OpenError::Leg(_)), "{error:?}");
    assert_eq!(error.request().problem().unwrap().name(), Some("device_lost"));

    // A device has nobody to tell, and does not come again either.
    let stop = CancellationToken::new();
    let device = relay.device(DeviceSettings::default()).run(Echo, stop.clone());
    let story = async {
        let mut link = relay.link(3600).await;
        link.tell(&relay.invitation("echo", 1)).await;
        relay.refuse(410, "service_lost").await;
        assert!(timeout(Duration::from_secs(3), relay.accept()).await.is_err(), "another leg came");
        stop.cancel();
    };
    within(15, async { tokio::join!(device, story) }).await;
}

#[tokio::test]
async fn a_device_gives_up_a_link_on_which_nothing_comes() {
    let relay = Relay::start().await;
    let stop = CancellationToken::new();
    let device = relay.device(DeviceSettings::default()).run(Echo, stop.clone());
    let story = async {
        let mut welcome = link_message("welcome");
        welcome["ping_seconds"] = json!(1);
        welcome["silence_seconds"] = json!(1);
        // Whoever does not read answers no ping; the connection itself stays.
        let mut mute = relay.welcome(&welcome).await;
        let begin = Instant::now();
        let mut link = relay.link(3600).await;
        assert!(begin.elapsed() > Duration::from_millis(900), "{:?}", begin.elapsed());
        link.tell(&relay.invitation("telnet", 1)).await;
        assert_eq!(link.hear().await["type"], "reject");
        // The device has left the other one.
        while let Some(Ok(message)) = mute.socket.next().await {
            assert!(message.is_ping() || message.is_close(), "{message:?}");
        }
        stop.cancel();
    };
    within(15, async { tokio::join!(device, story) }).await;
}

#[tokio::test]
async fn a_service_opens_a_stream_and_proxies() {
    let relay = Relay::start().await;
    let service = Service::new(relay.connection("SharedAccessKeyName=support"), options()).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut local = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let (near, _) = listener.accept().await.unwrap();

    let story = async {
        let request = relay.grant().await;
        assert!(request.contains("POST /v1/devices/dev1/streams HTTP/1.1"), "{request}");
        assert!(request.contains(r#"{"name":"ssh","capabilities":["half-close"]}"#), "{request}");
        let mut leg = relay.accept().await;
        assert_eq!(leg.authorization, "Bearer TICKET");
        local.write_all(b"question").await.unwrap();
        local.shutdown().await.unwrap();
        assert_eq!(leg.socket.next().await.unwrap().unwrap(), Frame::binary("question"));
        assert_eq!(leg.socket.next().await.unwrap().unwrap(), Frame::binary(""));
        leg.socket.send(Frame::binary("answer")).await.unwrap();
        leg.socket.send(Frame::binary("")).await.unwrap();
        let mut answer = String::new();
        local.read_to_string(&mut answer).await.unwrap();
        assert_eq!(answer, "answer");
        while let Some(Ok(_)) = leg.socket.next().await {}
    };
    let proxying = async {
        let request = stream_request("ssh".parse().unwrap(), Capabilities::of_this_client());
        let stream = service.open(&"dev1".parse().unwrap(), &request).await.unwrap();
        stream.proxy(near).await.unwrap()
    };
    let (traffic, ()) = within(10, async { tokio::join!(Box::pin(proxying), story) }).await;
    assert_eq!((traffic.sent, traffic.received), (8, 6));
}

#[tokio::test]
async fn a_cut_stream_resets_the_local_connection() {
    let relay = Relay::start().await;
    let service = Service::new(relay.connection("SharedAccessKeyName=support"), options()).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut local = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let (near, _) = listener.accept().await.unwrap();
    let story = async {
        relay.grant().await;
        drop(relay.accept().await);
        let error = local.read_u8().await.unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    };
    let proxying = async {
        let request = stream_request("ssh".parse().unwrap(), Capabilities::of_this_client());
        let stream = service.open(&"dev1".parse().unwrap(), &request).await.unwrap();
        stream.proxy(near).await
    };
    let (result, ()) = within(10, async { tokio::join!(Box::pin(proxying), story) }).await;
    assert!(matches!(result, Err(StreamError::Lost(_))), "{result:?}");
}

#[tokio::test]
async fn a_refusal_keeps_the_relays_words() {
    let relay = Relay::start().await;
    let service = Service::new(relay.connection("SharedAccessKeyName=support"), options()).unwrap();
    let request = stream_request("ssh".parse().unwrap(), Capabilities::none());
    let device = "dev1".parse().unwrap();
    let (opened, _) = within(10, async {
        tokio::join!(service.open(&device, &request), relay.refuse(404, "device_offline"))
    })
    .await;
    let error = opened.unwrap_err();
    assert_eq!(error.request().problem().unwrap().name(), Some("device_offline"));
    assert_eq!(error.to_string(), "what happened this time");
}

#[test]
fn the_wrong_kind_of_connection_string_is_named() {
    let key = "SharedAccessKey=MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=";
    let device = format!("HostName=h;DeviceId=dev1;{key}").parse().unwrap();
    assert_eq!(
        Service::new(device, options()).unwrap_err().to_string(),
        "this needs the connection string of a service, and was given that of device dev1"
    );
    let service = format!("HostName=h;SharedAccessKeyName=support;{key}").parse().unwrap();
    assert_eq!(
        Device::new(service, options(), DeviceSettings::default()).unwrap_err().to_string(),
        "this needs the connection string of a device, and was given that of service support"
    );
}

/// Echoes whatever comes over streams named `echo`.
struct Echo;

impl Handler for Echo {
    type Accepted = Arc<str>;

    async fn decide(&self, invitation: &Invitation) -> Result<Self::Accepted, String> {
        match invitation.name.as_str() {
            "echo" => Ok("echo".into()),
            other => Err(format!("no such service here: {other}")),
        }
    }

    async fn serve(&self, _: Self::Accepted, mut stream: Stream) {
        while let Ok(Some(message)) = stream.receive().await {
            if stream.send(message).await.is_err() {
                return;
            }
        }
        let _ = stream.send(Message::Text("over".to_owned())).await;
    }
}

async fn within<F: Future>(seconds: u64, future: F) -> F::Output {
    timeout(Duration::from_secs(seconds), future).await.expect("the story came to its end in time")
}
