//! The PROXY protocol, versions 1 and 2: how a balancer tells where a connection came from (`HAProxy`, "The PROXY protocol").
//!
//! A header is parsed as it comes in, and says how many bytes it still lacks at least: whoever reads no more than that leaves
//! what is behind it where it is. Nothing is trusted here; who may send a header is for the listener to know.

use std::{
    net::{IpAddr, SocketAddr},
    str,
};

use thiserror::Error;

/// The longest header that is taken, in bytes: more than any balancer writes, its own fields included.
pub const HEADER_MAX: usize = 2048;

/// What version 2 begins with (section 2.2).
const SIGNATURE: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";

/// What version 1 begins with, and its longest line (section 2.1).
const V1: &[u8] = b"PROXY ";
const V1_MAX: usize = 107;

/// The shortest line of version 1, `PROXY UNKNOWN\r\n`.
const V1_MIN: usize = 15;

/// Signature, version and command, family and protocol, and the length of what follows.
const V2_FIXED: usize = 16;

const V2_PROXY: u8 = 0x21;
const V2_LOCAL: u8 = 0x20;
const V2_TCP4: u8 = 0x11;
const V2_TCP6: u8 = 0x21;

/// Both ends of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Addresses {
    /// Who connected.
    pub client: SocketAddr,
    /// To where.
    pub server: SocketAddr,
}

/// How far a header has come in.
#[derive(Debug, PartialEq, Eq)]
pub enum Parsed<'a> {
    /// It lacks at least this many bytes.
    Missing(usize),
    /// All of it is there.
    Whole {
        /// Its length in bytes.
        size: usize,
        /// Whom it speaks of; `None` for a connection of the proxy's own, or of a kind without addresses.
        addresses: Option<Addresses>,
        /// The fields behind the addresses (section 2.2.6).
        fields: &'a [u8],
    },
}

/// The bytes are no PROXY header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("this is no header of the PROXY protocol, version 1 or 2")]
pub struct NoHeader;

/// Reads the header at the start of `bytes`.
pub fn parse(bytes: &[u8]) -> Result<Parsed<'_>, NoHeader> {
    if bytes.is_empty() {
        return Ok(Parsed::Missing(V1_MIN));
    }
    let begins = |with: &[u8]| bytes.iter().zip(with).all(|(byte, expected)| byte == expected);
    if begins(SIGNATURE) {
        return parse_binary(bytes);
    }
    if begins(V1) { parse_line(bytes) } else { Err(NoHeader) }
}

fn parse_line(bytes: &[u8]) -> Result<Parsed<'_>, NoHeader> {
    let line = &bytes[..bytes.len().min(V1_MAX)];
    let Some(end) = line.iter().position(|&byte| byte == b'\n') else {
        return match line {
            _ if line.len() == V1_MAX => Err(NoHeader),
            [.., b'\r'] => Ok(Parsed::Missing(1.max(V1_MIN.saturating_sub(line.len())))),
            _ => Ok(Parsed::Missing(2.max(V1_MIN.saturating_sub(line.len())))),
        };
    };
    let text = line[..end].strip_suffix(b"\r").ok_or(NoHeader)?;
    let text = str::from_utf8(text).map_err(|_| NoHeader)?;
    let mut words = text.split(' ').skip(1);
    let family = words.next().ok_or(NoHeader)?;
    let addresses = match family {
        "UNKNOWN" => None,
        "TCP4" | "TCP6" => {
            let [client, server, client_port, server_port, rest] = [(); 5].map(|()| words.next());
            let address = |text: Option<&str>| {
                let address: IpAddr = text.ok_or(NoHeader)?.parse().map_err(|_| NoHeader)?;
                if address.is_ipv4() == (family == "TCP4") { Ok(address) } else { Err(NoHeader) }
            };
            let end = |host, port: Option<&str>| {
                Ok(SocketAddr::new(address(host)?, decimal(port.ok_or(NoHeader)?)?))
            };
            let addresses =
                Addresses { client: end(client, client_port)?, server: end(server, server_port)? };
            if rest.is_some() {
                return Err(NoHeader);
            }
            Some(addresses)
        }
        _ => return Err(NoHeader),
    };
    Ok(Parsed::Whole { size: end + 1, addresses, fields: &[] })
}

/// A port as the protocol writes it: no sign and no leading zero.
fn decimal(text: &str) -> Result<u16, NoHeader> {
    let digits = text.bytes().all(|byte| byte.is_ascii_digit());
    if !digits || (text.len() > 1 && text.starts_with('0')) {
        return Err(NoHeader);
    }
    text.parse().map_err(|_| NoHeader)
}

fn parse_binary(bytes: &[u8]) -> Result<Parsed<'_>, NoHeader> {
    let Some(&[.., command, kind, high, low]) = bytes.first_chunk::<V2_FIXED>() else {
        return Ok(Parsed::Missing(V2_FIXED - bytes.len()));
    };
    let (family, protocol) = (kind >> 4, kind & 0xf);
    // What is not assigned is to be refused (section 2.2).
    if !matches!(command, V2_PROXY | V2_LOCAL) || family > 3 || protocol > 2 {
        return Err(NoHeader);
    }
    let size = V2_FIXED + usize::from(u16::from_be_bytes([high, low]));
    if size > HEADER_MAX {
        return Err(NoHeader);
    }
    if bytes.len() < size {
        return Ok(Parsed::Missing(size - bytes.len()));
    }
    let body = &bytes[V2_FIXED..size];
    let (addresses, fields) = match (command, kind) {
        (V2_PROXY, V2_TCP4) => ends::<4>(body)?,
        (V2_PROXY, V2_TCP6) => ends::<16>(body)?,
        _ => (None, &[][..]),
    };
    Ok(Parsed::Whole { size, addresses, fields })
}

/// Two addresses of `N` bytes and two ports, and the rest.
fn ends<const N: usize>(body: &[u8]) -> Result<(Option<Addresses>, &[u8]), NoHeader>
where
    IpAddr: From<[u8; N]>,
{
    let (&client, body) = body.split_first_chunk().ok_or(NoHeader)?;
    let (&server, body) = body.split_first_chunk().ok_or(NoHeader)?;
    let (&client_port, body) = body.split_first_chunk().ok_or(NoHeader)?;
    let (&server_port, body) = body.split_first_chunk().ok_or(NoHeader)?;
    let end = |host: [u8; N], port| SocketAddr::new(host.into(), u16::from_be_bytes(port));
    let addresses = Addresses { client: end(client, client_port), server: end(server, server_port) };
    Ok((Some(addresses), body))
}

/// A header of version 2, with `fields` behind the addresses.
///
/// `fields` must be short enough for [`HEADER_MAX`].
pub fn write(Addresses { client, server }: Addresses, fields: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    let kind = match (client.ip(), server.ip()) {
        (IpAddr::V4(client), IpAddr::V4(server)) => {
            body.extend(client.octets().into_iter().chain(server.octets()));
            V2_TCP4
        }
        (client, server) => {
            let wide = |ip| match ip {
                IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
                IpAddr::V6(ip) => ip.octets(),
            };
            body.extend(wide(client).into_iter().chain(wide(server)));
            V2_TCP6
        }
    };
    body.extend([client.port(), server.port()].map(u16::to_be_bytes).as_flattened());
    body.extend(fields);
    let length = u16::try_from(body.len()).unwrap_or(u16::MAX);
    let mut header = SIGNATURE.to_vec();
    header.extend([V2_PROXY, kind]);
    header.extend(length.to_be_bytes());
    header.extend(body);
    header
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_balancers_write_is_read() {
        for (text, client) in [
            ("PROXY TCP4 192.0.2.7 198.51.100.1 56324 443\r\n", Some("192.0.2.7:56324")),
            ("PROXY TCP6 2001:db8::7 2001:db8::1 1 65535\r\n", Some("[2001:db8::7]:1")),
            ("PROXY UNKNOWN\r\n", None),
            ("PROXY UNKNOWN ffff:f...f:ffff what ever 65535\r\n", None),
        ] {
            let bytes = format!("{text}GET / HTTP/1.1\r\n");
            let Ok(Parsed::Whole { size, addresses, fields: [] }) = parse(bytes.as_bytes()) else {
                panic!("{text:?}");
            };
            assert_eq!(size, text.len());
            assert_eq!(addresses.map(|addresses| addresses.client.to_string()).as_deref(), client);
        }
        // A health check of the proxy's own, with fields that nobody knows.
        let mut local = SIGNATURE.to_vec();
        local.extend([V2_LOCAL, 0, 0, 4, 0xee, 0, 1, 7]);
        assert_eq!(parse(&local), Ok(Parsed::Whole { size: 20, addresses: None, fields: &[] }));
    }

    #[test]
    fn what_is_no_header_is_refused_at_its_first_wrong_byte() {
        for text in [
            "GET / HTTP/1.1\r\n",
            "PROXYTCP4",
            "PROXY TCP4 192.0.2.7 198.51.100.1 56324 443\n",
            "PROXY TCP4 192.0.2.7  198.51.100.1 56324 443\r\n",
            "PROXY TCP4 192.0.2.7 198.51.100.1 056324 443\r\n",
            "PROXY TCP4 192.0.2.7 198.51.100.1 +1 443\r\n",
            "PROXY TCP4 192.0.2.7 198.51.100.1 65536 443\r\n",
            "PROXY TCP4 192.0.2.7 198.51.100.1 1 443 2\r\n",
            "PROXY TCP4 192.0.2.7 198.51.100.1 1\r\n",
            "PROXY TCP4 2001:db8::7 2001:db8::1 1 2\r\n",
            "PROXY TCP5 192.0.2.7 198.51.100.1 1 443\r\n",
            "\r\n\r\n\0\r\nQUIX",
            "\u{16}\u{3}\u{1}",
        ] {
            assert_eq!(parse(text.as_bytes()), Err(NoHeader), "{text:?}");
        }
        assert_eq!(parse(&[b"PROXY UNKNOWN ".as_slice(), &[b'x'; 100]].concat()), Err(NoHeader));
        let header =
            |command, kind, length: [u8; 2]| [SIGNATURE, &[command, kind], &length, &[0; 64]].concat();
        for (command, kind, length) in [
            (0x11, V2_TCP4, [0, 12]),
            (0x22, V2_TCP4, [0, 12]),
            (V2_PROXY, 0x41, [0, 12]),
            (V2_PROXY, 0x13, [0, 12]),
            (V2_PROXY, V2_TCP4, [0, 11]),
            (V2_PROXY, V2_TCP6, [0, 35]),
            (V2_PROXY, V2_TCP4, [255, 255]),
        ] {
            assert_eq!(
                parse(&header(command, kind, length)),
                Err(NoHeader),
                "{command:x} {kind:x} {length:?}"
            );
        }
    }

    proptest! {
        #[test]
        fn headers_read_back_however_they_are_cut(
            client: SocketAddr, server: SocketAddr, fields in prop::collection::vec(any::<u8>(), 0..200), tail: [u8; 8],
        ) {
            let header = write(Addresses { client, server }, &fields);
            let wire = [header.as_slice(), &tail].concat();
            // Read as a listener does: never more than is missing.
            let mut have = 0;
            let (size, addresses, read) = loop {
                match parse(&wire[..have]).unwrap() {
                    Parsed::Missing(count) => {
                        prop_assert!(count > 0 && have + count <= header.len());
                        have += count;
                    }
                    Parsed::Whole { size, addresses, fields } => break (size, addresses.unwrap(), fields),
                }
            };
            prop_assert_eq!((size, have), (header.len(), header.len()));
            prop_assert_eq!(read, fields.as_slice());
            prop_assert_eq!(addresses.client.ip().to_canonical(), client.ip().to_canonical());
            prop_assert_eq!(addresses.server.ip().to_canonical(), server.ip().to_canonical());
            prop_assert_eq!((addresses.client.port(), addresses.server.port()), (client.port(), server.port()));
        }

        #[test]
        fn lines_are_never_read_too_far(a: Ipv4Addr, b: Ipv4Addr, ports: [u16; 2], words in "[ -~]{0,80}") {
            let known = format!("PROXY TCP4 {a} {b} {} {}\r\n", ports[0], ports[1]);
            for line in [known, format!("PROXY UNKNOWN {words}\r\n"), "PROXY UNKNOWN\r\n".to_owned()] {
                let mut have = 0;
                while let Parsed::Missing(count) = parse(&line.as_bytes()[..have]).unwrap() {
                    have += count;
                }
                prop_assert_eq!(have, line.len());
            }
        }

        #[test]
        fn a_changed_header_is_refused_or_reads_as_something_bounded(
            client: SocketAddr, server: SocketAddr, at: prop::sample::Index, byte: u8,
        ) {
            let mut header = write(Addresses { client, server }, &[]);
            let at = at.index(header.len());
            header[at] = byte;
            match parse(&header) {
                Ok(Parsed::Whole { size, .. }) => prop_assert!(size <= header.len()),
                Ok(Parsed::Missing(count)) => prop_assert!(header.len() + count <= HEADER_MAX),
                Err(NoHeader) => {}
            }
        }
    }
}
