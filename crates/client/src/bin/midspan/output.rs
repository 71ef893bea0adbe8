//! Everything that `midspan` prints.

use std::io::{self, Write as _};

use serde::Serialize;
use tracing_subscriber::EnvFilter;

use crate::{
    exit::Failure,
    options::{Format, Global},
};

/// Prints results to standard output and failures to standard error.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Output {
    format: Format,
}

impl Output {
    pub(crate) fn new(format: Format) -> Self {
        Self { format }
    }

    /// Prints `value` as JSON, or else what `text` makes of it.
    pub(crate) fn print<T: Serialize>(
        self,
        value: &T,
        text: impl FnOnce(&T) -> String,
    ) -> Result<(), Failure> {
        let text = match self.format {
            Format::Text => text(value),
            Format::Json => {
                serde_json::to_string_pretty(value).map_err(|error| Failure::other(error.to_string()))?
            }
        };
        print_text(&text)
    }
}

/// Tells people something that is no result, on standard error.
pub(crate) fn notice(text: &str) {
    // A closed standard error leaves nobody to tell.
    let _ = writeln!(io::stderr(), "{text}");
}

/// Prints a text and a line feed. A reader that has seen enough, such as `head`, is no failure.
pub(crate) fn print_text(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    let line_feed = if text.is_empty() || text.ends_with('\n') { "" } else { "\n" };
    match write!(out, "{text}{line_feed}").and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => Ok(result?),
    }
}

/// Lines up rows below a header, each column as wide as its longest cell.
pub(crate) fn table<const N: usize>(header: [&str; N], rows: &[[String; N]]) -> String {
    let mut widths = header.map(str::len);
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |cells: [&str; N]| {
        let padded: Vec<_> = cells.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        padded.join("  ").trim_end().to_owned()
    };
    let mut lines = vec![line(header)];
    lines.extend(rows.iter().map(|row| line(row.each_ref().map(String::as_str))));
    lines.join("\n")
}

/// Sends log lines to standard error, without colours.
pub(crate) fn log_to_stderr(global: &Global) {
    let filter = match (global.quiet, global.verbose) {
        (true, _) => "warn",
        (false, 0) => "warn,midspan=info,midspan_client=info",
        (false, 1) => "warn,midspan=debug,midspan_client=debug",
        (false, _) => "trace",
    };
    let log = tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::new(filter))
        .with_writer(io::stderr)
        .with_ansi(false)
        .with_target(global.verbose > 0);
    match global.log_format {
        Format::Text => log.init(),
        Format::Json => log.json().flatten_event(true).init(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_line_up() {
        let rows = [["dev1".to_owned(), "yes".to_owned()], ["a-long-name".to_owned(), String::new()]];
        assert_eq!(
            table(["DEVICE", "CONNECTED"], &rows),
            "DEVICE       CONNECTED\ndev1         yes\na-long-name"
        );
    }
}
