//! `midspan devices`: which devices there are.

use clap::Args;
use midspan_client::{DeviceAddress, DeviceStatus};

use crate::{
    exit::Failure,
    options::Global,
    output::{Output, table},
};

/// List the devices that are registered or connected, or show one
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Show only this device, or this module of one
    #[arg(value_name = "DEVICE[/MODULE]")]
    device: Option<DeviceAddress>,
}

pub(crate) async fn run(arguments: Arguments, global: &Global, output: Output) -> Result<(), Failure> {
    let service = global.service()?;
    match arguments.device {
        Some(address) => {
            let status = service.device(&address).await?;
            output.print(&status, |status| text(std::slice::from_ref(status)))
        }
        None => output.print(&service.devices().await?, |devices| text(devices)),
    }
}

fn text(devices: &[DeviceStatus]) -> String {
    let yes = |is: bool| if is { "yes" } else { "no" }.to_owned();
    let rows: Vec<_> = devices
        .iter()
        .map(|device| {
            let since = device.connected_since.map_or_else(|| "-".to_owned(), |since| since.to_string());
            [device.address.to_string(), yes(device.connected), since, yes(device.registered)]
        })
        .collect();
    table(["DEVICE", "CONNECTED", "SINCE", "REGISTERED"], &rows)
}
