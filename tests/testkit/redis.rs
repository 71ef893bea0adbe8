use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{TcpListener, TcpStream},
    path::PathBuf,
    process::{Child, Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use tempfile::TempDir;

/// How long servers may take to be there and to have found each other, on a machine that is busy.
const START: Duration = Duration::from_secs(30);

/// How long one command may take.
const COMMAND: Duration = Duration::from_secs(5);

/// Starts the program with its arguments, says its process id, and ends it when told to, or with the end of standard input,
/// which comes with the end of the process that holds the other side of the pipe.
const GUARD: &str = r#"folder=$1; shift; redis-server "$@" >"$folder/log" 2>&1 </dev/null & echo $!
read -r order; kill -KILL $! 2>/dev/null; [ "$order" = keep ] || rm -rf "$folder""#;

/// A redis-server, or a sentinel, on a port of its own, with its files in a folder of its own. Nothing is kept over a restart
/// but a Cluster's configuration.
#[derive(Debug)]
pub struct RedisServer {
    port: u16,
    process: u32,
    guard: Child,
    arguments: Vec<String>,
    folder: TempDir,
}

/// Three masters.
#[derive(Debug)]
pub struct RedisCluster {
    /// The servers.
    pub servers: Vec<RedisServer>,
}

/// A master, a replica, and three sentinels that know the master as `midspan`.
#[derive(Debug)]
pub struct RedisSentinels {
    /// Master and replica, as it began.
    pub servers: Vec<RedisServer>,
    /// Who watches them.
    pub sentinels: Vec<RedisServer>,
}

impl RedisServer {
    /// A server with further arguments.
    pub fn start(arguments: &[&str]) -> Self {
        let mut all = vec!["--save", "", "--appendonly", "no", "--bind", "127.0.0.1"];
        all.extend_from_slice(arguments);
        Self::start_program(None, &all)
    }

    fn start_program(configuration: Option<&str>, arguments: &[&str]) -> Self {
        let arguments: Vec<_> = arguments.iter().map(|&argument| argument.to_owned()).collect();
        // Somebody else may take the port first.
        for _ in 0..5 {
            let folder = tempfile::tempdir().unwrap();
            let port = free_port();
            let mut arguments = arguments.clone();
            if let Some(configuration) = configuration {
                let file = folder.path().join("sentinel.conf");
                std::fs::write(&file, configuration).unwrap();
                arguments.insert(0, file.to_str().unwrap().to_owned());
            }
            let (guard, process) = spawn(&folder, port, &arguments);
            let mut server = Self { port, process, guard, arguments, folder };
            if server.is_there() {
                return server;
            }
        }
        panic!("no redis-server starts; is it installed?")
    }

    /// Where it is.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Its `redis://` address.
    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    /// Ends it at once, without a word to its clients.
    pub fn kill(&mut self) {
        self.guard.stdin.take().unwrap().write_all(b"keep\n").unwrap();
        self.guard.wait().unwrap();
    }

    /// Starts it again where it was, with nothing in it.
    pub fn restart(&mut self) {
        (self.guard, self.process) = spawn(&self.folder, self.port, &self.arguments);
        assert!(self.is_there(), "redis-server does not come back");
    }

    /// Lets it do nothing, with its connections open, until it is to go on.
    pub fn pause(&self) {
        signal("STOP", self.process);
    }

    /// Lets it go on.
    pub fn resume(&self) {
        signal("CONT", self.process);
    }

    /// Sends a command, and gives the answer as text, a line for each of its parts; `-` and text for an error.
    pub fn command(&self, words: &[&str]) -> String {
        self.try_command(words).unwrap_or_else(|error| panic!("{words:?}: {error}"))
    }

    fn try_command(&self, words: &[&str]) -> std::io::Result<String> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port))?;
        stream.set_read_timeout(Some(COMMAND))?;
        let parts = words.iter().map(|word| format!("${}\r\n{word}\r\n", word.len()));
        let request = format!("*{}\r\n{}", words.len(), parts.collect::<String>());
        stream.write_all(request.as_bytes())?;
        read_answer(&mut BufReader::new(stream))
    }

    /// Waits until the server that answers on the port is this one.
    fn is_there(&mut self) -> bool {
        let own = format!("process_id:{}\r", self.process);
        let until = Instant::now() + START;
        while Instant::now() < until {
            match self.try_command(&["INFO", "server"]) {
                Ok(answer) if answer.contains(&own) => return true,
                // Without the right to ask, it is there all the same.
                Ok(answer) if answer.starts_with("-NOAUTH") => return true,
                Ok(answer) if answer.contains("process_id:") => return false,
                _ => {}
            }
            let script = format!("kill -0 {} 2>/dev/null", self.process);
            if !Command::new("sh").args(["-c", &script]).status().unwrap().success() {
                return false;
            }
            sleep(Duration::from_millis(20));
        }
        false
    }
}

impl Drop for RedisServer {
    fn drop(&mut self) {
        drop(self.guard.stdin.take());
        let _ = self.guard.wait();
    }
}

impl RedisCluster {
    /// Three masters that share all slots.
    pub fn start() -> Self {
        let servers: Vec<_> = (0..3)
            .map(|_| {
                let bus = free_port().to_string();
                RedisServer::start(&[
                    "--cluster-enabled",
                    "yes",
                    "--cluster-port",
                    &bus,
                    "--cluster-node-timeout",
                    "2000",
                ])
            })
            .collect();
        for (server, (first, last)) in servers.iter().zip([(0, 5460), (5461, 10922), (10923, 16383)]) {
            let answer = server.command(&["CLUSTER", "ADDSLOTSRANGE", &first.to_string(), &last.to_string()]);
            assert_eq!(answer, "OK");
        }
        for (index, server) in servers.iter().enumerate().skip(1) {
            // Each needs an epoch of its own before they meet.
            server.command(&["CLUSTER", "SET-CONFIG-EPOCH", &(index + 1).to_string()]);
            let bus = server.argument("--cluster-port");
            let port = server.port.to_string();
            assert_eq!(servers[0].command(&["CLUSTER", "MEET", "127.0.0.1", &port, &bus]), "OK");
        }
        let cluster = Self { servers };
        wait("the Cluster is complete", || cluster.servers.iter().all(RedisServer::has_cluster));
        cluster
    }

    /// The addresses of all.
    pub fn urls(&self) -> String {
        urls(&self.servers)
    }
}

impl RedisSentinels {
    /// A master, a replica that follows it, and sentinels that agree on it.
    pub fn start() -> Self {
        let master = RedisServer::start(&[]);
        let port = master.port.to_string();
        let replica = RedisServer::start(&["--replicaof", &format!("127.0.0.1 {port}")]);
        let configuration = format!(
            "sentinel monitor midspan 127.0.0.1 {port} 2\nsentinel down-after-milliseconds midspan 500\n\
             sentinel failover-timeout midspan 3000\n"
        );
        let start =
            |_| RedisServer::start_program(Some(&configuration), &["--sentinel", "--bind", "127.0.0.1"]);
        let sentinels: Vec<_> = (0..3).map(start).collect();
        let this = Self { servers: vec![master, replica], sentinels };
        wait("the replica follows, and the sentinels know each other", || {
            this.servers[0].command(&["INFO", "replication"]).contains("state=online")
                && this.sentinels.iter().all(|sentinel| {
                    let known = sentinel.command(&["INFO", "sentinel"]);
                    known.contains("slaves=1") && known.contains("sentinels=3")
                })
        });
        this
    }

    /// The addresses of the sentinels.
    pub fn urls(&self) -> String {
        urls(&self.sentinels)
    }

    /// Which of the servers is the master now, as the sentinels see it.
    pub fn master(&self) -> usize {
        let words = ["SENTINEL", "GET-MASTER-ADDR-BY-NAME", "midspan"];
        let address = self.sentinels[0].command(&words);
        let port = address.lines().last().unwrap().to_owned();
        self.servers.iter().position(|server| server.port.to_string() == port).unwrap()
    }

    /// Makes the sentinels put the replica in the master's place, and waits until it is.
    pub fn fail_over(&self) {
        let before = self.master();
        assert_eq!(self.sentinels[0].command(&["SENTINEL", "FAILOVER", "midspan"]), "OK");
        wait("the replica takes over", || self.master() != before);
    }
}

impl RedisServer {
    fn argument(&self, name: &str) -> String {
        let place = self.arguments.iter().position(|argument| argument == name).unwrap();
        self.arguments[place + 1].clone()
    }

    fn has_cluster(&self) -> bool {
        let answer = self.command(&["CLUSTER", "INFO"]);
        answer.contains("cluster_state:ok") && answer.contains("cluster_known_nodes:3")
    }
}

fn urls(servers: &[RedisServer]) -> String {
    servers.iter().map(RedisServer::url).collect::<Vec<_>>().join(",")
}

fn spawn(folder: &TempDir, port: u16, arguments: &[String]) -> (Child, u32) {
    let path: PathBuf = folder.path().into();
    let mut command = Command::new("sh");
    command.args(["-c", GUARD, "sh"]).arg(&path);
    // A file with the configuration comes first, then everything else.
    let (file, rest) = match arguments.split_first() {
        Some((file, rest)) if !file.starts_with("--") => (Some(file), rest),
        _ => (None, arguments),
    };
    command.args(file).arg("--port").arg(port.to_string()).arg("--dir").arg(&path).args(rest);
    let mut guard = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(guard.stdout.take().unwrap()).read_line(&mut line).unwrap();
    (guard, line.trim().parse().unwrap())
}

fn wait(what: &str, mut done: impl FnMut() -> bool) {
    let until = Instant::now() + START;
    while !done() {
        assert!(Instant::now() < until, "{what}: not within {START:?}");
        sleep(Duration::from_millis(50));
    }
}

fn signal(name: &str, process: u32) {
    let script = format!("kill -{name} {process}");
    assert!(Command::new("sh").args(["-c", &script]).status().unwrap().success(), "{script} failed");
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn read_answer(stream: &mut BufReader<TcpStream>) -> std::io::Result<String> {
    let mut line = String::new();
    if stream.read_line(&mut line)? == 0 {
        return Err(std::io::ErrorKind::UnexpectedEof.into());
    }
    let (kind, text) = line.trim_end().split_at(1);
    Ok(match kind {
        "$" if text == "-1" => String::new(),
        "$" => {
            let length: usize = text.parse().map_err(std::io::Error::other)?;
            let mut bytes = vec![0; length + 2];
            stream.read_exact(&mut bytes)?;
            String::from_utf8_lossy(&bytes[..length]).into_owned()
        }
        "*" => {
            let count = text.parse().unwrap_or(0);
            let parts: std::io::Result<Vec<_>> = (0..count).map(|_| read_answer(stream)).collect();
            parts?.join("\n")
        }
        "-" => line.trim_end().to_owned(),
        _ => text.to_owned(),
    })
}
