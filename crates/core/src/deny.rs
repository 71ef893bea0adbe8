//! The deny list: credentials that have been revoked.

use std::collections::BTreeSet;

use serde::Deserialize;
use thiserror::Error;

use crate::{
    id::DeviceAddress,
    json::{self, JsonError},
};

/// Devices and services that are refused from now on, and whose links and streams are cut.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DenyList {
    /// Devices, with all their modules, or single modules as `device/module`.
    #[serde(default, deserialize_with = "addresses")]
    devices: BTreeSet<DeviceAddress>,
    /// Services, by the names of their credentials.
    #[serde(default)]
    services: BTreeSet<String>,
}

/// The text is not a deny list.
#[derive(Debug, Error)]
#[error("not a deny list: {0}")]
pub struct DenyListError(#[from] JsonError);

impl DenyList {
    /// Reads `{"devices": ["dev1", "dev2/module"], "services": ["name"]}`.
    pub fn from_json(text: &str) -> Result<Self, DenyListError> {
        Ok(json::parse(text.as_bytes())?)
    }

    /// Whether the device, or the module, is revoked. A revoked device takes its modules with it.
    pub fn has_device(&self, address: &DeviceAddress) -> bool {
        self.devices.contains(address) || self.devices.contains(&address.device.clone().into())
    }

    /// Whether the service credential is revoked.
    pub fn has_service(&self, name: &str) -> bool {
        self.services.contains(name)
    }
}

fn addresses<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<BTreeSet<DeviceAddress>, D::Error> {
    let texts = Vec::<String>::deserialize(deserializer)?;
    texts.iter().map(|text| text.parse().map_err(serde::de::Error::custom)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_takes_its_modules_with_it() {
        let list = DenyList::from_json(r#"{"devices":["a","b/m"],"services":["s"]}"#).unwrap();
        let denied = |text: &str| list.has_device(&text.parse().unwrap());
        assert!(denied("a") && denied("a/m") && denied("b/m"));
        assert!(!denied("b") && !denied("b/n") && !denied("c"));
        assert!(list.has_service("s") && !list.has_service("t"));
    }

    #[test]
    fn typing_errors_are_refused() {
        assert!(DenyList::from_json(r#"{"device":["a"]}"#).is_err());
        assert!(DenyList::from_json(r#"{"devices":["a b"]}"#).is_err());
        assert_eq!(DenyList::from_json("{}").unwrap(), DenyList::default());
    }
}
