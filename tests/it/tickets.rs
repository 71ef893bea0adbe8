//! A leg's ticket is good for one leg of one stream, once.

use midspan_core::{id::Incarnation, ticket::Ticket, time::UnixTime};
use secrecy::ExposeSecret as _;
use testkit::{Answer, Handshake, Leg, Relay, now, until};

#[tokio::test]
async fn a_ticket_attaches_once() {
    let relay = Relay::start().await;
    let mut link = relay.device("dev1").await;
    let handshake = relay.handshake("dev1", &mut link).await;
    let device = relay.device_leg(&handshake).await;
    refusal(&relay, &handshake.invitation.url, device_ticket(&handshake)).await.problem(409, "leg_taken");

    let mut service = relay.service_leg(&handshake).await;
    refusal(&relay, &handshake.grant.url, service_ticket(&handshake)).await.problem(409, "leg_taken");
    let mut device = device;
    service.send_text("the first ones are not disturbed").await;
    assert_eq!(device.next_text().await, "the first ones are not disturbed");
    relay.counts("midspan_edge_leg_refusals_total", &[("reason", "leg_taken")], 2).await;
}

#[tokio::test]
async fn of_many_legs_with_one_ticket_exactly_one_is_taken() {
    let relay = Relay::start().await;
    let mut link = relay.device("dev1").await;
    let handshake = relay.handshake("dev1", &mut link).await;
    let try_it = || Leg::try_open(relay.target(), &handshake.invitation.url, device_ticket(&handshake), &[]);
    let tries = futures_util::future::join_all((0..16).map(|_| try_it())).await;
    let (taken, refused): (Vec<_>, Vec<_>) = tries.into_iter().partition(Result::is_ok);
    assert_eq!(taken.len(), 1);
    for refusal in refused {
        refusal.unwrap_err().problem(409, "leg_taken");
    }
}

#[tokio::test]
async fn a_ticket_is_worth_nothing_after_the_end() {
    let relay = Relay::start().await;
    let mut link = relay.device("dev1").await;
    let handshake = relay.handshake("dev1", &mut link).await;
    let (mut service, mut device) = (relay.service_leg(&handshake).await, relay.device_leg(&handshake).await);
    service.close(1000, "").await;
    tokio::join!(service.closed(), device.closed());
    relay.service().ended(handshake.grant.stream, "service_closed").await;
    refusal(&relay, &handshake.grant.url, service_ticket(&handshake)).await.problem(410, "service_closed");
    refusal(&relay, &handshake.invitation.url, device_ticket(&handshake))
        .await
        .problem(410, "service_closed");
    relay.assert_quiet().await;
}

#[tokio::test]
async fn a_dial_that_broke_may_be_repeated() {
    let relay = Relay::start().await;
    let mut link = relay.device("dev1").await;
    let handshake = relay.handshake("dev1", &mut link).await;
    for abrupt in [true, false] {
        let first = again(&relay, &handshake).await;
        if abrupt { first.abort() } else { drop(first) }
    }
    let mut device = again(&relay, &handshake).await;
    let mut service = relay.service_leg(&handshake).await;
    device.send_text("here I am").await;
    assert_eq!(service.next_text().await, "here I am");
    service.close(1000, "").await;
    device.closed().await;
    relay.assert_quiet().await;
}

#[tokio::test]
async fn expired_tickets_are_refused() {
    let (relay, handshake) = handshake().await;
    let expired = signed(&relay, &handshake, |ticket| ticket.expires = UnixTime(now().0 - 60));
    let problem = refusal(&relay, &handshake.invitation.url, &expired).await.problem(401, "ticket_expired");
    assert!(problem.detail.contains(" s ago"), "it does not say since when: {}", problem.detail);
    relay.assert_quiet().await;
}

#[tokio::test]
async fn altered_tickets_are_refused() {
    let (relay, handshake) = handshake().await;
    let good = device_ticket(&handshake);
    let middle = good.len() / 2;
    let other = if good.as_bytes()[middle] == b'A' { "B" } else { "A" };
    let altered = [&good[..middle], other, &good[middle + 1..]].concat();
    let cut = &good[..good.len() - 4];
    for ticket in [altered.as_str(), cut, "", "x.y.z", &"x".repeat(5000)] {
        refusal(&relay, &handshake.invitation.url, ticket).await.problem(401, "ticket_invalid");
    }
    relay.assert_quiet().await;
}

#[tokio::test]
async fn tickets_of_another_relay_are_refused() {
    let (relay, handshake) = handshake().await;
    let other = Relay::start().await;
    let ticket = relay.ticket_keys().verify(device_ticket(&handshake), now()).unwrap();
    let forged = other.ticket_keys().sign(&ticket).unwrap();
    refusal(&relay, &handshake.invitation.url, forged.expose_secret()).await.problem(401, "ticket_invalid");
}

#[tokio::test]
async fn a_ticket_is_for_one_stream_and_one_role() {
    let relay = Relay::start().await;
    let mut link = relay.device("dev1").await;
    let one = relay.handshake("dev1", &mut link).await;
    let two = relay.handshake("dev1", &mut link).await;
    refusal(&relay, &one.invitation.url, device_ticket(&two)).await.problem(403, "ticket_mismatch");
    refusal(&relay, &one.invitation.url, service_ticket(&one)).await.problem(403, "ticket_mismatch");
    refusal(&relay, &one.grant.url, device_ticket(&one)).await.problem(403, "ticket_mismatch");
    // Nothing of that has used anything up.
    let (mut service, mut device) = (relay.service_leg(&one).await, relay.device_leg(&one).await);
    service.send_text("right").await;
    assert_eq!(device.next_text().await, "right");
}

#[tokio::test]
async fn a_ticket_of_an_earlier_life_of_the_edge_says_so() {
    let (relay, handshake) = handshake().await;
    let old = signed(&relay, &handshake, |ticket| ticket.owner.incarnation = Incarnation::from_random(1));
    let problem = refusal(&relay, &handshake.invitation.url, &old).await.problem(410, "owner_gone");
    assert!(problem.retry);
}

#[tokio::test]
async fn a_ticket_in_the_url_is_refused() {
    let (relay, handshake) = handshake().await;
    let url = &handshake.invitation.url;
    let path = &url[url.find("/bridges").unwrap()..];
    let ticket = device_ticket(&handshake);
    for query in ["access_token", "ticket", "authorization"] {
        let refused = relay.target().upgrade(&format!("{path}?{query}={ticket}"), &[]).await.unwrap_err();
        refused.problem(401, "ticket_invalid");
        assert!(!refused.text().contains(ticket), "the refusal repeats the ticket");
    }
    assert!(!relay.log().contains(ticket), "the log shows the ticket");
}

#[tokio::test]
async fn ticket_keys_are_changed_while_running() {
    let relay = Relay::with(&["--reload-interval", "200ms"]).await;
    let mut link = relay.device("dev1").await;
    let before = relay.handshake("dev1", &mut link).await;
    let old = std::fs::read_to_string(relay.path("ticket.key")).unwrap();
    let old = old.lines().next().unwrap();
    let new = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=";
    relay.replace("ticket.key", &format!("{new}\n{old}\n"));
    // New tickets are signed with the new key.
    let after = until("the new key is in use", || async {
        let handshake = relay.handshake("dev1", &mut relay.device("dev1").await).await;
        let new_only = midspan_core::ticket::TicketKeys::from_text(new).unwrap();
        new_only.verify(device_ticket(&handshake), now()).is_ok().then_some(handshake)
    })
    .await;
    for handshake in [before, after] {
        let (mut service, mut device) =
            (relay.service_leg(&handshake).await, relay.device_leg(&handshake).await);
        service.send_text("hello").await;
        assert_eq!(device.next_text().await, "hello");
    }
}

async fn handshake() -> (Relay, Handshake) {
    let relay = Relay::start().await;
    let mut link = relay.device("dev1").await;
    let handshake = relay.handshake("dev1", &mut link).await;
    link.close().await;
    (relay, handshake)
}

/// The device's leg, dialled until the relay has noticed that the one before is gone.
async fn again(relay: &Relay, handshake: &Handshake) -> Leg {
    until("the leg's place is free again", || async {
        let ticket = device_ticket(handshake);
        match Leg::try_open(relay.target(), &handshake.invitation.url, ticket, &[]).await {
            Ok(leg) => Some(leg),
            Err(answer) => {
                answer.problem(409, "leg_taken");
                None
            }
        }
    })
    .await
}

async fn refusal(relay: &Relay, url: &str, ticket: &str) -> Answer {
    Leg::try_open(relay.target(), url, ticket, &[]).await.expect_err("the ticket was taken")
}

/// The device's ticket with a change, signed by the relay's own key.
fn signed(relay: &Relay, handshake: &Handshake, change: impl FnOnce(&mut Ticket)) -> String {
    let keys = relay.ticket_keys();
    let mut ticket = keys.verify(device_ticket(handshake), now()).unwrap();
    change(&mut ticket);
    keys.sign(&ticket).unwrap().expose_secret().to_owned()
}

fn device_ticket(handshake: &Handshake) -> &str {
    handshake.invitation.ticket.expose_secret()
}

fn service_ticket(handshake: &Handshake) -> &str {
    handshake.grant.ticket.expose_secret()
}
