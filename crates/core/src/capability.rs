//! What the two ends of a stream can do beyond plain bytes.
//!
//! The service states its capabilities in the request, the device in its answer, and the relay hands each the
//! other's. A capability is in force when both have stated it. The relay itself acts on none of them.

use std::{collections::BTreeSet, fmt};

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// An empty binary message ends the sender's direction; see "Half-close" in `docs/protocol.md`.
pub const HALF_CLOSE: &str = "half-close";

const MAX_COUNT: usize = 16;
const MAX_LENGTH: usize = 32;

/// A set of capability names: at most 16 of at most 32 characters out of `a-z`, `0-9` and `-`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<String>", into = "Vec<String>")]
pub struct Capabilities(BTreeSet<String>);

/// Why a list is not a set of capabilities.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum CapabilityError {
    /// More names than an end may state.
    #[error("at most {MAX_COUNT} capabilities can be stated")]
    TooMany,
    /// A name outside the allowed form.
    #[error("a capability has 1 to {MAX_LENGTH} characters out of a-z, 0-9 and `-`")]
    Form,
}

impl Capabilities {
    /// No capability: plain bytes only.
    pub fn none() -> Self {
        Self::default()
    }

    /// What this version of Midspan's own client can do.
    pub fn of_this_client() -> Self {
        Self(BTreeSet::from([HALF_CLOSE.to_owned()]))
    }

    /// Whether this end has stated `name`.
    pub fn has(&self, name: &str) -> bool {
        self.0.contains(name)
    }

    /// What both ends have stated, and so what is in force.
    #[must_use]
    pub fn shared_with(&self, other: &Self) -> Self {
        Self(self.0.intersection(&other.0).cloned().collect())
    }

    /// Whether nothing is stated.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl TryFrom<Vec<String>> for Capabilities {
    type Error = CapabilityError;

    fn try_from(names: Vec<String>) -> Result<Self, CapabilityError> {
        if names.len() > MAX_COUNT {
            return Err(CapabilityError::TooMany);
        }
        let legal = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-';
        if names.iter().any(|name| name.is_empty() || name.len() > MAX_LENGTH || !name.bytes().all(legal)) {
            return Err(CapabilityError::Form);
        }
        Ok(Self(names.into_iter().collect()))
    }
}

impl From<Capabilities> for Vec<String> {
    fn from(capabilities: Capabilities) -> Self {
        capabilities.0.into_iter().collect()
    }
}

impl fmt::Display for Capabilities {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, name) in self.0.iter().enumerate() {
            write!(f, "{}{name}", if index == 0 { "" } else { "," })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_both_state_is_in_force() {
        let one = Capabilities::try_from(vec!["half-close".into(), "resume".into()]).unwrap();
        let two = Capabilities::of_this_client();
        assert!(one.shared_with(&two).has(HALF_CLOSE));
        assert!(!one.shared_with(&two).has("resume"));
        assert!(one.shared_with(&Capabilities::none()).is_empty());
    }

    #[test]
    fn lists_are_bounded() {
        assert_eq!(Capabilities::try_from(vec!["x".to_owned(); 17]), Err(CapabilityError::TooMany));
        assert_eq!(Capabilities::try_from(vec!["x".repeat(33)]), Err(CapabilityError::Form));
        assert_eq!(Capabilities::try_from(vec!["Half Close".to_owned()]), Err(CapabilityError::Form));
    }
}
