//! Every figure of every round, and what became of the goals.

use anyhow::Result;
use serde::Serialize;

use crate::{
    goals::{Bound, Goal},
    report::text::verdict,
    suite::Results,
};

#[derive(Serialize)]
struct Document<'a> {
    #[serde(flatten)]
    results: &'a Results,
    goals: Vec<Line<'a>>,
}

#[derive(Serialize)]
struct Line<'a> {
    number: u8,
    what: &'a str,
    must: String,
    aim: String,
    measured: Option<f64>,
    verdict: &'static str,
}

pub(crate) fn write(results: &Results, goals: &[Goal]) -> Result<String> {
    let goals = goals.iter().map(|goal| Line {
        number: goal.number,
        what: &goal.what,
        must: bound(goal.must),
        aim: bound(goal.aim),
        measured: goal.measured.filter(|value| value.is_finite()),
        verdict: verdict(goal.verdict()),
    });
    Ok(serde_json::to_string_pretty(&Document { results, goals: goals.collect() })? + "\n")
}

pub(crate) fn bound(bound: Bound) -> String {
    match bound {
        Bound::AtMost(most) => format!("<= {most}"),
        Bound::AtLeast(least) => format!(">= {least}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::goals;

    #[test]
    fn what_is_written_can_be_read_again() {
        let results = Results { rounds: 7, ..Results::default() };
        let text = write(&results, &goals::judge(&results)).unwrap();
        assert!(text.contains("\"verdict\": \"not measured\""));
        let read: Results = serde_json::from_str(&text).unwrap();
        assert_eq!(read.rounds, 7);
    }
}
