//! Copies in pieces that no processor is slow with.
//!
//! The C library copies more than 2 KiB with `rep movsb`, which some processors do at a fifteenth of their speed when the
//! destination lies a few bytes beyond the source within its page, as the payload of a record or a frame does after the header.

/// The longest copy that is made at once, in bytes.
pub const COPY: usize = 2048;

/// Copies `from` to `to`. Both must be of one length, or it panics, like [`slice::copy_from_slice`].
pub fn copy(to: &mut [u8], from: &[u8]) {
    to.chunks_mut(COPY).zip(from.chunks(COPY)).for_each(|(to, from)| to.copy_from_slice(from));
}

/// Appends `from` to `to`, and leaves no spare room.
pub fn append(to: &mut Vec<u8>, from: &[u8]) {
    to.reserve_exact(from.len());
    from.chunks(COPY).for_each(|piece| to.extend_from_slice(piece));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_make_the_whole() {
        for length in [0, 1, COPY - 1, COPY, COPY + 1, 3 * COPY + 5] {
            let from: Vec<u8> = (0..=250).cycle().take(length).collect();
            let (mut copied, mut appended) = (vec![9; length], vec![9]);
            copy(&mut copied, &from);
            append(&mut appended, &from);
            assert!(copied == from, "{length} bytes copied");
            assert!(appended == [&[9], &from[..]].concat(), "{length} bytes appended");
        }
    }
}
