use std::time::{Duration, Instant};

/// Whether what is known of the pods is current.
///
/// A watch that breaks is nothing: it is back within a second or two, and the last view holds. Only when it is not back
/// after some time is the view out of date. Then a whole list, and a moment without a failure, make it current again: a
/// watch that is refused each time would otherwise turn it back and forth.
#[derive(Debug)]
pub(super) struct Trust {
    patience: Duration,
    proof: Duration,
    standing: Standing,
    failing: Option<Instant>,
    listed: Option<Instant>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Standing {
    /// Nothing was ever heard, and it is not long yet.
    Starting,
    Current,
    OutOfDate,
}

impl Trust {
    /// Nothing has been heard yet at `now`. A view is out of date after failing for `patience`, and current again after a
    /// list and `proof` without a failure.
    pub(super) fn new(patience: Duration, proof: Duration, now: Instant) -> Self {
        Self { patience, proof, standing: Standing::Starting, failing: Some(now), listed: None }
    }

    /// Something went wrong. Says whether all had been well before.
    pub(super) fn failed(&mut self, now: Instant) -> bool {
        let first = self.failing.is_none();
        self.listed = None;
        self.failing.get_or_insert(now);
        first
    }

    /// A whole list has come.
    pub(super) fn listed(&mut self, now: Instant) {
        self.listed.get_or_insert(now);
    }

    /// When [`Trust::turn`] may have something to say next.
    pub(super) fn next_turn(&self) -> Option<Instant> {
        let failing = self.failing?;
        let proven = self.listed.map(|listed| listed + self.proof);
        let lost = (self.standing != Standing::OutOfDate).then(|| failing + self.patience);
        proven.into_iter().chain(lost).min()
    }

    /// Gives the standing when it has changed.
    pub(super) fn turn(&mut self, now: Instant) -> Option<Standing> {
        let failing = self.failing?;
        let standing = if self.listed.is_some_and(|listed| now >= listed + self.proof) {
            self.failing = None;
            Standing::Current
        } else if now >= failing + self.patience {
            Standing::OutOfDate
        } else {
            return None;
        };
        (std::mem::replace(&mut self.standing, standing) != standing).then_some(standing)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock;

    /// What happens, at which second, and the standing that is told of.
    type Step = (&'static str, u64, Option<Standing>);

    const CURRENT: Option<Standing> = Some(Standing::Current);
    const OUT_OF_DATE: Option<Standing> = Some(Standing::OutOfDate);

    #[test]
    fn a_view_is_out_of_date_after_a_time_of_failures_only() {
        let table: &[(&str, &[Step])] = &[
            ("all is well", &[("listed", 0, None), ("", 2, CURRENT), ("", 1000, None)]),
            (
                "the server is not there at the start",
                &[
                    ("failed", 0, None),
                    ("failed", 14, None),
                    ("failed", 15, OUT_OF_DATE),
                    ("failed", 60, None),
                ],
            ),
            ("nothing is heard at the start", &[("", 14, None), ("", 15, OUT_OF_DATE)]),
            (
                "a watch breaks now and then",
                &[
                    ("listed", 0, None),
                    ("", 2, CURRENT),
                    ("failed", 100, None),
                    ("listed", 101, None),
                    ("", 103, None),
                    ("failed", 113, None),
                    ("listed", 127, None),
                    ("", 140, None),
                ],
            ),
            (
                "the server is away and comes back",
                &[
                    ("listed", 0, None),
                    ("", 2, CURRENT),
                    ("failed", 10, None),
                    ("failed", 20, None),
                    ("", 25, OUT_OF_DATE),
                    ("failed", 300, None),
                    ("listed", 301, None),
                    ("", 302, None),
                    ("", 303, CURRENT),
                ],
            ),
            (
                "lists are given and watches refused",
                &[
                    ("listed", 0, None),
                    ("failed", 1, None),
                    ("listed", 5, None),
                    ("failed", 6, None),
                    ("listed", 14, None),
                    ("failed", 15, OUT_OF_DATE),
                    ("listed", 20, None),
                    ("failed", 21, None),
                ],
            ),
        ];
        for (case, steps) in table {
            let start = clock::now();
            let mut trust = Trust::new(Duration::from_secs(15), Duration::from_secs(2), start);
            for &(what, second, expected) in *steps {
                let now = start + Duration::from_secs(second);
                let failing = trust.failing.is_some();
                match what {
                    "failed" => assert_eq!(trust.failed(now), !failing, "{case}, second {second}"),
                    "listed" => trust.listed(now),
                    _ => {}
                }
                assert_eq!(trust.turn(now), expected, "{case}, second {second}");
                assert!(trust.next_turn().is_none_or(|next| next > now), "{case}, second {second}");
            }
        }
    }
}
