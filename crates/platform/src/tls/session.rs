//! One TLS session after its handshake: the library's ciphers, and what little of the protocol is left.
//!
//! rustls does the handshake, derives its keys and opens and seals every record; it hands over the keys for that purpose
//! ([`rustls::kernel`]). Its own connection would copy each record once more in both directions, and keep the state of
//! the handshake for good.

use rustls::{
    AlertDescription, ConnectionTrafficSecrets, ContentType, Error, ExtractedSecrets, HandshakeType,
    InvalidMessage, PeerMisbehaved, ProtocolVersion, SupportedCipherSuite,
    crypto::cipher::{
        AeadKey, InboundOpaqueMessage, Iv, MessageDecrypter, MessageEncrypter, OutboundChunks,
        OutboundPlainMessage,
    },
    crypto::tls13::OkmBlock,
};

use super::secrets::{Secrets, update};
use crate::{copy::COPY, unsent::Unsent};

/// The type, the version and the length that stand before each record, in bytes.
pub(super) const HEADER: usize = 5;

/// The most payload of one record, in bytes (RFC 8446, section 5.1).
pub(super) const PAYLOAD_MAX: usize = 16 * 1024;

/// The most payload of a record of ours, in bytes: with what is around it, it takes 16 KiB of memory, and what takes a
/// little more than a power of two takes a quarter more of an allocator's.
pub(crate) const SEALED_MAX: usize = PAYLOAD_MAX - 32;

/// The longest record, with what a cipher of TLS 1.2 may add (RFC 5246, section 6.2.3), in bytes.
pub(super) const RECORD_MAX: usize = HEADER + PAYLOAD_MAX + 2048;

/// How many records without payload in a row, key updates without payload between them, and warnings a peer may send: as
/// many as rustls allows.
const EMPTY_MAX: u8 = 32;
const KEY_UPDATES_MAX: u8 = 32;
const WARNINGS_MAX: u8 = 4;

const ALERT_WARNING: u8 = 1;
const ALERT_FATAL: u8 = 2;

const KEY_UPDATE: usize = 5;

/// Which end of a session this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    Client,
    Server,
}

/// The ciphers of a session and the state of its keys.
pub(super) struct Session {
    end: End,
    suite: SupportedCipherSuite,
    /// What TLS 1.3 makes new keys of, for which TLS 1.2 has no means.
    secrets: Option<Secrets>,
    opener: Box<dyn MessageDecrypter>,
    opened: u64,
    sealer: Box<dyn MessageEncrypter>,
    sealed: u64,
    /// How many records one key may seal.
    sealed_max: u64,
    /// The start of a message of the handshake protocol that goes on in the next record.
    message: Box<[u8]>,
    empty: u8,
    key_updates: u8,
    warnings: u8,
}

/// What a record held.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Opened<'a> {
    Payload(&'a [u8]),
    /// The peer sends with new keys from here on, and may want us to do so, too.
    KeyUpdate {
        requested: bool,
    },
    /// The peer sends nothing more.
    Closed,
    /// Nothing that matters.
    Nothing,
}

/// Why a session cannot go on, and what the peer is told of it, if anything.
#[derive(Debug)]
pub(super) struct Fatal {
    pub(super) alert: Option<AlertDescription>,
    pub(super) error: Error,
}

impl Fatal {
    fn new(alert: AlertDescription, error: impl Into<Error>) -> Self {
        Self { alert: Some(alert), error: error.into() }
    }
}

impl From<PeerMisbehaved> for Fatal {
    fn from(error: PeerMisbehaved) -> Self {
        Self::new(AlertDescription::UnexpectedMessage, error)
    }
}

impl From<InvalidMessage> for Fatal {
    fn from(error: InvalidMessage) -> Self {
        Self::new(AlertDescription::DecodeError, error)
    }
}

impl From<Error> for Fatal {
    fn from(error: Error) -> Self {
        let alert = if error == Error::DecryptError {
            AlertDescription::BadRecordMac
        } else if error == Error::PeerSentOversizedRecord {
            AlertDescription::RecordOverflow
        } else if matches!(error, Error::PeerMisbehaved(_)) {
            AlertDescription::UnexpectedMessage
        } else {
            AlertDescription::InternalError
        };
        Self::new(alert, error)
    }
}

impl Session {
    /// Makes one of the keys that a handshake ended with, and the secrets that they came from.
    pub(super) fn new(
        end: End,
        suite: SupportedCipherSuite,
        keys: ExtractedSecrets,
        secrets: Option<Secrets>,
    ) -> Result<Self, Error> {
        let (opened, opening) = keys.rx;
        let (sealed, sealing) = keys.tx;
        Ok(Self {
            end,
            opener: decrypter(suite, opening)?,
            opened,
            sealer: encrypter(suite, sealing, sealed)?,
            sealed,
            sealed_max: common(suite).confidentiality_limit,
            suite,
            secrets,
            message: Box::default(),
            empty: 0,
            key_updates: 0,
            warnings: 0,
        })
    }

    fn is_tls13(&self) -> bool {
        self.suite.tls13().is_some()
    }

    /// Opens the first of `records` in place, and says how long it was; `None` while it is not whole.
    pub(super) fn open<'a>(&mut self, records: &'a mut [u8]) -> Result<Option<(usize, Opened<'a>)>, Fatal> {
        let Some((typ, size)) = record(records)? else { return Ok(None) };
        // After the handshake nobody changes ciphers, and TLS 1.3 passes all that it says off as payload.
        if typ == ContentType::ChangeCipherSpec || (self.is_tls13() && typ != ContentType::ApplicationData) {
            return Err(PeerMisbehaved::IllegalMiddleboxChangeCipherSpec.into());
        }
        if records.len() < size {
            return Ok(None);
        }
        let version = ProtocolVersion::from(u16::from_be_bytes([records[1], records[2]]));
        let sealed = InboundOpaqueMessage::new(typ, version, &mut records[HEADER..size]);
        let record = self.opener.decrypt(sealed, self.opened)?;
        self.opened += 1;
        let opened = self.take(record.typ, record.payload)?;
        Ok(Some((size, opened)))
    }

    fn take<'a>(&mut self, typ: ContentType, payload: &'a [u8]) -> Result<Opened<'a>, Fatal> {
        if typ != ContentType::Handshake && !self.message.is_empty() {
            return Err(PeerMisbehaved::MessageInterleavedWithHandshakeMessage.into());
        }
        if payload.is_empty() {
            self.empty += 1;
            if self.empty > EMPTY_MAX {
                return Err(PeerMisbehaved::TooManyEmptyFragments.into());
            }
        } else {
            self.empty = 0;
        }
        if typ == ContentType::ApplicationData {
            self.key_updates = 0;
            Ok(Opened::Payload(payload))
        } else if typ == ContentType::Alert {
            self.take_alert(payload)
        } else if typ == ContentType::Handshake && self.is_tls13() {
            self.take_message(payload)
        } else if typ == ContentType::Handshake {
            // The only one would be a new handshake, which rustls does not do either.
            let error = Error::General("the peer wants to negotiate again".to_owned());
            Err(Fatal::new(AlertDescription::NoRenegotiation, error))
        } else {
            Err(Fatal::new(AlertDescription::UnexpectedMessage, InvalidMessage::InvalidContentType))
        }
    }

    fn take_alert(&mut self, payload: &[u8]) -> Result<Opened<'static>, Fatal> {
        let &[level, description] = payload else {
            return Err(InvalidMessage::TrailingData("Alert").into());
        };
        let description = AlertDescription::from(description);
        if level != ALERT_WARNING && level != ALERT_FATAL {
            return Err(Fatal::new(AlertDescription::IllegalParameter, Error::AlertReceived(description)));
        }
        if description == AlertDescription::CloseNotify {
            return Ok(Opened::Closed);
        }
        if level == ALERT_FATAL {
            return Err(Fatal { alert: None, error: Error::AlertReceived(description) });
        }
        if self.is_tls13() && description != AlertDescription::UserCanceled {
            return Err(Fatal::new(AlertDescription::DecodeError, Error::AlertReceived(description)));
        }
        self.warnings += 1;
        if self.warnings > WARNINGS_MAX {
            return Err(PeerMisbehaved::TooManyWarningAlertsReceived.into());
        }
        Ok(Opened::Nothing)
    }

    /// Takes messages of the handshake protocol: after a handshake of TLS 1.3 a client sends key updates only, each of
    /// which ends with its record; a server may send tickets, which nobody here has a use for.
    fn take_message(&mut self, payload: &[u8]) -> Result<Opened<'static>, Fatal> {
        if self.end == End::Client && self.message.is_empty() && is_ticket(payload) {
            self.key_updates += 1;
            if self.key_updates > KEY_UPDATES_MAX {
                return Err(PeerMisbehaved::TooManyKeyUpdateRequests.into());
            }
            return Ok(Opened::Nothing);
        }
        let start = std::mem::take(&mut self.message);
        let message = [&start, &payload[..payload.len().min(KEY_UPDATE + 1)]].concat();
        if message.first().is_some_and(|typ| *typ != u8::from(HandshakeType::KeyUpdate)) {
            let error = InvalidMessage::UnexpectedMessage("no key update");
            return Err(Fatal::new(AlertDescription::UnexpectedMessage, error));
        }
        if message.len() < KEY_UPDATE {
            self.message = message.into();
            return Ok(Opened::Nothing);
        }
        let requested = match message[1..] {
            [0, 0, 1, 0] => false,
            [0, 0, 1, 1] => true,
            [0, 0, 1, _] => {
                return Err(Fatal::new(AlertDescription::IllegalParameter, InvalidMessage::InvalidKeyUpdate));
            }
            [0, 0, 1, ..] => return Err(PeerMisbehaved::KeyEpochWithPendingFragment.into()),
            _ => return Err(InvalidMessage::InvalidKeyUpdate.into()),
        };
        self.key_updates += 1;
        if self.key_updates > KEY_UPDATES_MAX {
            return Err(PeerMisbehaved::TooManyKeyUpdateRequests.into());
        }
        let key = self.new_key(|secrets| &mut secrets.opening)?;
        (self.opener, self.opened) = (decrypter(self.suite, key)?, 0);
        Ok(Opened::KeyUpdate { requested })
    }

    /// Makes records of `payload`, and appends them to `sealed`.
    ///
    /// Keys that have sealed as much as they may are replaced. Fails, before anything is sealed, where TLS 1.2 has no
    /// means for that.
    pub(super) fn seal(&mut self, payload: &[u8], sealed: &mut Unsent) -> Result<(), Error> {
        let records = payload.len().div_ceil(SEALED_MAX) as u64;
        // One more is left for the end.
        if !self.is_tls13() && self.sealed_max - self.sealed <= records {
            return Err(Error::EncryptError);
        }
        sealed.reserve(payload.len().div_ceil(SEALED_MAX));
        for payload in payload.chunks(SEALED_MAX) {
            if self.is_tls13() && self.sealed_max - self.sealed <= 2 {
                sealed.push(self.update_keys()?);
            }
            let mut pieces = [&payload[..0]; PAYLOAD_MAX / COPY];
            for (piece, bytes) in pieces.iter_mut().zip(payload.chunks(COPY)) {
                *piece = bytes;
            }
            let pieces = &pieces[..payload.len().div_ceil(COPY)];
            sealed.push(self.seal_record(ContentType::ApplicationData, OutboundChunks::new(pieces))?);
        }
        Ok(())
    }

    /// Says that new keys are used from here on.
    pub(super) fn update_keys(&mut self) -> Result<Vec<u8>, Error> {
        let message = [u8::from(HandshakeType::KeyUpdate), 0, 0, 1, 0];
        let record = self.seal_record(ContentType::Handshake, OutboundChunks::Single(&message))?;
        let key = self.new_key(|secrets| &mut secrets.sealing)?;
        (self.sealer, self.sealed) = (encrypter(self.suite, key, 0)?, 0);
        Ok(record)
    }

    fn new_key(
        &mut self,
        secret: impl FnOnce(&mut Secrets) -> &mut OkmBlock,
    ) -> Result<ConnectionTrafficSecrets, Error> {
        let (SupportedCipherSuite::Tls13(suite), Some(secrets)) = (self.suite, &mut self.secrets) else {
            return Err(Error::General("a session whose keys cannot be replaced".to_owned()));
        };
        update(secret(secrets), suite)
    }

    /// Says that nothing more comes.
    pub(super) fn close(&mut self) -> Result<Vec<u8>, Error> {
        self.seal_alert(ALERT_WARNING, AlertDescription::CloseNotify)
    }

    /// Says why the session ends here.
    pub(super) fn alert(&mut self, alert: AlertDescription) -> Result<Vec<u8>, Error> {
        self.seal_alert(ALERT_FATAL, alert)
    }

    fn seal_alert(&mut self, level: u8, alert: AlertDescription) -> Result<Vec<u8>, Error> {
        self.seal_record(ContentType::Alert, OutboundChunks::Single(&[level, u8::from(alert)]))
    }

    fn seal_record(&mut self, typ: ContentType, payload: OutboundChunks<'_>) -> Result<Vec<u8>, Error> {
        if self.sealed >= self.sealed_max {
            return Err(Error::EncryptError);
        }
        let record = self.sealer.encrypt(plain(typ, payload), self.sealed)?;
        self.sealed += 1;
        Ok(record.encode())
    }
}

/// The type and the whole length of the first of `records`; `None` while its header is not whole.
pub(super) fn record(records: &[u8]) -> Result<Option<(ContentType, usize)>, InvalidMessage> {
    let &[typ, major, _, high, low, ..] = records else { return Ok(None) };
    let typ = ContentType::from(typ);
    if matches!(typ, ContentType::Unknown(_)) {
        return Err(InvalidMessage::InvalidContentType);
    }
    if major != 3 {
        return Err(InvalidMessage::UnknownProtocolVersion);
    }
    let size = HEADER + usize::from(u16::from_be_bytes([high, low]));
    if size >= RECORD_MAX {
        return Err(InvalidMessage::MessageTooLarge);
    }
    Ok(Some((typ, size)))
}

/// Whether `payload` is one ticket for a later session (RFC 8446, section 4.6.1).
fn is_ticket(payload: &[u8]) -> bool {
    let Some(([typ, high, middle, low], ticket)) = payload.split_first_chunk() else { return false };
    let size = u32::from_be_bytes([0, *high, *middle, *low]);
    *typ == u8::from(HandshakeType::NewSessionTicket) && ticket.len() as u64 == u64::from(size)
}

pub(super) fn plain(typ: ContentType, payload: OutboundChunks<'_>) -> OutboundPlainMessage<'_> {
    // TLS 1.3 says the version of its predecessor, too.
    OutboundPlainMessage { typ, version: ProtocolVersion::TLSv1_2, payload }
}

fn common(suite: SupportedCipherSuite) -> &'static rustls::CipherSuiteCommon {
    match suite {
        SupportedCipherSuite::Tls12(suite) => &suite.common,
        SupportedCipherSuite::Tls13(suite) => &suite.common,
    }
}

fn key_and_iv(secrets: ConnectionTrafficSecrets) -> Result<(AeadKey, Iv), Error> {
    match secrets {
        ConnectionTrafficSecrets::Aes128Gcm { key, iv }
        | ConnectionTrafficSecrets::Aes256Gcm { key, iv }
        | ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => Ok((key, iv)),
        _ => Err(Error::General("a cipher of a later version of the library".to_owned())),
    }
}

/// Makes the cipher whose next record has the number `sealed`.
pub(super) fn encrypter(
    suite: SupportedCipherSuite,
    secrets: ConnectionTrafficSecrets,
    sealed: u64,
) -> Result<Box<dyn MessageEncrypter>, Error> {
    let (key, iv) = key_and_iv(secrets)?;
    let mut encrypter = match suite {
        SupportedCipherSuite::Tls13(suite) => suite.aead_alg.encrypter(key, iv),
        SupportedCipherSuite::Tls12(suite) => {
            let (fixed, explicit) = iv.as_ref().split_at(suite.aead_alg.key_block_shape().fixed_iv_len);
            suite.aead_alg.encrypter(key, fixed, explicit)
        }
    };
    if sealed > 0 {
        // AES-GCM takes the first record that it seals for number 0. That one was the handshake's; what is sealed in its
        // place goes nowhere.
        encrypter.encrypt(plain(ContentType::ApplicationData, OutboundChunks::new_empty()), 0)?;
    }
    Ok(encrypter)
}

pub(super) fn decrypter(
    suite: SupportedCipherSuite,
    secrets: ConnectionTrafficSecrets,
) -> Result<Box<dyn MessageDecrypter>, Error> {
    let (key, iv) = key_and_iv(secrets)?;
    Ok(match suite {
        SupportedCipherSuite::Tls13(suite) => suite.aead_alg.decrypter(key, iv),
        SupportedCipherSuite::Tls12(suite) => {
            let fixed = suite.aead_alg.key_block_shape().fixed_iv_len;
            suite.aead_alg.decrypter(key, &iv.as_ref()[..fixed])
        }
    })
}

#[cfg(test)]
impl Session {
    /// Lets a key seal no more than `records`.
    pub(super) fn limit(&mut self, records: u64) {
        self.sealed_max = records;
    }

    /// How many records the key has sealed.
    pub(super) fn sealed(&self) -> u64 {
        self.sealed
    }
}
