//! A device and a service in plain Python, written from the protocol's document alone, against the relay and against our own.

use std::{path::PathBuf, process::Command, time::Duration};

use testkit::{Midspan, Process, Relay, eventually};

use crate::tools;

const LIMIT: Duration = Duration::from_secs(60);

#[tokio::test(flavor = "multi_thread")]
async fn a_python_service_streams_with_a_python_device() {
    let Some(python) = tools::python() else { return };
    let relay = Relay::start().await;
    let device = python_device(&python, &relay).await;
    python_service(&python, &relay).await;
    assert!(!device.stdout_text().contains("broke"), "{}", device.stdout_text());
    relay.assert_quiet().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn midspan_streams_with_a_python_device() {
    let Some(python) = tools::python() else { return };
    let relay = Relay::start().await;
    let _device = python_device(&python, &relay).await;
    let mut service = Midspan::service(&relay, &["echo", "dev1"]);
    service.close_stdin();
    tools::succeeds("midspan echo dev1", &mut service, LIMIT).await;
    relay.assert_quiet().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_python_service_streams_with_midspan() {
    let Some(python) = tools::python() else { return };
    let relay = Relay::start().await;
    let mut command = Midspan::command(&relay, &["echo"]);
    command.env("MIDSPAN_CONNECTION_STRING", relay.connection_string("dev1"));
    let _device = Process::spawn(command);
    relay.counts("midspan_control_device_links", &[], 1).await;
    python_service(&python, &relay).await;
    relay.assert_quiet().await;
}

#[test]
fn the_python_clients_are_short() {
    for name in ["device.py", "service.py"] {
        let text = std::fs::read_to_string(tools::repository().join("tests/python").join(name)).unwrap();
        assert!(text.lines().count() < 100, "{name}: {} lines", text.lines().count());
    }
}

async fn python_device(python: &PathBuf, relay: &Relay) -> Process {
    let device = Process::spawn(script(python, "device.py", relay, "dev1.connection", &[]));
    let connected = || async { device.stdout_text().contains("connected\n") };
    eventually("the Python device is connected", connected).await;
    device
}

async fn python_service(python: &PathBuf, relay: &Relay) {
    let mut service = Process::spawn(script(python, "service.py", relay, "service.connection", &["dev1"]));
    tools::succeeds("service.py", &mut service, LIMIT).await;
    let said = service.stdout_text();
    for part in ["rejected as it should be: ", "all came back", "half-close: all that"] {
        assert!(said.contains(part), "no {part:?} in:\n{said}");
    }
}

fn script(python: &PathBuf, name: &str, relay: &Relay, connection: &str, more: &[&str]) -> Command {
    let mut command = Command::new(python);
    command.env_clear().arg(tools::repository().join("tests/python").join(name));
    command.arg(relay.path(connection)).arg(relay.path("ca.pem")).args(more);
    command
}
