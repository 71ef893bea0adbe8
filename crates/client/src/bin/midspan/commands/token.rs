//! `midspan token`: a shared access signature for other programs.

use std::time::Duration;

use clap::Args;
use midspan_client::{Clock as _, DeviceAddress, Identity, SystemClock};
use midspan_core::sas::SasToken;
use secrecy::ExposeSecret as _;

use crate::{
    exit::Failure,
    options::{Global, seconds},
    output::print_text,
};

/// Print a shared access signature, for the `Authorization` header of other programs
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Narrow a service's signature to this device, or this module of one
    #[arg(long = "for", value_name = "DEVICE[/MODULE]")]
    device: Option<DeviceAddress>,
    /// How long it is good for
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = seconds)]
    ttl: Duration,
}

pub(crate) fn run(arguments: &Arguments, global: &Global) -> Result<(), Failure> {
    let connection = global.connection_string()?;
    let expires = SystemClock.unix_now().plus(arguments.ttl);
    let token = match (&connection.identity, &arguments.device) {
        (_, None) => connection.sign(expires),
        (Identity::Service(policy), Some(device)) => {
            let resource = format!("{}/{}", connection.host, device.audience());
            SasToken::sign(&resource, &connection.key, expires, Some(policy))
        }
        (Identity::Device(own), Some(_)) => {
            return Err(Failure::usage(format!(
                "the connection string is that of device {own}, whose signature is for itself only; leave --for out"
            )));
        }
    };
    print_text(token.expose_secret())
}
