//! Times in settings.

use std::time::Duration;

const LEAST: Duration = Duration::from_millis(10);
const MOST: Duration = Duration::from_secs(366 * 24 * 3600);

/// Reads a time such as `10s`, `5m` or `1h 30m`, from 10 ms to a year.
pub fn positive(text: &str) -> Result<Duration, String> {
    let time = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    if (LEAST..=MOST).contains(&time) { Ok(time) } else { Err("must be 10ms to 366d".to_owned()) }
}

/// Reads a time up to a year, which may be zero.
pub fn any(text: &str) -> Result<Duration, String> {
    let time = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    if time <= MOST { Ok(time) } else { Err("must be at most 366d".to_owned()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_that_would_break_a_clock_are_refused() {
        assert_eq!(positive("1m 30s"), Ok(Duration::from_secs(90)));
        assert!(positive("0s").is_err() && positive("1000years").is_err() && positive("soon").is_err());
        assert_eq!(any("0s"), Ok(Duration::ZERO));
        assert!(any("1000years").is_err());
    }
}
