//! What every fuzz target does with its bytes.
//!
//! The targets under `fuzz/` call these functions with what the fuzzer invents; a test calls them with the seeds under
//! `fuzz/corpus/`, on the stable compiler. A target checks what must hold for every input, not only that nothing panics.

use std::{fmt::Write as _, net::IpAddr, str::FromStr};

use http::{HeaderMap, HeaderName, HeaderValue, header};
use midspan_core::{
    api::{PAGE_MAX, StreamGrant, StreamRequest},
    connection_string::{ConnectionString, Identity},
    credential::Credentials,
    deny::DenyList,
    forwarded::{self, ForwardedHeader},
    frame::{
        self, CloseFrame, Control, Event, FrameError, FrameReader, HEADROOM, HOLD, Opcode, Passage, Sender,
        Stop,
    },
    id::{
        DeviceAddress, DeviceId, ID_MAX_LENGTH, Incarnation, ModuleId, RequestId, Role, StreamId, StreamName,
    },
    internal::{Answer, Ask, DeviceOnline, EndStream, LinkReplaced},
    json,
    key::Key,
    link::{self, FromDevice, ToDevice},
    owner_name::{EdgeUrl, OwnerDomain},
    passed,
    path::{ApiPath, LegPath, PageQuery},
    problem::Problem,
    proxy::{self, Addresses, Parsed},
    sas::{SasError, SasToken, without_port},
    ticket::{Owner, Ticket, TicketKeys},
    time::UnixTime,
    trace::TraceParent,
};
use midspan_platform::http::{first_subprotocol, websocket_key};
use secrecy::ExposeSecret as _;

/// A target's name, and what is done with the bytes.
pub(crate) type Target = (&'static str, fn(&[u8]));

/// Every target, by the name of its folder under `fuzz/corpus/`.
pub(crate) const TARGETS: &[Target] = &[
    ("frame", frame),
    ("sas", sas),
    ("ticket", ticket),
    ("connection_string", connection_string),
    ("from_device", from_device),
    ("to_device", to_device),
    ("ids", ids),
    ("traceparent", traceparent),
    ("credentials", credentials),
    ("deny_list", deny_list),
    ("stream_request", stream_request),
    ("stream_grant", stream_grant),
    ("problem", problem),
    ("internal", internal),
    ("api_path", api_path),
    ("page_query", page_query),
    ("leg_path", leg_path),
    ("upgrade_headers", upgrade_headers),
    ("proxy", proxy),
    ("forwarded", forwarded),
    ("owner_name", owner_name),
];

/// How bytes are cut into reads makes no difference; little is held back; what a relay sends on reads the same.
///
/// The first byte is the length of a read, less one.
pub(crate) fn frame(data: &[u8]) {
    let Some((&step, bytes)) = data.split_first() else { return };
    let step = usize::from(step) + 1;
    for sender in [Sender::Client, Sender::Server] {
        let at_once = read_leg(sender, bytes, bytes.len().max(1));
        let in_steps = read_leg(sender, bytes, step);
        assert_eq!(at_once, in_steps, "the size of a read changes what is read");
        for hold in [false, true] {
            for step in [step, bytes.len().max(1)] {
                let passed = pass_leg(sender, bytes, step, hold);
                let again = read_leg(Sender::Server, &passed.sent_on, passed.sent_on.len().max(1));
                assert_eq!(
                    messages(&at_once, hold),
                    messages(&again, hold),
                    "what is sent on reads differently"
                );
                let stops: Vec<_> =
                    at_once.iter().filter(|item| !matches!(item, Item::Message { .. })).collect();
                assert_eq!(
                    stops,
                    passed.stops.iter().collect::<Vec<_>>(),
                    "control frames are told differently"
                );
            }
        }
    }
}

/// A signature that parses has lengths in bounds; a signature that is made can be parsed and verified, by its key only.
pub(crate) fn sas(data: &[u8]) {
    let Ok(text) = str::from_utf8(data) else { return };
    let hosts = [text.to_owned(), "relay.example".to_owned()];
    let _ = without_port(text);
    if let Ok(token) = SasToken::parse(text) {
        assert!(!token.is_signed_by(&[]), "no key has signed this");
        let _ = token.is_signed_by(&[key(1)]);
        let _ = token.policy();
        if token.is_for(&hosts, "devices/dev1") {
            assert!(token.path_below(&hosts).is_some(), "a token for a path is for its host");
        }
    }
    let expires = UnixTime(data.iter().fold(0, |sum, &byte| sum << 7 ^ u64::from(byte)));
    let signed = SasToken::sign(text, &key(1), expires, Some(text));
    if let Ok(token) = SasToken::parse(signed.expose_secret()) {
        assert!(token.is_signed_by(&[key(1)]) && !token.is_signed_by(&[key(2)]));
        assert_eq!(token.policy().unwrap_or_default(), text);
        assert_eq!(token.expires(), expires);
    }
}

/// What was not signed is no ticket; what was signed is, until one of its bytes is another.
///
/// The first two bytes choose the byte of a good ticket that is changed, and what it becomes.
pub(crate) fn ticket(data: &[u8]) {
    let now = UnixTime(1_800_000_000);
    let Ok(keys) = TicketKeys::new(&key(1), Some(&key(2))) else { return };
    if let Ok(text) = str::from_utf8(data) {
        let _ = keys.verify(text, now);
        let _ = TicketKeys::from_text(text);
    }
    let &[at, byte, ..] = data else { return };
    let good = good_ticket(now);
    let Ok(signed) = keys.sign(&good) else { return };
    let text = signed.expose_secret();
    assert_eq!(keys.verify(text, now).as_ref(), Ok(&good));

    // Without the last character, which has bits that carry nothing.
    let at = usize::from(at) * (text.len() - 2) / 255;
    let mut changed = text.as_bytes().to_vec();
    changed[at] = byte;
    if let Ok(changed) = str::from_utf8(&changed) {
        assert!(changed == text || keys.verify(changed, now).is_err(), "byte {at} is not protected");
    }
}

/// What parses is written in a form that parses to the same, and no error repeats a key.
pub(crate) fn connection_string(data: &[u8]) {
    let Ok(text) = str::from_utf8(data) else { return };
    match ConnectionString::from_str(text) {
        Ok(parsed) => {
            let written = parsed.to_text();
            let again = ConnectionString::from_str(written.expose_secret());
            assert!(
                again.is_ok_and(|again| again.host == parsed.host
                    && again.identity == parsed.identity
                    && again.key.expose_bytes() == parsed.key.expose_bytes()),
                "what is written reads differently"
            );
            let shown = format!("{:?}", parsed.key);
            assert!(!shown.contains(parsed.key.to_base64().expose_secret()), "the key is shown");
            match SasToken::parse(parsed.sign(UnixTime(1)).expose_secret()) {
                Ok(token) => {
                    let is_service = matches!(parsed.identity, Identity::Service(_));
                    assert!(token.is_signed_by(&[parsed.key]) && token.policy().is_some() == is_service);
                }
                // The name of a policy may be long.
                Err(error) => assert_eq!(error, SasError::TooLong),
            }
        }
        Err(error) => assert!(error.to_string().len() < 400, "an error repeats too much"),
    }
}

/// What a device sends parses to the same after it was written.
pub(crate) fn from_device(data: &[u8]) {
    if let Ok(message) = serde_json::from_slice::<FromDevice>(data)
        && message != FromDevice::Unknown
    {
        let written = serde_json::to_vec(&message).unwrap_or_default();
        let again = serde_json::from_slice::<FromDevice>(&written);
        assert!(again.is_ok_and(|again| again == message), "what is written reads differently");
    }
    if let Ok(text) = str::from_utf8(data) {
        for max in [0, 1, link::REASON_MAX, data.len() / 2] {
            let front = link::cut(text, max);
            assert!(front.len() <= max && text.starts_with(front));
        }
    }
}

/// No message to a device shows its ticket in a log.
pub(crate) fn to_device(data: &[u8]) {
    let Ok(message) = serde_json::from_slice::<ToDevice>(data) else { return };
    if let ToDevice::Request(invitation) = &message {
        let shown = format!("{:?}", invitation.ticket);
        let ticket = invitation.ticket.expose_secret();
        assert!(ticket.len() < 32 || !shown.contains(ticket), "the ticket is shown");
    }
    let _ = serde_json::to_vec(&message);
}

/// What is an id is written as it was read, and stands in a URL as one segment.
pub(crate) fn ids(data: &[u8]) {
    let Ok(text) = str::from_utf8(data) else { return };
    same_text::<DeviceId>(text);
    same_text::<ModuleId>(text);
    same_text::<StreamName>(text);
    same_text::<StreamId>(text);
    same_text::<RequestId>(text);
    same_text::<Incarnation>(text);
    same_text::<Role>(text);
    if let Ok(address) = text.parse::<DeviceAddress>() {
        assert_eq!(address.to_string(), text);
        let path = address.path();
        let segments = if address.module.is_some() { 4 } else { 2 };
        assert_eq!(path.split('/').count(), segments, "an id leaves its segment");
        let plain = |c: char| c.is_ascii_alphanumeric() || "-._~%/".contains(c);
        assert!(path.chars().all(plain), "a character of an id is not encoded");
    }
}

/// What is a trace context is written as it was read.
pub(crate) fn traceparent(data: &[u8]) {
    let Ok(text) = str::from_utf8(data) else { return };
    same_text::<TraceParent>(text);
    if let Ok(trace) = text.parse::<TraceParent>() {
        assert_eq!(trace.child(1).trace_id(), trace.trace_id());
    }
}

/// A file of credentials lets nobody in who signs with a key of their own.
pub(crate) fn credentials(data: &[u8]) {
    let Ok(text) = str::from_utf8(data) else { return };
    let Ok(credentials) = Credentials::from_json(text) else { return };
    let hosts = ["relay.example".to_owned()];
    let now = UnixTime(1);
    // Nobody finds this key by accident.
    let stranger = Key::from_bytes(b"a key that stands in no credentials file".to_vec());
    let (Ok(stranger), Ok(nobody)) = (stranger, "dev1".parse::<DeviceAddress>()) else { return };
    for address in credentials.registered(None).chain([&nobody]).take(8) {
        let resource = format!("relay.example/{}", address.audience());
        let token = SasToken::sign(&resource, &stranger, UnixTime(60), Some("service"));
        let token = Some(token.expose_secret());
        assert!(credentials.authenticate_device(token, &hosts, address, now).is_err());
        assert!(credentials.authenticate_service(token, &hosts, now).is_err());
    }
}

/// Whoever revokes a device revokes its modules.
pub(crate) fn deny_list(data: &[u8]) {
    let Ok(text) = str::from_utf8(data) else { return };
    let Ok(list) = DenyList::from_json(text) else { return };
    let (Ok(device), Ok(module)) = ("dev1".parse(), "dev1/m".parse()) else { return };
    assert!(!list.has_device(&device) || list.has_device(&module));
    let _ = list.has_service("support");
}

/// What a service asks for parses to the same after it was written.
pub(crate) fn stream_request(data: &[u8]) {
    let Ok(request) = serde_json::from_slice::<StreamRequest>(data) else { return };
    let written = serde_json::to_value(&request).unwrap_or_default();
    let again = serde_json::from_value::<StreamRequest>(written.clone());
    let again = again.ok().and_then(|again| serde_json::to_value(&again).ok());
    assert_eq!(again, Some(written), "what is written reads differently");
}

/// What a service is granted parses to the same after it was written, and does not show its ticket in a log.
pub(crate) fn stream_grant(data: &[u8]) {
    let Ok(grant) = serde_json::from_slice::<StreamGrant>(data) else { return };
    let written = serde_json::to_value(&grant).unwrap_or_default();
    let again = serde_json::from_value::<StreamGrant>(written.clone());
    let again = again.ok().and_then(|again| serde_json::to_value(&again).ok());
    assert_eq!(again, Some(written), "what is written reads differently");
    let shown = format!("{:?}", grant.ticket);
    let ticket = grant.ticket.expose_secret();
    assert!(ticket.len() < 32 || !shown.contains(ticket), "the ticket is shown");
}

/// An error answer parses to the same after it was written, and tells of an end by the name of that end only.
pub(crate) fn problem(data: &[u8]) {
    let Ok(problem) = serde_json::from_slice::<Problem>(data) else { return };
    let written = serde_json::to_vec(&problem).unwrap_or_default();
    let again = serde_json::from_slice::<Problem>(&written);
    if let Some(reason) = problem.close_reason() {
        assert_eq!(problem.kind, Problem::from_close(reason).kind);
    }
    assert!(again.is_ok_and(|again| again == problem), "what is written reads differently");
}

/// What one process tells another parses to the same after it was written, and a question does not show its ticket.
pub(crate) fn internal(data: &[u8]) {
    macro_rules! reads_back {
        ($($message:ty),*) => {$(
            if let Ok(message) = json::parse::<$message>(data) {
                let written = serde_json::to_value(&message).unwrap_or_default();
                let again = serde_json::from_value::<$message>(written.clone());
                let again = again.ok().and_then(|again| serde_json::to_value(&again).ok());
                assert_eq!(again, Some(written), "what is written reads differently");
            }
        )*};
    }
    reads_back!(Ask, Answer, DeviceOnline, LinkReplaced, EndStream);
    if let Ok(Ask { invitation, .. }) = json::parse::<Ask>(data) {
        let ticket = invitation.ticket.expose_secret();
        assert!(ticket.len() < 32 || !format!("{invitation:?}").contains(ticket), "the ticket is shown");
    }
}

/// A path that is one of the API's is the only reading of what it names, and no error repeats a long path.
pub(crate) fn api_path(data: &[u8]) {
    let Ok(text) = str::from_utf8(data) else { return };
    let reads_back = |path: String, expected: &ApiPath| {
        let again = ApiPath::parse(&path);
        assert_eq!(again.as_ref(), Ok(expected), "{path} reads differently");
    };
    match ApiPath::parse(text) {
        Ok(path) => {
            assert!(path.methods().split(", ").all(|method| ["GET", "POST", "DELETE"].contains(&method)));
            match &path {
                ApiPath::Endpoints => reads_back("/v1/endpoints".to_owned(), &path),
                ApiPath::Devices => reads_back("/v1/devices".to_owned(), &path),
                ApiPath::Device(address) => reads_back(path_to(address), &path),
                ApiPath::DeviceStreams(address) => reads_back(path_to(address) + "/streams", &path),
                ApiPath::DeviceLink(address) => reads_back(path_to(address) + "/link", &path),
                ApiPath::Streams => reads_back("/v1/streams".to_owned(), &path),
                ApiPath::Stream(stream) => {
                    reads_back(format!("/v1/streams/{}", every_byte_encoded(stream)), &path);
                    if stream.parse::<StreamId>().is_ok() {
                        reads_back(format!("/v1/streams/{stream}"), &path);
                    }
                }
            }
        }
        Err(error) => assert!(error.to_string().len() < 400, "an error repeats too much"),
    }
    if let Ok(address) = text.parse::<DeviceAddress>() {
        reads_back(path_to(&address), &ApiPath::Device(address));
    }
}

/// A page has at least one item and at most as many as are allowed, and starts where it was asked to.
pub(crate) fn page_query(data: &[u8]) {
    let Ok(text) = str::from_utf8(data) else { return };
    let Ok(page) = PageQuery::parse(text) else { return };
    assert!((1..=PAGE_MAX).contains(&page.limit));
    let mut written = format!("limit={}", page.limit);
    if let Some(after) = &page.after {
        assert!(after.len() < text.len(), "more is decoded than was sent");
        written.push_str("&after=");
        written.push_str(&every_byte_encoded(after));
    }
    assert_eq!(PageQuery::parse(&written), Ok(page), "{written} reads differently");
}

/// Each leg has one path: no other spelling of it is taken.
pub(crate) fn leg_path(data: &[u8]) {
    let Ok(text) = str::from_utf8(data) else { return };
    if let Ok(LegPath { stream, role }) = LegPath::parse(text) {
        assert_eq!(format!("/bridges/{stream}/{role}"), text);
    }
}

/// Each of the headers that an upgrade needs is needed, and none of the others stands in the way.
///
/// The bytes are lines of `name: value`.
pub(crate) fn upgrade_headers(data: &[u8]) {
    let mut headers = HeaderMap::new();
    for line in data.split(|&byte| byte == b'\n') {
        let Some(colon) = line.iter().position(|&byte| byte == b':') else { continue };
        let name = HeaderName::from_bytes(&line[..colon]);
        let value = HeaderValue::from_bytes(line[colon + 1..].trim_ascii());
        if let (Ok(name), Ok(value)) = (name, value)
            && headers.try_append(name, value).is_err()
        {
            return;
        }
    }

    if let Some(first) = first_subprotocol(&headers) {
        let text = first.to_str().unwrap_or_default();
        assert!(!text.is_empty() && text.trim() == text && !text.contains(','), "{text:?} is not one name");
        let offered = headers.get(header::SEC_WEBSOCKET_PROTOCOL).and_then(|offered| offered.to_str().ok());
        assert!(offered.is_some_and(|offered| offered.trim_start().starts_with(text)));
        let alone = HeaderMap::from_iter([(header::SEC_WEBSOCKET_PROTOCOL, first.clone())]);
        assert_eq!(first_subprotocol(&alone), Some(first), "what is answered reads differently");
    }

    let needed = [
        (header::CONNECTION, "Upgrade"),
        (header::UPGRADE, "websocket"),
        (header::SEC_WEBSOCKET_VERSION, "13"),
        (header::SEC_WEBSOCKET_KEY, "dGhlIHNhbXBsZSBub25jZQ=="),
    ];
    if let Ok(key) = websocket_key(&headers) {
        assert_eq!(key.len(), 24);
        assert_eq!(Some(key), headers.get(header::SEC_WEBSOCKET_KEY));
        for (name, _) in &needed {
            let mut lacking = headers.clone();
            lacking.remove(name);
            let lacks = websocket_key(&lacking).err().and_then(|lacks| lacks.split(':').next());
            assert!(
                lacks.is_some_and(|lacks| lacks.eq_ignore_ascii_case(name.as_str())),
                "{name} is not needed"
            );
        }
    }
    for (name, value) in needed {
        // A list of tokens goes on in a further header; there is one key only.
        if name == header::SEC_WEBSOCKET_KEY {
            headers.remove(&name);
        }
        if headers.try_append(name, HeaderValue::from_static(value)).is_err() {
            return;
        }
    }
    assert!(websocket_key(&headers).is_ok_and(|key| key == "dGhlIHNhbXBsZSBub25jZQ=="));
}

/// A header says how much of it is missing, never too much, and reads the same however it is cut; what it says can be
/// written and read again. Only what the relay has sealed itself opens as such.
pub(crate) fn proxy(bytes: &[u8]) {
    let mut have = 0;
    let whole = loop {
        match proxy::parse(&bytes[..have]) {
            Ok(Parsed::Missing(count)) => {
                assert!(count > 0, "nothing is missing");
                assert!(have + count <= proxy::HEADER_MAX, "a header without end");
                if have + count > bytes.len() {
                    return;
                }
                have += count;
            }
            Ok(whole) => break whole,
            Err(_) => {
                assert!(proxy::parse(bytes).is_err(), "refused in pieces, and taken whole");
                return;
            }
        }
    };
    assert_eq!(proxy::parse(bytes).as_ref(), Ok(&whole), "what stands behind a header changes it");
    let Parsed::Whole { size, addresses, fields } = whole else { return };
    assert_eq!(size, have, "read too far");
    let Ok(keys) = TicketKeys::new(&key(1), None) else { unreachable!("32 bytes are enough") };
    let now = UnixTime(1_800_000_000);
    assert!(passed::open(bytes, &proxy::parse(bytes).unwrap_or(Parsed::Missing(1)), now, &keys).is_err());
    let Some(addresses) = addresses else { return };
    let written = proxy::write(addresses, fields);
    if written.len() <= proxy::HEADER_MAX {
        let Ok(Parsed::Whole { addresses: Some(again), fields: kept, .. }) = proxy::parse(&written) else {
            panic!("what was written does not read back")
        };
        let ends = |of: Addresses| [of.client, of.server].map(|end| (end.ip().to_canonical(), end.port()));
        assert_eq!((ends(again), kept), (ends(addresses), fields));
    }
    let sealed = passed::seal(addresses, Incarnation::from_random(7), now, &keys);
    let Ok(parsed) = proxy::parse(&sealed) else { panic!("what was sealed does not read back") };
    assert!(passed::open(&sealed, &parsed, now, &keys).is_ok());
}

/// Whatever a client writes, the address that the proxy adds at the end counts; and a client is never a text.
pub(crate) fn forwarded(bytes: &[u8]) {
    let Ok(text) = str::from_utf8(bytes) else { return };
    let (proxy, added) = (IpAddr::from([10, 0, 0, 1]), IpAddr::from([192, 0, 2, 7]));
    let is_trusted = |address: IpAddr| matches!(address, IpAddr::V4(address) if address.octets()[0] == 10);
    for (header, entry) in [
        (ForwardedHeader::XForwardedFor, added.to_string()),
        (ForwardedHeader::Forwarded, format!("for={added}")),
    ] {
        let values = [text, entry.as_str()];
        assert_eq!(forwarded::client(header, values.into_iter(), proxy, is_trusted), added);
        let alone = forwarded::client(header, [text].into_iter(), proxy, is_trusted);
        assert!(alone == proxy || text.contains(['.', ':']), "an address out of nothing: {alone}");
    }
}

/// The public name of an edge leads back to that edge and to no other; a URL has no brace left in it.
pub(crate) fn owner_name(bytes: &[u8]) {
    let Ok(text) = str::from_utf8(bytes) else { return };
    let (url, name) = text.split_once('\n').unwrap_or((text, "edge-0"));
    if let Ok(url) = url.parse::<EdgeUrl>() {
        assert_eq!(url.to_string().parse().as_ref(), Ok(&url));
        if let Ok(of_edge) = url.of(name) {
            assert!(!of_edge.contains(['{', '}']), "{of_edge}");
            assert!(!url.names_owner() || of_edge.contains(name));
        }
    }
    if let Ok(domain) = url.parse::<OwnerDomain>() {
        if let Ok(public) = domain.name_of(name) {
            assert_eq!(domain.edge_in(&public).as_deref(), Some(name));
        }
        assert_eq!(domain.edge_in(url), None, "the domain itself is no edge");
    }
}

fn path_to(address: &DeviceAddress) -> String {
    let ids = [Some(address.device.as_str()), address.module.as_ref().map(ModuleId::as_str)];
    for id in ids.into_iter().flatten() {
        assert!((1..=ID_MAX_LENGTH).contains(&id.len()) && !id.contains('/'), "{id:?} is not one segment");
    }
    format!("/v1/{}", address.path())
}

fn every_byte_encoded(text: &str) -> String {
    text.bytes().fold(String::new(), |mut encoded, byte| {
        // Writing to a String cannot fail.
        let _ = write!(encoded, "%{byte:02X}");
        encoded
    })
}

fn same_text<T: FromStr + ToString>(text: &str) {
    if let Ok(parsed) = text.parse::<T>() {
        assert_eq!(parsed.to_string(), text);
    }
}

fn key(byte: u8) -> Key {
    match Key::from_bytes(vec![byte; 32]) {
        Ok(key) => key,
        Err(error) => unreachable!("32 bytes are a key: {error}"),
    }
}

fn good_ticket(now: UnixTime) -> Ticket {
    let (Ok(address), Ok(name)) = ("dev1/m".parse(), "ssh".parse()) else {
        unreachable!("these are an address and a name")
    };
    Ticket {
        stream: StreamId::from_random(7),
        role: Role::Device,
        owner: Owner {
            name: "edge-0".to_owned(),
            incarnation: Incarnation::from_random(8),
            address: "10.0.0.1:8445".to_owned(),
        },
        address,
        name,
        credential: "support".to_owned(),
        credential_expires: UnixTime(now.0 + 3600),
        expires: UnixTime(now.0 + 60),
        trace: TraceParent::new(1, 2),
    }
}

/// What comes out of a leg, whatever the size of its reads.
#[derive(Debug, PartialEq, Eq)]
enum Item {
    Message { opcode: Opcode, payload: Vec<u8>, fin: bool },
    Ping(Vec<u8>),
    Pong,
    Close { code: Option<u16>, text: String },
    Error(FrameError),
}

/// What a leg sends on, and what it does not.
struct Passed {
    sent_on: Vec<u8>,
    stops: Vec<Item>,
}

/// Reads a leg `step` bytes at a time, and puts the pieces of each message together again.
fn read_leg(sender: Sender, bytes: &[u8], step: usize) -> Vec<Item> {
    let mut reader = FrameReader::new(sender);
    let (mut items, mut buffer) = (Vec::new(), Vec::new());
    for chunk in bytes.chunks(step) {
        buffer.extend_from_slice(chunk);
        let mut taken = 0;
        loop {
            match reader.next(&mut buffer[taken..]) {
                Ok(None) => break,
                Ok(Some((size, event))) => {
                    assert!(size > 0, "an event out of nothing");
                    taken += size;
                    let last = matches!(event, Event::Control(Control::Close(_)));
                    take(&mut items, &event);
                    if last {
                        return items;
                    }
                }
                Err(error) => {
                    items.push(Item::Error(error));
                    return items;
                }
            }
        }
        buffer.drain(..taken);
        assert!(buffer.len() < frame::HEADER_MAX + frame::CONTROL_MAX, "more is held back than allowed");
    }
    items
}

/// Passes a leg on, `step` bytes at a time, as a relay does.
fn pass_leg(sender: Sender, bytes: &[u8], step: usize, hold: bool) -> Passed {
    let mut reader = FrameReader::new(sender);
    let mut passed = Passed { sent_on: Vec::new(), stops: Vec::new() };
    let mut rest = Vec::new();
    for chunk in bytes.chunks(step) {
        rest.extend_from_slice(chunk);
        let mut buffer = vec![0; HEADROOM];
        buffer.extend_from_slice(&rest);
        let mut passage = Passage::new(HEADROOM..buffer.len());
        let last = loop {
            match reader.pass(&mut buffer, &mut passage, hold) {
                Ok(Stop::Starved { wanted }) => {
                    let left = passage.rest().len();
                    assert!(wanted == 0 || wanted > left, "waits for what is there");
                    break false;
                }
                Ok(Stop::Control(control)) => {
                    let last = matches!(control, Control::Close(_));
                    take(&mut passed.stops, &Event::Control(control));
                    if last {
                        break true;
                    }
                }
                Err(error) => {
                    passed.stops.push(Item::Error(error));
                    break true;
                }
            }
        };
        assert!(passage.output().end <= passage.rest().start, "output over input");
        passed.sent_on.extend_from_slice(&buffer[passage.output()]);
        rest = buffer[passage.rest()].to_vec();
        if last {
            break;
        }
        let most = if hold { HOLD } else { frame::CONTROL_MAX };
        assert!(rest.len() < most + frame::HEADER_MAX, "more is held back than allowed");
    }
    passed
}

/// The messages of a leg. With `hold`, what is there of the last one depends on what was held, and is left out.
fn messages(items: &[Item], hold: bool) -> Vec<&Item> {
    let is_kept = |item: &&Item| matches!(item, Item::Message { fin, .. } if *fin || !hold);
    items.iter().filter(is_kept).collect()
}

fn take(items: &mut Vec<Item>, event: &Event<'_>) {
    match *event {
        Event::Data { opcode, fin, payload } => {
            let open = items.iter_mut().rev().find(|item| matches!(item, Item::Message { .. }));
            match open {
                Some(Item::Message { payload: so_far, fin: end, .. })
                    if opcode == Opcode::Continuation && !*end =>
                {
                    so_far.extend_from_slice(payload);
                    *end = fin;
                }
                _ => items.push(Item::Message { opcode, payload: payload.to_vec(), fin }),
            }
        }
        Event::Control(Control::Ping(payload)) => items.push(Item::Ping(payload.to_vec())),
        Event::Control(Control::Pong) => items.push(Item::Pong),
        Event::Control(Control::Close(CloseFrame { code, text })) => {
            items.push(Item::Close { code, text: text.to_owned() });
        }
    }
}
