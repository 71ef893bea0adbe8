//! How an edge tells the next one whose connection it passes on: a PROXY header that only a process of this relay can make.
//!
//! Behind the addresses stands one field: which edge passes the connection on, when, and a MAC by the relay's ticket key over
//! all that comes before it. A source address would prove less: it changes under address translation, and other programs may
//! share it. The header is good for some seconds, and then only for whoever has seen it on the way.

use thiserror::Error;

use crate::{
    credential::CLOCK_LEEWAY_SECONDS,
    id::Incarnation,
    proxy::{Addresses, Parsed, write},
    ticket::TicketKeys,
    time::UnixTime,
};

/// The field's type, out of those that are free for applications ("The PROXY protocol", section 2.2.7).
const KIND: u8 = 0xe4;

/// Passer, time and MAC.
const LENGTH: usize = 16 + 8 + 32;

/// For how many seconds a header is good: as long as it may take to connect and to send it.
const LIFE: u64 = 5;

/// No ticket is signed with a text that begins like this.
const CONTEXT: &[u8] = b"midspan passed connection 1\0";

/// The header was not made by a process of this relay, or too long ago, or the clocks disagree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("the header of a passed connection is not of this relay and of now")]
pub struct Forged;

/// The header for a connection that the edge `passer` passes on.
pub fn seal(addresses: Addresses, passer: Incarnation, now: UnixTime, keys: &TicketKeys) -> Vec<u8> {
    let mut field = vec![KIND, 0, LENGTH.to_le_bytes()[0]];
    field.extend(passer.as_u128().to_be_bytes());
    field.extend(now.0.to_be_bytes());
    field.resize(3 + LENGTH, 0);
    let mut header = write(addresses, &field);
    let end = header.len() - 32;
    let mac = keys.mac(&[CONTEXT, &header[..end]]);
    header[end..].copy_from_slice(&mac);
    header
}

/// Who has passed a connection on, and whose it is, out of a `header` that has been parsed.
pub fn open(
    header: &[u8],
    parsed: &Parsed<'_>,
    now: UnixTime,
    keys: &TicketKeys,
) -> Result<(Incarnation, Addresses), Forged> {
    let Parsed::Whole { size, addresses: Some(addresses), fields } = *parsed else { return Err(Forged) };
    let header = header.get(..size).ok_or(Forged)?;
    let (signed, mac) = header.split_last_chunk().ok_or(Forged)?;
    let ([KIND, 0, length], field) = fields.split_first_chunk().ok_or(Forged)? else { return Err(Forged) };
    let (passer, field) = field.split_first_chunk().ok_or(Forged)?;
    let (time, field) = field.split_first_chunk().ok_or(Forged)?;
    if usize::from(*length) != LENGTH || field.len() != mac.len() || !keys.verifies(&[CONTEXT, signed], mac) {
        return Err(Forged);
    }
    let time = u64::from_be_bytes(*time);
    let good = time.saturating_sub(CLOCK_LEEWAY_SECONDS)..=time.saturating_add(LIFE + CLOCK_LEEWAY_SECONDS);
    if !good.contains(&now.0) {
        return Err(Forged);
    }
    Ok((Incarnation::from_random(u128::from_be_bytes(*passer)), addresses))
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use proptest::prelude::*;

    use super::*;
    use crate::{key::Key, proxy::parse};

    const NOW: UnixTime = UnixTime(1_800_000_000);

    fn read(header: &[u8], now: u64, key: u8) -> Result<(Incarnation, Addresses), Forged> {
        open(header, &parse(header).map_err(|_| Forged)?, UnixTime(now), &keys(key, None))
    }

    proptest! {
        #[test]
        fn what_is_sealed_opens_and_what_is_changed_does_not(
            client: SocketAddr, passer: u128, at: prop::sample::Index, other in 1u8..,
        ) {
            let addresses = Addresses { client, server: client };
            let header = seal(addresses, Incarnation::from_random(passer), NOW, &keys(1, None));
            let (from, told) = read(&header, NOW.0, 1).unwrap();
            prop_assert_eq!((from, told.client.ip()), (Incarnation::from_random(passer), client.ip()));
            let mut changed = header;
            let at = at.index(changed.len());
            changed[at] ^= other;
            prop_assert_eq!(read(&changed, NOW.0, 1), Err(Forged));
        }
    }

    #[test]
    fn a_header_is_good_for_some_seconds_and_for_one_relay() {
        let client = SocketAddr::from(([192, 0, 2, 7], 1));
        let addresses = Addresses { client, server: client };
        let header = seal(addresses, Incarnation::from_random(1), NOW, &keys(1, None));
        for now in [NOW.0 - 5, NOW.0, NOW.0 + 10] {
            assert!(read(&header, now, 1).is_ok());
        }
        for now in [NOW.0 - 6, NOW.0 + 11] {
            assert_eq!(read(&header, now, 1), Err(Forged));
        }
        assert_eq!(read(&header, NOW.0, 2), Err(Forged));
        assert!(open(&header, &parse(&header).unwrap(), NOW, &keys(2, Some(1))).is_ok());
        // What a balancer writes is no proof of anything.
        assert_eq!(read(&write(addresses, &[]), NOW.0, 1), Err(Forged));
        assert_eq!(read(b"PROXY TCP4 192.0.2.7 192.0.2.7 1 1\r\n", NOW.0, 1), Err(Forged));
    }

    fn keys(current: u8, previous: Option<u8>) -> TicketKeys {
        let key = |n| Key::from_bytes(vec![n; 32]).unwrap();
        TicketKeys::new(&key(current), previous.map(key).as_ref()).unwrap()
    }
}
