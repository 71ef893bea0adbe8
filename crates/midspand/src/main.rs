//! `midspand`, the Midspan server: control plane, streaming edge, or both in one process.

mod development;
mod environment;
mod roles;
mod server;
mod settings;

use std::process::ExitCode;

use clap::{CommandFactory as _, Parser, Subcommand};
use midspan_platform::telemetry;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Midspan: an open, self-hosted relay for device streams
///
/// Every flag has a twin in the environment, named in brackets below; a flag beats the environment. Logs go to standard
/// error. SIGTERM and SIGINT drain the process; a second one stops it at once.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 110)]
struct Arguments {
    #[command(subcommand)]
    role: Role,
}

#[derive(Debug, Subcommand)]
enum Role {
    /// Both roles in one process, with the memory store and a development CA of its own
    Dev(Box<roles::dev::DevArguments>),
    /// The control plane: API for services, links of devices
    Control(Box<roles::control::ControlArguments>),
    /// The streaming edge: joins the legs of streams
    Edge(Box<roles::edge::EdgeArguments>),
    /// Print the table of all settings, in Markdown, as it stands in docs/operations.md
    #[command(hide = true)]
    Settings,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            report(&error);
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> anyhow::Result<()> {
    environment::check::<Arguments>()?;
    let log = match &arguments.role {
        Role::Dev(dev) => &dev.log,
        Role::Control(control) => &control.log,
        Role::Edge(edge) => &edge.log,
        Role::Settings => return settings::print(&Arguments::command()),
    };
    telemetry::start(log)?;
    // A huge page counts whole as soon as one of its bytes is used, which would make many small streams look fat. Where
    // the kernel refuses, memory is only less tight.
    let _ = rustix::thread::disable_transparent_huge_pages(true);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let served = runtime.block_on(async {
        match arguments.role {
            Role::Dev(dev) => roles::dev::run(*dev).await,
            Role::Control(control) => roles::control::run(*control).await,
            Role::Edge(edge) => roles::edge::run(*edge).await,
            Role::Settings => Ok(()),
        }
    });
    // A thread that is stuck in a system call must not keep a stopped process alive.
    runtime.shutdown_timeout(std::time::Duration::from_millis(500));
    served
}

#[expect(clippy::print_stderr, reason = "the one message of a process that could not start or went down")]
fn report(error: &anyhow::Error) {
    eprintln!("midspand: {error:#}");
}
