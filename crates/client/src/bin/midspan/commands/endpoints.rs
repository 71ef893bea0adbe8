//! `midspan endpoints`: where streams go.

use clap::Args;

use crate::{exit::Failure, options::Global, output::Output};

/// List the public base URLs of the streaming edge
#[derive(Debug, Args)]
pub(crate) struct Arguments {}

pub(crate) async fn run(_: Arguments, global: &Global, output: Output) -> Result<(), Failure> {
    let endpoints = global.service()?.endpoints().await?.streaming_endpoints;
    output.print(&endpoints, |endpoints| endpoints.join("\n"))
}
