//! Masking (RFC 6455, section 5.3), in one pass with the move to where the payload goes.

use std::sync::LazyLock;

use fearless_simd::{Level, Simd, dispatch};

/// What this processor can do, found out once.
static LEVEL: LazyLock<Level> = LazyLock::new(Level::new);

/// Moved at once by the wide loop: as much as twelve registers of 32 bytes hold, which leaves some for the rest.
const BLOCK: usize = 384;

/// Moved at once where that is too much: every processor has registers for it.
const SHORT_BLOCK: usize = 64;

/// No buffer is so large that frames in it move further, in bytes.
const SHIFT_MAX: usize = u32::MAX as usize;

/// A masking key, turned so that its first byte belongs to the next byte of the payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Key(pub(crate) [u8; 4]);

impl Key {
    /// The key as it stands `bytes` later.
    #[inline]
    pub(crate) fn after(self, bytes: usize) -> Self {
        let Self(mut key) = self;
        key.rotate_left(bytes % 4);
        Self(key)
    }

    fn wide(self) -> [u8; 8] {
        let [a, b, c, d] = self.0;
        [a, b, c, d, a, b, c, d]
    }
}

/// Masks or unmasks `bytes` where they stand.
pub(crate) fn mask(bytes: &mut [u8], key: Key) {
    move_masked(bytes, 0, key);
}

/// Masks or unmasks everything in `window` behind its first `shift` bytes, and moves it to the front.
#[inline]
pub(crate) fn move_masked(window: &mut [u8], shift: usize, key: Key) {
    if window.len() - shift < BLOCK {
        return move_short(window, shift, key);
    }
    let level = *LEVEL;
    dispatch!(level, simd => move_blocks(simd, window, shift, key));
}

#[inline(always)]
#[expect(clippy::inline_always, reason = "else it would not be compiled for the registers of its caller")]
fn move_blocks<S: Simd>(simd: S, window: &mut [u8], shift: usize, key: Key) {
    simd.vectorize(
        #[inline(always)]
        || {
            let rest = move_whole::<BLOCK>(window, shift, key);
            move_short(rest, shift, key);
        },
    );
}

/// The same for a window that is not long, without looking for wide registers.
#[inline(always)]
#[expect(clippy::inline_always, reason = "small frames cost little more than the call of a function")]
pub(crate) fn move_short(window: &mut [u8], shift: usize, key: Key) {
    let rest = move_whole::<SHORT_BLOCK>(window, shift, key);
    let rest = move_whole::<8>(rest, shift, key);
    let length = rest.len() - shift;
    for (at, key) in (0..length).zip(key.0.into_iter().cycle()) {
        rest[at] = rest[at + shift] ^ key;
    }
}

/// Moves whole blocks, and gives what is left of the window.
#[inline(always)]
#[expect(clippy::inline_always, reason = "else it would not be compiled for the registers of its caller")]
fn move_whole<const SIZE: usize>(window: &mut [u8], shift: usize, key: Key) -> &mut [u8] {
    let key_word = u64::from_ne_bytes(key.wide());
    let mut rest = window;
    // The first condition lets the compiler see that one comparison covers both ends of a block.
    while shift <= SHIFT_MAX && rest.len() >= shift + SIZE {
        let Some(block) = rest[shift..].first_chunk::<SIZE>() else { break };
        // Loaded before it is stored, since source and destination may overlap.
        let mut block = *block;
        for word in block.as_chunks_mut::<8>().0 {
            *word = (u64::from_ne_bytes(*word) ^ key_word).to_ne_bytes();
        }
        rest[..SIZE].copy_from_slice(&block);
        rest = &mut rest[SIZE..];
    }
    rest
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn equals_the_definition(
            window in prop::collection::vec(any::<u8>(), 0..2000),
            shift in 0usize..600,
            key: [u8; 4],
            turned in 0usize..9,
        ) {
            let shift = shift.min(window.len());
            let mut moved = window.clone();
            move_masked(&mut moved, shift, Key(key).after(turned));
            for (index, &byte) in window[shift..].iter().enumerate() {
                prop_assert_eq!(moved[index], byte ^ key[(index + turned) % 4]);
            }
        }
    }
}
