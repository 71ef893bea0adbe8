//! `midspan man`: the manual page.

use clap::{Args, CommandFactory as _};

use crate::{exit::Failure, options::Cli, output::print_text};

/// Print the manual page of midspan, or of one of its commands, in roff
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The command whose page it is
    #[arg(value_name = "COMMAND")]
    command: Option<String>,
}

pub(crate) fn run(arguments: &Arguments) -> Result<(), Failure> {
    let mut root = Cli::command();
    root.build();
    let command = match &arguments.command {
        None => root,
        Some(name) => root
            .find_subcommand(name)
            .cloned()
            .ok_or_else(|| Failure::usage(format!("there is no command {name}; see midspan --help")))?,
    };
    let mut page = Vec::new();
    clap_mangen::Man::new(command).render(&mut page)?;
    print_text(&String::from_utf8_lossy(&page))
}
