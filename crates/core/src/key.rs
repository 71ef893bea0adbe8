//! Symmetric keys of devices and services.

use std::fmt;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use hmac::{Hmac, KeyInit as _, Mac as _};
use secrecy::{ExposeSecret as _, SecretSlice, SecretString};
use sha2::Sha256;
use thiserror::Error;

use crate::id::DeviceAddress;

const MIN_BYTES: usize = 16;
const MAX_BYTES: usize = 256;

/// A symmetric key, which never shows itself in `Debug`.
#[derive(Clone)]
pub struct Key(SecretSlice<u8>);

/// Why a text is not a key.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum KeyError {
    /// Not RFC 4648 base64 with padding.
    #[error("a key must be base64 (RFC 4648, with padding)")]
    Base64,
    /// Too short to resist guessing, or absurdly long.
    #[error("a key must have {MIN_BYTES} to {MAX_BYTES} bytes before base64, this one has {0}")]
    Length(usize),
}

impl Key {
    /// Reads a key from base64.
    pub fn from_base64(text: &str) -> Result<Self, KeyError> {
        let bytes = STANDARD.decode(text.trim()).map_err(|_| KeyError::Base64)?;
        Self::from_bytes(bytes)
    }

    /// Takes 16 to 256 bytes as a key.
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Self, KeyError> {
        if (MIN_BYTES..=MAX_BYTES).contains(&bytes.len()) {
            Ok(Self(bytes.into()))
        } else {
            Err(KeyError::Length(bytes.len()))
        }
    }

    /// The key in base64, for a connection string or a key file.
    pub fn to_base64(&self) -> SecretString {
        STANDARD.encode(self.0.expose_secret()).into()
    }

    /// The key of one device out of a group key: HMAC-SHA256(group key, `device` or `device/module`).
    #[must_use]
    pub fn derive(&self, address: &DeviceAddress) -> Self {
        Self(self.mac(&[address.to_string().as_bytes()]).to_vec().into())
    }

    /// The key's bytes, for handing them to a library.
    pub fn expose_bytes(&self) -> &[u8] {
        self.0.expose_secret()
    }

    /// HMAC-SHA256 of the concatenated parts.
    pub(crate) fn mac(&self, parts: &[&[u8]]) -> [u8; 32] {
        self.mac_state(parts).finalize().into_bytes().into()
    }

    /// Compares in constant time.
    pub(crate) fn verifies(&self, parts: &[&[u8]], mac: &[u8; 32]) -> bool {
        self.mac_state(parts).verify_slice(mac).is_ok()
    }

    #[expect(clippy::expect_used, reason = "HMAC takes keys of every length (RFC 2104)")]
    fn mac_state(&self, parts: &[&[u8]]) -> Hmac<Sha256> {
        let mut mac = Hmac::<Sha256>::new_from_slice(self.0.expose_secret()).expect("any length is a key");
        for part in parts {
            mac.update(part);
        }
        mac
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key(redacted)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn derivation_is_fixed() {
        // printf %s dev1 | openssl dgst -sha256 -mac HMAC -macopt hexkey:000102030405060708090a0b0c0d0e0f -binary | base64
        let group = Key::from_bytes((0..16).collect()).unwrap();
        let key = group.derive(&"dev1".parse().unwrap());
        assert_eq!(key.to_base64().expose_secret(), "c3xOgu1vsf7Aj4KDJLyyycLBKUv0lX79S1VXDukjWMY=");
    }

    #[test]
    fn debug_shows_nothing() {
        let key = Key::from_bytes(vec![65; 32]).unwrap();
        assert_eq!(format!("{key:?}"), "Key(redacted)");
    }

    #[test]
    fn weak_or_broken_keys_are_refused() {
        assert!(matches!(Key::from_base64("c2hvcnQ="), Err(KeyError::Length(5))));
        assert!(matches!(Key::from_base64("not base64!"), Err(KeyError::Base64)));
    }
}
