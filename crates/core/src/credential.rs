//! Who may connect, and what a service may reach and do.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    ops::Bound,
};

use secrecy::{ExposeSecret as _, SecretString};
use serde::Deserialize;
use thiserror::Error;

use crate::{
    id::{DeviceAddress, DeviceId, ModuleId},
    json::{self, JsonError},
    key::{Key, KeyError},
    sas::{SasError, SasToken},
    time::UnixTime,
};

/// How far two clocks may be apart before a credential that has just expired is refused, in seconds.
pub const CLOCK_LEEWAY_SECONDS: u64 = 5;

/// All that a relay knows of its devices and services: the contents of the credentials file.
#[derive(Debug, Clone, Default)]
pub struct Credentials {
    keys_by_device: BTreeMap<DeviceAddress, Vec<Key>>,
    group_keys: Vec<Key>,
    service_by_name: HashMap<String, Service>,
}

#[derive(Debug, Clone)]
struct Service {
    keys: Vec<Key>,
    scope: Scope,
}

/// What one service credential may do, and to which devices.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Scope {
    permissions: BTreeSet<Permission>,
    every_device: bool,
    devices: BTreeSet<DeviceId>,
    device_prefixes: BTreeSet<String>,
}

/// One thing that a service credential may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Permission {
    /// Open streams to devices.
    Open,
    /// List devices and streams.
    List,
    /// End streams.
    Close,
}

impl Permission {
    /// The permission as the credentials file and errors write it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::List => "list",
            Self::Close => "close",
        }
    }
}

/// A device that has shown who it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceIdentity {
    /// The device or module.
    pub address: DeviceAddress,
    /// When its credential ends, and with it the device link.
    pub expires: UnixTime,
}

/// A service that has shown who it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceIdentity {
    /// The name of its credential.
    pub name: String,
    /// What it may do.
    pub scope: Scope,
    /// When its credential ends, and with it the streams that it opened.
    pub expires: UnixTime,
    /// The path that its token is narrowed to, empty for everything in its scope.
    narrowed_to: String,
}

/// Why someone could not show who they are. All are "401"; the texts tell no more than the caller may know.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum AuthError {
    /// There is no `Authorization` header.
    #[error("no credential was sent; send `Authorization: SharedAccessSignature sr=...&sig=...&se=...`")]
    Missing,
    /// The header is not a shared access signature.
    #[error(transparent)]
    Malformed(#[from] SasError),
    /// The signature names a policy that does not exist. The text is that of [`AuthError::WrongServiceKey`].
    #[error(
        "the policy name or its key is wrong; compare SharedAccessKeyName and SharedAccessKey with the relay's"
    )]
    UnknownPolicy,
    /// The key that signed is not one of the policy's.
    #[error(
        "the policy name or its key is wrong; compare SharedAccessKeyName and SharedAccessKey with the relay's"
    )]
    WrongServiceKey,
    /// No key is known for the device. The text is that of [`AuthError::WrongDeviceKey`].
    #[error("the device id or its key is wrong; compare DeviceId and SharedAccessKey with the relay's")]
    UnknownDevice,
    /// The key that signed is not one of the device's.
    #[error("the device id or its key is wrong; compare DeviceId and SharedAccessKey with the relay's")]
    WrongDeviceKey,
    /// The signature is good, but was made for something else.
    #[error("the credential is for another relay or another device (its `sr` does not match {expected})")]
    Audience {
        /// What `sr` had to name.
        expected: String,
    },
    /// The signature is good, but its time is over.
    #[error(
        "the credential expired {seconds} s ago by the relay's clock, which says {now}; make a new one, and check this machine's clock"
    )]
    Expired {
        /// How long ago.
        seconds: u64,
        /// The relay's time.
        now: UnixTime,
    },
    /// The credential stands in the deny list.
    #[error("this credential has been revoked")]
    Revoked,
}

impl AuthError {
    /// The reason in logs and metrics.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Missing => "missing",
            Self::Malformed(_) => "malformed",
            Self::UnknownPolicy => "unknown_policy",
            Self::UnknownDevice => "unknown_device",
            Self::WrongServiceKey | Self::WrongDeviceKey => "wrong_key",
            Self::Audience { .. } => "wrong_audience",
            Self::Expired { .. } => "expired",
            Self::Revoked => "revoked",
        }
    }

    /// Every label that [`AuthError::label`] can give.
    pub const LABELS: [&'static str; 8] = [
        "missing",
        "malformed",
        "unknown_policy",
        "unknown_device",
        "wrong_key",
        "wrong_audience",
        "expired",
        "revoked",
    ];
}

/// Why a credentials file cannot be used.
#[derive(Debug, Error)]
pub enum CredentialsError {
    /// Not the JSON that is expected.
    #[error("not a credentials file: {0}")]
    Json(#[from] JsonError),
    /// A key is not one.
    #[error("{owner}: {error}")]
    Key {
        /// Whose key.
        owner: String,
        /// What is wrong with it.
        error: KeyError,
    },
    /// A device or a service has no key.
    #[error("{0} has no key")]
    NoKey(String),
    /// A device or a service stands twice.
    #[error("{0} stands twice")]
    Twice(String),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    devices: Vec<DeviceEntry>,
    #[serde(default)]
    group_keys: Vec<SecretString>,
    #[serde(default)]
    services: BTreeMap<String, ServiceEntry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct DeviceEntry {
    id: DeviceId,
    #[serde(default)]
    module: Option<ModuleId>,
    keys: Vec<SecretString>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ServiceEntry {
    keys: Vec<SecretString>,
    allow: BTreeSet<Permission>,
    #[serde(default)]
    every_device: bool,
    #[serde(default)]
    devices: BTreeSet<DeviceId>,
    #[serde(default)]
    device_prefixes: BTreeSet<String>,
}

impl Credentials {
    /// Reads the credentials file, whose form `docs/operations.md` describes.
    pub fn from_json(text: &str) -> Result<Self, CredentialsError> {
        let file: File = json::parse(text.as_bytes())?;
        let mut credentials = Self { group_keys: keys("group_keys", &file.group_keys)?, ..Self::default() };
        for entry in file.devices {
            let address = DeviceAddress { device: entry.id, module: entry.module };
            let owner = format!("device {address}");
            let keys = some_keys(&owner, &entry.keys)?;
            if credentials.keys_by_device.insert(address, keys).is_some() {
                return Err(CredentialsError::Twice(owner));
            }
        }
        for (name, entry) in file.services {
            let keys = some_keys(&format!("service {name}"), &entry.keys)?;
            let scope = Scope {
                permissions: entry.allow,
                every_device: entry.every_device,
                devices: entry.devices,
                device_prefixes: entry.device_prefixes,
            };
            credentials.service_by_name.insert(name, Service { keys, scope });
        }
        Ok(credentials)
    }

    /// Whether `address` could ever connect: it is registered, or a group key serves every device.
    pub fn knows(&self, address: &DeviceAddress) -> bool {
        !self.group_keys.is_empty() || self.keys_by_device.contains_key(address)
    }

    /// Whether `address` has keys of its own.
    pub fn is_registered(&self, address: &DeviceAddress) -> bool {
        self.keys_by_device.contains_key(address)
    }

    /// The registered devices and modules behind `after`, in order.
    pub fn registered(&self, after: Option<&DeviceAddress>) -> impl Iterator<Item = &DeviceAddress> {
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        self.keys_by_device.range::<DeviceAddress, _>((from, Bound::Unbounded)).map(|(address, _)| address)
    }

    /// Checks that the bearer of `header` is the device or module `address`.
    pub fn authenticate_device(
        &self,
        header: Option<&str>,
        hosts: &[String],
        address: &DeviceAddress,
        now: UnixTime,
    ) -> Result<DeviceIdentity, AuthError> {
        let token = SasToken::parse(header.ok_or(AuthError::Missing)?)?;
        let derived: Vec<_>;
        let keys = match self.keys_by_device.get(address) {
            Some(keys) => keys.as_slice(),
            None => {
                derived = self.group_keys.iter().map(|group| group.derive(address)).collect();
                &derived
            }
        };
        if !token.is_signed_by(keys) {
            return Err(if keys.is_empty() { AuthError::UnknownDevice } else { AuthError::WrongDeviceKey });
        }
        let path = address.audience();
        if !token.is_for(hosts, &path) {
            let expected = format!("{}/{path}", hosts.first().map_or("the relay's host", String::as_str));
            return Err(AuthError::Audience { expected });
        }
        check_expiry(token.expires(), now)?;
        Ok(DeviceIdentity { address: address.clone(), expires: token.expires() })
    }

    /// Checks which service the bearer of `header` is.
    pub fn authenticate_service(
        &self,
        header: Option<&str>,
        hosts: &[String],
        now: UnixTime,
    ) -> Result<ServiceIdentity, AuthError> {
        let token = SasToken::parse(header.ok_or(AuthError::Missing)?)?;
        let name = token.policy().unwrap_or_default();
        let service = self.service_by_name.get(name).ok_or(AuthError::UnknownPolicy)?;
        if !token.is_signed_by(&service.keys) {
            return Err(AuthError::WrongServiceKey);
        }
        let Some(narrowed_to) = token.path_below(hosts) else {
            let expected = hosts.first().map_or("the relay's host", String::as_str).to_owned();
            return Err(AuthError::Audience { expected });
        };
        check_expiry(token.expires(), now)?;
        Ok(ServiceIdentity {
            name: name.to_owned(),
            scope: service.scope.clone(),
            expires: token.expires(),
            narrowed_to,
        })
    }
}

impl ServiceIdentity {
    /// Whether the service may do `permission` at all.
    pub fn may(&self, permission: Permission) -> bool {
        self.scope.permissions.contains(&permission)
    }

    /// Whether the service may reach `address`.
    pub fn reaches(&self, address: &DeviceAddress) -> bool {
        let path = address.audience();
        let narrow = &self.narrowed_to;
        let below = path.strip_prefix(narrow.as_str());
        let token_covers =
            narrow.is_empty() || below.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
        token_covers && self.scope.reaches(&address.device)
    }
}

impl Scope {
    fn reaches(&self, device: &DeviceId) -> bool {
        self.every_device
            || self.devices.contains(device)
            || self.device_prefixes.iter().any(|prefix| device.as_str().starts_with(prefix.as_str()))
    }
}

fn keys(owner: &str, texts: &[SecretString]) -> Result<Vec<Key>, CredentialsError> {
    let key = |text: &SecretString| Key::from_base64(text.expose_secret());
    let error = |error| CredentialsError::Key { owner: owner.to_owned(), error };
    texts.iter().map(key).collect::<Result<_, _>>().map_err(error)
}

fn some_keys(owner: &str, texts: &[SecretString]) -> Result<Vec<Key>, CredentialsError> {
    match keys(owner, texts)? {
        keys if keys.is_empty() => Err(CredentialsError::NoKey(owner.to_owned())),
        keys => Ok(keys),
    }
}

fn check_expiry(expires: UnixTime, now: UnixTime) -> Result<(), AuthError> {
    match now.0.saturating_sub(expires.0) {
        seconds if seconds > CLOCK_LEEWAY_SECONDS => Err(AuthError::Expired { seconds, now }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: UnixTime = UnixTime(1_800_000_000);

    #[test]
    fn registered_and_derived_devices_show_who_they_are() {
        let credentials = credentials();
        for (id, key) in [("registered", key(1)), ("truck-7", key(2).derive(&"truck-7".parse().unwrap()))] {
            let address: DeviceAddress = id.parse().unwrap();
            let token = device_token(&address, &key, NOW.0 + 60);
            let identity = authenticate(&credentials, &token, &address).unwrap();
            assert_eq!(identity.expires, UnixTime(NOW.0 + 60));
        }
    }

    #[test]
    fn a_registered_device_does_not_take_its_derived_key() {
        let address: DeviceAddress = "registered".parse().unwrap();
        let token = device_token(&address, &key(2).derive(&address), NOW.0 + 60);
        assert_eq!(authenticate(&credentials(), &token, &address), Err(AuthError::WrongDeviceKey));
    }

    #[test]
    fn a_device_is_nobody_else() {
        let address: DeviceAddress = "truck-7".parse().unwrap();
        let token = device_token(&address, &key(2).derive(&address), NOW.0 + 60);
        let other = "truck-8".parse().unwrap();
        assert_eq!(authenticate(&credentials(), &token, &other), Err(AuthError::WrongDeviceKey));
        let module = "truck-7/m".parse().unwrap();
        assert_eq!(authenticate(&credentials(), &token, &module), Err(AuthError::WrongDeviceKey));
        // Signed with the right key, but for another device.
        let token = device_token(&other, &key(2).derive(&address), NOW.0 + 60);
        assert!(matches!(authenticate(&credentials(), &token, &address), Err(AuthError::Audience { .. })));
    }

    #[test]
    fn expiry_has_five_seconds_of_leeway_and_says_how_late_it_is() {
        let address: DeviceAddress = "registered".parse().unwrap();
        let at = |expires| authenticate(&credentials(), &device_token(&address, &key(1), expires), &address);
        assert!(at(NOW.0 - 5).is_ok());
        let error = at(NOW.0 - 600).unwrap_err();
        assert_eq!(error, AuthError::Expired { seconds: 600, now: NOW });
        assert!(error.to_string().contains("expired 600 s ago by the relay's clock"), "{error}");
    }

    #[test]
    fn services_reach_what_their_scope_and_token_say() {
        let service = |resource: &str, name: &str, key: &Key| {
            let token = SasToken::sign(resource, key, UnixTime(NOW.0 + 60), Some(name));
            credentials().authenticate_service(Some(token.expose_secret()), &hosts(), NOW)
        };
        let support = service("relay.example", "support", &key(3)).unwrap();
        assert!(support.may(Permission::Open) && !support.may(Permission::Close));
        let reaches = |identity: &ServiceIdentity, id: &str| identity.reaches(&id.parse().unwrap());
        assert!(
            reaches(&support, "truck-1/engine") && reaches(&support, "lab") && !reaches(&support, "lab2")
        );
        // An asterisk is a legal character of an id, not a wildcard.
        assert!(!reaches(&support, "*"));

        let narrowed = service("relay.example/devices/truck-1", "support", &key(3)).unwrap();
        assert!(reaches(&narrowed, "truck-1") && reaches(&narrowed, "truck-1/engine"));
        assert!(!reaches(&narrowed, "truck-12") && !reaches(&narrowed, "lab"));

        assert_eq!(service("relay.example", "nobody", &key(3)), Err(AuthError::UnknownPolicy));
        assert_eq!(service("relay.example", "support", &key(4)), Err(AuthError::WrongServiceKey));
        assert!(matches!(service("evil.example", "support", &key(3)), Err(AuthError::Audience { .. })));
    }

    #[test]
    fn mistakes_in_the_file_are_named() {
        for (json, text) in [
            ("{", "not a credentials file"),
            (r#"{"device":[]}"#, "unknown field `device`"),
            (r#"{"devices":[{"id":"a/b","keys":[]}]}"#, "must not contain '/'"),
            (r#"{"devices":[{"id":"a","keys":[]}]}"#, "device a has no key"),
            (r#"{"services":{"s":{"keys":["x"],"allow":["open"]}}}"#, "service s: a key must be base64"),
            (r#"{"services":{"s":{"keys":[],"allow":["fly"]}}}"#, "unknown variant `fly`"),
            // A common mistake, in which the key must not be repeated.
            (
                r#"{"group_keys":"c2VjcmV0IGtleSBvZiBhIGZsZWV0"}"#,
                "credentials file: expected a sequence, at line 1",
            ),
        ] {
            let error = Credentials::from_json(json).unwrap_err().to_string();
            assert!(error.contains(text), "{json}: {error}");
        }
    }

    #[test]
    fn debug_shows_no_key() {
        let shown = format!("{:?}", credentials());
        assert!(shown.contains("Key(redacted)"), "{shown}");
        for n in [1, 2, 3, 9] {
            assert!(!shown.contains(key(n).to_base64().expose_secret()), "{shown}");
        }
    }

    #[test]
    fn labels_are_a_closed_set() {
        let expired = AuthError::Expired { seconds: 1, now: NOW };
        assert!(AuthError::LABELS.contains(&expired.label()));
    }

    fn authenticate(
        credentials: &Credentials,
        token: &SecretString,
        address: &DeviceAddress,
    ) -> Result<DeviceIdentity, AuthError> {
        credentials.authenticate_device(Some(token.expose_secret()), &hosts(), address, NOW)
    }

    fn device_token(address: &DeviceAddress, key: &Key, expires: u64) -> SecretString {
        SasToken::sign(&format!("relay.example/{}", address.audience()), key, UnixTime(expires), None)
    }

    fn hosts() -> Vec<String> {
        vec!["relay.example".to_owned()]
    }

    fn key(n: u8) -> Key {
        Key::from_bytes(vec![n; 32]).unwrap()
    }

    fn credentials() -> Credentials {
        let text = |n| key(n).to_base64().expose_secret().to_owned();
        let json = serde_json::json!({
            "devices": [{"id": "registered", "keys": [text(9), text(1)]}],
            "group_keys": [text(2)],
            "services": {"support": {
                "keys": [text(3)], "allow": ["open", "list"],
                "devices": ["lab"], "device_prefixes": ["truck-"],
            }},
        });
        Credentials::from_json(&json.to_string()).unwrap()
    }
}
