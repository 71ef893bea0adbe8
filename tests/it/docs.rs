//! The documents say what the programs do.

use std::{
    fmt::Write as _,
    fs,
    path::PathBuf,
    sync::{Mutex, PoisonError},
};

use midspan_core::{close::CloseReason, problem::ProblemKind};
use serde_json::Value;
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
fn the_table_of_sizes_is_of_the_measured_costs() {
    const LINKS: f64 = 1e6;
    const STREAMS: f64 = 1e5;
    const LIFE: f64 = 600.0;
    // The defaults of --limit-device-links and --max-streams, and what a stream costs the store in its life.
    const OF_REPLICA: f64 = 15_000.0;
    const OF_EDGE: f64 = 8_000.0;
    const TRIPS: f64 = 5.0;
    // What all replicas share.
    const SWEEP: f64 = 129.0;
    const GIGABIT: f64 = 1e9 / 8.0 / (1 << 30) as f64;

    let results = path("../benches/results/scale.json");
    let scale: Value = serde_json::from_str(&fs::read_to_string(results).unwrap()).unwrap();
    let link = |name: &str| scale["links"][name].as_f64().unwrap();
    let median = |series: &Value, variant: &str, figure: &str| {
        let series = series.as_array().unwrap().iter().find(|series| series["variant"] == variant).unwrap();
        let mut all: Vec<_> =
            series["rounds"].as_array().unwrap().iter().map(|one| one[figure].as_f64().unwrap()).collect();
        all.sort_by(f64::total_cmp);
        all[all.len() / 2]
    };
    let opened = |variant: &str| median(&scale["setup"], variant, "open");
    let moved = |variant: &str| median(&scale["relay"][0]["series"], variant, "relay_cpu");
    let (replicas, edges, new) = ((LINKS / OF_REPLICA).ceil(), (STREAMS / OF_EDGE).ceil(), STREAMS / LIFE);
    let ways = [
        ("one edge", "midspan-tls"),
        ("four, straight", "edges4-straight"),
        ("four, passed on", "edges4-passed"),
        ("four, forwarded", "edges4-forwarded"),
    ];
    let each = |what: &dyn Fn(&str) -> f64| {
        ways.map(|(name, variant)| format!("{name} {:.2}", what(variant))).join("; ")
    };

    let mut table = "| what | from | comes to |\n|---|---|---|\n".to_owned();
    let mut row = |what: &str, from: String, comes_to: String| {
        writeln!(table, "| {what} | {from} | {comes_to} |").unwrap();
    };
    row("control replicas", "15,000 links each".into(), format!("{replicas}"));
    row(
        "memory of a full one",
        format!("{:.1} KiB a link", link("user")),
        format!("{:.0} MiB", link("user") * OF_REPLICA / 1024.0),
    );
    row(
        "its CPU at rest",
        format!("{:.0} us a link and minute", link("idle")),
        format!("{:.2} cores", link("idle") * OF_REPLICA / 60e6),
    );
    row(
        "taking over the links of one that is lost",
        format!("{:.0} us a link", link("open")),
        format!("{:.1} s of CPU, spread over the others", link("open") * OF_REPLICA / 1e6),
    );
    row("edges", "8,000 streams each".into(), format!("{edges}"));
    row("new streams", "one in ten minutes for each that stands".into(), format!("{new:.0} a second"));
    row(
        "all edges' CPU for them, in cores",
        "opening one, both legs".into(),
        each(&|variant| opened(variant) * new / 1e6),
    );
    row(
        "all edges' CPU for each Gbit/s of payload, in cores",
        "16 KiB messages".into(),
        each(&|variant| moved(variant) * GIGABIT),
    );
    row(
        "all replicas' CPU for new streams",
        format!("{:.0} us a request", link("handshake")),
        format!("{:.2} cores", link("handshake") * new / 1e6),
    );
    row(
        "the store's memory",
        format!("{:.2} KiB a link, {:.2} KiB a stream", link("store"), link("handshake_memory")),
        format!("{:.1} GiB", (link("store") * LINKS + link("handshake_memory") * STREAMS) / 1024.0 / 1024.0),
    );
    row(
        "round trips to the store",
        format!("5 a stream, {:.0} a replica and second, the sweep", link("idle_trips") - SWEEP),
        format!("{:.0} a second", TRIPS * new + replicas * (link("idle_trips") - SWEEP) + SWEEP),
    );
    row(
        "the store's CPU for new streams, until the service has its answer",
        format!("{:.0} us each", link("handshake_store")),
        format!("{:.0} % of a core", link("handshake_store") * new / 1e4),
    );
    row(
        "announcing all links again to a store that lost them: its CPU",
        format!("{:.0} us a link", link("restore_store")),
        format!("{:.0} s", link("restore_store") * LINKS / 1e6),
    );
    section_is("scaling.md", "sizes", &table);
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
