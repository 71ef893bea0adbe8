//! Small honest relays, to compare Midspan's data path with. Each runs on one thread, prints `listening on {address}`
//! and serves until it is killed.

mod fastwebsockets;
mod pairing;
mod tcp;
mod tungstenite;

use std::{net::SocketAddr, path::PathBuf, process::ExitCode};

use anyhow::Context as _;
use clap::{Args, Parser, Subcommand};
use tokio::net::TcpListener;

#[derive(Debug, Parser)]
#[command(version, about = "Small relays to compare with")]
struct Arguments {
    #[command(subcommand)]
    relay: Relay,
}

#[derive(Debug, Subcommand)]
enum Relay {
    /// TCP: splice(2) through a pipe
    TcpSplice(TcpArguments),
    /// TCP: read and write with one buffer of 1 MiB for the thread
    TcpCopy(TcpArguments),
    /// TCP: tokio's `copy_bidirectional` with its buffers of 8 KiB
    TcpBidirectional(TcpArguments),
    /// WebSocket: tokio-tungstenite, message by message
    Tungstenite(tungstenite::Arguments),
    /// WebSocket: fastwebsockets, frame by frame
    Fastwebsockets(fastwebsockets::Arguments),
}

#[derive(Debug, Args)]
struct TcpArguments {
    /// Where each accepted connection leads
    #[arg(long)]
    to: SocketAddr,
}

/// A certificate, for those that can do TLS.
#[derive(Debug, Args)]
struct TlsArguments {
    /// Certificate (PEM)
    #[arg(long, requires = "tls_key")]
    tls_certificate: Option<PathBuf>,
    /// Its key (PEM)
    #[arg(long, requires = "tls_certificate")]
    tls_key: Option<PathBuf>,
}

fn main() -> ExitCode {
    match serve(Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            report(&error);
            ExitCode::FAILURE
        }
    }
}

fn serve(arguments: Arguments) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    raise_open_files()?;
    runtime.block_on(async {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.context("cannot listen")?;
        announce(listener.local_addr()?);
        match arguments.relay {
            Relay::TcpSplice(to) => tcp::serve(listener, to.to, tcp::Copy::Splice).await,
            Relay::TcpCopy(to) => tcp::serve(listener, to.to, tcp::Copy::Scratch).await,
            Relay::TcpBidirectional(to) => tcp::serve(listener, to.to, tcp::Copy::Bidirectional).await,
            Relay::Tungstenite(arguments) => tungstenite::serve(listener, arguments).await,
            Relay::Fastwebsockets(arguments) => fastwebsockets::serve(listener, arguments).await,
        }
    })
}

fn raise_open_files() -> anyhow::Result<()> {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit).context("cannot raise the limit on open files")
}

#[expect(clippy::print_stdout, reason = "how the load generator learns the port")]
fn announce(address: SocketAddr) {
    println!("listening on {address}");
}

#[expect(clippy::print_stderr, reason = "the one message of a relay that could not start")]
fn report(error: &anyhow::Error) {
    eprintln!("peer: {error:#}");
}
