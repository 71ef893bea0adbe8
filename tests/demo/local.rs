//! What stands behind the device: a line server, and a sink and a source of one file.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Mutex, PoisonError},
    thread,
};

use anyhow::Result;

/// What the sink does wrong.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    None,
    FlipOneByte,
}

/// Where the services listen. Their threads end with the program.
pub(crate) struct LocalServices {
    pub(crate) lines: SocketAddr,
    pub(crate) upload: SocketAddr,
    pub(crate) download: SocketAddr,
}

impl LocalServices {
    pub(crate) fn start(fault: Fault) -> Result<Self> {
        let file: Arc<Mutex<Vec<u8>>> = Arc::default();
        let stored = Arc::clone(&file);
        Ok(Self {
            lines: serve(answer_lines)?,
            upload: serve(move |stream| store(stream, &stored, fault))?,
            download: serve(move |mut stream| {
                stream.write_all(&file.lock().unwrap_or_else(PoisonError::into_inner))
            })?,
        })
    }
}

/// What the line server answers, as an interactive program on a device would.
pub(crate) fn answer_to(line: &str) -> String {
    format!("you said: {line}\n")
}

fn answer_lines(stream: TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    while stream.read_line(&mut line)? > 0 {
        stream.get_mut().write_all(answer_to(line.trim_end()).as_bytes())?;
        line.clear();
    }
    Ok(())
}

/// Takes a file up to the end of the sender's direction, and answers with its digest.
fn store(mut stream: TcpStream, stored: &Mutex<Vec<u8>>, fault: Fault) -> std::io::Result<()> {
    let mut file = Vec::new();
    stream.read_to_end(&mut file)?;
    if fault == Fault::FlipOneByte
        && let Some(byte) = file.get_mut(4711)
    {
        *byte ^= 1;
    }
    let digest = super::digest(&file);
    *stored.lock().unwrap_or_else(PoisonError::into_inner) = file;
    stream.write_all(&digest)
}

fn serve<Answer>(answer: Answer) -> Result<SocketAddr>
where
    Answer: Fn(TcpStream) -> std::io::Result<()> + Send + Sync + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let answer = Arc::new(answer);
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let answer = Arc::clone(&answer);
            // What goes wrong here is seen at the other end of the stream.
            thread::spawn(move || answer(stream));
        }
    });
    Ok(address)
}
