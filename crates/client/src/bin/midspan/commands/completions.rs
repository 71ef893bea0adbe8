//! `midspan completions`: for the shell.

use clap::{Args, CommandFactory as _};
use clap_complete::Shell;

use crate::{exit::Failure, options::Cli, output::print_text};

/// Print the completions of a shell
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Which shell
    #[arg(value_name = "SHELL")]
    shell: Shell,
}

pub(crate) fn run(arguments: &Arguments) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(arguments.shell, &mut Cli::command(), "midspan", &mut script);
    print_text(&String::from_utf8_lossy(&script))
}
