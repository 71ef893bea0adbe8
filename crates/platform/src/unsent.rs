//! What a connection has not taken yet.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::io::AsyncWrite;

use crate::tls::SEALED_MAX;

/// The longest piece that is made here, in bytes: what fills four records of TLS, and nearly 64 KiB of memory.
///
/// Pieces of one size take each other's place in memory. Blocks as long as whatever was left of a read do not: an
/// allocator keeps pages for many sizes then, which made three times of what waited.
const PIECE: usize = 4 * SEALED_MAX;

/// Bytes to be written, in pieces, which go back to the allocator one by one.
#[derive(Debug, Default)]
pub struct Unsent {
    pieces: Vec<Vec<u8>>,
    /// How much of the first piece was written.
    written: usize,
}

impl Unsent {
    /// Whether nothing is left to be written.
    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// How much memory the bytes take.
    pub fn memory(&self) -> usize {
        self.pieces.iter().map(Vec::capacity).sum()
    }

    /// Appends a piece as it is.
    pub fn push(&mut self, piece: Vec<u8>) {
        if !piece.is_empty() {
            self.pieces.push(piece);
        }
    }

    /// Makes room for so many pieces more.
    pub fn reserve(&mut self, pieces: usize) {
        self.pieces.reserve_exact(pieces);
    }

    /// Appends a copy of `bytes`.
    pub fn append(&mut self, bytes: &[u8]) {
        self.pieces.extend(bytes.chunks(PIECE).map(<[u8]>::to_vec));
    }

    /// Appends what `put` adds to a piece, and says how many bytes that is. For small things: many of them share a piece.
    pub fn put(&mut self, put: impl FnOnce(&mut Vec<u8>)) -> usize {
        let mut piece = self.pieces.pop_if(|last| last.len() < PIECE / 2).unwrap_or_default();
        let before = piece.len();
        put(&mut piece);
        let put = piece.len() - before;
        self.push(piece);
        put
    }

    /// Writes once, as much as `writer` takes of everything, and says how much that is. Fails, too, where it takes nothing
    /// and does not ask to wait.
    pub fn poll_write(
        &mut self,
        writer: Pin<&mut (impl AsyncWrite + ?Sized)>,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<usize>> {
        let written = if let [piece] = self.pieces.as_slice() {
            ready!(writer.poll_write(cx, &piece[self.written..]))?
        } else {
            let mut slices: Vec<_> = self.pieces.iter().map(|piece| IoSlice::new(piece)).collect();
            IoSlice::advance_slices(&mut slices.as_mut_slice(), self.written);
            ready!(writer.poll_write_vectored(cx, &slices))?
        };
        if written == 0 {
            return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
        }
        self.forget(written);
        Poll::Ready(Ok(written))
    }

    fn forget(&mut self, written: usize) {
        self.written += written;
        let mut whole = 0;
        while let Some(piece) = self.pieces.get(whole)
            && self.written >= piece.len()
        {
            self.written -= piece.len();
            whole += 1;
        }
        self.pieces.drain(..whole);
        if self.pieces.is_empty() {
            // Thousands of streams may owe nothing.
            self.pieces = Vec::new();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use super::*;

    /// Takes so many bytes of each write, if any.
    struct Narrow {
        most: usize,
        taken: Vec<u8>,
    }

    impl AsyncWrite for Narrow {
        fn poll_write(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            bytes: &[u8],
        ) -> Poll<io::Result<usize>> {
            let taken = bytes.len().min(self.most);
            self.taken.extend_from_slice(&bytes[..taken]);
            Poll::Ready(Ok(taken))
        }

        fn poll_write_vectored(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            slices: &[IoSlice<'_>],
        ) -> Poll<io::Result<usize>> {
            let all: Vec<_> = slices.iter().flat_map(|slice| slice.to_vec()).collect();
            let taken = all.len().min(self.most);
            self.taken.extend_from_slice(&all[..taken]);
            Poll::Ready(Ok(taken))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    fn write(unsent: &mut Unsent, narrow: &mut Narrow) -> io::Result<usize> {
        match unsent.poll_write(Pin::new(narrow), &mut Context::from_waker(Waker::noop())) {
            Poll::Ready(written) => written,
            Poll::Pending => unreachable!("it never waits"),
        }
    }

    #[test]
    fn everything_is_written_in_its_order_however_little_is_taken_at_once() {
        let bytes: Vec<u8> = (0..3 * PIECE + 5).map(|at| u8::try_from(at % 251).unwrap()).collect();
        for most in [7, PIECE - 1, PIECE, PIECE + 1, 10 * PIECE] {
            let mut unsent = Unsent::default();
            unsent.append(&bytes[..3 * PIECE]);
            unsent.push(Vec::new());
            unsent.push(vec![bytes[3 * PIECE]]);
            assert_eq!(unsent.put(|piece| piece.extend_from_slice(&bytes[3 * PIECE + 1..])), 4);
            let mut narrow = Narrow { most, taken: Vec::new() };
            while !unsent.is_empty() {
                assert!(write(&mut unsent, &mut narrow).unwrap() <= most);
            }
            assert_eq!(narrow.taken, bytes);
            assert_eq!((unsent.memory(), unsent.written), (0, 0));
        }
    }

    #[test]
    fn what_was_written_is_no_longer_kept() {
        let mut unsent = Unsent::default();
        unsent.append(&vec![0; 3 * PIECE]);
        assert_eq!(unsent.memory(), 3 * PIECE);
        write(&mut unsent, &mut Narrow { most: PIECE + 1, taken: Vec::new() }).unwrap();
        assert_eq!(unsent.memory(), 2 * PIECE);
    }

    #[test]
    fn small_things_share_a_piece() {
        let mut unsent = Unsent::default();
        for _ in 0..100 {
            unsent.put(|piece| piece.push(1));
        }
        unsent.put(|_| {});
        assert_eq!(unsent.pieces.len(), 1);
    }

    #[test]
    fn a_writer_that_takes_nothing_is_an_error() {
        let mut unsent = Unsent::default();
        unsent.append(b"lost");
        let error = write(&mut unsent, &mut Narrow { most: 0, taken: Vec::new() }).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WriteZero);
    }
}
