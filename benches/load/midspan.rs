//! `midspand edge`, started as a user starts it, and the tickets for it.

use std::{
    ffi::OsString,
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicU64, Ordering},
};

use anyhow::{Context as _, Result};
use midspan_core::{
    id::{Incarnation, Role, StreamId},
    key::Key,
    ticket::{Owner, Ticket, TicketKeys},
    time::UnixTime,
    trace::TraceParent,
};
use secrecy::ExposeSecret as _;
use serde_json::Value;

use crate::{
    process::{Process, sibling},
    tls::Certificate,
};

/// The limits that the measurements need raised. The generator answers no pings, so they are far apart.
const LIMITS: [&str; 14] = [
    "--max-streams",
    "9500",
    "--max-connections",
    "19000",
    "--max-unauthenticated",
    "19000",
    "--leg-ping",
    "10m",
    "--leg-silence",
    "30m",
    "--reload-interval",
    "10s",
    "--data-threads",
    "1",
];

/// A running edge.
#[derive(Debug)]
pub(crate) struct Midspan {
    pub(crate) process: Process,
    pub(crate) address: SocketAddr,
    keys: TicketKeys,
    owner: Owner,
    next: AtomicU64,
}

/// Where one leg is opened, and with what.
#[derive(Debug)]
pub(crate) struct Invitation {
    pub(crate) path: String,
    pub(crate) ticket: String,
}

/// What the program runs under.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Under<'a> {
    Nothing,
    /// callgrind, which writes its counts to a file.
    Callgrind(&'a Path),
    /// strace, which writes its counts to a file when the program has ended.
    Strace(&'a Path),
}

impl Midspan {
    pub(crate) fn start(
        folder: &Path,
        name: &str,
        tls: Option<&Certificate>,
        under: Under<'_>,
    ) -> Result<Self> {
        Self::start_with(folder, name, tls, under, &[])
    }

    /// The same with flags more.
    pub(crate) fn start_with(
        folder: &Path,
        name: &str,
        tls: Option<&Certificate>,
        under: Under<'_>,
        more: &[OsString],
    ) -> Result<Self> {
        let key = Key::from_bytes((0..32).collect())?;
        let key_file = ticket_key_file(folder, &key)?;
        let mut command = match under {
            Under::Nothing => Command::new(sibling("midspand")?),
            Under::Callgrind(out) => {
                let mut command = Command::new("valgrind");
                let mut file = OsString::from("--callgrind-out-file=");
                file.push(out);
                command.arg("--tool=callgrind").arg(file).arg(sibling("midspand")?);
                command
            }
            Under::Strace(out) => {
                let mut command = Command::new("strace");
                // With -D the program is our child, and not the tracer.
                command.args(["-D", "-f", "-c", "-o"]).arg(out).arg(sibling("midspand")?);
                command
            }
        };
        command
            .args([
                "edge",
                "--listen",
                "127.0.0.1:0",
                "--admin-listen",
                "127.0.0.1:0",
                "--log-format",
                "json",
            ])
            .arg("--ticket-key-file")
            .arg(key_file)
            .arg("--activity-log")
            .arg(folder.join(format!("{name}.activity.jsonl")))
            .args(LIMITS)
            .args(more);
        match tls {
            Some(tls) => command.arg("--tls-certificate").arg(&tls.chain).arg("--tls-key").arg(&tls.key),
            None => command.arg("--insecure-plaintext"),
        };
        let mut process = Process::start(command, folder, name)?;
        let address = process.find("public address", |log| listening(log, "public"))?;
        let admin = process.find("admin address", |log| listening(log, "admin"))?;
        let (edge, incarnation) =
            incarnation(&read_metrics(admin)?).context("the metrics name no incarnation")?;
        let internal = process.find("log", |log| Some(listening(log, "internal")))?;
        let internal = internal.map(|address| address.to_string()).unwrap_or_default();
        let owner = Owner { name: edge, incarnation, address: internal };
        Ok(Self { process, address, keys: TicketKeys::new(&key, None)?, owner, next: AtomicU64::new(1) })
    }

    /// Tickets for both legs of a new stream: service, device.
    pub(crate) fn invite(&self) -> Result<[Invitation; 2]> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let stream = StreamId::from_random(u128::from(number));
        let invite = |role| {
            let ticket = Ticket {
                stream,
                role,
                owner: self.owner.clone(),
                address: "dev1".parse()?,
                name: "bench".parse()?,
                credential: "service".to_owned(),
                credential_expires: UnixTime::LAST,
                expires: unix_now().plus(std::time::Duration::from_secs(60)),
                trace: TraceParent::new(u128::from(number), number),
            };
            let ticket = self.keys.sign(&ticket)?.expose_secret().to_owned();
            anyhow::Ok(Invitation { path: format!("/bridges/{stream}/{role}"), ticket })
        };
        Ok([invite(Role::Service)?, invite(Role::Device)?])
    }
}

/// Writes the keys of tickets where processes find them.
pub(crate) fn ticket_key_file(folder: &Path, key: &Key) -> Result<PathBuf> {
    let file = folder.join("ticket.key");
    fs::write(&file, key.to_base64().expose_secret())?;
    Ok(file)
}

#[expect(clippy::disallowed_methods, reason = "tickets end at a time of day")]
pub(crate) fn unix_now() -> UnixTime {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    UnixTime(since.map_or(0, |since| since.as_secs()))
}

/// Where a listener of `midspand` is, by its log in JSON.
pub(crate) fn listening(log: &str, listener: &str) -> Option<SocketAddr> {
    log.lines().filter_map(|line| serde_json::from_str(line).ok()).find_map(|record: Value| {
        let field = |name| record["fields"].get(name).or(record.get(name)).and_then(Value::as_str);
        let ours = field("message") == Some("listening") && field("listener") == Some(listener);
        ours.then(|| field("address")?.parse().ok()).flatten()
    })
}

/// What `/metrics` of an admin port says.
pub(crate) fn read_metrics(admin: SocketAddr) -> Result<String> {
    let mut socket = TcpStream::connect(admin)?;
    socket.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
    let mut text = String::new();
    socket.read_to_string(&mut text)?;
    Ok(text)
}

fn incarnation(metrics: &str) -> Option<(String, Incarnation)> {
    let line = metrics.lines().find(|line| line.starts_with("midspan_edge_info{"))?;
    let label = |name: &str| line.split(&format!("{name}=\"")).nth(1)?.split('"').next();
    Some((label("edge")?.to_owned(), label("incarnation")?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_metrics_tell_the_incarnation() {
        let id = Incarnation::from_random(7);
        let text = format!("# HELP x\nmidspan_edge_info{{edge=\"edge-0\",incarnation=\"{id}\"}} 1\n");
        assert_eq!(incarnation(&text), Some(("edge-0".to_owned(), id)));
        assert_eq!(incarnation("midspan_edge_legs 0"), None);
    }

    #[test]
    fn the_log_tells_the_address() {
        let log = "{\"message\":\"x\"}\n{\"fields\":{\"message\":\"listening\",\"listener\":\"public\",\"address\":\"127.0.0.1:5\"}}\n";
        assert_eq!(listening(log, "public"), Some(([127, 0, 0, 1], 5).into()));
        assert_eq!(listening(log, "admin"), None);
    }
}
