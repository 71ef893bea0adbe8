//! `midspan echo`: a sample of both ends, and a check of the whole way.

use std::{fmt::Write as _, time::Duration};

use clap::Args;
use midspan_client::{
    Capabilities, Device, DeviceAddress, DeviceSettings, Handler, Identity, Invitation, Message, Service,
    Stream, StreamError, StreamName, stream_request,
};
use serde::Serialize;
use tokio::time::{Instant, timeout};
use tracing::{info, warn};

use crate::{
    commands::device::serve,
    exit::{Exit, Failure},
    options::Global,
    output::Output,
};

/// Echo messages as a device, or measure the way to a device that does
///
/// With a device's connection string and no DEVICE it accepts streams of the name and echoes until it is stopped. With a
/// service's connection string it opens a stream to DEVICE, sends messages, and checks that each comes back.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The device, or one of its modules, that echoes
    #[arg(value_name = "DEVICE[/MODULE]")]
    device: Option<DeviceAddress>,
    /// The stream name that is echoed
    #[arg(long, value_name = "NAME", default_value = "echo")]
    name: StreamName,
    /// How many messages to send
    #[arg(long, value_name = "COUNT", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    count: u32,
    /// How many bytes a message has
    #[arg(long, value_name = "BYTES", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=16 << 20))]
    size: u32,
}

pub(crate) async fn run(arguments: Arguments, global: &Global, output: Output) -> Result<(), Failure> {
    let connection = global.connection_string()?;
    let options = global.options(&connection)?;
    match (&connection.identity, &arguments.device) {
        (Identity::Device(_), None) => {
            let device = Device::new(connection, options, DeviceSettings::default())?;
            serve(device, Echo { name: arguments.name }).await
        }
        (Identity::Service(_), Some(address)) => {
            let service = Service::new(connection, options)?;
            let report = measure(&service, address, &arguments).await?;
            output.print(&report, Report::text)
        }
        (Identity::Device(own), Some(_)) => Err(Failure::usage(format!(
            "the connection string is that of device {own}: leave DEVICE out to echo, or use a service's connection string"
        ))),
        (Identity::Service(name), None) => Err(Failure::usage(format!(
            "the connection string is that of service {name}: name the DEVICE to send to, or use a device's connection string"
        ))),
    }
}

struct Echo {
    name: StreamName,
}

impl Handler for Echo {
    type Accepted = ();

    async fn decide(&self, invitation: &Invitation) -> Result<(), String> {
        if invitation.name == self.name {
            Ok(())
        } else {
            Err(format!("no such service here: {}", invitation.name))
        }
    }

    async fn serve(&self, (): (), stream: Stream) {
        let id = stream.id();
        match echo(stream).await {
            Ok(messages) => info!(stream = %id, messages, "the stream is over"),
            Err(error) => warn!(stream = %id, "the stream was cut: {error}"),
        }
    }
}

/// Sends every message back. The end of the other direction comes back as the end of this one, and is then the end of both.
async fn echo(mut stream: Stream) -> Result<u64, StreamError> {
    let mut messages = 0;
    while let Some(message) = stream.receive().await? {
        let is_end = stream.half_close() && matches!(&message, Message::Binary(data) if data.is_empty());
        stream.send(message).await?;
        if is_end {
            stream.close("").await;
            break;
        }
        messages += 1;
    }
    Ok(messages)
}

#[derive(Debug, Serialize)]
struct Report {
    device: DeviceAddress,
    stream: String,
    open_ms: f64,
    size: u32,
    round_trips_ms: Vec<f64>,
}

impl Report {
    fn text(&self) -> String {
        let mut text =
            format!("stream {} to {} opened in {:.1} ms\n", self.stream, self.device, self.open_ms);
        for (index, milliseconds) in self.round_trips_ms.iter().enumerate() {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "{} bytes echoed: message {}, {milliseconds:.2} ms", self.size, index + 1);
        }
        text
    }
}

async fn measure(
    service: &Service,
    address: &DeviceAddress,
    arguments: &Arguments,
) -> Result<Report, Failure> {
    let begin = Instant::now();
    let request = stream_request(arguments.name.clone(), Capabilities::none());
    let opened = service.open(address, &request).await;
    let mut stream = opened.map_err(|error| Failure::opening(address, &error))?;
    let mut report = Report {
        device: address.clone(),
        stream: stream.id().to_string(),
        open_ms: milliseconds(begin),
        size: arguments.size,
        round_trips_ms: Vec::new(),
    };
    for number in 0..arguments.count {
        let sent = Message::Binary(payload(arguments.size, number).into());
        let begin = Instant::now();
        let back = async {
            stream.send(sent.clone()).await?;
            stream.receive().await
        };
        let received = match timeout(ECHO_WAIT, back).await {
            Ok(received) => received?,
            Err(_) => {
                let seconds = ECHO_WAIT.as_secs();
                return Err(Failure::other(format!("device {address} did not echo within {seconds} s")));
            }
        };
        match received {
            Some(message) if message == sent => report.round_trips_ms.push(milliseconds(begin)),
            Some(_) => {
                return Err(Failure::other(format!(
                    "message {} came back changed; does device {address} run 'midspan echo'?",
                    number + 1
                )));
            }
            None => {
                return Err(Failure::new(
                    Exit::Cut,
                    format!("device {address} closed the stream after {number} messages"),
                ));
            }
        }
    }
    stream.close("done").await;
    Ok(report)
}

/// Bytes that differ from message to message and along each.
fn payload(size: u32, number: u32) -> Vec<u8> {
    (0..size).map(|index| index.wrapping_mul(31).wrapping_add(number).to_le_bytes()[0]).collect()
}

fn milliseconds(begin: Instant) -> f64 {
    begin.elapsed().as_secs_f64() * 1000.0
}

/// For one message to the device and back.
const ECHO_WAIT: Duration = Duration::from_secs(30);
