use std::process::Command;

use crate::{Process, Relay, binary, eventually};

/// The command `midspan`.
#[derive(Debug)]
pub struct Midspan;

impl Midspan {
    /// `midspan` with arguments, which trusts the CA of `relay`.
    pub fn command(relay: &Relay, arguments: &[&str]) -> Command {
        let mut command = binary("midspan");
        command.args(arguments).env("MIDSPAN_CA", relay.path("ca.pem"));
        command
    }

    /// `midspan device` for `dev1`, with arguments more; waits until it is connected.
    pub async fn device(relay: &Relay, arguments: &[&str]) -> Process {
        let links = relay.metrics().await.count("midspan_control_device_links", &[]);
        let mut command = Self::command(relay, &["device"]);
        command.env("MIDSPAN_CONNECTION_STRING", relay.connection_string("dev1")).args(arguments);
        let process = Process::spawn(command);
        eventually("the device proxy is connected", || async {
            relay.metrics().await.count("midspan_control_device_links", &[]) > links
        })
        .await;
        process
    }

    /// `midspan` as a service, with arguments.
    pub fn service(relay: &Relay, arguments: &[&str]) -> Process {
        let mut command = Self::command(relay, arguments);
        let connection = relay.service_connection().to_text();
        command.env("MIDSPAN_CONNECTION_STRING", secrecy::ExposeSecret::expose_secret(&connection));
        Process::spawn(command)
    }
}
