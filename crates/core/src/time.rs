//! Wall-clock time as it stands in tickets, tokens and records.

use std::{fmt, time::Duration};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

/// Seconds since 1970-01-01 UTC, not counting leap seconds. JSON carries it in the form of RFC 3339.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UnixTime(pub u64);

impl UnixTime {
    /// 9999-12-31T23:59:59Z, the last second that RFC 3339 can write.
    pub const LAST: Self = Self(253_402_300_799);

    /// This time and `duration` more, in whole seconds.
    #[must_use]
    pub fn plus(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(duration.as_secs()))
    }

    /// How long it is from `earlier` until this time; zero when it is not later.
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_secs(self.0.saturating_sub(earlier.0))
    }
}

impl fmt::Display for UnixTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = i64::try_from(self.0)
            .ok()
            .and_then(|seconds| OffsetDateTime::from_unix_timestamp(seconds).ok())
            .and_then(|time| time.format(&Rfc3339).ok());
        match text {
            Some(text) => f.write_str(&text),
            None => write!(f, "{} s after 1970", self.0),
        }
    }
}

impl Serialize for UnixTime {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for UnixTime {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let time = OffsetDateTime::parse(&text, &Rfc3339).map_err(D::Error::custom)?;
        // An offset can lead past what UTC can write.
        match u64::try_from(time.unix_timestamp()) {
            Ok(seconds) if seconds <= Self::LAST.0 => Ok(Self(seconds)),
            _ => Err(D::Error::custom("a time must lie between the years 1970 and 9999 in UTC")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_carries_rfc_3339() {
        let time = UnixTime(1_790_000_000);
        let json = serde_json::to_string(&time).unwrap();
        assert_eq!(json, "\"2026-09-21T14:13:20Z\"");
        assert_eq!(serde_json::from_str::<UnixTime>(&json).unwrap(), time);
    }

    #[test]
    fn times_that_cannot_be_written_are_not_read() {
        assert!(serde_json::from_str::<UnixTime>("\"9999-12-31T23:59:59Z\"").is_ok());
        assert!(serde_json::from_str::<UnixTime>("\"9999-12-31T23:59:59-23:59\"").is_err());
        assert!(serde_json::from_str::<UnixTime>("\"1969-12-31T23:59:59Z\"").is_err());
    }

    #[test]
    fn absurd_times_do_not_panic() {
        assert_eq!(UnixTime(u64::MAX).to_string(), format!("{} s after 1970", u64::MAX));
        assert_eq!(UnixTime(u64::MAX).plus(Duration::from_secs(5)), UnixTime(u64::MAX));
    }
}
