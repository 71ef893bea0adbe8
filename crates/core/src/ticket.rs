//! Tickets: the short-lived credential of one leg.
//!
//! A ticket is a JWT (RFC 7519) signed with HMAC-SHA256 (RFC 7515, appendix A.1). It holds all that the owner must know of
//! the stream, so that a leg needs no look-up anywhere. Both ends treat it as opaque. Only this relay makes and reads
//! tickets, so their header is always the same text for a key: it is compared, and never parsed.

use std::fmt;

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use secrecy::SecretString;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use thiserror::Error;

use crate::{
    credential::CLOCK_LEEWAY_SECONDS,
    id::{DeviceAddress, DeviceId, Incarnation, ModuleId, Role, StreamId, StreamName},
    key::{Key, KeyError},
    time::UnixTime,
    trace::TraceParent,
};

/// The longest ticket that is looked at, in bytes.
pub const MAX_LENGTH: usize = 4096;

const VERSION: u8 = 1;

/// The edge that joins a stream's legs: name, life and cluster-internal address.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Owner {
    /// The edge's name, which placement hashes.
    pub name: String,
    /// Which life of the edge.
    pub incarnation: Incarnation,
    /// Where other edges reach it, `host:port`; empty when there are no others.
    pub address: String,
}

/// What a leg's ticket says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ticket {
    /// The stream.
    pub stream: StreamId,
    /// Which of its legs.
    pub role: Role,
    /// The edge that joins the legs.
    pub owner: Owner,
    /// The device or module at one end.
    pub address: DeviceAddress,
    /// What the stream is for.
    pub name: StreamName,
    /// The service credential that opened the stream.
    pub credential: String,
    /// When that credential ends, and the stream with it.
    pub credential_expires: UnixTime,
    /// Until when the legs must be joined, and so the end of the ticket's life.
    pub expires: UnixTime,
    /// The trace that the stream belongs to.
    pub trace: TraceParent,
}

/// The claims as they stand in the token, with short names: a ticket travels in a header.
#[derive(Serialize, Deserialize)]
struct Claims {
    v: u8,
    sid: StreamId,
    rol: Role,
    own: String,
    inc: Incarnation,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    adr: String,
    dev: DeviceId,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    module: Option<ModuleId>,
    nam: StreamName,
    crd: String,
    cxp: u64,
    exp: u64,
    trc: TraceParent,
}

/// Why a text is not a ticket of this relay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum TicketError {
    /// Not a token, or altered, or signed by somebody else.
    #[error("this is not a ticket of this relay, or it was altered")]
    Invalid,
    /// Good once. Seconds since then.
    #[error("the ticket expired {0} s ago; ask for a new stream")]
    Expired(u64),
}

/// The keys that tickets are signed with: one signs, both are accepted, so that keys can be changed while running.
#[derive(Clone)]
pub struct TicketKeys {
    current: TicketKey,
    previous: Option<TicketKey>,
}

#[derive(Clone)]
struct TicketKey {
    /// The encoded header of its tickets, which names it, with the dot behind it.
    header: String,
    key: Key,
}

/// Why a text holds no ticket keys.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum TicketKeysError {
    /// Neither one nor two lines.
    #[error("expected one key (base64), or two lines: the key that signs and the one before it")]
    Count,
    /// A line is not a key.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// Too short for HMAC-SHA256 (RFC 7518, section 3.2).
    #[error("a ticket key must have at least 32 bytes before base64")]
    Short,
}

impl TicketKeys {
    /// Reads one or two base64 keys, a line each: first the one that signs, then the one before it.
    pub fn from_text(text: &str) -> Result<Self, TicketKeysError> {
        let lines: Vec<_> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        match lines.as_slice() {
            [current] => Self::new(&Key::from_base64(current)?, None),
            [current, previous] => Self::new(&Key::from_base64(current)?, Some(&Key::from_base64(previous)?)),
            _ => Err(TicketKeysError::Count),
        }
    }

    /// Keys of at least 32 bytes each.
    pub fn new(current: &Key, previous: Option<&Key>) -> Result<Self, TicketKeysError> {
        let current = TicketKey::new(current)?;
        Ok(Self { current, previous: previous.map(TicketKey::new).transpose()? })
    }

    /// Signs a ticket.
    pub fn sign(&self, ticket: &Ticket) -> Result<SecretString, TicketError> {
        let claims = Claims {
            v: VERSION,
            sid: ticket.stream,
            rol: ticket.role,
            own: ticket.owner.name.clone(),
            inc: ticket.owner.incarnation,
            adr: ticket.owner.address.clone(),
            dev: ticket.address.device.clone(),
            module: ticket.address.module.clone(),
            nam: ticket.name.clone(),
            crd: ticket.credential.clone(),
            cxp: ticket.credential_expires.0,
            exp: ticket.expires.0,
            trc: ticket.trace,
        };
        let claims = serde_json::to_vec(&claims).map_err(|_| TicketError::Invalid)?;
        let TicketKey { header, key } = &self.current;
        let mut token = header.clone();
        URL_SAFE_NO_PAD.encode_string(claims, &mut token);
        let signature = key.mac(&[token.as_bytes()]);
        token.push('.');
        URL_SAFE_NO_PAD.encode_string(signature, &mut token);
        Ok(token.into())
    }

    /// HMAC-SHA256 of the concatenated parts, which must not read like the start of a ticket.
    pub(crate) fn mac(&self, parts: &[&[u8]]) -> [u8; 32] {
        self.current.key.mac(parts)
    }

    /// Compares in constant time, with either key.
    pub(crate) fn verifies(&self, parts: &[&[u8]], mac: &[u8; 32]) -> bool {
        let keys = [Some(&self.current), self.previous.as_ref()];
        keys.into_iter().flatten().any(|key| key.key.verifies(parts, mac))
    }

    /// Verifies a ticket's signature (in constant time), version and life.
    pub fn verify(&self, text: &str, now: UnixTime) -> Result<Ticket, TicketError> {
        if text.len() > MAX_LENGTH {
            return Err(TicketError::Invalid);
        }
        let (signed, signature) = text.rsplit_once('.').ok_or(TicketError::Invalid)?;
        let keys = [Some(&self.current), self.previous.as_ref()];
        let (key, claims) = keys
            .into_iter()
            .flatten()
            .find_map(|key| Some((&key.key, signed.strip_prefix(&key.header)?)))
            .ok_or(TicketError::Invalid)?;
        let mut mac = [0; 32];
        if URL_SAFE_NO_PAD.decode_slice(signature, &mut mac) != Ok(mac.len())
            || !key.verifies(&[signed.as_bytes()], &mac)
        {
            return Err(TicketError::Invalid);
        }
        let claims = URL_SAFE_NO_PAD.decode(claims).map_err(|_| TicketError::Invalid)?;
        // Time is checked below, against the caller's clock and with our own leeway.
        let claims: Claims = serde_json::from_slice(&claims).map_err(|_| TicketError::Invalid)?;
        if claims.v != VERSION {
            return Err(TicketError::Invalid);
        }
        match now.0.saturating_sub(claims.exp) {
            late if late > CLOCK_LEEWAY_SECONDS => Err(TicketError::Expired(late)),
            _ => Ok(claims.into()),
        }
    }
}

impl From<Claims> for Ticket {
    fn from(claims: Claims) -> Self {
        Self {
            stream: claims.sid,
            role: claims.rol,
            owner: Owner { name: claims.own, incarnation: claims.inc, address: claims.adr },
            address: DeviceAddress { device: claims.dev, module: claims.module },
            name: claims.nam,
            credential: claims.crd,
            credential_expires: UnixTime(claims.cxp),
            expires: UnixTime(claims.exp),
            trace: claims.trc,
        }
    }
}

impl TicketKey {
    fn new(key: &Key) -> Result<Self, TicketKeysError> {
        let bytes = key.expose_bytes();
        if bytes.len() < 32 {
            return Err(TicketKeysError::Short);
        }
        // Names the key without telling anything of it.
        let id = Sha256::new().chain_update("midspan ticket key id").chain_update(bytes).finalize();
        let id = u32::from_be_bytes([id[0], id[1], id[2], id[3]]);
        let header = format!(r#"{{"typ":"JWT","alg":"HS256","kid":"{id:08x}"}}"#);
        Ok(Self { header: URL_SAFE_NO_PAD.encode(header) + ".", key: key.clone() })
    }
}

impl fmt::Debug for TicketKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TicketKeys(redacted)")
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use secrecy::ExposeSecret as _;

    use super::*;

    const NOW: UnixTime = UnixTime(1_800_000_000);

    #[test]
    fn tickets_read_back() {
        let keys = keys(1, None);
        let text = keys.sign(&ticket()).unwrap();
        assert_eq!(keys.verify(text.expose_secret(), NOW), Ok(ticket()));
    }

    #[test]
    fn a_ticket_with_long_ids_fits_the_smallest_buffers_in_the_field() {
        // A C client of Azure's keeps `Bearer ` and the token in 1,024 bytes.
        let typical = Ticket { address: "x".repeat(64).parse().unwrap(), ..ticket() };
        let text = keys(1, None).sign(&typical).unwrap();
        assert!(text.expose_secret().len() < 1000, "{}", text.expose_secret().len());
    }

    #[test]
    fn keys_can_be_changed_while_running() {
        let old = keys(1, None).sign(&ticket()).unwrap();
        assert!(keys(2, Some(1)).verify(old.expose_secret(), NOW).is_ok());
        assert_eq!(keys(2, None).verify(old.expose_secret(), NOW), Err(TicketError::Invalid));
    }

    #[test]
    fn expiry_has_five_seconds_of_leeway() {
        let keys = keys(1, None);
        let text = keys.sign(&ticket()).unwrap();
        assert!(
            keys.verify(text.expose_secret(), ticket().expires.plus(std::time::Duration::from_secs(5)))
                .is_ok()
        );
        let late = UnixTime(ticket().expires.0 + 6);
        assert_eq!(keys.verify(text.expose_secret(), late), Err(TicketError::Expired(6)));
    }

    #[test]
    fn any_jwt_library_reads_a_ticket() {
        let text = keys(1, None).sign(&ticket()).unwrap().expose_secret().to_owned();
        let parts: Vec<_> = text.split('.').collect();
        let [header, claims, signature] = parts[..] else { panic!("{text}") };
        let json = |part: &str| -> serde_json::Value {
            serde_json::from_slice(&URL_SAFE_NO_PAD.decode(part).unwrap()).unwrap()
        };
        assert_eq!(json(header)["alg"], "HS256");
        assert_eq!(json(claims)["exp"], NOW.0 + 60);
        // What RFC 7515 says the signature covers.
        let mac = Key::from_bytes(vec![1; 32]).unwrap().mac(&[header.as_bytes(), b".", claims.as_bytes()]);
        assert_eq!(URL_SAFE_NO_PAD.decode(signature).unwrap(), mac);
    }

    #[test]
    fn tokens_without_a_signature_are_refused() {
        let part = |text: &str| URL_SAFE_NO_PAD.encode(text);
        let signed = keys(1, None).sign(&ticket()).unwrap();
        let claims = signed.expose_secret().split('.').nth(1).unwrap();
        for header in [r#"{"alg":"none"}"#, r#"{"alg":"none","kid":"x"}"#, r#"{"alg":"HS512","kid":"x"}"#] {
            let text = format!("{}.{claims}.", part(header));
            assert_eq!(keys(1, None).verify(&text, NOW), Err(TicketError::Invalid));
        }
    }

    #[test]
    fn weak_keys_are_refused() {
        assert_eq!(TicketKeys::from_text("").unwrap_err(), TicketKeysError::Count);
        assert_eq!(TicketKeys::from_text("MDEyMzQ1Njc4OWFiY2RlZg==").unwrap_err(), TicketKeysError::Short);
        assert!(!format!("{:?}", keys(1, Some(2))).contains('1'));
    }

    proptest! {
        #[test]
        fn one_changed_byte_makes_a_ticket_invalid(position: prop::sample::Index, byte in "[A-Za-z0-9_.-]") {
            let keys = keys(1, None);
            let text = keys.sign(&ticket()).unwrap().expose_secret().to_owned();
            let at = position.index(text.len());
            let mut changed = text.clone();
            changed.replace_range(at..=at, &byte);
            // The last character of a signature has two bits that carry nothing.
            let same = changed == text || at == text.len() - 1;
            prop_assert!(same || keys.verify(&changed, NOW) == Err(TicketError::Invalid));
        }

        #[test]
        fn verifying_never_panics(text in "[ -~é]{0,300}") {
            let _ = keys(1, None).verify(&text, NOW);
        }
    }

    fn keys(current: u8, previous: Option<u8>) -> TicketKeys {
        let key = |n| Key::from_bytes(vec![n; 32]).unwrap();
        TicketKeys::new(&key(current), previous.map(key).as_ref()).unwrap()
    }

    fn ticket() -> Ticket {
        Ticket {
            stream: StreamId::from_random(7),
            role: Role::Device,
            owner: Owner {
                name: "edge-0".to_owned(),
                incarnation: Incarnation::from_random(8),
                address: "10.0.0.1:8445".to_owned(),
            },
            address: "dev1/m".parse().unwrap(),
            name: "ssh".parse().unwrap(),
            credential: "support".to_owned(),
            credential_expires: UnixTime(NOW.0 + 3600),
            expires: UnixTime(NOW.0 + 60),
            trace: TraceParent::new(1, 2),
        }
    }
}
