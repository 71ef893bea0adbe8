//! The load scripts of `benches/k6` with the real k6: each passes against a sound relay, and fails where something is wrong.

use std::{path::Path, process::Command, time::Duration};

use testkit::{Process, Relay};
use tokio::time::{sleep, timeout};

use crate::tools;

/// How long one run may take.
pub(crate) const LIMIT: Duration = Duration::from_secs(120);

#[tokio::test(flavor = "multi_thread")]
async fn the_set_up_rate_is_reached() {
    passes("setup-rate").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_streams_are_held() {
    passes("concurrent").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn echoes_come_back() {
    passes("echo").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_soak_goes_on() {
    passes("soak").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_cut_where_nothing_rolls() {
    passes("rolling").await;
}

async fn passes(scenario: &str) {
    if tools::k6().is_none() {
        return;
    }
    let relay = Relay::start().await;
    let (service, group) = (relay.path("service.connection"), relay.path("group.key"));
    let mut k6 = run(scenario, &relay, &service, &group);
    tools::succeeds(scenario, &mut k6, LIMIT).await;
    let summary = k6.stdout_text();
    assert!(summary.contains("THRESHOLDS") && summary.contains("midspan_failed_initiations"), "{summary}");
    // Each stream was closed by its service, and nothing else ended one.
    let metrics = relay.metrics().await;
    let count = |reason| metrics.count("midspan_edge_stream_ends_total", &[("reason", reason)]);
    let counted = summary.lines().find(|line| line.trim().starts_with("midspan_streams.")).unwrap();
    let streams = counted.split_whitespace().nth(1).unwrap();
    assert_eq!(count("service_closed").to_string(), streams, "{summary}");
    relay.assert_quiet().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_key_of_the_service_fails_the_run() {
    let Some((relay, wrong)) = with_wrong_keys().await else { return };
    let service = wrong.path().join("service.connection");
    fails(&relay, &service, &relay.path("group.key"), "midspan_failed_initiations").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_key_of_the_devices_fails_the_run() {
    let Some((relay, wrong)) = with_wrong_keys().await else { return };
    let group = wrong.path().join("group.key");
    fails(&relay, &relay.path("service.connection"), &group, "midspan_refused_links").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_is_cut_before_the_grace_fails_the_run() {
    if tools::k6().is_none() {
        return;
    }
    let relay = Relay::with(&["--drain-grace", "100ms"]).await;
    let (service, group) = (relay.path("service.connection"), relay.path("group.key"));
    let mut k6 = run("rolling", &relay, &service, &group);
    while k6.is_running() && relay.metrics().await.count("midspan_edge_streams", &[("state", "joined")]) == 0
    {
        sleep(Duration::from_millis(50)).await;
    }
    relay.process().terminate();
    assert_fails(&mut k6, "midspan_cut_streams").await;
}

/// A relay, and keys of another one.
async fn with_wrong_keys() -> Option<(Relay, tempfile::TempDir)> {
    tools::k6()?;
    let relay = Relay::start().await;
    let folder = tempfile::tempdir().unwrap();
    let other = "T3RoZXIga2V5LCBhbmQgYSB3cm9uZyBvbmUgYXMgd2VsbA==";
    let service = std::fs::read_to_string(relay.path("service.connection")).unwrap();
    let (rest, _) = service.split_once("SharedAccessKey=").unwrap();
    std::fs::write(folder.path().join("service.connection"), format!("{rest}SharedAccessKey={other}"))
        .unwrap();
    std::fs::write(folder.path().join("group.key"), other).unwrap();
    Some((relay, folder))
}

async fn fails(relay: &Relay, service: &Path, group: &Path, threshold: &str) {
    assert_fails(&mut run("setup-rate", relay, service, group), threshold).await;
}

async fn assert_fails(k6: &mut Process, threshold: &str) {
    let ended = timeout(LIMIT, async {
        while k6.is_running() {
            sleep(Duration::from_millis(20)).await;
        }
    });
    assert!(ended.await.is_ok(), "not within {LIMIT:?}: {}", k6.stderr());
    let status = k6.wait_exit().await;
    let crossed = k6.stderr();
    assert!(!status.success(), "{}", k6.stdout_text());
    assert!(crossed.contains("thresholds on metrics") && crossed.contains(threshold), "{crossed}");
}

fn run(scenario: &str, relay: &Relay, service: &Path, group: &Path) -> Process {
    let mut command = command(&[scenario]);
    command.env("LOAD_SERVICE_FILE", service).env("LOAD_GROUP_KEY_FILE", group);
    command.env("LOAD_CA", relay.path("ca.pem"));
    command.envs([
        ("LOAD_DURATION", "3s"),
        ("LOAD_STREAMS", "20"),
        ("LOAD_RATE", "10"),
        ("LOAD_SETTLE", "1s"),
    ]);
    // A machine that is busy with tests has no figures to be held to.
    command.envs([("LOAD_HANDSHAKE_MS", "10000"), ("LOAD_ECHO_MS", "10000")]);
    Process::spawn(command)
}

/// `scripts/load` with arguments, and with nothing of this environment that it would take for a setting.
pub(crate) fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(tools::repository().join("scripts/load"));
    command.env_clear().args(arguments);
    command.envs(std::env::var_os("PATH").map(|path| ("PATH", path)));
    command
}
