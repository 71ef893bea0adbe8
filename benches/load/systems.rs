//! Programs that carry TCP from one end to the other, each started as its users start it, without TLS.

use std::{
    env, fs,
    io::{ErrorKind, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    clock,
    connection::{Connection, Scratch},
    midspan::listening,
    process::{Process, sibling},
    system,
    variants::Variant,
};

/// A port that was free a moment ago may be taken; then everything is started once more.
const TRIES: usize = 3;
/// Nothing takes so long to connect.
const PATIENCE: Duration = Duration::from_secs(15);
const PAUSE: Duration = Duration::from_millis(1);
/// What an answer to the generator's request for an upgrade has to hold; its key is always the same.
const UPGRADED: &[u8] = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
    Sec-WebSocket-Accept: ICX+Yqv66kxgM0FcWaLWlFLwTAI=\r\n\r\n";

/// One of them, with both ends.
#[derive(Debug)]
pub(crate) struct System {
    relay: Process,
    /// What is between the relay and the ends.
    proxies: Vec<Process>,
    entry: SocketAddr,
    exit: TcpListener,
    websocket: bool,
}

/// Whether it can be started. What is not ours is looked for on the path.
pub(crate) fn is_installed(variant: Variant) -> bool {
    let there = |folder: PathBuf| folder.join(variant.name()).is_file();
    variant.is_ours() || env::var_os("PATH").is_some_and(|path| env::split_paths(&path).any(there))
}

impl System {
    /// Starts it, and waits until something can be sent.
    pub(crate) fn start(variant: Variant, start: Start, folder: &Path, name: &str) -> Result<Self> {
        let folder = folder.join(format!("{name}.files"));
        fs::create_dir_all(&folder)?;
        let once = || {
            let system = Self::start_once(variant, start, &folder)?;
            system.open()?;
            anyhow::Ok(system)
        };
        let mut result = once();
        for _ in 1..TRIES {
            result = result.or_else(|_| once());
        }
        result
    }

    fn start_once(variant: Variant, start: Start, folder: &Path) -> Result<Self> {
        let exit = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("cannot listen")?;
        exit.set_nonblocking(true)?;
        let (relay, proxies, entry) = start(folder, exit.local_addr()?)?;
        let websocket = matches!(variant, Variant::Haproxy | Variant::Nginx);
        Ok(Self { relay, proxies, entry, exit, websocket })
    }

    /// The process of the relay.
    pub(crate) fn process(&self) -> u32 {
        self.relay.id()
    }

    /// CPU time of what is between the relay and the ends.
    pub(crate) fn proxies_cpu(&self) -> Result<Duration> {
        self.proxies.iter().map(|proxy| system::cpu(proxy.id())).sum()
    }

    /// Both ends of a new stream: what goes in, and what comes out.
    pub(crate) fn open(&self) -> Result<(Connection, Connection)> {
        let mut near = Connection::of(reach(self.entry)?)?;
        if self.websocket {
            near.request("/", None)?;
        }
        let mut far = self.accept()?;
        if self.websocket {
            upgrade(&mut far)?;
            near.answer(&mut Scratch::new())?;
        }
        Ok((near, Connection::of(far)?))
    }

    fn accept(&self) -> Result<TcpStream> {
        let end = clock::now() + PATIENCE;
        loop {
            match self.exit.accept() {
                Ok((socket, _)) => {
                    socket.set_nonblocking(false)?;
                    return Ok(socket);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => thread::sleep(PAUSE),
                Err(error) => return Err(error.into()),
            }
            ensure!(clock::now() < end, "nothing comes out at the other end");
        }
    }
}

/// Reads the request for an upgrade, and grants it.
fn upgrade(socket: &mut TcpStream) -> Result<()> {
    socket.set_read_timeout(Some(PATIENCE))?;
    let (mut head, mut buffer) = (Vec::new(), [0; 4096]);
    while !head.ends_with(b"\r\n\r\n") {
        let length = socket.read(&mut buffer)?;
        ensure!(length > 0, "the proxy closed the connection in its request");
        head.extend_from_slice(&buffer[..length]);
    }
    Ok(socket.write_all(UPGRADED)?)
}

/// Connects as soon as somebody listens.
fn reach(address: SocketAddr) -> Result<TcpStream> {
    let end = clock::now() + PATIENCE;
    loop {
        match TcpStream::connect(address) {
            Ok(socket) => return Ok(socket),
            Err(error) => ensure!(clock::now() < end, "nobody listens on {address}: {error}"),
        }
        thread::sleep(Duration::from_millis(20));
    }
}

fn free() -> Result<SocketAddr> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?)
}

/// Relay, local proxies, and where a client connects.
type Started = (Process, Vec<Process>, SocketAddr);

/// Starts all programs, with their files in a folder and the far end at an address.
type Start = fn(&Path, SocketAddr) -> Result<Started>;

pub(crate) fn midspan(folder: &Path, to: SocketAddr) -> Result<Started> {
    let mut command = Command::new(sibling("midspand")?);
    command.args(["dev", "--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0", "--insecure-plaintext"]);
    command.args(["--log-format", "json", "--limit-streams-per-device", "4000"]);
    command.args(["--limit-initiations-per-second", "100000", "--data-dir"]).arg(folder);
    let mut relay = Process::start(command, folder, "relay")?;
    relay.find("address", |log| listening(log, "public"))?;
    let client = |who: &str| {
        let mut command = Command::new(sibling("midspan")?);
        command.arg("--insecure-plaintext").arg("--connection-string-file");
        command.arg(folder.join(format!("{who}.connection")));
        anyhow::Ok(command)
    };
    let (mut device, mut service) = (client("dev1")?, client("service")?);
    device.args(["device", "--max-streams", "4000", "--allow", &format!("bench={to}")]);
    service.args(["connect", "dev1", "bench", "--listen", "0"]);
    let device = Process::start(device, folder, "device")?;
    let mut service = Process::start(service, folder, "service")?;
    let entry = service.address()?;
    Ok((relay, vec![device, service], entry))
}

pub(crate) fn wstunnel(folder: &Path, to: SocketAddr) -> Result<Started> {
    let (server, entry) = (free()?, free()?);
    let url = format!("ws://{server}");
    let mut command = Command::new("wstunnel");
    command.args(["server", &url]);
    let relay = Process::start(command, folder, "relay")?;
    reach(server)?;
    let mut command = Command::new("wstunnel");
    command.args(["client", "--local-to-remote", &format!("tcp://{entry}:{to}"), &url]);
    Ok((relay, vec![Process::start(command, folder, "client")?], entry))
}

pub(crate) fn rathole(folder: &Path, to: SocketAddr) -> Result<Started> {
    let (server, entry) = (free()?, free()?);
    let start = |kind: &str, text: String| {
        let file = folder.join(format!("{kind}.toml"));
        fs::write(&file, text)?;
        let mut command = Command::new("rathole");
        command.arg(file);
        Process::start(command, folder, kind)
    };
    let service = |role: &str, address: SocketAddr, key: &str, local: SocketAddr| {
        format!(
            "[{role}]\n{key} = \"{address}\"\n[{role}.services.bench]\ntoken = \"bench\"\n{} = \"{local}\"\n",
            if role == "server" { "bind_addr" } else { "local_addr" }
        )
    };
    let relay = start("server", service("server", server, "bind_addr", entry))?;
    reach(server)?;
    let client = start("client", service("client", server, "remote_addr", to))?;
    Ok((relay, vec![client], entry))
}

const BORE_CONTROL: u16 = 7835;

/// Its control port is fixed, so the relay has a loopback address to itself.
pub(crate) fn bore(folder: &Path, to: SocketAddr) -> Result<Started> {
    let [high, low] = free()?.port().to_be_bytes();
    let address = Ipv4Addr::new(127, 77, high, low);
    let mut command = Command::new("bore");
    command.args(["server", "--bind-addr", &address.to_string()]);
    let relay = Process::start(command, folder, "relay")?;
    reach((address, BORE_CONTROL).into())?;
    let mut command = Command::new("bore");
    command.args([
        "local",
        &to.port().to_string(),
        "--local-host",
        "127.0.0.1",
        "--to",
        &address.to_string(),
    ]);
    let mut client = Process::start(command, folder, "client")?;
    let entry = client.find("port", |log| {
        let (_, rest) = log.split_once(&format!("{address}:"))?;
        let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
        Some((address, digits.parse().ok()?).into())
    })?;
    Ok((relay, vec![client], entry))
}

pub(crate) fn haproxy(folder: &Path, to: SocketAddr) -> Result<Started> {
    let (entry, file) = (free()?, folder.join("haproxy.cfg"));
    fs::write(
        &file,
        format!(
            "global\n  tune.bufsize 65536\n  maxconn 8000\n\
             defaults\n  mode http\n  timeout connect 5s\n  timeout client 1h\n  timeout server 1h\n  timeout tunnel 1h\n\
             frontend entry\n  bind {entry}\n  default_backend exit\n\
             backend exit\n  server exit {to}\n"
        ),
    )?;
    let mut command = Command::new("haproxy");
    command.arg("-db").arg("-f").arg(file);
    Ok((Process::start(command, folder, "relay")?, Vec::new(), entry))
}

pub(crate) fn nginx(folder: &Path, to: SocketAddr) -> Result<Started> {
    let (entry, file) = (free()?, folder.join("nginx.conf"));
    let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .map(|kind| format!("{kind}_temp_path {}/{kind};\n", folder.display()))
        .concat();
    // One process, which is the worker.
    fs::write(
        &file,
        format!(
            "daemon off;\nmaster_process off;\npid {}/nginx.pid;\nerror_log stderr;\n\
             events {{ worker_connections 8000; }}\n\
             http {{\naccess_log off;\n{temporary}server {{\nlisten {entry};\nlocation / {{\n\
             proxy_pass http://{to};\nproxy_http_version 1.1;\n\
             proxy_set_header Upgrade $http_upgrade;\nproxy_set_header Connection upgrade;\n\
             proxy_buffer_size 64k;\nproxy_buffers 8 64k;\nproxy_busy_buffers_size 128k;\n\
             proxy_read_timeout 1h;\nproxy_send_timeout 1h;\n}}\n}}\n}}\n",
            folder.display()
        ),
    )?;
    let mut command = Command::new("nginx");
    command.args(["-e", "stderr", "-c"]).arg(file).arg("-p").arg(folder);
    Ok((Process::start(command, folder, "relay")?, Vec::new(), entry))
}
