//! One file per command.

mod completions;
mod connect;
mod device;
mod devices;
mod echo;
mod endpoints;
mod man;
mod streams;
mod token;

use clap::Subcommand;
use tokio::signal::unix::{SignalKind, signal};

use crate::{exit::Failure, options::Cli, output::Output};

/// What `midspan` can do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Device(device::Arguments),
    Connect(connect::Arguments),
    Echo(echo::Arguments),
    Devices(devices::Arguments),
    Streams(streams::Arguments),
    Endpoints(endpoints::Arguments),
    Token(token::Arguments),
    Completions(completions::Arguments),
    Man(man::Arguments),
}

pub(crate) async fn run(cli: Cli, output: Output) -> Result<(), Failure> {
    let Cli { global, command } = cli;
    match command {
        Command::Device(arguments) => device::run(arguments, &global).await,
        Command::Connect(arguments) => connect::run(arguments, &global).await,
        Command::Echo(arguments) => echo::run(arguments, &global, output).await,
        Command::Devices(arguments) => devices::run(arguments, &global, output).await,
        Command::Streams(arguments) => streams::run(arguments, &global, output).await,
        Command::Endpoints(arguments) => endpoints::run(arguments, &global, output).await,
        Command::Token(arguments) => token::run(&arguments, &global),
        Command::Completions(arguments) => completions::run(&arguments),
        Command::Man(arguments) => man::run(&arguments),
    }
}

/// Waits for the order to stop: SIGTERM from systemd, SIGINT from a terminal.
async fn stop_signal() -> Result<(), Failure> {
    let fail = |error| Failure::other(format!("cannot listen for signals: {error}"));
    let mut terminate = signal(SignalKind::terminate()).map_err(fail)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(fail)?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}
