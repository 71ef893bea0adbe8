//! fastwebsockets: each frame is read whole and written again.

use std::{convert::Infallible, future, pin::pin, sync::Arc};

use anyhow::{Context as _, bail};
use clap::Args;
use fastwebsockets::{
    Frame, OpCode, Role, WebSocketError, WebSocketRead, WebSocketWrite, after_handshake_split,
};
use futures_util::future::poll_immediate;
use tokio::{
    io::{AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, BufWriter},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_util::task::TaskTracker;

use crate::pairing::Pairing;

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Collect output in a buffer of 64 KiB, and write it when it is full or no frame is waiting
    #[arg(long)]
    batch: bool,
}

const BATCH: usize = 64 << 10;
/// The largest messages of the measurements are beyond its own limit.
const MAX_MESSAGE: usize = 1 << 30;
const MAX_HEADER: usize = 8 << 10;

pub(crate) async fn serve(listener: TcpListener, arguments: Arguments) -> anyhow::Result<()> {
    let tasks = TaskTracker::new();
    let pairing = Arc::new(Pairing::new());
    loop {
        let (mut socket, _) = listener.accept().await?;
        socket.set_nodelay(true)?;
        let (pairing, inner) = (Arc::clone(&pairing), tasks.clone());
        tasks.spawn(async move {
            let Ok(path) = upgrade(&mut socket).await else { return };
            if let Some((one, other)) = pairing.join(&path, socket) {
                let (one_in, one_out) = one.into_split();
                let (other_in, other_out) = other.into_split();
                inner.spawn(copy(one_in, other_out, arguments.batch));
                inner.spawn(copy(other_in, one_out, arguments.batch));
            }
        });
    }
}

/// Answers the upgrade by hand, which leaves the library with the bare socket, its fastest way.
async fn upgrade(socket: &mut TcpStream) -> anyhow::Result<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        if head.len() > MAX_HEADER || socket.read_buf(&mut head).await? == 0 {
            bail!("no request");
        }
    }
    let head = String::from_utf8(head)?;
    let path = head.split(' ').nth(1).context("no path")?;
    let key = head
        .lines()
        .filter_map(|line| line.split_once(':'))
        .find_map(|(name, value)| name.eq_ignore_ascii_case("sec-websocket-key").then(|| value.trim()))
        .context("no key")?;
    let accept = derive_accept_key(key.as_bytes());
    let answer = format!(
        "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: {accept}\r\n\r\n"
    );
    socket.write_all(answer.as_bytes()).await?;
    Ok(path.to_owned())
}

async fn copy(from: OwnedReadHalf, to: OwnedWriteHalf, batch: bool) {
    // An end, clean or not, has nothing more to say.
    let _: Result<(), WebSocketError> = if batch {
        let (from, to) = after_handshake_split(from, BufWriter::with_capacity(BATCH, to), Role::Server);
        relay_batched(from, to).await
    } else {
        let (from, to) = after_handshake_split(from, to, Role::Server);
        relay(from, to).await
    };
}

async fn relay(
    mut from: WebSocketRead<OwnedReadHalf>,
    mut to: WebSocketWrite<OwnedWriteHalf>,
) -> Result<(), WebSocketError> {
    configure(&mut from);
    loop {
        let frame = from.read_frame(&mut nothing).await?;
        if write(&mut to, frame).await? {
            return Ok(());
        }
    }
}

async fn relay_batched(
    mut from: WebSocketRead<OwnedReadHalf>,
    mut to: WebSocketWrite<BufWriter<OwnedWriteHalf>>,
) -> Result<(), WebSocketError> {
    configure(&mut from);
    loop {
        let frame = {
            let mut sender = nothing;
            let mut next = pin!(from.read_frame(&mut sender));
            match poll_immediate(&mut next).await {
                Some(frame) => frame?,
                None => {
                    to.flush().await?;
                    next.await?
                }
            }
        };
        if write(&mut to, frame).await? {
            return to.flush().await;
        }
    }
}

/// Pings and closes travel on like everything else, so reading has nothing to send by itself.
fn configure(from: &mut WebSocketRead<OwnedReadHalf>) {
    from.set_auto_close(false);
    from.set_auto_pong(false);
    from.set_max_message_size(MAX_MESSAGE);
}

fn nothing(_: Frame<'_>) -> future::Ready<Result<(), Infallible>> {
    future::ready(Ok(()))
}

/// Sends a frame on without its mask; whether it was the last one.
async fn write<W: AsyncWrite + Unpin>(
    to: &mut WebSocketWrite<W>,
    frame: Frame<'_>,
) -> Result<bool, WebSocketError> {
    let last = frame.opcode == OpCode::Close;
    to.write_frame(Frame::new(frame.fin, frame.opcode, None, frame.payload)).await?;
    Ok(last)
}
