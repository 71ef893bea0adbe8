//! Shows on one machine what Midspan does, in under a minute: a relay, a device and a service, each a process of its own,
//! talk over TLS on the loopback interface. The services behind the device (a line server, a sink and a source of a file) are
//! reached through local ports; what is measured is printed, and every byte is checked.

#![expect(
    clippy::disallowed_methods,
    reason = "a program that measures time on its own, outside of the relay"
)]

mod local;
mod processes;
mod screen;

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use sha2::{Digest as _, Sha256};

use crate::{
    local::{Fault, LocalServices},
    processes::{Ended, Processes},
    screen::Screen,
};

const USAGE: &str = "usage: demo [--break key|byte]

Runs a relay, a device and a service on this machine, and prints what it measures.

  --break key    give the device a wrong key: it must not get in
  --break byte   let one byte of the file change behind the device: it must be noticed";

/// Processes are ended after this time, whatever they do.
const TIME_LIMIT: Duration = Duration::from_secs(60);

/// How long one read or write on a local connection may take.
const PATIENCE: Duration = Duration::from_secs(20);

const FILE_BYTES: usize = 64 << 20;
const LINES: usize = 200;
const HANDSHAKES: usize = 10;

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    let broken = match arguments.as_slice() {
        [] => Break::Nothing,
        ["--break", "key"] => Break::Key,
        ["--break", "byte"] => Break::Byte,
        ["--help" | "-h"] => {
            screen::print_line(USAGE);
            return ExitCode::SUCCESS;
        }
        _ => {
            Screen::new().failure(USAGE);
            return ExitCode::from(64);
        }
    };
    let mut screen = Screen::new();
    let started = Instant::now();
    match run(broken, &mut screen) {
        Ok(report) => {
            screen::print_table(&report.rows());
            if report.equal() {
                let seconds = started.elapsed().as_secs_f32();
                let build = if cfg!(debug_assertions) { "a debug build, " } else { "" };
                screen::print_line(&format!("{build}done in {seconds:.1} s, and nothing is left running"));
                return ExitCode::SUCCESS;
            }
            screen.failure("the demonstration failed: the file came back changed");
        }
        Err(error) => screen.failure(&format!("the demonstration failed: {error:#}")),
    }
    ExitCode::FAILURE
}

/// What the demonstration does wrong on purpose.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Break {
    Nothing,
    Key,
    Byte,
}

struct Report {
    handshake: Duration,
    round_trips: RoundTrips,
    upload: Transfer,
    download: Transfer,
}

struct RoundTrips {
    median: Duration,
    worst_of_hundred: Duration,
}

struct Transfer {
    took: Duration,
    equal: bool,
}

fn run(broken: Break, screen: &mut Screen) -> Result<Report> {
    // Removed at the end of this function; the processes are ended before that.
    let directory = tempfile::tempdir().context("cannot make a temporary directory")?;
    let mut processes = Processes::new(TIME_LIMIT)?;
    let report = demonstrate(broken, directory.path(), &mut processes, screen);
    match processes.end() {
        Ended::Over => report,
        Ended::Late => bail!("it took longer than {} s", TIME_LIMIT.as_secs()),
        Ended::Stopped => bail!("it was stopped"),
    }
}

fn demonstrate(broken: Break, data: &Path, processes: &mut Processes, screen: &mut Screen) -> Result<Report> {
    screen.step("starting the relay");
    let relay = start_relay(data, processes)?;

    screen.step(&format!("starting the device (the relay is at {relay})"));
    let fault = if broken == Break::Byte { Fault::FlipOneByte } else { Fault::None };
    let services = LocalServices::start(fault)?;
    let service = Client { identity: data.join("service.connection"), ca: data.join("ca.pem") };
    let device = Client { identity: data.join("dev1.connection"), ..service.clone() };
    if broken == Break::Key {
        spoil_key(&device.identity)?;
    }
    start_device(&device, &service, &services, processes)?;

    screen.step("opening local ports to what is behind the device");
    let lines = open_port(&service, "lines", processes)?;
    let upload = open_port(&service, "upload", processes)?;
    let download = open_port(&service, "download", processes)?;

    screen.step(&format!("measuring {HANDSHAKES} handshakes and {LINES} round trips"));
    let round_trips = measure_round_trips(lines)?;
    let handshake = measure_handshakes(lines)?;

    let mut file = vec![0; FILE_BYTES];
    fs::File::open("/dev/urandom")
        .and_then(|mut random| random.read_exact(&mut file))
        .context("no random bytes")?;
    let digest = digest(&file);
    screen.step(&format!("sending {} MiB to the device", FILE_BYTES >> 20));
    let upload = send_file(upload, &file, &digest)?;
    drop(file);
    screen.step(&format!("getting {} MiB from the device", FILE_BYTES >> 20));
    let download = fetch_file(download, &digest)?;
    screen.end_of_steps();
    Ok(Report { handshake, round_trips, upload, download })
}

/// How `midspan` connects: as whom, and whose certificates it trusts.
#[derive(Clone)]
struct Client {
    identity: PathBuf,
    ca: PathBuf,
}

impl Client {
    fn command(&self, arguments: &[&str]) -> Result<std::process::Command> {
        let mut command = processes::program("midspan")?;
        command.arg("--connection-string-file").arg(&self.identity).arg("--ca").arg(&self.ca).args(arguments);
        Ok(command)
    }
}

fn start_relay(data: &Path, processes: &mut Processes) -> Result<SocketAddr> {
    let mut command = processes::program("midspand")?;
    command.args(["dev", "--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0", "--data-dir"]).arg(data);
    command.args(["--log-format", "json", "--log-level", "info"]);
    let relay = processes.start("relay", command)?;
    let address = relay.wait_for_line(|line| {
        let record: serde_json::Value = serde_json::from_str(line).ok()?;
        let field = |name| record["fields"].get(name).or(record.get(name))?.as_str();
        let public = field("message") == Some("listening") && field("listener") == Some("public");
        public.then(|| field("address")?.parse().ok()).flatten()
    })?;
    // It writes them when it knows where it listens.
    let until = Instant::now() + PATIENCE / 2;
    while !["service.connection", "dev1.connection"].iter().all(|name| data.join(name).exists()) {
        ensure!(
            Instant::now() < until,
            "the relay wrote no connection strings; it said: {}",
            relay.last_words()
        );
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(address)
}

fn start_device(
    device: &Client,
    service: &Client,
    services: &LocalServices,
    processes: &mut Processes,
) -> Result<()> {
    let allowed = |name, address| format!("{name}={address}");
    let command = device.command(&[
        "device",
        "--allow",
        &allowed("lines", services.lines),
        "--allow",
        &allowed("upload", services.upload),
        "--allow",
        &allowed("download", services.download),
    ])?;
    let mut process = processes.start("device", command)?;
    let asked_until = Instant::now() + PATIENCE / 2;
    while Instant::now() < asked_until {
        if process.has_ended()? {
            bail!("the device gave up; it said: {}", process.last_words());
        }
        // It would go on trying; here nothing will change.
        if let Some((_, why)) = process.last_words().split_once("no link to the relay: ") {
            bail!("the device does not get in: {why}");
        }
        let devices = service.command(&["devices", "-o", "json"])?.output().context("cannot run midspan")?;
        ensure!(
            devices.status.success(),
            "the service cannot list devices: {}",
            String::from_utf8_lossy(&devices.stderr).trim()
        );
        let text: String = String::from_utf8_lossy(&devices.stdout).split_whitespace().collect();
        if text.contains("\"connected\":true") {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    bail!("the device does not connect; it said: {}", process.last_words());
}

/// Writes a connection string of the same form whose key is another.
fn spoil_key(file: &Path) -> Result<()> {
    let text = fs::read_to_string(file).context("no connection string of the device")?;
    let (front, _) = text.split_once("SharedAccessKey=").context("a connection string without a key")?;
    let wrong = "d3Jvbmcga2V5IHdyb25nIGtleSB3cm9uZyBrZXkgISE=";
    fs::write(file, format!("{front}SharedAccessKey={wrong}")).context("cannot write the wrong key")
}

fn open_port(service: &Client, name: &str, processes: &mut Processes) -> Result<SocketAddr> {
    let command = service.command(&["connect", "dev1", name, "-L", "127.0.0.1:0"])?;
    let process = processes.start("service", command)?;
    process.wait_for_line(|line| line.split_once("listening on ")?.1.split_whitespace().next()?.parse().ok())
}

fn connect(address: SocketAddr) -> Result<TcpStream> {
    let stream = TcpStream::connect(address).context("cannot connect to the local port")?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// One line there and one back; gives the time it took.
fn say(stream: &mut BufReader<TcpStream>, line: &str) -> Result<Duration> {
    let started = Instant::now();
    stream.get_mut().write_all(format!("{line}\n").as_bytes()).context("the stream does not take a line")?;
    let mut answer = String::new();
    stream.read_line(&mut answer).context("no answer through the stream")?;
    let took = started.elapsed();
    ensure!(answer == local::answer_to(line), "asked {line:?}, and heard {answer:?}");
    Ok(took)
}

fn measure_round_trips(address: SocketAddr) -> Result<RoundTrips> {
    let mut stream = BufReader::new(connect(address)?);
    say(&mut stream, "the first line waits for the handshake")?;
    let mut times =
        (0..LINES).map(|number| say(&mut stream, &format!("line {number}"))).collect::<Result<Vec<_>>>()?;
    times.sort_unstable();
    Ok(RoundTrips { median: times[LINES / 2], worst_of_hundred: times[LINES * 99 / 100] })
}

/// The median time from opening a local connection to the first answer through it.
fn measure_handshakes(address: SocketAddr) -> Result<Duration> {
    let mut times = Vec::new();
    for _ in 0..HANDSHAKES {
        let started = Instant::now();
        say(&mut BufReader::new(connect(address)?), "hello")?;
        times.push(started.elapsed());
    }
    times.sort_unstable();
    Ok(times[HANDSHAKES / 2])
}

/// Sends the file, ends our direction, and reads the digest that the far side made of it.
fn send_file(address: SocketAddr, file: &[u8], digest: &[u8]) -> Result<Transfer> {
    let mut stream = connect(address)?;
    let started = Instant::now();
    stream.write_all(file).context("the upload broke off")?;
    stream.shutdown(Shutdown::Write)?;
    let mut heard = Vec::new();
    stream.read_to_end(&mut heard).context("the upload was not answered")?;
    Ok(Transfer { took: started.elapsed(), equal: heard == digest })
}

/// Reads the file that the far side has.
fn fetch_file(address: SocketAddr, digest: &[u8]) -> Result<Transfer> {
    let mut stream = connect(address)?;
    let started = Instant::now();
    let mut file = Vec::with_capacity(FILE_BYTES);
    stream.read_to_end(&mut file).context("the download broke off")?;
    let took = started.elapsed();
    Ok(Transfer { took, equal: self::digest(&file) == digest })
}

fn digest(bytes: &[u8]) -> Vec<u8> {
    Sha256::digest(bytes).to_vec()
}

impl Report {
    fn equal(&self) -> bool {
        self.upload.equal && self.download.equal
    }

    fn rows(&self) -> Vec<[String; 3]> {
        let milliseconds = |time: Duration| format!("{:.2} ms", time.as_secs_f64() * 1e3);
        let speed = |transfer: &Transfer| {
            let mebibytes = f64::from(u32::try_from(FILE_BYTES >> 20).unwrap_or(u32::MAX));
            format!("{:.0} MiB/s", mebibytes / transfer.took.as_secs_f64())
        };
        let size = format!("{} MiB", FILE_BYTES >> 20);
        let equal = |equal| if equal { "yes" } else { "NO" };
        let rows = [
            (
                "handshake",
                milliseconds(self.handshake),
                "a new stream until its first answer, median of 10".to_owned(),
            ),
            (
                "round trip",
                milliseconds(self.round_trips.median),
                format!("median of {LINES} lines; p99 {}", milliseconds(self.round_trips.worst_of_hundred)),
            ),
            ("upload", speed(&self.upload), format!("{size} to the device")),
            ("download", speed(&self.download), format!("{size} from the device")),
            (
                "SHA-256 equal",
                equal(self.equal()).to_owned(),
                format!("upload {}, download {}", equal(self.upload.equal), equal(self.download.equal)),
            ),
        ];
        rows.into_iter().map(|(what, value, how)| [what.to_owned(), value, how]).collect()
    }
}
