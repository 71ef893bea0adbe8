//! The documents say what the programs do.

use std::{
    fmt::Write as _,
    fs,
    path::PathBuf,
    sync::{Mutex, PoisonError},
};

use midspan_core::{close::CloseReason, problem::ProblemKind};
use testkit::{Relay, binary};

#[test]
fn the_table_of_problems_is_the_programs() {
    let mut table = "| name | status | fault | retry | title |\n|---|---|---|---|---|\n".to_owned();
    let ends = CloseReason::ALL.iter().map(|&reason| ProblemKind::from(reason));
    for kind in ProblemKind::OWN.into_iter().chain(ends) {
        let row = kind.row();
        let fault = serde_json::to_value(row.side).unwrap();
        let retry = if row.retry { "yes" } else { "no" };
        let (name, status, title) = (row.name, row.status, row.title);
        writeln!(table, "| `{name}` | {status} | {} | {retry} | {title} |", fault.as_str().unwrap()).unwrap();
    }
    section_is("problems", &table);
}

#[test]
fn the_table_of_ends_is_the_programs() {
    let mut table = "| reason | close code | whose | meaning |\n|---|---|---|---|\n".to_owned();
    for &reason in CloseReason::ALL {
        let row = reason.row();
        let whose = serde_json::to_value(row.side).unwrap();
        writeln!(table, "| `{reason}` | {} | {} | {} |", row.close_code, whose.as_str().unwrap(), row.text)
            .unwrap();
    }
    section_is("closes", &table);
}

#[tokio::test]
async fn every_metric_is_documented() {
    let relay = Relay::start().await;
    // One stream, so that metrics with labels show themselves.
    let mut link = relay.device("dev1").await;
    let stream = relay.join(&mut link).await;
    let operations = document("operations.md");
    let metrics = relay.metrics().await;
    assert!(!metrics.names().is_empty());
    for name in metrics.names() {
        assert!(operations.contains(&format!("`{name}`")), "docs/operations.md does not describe {name}");
    }
    drop(stream);
}

#[tokio::test]
async fn every_documented_metric_exists() {
    let relay = Relay::start().await;
    let (mut link, service) = (relay.device("dev1").await, relay.service());
    // One of everything that is counted.
    let mut stream = relay.join(&mut link).await;
    stream.service.close(1000, "").await;
    stream.device.closed().await;
    service.authorized("Nonsense").get("/v1/endpoints").await.problem(401, "unauthorized");
    let operations = document("operations.md");
    let metrics = relay.metrics().await;
    let documented = operations.split('`').filter(|word| word.starts_with("midspan_"));
    let documented: Vec<_> = documented.filter_map(|word| word.split('{').next()).collect();
    assert!(!documented.is_empty(), "docs/operations.md names no metric");
    for name in documented {
        assert!(metrics.names().contains(&name), "{name} is documented, and does not exist");
    }
}

#[tokio::test]
async fn every_flag_is_documented() {
    let operations = document("operations.md");
    for role in ["dev", "control", "edge"] {
        let output = binary("midspand").args([role, "--help"]).output().unwrap();
        assert!(output.status.success());
        let help = String::from_utf8(output.stdout).unwrap();
        let flags = help.lines().map(str::trim_start).filter(|line| line.starts_with('-'));
        let flags: Vec<_> = flags
            .filter_map(|line| line.split([' ', ',', '=', '[', '<']).find(|word| word.starts_with("--")))
            .filter(|flag| !["--help", "--version"].contains(flag))
            .collect();
        assert!(flags.contains(&"--listen"), "{role} --help names no --listen:\n{help}");
        for flag in flags {
            assert!(
                operations.contains(&format!("`{flag}`")),
                "docs/operations.md does not describe {role} {flag}"
            );
        }
    }
}

/// Compares a generated section with the protocol's document. With `UPDATE_DOCS` in the environment, writes it there.
fn section_is(name: &str, expected: &str) {
    // Two sections of one file: one is written after the other.
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let (begin, end) = (format!("<!-- {name}:begin -->\n"), format!("<!-- {name}:end -->"));
    let text = document("protocol.md");
    let start = text.find(&begin).unwrap_or_else(|| panic!("no {begin}")) + begin.len();
    let length = text[start..].find(&end).unwrap_or_else(|| panic!("no {end}"));
    if &text[start..start + length] == expected {
        return;
    }
    assert!(
        std::env::var_os("UPDATE_DOCS").is_some(),
        "the section {name} of docs/protocol.md is out of date; run this test with UPDATE_DOCS=1"
    );
    let new = [&text[..start], expected, &text[start + length..]].concat();
    fs::write(path("protocol.md"), new).unwrap();
}

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

fn document(name: &str) -> String {
    fs::read_to_string(path(name)).unwrap_or_else(|error| panic!("docs/{name}: {error}"))
}

fn path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../docs").join(name)
}
