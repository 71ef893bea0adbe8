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
    section_is("protocol.md", "problems", &table);
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
    section_is("protocol.md", "closes", &table);
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

#[test]
fn the_table_of_settings_is_the_programs() {
    let output = binary("midspand").arg("settings").output().unwrap();
    assert!(output.status.success());
    section_is("operations.md", "settings", &String::from_utf8(output.stdout).unwrap());
}

#[tokio::test]
async fn the_table_of_metrics_is_the_programs() {
    let relay = Relay::start().await;
    let text = relay.admin("/metrics").await.expect(200).text();
    let mut rows = std::collections::BTreeMap::<String, (String, String)>::new();
    for line in text.lines() {
        if let Some((name, help)) = line.strip_prefix("# HELP ").and_then(|rest| rest.split_once(' ')) {
            rows.entry(name.to_owned()).or_default().1 = help.to_owned();
        }
        if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' ')) {
            rows.entry(name.to_owned()).or_default().0 = kind.to_owned();
        }
    }
    let mut table = "| metric | type | meaning |\n|---|---|---|\n".to_owned();
    for (name, (kind, help)) in rows {
        writeln!(table, "| `{name}` | {kind} | {help} |").unwrap();
    }
    section_is("operations.md", "metrics", &table);
}

#[test]
fn every_link_between_documents_leads_somewhere() {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..");
    let folders = [root.clone(), root.join("docs"), root.join("deploy")];
    let mut links = 0;
    for folder in folders {
        for entry in fs::read_dir(&folder).unwrap() {
            let file = entry.unwrap().path();
            if file.extension().is_none_or(|extension| extension != "md") {
                continue;
            }
            let text = fs::read_to_string(&file).unwrap();
            let targets = text.split("](").skip(1).filter_map(|rest| rest.split([')', '#']).next());
            for target in targets.filter(|target| !target.is_empty() && !target.contains("://")) {
                links += 1;
                assert!(folder.join(target).exists(), "{}: {target} does not exist", file.display());
            }
        }
    }
    assert!(links > 5, "only {links} links were found");
}

/// Compares a generated section with a document. With `UPDATE_DOCS` in the environment, writes it there.
fn section_is(file: &str, name: &str, expected: &str) {
    // Two sections of one file: one is written after the other.
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let (begin, end) = (format!("<!-- {name}:begin -->\n"), format!("<!-- {name}:end -->"));
    let text = document(file);
    let start = text.find(&begin).unwrap_or_else(|| panic!("no {begin}")) + begin.len();
    let length = text[start..].find(&end).unwrap_or_else(|| panic!("no {end}"));
    if &text[start..start + length] == expected {
        return;
    }
    assert!(
        std::env::var_os("UPDATE_DOCS").is_some(),
        "the section {name} of docs/{file} is out of date; run this test with UPDATE_DOCS=1"
    );
    let new = [&text[..start], expected, &text[start + length..]].concat();
    fs::write(path(file), new).unwrap();
}

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

fn document(name: &str) -> String {
    fs::read_to_string(path(name)).unwrap_or_else(|error| panic!("docs/{name}: {error}"))
}

fn path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../docs").join(name)
}
