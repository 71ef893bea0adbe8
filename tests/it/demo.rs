//! The demonstration: it succeeds, and it can fail.

use std::{
    fs,
    path::Path,
    process::{Command, Output},
    time::{Duration, Instant},
};

use testkit::Process;

/// `--break key` waits for a device that never comes; the others move 128 MiB.
const LIMIT: Duration = Duration::from_secs(60);

#[test]
fn the_demonstration_succeeds() {
    let output = demo(&[]);
    let text = text(&output);
    assert_eq!(output.status.code(), Some(0), "{text}");
    for row in ["handshake", "round trip", "upload", "download", "SHA-256 equal"] {
        assert!(text.contains(row), "no {row} in:\n{text}");
    }
    assert!(text.contains("upload yes, download yes") && text.contains("nothing is left running"), "{text}");
    // No control characters where there is no terminal.
    assert!(!text.contains(['\x1b', '\r']), "{text:?}");
}

#[test]
fn a_wrong_key_makes_the_demonstration_fail() {
    let output = demo(&["--break", "key"]);
    let text = text(&output);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("the demonstration failed: the device"), "{text}");
}

#[test]
fn a_changed_byte_makes_the_demonstration_fail() {
    let output = demo(&["--break", "byte"]);
    let text = text(&output);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("the demonstration failed: the file came back changed"), "{text}");
    assert!(text.contains("upload NO, download NO"), "{text}");
}

#[tokio::test]
async fn a_stopped_demonstration_leaves_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    let mut demo = Process::spawn(command(folder.path()));
    demo.stderr_has("measuring").await;
    demo.terminate();
    assert_eq!(demo.wait_exit().await.code(), Some(1));
    assert!(demo.stderr().contains("the demonstration failed: it was stopped"), "{}", demo.stderr());
    assert_nothing_is_left(folder.path());
}

#[test]
fn what_the_demonstration_does_not_know_is_refused() {
    assert_eq!(demo(&["--break", "everything"]).status.code(), Some(64));
}

#[expect(clippy::disallowed_methods, reason = "the time that a program takes is measured by the clock")]
fn demo(arguments: &[&str]) -> Output {
    let folder = tempfile::tempdir().unwrap();
    let started = Instant::now();
    let output = command(folder.path()).args(arguments).output().unwrap();
    assert!(started.elapsed() < LIMIT, "it took {:?}", started.elapsed());
    assert_nothing_is_left(folder.path());
    output
}

/// The demonstration with a folder for what it keeps.
fn command(folder: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_demo"));
    command.env("TMPDIR", folder);
    command
}

/// No file, and no process that was started with one.
fn assert_nothing_is_left(folder: &Path) {
    assert_eq!(fs::read_dir(folder).unwrap().count(), 0, "files are left in {}", folder.display());
    let folder = folder.to_str().unwrap();
    for process in fs::read_dir("/proc").unwrap() {
        // A process may end while it is looked at.
        let arguments = fs::read(process.unwrap().path().join("cmdline")).unwrap_or_default();
        let arguments = String::from_utf8_lossy(&arguments).replace('\0', " ");
        assert!(!arguments.contains(folder), "still running: {arguments}");
    }
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}
