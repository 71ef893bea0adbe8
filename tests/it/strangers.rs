//! Who has not shown who it is may not stay, whatever it does meanwhile.

use std::time::Duration;

use testkit::{Relay, within};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

#[tokio::test]
async fn a_stranger_that_keeps_asking_is_cut_off() {
    let relay = Relay::with(&["--header-limit", "500ms"]).await;
    let mut io = relay.target().connect().await;
    let asking = async {
        let mut answers = 0;
        loop {
            let request = "GET /v1/endpoints HTTP/1.1\r\nHost: relay\r\n\r\n";
            let mut buffer = [0; 4096];
            if io.write_all(request.as_bytes()).await.is_err() {
                return answers;
            }
            match io.read(&mut buffer).await {
                Ok(1..) => answers += 1,
                Ok(0) | Err(_) => return answers,
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    let answers = within("the end of the stranger's connection", asking).await;
    assert!(answers > 1, "only {answers} answers: it was not cut for the time that it took");
    relay.counts("midspan_listener_refused_connections_total", &[("limit", "stranger_time")], 1).await;
    relay.assert_quiet().await;
}

#[tokio::test]
async fn who_has_shown_who_it_is_may_stay() {
    let relay = Relay::with(&["--header-limit", "300ms"]).await;
    let mut link = relay.device("dev1").await;
    let mut stream = relay.join(&mut link).await;
    // Longer than a stranger may stay.
    tokio::time::sleep(Duration::from_millis(1500)).await;
    stream.service.send_text("still here").await;
    assert_eq!(stream.device.next_text().await, "still here");
    relay.join(&mut link).await;
}

#[tokio::test]
async fn a_process_that_is_stopped_at_once_still_records_what_it_ended() {
    let mut relay = Relay::with(&["--drain-grace", "60s"]).await;
    let mut link = relay.device("dev1").await;
    let stream = relay.join(&mut link).await;
    let half_open = relay.handshake("dev1", &mut link).await;
    let mut waiting = relay.service_leg(&half_open).await;
    relay.counts("midspan_edge_streams", &[("state", "half_open")], 1).await;
    relay.terminate();
    link.ended().await;
    relay.terminate();
    waiting.ends(1012, "draining").await;
    relay.wait_exit().await;
    let ends = relay.activity().into_iter().filter(|record| record["operationName"] == "end");
    let ends: Vec<_> = ends.map(|record| record["resultType"].as_str().unwrap().to_owned()).collect();
    assert_eq!(ends, ["draining", "draining"]);
    drop(stream);
}
