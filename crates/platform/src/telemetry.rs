//! Logs: JSON or text, on standard error.

use anyhow::Context as _;
use clap::{Args, ValueEnum};
use tracing_subscriber::EnvFilter;

/// How logs look.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Logs")]
pub struct LogSettings {
    /// How much is logged: error, warn, info, debug, trace, or a filter such as `info,midspan_edge=debug`
    #[arg(long, env = "MIDSPAN_LOG_LEVEL", default_value = "info")]
    pub log_level: String,
    /// The form of the log on standard error
    #[arg(long, env = "MIDSPAN_LOG_FORMAT", default_value = "text")]
    pub log_format: LogFormat,
}

/// The form of a log line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// For machines: one object a line.
    Json,
}

/// Starts logging. To be called once in a process.
pub fn start(settings: &LogSettings) -> anyhow::Result<()> {
    let level = &settings.log_level;
    // At `debug` and below, HTTP/2 would say a line for every frame. Of Kubernetes, `platform::kubernetes` says what there is
    // to say: its client warns of each single failure, with what the server sent. Who wants that asks for it by name.
    let quiet = if level.contains('=') { "" } else { "h2=info," };
    let filter = format!("{quiet}kube_client=off,kube_runtime=off,{level}");
    let filter =
        EnvFilter::try_new(filter).with_context(|| format!("--log-level {level}: not a log filter"))?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let started = match settings.log_format {
        LogFormat::Json => {
            builder.json().flatten_event(true).with_current_span(false).with_span_list(true).try_init()
        }
        LogFormat::Text => {
            let colours = std::io::IsTerminal::is_terminal(&std::io::stderr())
                && std::env::var_os("NO_COLOR").is_none();
            builder.with_ansi(colours).with_target(false).try_init()
        }
    };
    started.map_err(|error| anyhow::anyhow!("logging cannot be started: {error}"))
}
