use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::ExitStatus,
    time::Duration,
};

use bytes::Bytes;
use http::Request;
use http_body_util::Empty;
use hyper_util::rt::TokioIo;
use midspan_core::{
    api::StreamGrant,
    connection_string::{ConnectionString, Identity},
    key::Key,
    link::Invitation,
    ticket::TicketKeys,
};
use secrecy::ExposeSecret as _;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{
    net::TcpStream,
    task::JoinSet,
    time::{Instant, sleep},
};

use crate::{
    Answer, DEADLINE, DeviceLink, Joined, Leg, Metrics, Process, RawLeg, ServiceApi, Target, binary,
    eventually, trusting, until, within,
};

/// A relay in a process of its own, `midspand dev`, on free ports of the loopback interface.
#[derive(Debug)]
pub struct Relay {
    process: Process,
    data: TempDir,
    arguments: Vec<String>,
    admin: SocketAddr,
    target: Target,
    service: ConnectionString,
}

/// Both sides of a handshake that the device accepted.
#[derive(Debug)]
pub struct Handshake {
    /// What the service got.
    pub grant: StreamGrant,
    /// What the device got.
    pub invitation: Invitation,
}

impl Relay {
    /// A relay with the defaults of development mode, for the device `dev1`.
    pub async fn start() -> Self {
        Self::with(&[]).await
    }

    /// A relay with flags more.
    pub async fn with(arguments: &[&str]) -> Self {
        Self::in_directory(tempfile::tempdir().unwrap(), arguments).await
    }

    /// A relay with a data directory that may hold something already.
    pub async fn in_directory(data: TempDir, arguments: &[&str]) -> Self {
        let arguments: Vec<_> = arguments.iter().map(|&argument| argument.to_owned()).collect();
        let process = spawn(data.path(), "127.0.0.1:0", &arguments);
        let (public, admin) = both(&process).await;
        // It is written once the port is known.
        let file = data.path().join("service.connection");
        let service: ConnectionString =
            until("service.connection", || async { fs::read_to_string(&file).ok()?.parse().ok() }).await;
        let tls = trusting(&data.path().join("ca.pem"));
        let target = Target { address: public, authority: service.host.clone(), tls };
        Self { process, data, arguments, admin, target, service }
    }

    /// Where the relay listens, for making connections by hand.
    pub fn target(&self) -> &Target {
        &self.target
    }

    /// The public port.
    pub fn port(&self) -> u16 {
        self.target.address.port()
    }

    /// The address of the public port.
    pub fn address(&self) -> SocketAddr {
        self.target.address
    }

    /// The public URL, without a path.
    pub fn url(&self) -> String {
        format!("https://{}", self.target.authority)
    }

    /// A path in the data directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.data.path().join(name)
    }

    /// The process.
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// Everything on standard error so far.
    pub fn log(&self) -> String {
        self.process.stderr()
    }

    /// The lines of the log that are whole and JSON.
    pub fn log_records(&self) -> Vec<Value> {
        self.log().lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// The records of the activity log.
    pub fn activity(&self) -> Vec<Value> {
        let text = fs::read_to_string(self.path("activity.jsonl")).unwrap_or_default();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// The connection string of a device (or `device/module`), whether it has a file or its key is derived.
    pub fn connection_string(&self, device: &str) -> String {
        self.device_connection(device).to_text().expose_secret().to_owned()
    }

    /// The same, parsed.
    pub fn device_connection(&self, device: &str) -> ConnectionString {
        let address = device.parse().unwrap();
        let key = self.group_key().derive(&address);
        ConnectionString { host: self.service.host.clone(), identity: Identity::Device(address), key }
    }

    /// The connection string of the service.
    pub fn service_connection(&self) -> &ConnectionString {
        &self.service
    }

    /// The key from which devices' keys are derived.
    pub fn group_key(&self) -> Key {
        let credentials: Value =
            serde_json::from_str(&fs::read_to_string(self.path("credentials.json")).unwrap()).unwrap();
        Key::from_base64(credentials["group_keys"][0].as_str().expect("no group key")).unwrap()
    }

    /// Replaces a file in the data directory, as an operator does: whole, or not at all.
    pub fn replace(&self, name: &str, contents: &str) {
        let new = self.path(&format!("{name}.new"));
        fs::write(&new, contents).unwrap();
        fs::rename(new, self.path(name)).unwrap();
    }

    /// The keys that the relay signs tickets with.
    pub fn ticket_keys(&self) -> TicketKeys {
        TicketKeys::from_text(&fs::read_to_string(self.path("ticket.key")).unwrap()).unwrap()
    }

    /// A service with the relay's own credential.
    pub fn service(&self) -> ServiceApi {
        ServiceApi::new(self.target.clone(), &self.service)
    }

    /// A link of `device`.
    pub async fn device(&self, device: &str) -> DeviceLink {
        DeviceLink::connect(&self.target, &self.device_connection(device)).await
    }

    /// Lets the service ask, and the device that holds `link` accept.
    pub async fn handshake(&self, device: &str, link: &mut DeviceLink) -> Handshake {
        // The device is there: all of the time may go into its answer.
        self.handshake_with(device, link, json!({ "name": "test", "connect_timeout_seconds": 0 })).await
    }

    /// The same with a request of the test's own.
    pub async fn handshake_with(&self, device: &str, link: &mut DeviceLink, body: Value) -> Handshake {
        self.handshake_by(&self.service(), device, link, body).await
    }

    /// The same by a service of the test's own.
    pub async fn handshake_by(
        &self,
        service: &ServiceApi,
        device: &str,
        link: &mut DeviceLink,
        body: Value,
    ) -> Handshake {
        let (answer, invitation) = tokio::join!(service.open_with(device, body), async {
            let invitation = link.next_request().await;
            link.accept(invitation.request).await;
            invitation
        });
        let grant = answer.grant();
        assert_eq!(grant.stream, invitation.stream);
        Handshake { grant, invitation }
    }

    /// A whole stream between two legs of the test.
    pub async fn join(&self, link: &mut DeviceLink) -> Joined {
        let handshake = self.handshake("dev1", link).await;
        let (service, device) = tokio::join!(self.service_leg(&handshake), self.device_leg(&handshake));
        Joined { id: handshake.grant.stream, service, device }
    }

    /// The service's leg of a handshake.
    pub async fn service_leg(&self, handshake: &Handshake) -> Leg {
        let grant = &handshake.grant;
        Leg::open(&self.target, &grant.url, grant.ticket.expose_secret()).await
    }

    /// The device's leg of a handshake.
    pub async fn device_leg(&self, handshake: &Handshake) -> Leg {
        let invitation = &handshake.invitation;
        Leg::open(&self.target, &invitation.url, invitation.ticket.expose_secret()).await
    }

    /// The service's leg of a handshake, byte by byte.
    pub async fn raw_service_leg(&self, handshake: &Handshake) -> RawLeg {
        let grant = &handshake.grant;
        RawLeg::open(&self.target, &grant.url, grant.ticket.expose_secret()).await
    }

    /// The device's leg of a handshake, byte by byte.
    pub async fn raw_device_leg(&self, handshake: &Handshake) -> RawLeg {
        let invitation = &handshake.invitation;
        RawLeg::open(&self.target, &invitation.url, invitation.ticket.expose_secret()).await
    }

    /// `GET` on the admin port.
    pub async fn admin(&self, path: &str) -> Answer {
        admin(self.admin, path).await
    }

    /// What the relay measures now.
    pub async fn metrics(&self) -> Metrics {
        Metrics::parse(&self.admin("/metrics").await.expect(200).text())
    }

    /// Waits until a metric has a value.
    pub async fn counts(&self, name: &str, labels: &[(&str, &str)], value: i64) {
        let what = format!("{name}{labels:?} = {value}");
        eventually(&what, || async { self.metrics().await.count(name, labels) == value }).await;
    }

    /// Checks that nothing is left behind: no leg, no stream, no waiting request, and no connection but those of device links.
    pub async fn assert_quiet(&self) {
        let mut left = String::new();
        let quiet = async {
            loop {
                let metrics = self.metrics().await;
                let public = [("listener", "public")];
                assert!(metrics.has("midspan_listener_connections", &public), "no gauge of connections");
                let links = metrics.count("midspan_control_device_links", &[]);
                let counts = [
                    ("legs", metrics.count("midspan_edge_legs", &[])),
                    ("streams", metrics.count("midspan_edge_streams", &[])),
                    ("waiting requests", metrics.count("midspan_control_waiting_initiations", &[])),
                    ("connections", metrics.count("midspan_listener_connections", &public) - links),
                ];
                if counts.iter().all(|&(_, count)| count == 0) {
                    return;
                }
                left = format!("{counts:?}");
                sleep(Duration::from_millis(20)).await;
            }
        };
        let in_time = tokio::time::timeout(DEADLINE, quiet).await;
        assert!(in_time.is_ok(), "left behind: {left}");
    }

    /// How many tasks the relay runs, one of them for this question.
    pub async fn tasks(&self) -> i64 {
        let metrics = self.metrics().await;
        assert!(metrics.has("midspan_process_tasks", &[]), "no gauge of tasks");
        metrics.count("midspan_process_tasks", &[])
    }

    /// Waits until the relay runs no more tasks, and has no more files and sockets open, than before.
    pub async fn shrinks_to(&self, (tasks, files): (i64, usize)) {
        let (mut left, mut open) = (tasks, files);
        let end = Instant::now() + DEADLINE;
        while Instant::now() < end {
            (left, open) = (self.tasks().await, self.open_files());
            if left <= tasks && open <= files {
                return;
            }
            sleep(Duration::from_millis(50)).await;
        }
        panic!(
            "{left} tasks and {open} files are left, {tasks} and {files} were there before:\n{}",
            self.log()
        );
    }

    /// The relay's resident memory in KiB.
    pub fn resident_kib(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.process.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }

    /// The id of its process.
    pub fn process_id(&self) -> u32 {
        self.process.id()
    }

    /// How many files and sockets the relay has open.
    pub fn open_files(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.process.id())).unwrap().count()
    }

    /// Sends SIGTERM.
    pub fn terminate(&self) {
        self.process.terminate();
    }

    /// Sends SIGKILL, and waits until the process is gone.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// Waits until the relay ends.
    pub async fn wait_exit(&mut self) -> ExitStatus {
        self.process.wait_exit().await
    }

    /// Starts the relay again, on the same public port and with the same data, after its end.
    pub async fn restart(&mut self) {
        self.process = spawn(self.data.path(), &self.target.address.to_string(), &self.arguments);
        (self.target.address, self.admin) = both(&self.process).await;
    }
}

/// `GET` on an admin port, which has no TLS.
pub async fn admin(address: SocketAddr, path: &str) -> Answer {
    within("an answer of the admin port", async {
        let tcp = TcpStream::connect(address).await.unwrap();
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(tcp)).await.unwrap();
        let mut tasks = JoinSet::new();
        tasks.spawn(connection);
        let request =
            Request::get(path).header("host", address.to_string()).body(Empty::<Bytes>::new()).unwrap();
        Answer::read(sender.send_request(request).await.unwrap()).await
    })
    .await
}

fn spawn(data: &Path, listen: &str, arguments: &[String]) -> Process {
    let mut command = binary("midspand");
    command.args(["dev", "--listen", listen, "--admin-listen", "127.0.0.1:0", "--data-dir"]).arg(data);
    command.args(["--log-format", "json", "--log-level", "debug"]).args(arguments);
    Process::spawn(command)
}

async fn both(process: &Process) -> (SocketAddr, SocketAddr) {
    (listening(process, "public").await, listening(process, "admin").await)
}

/// Waits until a server listens, and gives the address of one of its listeners.
pub async fn listening(process: &Process, listener: &str) -> SocketAddr {
    let found = until("the relay listens", || async {
        let log = process.stderr();
        log.lines().filter_map(|line| serde_json::from_str(line).ok()).find_map(|record: Value| {
            let field = |name| record["fields"].get(name).or(record.get(name)).and_then(Value::as_str);
            (field("message") == Some("listening") && field("listener") == Some(listener))
                .then(|| field("address").unwrap().parse().unwrap())
        })
    });
    tokio::select! {
        address = found => address,
        () = until_dead(process) => panic!("midspand ended:\n{}", process.stderr()),
    }
}

/// Comes back when the process is gone, so that a relay that cannot start is not waited for.
async fn until_dead(process: &Process) {
    loop {
        let stat = fs::read_to_string(format!("/proc/{}/stat", process.id())).unwrap_or_default();
        if stat.rsplit_once(')').is_none_or(|(_, rest)| rest.trim_start().starts_with('Z')) {
            return;
        }
        sleep(Duration::from_millis(50)).await;
    }
}
