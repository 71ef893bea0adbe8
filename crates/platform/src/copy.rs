//! Copies in pieces that no processor is slow with.
//!
//! The C library copies more than 2 KiB with `rep movsb`, which some processors do at a fifteenth of their speed when the
//! destination lies a few bytes beyond the source within its page, as the payload of a record or a frame does after the header.

/// The longest copy that is made at once, in bytes.
pub const COPY: usize = 2048;

/// Copies `from` to the start of `to`, as long as both are.
pub fn copy(to: &mut [u8], from: &[u8]) {
    to.chunks_mut(COPY).zip(from.chunks(COPY)).for_each(|(to, from)| to.copy_from_slice(from));
}

/// Appends `from` to `to`, and leaves no spare room.
pub fn append(to: &mut Vec<u8>, from: &[u8]) {
    to.reserve_exact(from.len());
    from.chunks(COPY).for_each(|piece| to.extend_from_slice(piece));
}
