//! What a person sees: progress on a terminal, plain lines elsewhere, and the table at the end.

use std::io::{IsTerminal as _, stderr, stdout};

/// Progress and failures, on standard error.
pub(crate) struct Screen {
    progress_in_place: bool,
    color: bool,
}

impl Screen {
    pub(crate) fn new() -> Self {
        let terminal = stderr().is_terminal();
        let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        Self { progress_in_place: terminal, color: terminal && !no_color }
    }

    /// Says what is done next; on a terminal in place of what was done before.
    pub(crate) fn step(&mut self, text: &str) {
        let text = if self.progress_in_place { format!("\r\x1b[K{text} ...") } else { format!("{text}\n") };
        show(stderr(), &text);
    }

    pub(crate) fn end_of_steps(&mut self) {
        if self.progress_in_place {
            show(stderr(), "\r\x1b[K");
        }
    }

    pub(crate) fn failure(&mut self, text: &str) {
        self.end_of_steps();
        let text = if self.color { format!("\x1b[31m{text}\x1b[0m\n") } else { format!("{text}\n") };
        show(stderr(), &text);
    }
}

/// What was measured, how much, and how.
pub(crate) fn print_table(rows: &[[String; 3]]) {
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let (what, value) = (width(0), width(1));
    for [left, middle, right] in rows {
        print_line(&format!("  {left:<what$}  {middle:>value$}  {right}"));
    }
}

pub(crate) fn print_line(text: &str) {
    show(stdout(), &format!("{text}\n"));
}

fn show(mut to: impl std::io::Write, text: &str) {
    // There is nobody to tell when the terminal is gone.
    let _ = to.write_all(text.as_bytes()).and_then(|()| to.flush());
}
