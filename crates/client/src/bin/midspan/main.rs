//! The command `midspan`: both local proxies, an echo sample, and what the relay's API offers.

mod allow;
mod commands;
mod exit;
mod options;
mod output;

use std::process::ExitCode;

use clap::Parser as _;

use crate::{
    exit::{Exit, Failure},
    options::Cli,
    output::Output,
};

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // A closed standard error leaves nobody to tell.
            let _ = error.print();
            return if error.use_stderr() { Exit::Usage.into() } else { Exit::Ok.into() };
        }
    };
    let output = Output::new(cli.global.output);
    match start(cli, output) {
        Ok(()) => Exit::Ok.into(),
        Err(failure) => {
            output::notice(&format!("midspan: {}", failure.message));
            failure.exit.into()
        }
    }
}

fn start(cli: Cli, output: Output) -> Result<(), Failure> {
    output::log_to_stderr(&cli.global);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::other(format!("cannot start: {error}")))?;
    let result = runtime.block_on(commands::run(cli, output));
    // A read of standard input cannot be cancelled, and must not keep the process.
    runtime.shutdown_background();
    result
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_flag_and_exit_code_is_documented() {
        let document = include_str!("../../../../../docs/cli.md");
        let mut missing = Vec::new();
        let mut root = Cli::command();
        root.build();
        let commands = root.get_subcommands().filter(|command| command.get_name() != "help");
        for command in commands.chain([&root]) {
            let title = format!("`midspan {}", command.get_name());
            if command.get_name() != "midspan" && !document.contains(&title) {
                missing.push(title);
            }
            for argument in command.get_arguments().filter_map(clap::Arg::get_long) {
                let flag = format!("--{argument}");
                if !document.contains(&flag) {
                    missing.push(flag);
                }
            }
        }
        for exit in Exit::ALL {
            let row = format!("| {} | {} |", exit.code(), exit.meaning());
            if !document.contains(&row) {
                missing.push(row);
            }
        }
        assert!(missing.is_empty(), "docs/cli.md lacks {missing:#?}");
    }
}
