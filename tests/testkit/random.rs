use std::{sync::LazyLock, time::Duration};

/// Numbers that look random, and are the same for the same seed (`SplitMix64`).
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// The numbers of `seed`.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Any number.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    /// A number from 0 to one less than `end`.
    pub fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.number() >> 1).unwrap() % end
    }

    /// Yes in `percent` of 100 cases.
    pub fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    /// A length from 1 to `longest`, of which each power of two has its equal share: most are short.
    pub fn length(&mut self, longest: usize) -> usize {
        let power = 1 << self.below(usize::try_from(longest.ilog2()).unwrap() + 1);
        (power + self.below(power)).min(longest)
    }

    /// A time shorter than `longest`.
    pub fn time(&mut self, longest: Duration) -> Duration {
        longest * u32::try_from(self.below(1000)).unwrap() / 1000
    }

    /// A masking key.
    pub fn mask(&mut self) -> [u8; 4] {
        let [a, b, c, d, ..] = self.number().to_le_bytes();
        [a, b, c, d]
    }

    /// Up to `longest` bytes.
    pub fn bytes(&mut self, longest: usize) -> Vec<u8> {
        (0..self.below(longest + 1)).map(|_| self.number().to_le_bytes()[0]).collect()
    }
}

/// A prime, so that no buffer's size divides it.
const BLOCK: usize = 1_048_573;

/// What all payloads are cut from: to write and to check them is then to copy and to compare memory.
static RANDOM: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut random = Random::new(0x6d69_6473_7061_6e64);
    (0..BLOCK).map(|_| random.number().to_le_bytes()[0]).collect()
});

/// A message as its sender makes it and its receiver expects it.
#[derive(Debug, Clone, Copy)]
pub struct Message {
    /// Its place among the messages of its sender.
    pub index: u64,
    /// Text, or else binary.
    pub text: bool,
    /// The payload's length.
    pub length: usize,
    start: usize,
}

impl Message {
    /// The payload at `position`, as far as it lies in one piece.
    pub fn at(&self, position: usize) -> &'static [u8] {
        let from = (self.start + position) % BLOCK;
        &RANDOM[from..BLOCK.min(from + self.length - position)]
    }

    /// Whether these bytes are the payload at `position`.
    pub fn has(&self, mut position: usize, mut bytes: &[u8]) -> bool {
        while !bytes.is_empty() {
            if position >= self.length {
                return false;
            }
            let expected = self.at(position);
            let (now, later) = bytes.split_at(bytes.len().min(expected.len()));
            if now != &expected[..now.len()] {
                return false;
            }
            position += now.len();
            bytes = later;
        }
        true
    }
}

/// The messages of one direction of a stream: sender and receiver have the same.
#[derive(Debug, Clone)]
pub struct Script {
    random: Random,
    next: u64,
    shortest: usize,
    longest: usize,
}

impl Script {
    /// Messages of 0 to `longest` bytes, most of them short.
    pub fn mixed(seed: u64, longest: usize) -> Self {
        Self { random: Random::new(seed), next: 0, shortest: 0, longest }
    }

    /// Messages of `length` bytes.
    pub fn even(seed: u64, length: usize) -> Self {
        Self { random: Random::new(seed), next: 0, shortest: length, longest: length }
    }
}

impl Iterator for Script {
    type Item = Message;

    fn next(&mut self) -> Option<Message> {
        let Self { random, next, shortest, longest } = self;
        let length = match random.length(*longest) {
            length if length < *shortest => *shortest,
            _ if *shortest == 0 && random.chance(5) => 0,
            length => length,
        };
        let message = Message { index: *next, text: random.chance(30), length, start: random.below(BLOCK) };
        *next += 1;
        Some(message)
    }
}
