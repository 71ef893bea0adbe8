//! `midspan streams`: which streams there are, and ending one.

use clap::Args;
use midspan_client::{StreamId, StreamRecord, StreamState};

use crate::{
    exit::Failure,
    options::Global,
    output::{Output, table},
};

/// List the streams that are not over, show one, or end one
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Show only this stream, also for some minutes after its end
    #[arg(value_name = "STREAM")]
    stream: Option<StreamId>,
    /// End this stream
    #[arg(long, value_name = "STREAM", conflicts_with = "stream")]
    end: Option<StreamId>,
}

pub(crate) async fn run(arguments: Arguments, global: &Global, output: Output) -> Result<(), Failure> {
    let service = global.service()?;
    match (arguments.stream, arguments.end) {
        (_, Some(stream)) => {
            service.end(stream).await?;
            let ended = serde_json::json!({ "stream": stream, "ended": true });
            output.print(&ended, |_| format!("ended {stream}"))
        }
        (Some(stream), None) => {
            let record = service.stream(stream).await?;
            output.print(&record, |record| text(std::slice::from_ref(record)))
        }
        (None, None) => output.print(&service.streams().await?, |streams| text(streams)),
    }
}

fn text(streams: &[StreamRecord]) -> String {
    let rows: Vec<_> = streams
        .iter()
        .map(|stream| {
            [
                stream.stream.to_string(),
                stream.address.to_string(),
                stream.name.to_string(),
                stream.credential.clone(),
                stream.created.to_string(),
                state(&stream.state),
            ]
        })
        .collect();
    table(["STREAM", "DEVICE", "NAME", "CREDENTIAL", "CREATED", "STATE"], &rows)
}

fn state(state: &StreamState) -> String {
    match state {
        StreamState::Requested => "requested".to_owned(),
        StreamState::Accepted => "accepted".to_owned(),
        StreamState::Joined { joined } => format!("joined {joined}"),
        StreamState::Ended(end) => format!(
            "ended {}: {}, {} bytes to the device, {} bytes to the service",
            end.ended, end.reason, end.bytes_to_device, end.bytes_to_service
        ),
    }
}
