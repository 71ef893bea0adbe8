//! Which two legs belong together: those that ask for `/{pair}/a` and `/{pair}/b`.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
};

/// Legs that wait for their other half.
#[derive(Debug)]
pub(crate) struct Pairing<Leg>(Mutex<HashMap<String, Leg>>);

impl<Leg> Pairing<Leg> {
    pub(crate) fn new() -> Self {
        Self(Mutex::default())
    }

    /// Both legs, if the other one is there already.
    pub(crate) fn join(&self, path: &str, leg: Leg) -> Option<(Leg, Leg)> {
        let pair = path.rsplit_once('/').map_or(path, |(pair, _)| pair);
        let mut waiting = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(other) = waiting.remove(pair) {
            return Some((other, leg));
        }
        waiting.insert(pair.to_owned(), leg);
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_legs_of_a_pair_meet_once() {
        let pairing = Pairing::new();
        assert_eq!(pairing.join("/1/a", 1), None);
        assert_eq!(pairing.join("/2/a", 2), None);
        assert_eq!(pairing.join("/1/b", 3), Some((1, 3)));
        assert_eq!(pairing.join("/1/a", 4), None);
    }
}
