//! What device links and the handshakes of streams cost a control replica and the store.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, ensure};
use midspan_core::{
    connection_string::{ConnectionString, Identity},
    key::Key,
    time::UnixTime,
};
use rustls::ClientConfig;
use secrecy::ExposeSecret as _;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::{
    clock,
    connection::{Connection, Received, Scratch},
    device::Device,
    fleet::{Redis, internal_certificates, internal_flags},
    midspan::{Midspan, Under, listening, read_metrics, ticket_key_file},
    number::{count, float},
    poller::{Poller, Until},
    process::{Process, sibling},
    system,
    tls::Certificate,
};

/// Links that are opened first, so that what every process needs once is not counted.
const FIRST: usize = 64;
/// Services that ask at the same time.
const SERVICES: usize = 8;
const CALM: Duration = Duration::from_secs(3);
const WAIT: Duration = Duration::from_millis(50);

/// What was measured.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Links {
    pub(crate) count: usize,
    /// KiB of the replica's user memory for each link.
    pub(crate) user: f64,
    /// KiB of the store's memory for each link.
    pub(crate) store: f64,
    /// Microseconds of the replica's CPU for opening a link, its TLS handshake included.
    pub(crate) open: f64,
    /// Microseconds of the store's CPU for opening a link.
    pub(crate) open_store: f64,
    /// Microseconds of the replica's CPU for each link and minute in which nothing happens but pings.
    pub(crate) idle: f64,
    /// Round trips to the store in a second in which nothing happens.
    pub(crate) idle_trips: f64,
    /// Microseconds of the replica's CPU for announcing a link again to a store that has lost everything.
    pub(crate) restore: f64,
    /// Microseconds of the store's CPU for that.
    pub(crate) restore_store: f64,
    pub(crate) handshakes: usize,
    /// Microseconds of the replica's CPU from a service's request to its answer, the device's part included.
    pub(crate) handshake: f64,
    /// Microseconds of the store's CPU for that.
    pub(crate) handshake_store: f64,
    /// The replica's round trips to the store for each of them.
    pub(crate) handshake_trips: f64,
    /// KiB of the store's memory for each stream.
    pub(crate) handshake_memory: f64,
}

/// One control replica with its store, and an edge, which owns the streams and is never dialled.
struct Relay {
    store: Redis,
    control: Process,
    address: SocketAddr,
    admin: SocketAddr,
    _edge: Midspan,
    tls: Arc<ClientConfig>,
    group_key: Key,
    service: ConnectionString,
}

/// What has been spent so far.
struct Spent {
    control: Duration,
    store: Duration,
    trips: f64,
    user: u64,
    store_bytes: f64,
}

/// Opens `links` links, lets them rest for `rest`, and asks their devices for `handshakes` streams.
pub(crate) fn measure(
    links: usize,
    rest: Duration,
    handshakes: usize,
    folder: &Path,
    certificate: &Certificate,
) -> Result<Links> {
    let relay = Relay::start(folder, certificate)?;
    let mut devices = Vec::with_capacity(FIRST + links);
    relay.open(&mut devices, FIRST)?;
    let before = relay.spent()?;
    relay.open(&mut devices, links)?;
    let opened = relay.spent()?;
    let (rested, restored, asked) = serve(devices, || {
        thread::sleep(rest);
        let rested = relay.spent()?;
        relay.store.forget()?;
        relay.wait_for_links(opened.store_bytes)?;
        let restored = relay.spent()?;
        relay.ask(handshakes, FIRST + links)?;
        Ok((rested, restored, relay.spent()?))
    })?;
    let micros = |before: Duration, after: Duration| after.saturating_sub(before).as_secs_f64() * 1e6;
    let (links_f, handshakes_f) = (float(count(links)), float(count(handshakes)));
    // What is there at the end was there all the time, but for the first links.
    let resting = float(count(FIRST + links)) * rest.as_secs_f64() / 60.0;
    Ok(Links {
        count: links,
        user: float(opened.user.saturating_sub(before.user)) / links_f,
        store: (opened.store_bytes - before.store_bytes) / 1024.0 / links_f,
        open: micros(before.control, opened.control) / links_f,
        open_store: micros(before.store, opened.store) / links_f,
        idle: micros(opened.control, rested.control) / resting,
        idle_trips: (rested.trips - opened.trips) / rest.as_secs_f64(),
        restore: micros(rested.control, restored.control) / float(count(FIRST + links)),
        restore_store: micros(rested.store, restored.store) / float(count(FIRST + links)),
        handshakes,
        handshake: micros(restored.control, asked.control) / handshakes_f,
        handshake_store: micros(restored.store, asked.store) / handshakes_f,
        handshake_trips: (asked.trips - restored.trips) / handshakes_f,
        handshake_memory: (asked.store_bytes - restored.store_bytes) / 1024.0 / handshakes_f,
    })
}

impl Relay {
    fn start(folder: &Path, certificate: &Certificate) -> Result<Self> {
        let store = Redis::start(folder, "links")?;
        internal_certificates(folder)?;
        let flags = internal_flags(folder, "edge", &store);
        let edge = Midspan::start_with(folder, "links-edge", Some(certificate), Under::Nothing, &flags)?;
        let (group_key, service_key) = (Key::from_bytes(vec![1; 32])?, Key::from_bytes(vec![2; 32])?);
        let credentials = json!({
            "group_keys": [group_key.to_base64().expose_secret()],
            "services": {"bench": {
                "keys": [service_key.to_base64().expose_secret()], "allow": ["open"], "every_device": true,
            }},
        });
        let credentials_file = folder.join("credentials.json");
        fs::write(&credentials_file, credentials.to_string())?;
        let tickets = ticket_key_file(folder, &Key::from_bytes((0..32).collect())?)?;
        let mut command = std::process::Command::new(sibling("midspand")?);
        command
            .args(["control", "--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0"])
            .args(["--log-format", "json", "--public-host", "localhost", "--edge-url", "https://localhost"])
            .args(["--limit-device-links", "18000", "--max-connections", "19000"])
            .args(["--max-unauthenticated", "19000", "--limit-initiations-per-second", "1000000"])
            .arg("--credentials-file")
            .arg(credentials_file)
            .arg("--ticket-key-file")
            .arg(tickets)
            .arg("--tls-certificate")
            .arg(&certificate.chain)
            .arg("--tls-key")
            .arg(&certificate.key)
            .arg("--activity-log")
            .arg(folder.join("links.activity.jsonl"))
            .args(internal_flags(folder, "control", &store));
        let mut control = Process::start(command, folder, "links-control")?;
        let address = control.find("public address", |log| listening(log, "public"))?;
        let admin = control.find("admin address", |log| listening(log, "admin"))?;
        // Until then it does not know the edge.
        thread::sleep(CALM);
        let service = ConnectionString {
            host: "localhost".to_owned(),
            identity: Identity::Service("bench".to_owned()),
            key: service_key,
        };
        let tls = Arc::clone(&certificate.client);
        Ok(Self { store, control, address, admin, _edge: edge, tls, group_key, service })
    }

    fn open(&self, devices: &mut Vec<Device>, more: usize) -> Result<()> {
        let mut scratch = Scratch::new();
        for number in devices.len()..devices.len() + more {
            let device = Device::open(number, &self.group_key, self.address, &self.tls, &mut scratch);
            devices.push(device.with_context(|| format!("link {number} does not come up"))?);
        }
        Ok(())
    }

    /// Asks for streams, each to another device, over a few connections at a time.
    fn ask(&self, handshakes: usize, devices: usize) -> Result<()> {
        let next = AtomicUsize::new(0);
        let signature = self.service.sign(UnixTime::LAST);
        thread::scope(|scope| {
            let services: Vec<_> = (0..SERVICES)
                .map(|_| {
                    scope.spawn(|| {
                        let mut connection = Connection::open(self.address, Some(&self.tls))?;
                        connection.handshake()?;
                        let mut scratch = Scratch::new();
                        loop {
                            let number = next.fetch_add(1, Ordering::Relaxed);
                            if number >= handshakes {
                                return anyhow::Ok(());
                            }
                            let request = format!(
                                "POST /v1/devices/dev{}/streams HTTP/1.1\r\nHost: localhost\r\nAuthorization: {}\r\n\
                                 Content-Type: application/json\r\nContent-Length: 16\r\n\r\n{{\"name\":\"bench\"}}",
                                number % devices,
                                signature.expose_secret()
                            );
                            connection.send_all(request.as_bytes())?;
                            read_created(&mut connection, &mut scratch)?;
                        }
                    })
                })
                .collect();
            for service in services {
                service.join().map_err(|_| anyhow!("a service panicked"))??;
            }
            Ok(())
        })
    }

    /// Waits until the store has nearly as much as when all links were there.
    fn wait_for_links(&self, bytes: f64) -> Result<()> {
        let end = clock::now() + Duration::from_secs(60);
        while self.store.used_memory()? < 0.95 * bytes {
            ensure!(clock::now() < end, "the links are not announced again");
            thread::sleep(WAIT);
        }
        Ok(())
    }

    /// Waits until the replica rests.
    fn spent(&self) -> Result<Spent> {
        thread::sleep(CALM);
        let control = self.control.id();
        Ok(Spent {
            control: system::cpu(control)?,
            store: system::cpu(self.store.process.id())?,
            trips: trips(&read_metrics(self.admin)?),
            user: system::memory(control)?.anonymous,
            store_bytes: self.store.used_memory()?,
        })
    }
}

/// Lets all devices answer while `meanwhile` runs.
fn serve<T>(mut devices: Vec<Device>, meanwhile: impl FnOnce() -> Result<T>) -> Result<T> {
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let serving = scope.spawn(|| {
            let (mut poller, mut scratch) = (Poller::new(&devices, Until::Readable)?, Scratch::new());
            while !stop.load(Ordering::Relaxed) {
                for place in poller.wait(WAIT)? {
                    devices[place].serve(&mut scratch)?;
                }
            }
            anyhow::Ok(())
        });
        let result = meanwhile();
        stop.store(true, Ordering::Relaxed);
        serving.join().map_err(|_| anyhow!("the devices panicked"))??;
        result
    })
}

/// Round trips to the store so far, by the replica's metrics.
fn trips(metrics: &str) -> f64 {
    let of_store = metrics.lines().filter(|line| line.starts_with("midspan_store_operations_total{"));
    of_store.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
}

/// Reads one answer, which must be the grant of a stream.
fn read_created(connection: &mut Connection, scratch: &mut Scratch) -> Result<()> {
    let (mut answer, end) = (Vec::new(), clock::now() + Duration::from_secs(20));
    loop {
        let received = connection.receive(scratch, |bytes| {
            answer.extend_from_slice(bytes);
            Ok(())
        })?;
        ensure!(received != Received::End && clock::now() < end, "the relay does not answer");
        if let Some(head) = answer.windows(4).position(|end| end == b"\r\n\r\n") {
            let text = String::from_utf8_lossy(&answer[..head]).to_ascii_lowercase();
            ensure!(text.starts_with("http/1.1 201 "), "no stream: {}", String::from_utf8_lossy(&answer));
            let length = text.lines().find_map(|line| line.strip_prefix("content-length:"));
            let length: usize = length.context("an answer without a length")?.trim().parse()?;
            if answer.len() >= head + 4 + length {
                return Ok(());
            }
        }
    }
}

impl Redis {
    /// Bytes that it uses.
    fn used_memory(&self) -> Result<f64> {
        let answer = self.command("INFO memory")?;
        let used = answer.lines().find_map(|line| line.strip_prefix("used_memory:")?.trim().parse().ok());
        used.context("the store does not say how much memory it uses")
    }

    /// Loses everything.
    fn forget(&self) -> Result<()> {
        let answer = self.command("FLUSHALL")?;
        ensure!(answer.starts_with("+OK"), "the store keeps what it has: {answer}");
        Ok(())
    }

    fn command(&self, command: &str) -> Result<String> {
        let mut socket = TcpStream::connect(self.address)?;
        write!(socket, "{command}\r\nQUIT\r\n")?;
        let mut answer = String::new();
        socket.read_to_string(&mut answer)?;
        Ok(answer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trips_are_summed() {
        let text = "midspan_store_operations_total{operation=\"renew\"} 3\n# x\nmidspan_store_operations_total{operation=\"end\"} 4\nother 9\n";
        assert!((trips(text) - 7.0).abs() < f64::EPSILON);
    }
}
