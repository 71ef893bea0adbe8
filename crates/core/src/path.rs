//! What a request's path and query ask for, read before anything is known about the sender.

use std::borrow::Cow;

use percent_encoding::percent_decode_str;
use thiserror::Error;

use crate::{
    api::{PAGE_DEFAULT, PAGE_MAX},
    id::{DeviceAddress, IdError, Role, StreamId},
    link::cut,
    problem::{Problem, ProblemKind},
};

/// How much of an unknown path its error repeats, in bytes.
const PATH_SHOWN: usize = 200;

/// A resource of the HTTP API.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ApiPath {
    /// `/v1/endpoints`.
    Endpoints,
    /// `/v1/devices`.
    Devices,
    /// `/v1/devices/{device}` or `/v1/devices/{device}/modules/{module}`.
    Device(DeviceAddress),
    /// The streams to a device: `/streams` below its path.
    DeviceStreams(DeviceAddress),
    /// The link of a device: `/link` below its path.
    DeviceLink(DeviceAddress),
    /// `/v1/streams`.
    Streams,
    /// `/v1/streams/{stream}`, decoded but not parsed: only who may see streams hears that this is none.
    Stream(String),
}

/// Why a path is not one of the API's.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum PathError {
    /// What is percent-encoded is not UTF-8.
    #[error("the path must be percent-encoded UTF-8")]
    Encoding,
    /// The path names a device or a module that no device or module can be.
    #[error(transparent)]
    Id(#[from] IdError),
    /// The API has nothing there; with the front of the path, as it was sent.
    #[error("there is nothing at {0}; the API is described in docs/protocol.md")]
    NotFound(String),
}

impl ApiPath {
    /// Parses the path of a URL, as it stands in the request.
    pub fn parse(path: &str) -> Result<Self, PathError> {
        // Split before it is decoded, so that `%2F` does not end a segment.
        let segments = path.split('/').skip(1).map(|segment| decode(segment).ok_or(PathError::Encoding));
        let segments: Vec<_> = segments.collect::<Result<_, _>>()?;
        let segments: Vec<&str> = segments.iter().map(AsRef::as_ref).collect();
        let not_found = || PathError::NotFound(cut(path, PATH_SHOWN).to_owned());
        match segments.as_slice() {
            ["v1", "endpoints"] => Ok(Self::Endpoints),
            ["v1", "devices"] => Ok(Self::Devices),
            ["v1", "devices", device, rest @ ..] => {
                let device = device.parse()?;
                let (module, rest) = match rest {
                    ["modules", module, rest @ ..] => (Some(module.parse()?), rest),
                    _ => (None, rest),
                };
                let address = DeviceAddress { device, module };
                match rest {
                    [] => Ok(Self::Device(address)),
                    ["streams"] => Ok(Self::DeviceStreams(address)),
                    ["link"] => Ok(Self::DeviceLink(address)),
                    _ => Err(not_found()),
                }
            }
            ["v1", "streams"] => Ok(Self::Streams),
            ["v1", "streams", stream] => Ok(Self::Stream((*stream).to_owned())),
            _ => Err(not_found()),
        }
    }

    /// The methods that the resource has, as the header `Allow` lists them.
    pub fn methods(&self) -> &'static str {
        match self {
            Self::Endpoints | Self::Devices | Self::Device(_) | Self::DeviceLink(_) | Self::Streams => "GET",
            Self::DeviceStreams(_) => "POST",
            Self::Stream(_) => "GET, DELETE",
        }
    }
}

impl From<PathError> for Problem {
    fn from(error: PathError) -> Self {
        let kind = match error {
            PathError::Encoding | PathError::Id(_) => ProblemKind::BadRequest,
            PathError::NotFound(_) => ProblemKind::NotFound,
        };
        Self::new(kind, error.to_string())
    }
}

/// Which page of a list is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageQuery {
    /// The most items of the page, 1 to [`PAGE_MAX`].
    pub limit: usize,
    /// The item before the page, decoded but not parsed: each list has ids of its own.
    pub after: Option<String>,
}

/// Why a query does not ask for a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum PageError {
    /// `limit` is not a number, or out of range.
    #[error("limit must be 1 to {PAGE_MAX}")]
    Limit,
    /// What is percent-encoded is not UTF-8.
    #[error("`after` must be percent-encoded UTF-8")]
    Encoding,
    /// A field stands twice, so that two readers could see two pages.
    #[error("the query has `{0}` twice")]
    Twice(&'static str),
    /// A field that no list has.
    #[error("the query has `limit` and `after` only")]
    Field,
}

impl PageQuery {
    /// Parses the query of a URL, empty when there is none.
    pub fn parse(query: &str) -> Result<Self, PageError> {
        let (mut limit, mut after) = (None, None);
        for field in query.split('&').filter(|field| !field.is_empty()) {
            let (name, value) = field.split_once('=').unwrap_or((field, ""));
            let (slot, name) = match name {
                "limit" => (&mut limit, "limit"),
                "after" => (&mut after, "after"),
                _ => return Err(PageError::Field),
            };
            if slot.replace(value).is_some() {
                return Err(PageError::Twice(name));
            }
        }
        let limit = match limit {
            None => PAGE_DEFAULT,
            Some(digits) if digits.bytes().all(|b| b.is_ascii_digit()) => {
                digits.parse().ok().filter(|limit| (1..=PAGE_MAX).contains(limit)).ok_or(PageError::Limit)?
            }
            Some(_) => return Err(PageError::Limit),
        };
        let decoded = |text| decode(text).map(Cow::into_owned).ok_or(PageError::Encoding);
        Ok(Self { limit, after: after.map(decoded).transpose()? })
    }
}

impl From<PageError> for Problem {
    fn from(error: PageError) -> Self {
        Self::new(ProblemKind::BadRequest, error.to_string())
    }
}

/// Where a leg is opened: `/bridges/{stream}/service` or `/bridges/{stream}/device`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LegPath {
    /// The stream.
    pub stream: StreamId,
    /// Which of its legs.
    pub role: Role,
}

/// The path is not one of a leg. Which part is wrong, the sender does not need to hear: the relay made the right one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("a leg is at /bridges/{{stream}}/service or /bridges/{{stream}}/device")]
pub struct LegPathError;

impl LegPath {
    /// Parses the path of a URL, as it stands in the request: nothing in it needs an encoding, so none is read.
    pub fn parse(path: &str) -> Result<Self, LegPathError> {
        let leg = path.strip_prefix("/bridges/").and_then(|rest| rest.split_once('/'));
        let (stream, role) = leg.ok_or(LegPathError)?;
        let stream = stream.parse().map_err(|_| LegPathError)?;
        let role = role.parse().map_err(|_| LegPathError)?;
        Ok(Self { stream, role })
    }
}

impl From<LegPathError> for Problem {
    fn from(error: LegPathError) -> Self {
        Self::new(ProblemKind::NotFound, error.to_string())
    }
}

fn decode(text: &str) -> Option<Cow<'_, str>> {
    percent_decode_str(text).decode_utf8().ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const STREAM: &str = "0123456789abcdef0123456789abcdef";

    fn address(text: &str) -> DeviceAddress {
        text.parse().unwrap()
    }

    fn refusal(path: &str) -> (u16, String) {
        let problem = Problem::from(ApiPath::parse(path).unwrap_err());
        (problem.status, problem.detail)
    }

    #[test]
    fn every_resource_has_its_path_and_its_methods() {
        for (path, resource, methods) in [
            ("/v1/endpoints", ApiPath::Endpoints, "GET"),
            ("/v1/devices", ApiPath::Devices, "GET"),
            ("/v1/devices/d", ApiPath::Device(address("d")), "GET"),
            ("/v1/devices/d/modules/m", ApiPath::Device(address("d/m")), "GET"),
            ("/v1/devices/d/streams", ApiPath::DeviceStreams(address("d")), "POST"),
            ("/v1/devices/d/modules/m/streams", ApiPath::DeviceStreams(address("d/m")), "POST"),
            ("/v1/devices/d/link", ApiPath::DeviceLink(address("d")), "GET"),
            ("/v1/devices/d/modules/m/link", ApiPath::DeviceLink(address("d/m")), "GET"),
            ("/v1/streams", ApiPath::Streams, "GET"),
            (&format!("/v1/streams/{STREAM}"), ApiPath::Stream(STREAM.to_owned()), "GET, DELETE"),
        ] {
            let parsed = ApiPath::parse(path);
            assert_eq!(parsed.as_ref().map(ApiPath::methods), Ok(methods), "{path}");
            assert_eq!(parsed, Ok(resource), "{path}");
        }
    }

    #[test]
    fn segments_are_decoded_once_and_after_they_were_told_apart() {
        for (path, resource) in [
            ("/%76%31/devices", ApiPath::Devices),
            ("/v1/devices/a%25b", ApiPath::Device(address("a%b"))),
            ("/v1/devices/a%2525b", ApiPath::Device(address("a%25b"))),
            // Clients differ in whether they encode a `%` that two digits do not follow.
            ("/v1/devices/a%b", ApiPath::Device(address("a%b"))),
            ("/v1/devices/d/%6Cink", ApiPath::DeviceLink(address("d"))),
            // A device may be called as a resource is.
            ("/v1/devices/streams", ApiPath::Device(address("streams"))),
            ("/v1/devices/modules/modules/modules", ApiPath::Device(address("modules/modules"))),
            ("/v1/streams/", ApiPath::Stream(String::new())),
            ("/v1/streams/a%2Fb", ApiPath::Stream("a/b".to_owned())),
        ] {
            assert_eq!(ApiPath::parse(path), Ok(resource), "{path}");
        }
        let what = "device id";
        let error = IdError::Character { what, character: '/', allowed: "- . % _ * ? ! ( ) , : = @ $ '" };
        assert_eq!(ApiPath::parse("/v1/devices/d%2Flink"), Err(error.into()));
        assert_eq!(ApiPath::parse("/v1/devices/%2E%2E"), Err(IdError::Dots { what }.into()));
    }

    #[test]
    fn what_is_not_there_is_not_found() {
        for path in [
            "",
            "*",
            "/",
            "//",
            "/v1",
            "/v1/",
            "//v1/devices",
            "/v2/devices",
            "/V1/devices",
            "/v1/endpoints/",
            "/v1/devices/d/",
            "/v1/devices/d/modules",
            "/v1/devices/d/modules/m/",
            "/v1/devices/d/modules/m/modules/n",
            "/v1/devices/d/link/x",
            "/v1/streams/x/",
        ] {
            let detail = format!("there is nothing at {path}; the API is described in docs/protocol.md");
            assert_eq!(refusal(path), (404, detail));
        }
        let (_, detail) = refusal(&format!("/{}", "é".repeat(4000)));
        assert!(detail.len() < 300, "{detail}");
    }

    #[test]
    fn malformed_paths_say_what_is_wrong() {
        for (path, detail) in [
            ("/v1/devices/", "a device id must not be empty"),
            ("/v1/devices/d/modules/", "a module id must not be empty"),
            ("/v1/devices//modules/m", "a device id must not be empty"),
            // The id comes first: what would follow it is not looked at.
            ("/v1/devices/../nothing", "a device id must not be `.` or `..`"),
            ("/v1/devices/%FF", "the path must be percent-encoded UTF-8"),
            ("/nothing/%C3%28", "the path must be percent-encoded UTF-8"),
        ] {
            assert_eq!(refusal(path), (400, detail.to_owned()), "{path}");
        }
    }

    #[test]
    fn queries_ask_for_a_page() {
        for (query, limit, after) in [
            ("", PAGE_DEFAULT, None),
            ("&&", PAGE_DEFAULT, None),
            ("limit=1", 1, None),
            ("limit=1000&after=d", PAGE_MAX, Some("d")),
            ("after=d%2Fm&limit=7", 7, Some("d/m")),
            ("after=a=b", PAGE_DEFAULT, Some("a=b")),
            ("after=a+b", PAGE_DEFAULT, Some("a+b")),
            ("after", PAGE_DEFAULT, Some("")),
        ] {
            let page = PageQuery { limit, after: after.map(str::to_owned) };
            assert_eq!(PageQuery::parse(query), Ok(page), "{query}");
        }
    }

    #[test]
    fn malformed_queries_say_what_is_wrong() {
        for (query, detail) in [
            ("limit=0", "limit must be 1 to 1000"),
            ("limit=1001", "limit must be 1 to 1000"),
            ("limit=-1", "limit must be 1 to 1000"),
            ("limit=99999999999999999999999", "limit must be 1 to 1000"),
            ("limit=+5", "limit must be 1 to 1000"),
            ("limit=0&limit=1", "the query has `limit` twice"),
            ("after=a&limit=1&after=b", "the query has `after` twice"),
            ("limit", "limit must be 1 to 1000"),
            ("after=%FF", "`after` must be percent-encoded UTF-8"),
            ("Limit=1", "the query has `limit` and `after` only"),
            ("=", "the query has `limit` and `after` only"),
        ] {
            let problem = Problem::from(PageQuery::parse(query).unwrap_err());
            assert_eq!((problem.status, problem.detail.as_str()), (400, detail), "{query}");
        }
    }

    #[test]
    fn legs_have_one_path_each() {
        for role in Role::ALL {
            let leg = LegPath { stream: STREAM.parse().unwrap(), role };
            assert_eq!(LegPath::parse(&format!("/bridges/{STREAM}/{role}")), Ok(leg));
        }
        for path in [
            "",
            "/bridges",
            "/bridges/",
            "/bridges//",
            "/bridges/x/device",
            &format!("/bridges/{STREAM}"),
            &format!("/bridges/{STREAM}/"),
            &format!("/bridges/{STREAM}/nobody"),
            &format!("/bridges/{STREAM}/device/"),
            &format!("/bridges/{STREAM}/%64evice"),
            &format!("/bridges/{}/device", STREAM.to_uppercase()),
            &format!("bridges/{STREAM}/device"),
        ] {
            let problem = Problem::from(LegPath::parse(path).unwrap_err());
            let detail = "a leg is at /bridges/{stream}/service or /bridges/{stream}/device";
            assert_eq!((problem.status, problem.detail.as_str()), (404, detail), "{path}");
        }
    }

    proptest! {
        #[test]
        fn addresses_read_back_from_their_paths(
            device in "[A-Za-z0-9.%_*?!(),:=@$'-]{3,128}",
            module in prop::option::of("[A-Za-z0-9.%_*?!(),:=@$'-]{3,128}"),
        ) {
            let module = module.map(|module| module.parse().unwrap());
            let address = DeviceAddress { device: device.parse().unwrap(), module };
            let path = format!("/v1/{}", address.path());
            prop_assert_eq!(ApiPath::parse(&path), Ok(ApiPath::Device(address.clone())));
            let streams = ApiPath::parse(&format!("{path}/streams"));
            prop_assert_eq!(streams, Ok(ApiPath::DeviceStreams(address.clone())));
            prop_assert_eq!(ApiPath::parse(&format!("{path}/link")), Ok(ApiPath::DeviceLink(address)));
        }

        #[test]
        fn limits_are_in_bounds(limit: u64) {
            let page = PageQuery::parse(&format!("limit={limit}"));
            prop_assert_eq!(page.is_ok(), (1..=1000).contains(&limit));
        }

        #[test]
        fn legs_read_back(bits: u128, at in 0..2_usize) {
            let leg = LegPath { stream: StreamId::from_random(bits), role: Role::ALL[at] };
            prop_assert_eq!(LegPath::parse(&format!("/bridges/{}/{}", leg.stream, leg.role)), Ok(leg));
        }

        #[test]
        fn parsing_never_panics(text in "(/v1/(devices|streams)/)?[/%&=a-fé0-9]{0,300}") {
            let _ = ApiPath::parse(&text);
            let _ = PageQuery::parse(&text);
            let _ = LegPath::parse(&text);
        }
    }
}
