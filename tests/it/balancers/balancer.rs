//! A real haproxy or nginx, with the configuration that docs/balancers.md recommends.

use std::{
    fs,
    io::{BufRead as _, BufReader, Write as _},
    net::{SocketAddr, TcpListener},
    process::{Child, Command, Stdio},
    time::Duration,
};

use tempfile::TempDir;
use testkit::{Fleet, Member};
use tokio::{net::TcpStream, time::sleep};

use crate::tools;

/// What stands in front of the relay, and where TLS ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    HaproxyHttp,
    HaproxyTcp,
    NginxHttp,
    NginxTcp,
}

/// A balancer in front of a fleet of two control replicas and two edges. Ends with this.
pub(super) struct Balancer {
    kind: Kind,
    quiet: &'static str,
    address: SocketAddr,
    process: u32,
    guard: Child,
    folder: TempDir,
}

/// How long a connection may be quiet, as the document has it.
pub(super) const DOCUMENTED: &str = "20m";

/// Starts a program, says its process id, and ends it with the end of standard input, which comes with the end of this process at the latest.
const GUARD: &str = r#"log=$1; shift; "$@" >"$log" 2>&1 </dev/null & echo $!; read -r order; exec 2>/dev/null; kill -TERM $!; wait $!"#;

impl Kind {
    /// The program, or `None` where it is not to be had.
    pub(super) fn is_installed(self) -> bool {
        match self {
            Self::HaproxyHttp | Self::HaproxyTcp => tools::program("haproxy").is_some(),
            Self::NginxHttp => tools::program("nginx").is_some(),
            Self::NginxTcp => tools::program("nginx").and_then(|_| tools::file(STREAM_MODULE)).is_some(),
        }
    }

    /// Whether the balancer ends TLS, and routes by paths.
    pub(super) fn ends_tls(self) -> bool {
        matches!(self, Self::HaproxyHttp | Self::NginxHttp)
    }

    fn is_nginx(self) -> bool {
        matches!(self, Self::NginxHttp | Self::NginxTcp)
    }

    fn section(self) -> &'static str {
        match self {
            Self::HaproxyHttp => "haproxy-http",
            Self::HaproxyTcp => "haproxy-tcp",
            Self::NginxHttp => "nginx-http",
            Self::NginxTcp => "nginx-tcp",
        }
    }
}

/// Where Debian has nginx's module for TCP.
const STREAM_MODULE: &str = "/usr/lib/nginx/modules/ngx_stream_module.so";

impl Balancer {
    /// Starts one whose time-out for quiet connections is `quiet`.
    pub(super) async fn start(kind: Kind, fleet: &Fleet, quiet: &'static str) -> Self {
        let mut said = String::new();
        // Somebody else may take the port first, though few use this address.
        for _ in 0..5 {
            let folder = tempfile::tempdir().unwrap();
            let port = TcpListener::bind("127.0.0.3:0").unwrap().local_addr().unwrap();
            let all: Vec<_> = fleet.controls.iter().chain(&fleet.edges).collect();
            write(kind, &folder, fleet, port, quiet, &all);
            let (guard, process) = spawn(kind, &folder);
            let mut balancer = Self { kind, quiet, address: port, process, guard, folder };
            if balancer.is_there().await {
                return balancer;
            }
            said = balancer.log();
        }
        panic!("no {kind:?} starts:\n{said}");
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Sends nobody to a process any more, or again, as what manages nginx does. Haproxy sees for itself.
    pub(super) fn manage(&self, fleet: &Fleet, without: &[&Member]) {
        if self.kind.is_nginx() {
            let gone = |member: &Member| without.iter().any(|other| other.name == member.name);
            let open: Vec<_> =
                fleet.controls.iter().chain(&fleet.edges).filter(|member| !gone(member)).collect();
            write(self.kind, &self.folder, fleet, self.address, self.quiet, &open);
            self.signal("HUP");
        }
    }

    fn signal(&self, name: &str) {
        let script = format!("kill -{name} {}", self.process);
        assert!(Command::new("sh").args(["-c", &script]).status().unwrap().success(), "{script}");
    }

    /// What it has said.
    pub(super) fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    async fn is_there(&mut self) -> bool {
        for _ in 0..500 {
            let runs = fs::read_to_string(format!("/proc/{}/stat", self.process))
                .is_ok_and(|stat| !stat.contains(") Z "));
            if !runs {
                return false;
            }
            if TcpStream::connect(self.address).await.is_ok() {
                return true;
            }
            sleep(Duration::from_millis(20)).await;
        }
        panic!("{:?} does not listen:\n{}", self.kind, self.log());
    }
}

impl Drop for Balancer {
    fn drop(&mut self) {
        drop(self.guard.stdin.take());
        let _ = self.guard.wait();
    }
}

fn spawn(kind: Kind, folder: &TempDir) -> (Child, u32) {
    let file = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (log, configuration) = (file("log"), file("configuration"));
    let mut command = Command::new("sh");
    command.args(["-c", GUARD, "sh", &log]);
    if kind.is_nginx() {
        command.arg(tools::program("nginx").unwrap()).args([
            "-p",
            &file(""),
            "-c",
            &configuration,
            "-e",
            "stderr",
        ]);
    } else {
        command.arg(tools::program("haproxy").unwrap()).args(["-db", "-f", &configuration]);
    }
    let mut guard = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(guard.stdout.take().unwrap()).read_line(&mut line).unwrap();
    (guard, line.trim().parse().unwrap())
}

/// Writes the document's configuration, with this fleet's addresses and files in it. Every text that is to be replaced must be there.
fn write(kind: Kind, folder: &TempDir, fleet: &Fleet, listen: SocketAddr, quiet: &str, open: &[&Member]) {
    let file = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let [certificate, key] = fleet.public_files().map(|path| fs::read_to_string(path).unwrap());
    fs::write(file("relay.key"), &key).unwrap();
    fs::write(file("relay.pem"), certificate + &key).unwrap();
    let ca = fleet.ca_file().to_str().unwrap().to_owned();

    let mut text = Text(documented(kind.section()));
    text.replace(DOCUMENTED, quiet);
    text.replace("relay.example", "localhost");
    for (index, member) in fleet.controls.iter().chain(&fleet.edges).enumerate() {
        let (role, number) = if index < 2 { ("control", index) } else { ("edge", index - 2) };
        let port = if role == "control" { 8443 } else { 8444 };
        let documented = format!("{role}-{number}.{role}s:{port}");
        let address = member.target.address.to_string();
        if kind.is_nginx() {
            let is_open = open.iter().any(|other| other.name == member.name);
            let server = if is_open { format!("server {address};") } else { String::new() };
            text.replace(&format!("server {documented};"), &server);
        } else {
            let check = format!("{address} addr 127.0.0.1 port {}", member.admin().port());
            text.replace(&format!("{documented} port 9090"), &check);
        }
    }
    match kind {
        Kind::HaproxyHttp => {
            text.replace("bind :443", &format!("bind {listen}"));
            text.replace("/etc/haproxy/relay.pem", &file("relay.pem"));
            text.replace("/etc/haproxy/relay-ca.pem", &ca);
        }
        Kind::HaproxyTcp => text.replace("bind :443", &format!("bind {listen}")),
        Kind::NginxHttp => {
            text.replace("listen 443", &format!("listen {listen}"));
            text.replace("/etc/nginx/relay.pem", &file("relay.pem"));
            text.replace("/etc/nginx/relay.key", &file("relay.key"));
            text.replace("/etc/nginx/relay-ca.pem", &ca);
            // Its own files are in the folder of the test, too.
            let bodies = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
                .map(|name| format!("{name}_temp_path {};", file(name)));
            text.replace("http {\n", &format!("http {{\naccess_log off;\n{}\n", bodies.join("\n")));
        }
        Kind::NginxTcp => {
            text.replace("listen 443", &format!("listen {listen}"));
            text.0.insert_str(0, &format!("load_module {STREAM_MODULE};\n"));
        }
    }
    if kind.is_nginx() {
        text.0.insert_str(0, &format!("daemon off;\npid {};\n", file("pid")));
        text.replace("worker_processes auto", "worker_processes 1");
        text.replace("worker_rlimit_nofile 65536;", "");
        text.replace("worker_connections 32768", "worker_connections 4096");
    } else {
        text.replace("maxconn 40000", "maxconn 8000");
    }
    fs::File::create(file("configuration")).unwrap().write_all(text.0.as_bytes()).unwrap();
}

struct Text(String);

impl Text {
    fn replace(&mut self, from: &str, to: &str) {
        assert!(self.0.contains(from), "docs/balancers.md: no {from:?} in\n{}", self.0);
        self.0 = self.0.replace(from, to);
    }
}

/// A configuration out of the document.
fn documented(section: &str) -> String {
    let document = fs::read_to_string(tools::repository().join("docs/balancers.md")).unwrap();
    let begin = format!("<!-- {section}:begin -->\n");
    let (_, rest) = document.split_once(&begin).expect("no such section in docs/balancers.md");
    let (fenced, _) = rest.split_once("```\n<!--").unwrap();
    fenced.split_once('\n').unwrap().1.to_owned()
}
