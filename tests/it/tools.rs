//! Programs that are not the project's own, and what the tests do without them.

use std::{
    io::Write as _,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use testkit::Process;

/// Where a program is, or `None`, and then the test is to be skipped. `make test` installs what can be installed.
pub(crate) fn program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let more = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    let found = std::env::split_paths(&path).chain(more).map(|folder| folder.join(name));
    found.into_iter().find(|path| path.is_file()).or_else(|| skip(name))
}

/// A file that comes with a program, or `None` as above.
pub(crate) fn file(path: &str) -> Option<PathBuf> {
    Some(PathBuf::from(path)).filter(|path| path.is_file()).or_else(|| skip(path))
}

/// The Python that has the packages of `scripts/python-tools.txt`.
pub(crate) fn python() -> Option<PathBuf> {
    let path = repository().join("target/tools/venv/bin/python");
    let has_packages = |path: &PathBuf| {
        let import = Command::new(path).args(["-c", "import websockets"]).output();
        import.is_ok_and(|output| output.status.success())
    };
    Some(path).filter(has_packages).or_else(|| skip("Python with the package websockets"))
}

/// The load generator of `benches/k6`.
pub(crate) fn k6() -> Option<PathBuf> {
    Some(repository().join("target/tools/venv/bin/k6")).filter(|path| path.is_file()).or_else(|| skip("k6"))
}

/// The root of the repository.
pub(crate) fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

/// Waits until a process ends, which may take longer than most things, and fails the test when it did not succeed.
pub(crate) async fn succeeds(what: &str, process: &mut Process, limit: Duration) {
    let ended = tokio::time::timeout(limit, async {
        while process.is_running() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    assert!(ended.await.is_ok(), "{what}: not within {limit:?}; it said:\n{}", process.stderr());
    let status = process.wait_exit().await;
    assert!(status.success(), "{what}: {status}\n{}{}", process.stdout_text(), process.stderr());
}

fn skip<T>(what: &str) -> Option<T> {
    assert!(
        std::env::var_os("CI").is_none_or(|ci| ci != "true"),
        "there is no {what}; scripts/test-tools installs it"
    );
    // Past the harness, which keeps what a passing test prints to itself.
    let _ = writeln!(std::io::stderr(), "skipped: a test that needs {what}; scripts/test-tools installs it");
    None
}
