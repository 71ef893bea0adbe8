//! Rounds in which every variant has its turn, and what comes out of them.

use anyhow::Result;

/// Gives each of `items` one turn in every round, which `turn` is told, in reverse order every other round.
/// The figures of each item, a round each.
pub(crate) fn run<I, F>(
    rounds: usize,
    items: &mut [I],
    mut turn: impl FnMut(usize, &mut I) -> Result<F>,
) -> Result<Vec<Vec<F>>> {
    let mut figures: Vec<Vec<F>> = items.iter().map(|_| Vec::with_capacity(rounds)).collect();
    for round in 0..rounds {
        let mut order: Vec<usize> = (0..items.len()).collect();
        if round % 2 == 1 {
            order.reverse();
        }
        for place in order {
            figures[place].push(turn(round, &mut items[place])?);
        }
    }
    Ok(figures)
}

/// The middle value, or the mean of the two in the middle; not a number when there is none.
pub(crate) fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    let half = values.len() / 2;
    match values.len() {
        0 => f64::NAN,
        odd if odd % 2 == 1 => values[half],
        _ => f64::midpoint(values[half - 1], values[half]),
    }
}

/// The median of the ratios that two variants had in the same round.
pub(crate) fn ratio<F>(ours: &[F], reference: &[F], figure: impl Fn(&F) -> f64) -> f64 {
    median(ours.iter().zip(reference).map(|(ours, reference)| figure(ours) / figure(reference)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(a: f64, b: f64) -> bool {
        (a - b).abs() < 1e-9
    }

    #[test]
    fn the_median_is_the_middle() {
        assert!(near(median([3.0, 1.0, 100.0]), 3.0));
        assert!(near(median([4.0, 1.0, 2.0, 100.0]), 3.0));
        assert!(median([]).is_nan());
    }

    #[test]
    fn ratios_are_taken_round_by_round() {
        // The machine was ten times slower in the second round; the ratio of medians would be far off.
        let (ours, reference) = ([1.0, 10.0, 1.2], [2.0, 20.0, 2.4]);
        assert!(near(ratio(&ours, &reference, |&value| value), 0.5));
    }

    #[test]
    fn the_order_turns_round() {
        let mut order = Vec::new();
        let figures = run(3, &mut ['a', 'b'], |round, &mut item| {
            order.push((round, item));
            Ok(item)
        });
        assert_eq!(order, [(0, 'a'), (0, 'b'), (1, 'b'), (1, 'a'), (2, 'a'), (2, 'b')]);
        assert_eq!(figures.unwrap(), [vec!['a'; 3], vec!['b'; 3]]);
    }
}
