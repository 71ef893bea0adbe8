//! OpenSSH through the relay: a real `sshd` behind a device, and the real `ssh` and `scp`.

use std::{
    fs::{self, File},
    io::{Read as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use sha2::{Digest as _, Sha256};
use tempfile::TempDir;
use testkit::{Midspan, Process, Relay, binary, until};
use tokio::{
    io::AsyncReadExt as _,
    net::TcpStream,
    sync::{Mutex, MutexGuard},
};

use crate::{tools, web::local_address};

const FILE_BYTES: u64 = 200 << 20;
const SESSIONS: usize = 50;
const LIMIT: Duration = Duration::from_secs(120);

/// Each of these tests takes all the processor time there is: side by side they would only be slower.
static ONE_AT_A_TIME: Mutex<()> = Mutex::const_new(());

/// The way through the relay, as README.md has it.
const PROXY_COMMAND: &str = "ProxyCommand=midspan connect --stdio %h";

/// In sshd's view: where it takes its privileges off.
const PRIVILEGE_SEPARATION: &str = "/run/sshd";

#[tokio::test(flavor = "multi_thread")]
async fn ssh_runs_a_command_on_a_device() {
    let readme = fs::read_to_string(tools::repository().join("README.md")).unwrap();
    let (name, value) = PROXY_COMMAND.split_once('=').unwrap();
    assert!(readme.contains(&format!("ssh -o {name}='{value}' dev1")), "README.md shows another command");
    let Some(site) = Site::start().await else { return };
    for host in ["dev1", "local"] {
        let mut ssh = site.ssh(host, "cat; echo to the other side >&2; exit 7");
        ssh.write(b"through the relay");
        ssh.close_stdin();
        let status = ssh.wait_exit().await;
        assert_eq!(ssh.stdout_text(), "through the relay", "{host}: {}", ssh.stderr());
        assert_eq!(ssh.stderr().lines().last(), Some("to the other side"), "{host}");
        assert_eq!(status.code(), Some(7), "{host}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn scp_copies_200_mib_both_ways() {
    let Some(site) = Site::start().await else { return };
    let path = |name| site.folder.path().join(name);
    let mut random = File::open("/dev/urandom").unwrap().take(FILE_BYTES);
    std::io::copy(&mut random, &mut File::create(path("original")).unwrap()).unwrap();
    let original = digest(&path("original"));

    // There through the proxy command, back through the local port.
    let copied = format!("dev1:{}", path("copied").display());
    site.scp(path("original").to_str().unwrap(), &copied).await;
    assert_eq!(digest(&path("copied")), original);
    fs::remove_file(path("original")).unwrap();
    let copied = format!("local:{}", path("copied").display());
    site.scp(&copied, path("back").to_str().unwrap()).await;
    assert_eq!(digest(&path("back")), original);
}

#[tokio::test(flavor = "multi_thread")]
async fn fifty_sessions_at_once() {
    let Some(site) = Site::start().await else { return };
    let start = |number| {
        site.ssh(if number % 2 == 0 { "dev1" } else { "local" }, "echo ready; read word; echo \"bye $word\"")
    };
    let mut sessions: Vec<_> = (0..SESSIONS).map(start).collect();
    let all_ready = tokio::time::timeout(LIMIT, async {
        while !sessions.iter().all(|session| session.stdout_text() == "ready\n") {
            let lost =
                sessions.iter_mut().find_map(|session| (!session.is_running()).then(|| session.stderr()));
            assert_eq!(lost, None, "a session ended");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
    assert!(all_ready.await.is_ok(), "not all sessions stand within {LIMIT:?}");
    site.relay.counts("midspan_edge_streams", &[], i64::try_from(SESSIONS).unwrap()).await;

    for (number, session) in sessions.iter_mut().enumerate() {
        session.write(format!("{number}\n").as_bytes());
    }
    for (number, session) in sessions.iter_mut().enumerate() {
        tools::succeeds("a session", session, LIMIT).await;
        assert_eq!(session.stdout_text(), format!("ready\nbye {number}\n"));
    }
    site.relay.assert_quiet().await;
}

/// An SSH server behind a device, and what `ssh` needs to reach it: as `dev1` by a proxy command, as `local` by a local port.
struct Site {
    relay: Relay,
    folder: TempDir,
    ssh: PathBuf,
    scp: PathBuf,
    _processes: [Process; 3],
    _alone: MutexGuard<'static, ()>,
}

impl Site {
    async fn start() -> Option<Self> {
        let (sshd, ssh) = (tools::program("sshd")?, tools::program("ssh")?);
        let (scp, keygen) = (tools::program("scp")?, tools::program("ssh-keygen")?);
        let alone = ONE_AT_A_TIME.lock().await;
        make_run_directory();
        let folder = tempfile::tempdir().unwrap();
        for name in ["host_key", "user_key"] {
            let mut command = Command::new(&keygen);
            command.args(["-q", "-t", "ed25519", "-N", "", "-C", "", "-f"]).arg(folder.path().join(name));
            assert!(command.status().unwrap().success(), "ssh-keygen failed");
        }
        fs::copy(folder.path().join("user_key.pub"), folder.path().join("authorized_keys")).unwrap();
        let (server, port) = start_sshd(&sshd, folder.path()).await;

        let relay = Relay::start().await;
        let device = Midspan::device(&relay, &["--allow", &format!("ssh=127.0.0.1:{port}")]).await;
        let service = Midspan::service(&relay, &["connect", "dev1", "ssh", "-L", "127.0.0.1:0"]);
        let local = local_address(&service).await;
        write_client_configuration(folder.path(), &local);
        let processes = [server, device, service];
        Some(Self { relay, folder, ssh, scp, _processes: processes, _alone: alone })
    }

    fn ssh(&self, host: &str, script: &str) -> Process {
        let mut command = self.client(&self.ssh, host == "dev1");
        command.args([host, script]);
        Process::spawn(command)
    }

    async fn scp(&self, from: &str, to: &str) {
        let mut command = self.client(&self.scp, [from, to].iter().any(|name| name.starts_with("dev1:")));
        command.args(["-q", from, to]);
        tools::succeeds("scp", &mut Process::spawn(command), LIMIT).await;
    }

    /// `ssh` or `scp`; through the relay exactly as README.md says.
    fn client(&self, program: &Path, through_relay: bool) -> Command {
        let mut command = Command::new(program);
        command.arg("-F").arg(self.folder.path().join("client"));
        if through_relay {
            command.args(["-o", PROXY_COMMAND]);
            let midspan = binary("midspan");
            let mut path = vec![Path::new(midspan.get_program()).parent().unwrap().to_owned()];
            path.extend(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()));
            command.env("PATH", std::env::join_paths(path).unwrap());
            command.env("MIDSPAN_CONNECTION_STRING_FILE", self.relay.path("service.connection"));
            command.env("MIDSPAN_CA", self.relay.path("ca.pem"));
        }
        command
    }
}

/// Starts a server with a configuration and keys of its own, and waits until it greets.
async fn start_sshd(sshd: &Path, folder: &Path) -> (Process, u16) {
    // The port is free now; nobody else is likely to take it within the next moment.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let configuration = folder.join("server");
    let text = format!(
        "ListenAddress 127.0.0.1:{port}\n\
         HostKey {folder}/host_key\n\
         AuthorizedKeysFile {folder}/authorized_keys\n\
         AuthenticationMethods publickey\n\
         PermitRootLogin prohibit-password\n\
         StrictModes no\n\
         UsePAM no\n\
         UseDNS no\n\
         PidFile none\n\
         PrintMotd no\n\
         MaxStartups 200\n\
         LogLevel ERROR\n\
         Subsystem sftp internal-sftp\n",
        folder = folder.display()
    );
    fs::write(&configuration, text).unwrap();
    let mut command = Command::new(sshd);
    command.args(["-D", "-e", "-f"]).arg(configuration);
    let mut server = Process::spawn(command);
    until("the greeting of sshd", || async {
        let mut greeting = [0; 4];
        let mut stream = TcpStream::connect(("127.0.0.1", port)).await.ok()?;
        stream.read_exact(&mut greeting).await.ok().filter(|_| greeting == *b"SSH-")
    })
    .await;
    assert!(server.is_running(), "{}", server.stderr());
    (server, port)
}

/// One key, one known host, and nothing from the account that runs the tests.
fn write_client_configuration(folder: &Path, local: &str) {
    let host_key = fs::read_to_string(folder.join("host_key.pub")).unwrap();
    fs::write(folder.join("known_hosts"), format!("dev1 {host_key}")).unwrap();
    let (address, port) = local.rsplit_once(':').unwrap();
    let user = Command::new("id").arg("-un").output().unwrap().stdout;
    let text = format!(
        "Host local\n\
         HostName {address}\n\
         Port {port}\n\
         Host *\n\
         User {user}\n\
         HostKeyAlias dev1\n\
         IdentityFile {folder}/user_key\n\
         IdentitiesOnly yes\n\
         IdentityAgent none\n\
         UserKnownHostsFile {folder}/known_hosts\n\
         GlobalKnownHostsFile /dev/null\n\
         StrictHostKeyChecking yes\n\
         BatchMode yes\n\
         LogLevel ERROR\n",
        user = String::from_utf8(user).unwrap().trim(),
        folder = folder.display(),
    );
    File::create(folder.join("client")).unwrap().write_all(text.as_bytes()).unwrap();
}

fn digest(path: &Path) -> Vec<u8> {
    let mut file = File::open(path).unwrap();
    let mut sha = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer).unwrap() {
            0 => return sha.finalize().to_vec(),
            length => sha.update(&buffer[..length]),
        }
    }
}

/// Makes the directory that a server started by root insists on, and leaves it: another run may need it by now.
fn make_run_directory() {
    // Another account cannot make it, and needs none.
    if fs::DirBuilder::new().mode(0o755).create(PRIVILEGE_SEPARATION).is_ok() {
        // Whatever the process's mask is.
        fs::set_permissions(PRIVILEGE_SEPARATION, fs::Permissions::from_mode(0o755)).unwrap();
    }
}
