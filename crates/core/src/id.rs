//! Names of things, parsed once where they enter and trusted afterwards.

use std::{fmt, str::FromStr, sync::Arc};

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The most characters that a device id, a module id or a stream name may have.
pub const ID_MAX_LENGTH: usize = 128;

/// Why a text is not an id or a name.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum IdError {
    /// Nothing was given.
    #[error("a {what} must not be empty")]
    Empty {
        /// What the text was meant to be.
        what: &'static str,
    },
    /// More than [`ID_MAX_LENGTH`] characters.
    #[error("a {what} has at most {ID_MAX_LENGTH} characters, this one has {length}")]
    TooLong {
        /// What the text was meant to be.
        what: &'static str,
        /// How many bytes were given.
        length: usize,
    },
    /// A character outside the allowed set.
    #[error("a {what} must not contain {character:?}; allowed are ASCII letters, digits and {allowed}")]
    Character {
        /// What the text was meant to be.
        what: &'static str,
        /// The first character that is not allowed.
        character: char,
        /// The special characters that are.
        allowed: &'static str,
    },
    /// `.` or `..`, which clients and proxies remove from URL paths.
    #[error("a {what} must not be `.` or `..`")]
    Dots {
        /// What the text was meant to be.
        what: &'static str,
    },
    /// Not of the form that the relay itself hands out.
    #[error("this is not a {what}")]
    Form {
        /// What the text was meant to be.
        what: &'static str,
    },
}

/// Lets serde read and write a type in the form of its `FromStr` and `Display`.
macro_rules! text_form {
    ($name:ident, $error:ident) => {
        impl TryFrom<String> for $name {
            type Error = $error;

            fn try_from(text: String) -> Result<Self, $error> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(value: $name) -> Self {
                value.to_string()
            }
        }
    };
}
pub(crate) use text_form;

macro_rules! text_id {
    ($(#[$doc:meta])* $name:ident, $what:literal, $special:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(Arc<str>);

        impl $name {
            /// The text as it was given.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = IdError;

            fn from_str(text: &str) -> Result<Self, IdError> {
                check_text(text, $what, $special)?;
                Ok(Self(text.into()))
            }
        }

        text_form!($name, IdError);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:?}", &self.0)
            }
        }
    };
}

text_id! {
    /// A device, case-sensitive: up to 128 ASCII letters, digits and ``- . % _ * ? ! ( ) , : = @ $ '``.
    ///
    /// The set is the one of IoT Hub's identity registry. `.` and `..` are refused, because HTTP clients and
    /// proxies take them out of paths.
    DeviceId, "device id", "- . % _ * ? ! ( ) , : = @ $ '"
}

text_id! {
    /// A module of a device, with the rules of a [`DeviceId`].
    ModuleId, "module id", "- . % _ * ? ! ( ) , : = @ $ '"
}

text_id! {
    /// What a stream is for, such as `ssh`: up to 128 ASCII letters, digits and ``- . _ ~ ! ( ) * , : @ $ '``.
    ///
    /// The set is what stands in one segment of a URL path and of an MQTT topic without any encoding. So `/` and `%` are
    /// refused: one party on the way would decode `%2F`, and the next would not.
    StreamName, "stream name", "- . _ ~ ! ( ) * , : @ $ '"
}

fn check_text(text: &str, what: &'static str, allowed: &'static str) -> Result<(), IdError> {
    if text.is_empty() {
        return Err(IdError::Empty { what });
    }
    let legal = |c: char| c.is_ascii_alphanumeric() || (c != ' ' && allowed.contains(c));
    if let Some(character) = text.chars().find(|&c| !legal(c)) {
        return Err(IdError::Character { what, character, allowed });
    }
    if text.len() > ID_MAX_LENGTH {
        return Err(IdError::TooLong { what, length: text.len() });
    }
    if text == "." || text == ".." {
        return Err(IdError::Dots { what });
    }
    Ok(())
}

/// A device, or a module of it: what a stream is opened to, and what holds one device link.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct DeviceAddress {
    /// The device.
    pub device: DeviceId,
    /// The module of the device, when one is meant.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub module: Option<ModuleId>,
}

impl DeviceAddress {
    /// The path of the resource below the API's root, percent-encoded: `devices/d` or `devices/d/modules/m`.
    pub fn path(&self) -> String {
        let device = encode_segment(self.device.as_str());
        match &self.module {
            None => format!("devices/{device}"),
            Some(module) => format!("devices/{device}/modules/{}", encode_segment(module.as_str())),
        }
    }

    /// The path as a SAS token names it, not encoded: `devices/d` or `devices/d/modules/m`.
    pub fn audience(&self) -> String {
        match &self.module {
            None => format!("devices/{}", self.device),
            Some(module) => format!("devices/{}/modules/{module}", self.device),
        }
    }
}

impl From<DeviceId> for DeviceAddress {
    fn from(device: DeviceId) -> Self {
        Self { device, module: None }
    }
}

/// `device` or `device/module`; neither id can hold a slash.
impl FromStr for DeviceAddress {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        match text.split_once('/') {
            None => Ok(Self { device: text.parse()?, module: None }),
            Some((device, module)) => Ok(Self { device: device.parse()?, module: Some(module.parse()?) }),
        }
    }
}

impl fmt::Display for DeviceAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.module {
            None => write!(f, "{}", self.device),
            Some(module) => write!(f, "{}/{module}", self.device),
        }
    }
}

impl fmt::Debug for DeviceAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.to_string())
    }
}

fn encode_segment(text: &str) -> impl fmt::Display + '_ {
    percent_encoding::utf8_percent_encode(text, SEGMENT)
}

/// Everything but RFC 3986's unreserved characters is encoded.
const SEGMENT: &percent_encoding::AsciiSet =
    &percent_encoding::NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

macro_rules! random_id {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(uuid::Uuid);

        impl $name {
            /// An id made of 128 random bits, of which six are overwritten by RFC 9562's version and variant.
            pub fn from_random(bits: u128) -> Self {
                Self(uuid::Builder::from_random_bytes(bits.to_be_bytes()).into_uuid())
            }

            /// The id's 128 bits.
            pub fn as_u128(self) -> u128 {
                self.0.as_u128()
            }
        }

        /// Takes exactly the form that `Display` writes: 32 lower-case hexadecimal digits.
        impl FromStr for $name {
            type Err = IdError;

            fn from_str(text: &str) -> Result<Self, IdError> {
                let form = IdError::Form { what: $what };
                if text.len() != 32 || !text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)) {
                    return Err(form);
                }
                uuid::Uuid::try_parse(text).map(Self).map_err(|_| form)
            }
        }

        text_form!($name, IdError);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}", self.0.simple())
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}", self.0.simple())
            }
        }
    };
}

random_id! {
    /// One stream, from the request for it to its end: 32 hexadecimal digits.
    StreamId, "stream id"
}

random_id! {
    /// One request of a service, as the device hears and answers it: 32 hexadecimal digits.
    RequestId, "request id"
}

random_id! {
    /// One life of a process. Two incarnations are compared for equality only, never for age.
    Incarnation, "incarnation"
}

/// The two ends of a stream, and of its legs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// The end that asked for the stream.
    Service,
    /// The end that was asked.
    Device,
}

impl Role {
    /// Both roles.
    pub const ALL: [Self; 2] = [Self::Service, Self::Device];

    /// The other end.
    #[must_use]
    pub fn peer(self) -> Self {
        match self {
            Self::Service => Self::Device,
            Self::Device => Self::Service,
        }
    }

    /// The role in paths, tickets, metrics and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Service => "service",
            Self::Device => "device",
        }
    }
}

impl FromStr for Role {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        match text {
            "service" => Ok(Self::Service),
            "device" => Ok(Self::Device),
            _ => Err(IdError::Form { what: "role" }),
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn device_ids_take_iot_hubs_characters() {
        for id in ["dev1", "a", "A-b.c%d_e*f?g!h(i)j,k:l=m@n$o'", &"x".repeat(128)] {
            assert_eq!(id.parse::<DeviceId>().unwrap().as_str(), id);
        }
    }

    #[test]
    fn device_ids_refuse_everything_else() {
        for id in ["", " ", "a b", "a/b", "a+b", "a#b", "ä", "🦀", "a\0", ".", "..", &"x".repeat(129)] {
            assert!(id.parse::<DeviceId>().is_err(), "{id:?} was taken");
        }
    }

    #[test]
    fn stream_names_refuse_what_an_url_would_change() {
        for name in ["", "a/b", "a%2Fb", "a?b", "a#b", "a=b", "🦀", "..", &"n".repeat(1024)] {
            assert!(name.parse::<StreamName>().is_err(), "{name:?} was taken");
        }
        assert!("ssh".parse::<StreamName>().is_ok());
    }

    #[test]
    fn errors_say_what_is_wrong() {
        let error = "a/b".parse::<StreamName>().unwrap_err();
        assert_eq!(
            error.to_string(),
            "a stream name must not contain '/'; allowed are ASCII letters, digits and - . _ ~ ! ( ) * , : @ $ '"
        );
    }

    #[test]
    fn addresses_read_back() {
        for text in ["dev1", "dev1/mod1"] {
            assert_eq!(text.parse::<DeviceAddress>().unwrap().to_string(), text);
        }
        assert!("a/b/c".parse::<DeviceAddress>().is_err());
        assert_eq!("a%b/c".parse::<DeviceAddress>().unwrap().path(), "devices/a%25b/modules/c");
    }

    proptest! {
        #[test]
        fn random_ids_read_back(bits: u128) {
            let id = StreamId::from_random(bits);
            prop_assert_eq!(id.to_string().parse::<StreamId>().unwrap(), id);
        }

        #[test]
        fn parsing_never_panics(text in ".{0,200}") {
            let _ = text.parse::<DeviceAddress>();
            let _ = text.parse::<StreamName>();
            let _ = text.parse::<StreamId>();
        }
    }
}
