//! A web server behind a device, fetched by `curl`.

use std::{fs, io::Write as _, time::Duration};

use testkit::{Midspan, Process, Relay, pattern, until};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};

use crate::tools;

const FETCHES: usize = 1000;
const AT_ONCE: usize = 50;

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_pages_arrive_complete_fifty_at_a_time() {
    let Some(curl) = tools::program("curl") else { return };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let server = listener.local_addr().unwrap();
    let mut tasks = JoinSet::new();
    tasks.spawn(serve(listener));

    let relay = Relay::with(&["--limit-initiations-per-second", "10000"]).await;
    let _device = Midspan::device(&relay, &["--allow", &format!("web={server}")]).await;
    let service = Midspan::service(&relay, &["connect", "dev1", "web", "-L", "127.0.0.1:0"]);
    let port = local_address(&service).await;

    let pages = tempfile::tempdir().unwrap();
    let list = pages.path().join("list");
    let mut lines = fs::File::create(&list).unwrap();
    for number in 0..FETCHES {
        let page = pages.path().join(number.to_string());
        writeln!(lines, "url = \"http://{port}/{number}\"\noutput = \"{}\"", page.display()).unwrap();
    }
    let mut command = std::process::Command::new(curl);
    command.args([
        "--fail",
        "--silent",
        "--show-error",
        "--no-progress-meter",
        "--noproxy",
        "*",
        "--parallel",
    ]);
    command.args(["--parallel-max", &AT_ONCE.to_string(), "--max-time", "100", "--config"]).arg(&list);
    let mut fetches = Process::spawn(command);
    tools::succeeds("curl", &mut fetches, Duration::from_secs(120)).await;

    for number in 0..FETCHES {
        let page = fs::read(pages.path().join(number.to_string())).unwrap();
        assert!(page == body(number), "page {number} is another: {} bytes", page.len());
    }
    // Each page came through a stream of its own, and each stream has ended.
    relay.assert_quiet().await;
}

/// The local port of a `midspan connect -L`, once it listens.
pub(crate) async fn local_address(service: &Process) -> String {
    until("the local port", || async {
        let log = service.stderr();
        let (_, rest) = log.split_once("listening on ")?;
        let (address, _) = rest.split_once(|c: char| c.is_whitespace())?;
        Some(address.to_owned())
    })
    .await
}

async fn serve(listener: TcpListener) {
    let mut tasks = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        tasks.spawn(answer(stream));
        while tasks.try_join_next().is_some() {}
    }
}

/// Answers one request, and closes the connection: so every page needs a stream of its own.
async fn answer(stream: TcpStream) -> std::io::Result<()> {
    let mut stream = BufReader::new(stream);
    let mut request = String::new();
    stream.read_line(&mut request).await?;
    let mut field = String::new();
    while stream.read_line(&mut field).await? > 2 {
        field.clear();
    }
    let number = request.split(' ').nth(1).and_then(|path| path.strip_prefix('/')?.parse().ok());
    let (status, body) = number.map_or(("404 Not Found", Vec::new()), |number| ("200 OK", body(number)));
    let head = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(&body).await?;
    stream.shutdown().await
}

/// Pages of 0 to about 70 KiB, each another.
fn body(number: usize) -> Vec<u8> {
    let mut body = pattern(number * 71);
    body.rotate_left(number);
    body
}
