//! Shared access signatures, as Azure's SDKs make them.
//!
//! `SharedAccessSignature sr={resource}&sig={signature}&se={expiry}[&skn={policy}]`, where the signature is
//! HMAC-SHA256 over the text of `sr` exactly as it stands in the token, a line feed, and the text of `se`.

use std::{
    borrow::Cow,
    fmt::{self, Write as _},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use percent_encoding::{NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use secrecy::SecretString;
use thiserror::Error;

use crate::{key::Key, time::UnixTime};

/// The longest `Authorization` value that is looked at, in bytes.
pub const MAX_LENGTH: usize = 4096;

const SCHEME: &str = "SharedAccessSignature ";

/// A parsed signature, not yet verified. `Debug` leaves the signature out: with the rest it is a credential.
#[derive(Clone)]
pub struct SasToken {
    resource: String,
    signature: [u8; 32],
    expiry_text: String,
    expires: UnixTime,
    policy: Option<String>,
}

/// Why a text is not a shared access signature.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum SasError {
    /// Another scheme, such as `Bearer`.
    #[error("expected `Authorization: SharedAccessSignature sr=...&sig=...&se=...`")]
    Scheme,
    /// Longer than [`MAX_LENGTH`].
    #[error("the signature is longer than {MAX_LENGTH} bytes")]
    TooLong,
    /// `sr`, `sig` or `se` is not there.
    #[error("the signature lacks `{0}`")]
    Missing(&'static str),
    /// A field stands twice, so that two readers could see two tokens.
    #[error("the signature has `{0}` twice")]
    Twice(&'static str),
    /// `sig` is not 32 bytes in percent-encoded base64.
    #[error("`sig` must be 32 bytes in percent-encoded base64")]
    Signature,
    /// `se` is not a number of seconds since 1970, or lies behind the year 9999.
    #[error("`se` must be seconds (not milliseconds) since 1970")]
    Expiry,
    /// `skn` is not percent-encoded UTF-8.
    #[error("`skn` must be percent-encoded UTF-8")]
    Policy,
}

impl SasToken {
    /// Parses the value of an `Authorization` header. Fields may come in any order; unknown ones are ignored.
    pub fn parse(text: &str) -> Result<Self, SasError> {
        if text.len() > MAX_LENGTH {
            return Err(SasError::TooLong);
        }
        let fields = text
            .split_at_checked(SCHEME.len())
            .filter(|(scheme, _)| scheme.eq_ignore_ascii_case(SCHEME))
            .map(|(_, fields)| fields.trim())
            .ok_or(SasError::Scheme)?;

        let (mut resource, mut signature, mut expiry, mut policy) = (None, None, None, None);
        for field in fields.split('&') {
            let Some((name, value)) = field.split_once('=') else { continue };
            let (slot, name) = match name {
                "sr" => (&mut resource, "sr"),
                "sig" => (&mut signature, "sig"),
                "se" => (&mut expiry, "se"),
                "skn" => (&mut policy, "skn"),
                _ => continue,
            };
            if slot.replace(value).is_some() {
                return Err(SasError::Twice(name));
            }
        }
        let resource = resource.ok_or(SasError::Missing("sr"))?;
        let signature = signature.ok_or(SasError::Missing("sig"))?;
        let expiry_text = expiry.ok_or(SasError::Missing("se"))?;

        let signature = percent_decode_str(signature).decode_utf8().map_err(|_| SasError::Signature)?;
        let signature = STANDARD.decode(signature.as_bytes()).map_err(|_| SasError::Signature)?;
        let digits = !expiry_text.is_empty() && expiry_text.bytes().all(|b| b.is_ascii_digit());
        let expires = expiry_text.parse().ok().filter(|&seconds| digits && seconds <= UnixTime::LAST.0);
        let expires = expires.ok_or(SasError::Expiry)?;
        let policy = match policy {
            None | Some("") => None,
            Some(text) => {
                Some(percent_decode_str(text).decode_utf8().map_err(|_| SasError::Policy)?.into_owned())
            }
        };
        Ok(Self {
            resource: resource.to_owned(),
            signature: signature.try_into().map_err(|_| SasError::Signature)?,
            expiry_text: expiry_text.to_owned(),
            expires: UnixTime(expires),
            policy,
        })
    }

    /// Makes the text of a signature for `resource` (`host`, or `host/devices/{id}`), to be sent as it is.
    pub fn sign(resource: &str, key: &Key, expires: UnixTime, policy: Option<&str>) -> SecretString {
        let resource = utf8_percent_encode(resource, NON_ALPHANUMERIC).to_string();
        let mac = key.mac(&[resource.as_bytes(), b"\n", expires.0.to_string().as_bytes()]);
        let signature = STANDARD.encode(mac);
        let signature = utf8_percent_encode(&signature, NON_ALPHANUMERIC);
        let mut text = format!("{SCHEME}sr={resource}&sig={signature}&se={}", expires.0);
        if let Some(policy) = policy {
            // Writing to a String cannot fail.
            let _ = write!(text, "&skn={}", utf8_percent_encode(policy, NON_ALPHANUMERIC));
        }
        text.into()
    }

    /// Whether one of `keys` made this signature. Takes the same time for every wrong signature.
    pub fn is_signed_by(&self, keys: &[Key]) -> bool {
        let parts = [self.resource.as_bytes(), b"\n", self.expiry_text.as_bytes()];
        keys.iter().fold(false, |found, key| key.verifies(&parts, &self.signature) | found)
    }

    /// When the signature ends to be good.
    pub fn expires(&self) -> UnixTime {
        self.expires
    }

    /// The name of the service's policy (`skn`), when there is one.
    pub fn policy(&self) -> Option<&str> {
        self.policy.as_deref()
    }

    /// Whether the token is for exactly `path` (such as `devices/dev1`) on one of `hosts`.
    pub fn is_for(&self, hosts: &[String], path: &str) -> bool {
        self.audiences().any(|(host, rest)| names_host(&host, hosts) && rest == path)
    }

    /// The path below one of `hosts` that the token is narrowed to, empty when it is for the whole host.
    pub fn path_below(&self, hosts: &[String]) -> Option<String> {
        // The most decoded reading is the narrowest one: `host%2Fdevices%2Fd` must not count as a whole host.
        self.audiences().filter(|(host, _)| names_host(host, hosts)).map(|(_, rest)| rest).last()
    }

    /// `sr` split into host and path, as it stands and percent-decoded: SDKs differ in what they encode.
    fn audiences(&self) -> impl Iterator<Item = (String, String)> + '_ {
        let plain = Cow::Borrowed(self.resource.as_str());
        let decoded = percent_decode_str(&self.resource).decode_utf8().ok();
        [Some(plain), decoded].into_iter().flatten().map(|text| match text.split_once('/') {
            None => (text.into_owned(), String::new()),
            Some((host, path)) => (host.to_owned(), path.trim_end_matches('/').to_owned()),
        })
    }
}

impl fmt::Debug for SasToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SasToken")
            .field("resource", &self.resource)
            .field("expires", &self.expires)
            .field("policy", &self.policy)
            .finish_non_exhaustive()
    }
}

/// Compares host names without their ports, as DNS does.
fn names_host(text: &str, hosts: &[String]) -> bool {
    hosts.iter().any(|host| without_port(host).eq_ignore_ascii_case(without_port(text)))
}

/// The host of `host`, `host:port`, `[v6]` or `[v6]:port`.
pub fn without_port(authority: &str) -> &str {
    if authority.starts_with('[') {
        return authority.find(']').map_or(authority, |end| &authority[..=end]);
    }
    match authority.split_once(':') {
        Some((host, _)) => host,
        None => authority,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use secrecy::ExposeSecret as _;

    use super::*;

    fn key() -> Key {
        Key::from_base64("MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=").unwrap()
    }

    fn hosts() -> Vec<String> {
        vec!["relay.example:8443".to_owned()]
    }

    const FORM: &str = "SharedAccessSignature sr=RES&sig=SIG&se=1700000000";

    fn raw(resource: &str, order: &str, lower: bool) -> String {
        let mac = key().mac(&[resource.as_bytes(), b"\n", b"1700000000"]);
        let mut sig = utf8_percent_encode(&STANDARD.encode(mac), NON_ALPHANUMERIC).to_string();
        if lower {
            sig = sig.replace("%2F", "%2f").replace("%3D", "%3d").replace("%2B", "%2b");
        }
        order.replace("RES", resource).replace("SIG", &sig)
    }

    #[test]
    fn the_forms_of_all_sdks_verify() {
        for text in [
            raw("relay.example", "SharedAccessSignature sr=RES&sig=SIG&skn=service&se=1700000000", false),
            raw(
                "relay.example%2Fdevices%2Fdev1",
                "SharedAccessSignature sr=RES&sig=SIG&se=1700000000&skn=",
                false,
            ),
            raw("relay.example/devices/dev1", "sharedaccesssignature sr=RES&sig=SIG&se=1700000000", true),
        ] {
            let token = SasToken::parse(&text).unwrap();
            assert!(token.is_signed_by(&[key()]), "{text}");
            assert_eq!(token.expires(), UnixTime(1_700_000_000));
        }
    }

    #[test]
    fn a_changed_token_does_not_verify() {
        let text = raw("relay.example", "SharedAccessSignature sr=RES&sig=SIG&se=1700000000", false);
        let changed = text.replace("se=17", "se=18");
        assert!(!SasToken::parse(&changed).unwrap().is_signed_by(&[key()]));
        let other = Key::from_bytes(vec![9; 32]).unwrap();
        assert!(!SasToken::parse(&text).unwrap().is_signed_by(&[other]));
        assert!(!SasToken::parse(&text).unwrap().is_signed_by(&[]));
    }

    #[test]
    fn audiences_are_compared_by_host_and_path() {
        let sign = |resource: &str| {
            let text = SasToken::sign(resource, &key(), UnixTime(1), None);
            SasToken::parse(text.expose_secret()).unwrap()
        };
        assert!(sign("Relay.Example/devices/dev1").is_for(&hosts(), "devices/dev1"));
        assert!(sign("relay.example:443/devices/dev1").is_for(&hosts(), "devices/dev1"));
        assert!(!sign("relay.example/devices/dev10").is_for(&hosts(), "devices/dev1"));
        assert!(!sign("other.example/devices/dev1").is_for(&hosts(), "devices/dev1"));
        assert!(sign("relay.example/devices/a%b").is_for(&hosts(), "devices/a%b"));
        assert_eq!(sign("relay.example").path_below(&hosts()), Some(String::new()));
        assert_eq!(sign("relay.example/devices/d").path_below(&hosts()), Some("devices/d".to_owned()));
        assert_eq!(sign("other.example").path_below(&hosts()), None);
    }

    #[test]
    fn malformed_tokens_say_what_is_wrong() {
        for (text, error) in [
            ("Bearer x", SasError::Scheme),
            ("", SasError::Scheme),
            ("SharedAccessSignature ", SasError::Missing("sr")),
            ("SharedAccessSignature sr=a&se=1", SasError::Missing("sig")),
            ("SharedAccessSignature sr=a&sr=b&sig=c&se=1", SasError::Twice("sr")),
            ("SharedAccessSignature sr=a&sig=AAAA&se=1", SasError::Signature),
            ("SharedAccessSignature sr=a&sig=&se=x", SasError::Expiry),
        ] {
            assert_eq!(SasToken::parse(text).unwrap_err(), error, "{text}");
        }
        let long = format!("SharedAccessSignature sr={}", "a".repeat(MAX_LENGTH));
        assert_eq!(SasToken::parse(&long).unwrap_err(), SasError::TooLong);
    }

    #[test]
    fn debug_shows_no_signature() {
        let token = SasToken { signature: [0xab; 32], ..SasToken::parse(&raw("h", FORM, false)).unwrap() };
        let shown = format!("{token:?}");
        assert!(!shown.contains("171") && !shown.contains("signature"), "{shown}");
    }

    #[test]
    fn ports_are_taken_off() {
        for (text, host) in
            [("a:1", "a"), ("a", "a"), ("[::1]:443", "[::1]"), ("[::1]", "[::1]"), ("[::1", "[::1")]
        {
            assert_eq!(without_port(text), host);
        }
    }

    proptest! {
        #[test]
        fn what_is_signed_is_read_back(resource in "[a-z0-9./%$:-]{1,60}", policy in "[ -~]{0,20}", expires in 0..=UnixTime::LAST.0) {
            let text = SasToken::sign(&resource, &key(), UnixTime(expires), Some(&policy));
            let token = SasToken::parse(text.expose_secret()).unwrap();
            prop_assert!(token.is_signed_by(&[Key::from_bytes(vec![1; 32]).unwrap(), key()]));
            prop_assert_eq!(token.policy().unwrap_or_default(), policy);
            prop_assert_eq!(token.expires(), UnixTime(expires));
        }

        #[test]
        fn parsing_never_panics(text in "(SharedAccessSignature )?[ -~é]{0,200}") {
            if let Ok(token) = SasToken::parse(&text) {
                let _ = token.is_for(&hosts(), "devices/dev1");
                let _ = token.path_below(&hosts());
            }
        }
    }
}
