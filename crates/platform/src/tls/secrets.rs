//! The secrets of a session of TLS 1.3, from which new keys are made.
//!
//! rustls makes new keys, too, but with a connection that takes more than 780 bytes for good. It hands out the secrets by
//! the means that others log keys with: in the midst of a call of the library, on the caller's thread.

use std::cell::RefCell;

use rustls::{
    ConnectionTrafficSecrets, Error, KeyLog, Tls13CipherSuite,
    crypto::tls13::OkmBlock,
    internal::{derive_traffic_iv, derive_traffic_key},
};

use super::session::End;

const CLIENT: &str = "CLIENT_TRAFFIC_SECRET_0";
const SERVER: &str = "SERVER_TRAFFIC_SECRET_0";

const UPDATE: &[u8] = b"tls13 traffic upd";

thread_local! {
    static HANDED_OUT: RefCell<(Option<OkmBlock>, Option<OkmBlock>)> = const { RefCell::new((None, None)) };
}

/// Where a configuration is to hand out secrets, for [`Secrets::take`].
#[derive(Debug)]
pub(super) struct HandOut;

impl KeyLog for HandOut {
    fn log(&self, label: &str, _: &[u8], secret: &[u8]) {
        HANDED_OUT.with_borrow_mut(|(client, server)| match label {
            CLIENT => *client = Some(OkmBlock::new(secret)),
            SERVER => *server = Some(OkmBlock::new(secret)),
            _ => {}
        });
    }

    fn will_log(&self, label: &str) -> bool {
        label == CLIENT || label == SERVER
    }
}

/// The secrets of both directions, which each new key replaces.
pub(super) struct Secrets {
    pub(super) opening: OkmBlock,
    pub(super) sealing: OkmBlock,
}

impl Secrets {
    /// Takes what the library has handed out in the last call, if it has.
    pub(super) fn take(end: End) -> Option<Self> {
        let (client, server) = HANDED_OUT.take();
        let (opening, sealing) = match end {
            End::Server => (client?, server?),
            End::Client => (server?, client?),
        };
        Some(Self { opening, sealing })
    }
}

/// Replaces the secret of one direction, and gives its new key (RFC 8446, section 7.2).
pub(super) fn update(
    secret: &mut OkmBlock,
    suite: &Tls13CipherSuite,
) -> Result<ConnectionTrafficSecrets, Error> {
    let expander = suite.hkdf_provider.expander_for_okm(secret);
    let [.., high, low] = expander.hash_len().to_be_bytes();
    let [.., label_size] = UPDATE.len().to_be_bytes();
    *secret = expander.expand_block(&[&[high, low, label_size], UPDATE, &[0]]);
    let expander = suite.hkdf_provider.expander_for_okm(secret);
    let key = derive_traffic_key(&*expander, suite.aead_alg);
    Ok(suite.aead_alg.extract_keys(key, derive_traffic_iv(&*expander))?)
}
