//! Whether an edge takes a leg: what its ticket must say, and which edge joins it.

use std::time::Duration;

use crate::{
    close::CloseReason,
    credential::CLOCK_LEEWAY_SECONDS,
    path::LegPath,
    problem::{Problem, ProblemKind},
    ticket::{Owner, Ticket, TicketError, TicketKeys},
    time::UnixTime,
};

/// How long a ticket is taken after its time, and so how long an ended stream must be remembered.
pub const LEEWAY: Duration = Duration::from_secs(CLOCK_LEEWAY_SECONDS + 1);

/// Where a leg came in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entrance {
    /// From a device or a service.
    Public,
    /// From another edge, which has forwarded it.
    Internal,
}

/// Where a leg goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// This edge owns the stream.
    Here,
    /// Another edge does, to which it is forwarded.
    ToOwner,
    /// The owner has gone, or a leg that was forwarded has missed it: a leg is forwarded once.
    Nowhere,
}

/// Where the leg of a stream that `owner` owns goes from the edge `here`.
///
/// An owner is one life of an edge: the streams of an earlier life are gone with it.
pub fn way(owner: &Owner, here: &Owner, entrance: Entrance) -> Way {
    if owner.name == here.name && owner.incarnation == here.incarnation {
        Way::Here
    } else if entrance == Entrance::Internal || owner.name == here.name || owner.address.is_empty() {
        Way::Nowhere
    } else {
        Way::ToOwner
    }
}

/// Checks the ticket of a leg that asks for `path`.
pub fn admit(keys: &TicketKeys, text: &str, path: LegPath, now: UnixTime) -> Result<Ticket, Problem> {
    let ticket = keys.verify(text, now).map_err(|error| match error {
        TicketError::Invalid => Problem::new(ProblemKind::TicketInvalid, error.to_string()),
        TicketError::Expired(_) => Problem::new(ProblemKind::TicketExpired, error.to_string()),
    })?;
    if ticket.stream != path.stream || ticket.role != path.role {
        let detail = format!("the ticket is for the {} leg of stream {}", ticket.role, ticket.stream);
        return Err(Problem::new(ProblemKind::TicketMismatch, detail));
    }
    if now > ticket.credential_expires.plus(LEEWAY) {
        return Err(Problem::from_close(CloseReason::CredentialExpired));
    }
    Ok(ticket)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::Incarnation;

    #[test]
    fn a_leg_goes_to_the_life_that_its_ticket_names_in_one_hop_at_most() {
        let here = owner("edge-0", 1, "h:1");
        for entrance in [Entrance::Public, Entrance::Internal] {
            assert_eq!(way(&here, &here, entrance), Way::Here);
            assert_eq!(way(&owner("edge-0", 2, "h:1"), &here, entrance), Way::Nowhere, "another life");
            assert_eq!(way(&owner("edge-1", 2, ""), &here, entrance), Way::Nowhere, "no way to it");
        }
        let other = owner("edge-1", 2, "h:2");
        assert_eq!(way(&other, &here, Entrance::Public), Way::ToOwner);
        assert_eq!(way(&other, &here, Entrance::Internal), Way::Nowhere);
        // Its address may have changed its form since; its life has not.
        assert_eq!(way(&owner("edge-0", 1, "other:1"), &here, Entrance::Internal), Way::Here);
    }

    fn owner(name: &str, incarnation: u128, address: &str) -> Owner {
        let incarnation = Incarnation::from_random(incarnation);
        Owner { name: name.to_owned(), incarnation, address: address.to_owned() }
    }
}
