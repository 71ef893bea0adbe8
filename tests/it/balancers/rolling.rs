//! A control replica and an edge are replaced behind a balancer, under the load of `benches/k6`: nobody is dropped.

use std::{fs, time::Duration};

use testkit::{Flags, Process};
use tokio::time::{sleep, timeout};

use super::{
    Site,
    balancer::{DOCUMENTED, Kind},
};
use crate::{load, tools};

const STREAMS: usize = 40;

#[tokio::test(flavor = "multi_thread")]
async fn nobody_is_dropped_when_processes_are_replaced_behind_haproxy() {
    rolls(Kind::HaproxyHttp).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_is_dropped_when_processes_are_replaced_behind_haproxy_below_tls() {
    rolls(Kind::HaproxyTcp).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_is_dropped_when_processes_are_replaced_behind_nginx() {
    rolls(Kind::NginxHttp).await;
}

async fn rolls(kind: Kind) {
    if tools::k6().is_none() {
        return;
    }
    let drain = Flags { all: &["--drain-delay", "4s", "--drain-grace", "4s"], ..Flags::default() };
    let Some(mut site) = Site::start(kind, DOCUMENTED, drain).await else { return };
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let service = site.fleet.service_connection().to_text();
    fs::write(file("service"), secrecy::ExposeSecret::expose_secret(&service)).unwrap();
    fs::write(file("group"), secrecy::ExposeSecret::expose_secret(&site.fleet.group_key().to_base64()))
        .unwrap();
    let address = site.balancer.address();
    let mut command = load::command(&["rolling"]);
    command
        .env("LOAD_SERVICE_FILE", file("service"))
        .env("LOAD_GROUP_KEY_FILE", file("group"))
        .env("LOAD_CA", site.fleet.ca_file())
        .env("LOAD_HOSTS", format!("localhost:443={address},streams.localhost:443={address}"))
        .env("LOAD_RESULTS", file("results"))
        .envs([("LOAD_STREAMS", STREAMS.to_string()), ("LOAD_RATE", "8".to_owned())])
        .envs([
            ("LOAD_DURATION", "45s"),
            ("LOAD_PAUSE", "0.5s"),
            ("LOAD_GRACE", "4s"),
            ("LOAD_SETTLE", "2s"),
        ]);
    let mut k6 = Process::spawn(command);

    let stand = async {
        while k6.is_running() {
            let mut streams = 0;
            for edge in &site.fleet.edges {
                streams += edge.metrics().await.count("midspan_edge_streams", &[("state", "joined")]);
            }
            if usize::try_from(streams).unwrap() >= STREAMS {
                return;
            }
            sleep(Duration::from_millis(100)).await;
        }
    };
    let stand = timeout(load::LIMIT, stand).await;
    assert!(
        stand.is_ok() && k6.is_running(),
        "the streams do not stand: {}{}",
        k6.stdout_text(),
        k6.stderr()
    );
    site.balancer.manage(&site.fleet, &[&site.fleet.controls[0], &site.fleet.edges[0]]);
    let (control, edge) = (&mut site.fleet.controls[0], &mut site.fleet.edges[0]);
    tokio::join!(control.roll(), edge.roll());
    site.balancer.manage(&site.fleet, &[]);

    tools::succeeds("the load script", &mut k6, load::LIMIT).await;
    let summary: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(file("results/rolling.json")).unwrap()).unwrap();
    // Something was replaced under it.
    for counted in ["midspan_drained_streams", "midspan_moved_links"] {
        assert!(
            summary["metrics"][counted]["count"].as_f64().unwrap() > 0.0,
            "{counted}: {}",
            k6.stdout_text()
        );
    }
}
