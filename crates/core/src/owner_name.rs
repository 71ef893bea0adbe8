//! The owner of a stream in the public name of the edges: `edge-3.streams.example`.
//!
//! A name in DNS and in a certificate has labels of its own form, so an edge that is to stand in one must be called
//! accordingly: one label of RFC 1123, in lower case.

use std::{fmt, str::FromStr};

use thiserror::Error;

/// The longest label (RFC 1035, section 2.3.4), and the longest name, in bytes.
const LABEL_MAX: usize = 63;
const NAME_MAX: usize = 253;

const OWNER: &str = "{owner}.";

/// The public base URL of the edges, in which the owner's name may stand: `https://{owner}.streams.example`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EdgeUrl {
    before: String,
    /// What follows the owner's name and its dot, when it stands there.
    behind: Option<String>,
}

/// The domain below which each edge has its own name: `streams.example`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OwnerDomain(String);

/// Why a text is not the base URL of edges.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error(
    "`{{owner}}` is the first label of the host, as in `https://{{owner}}.streams.example`, and there are no other braces"
)]
pub struct BadEdgeUrl;

/// Why a text is not a domain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error(
    "a domain is lower-case labels of letters, digits and hyphens with dots between them, such as `streams.example`"
)]
pub struct BadDomain;

/// An edge's name that cannot stand in a public name.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error(
    "the edge name {0:?} cannot stand in a public name: it must have 1 to 63 lower-case letters, digits and hyphens, none at either end"
)]
pub struct NotALabel(pub String);

/// Checks that `name` is one DNS label in lower case (RFC 1123, section 2.1).
fn check_label(name: &str) -> Result<(), NotALabel> {
    let known = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    let good = (1..=LABEL_MAX).contains(&name.len())
        && name.bytes().all(known)
        && !name.starts_with('-')
        && !name.ends_with('-');
    if good { Ok(()) } else { Err(NotALabel(name.to_owned())) }
}

impl EdgeUrl {
    /// The base URL of the edge `owner`, without a slash at its end.
    pub fn of(&self, owner: &str) -> Result<String, NotALabel> {
        let Self { before, behind } = self;
        match behind {
            None => Ok(before.clone()),
            Some(behind) => {
                check_label(owner)?;
                Ok(format!("{before}{owner}.{behind}"))
            }
        }
    }

    /// Whether it is another one for each edge.
    pub fn names_owner(&self) -> bool {
        self.behind.is_some()
    }
}

impl FromStr for EdgeUrl {
    type Err = BadEdgeUrl;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let text = text.trim_end_matches('/');
        let (before, behind) = match text.split_once(OWNER) {
            Some((before, behind)) => (before, Some(behind)),
            None => (text, None),
        };
        let braces = [before, behind.unwrap_or_default()].concat().contains(['{', '}']);
        let host_follows = behind.is_none_or(|behind| {
            let first = behind.as_bytes().first();
            first.is_some_and(u8::is_ascii_alphanumeric) && (before.is_empty() || before.ends_with("://"))
        });
        if braces || !host_follows {
            return Err(BadEdgeUrl);
        }
        Ok(Self { before: before.to_owned(), behind: behind.map(str::to_owned) })
    }
}

impl fmt::Display for EdgeUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.before)?;
        match &self.behind {
            Some(behind) => write!(f, "{OWNER}{behind}"),
            None => Ok(()),
        }
    }
}

impl OwnerDomain {
    /// The public name of an edge.
    pub fn name_of(&self, edge: &str) -> Result<String, NotALabel> {
        check_label(edge)?;
        Ok(format!("{edge}.{}", self.0))
    }

    /// The edge whose public name this is, in lower case, whether or not there is one of that name.
    pub fn edge_in(&self, name: &str) -> Option<String> {
        let name = name.to_ascii_lowercase();
        let edge = name.strip_suffix(self.0.as_str())?.strip_suffix('.')?;
        check_label(edge).ok()?;
        Some(edge.to_owned())
    }
}

impl FromStr for OwnerDomain {
    type Err = BadDomain;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let good =
            text.len() < NAME_MAX - LABEL_MAX && text.split('.').all(|label| check_label(label).is_ok());
        if good { Ok(Self(text.to_owned())) } else { Err(BadDomain) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_url_names_the_owner_or_does_not() {
        let url = |text: &str| text.parse::<EdgeUrl>().unwrap();
        assert_eq!(url("https://relay.example/").of("any name").unwrap(), "https://relay.example");
        let named = url("https://{owner}.streams.example:8444/");
        assert_eq!(named.of("edge-3").unwrap(), "https://edge-3.streams.example:8444");
        assert_eq!(named.to_string(), "https://{owner}.streams.example:8444");
        assert_eq!(url("{owner}.streams.example").of("e").unwrap(), "e.streams.example");
        for name in ["", "Edge-3", "edge.3", "-edge", "edge-", "edge_3", "ed ge", "é", &"e".repeat(64)] {
            assert_eq!(named.of(name), Err(NotALabel(name.to_owned())), "{name:?}");
        }
        for text in [
            "https://{Owner}.streams.example",
            "https://{owner}",
            "https://{owner}.",
            "https://{owner}./x",
            "https://x-{owner}.streams.example",
            "https://x.{owner}.streams.example",
            "https://streams.example/{owner}.x",
            "https://{owner}.{owner}.streams.example",
            "https://{edge}.streams.example",
            "https://relay.example/}",
        ] {
            assert_eq!(text.parse::<EdgeUrl>(), Err(BadEdgeUrl), "{text}");
        }
    }

    #[test]
    fn an_edge_is_one_label_below_the_domain() {
        let domain: OwnerDomain = "streams.example".parse().unwrap();
        assert_eq!(domain.edge_in("edge-3.streams.example").as_deref(), Some("edge-3"));
        assert_eq!(domain.edge_in("EDGE-3.Streams.Example").as_deref(), Some("edge-3"));
        for other in [
            "streams.example",
            ".streams.example",
            "a.edge-3.streams.example",
            "edge-3streams.example",
            "edge-3.example",
            "",
        ] {
            assert_eq!(domain.edge_in(other), None, "{other}");
        }
        for text in ["", ".", "Streams.example", "streams..example", "*.example", "streams.example.", "a b"] {
            assert_eq!(text.parse::<OwnerDomain>(), Err(BadDomain), "{text}");
        }
    }

    proptest! {
        #[test]
        fn a_public_name_leads_back_to_its_edge(name in "[ -~]{0,70}") {
            let domain: OwnerDomain = "streams.example".parse().unwrap();
            if let Ok(public) = domain.name_of(&name) {
                prop_assert_eq!(domain.edge_in(&public), Some(name));
            }
        }
    }
}
