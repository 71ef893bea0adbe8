//! TLS records, opened where they were read to and sealed where they are written from.
//!
//! A generator that costs more than the relay takes the processor and its caches away from it. So this does what the traffic
//! here needs, and no more: TLS 1.3 with AES-GCM, after rustls has done the handshake.

use std::{
    cell::Cell,
    fmt,
    io::{self, ErrorKind, Write},
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use aws_lc_rs::aead::{
    AES_128_GCM, AES_256_GCM, Aad, Algorithm, LessSafeKey, MAX_TAG_LEN, Nonce, UnboundKey,
};
use rustls::{Connection, ConnectionTrafficSecrets, ProtocolVersion, crypto::cipher::Iv};

/// Type, version and length.
const HEADER: usize = 5;
/// The most payload of a record, in bytes (RFC 8446, section 5.1).
const PAYLOAD: usize = 16 << 10;
/// The longest record, in bytes (RFC 8446, section 5.2).
pub(crate) const RECORD: usize = HEADER + PAYLOAD + 256;
/// What a record has beside payload: the header, its true type, and the tag.
const OVERHEAD: usize = HEADER + 1 + MAX_TAG_LEN;

/// What records hold; the last is what every one that is sealed passes itself off as.
const ALERT: u8 = 21;
const HANDSHAKE: u8 = 22;
const APPLICATION_DATA: u8 = 23;

/// What an alert says at the end, and the first byte of a message with a ticket for a later connection.
const CLOSE_NOTIFY: u8 = 0;
const TICKET: u8 = 4;

thread_local! {
    /// Memory for records that are to be sent: what was written last from it is still in the processor's caches.
    static SPARE: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// Both directions of a connection.
pub(crate) struct Records {
    opening: Direction,
    sealing: Direction,
    /// The start of a record that is not whole.
    unopened: Vec<u8>,
    /// Records that are being sent, and how much of them is.
    sealed: Vec<u8>,
    sent: usize,
}

struct Direction {
    key: LessSafeKey,
    iv: Iv,
    records: u64,
}

impl Records {
    /// What follows a handshake that is done.
    pub(crate) fn after(handshake: Connection) -> Result<Self> {
        ensure!(
            handshake.protocol_version() == Some(ProtocolVersion::TLSv1_3),
            "the relay chose an old version of TLS"
        );
        let secrets = handshake.dangerous_extract_secrets()?;
        Ok(Self {
            opening: Direction::new(secrets.rx)?,
            sealing: Direction::new(secrets.tx)?,
            unopened: Vec::new(),
            sealed: Vec::new(),
            sent: 0,
        })
    }

    /// Seals `payload`. What was sealed before must have been sent.
    pub(crate) fn seal(&mut self, payload: &[u8]) -> io::Result<()> {
        let mut sealed = SPARE.take();
        sealed.clear();
        sealed.reserve(payload.len() + payload.len().div_ceil(PAYLOAD) * (RECORD - PAYLOAD));
        for payload in payload.chunks(PAYLOAD) {
            let start = sealed.len();
            let header = header(payload.len() + 1 + MAX_TAG_LEN);
            sealed.extend_from_slice(&header);
            sealed.extend_from_slice(payload);
            sealed.push(APPLICATION_DATA);
            let nonce = self.sealing.nonce();
            let content = &mut sealed[start + HEADER..];
            let tag = self.sealing.key.seal_in_place_separate_tag(nonce, Aad::from(header), content);
            sealed.extend_from_slice(tag.map_err(io::Error::other)?.as_ref());
        }
        (self.sealed, self.sent) = (sealed, 0);
        Ok(())
    }

    /// Sends what is sealed; whether nothing is left.
    pub(crate) fn send(&mut self, socket: &mut impl Write) -> io::Result<bool> {
        while self.sent < self.sealed.len() {
            match socket.write(&self.sealed[self.sent..]) {
                Ok(sent) => self.sent += sent,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        if self.sent > 0 {
            SPARE.set(std::mem::take(&mut self.sealed));
            self.sent = 0;
        }
        Ok(true)
    }

    /// Puts what is left of the last read to the start of `buffer`, which is longer than a record; how long that is.
    pub(crate) fn resume(&self, buffer: &mut [u8]) -> usize {
        buffer[..self.unopened.len()].copy_from_slice(&self.unopened);
        self.unopened.len()
    }

    /// Opens what stands in `buffer`; the payload of each record goes to `take`.
    pub(crate) fn open(
        &mut self,
        buffer: &mut [u8],
        mut take: impl FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        let mut at = 0;
        while let Some(length) = length(&buffer[at..])? {
            match self.opening.open(&mut buffer[at..at + length])? {
                (APPLICATION_DATA, payload) => take(payload)?,
                // The end of the connection follows the alert.
                (HANDSHAKE, [TICKET, ..]) | (ALERT, [_, CLOSE_NOTIFY]) => {}
                other => bail!("a record that nobody here expects: {other:?}"),
            }
            at += length;
        }
        self.keep(&buffer[at..]);
        Ok(())
    }

    /// Says how long the payload in `buffer` is. Opens the first record, and takes all others for payload without padding.
    pub(crate) fn count(&mut self, buffer: &mut [u8]) -> Result<usize> {
        let (mut at, mut payload) = (0, 0);
        while let Some(length) = length(&buffer[at..])? {
            let plain = length.checked_sub(OVERHEAD).context("a record that is too short")?;
            if at == 0 {
                let (typ, opened) = self.opening.open(&mut buffer[..length])?;
                ensure!(typ == APPLICATION_DATA && opened.len() == plain, "a record that is not all payload");
            } else {
                self.opening.records += 1;
            }
            payload += plain;
            at += length;
        }
        self.keep(&buffer[at..]);
        Ok(payload)
    }

    fn keep(&mut self, rest: &[u8]) {
        self.unopened.clear();
        self.unopened.extend_from_slice(rest);
    }
}

/// The length of the first record, if all of it is there.
fn length(records: &[u8]) -> Result<Option<usize>> {
    let Some(&[typ, _, _, high, low]) = records.first_chunk() else { return Ok(None) };
    let length = HEADER + usize::from(u16::from_be_bytes([high, low]));
    ensure!(typ == APPLICATION_DATA && length <= RECORD, "not a record of type {typ} and {length} bytes");
    Ok((length <= records.len()).then_some(length))
}

impl fmt::Debug for Records {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Records").finish_non_exhaustive()
    }
}

impl Direction {
    fn new((records, secrets): (u64, ConnectionTrafficSecrets)) -> Result<Self> {
        let (algorithm, key, iv): (&Algorithm, _, _) = match secrets {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (&AES_128_GCM, key, iv),
            ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (&AES_256_GCM, key, iv),
            ConnectionTrafficSecrets::Chacha20Poly1305 { .. } | _ => {
                bail!("the relay chose a cipher that is not AES-GCM")
            }
        };
        let key = UnboundKey::new(algorithm, key.as_ref())?;
        Ok(Self { key: LessSafeKey::new(key), iv, records })
    }

    /// What a record says that it holds, and that.
    fn open<'a>(&mut self, record: &'a mut [u8]) -> Result<(u8, &'a [u8])> {
        let nonce = self.nonce();
        let (header, content) = record.split_first_chunk_mut::<HEADER>().context("half a header")?;
        let opened = self.key.open_in_place(nonce, Aad::from(*header), content);
        let opened: &[u8] = opened.map_err(|_| anyhow!("a record that cannot be opened"))?;
        // The type stands before padding.
        let end = opened.iter().rposition(|&byte| byte != 0).context("a record of nothing but padding")?;
        Ok((opened[end], &opened[..end]))
    }

    /// For the next record (RFC 8446, section 5.3).
    fn nonce(&mut self) -> Nonce {
        let nonce = rustls::crypto::cipher::Nonce::new(&self.iv, self.records);
        self.records += 1;
        Nonce::assume_unique_for_key(nonce.0)
    }
}

fn header(length: usize) -> [u8; HEADER] {
    let [.., high, low] = length.to_be_bytes();
    [APPLICATION_DATA, 3, 3, high, low]
}

#[cfg(test)]
mod tests {
    use std::{net::TcpListener, thread};

    use super::*;
    use crate::{connection, tls::Certificate};

    /// The two ends of one connection.
    fn ends() -> [Records; 2] {
        let folder = tempfile::tempdir().unwrap();
        let certificate = Certificate::new(folder.path()).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        thread::scope(|scope| {
            let accepting = scope.spawn(|| {
                let mut server =
                    connection::Connection::accept(&listener, Some(&certificate.server)).unwrap();
                server.handshake().unwrap();
                server
            });
            let mut client = connection::Connection::open(address, Some(&certificate.client)).unwrap();
            client.handshake().unwrap();
            [client, accepting.join().unwrap()].map(|end| end.into_records().unwrap())
        })
    }

    fn seal(end: &mut Records, payload: &[u8]) -> Vec<u8> {
        let mut wire = Vec::new();
        end.seal(payload).unwrap();
        assert!(end.send(&mut wire).unwrap());
        wire
    }

    /// Feeds `wire` in pieces, and says what `take` made of each.
    fn read<T>(
        end: &mut Records,
        wire: &[u8],
        cut: usize,
        mut take: impl FnMut(&mut Records, &mut [u8]) -> T,
    ) -> Vec<T> {
        let mut buffer = vec![0; RECORD + cut];
        let pieces = wire.chunks(cut).map(|piece| {
            let kept = end.resume(&mut buffer);
            buffer[kept..kept + piece.len()].copy_from_slice(piece);
            take(end, &mut buffer[..kept + piece.len()])
        });
        pieces.collect()
    }

    #[test]
    fn what_is_sealed_is_opened_or_counted_however_it_is_cut() {
        let [mut client, mut server] = ends();
        let payload: Vec<u8> = (0..=u8::MAX).cycle().take(50_000).collect();
        for cut in [1000, 20_000, 60_000] {
            let wire = seal(&mut client, &payload);
            let mut opened = Vec::new();
            read(&mut server, &wire, cut, |server, bytes| {
                server.open(bytes, |payload| {
                    opened.extend_from_slice(payload);
                    Ok(())
                })
            })
            .into_iter()
            .collect::<Result<()>>()
            .unwrap();
            assert!(opened == payload, "cut into {cut}");
            // Records that were counted do not get in the way of those that are opened next.
            let wire = seal(&mut client, &payload);
            let counted: Result<Vec<usize>> =
                read(&mut server, &wire, cut, Records::count).into_iter().collect();
            assert_eq!(counted.unwrap().iter().sum::<usize>(), payload.len(), "cut into {cut}");
        }
    }

    #[test]
    fn what_was_changed_or_lost_is_noticed() {
        let payload = vec![7; 40_000];
        for (at, why) in [(2000, "a byte of the first record"), (0, "a type")] {
            let [mut client, mut server] = ends();
            let mut wire = seal(&mut client, &payload);
            wire[at] ^= 1;
            assert!(server.count(&mut wire).is_err(), "{why}");
        }
        let [mut client, mut server] = ends();
        seal(&mut client, &payload);
        assert!(server.count(&mut seal(&mut client, &payload)).is_err(), "records before these are missing");
    }
}
