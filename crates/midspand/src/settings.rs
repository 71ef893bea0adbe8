//! The table of settings in `docs/operations.md`, out of the flags themselves.

use std::{collections::BTreeSet, io::Write as _};

use clap::{Arg, Command};

const ROLES: [&str; 3] = ["dev", "control", "edge"];

/// Writes the table to standard output.
pub(crate) fn print(command: &Command) -> anyhow::Result<()> {
    let mut output = std::io::stdout().lock();
    writeln!(output, "| flag | environment | default | roles | meaning |\n|---|---|---|---|---|")?;
    let mut seen = BTreeSet::new();
    for role in ROLES {
        for flag in flags(command, role) {
            let Some(name) = flag.get_long().filter(|name| seen.insert((*name).to_owned())) else { continue };
            let of_roles: Vec<_> = ROLES
                .into_iter()
                .filter_map(|role| {
                    Some((role, flags(command, role).find(|flag| flag.get_long() == Some(name))?))
                })
                .collect();
            let environment =
                flag.get_env().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            let roles: Vec<_> = of_roles.iter().map(|(role, _)| *role).collect();
            let roles = if roles.len() == ROLES.len() { "all".to_owned() } else { roles.join(", ") };
            let meaning = flag.get_help().map(ToString::to_string).unwrap_or_default();
            let default = default(&of_roles);
            writeln!(output, "| `--{name}` | `{environment}` | {default} | {roles} | {meaning} |")?;
        }
    }
    Ok(())
}

fn flags<'a>(command: &'a Command, role: &str) -> impl Iterator<Item = &'a Arg> {
    command
        .find_subcommand(role)
        .into_iter()
        .flat_map(Command::get_arguments)
        .filter(|flag| flag.get_env().is_some())
}

/// One default, or one for each role where they differ.
fn default(of_roles: &[(&str, &Arg)]) -> String {
    let value = |flag: &Arg| match flag.get_id().as_str() {
        // Depends on who asks.
        "data_dir" => "`~/.local/share/midspan/dev`".to_owned(),
        _ => match flag.get_default_values() {
            _ if !flag.get_action().takes_values() => String::new(),
            [] => String::new(),
            [value, ..] => format!("`{}`", value.to_string_lossy()),
        },
    };
    let values: Vec<_> = of_roles.iter().map(|(role, flag)| (*role, value(flag))).collect();
    match values.as_slice() {
        [(_, first), rest @ ..] if rest.iter().all(|(_, value)| value == first) => first.clone(),
        _ => values.iter().map(|(role, value)| format!("{role}: {value}")).collect::<Vec<_>>().join(", "),
    }
}
