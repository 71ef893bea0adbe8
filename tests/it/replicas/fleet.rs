//! The same with real processes around a Redis.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use midspan_core::{
    connection_string::ConnectionString,
    link::{GoodbyeReason, ToDevice},
};
use secrecy::ExposeSecret as _;
use serde_json::json;
use testkit::{Bye, Fleet, Process, binary, eventually};
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    task::JoinSet,
    time::sleep,
};

#[tokio::test]
async fn any_replica_reaches_a_device_and_ends_its_streams() {
    let fleet = Fleet::start(3, 1).await;
    let mut link = fleet.device("dev1", 1).await;
    for control in 0..3 {
        let handshake = fleet.handshake(control, "dev1", &mut link).await;
        let (mut service, mut device) = fleet.legs(&handshake, [0, 0]).await;
        let other = fleet.service((control + 1) % 3);
        assert!(other.get("/v1/devices/dev1").await.expect(200).json()["connected"].as_bool().unwrap());
        other.delete(&format!("/v1/streams/{}", handshake.grant.stream)).await.expect(204);
        tokio::join!(service.ends(1001, "deleted"), device.ends(1001, "deleted"));
    }
    fleet.controls[0].counts("midspan_control_asked_elsewhere_total", &[("result", "accepted")], 1).await;
    fleet.controls[1].counts("midspan_control_asked_elsewhere_total", &[], 0).await;
}

#[tokio::test]
async fn a_killed_replica_costs_a_handshake_no_more_than_time() {
    let mut fleet = Fleet::start(3, 1).await;
    let mut link = fleet.device("dev1", 1).await;
    let service = fleet.service(0);
    let story = async {
        let first = link.next_request().await;
        fleet.controls[1].kill();
        drop(link);
        let mut link = fleet.device("dev1", 2).await;
        let second = link.next_request().await;
        assert_eq!(first.request, second.request);
        link.accept(second.request).await;
        link
    };
    let (answer, _link) = tokio::join!(service.open("dev1"), story);
    answer.grant();
}

#[tokio::test]
async fn a_replica_that_ends_hands_its_devices_over() {
    let mut fleet = Fleet::start(2, 1).await;
    let mut old = fleet.device("dev1", 0).await;
    fleet.controls[0].terminate();
    let goodbye = loop {
        if let ToDevice::Goodbye(goodbye) = old.next().await {
            break goodbye;
        }
    };
    assert_eq!(goodbye.reason, GoodbyeReason::Draining);
    let nothing = json!({ "name": "test", "connect_timeout_seconds": 0 });
    let service = fleet.service(1);
    let (answer, ()) = tokio::join!(service.open_with("dev1", nothing), async {
        let invitation = old.next_request().await;
        old.accept(invitation.request).await;
    });
    answer.grant();
    let mut new = fleet.device("dev1", 1).await;
    let Bye { code, .. } = old.ended().await;
    assert_eq!(code, Some(1012));
    fleet.handshake(1, "dev1", &mut new).await;
    let status = fleet.controls[0].wait_exit().await;
    assert!(status.success(), "{status}");
}

#[tokio::test]
async fn the_device_proxy_moves_without_an_offline_moment() {
    let mut fleet = Fleet::start(2, 1).await;
    let balancer = Balancer::start(fleet.controls[0].target.address).await;
    let connection = ConnectionString { host: balancer.host(), ..fleet.device_connection("dev1") };
    let mut command = binary("midspan");
    command.args(["device", "--allow", "ssh=127.0.0.1:1"]).env("MIDSPAN_CA", fleet.ca_file());
    command.env("MIDSPAN_CONNECTION_STRING", connection.to_text().expose_secret());
    let device = Process::spawn(command);
    fleet.controls[0].counts("midspan_control_device_links", &[], 1).await;

    balancer.send_to(fleet.controls[1].target.address);
    fleet.controls[0].terminate();
    let service = fleet.service(1);
    let mut asked = 0;
    let asking = async {
        loop {
            // It rejects what it does not know: by that it shows that it is there.
            let nothing = json!({ "name": "test", "connect_timeout_seconds": 0 });
            service.open_with("dev1", nothing).await.problem(409, "device_rejected");
            asked += 1;
            // The limit on initiations allows a hundred a second.
            sleep(Duration::from_millis(20)).await;
        }
    };
    let status = tokio::select! {
        status = fleet.controls[0].wait_exit() => status,
        () = asking => unreachable!("it asks for ever"),
    };
    assert!(status.success() && asked > 10, "{status}, asked {asked} times: {}", device.stderr());
    fleet.controls[1].counts("midspan_control_device_links", &[], 1).await;
}

#[tokio::test]
async fn devices_are_found_again_after_redis_came_back_empty() {
    let mut fleet = Fleet::start(2, 1).await;
    let mut link = fleet.device("dev1", 0).await;
    fleet.redis.kill();
    fleet.redis.restart();
    eventually("the list is right again", || async {
        let answer = fleet.service(1).get("/v1/devices/dev1").await;
        answer.status == 200 && answer.json()["connected"] == true
    })
    .await;
    eventually("nothing is unclear any more", || async {
        let nothing = json!({ "name": "test", "connect_timeout_seconds": 0 });
        fleet.service(1).open_with("nobody", nothing).await.status == 404
    })
    .await;
    fleet.handshake(1, "dev1", &mut link).await;
}

/// Sends new connections to one place or another, as they are.
struct Balancer {
    address: SocketAddr,
    to: Arc<Mutex<SocketAddr>>,
    _tasks: JoinSet<()>,
}

impl Balancer {
    async fn start(to: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, to) = (listener.local_addr().unwrap(), Arc::new(Mutex::new(to)));
        let mut tasks = JoinSet::new();
        let target = Arc::clone(&to);
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((mut client, _)) = listener.accept().await {
                let to = *target.lock().unwrap();
                connections.spawn(async move {
                    if let Ok(mut server) = TcpStream::connect(to).await {
                        let _ = copy_bidirectional(&mut client, &mut server).await;
                    }
                });
            }
        });
        Self { address, to, _tasks: tasks }
    }

    /// What a device is told.
    fn host(&self) -> String {
        format!("localhost:{}", self.address.port())
    }

    fn send_to(&self, to: SocketAddr) {
        *self.to.lock().unwrap() = to;
    }
}
