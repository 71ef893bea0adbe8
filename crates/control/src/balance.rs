//! How device links spread over the replicas: whom to let go, and how fast.

use std::time::Duration;

/// A replica may have a quarter more links than the mean, and this many.
const SLACK: u64 = 16;

/// How many links a replica with too many lets go in one second, at the most.
const MOST: u64 = 20;

/// How many links a second are told to go by a replica that ends, if its time allows.
const MOVES_PER_SECOND: usize = 250;

/// How many of its `own` links a replica lets go in this second, when `others` have theirs: those that can take more.
///
/// A five-hundredth at a time, so that the devices' new links are no burden to anybody.
pub(crate) fn to_let_go(own: u64, others: &[u64]) -> usize {
    let replicas = others.len() as u64 + 1;
    let mean = (own + others.iter().sum::<u64>()) / replicas;
    if replicas == 1 || own <= mean + mean / 4 + SLACK {
        return 0;
    }
    let now = (own - mean).min((own / 500).clamp(1, MOST));
    usize::try_from(now).unwrap_or_default()
}

/// Over which time a replica that ends tells its links to go: half of the grace time at the most.
pub(crate) fn spread(links: usize, grace: Duration) -> Duration {
    let seconds = links.div_ceil(MOVES_PER_SECOND).saturating_sub(1);
    Duration::from_secs(seconds as u64).min(grace / 2)
}

/// How many of `links` are to be told now, `left` before the end of the spread, when there is another look after `step`.
pub(crate) fn to_tell(links: usize, left: Duration, step: Duration) -> usize {
    let looks = left.as_millis() / step.as_millis().max(1) + 1;
    links.div_ceil(usize::try_from(looks).unwrap_or(usize::MAX))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_replica_lets_go_only_what_is_far_above_the_mean() {
        assert_eq!(to_let_go(15_000, &[]), 0, "there is nobody else");
        assert_eq!(
            (to_let_go(42, &[0]), to_let_go(43, &[0])),
            (0, 1),
            "the mean is 21: 21 + 5 + 16 are allowed"
        );
        assert_eq!(to_let_go(15_000, &[0]), 20);
        assert_eq!(to_let_go(1_000, &[900, 1_100]), 0);
    }

    proptest! {
        #[test]
        fn replicas_come_to_rest_near_the_mean(mut loads in prop::collection::vec(0u64..2_000, 2..6)) {
            let total: u64 = loads.iter().sum();
            for _ in 0..4_000 {
                let before = loads.clone();
                for index in 0..loads.len() {
                    let others: Vec<_> =
                        (0..loads.len()).filter(|&other| other != index).map(|other| before[other]).collect();
                    let gone = to_let_go(before[index], &others) as u64;
                    loads[index] -= gone;
                    // The balancer sends them to the next one.
                    let next = (index + 1) % loads.len();
                    loads[next] += gone;
                }
                prop_assert_eq!(loads.iter().sum::<u64>(), total);
                if loads == before {
                    break;
                }
            }
            let mean = total / loads.len() as u64;
            prop_assert!(loads.iter().all(|&load| load <= mean + mean / 4 + SLACK + MOST), "{:?}", loads);
        }

        #[test]
        fn all_are_told_within_the_spread(links in 0usize..20_000, grace in 0u64..120) {
            let (grace, step) = (Duration::from_secs(grace), Duration::from_millis(100));
            let spread = spread(links, grace);
            prop_assert!(spread <= grace / 2);
            let (mut left, mut passed) = (links, Duration::ZERO);
            while left > 0 {
                prop_assert!(passed <= spread + step, "{left} of {links} left after {passed:?} of {spread:?}");
                left -= to_tell(left, spread.saturating_sub(passed), step).min(left);
                passed += step;
            }
        }
    }
}
