//! What is sent.

use clap::{ValueEnum, builder::PossibleValue};
use serde::{Deserialize, Serialize};

/// One kind of traffic, from the service to the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Case {
    #[serde(rename = "1m")]
    MiB1,
    #[serde(rename = "64k")]
    KiB64,
    #[serde(rename = "16k")]
    KiB16,
    #[serde(rename = "1k")]
    KiB1,
    #[serde(rename = "64b")]
    Bytes64,
    #[serde(rename = "64b-unbatched")]
    Bytes64Unbatched,
}

impl Case {
    pub(crate) const ALL: [Self; 6] =
        [Self::MiB1, Self::KiB64, Self::KiB16, Self::KiB1, Self::Bytes64, Self::Bytes64Unbatched];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::MiB1 => "1m",
            Self::KiB64 => "64k",
            Self::KiB16 => "16k",
            Self::KiB1 => "1k",
            Self::Bytes64 => "64b",
            Self::Bytes64Unbatched => "64b-unbatched",
        }
    }

    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::MiB1 => "1 MiB",
            Self::KiB64 => "64 KiB",
            Self::KiB16 => "16 KiB",
            Self::KiB1 => "1 KiB",
            Self::Bytes64 => "64 B, many frames a write",
            Self::Bytes64Unbatched => "64 B, one frame a write",
        }
    }

    /// Payload of one message.
    pub(crate) fn payload(self) -> usize {
        match self {
            Self::MiB1 => 1 << 20,
            Self::KiB64 => 64 << 10,
            Self::KiB16 => 16 << 10,
            Self::KiB1 => 1 << 10,
            Self::Bytes64 | Self::Bytes64Unbatched => 64,
        }
    }

    /// Whether one write may hold many frames.
    pub(crate) fn batched(self) -> bool {
        self != Self::Bytes64Unbatched
    }
}

impl ValueEnum for Case {
    fn value_variants<'a>() -> &'a [Self] {
        &Self::ALL
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        Some(PossibleValue::new(self.name()).help(self.title()))
    }
}
