//! The handshake of a session, over rustls' unbuffered API.

use std::{io, sync::Arc};

use rustls::{
    CipherSuite, ClientConfig, Error, ExtractedSecrets, ServerConfig, SupportedCipherSuite,
    client::{ClientConnectionData, UnbufferedClientConnection},
    pki_types::ServerName,
    server::{ServerConnectionData, UnbufferedServerConnection},
    unbuffered::{ConnectionState, EncodeError, EncodeTlsData, InsufficientSizeError, UnbufferedStatus},
};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    runtime::Handle,
    sync::{Semaphore, SemaphorePermit},
    task::yield_now,
};

use super::{
    secrets::Secrets,
    session::{End, HEADER, Session, record},
};

/// Where the length of the session id stands in the record of a `ClientHello`: after the type and the length of the message,
/// the version and the random bytes.
const HELLO_SESSION_ID: usize = HEADER + 1 + 3 + 2 + 32;

/// What is read at once, in bytes: a `ClientHello` with a share for a post-quantum key exchange has less.
const READ: usize = 2048;

/// Whose turn it is to do the costly step of a handshake, on the threads of one runtime.
///
/// A handshake keeps a processor busy for 100 microseconds and more. Between two of them everything else that is ready on
/// the thread gets its turn, so that many strangers at once do not hold up the streams there.
#[derive(Debug)]
pub struct Turns(Semaphore);

impl Turns {
    /// For the runtime of the caller.
    pub fn here() -> Self {
        Self::new(Handle::current().metrics().num_workers())
    }

    pub(super) fn new(threads: usize) -> Self {
        Self(Semaphore::new(threads))
    }

    /// Waits for a turn.
    async fn take(&self) -> Option<SemaphorePermit<'_>> {
        // It is never closed.
        self.0.acquire().await.ok()
    }
}

/// What a handshake ends with.
pub(super) struct Done {
    pub(super) session: Session,
    /// What has come after it.
    pub(super) incoming: Vec<u8>,
    /// What is still to be sent.
    pub(super) outgoing: Vec<u8>,
}

/// Does the server's part of the handshake on `socket`, of which `incoming` has been read already.
///
/// Fails when the peer makes a mistake, which it is told, or ends the connection. `config` must be made by `configure_for`.
pub(super) async fn accept<S: AsyncRead + AsyncWrite + Unpin>(
    socket: &mut S,
    config: Arc<ServerConfig>,
    turns: &Turns,
    mut incoming: Vec<u8>,
) -> io::Result<Done> {
    // The library sees one record after the other, so that it opens none that comes after the handshake.
    let seen = receive(socket, &mut incoming, 0).await?;
    let config = for_client(config, &incoming[..seen]);
    let turn = turns.take().await;
    let connection = UnbufferedServerConnection::new(config).map_err(broken)?;
    negotiate(connection, socket, incoming, seen, turn).await
}

/// Does the client's part, with a server that is to prove that it is `name`.
///
/// Fails like [`accept`]. `config` must be made by `configure_client`.
pub(super) async fn connect<S: AsyncRead + AsyncWrite + Unpin>(
    socket: &mut S,
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
) -> io::Result<Done> {
    let connection = UnbufferedClientConnection::new(config, name).map_err(broken)?;
    negotiate(connection, socket, Vec::new(), 0, None).await
}

/// `seen` bytes of `incoming` are whole records.
async fn negotiate<S: AsyncRead + AsyncWrite + Unpin, C: Connection>(
    mut connection: C,
    socket: &mut S,
    mut incoming: Vec<u8>,
    mut seen: usize,
    mut turn: Option<SemaphorePermit<'_>>,
) -> io::Result<Done> {
    let (mut outgoing, mut secrets) = (Vec::new(), None);
    loop {
        let (discard, step) = process(&mut connection, &mut incoming[..seen], &mut outgoing);
        secrets = Secrets::take(C::END).or(secrets);
        incoming.drain(..discard);
        seen -= discard;
        match step {
            Step::Process => {}
            Step::Read => {
                send(socket, &mut outgoing).await?;
                // What is left to do is little.
                if let Some(turn) = turn.take() {
                    yield_now().await;
                    drop(turn);
                }
                seen = receive(socket, &mut incoming, seen).await?;
            }
            Step::Done => {
                let (keys, suite) = connection.finish().map_err(broken)?;
                // A client of TLS 1.2 waits for the end of the handshake; one of TLS 1.3 has it, and gets tickets. The end
                // of a client's own handshake goes with its first payload.
                if suite.tls13().is_none() {
                    send(socket, &mut outgoing).await?;
                }
                outgoing.shrink_to_fit();
                let session = Session::new(C::END, suite, keys, secrets).map_err(broken)?;
                return Ok(Done { session, incoming, outgoing });
            }
            Step::Failed(error) => {
                // The peer is told why, if it still listens.
                let _ = send(socket, &mut outgoing).await;
                return Err(broken(error));
            }
        }
    }
}

/// The library's connection, of either end.
trait Connection {
    type Data;
    const END: End;

    fn process<'a>(&'a mut self, records: &'a mut [u8]) -> UnbufferedStatus<'a, 'a, Self::Data>;

    fn finish(self) -> Result<(ExtractedSecrets, SupportedCipherSuite), Error>;
}

impl Connection for UnbufferedServerConnection {
    type Data = ServerConnectionData;
    const END: End = End::Server;

    fn process<'a>(&'a mut self, records: &'a mut [u8]) -> UnbufferedStatus<'a, 'a, Self::Data> {
        self.process_tls_records(records)
    }

    fn finish(self) -> Result<(ExtractedSecrets, SupportedCipherSuite), Error> {
        let (keys, connection) = self.dangerous_into_kernel_connection()?;
        Ok((keys, connection.negotiated_cipher_suite()))
    }
}

impl Connection for UnbufferedClientConnection {
    type Data = ClientConnectionData;
    const END: End = End::Client;

    fn process<'a>(&'a mut self, records: &'a mut [u8]) -> UnbufferedStatus<'a, 'a, Self::Data> {
        self.process_tls_records(records)
    }

    fn finish(self) -> Result<(ExtractedSecrets, SupportedCipherSuite), Error> {
        let (keys, connection) = self.dangerous_into_kernel_connection()?;
        Ok((keys, connection.negotiated_cipher_suite()))
    }
}

/// Reads until the record that begins at `start` is whole, and gives its end.
async fn receive<S: AsyncRead + Unpin>(
    socket: &mut S,
    incoming: &mut Vec<u8>,
    start: usize,
) -> io::Result<usize> {
    loop {
        let kept = incoming.len() - start;
        let missing = match record(&incoming[start..]) {
            Ok(Some((_, size))) if size <= kept => return Ok(start + size),
            Ok(Some((_, size))) => size - kept,
            Ok(None) => READ,
            // The library is to judge what is no record.
            Err(_) => return Ok(incoming.len()),
        };
        incoming.reserve(missing);
        if socket.read_buf(incoming).await? == 0 {
            return Err(truncated());
        }
    }
}

/// The configuration for the client whose first record this is: one that puts `ChaCha20` first, as devices without
/// instructions for AES do, gets it (as with OpenSSL's `SSL_OP_PRIORITIZE_CHACHA`), whatever the server's order.
pub(super) fn for_client(mut config: Arc<ServerConfig>, hello: &[u8]) -> Arc<ServerConfig> {
    let supported = &config.crypto_provider().cipher_suites;
    let first = offered(hello).find(|suite| supported.iter().any(|supported| supported.suite() == *suite));
    let chacha20 = matches!(
        first,
        Some(
            CipherSuite::TLS13_CHACHA20_POLY1305_SHA256
                | CipherSuite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256
                | CipherSuite::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256
        )
    );
    if chacha20 && config.ignore_client_order {
        Arc::make_mut(&mut config).ignore_client_order = false;
    }
    config
}

/// The cipher suites that a `ClientHello` offers, as far as they stand in its first record; none when it is something
/// else, which the library is to judge (RFC 8446, section 4.1.2).
fn offered(hello: &[u8]) -> impl Iterator<Item = CipherSuite> {
    let suites = || {
        let (session_id, rest) = hello.get(HELLO_SESSION_ID..)?.split_first()?;
        let (size, rest) = rest.get(usize::from(*session_id)..)?.split_first_chunk()?;
        Some(&rest[..rest.len().min(usize::from(u16::from_be_bytes(*size)))])
    };
    let (suites, _) = suites().unwrap_or_default().as_chunks();
    suites.iter().map(|suite| CipherSuite::from(u16::from_be_bytes(*suite)))
}

enum Step {
    Process,
    Read,
    Done,
    Failed(Error),
}

/// Lets the library look at `records`, and appends what it says to `outgoing`. Says how many bytes of `records` are used
/// up.
fn process<C: Connection>(connection: &mut C, records: &mut [u8], outgoing: &mut Vec<u8>) -> (usize, Step) {
    let size = records.len();
    let UnbufferedStatus { discard, state } = connection.process(records);
    let step = match state {
        Ok(ConnectionState::EncodeTlsData(data)) => {
            encode(data, outgoing);
            Step::Process
        }
        // It stands in `outgoing`, and leaves before anything else is read.
        Ok(ConnectionState::TransmitTlsData(data)) => {
            data.done();
            Step::Process
        }
        Ok(ConnectionState::BlockedHandshake) => Step::Read,
        // Bytes that are left would be the start of a message under keys that are no longer in use.
        Ok(ConnectionState::WriteTraffic(_)) if discard == size => Step::Done,
        Ok(_) => Step::Failed(Error::HandshakeNotComplete),
        Err(error) => {
            // Its alert, which comes before the library looks at anything else; what it has not discarded must be there still.
            if let Ok(ConnectionState::EncodeTlsData(data)) =
                connection.process(&mut records[discard..]).state
            {
                encode(data, outgoing);
            }
            Step::Failed(error)
        }
    };
    (discard, step)
}

fn encode<Data>(mut data: EncodeTlsData<'_, Data>, outgoing: &mut Vec<u8>) {
    if let Err(EncodeError::InsufficientSize(InsufficientSizeError { required_size })) = data.encode(&mut [])
    {
        let start = outgoing.len();
        outgoing.resize(start + required_size, 0);
        let size = data.encode(&mut outgoing[start..]).unwrap_or(0);
        outgoing.truncate(start + size);
    }
}

async fn send<S: AsyncWrite + Unpin>(socket: &mut S, outgoing: &mut Vec<u8>) -> io::Result<()> {
    socket.write_all(outgoing).await?;
    outgoing.clear();
    socket.flush().await
}

pub(super) fn broken(error: Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

/// The connection ended without `close_notify`, so that the end may be somebody else's doing (RFC 8446, section 6.1).
pub(super) fn truncated() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "the connection ended without the end of its TLS session")
}
