//! Whose request a trusted proxy brings, by the header that it adds (`X-Forwarded-For`, or RFC 7239).
//!
//! Anybody may send such a header with any text. What counts is what trusted proxies have added at its end: the last address
//! that is not a trusted proxy's own.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

/// Which header the proxies write. The other one is left unread, since they may let it pass as it came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ForwardedHeader {
    /// `X-Forwarded-For`: addresses, by comma.
    XForwardedFor,
    /// `Forwarded` (RFC 7239): elements with `for=`, by comma.
    Forwarded,
}

impl ForwardedHeader {
    /// Its name, in lower case.
    pub fn name(self) -> &'static str {
        match self {
            Self::XForwardedFor => "x-forwarded-for",
            Self::Forwarded => "forwarded",
        }
    }
}

/// Where a request comes from that `proxy`, which is trusted, has brought with these `values` of the header, in their order.
///
/// Where the chain breaks off (no header, an address that cannot be read), the last trusted proxy is all that is known.
pub fn client<'a>(
    header: ForwardedHeader,
    values: impl Iterator<Item = &'a str>,
    proxy: IpAddr,
    is_trusted: impl Fn(IpAddr) -> bool,
) -> IpAddr {
    let hops: Vec<_> = match header {
        ForwardedHeader::XForwardedFor => values.flat_map(|value| value.split(',')).map(node).collect(),
        ForwardedHeader::Forwarded => {
            let elements = values.flat_map(|value| split(value, b','));
            elements.map(|element| split(element, b';').into_iter().find_map(from)).collect()
        }
    };
    let mut client = proxy;
    for address in hops.into_iter().rev() {
        let Some(address) = address else { return client };
        client = address;
        if !is_trusted(address) {
            return client;
        }
    }
    client
}

/// The address in `for=...` (RFC 7239, section 4).
fn from(pair: &str) -> Option<IpAddr> {
    let (name, value) = pair.split_once('=')?;
    if !name.trim().eq_ignore_ascii_case("for") {
        return None;
    }
    let value = value.trim();
    node(value.strip_prefix('"').and_then(|value| value.strip_suffix('"')).unwrap_or(value))
}

/// An address, perhaps with a port or in brackets. `unknown` and made-up names (RFC 7239, section 6.3) are none.
fn node(text: &str) -> Option<IpAddr> {
    let text = text.trim();
    let bare = || text.strip_prefix('[')?.strip_suffix(']')?.parse::<Ipv6Addr>().ok();
    let address = text.parse::<IpAddr>().ok();
    address
        .or_else(|| text.parse::<SocketAddr>().ok().map(|address| address.ip()))
        .or_else(|| Some(bare()?.into()))
}

/// The parts of `text` between separators that are not in a quoted string (RFC 9110, section 5.6.4).
fn split(text: &str, separator: u8) -> Vec<&str> {
    let (mut parts, mut start, mut quoted, mut escaped) = (Vec::new(), 0, false, false);
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if quoted => escaped = true,
            b'"' => quoted = !quoted,
            _ if byte == separator && !quoted => {
                parts.push(&text[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    parts.push(&text[start..]);
    parts
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PROXY: &str = "10.0.0.1";

    fn client_of(header: ForwardedHeader, values: &[&str]) -> String {
        let is_trusted = |address: IpAddr| address.to_string().starts_with("10.");
        client(header, values.iter().copied(), PROXY.parse().unwrap(), is_trusted).to_string()
    }

    #[test]
    fn the_last_address_that_is_no_proxy_counts() {
        for (values, expected) in [
            (&[][..], PROXY),
            (&["192.0.2.7"], "192.0.2.7"),
            // What the client wrote itself stands further left.
            (&["127.0.0.1, 192.0.2.7"], "192.0.2.7"),
            (&["10.9.9.9, 192.0.2.7, 10.0.0.2"], "192.0.2.7"),
            (&["127.0.0.1", "192.0.2.7"], "192.0.2.7"),
            (&["127.0.0.1, 192.0.2.7:4711"], "192.0.2.7"),
            (&["2001:db8::7"], "2001:db8::7"),
            (&["[2001:db8::7]:443"], "2001:db8::7"),
            (&["[2001:db8::7]"], "2001:db8::7"),
            (&["10.0.0.3,10.0.0.2"], "10.0.0.3"),
            // Behind an address that cannot be read, anything may stand.
            (&["192.0.2.7, unknown"], PROXY),
            (&["192.0.2.7, "], PROXY),
            (&["\"x, 192.0.2.7"], "192.0.2.7"),
            (&["192.0.2.7, <script>, 10.0.0.2"], "10.0.0.2"),
        ] {
            assert_eq!(client_of(ForwardedHeader::XForwardedFor, values), expected, "{values:?}");
        }
    }

    #[test]
    fn rfc_7239_is_read() {
        for (values, expected) in [
            (&["for=192.0.2.60;proto=http;by=203.0.113.43"][..], "192.0.2.60"),
            (&["For=\"[2001:db8:cafe::17]:4711\""], "2001:db8:cafe::17"),
            (&["for=192.0.2.43, for=198.51.100.17"], "198.51.100.17"),
            (&["for=192.0.2.43, for=10.0.0.2"], "192.0.2.43"),
            (&["proto=\"a,b;for=1.1.1.1\";for=192.0.2.43"], "192.0.2.43"),
            (&["for=192.0.2.43, for=_hidden"], PROXY),
            (&["for=192.0.2.43, proto=http"], PROXY),
            (&["for=\"192.0.2.43"], PROXY),
        ] {
            assert_eq!(client_of(ForwardedHeader::Forwarded, values), expected, "{values:?}");
        }
    }

    proptest! {
        #[test]
        fn what_a_client_writes_does_not_move_what_the_proxy_added(text in "[ -~]{0,60}", address: std::net::Ipv4Addr) {
            prop_assume!(address.octets()[0] != 10);
            let values = [text.as_str(), &address.to_string()];
            prop_assert_eq!(client_of(ForwardedHeader::XForwardedFor, &values), address.to_string());
            let element = format!("for={address}");
            prop_assert_eq!(client_of(ForwardedHeader::Forwarded, &[&text, &element]), address.to_string());
        }
    }
}
