//! Buffers that belong to a thread, so that a stream has none while nothing moves.

use std::{cell::Cell, thread::LocalKey};

/// A buffer of the thread, taken out while it is in use.
type Buffer = Cell<Vec<u8>>;

thread_local! {
    /// For the frames of legs.
    pub(crate) static FRAMES: Buffer = const { Cell::new(Vec::new()) };
    /// For the records of TLS, below the frames.
    pub(crate) static RECORDS: Buffer = const { Cell::new(Vec::new()) };
}

/// Lends `size` bytes of the thread's buffer, whatever they hold.
///
/// Whoever asks again inside `work` gets a buffer of its own.
pub(crate) fn with<T>(
    buffer: &'static LocalKey<Buffer>,
    size: usize,
    work: impl FnOnce(&mut [u8]) -> T,
) -> T {
    let mut bytes = buffer.take();
    if bytes.len() < size {
        bytes = vec![0; size];
    }
    let result = work(&mut bytes[..size]);
    buffer.set(bytes);
    result
}
