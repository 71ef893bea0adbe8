//! Typing errors in `MIDSPAN_*` variables are start-up errors.

use std::collections::BTreeSet;

use anyhow::bail;
use clap::{Command, CommandFactory};

/// Fails when the environment has a `MIDSPAN_*` variable that no flag of `Arguments` reads.
///
/// Those that Kubernetes sets for a Service called midspan are left alone.
pub(crate) fn check<Arguments: CommandFactory>() -> anyhow::Result<()> {
    let mut known = BTreeSet::new();
    collect(&Arguments::command(), &mut known);
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy();
        if is_unknown(&name, &known) {
            bail!("unknown environment variable {name}; known ones stand in `midspand {{role}} --help`");
        }
    }
    Ok(())
}

fn is_unknown(name: &str, known: &BTreeSet<String>) -> bool {
    let Some(rest) = name.strip_prefix("MIDSPAN_") else { return false };
    let of_kubernetes = rest == "PORT"
        || rest.ends_with("_PORT")
        || rest.starts_with("PORT_")
        || rest.contains("_PORT_")
        || rest.starts_with("SERVICE_")
        || rest.contains("SERVICE_HOST")
        || rest.contains("SERVICE_PORT");
    // The client's own variables may stand in the same shell.
    let of_client = matches!(rest, "CONNECTION_STRING" | "CONNECTION_STRING_FILE" | "CA");
    !of_kubernetes && !of_client && !known.contains(name)
}

fn collect(command: &Command, known: &mut BTreeSet<String>) {
    let names = command.get_arguments().filter_map(|argument| argument.get_env());
    known.extend(names.map(|name| name.to_string_lossy().into_owned()));
    for command in command.get_subcommands() {
        collect(command, known);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn typing_errors_are_found_and_kubernetes_is_left_alone() {
        let known = BTreeSet::from(["MIDSPAN_LISTEN".to_owned()]);
        for name in ["MIDSPAN_LISTEM", "MIDSPAN_TICKET_KEYFILE", "MIDSPAN_"] {
            assert!(is_unknown(name, &known), "{name}");
        }
        for name in [
            "MIDSPAN_LISTEN",
            "MIDSPAN_SERVICE_HOST",
            "MIDSPAN_SERVICE_PORT_HTTPS",
            "MIDSPAN_PORT",
            "MIDSPAN_PORT_443_TCP_ADDR",
            "MIDSPAN_EDGE_SERVICE_HOST",
            "MIDSPAN_EDGE_PORT_443_TCP",
            "MIDSPAN_CA",
            "HOME",
        ] {
            assert!(!is_unknown(name, &known), "{name}");
        }
    }
}
