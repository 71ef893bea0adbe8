//! The name that a client asks for (RFC 6066, section 3), before anybody has answered.

use std::io;

use rustls::server::Acceptor;
use tokio::io::{AsyncRead, AsyncReadExt as _};

use super::handshake::truncated;

/// A `ClientHello` is looked at up to about this length, in bytes: ten times what clients send.
const HELLO_MAX: usize = 16 * 1024;

/// What is read at once, in bytes.
const READ: usize = 2048;

/// Reads a `ClientHello`, appends it to `read`, and gives the host name that it asks for.
///
/// `None` where there is no name, or no hello that could be understood: whoever does the handshake then says so to the client.
/// Fails when the connection does.
pub(crate) async fn asked_name<S: AsyncRead + Unpin>(
    socket: &mut S,
    read: &mut Vec<u8>,
) -> io::Result<Option<String>> {
    let mut acceptor = Acceptor::default();
    while read.len() < HELLO_MAX {
        let kept = read.len();
        read.reserve_exact(READ);
        if socket.read_buf(read).await? == 0 {
            return Err(truncated());
        }
        let mut new = &read[kept..];
        while !new.is_empty() {
            if acceptor.read_tls(&mut new).is_err() {
                return Ok(None);
            }
            match acceptor.accept() {
                Ok(None) => {}
                Ok(Some(accepted)) => return Ok(accepted.client_hello().server_name().map(str::to_owned)),
                Err(_) => return Ok(None),
            }
        }
    }
    Ok(None)
}
