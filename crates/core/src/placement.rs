//! Which edge owns a stream: rendezvous hashing (highest random weight) over the edges' names.
//!
//! The result is a contract between releases that run side by side, so the hash is fixed (XXH3, 64 bits) and
//! golden vectors stand guard over it.

use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::id::StreamId;

/// The position of the edge that owns `stream`, or `None` when there is no edge.
///
/// Every edge draws a number from the stream's id and its own name, and the highest wins: an edge that comes or
/// goes moves only the streams that it wins or had won. Equal numbers are told apart by name; of equal names the last one wins.
pub fn owner_of<Name: AsRef<str>>(stream: StreamId, edges: &[Name]) -> Option<usize> {
    let weight = |name: &str| xxh3_64_with_seed(name.as_bytes(), seed(stream));
    (0..edges.len()).max_by_key(|&index| {
        let name = edges[index].as_ref();
        (weight(name), name)
    })
}

fn seed(stream: StreamId) -> u64 {
    xxh3_64_with_seed(&stream.as_u128().to_be_bytes(), 0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn golden_vectors() {
        let edges = ["edge-0", "edge-1", "edge-2", "edge-3"];
        let owners: Vec<_> = (0..16u128)
            .map(|n| owner_of(StreamId::from_random(n.wrapping_mul(0x9e37_79b9_7f4a_7c15)), &edges).unwrap())
            .collect();
        assert_eq!(owners, GOLDEN);
    }

    #[test]
    fn nobody_owns_without_edges() {
        assert_eq!(owner_of(StreamId::from_random(1), &[] as &[&str]), None);
    }

    #[test]
    fn shares_are_even() {
        let edges: Vec<_> = (0..5).map(|n| format!("edge-{n}")).collect();
        let mut count = [0u32; 5];
        for n in 0..10_000u128 {
            count[owner_of(StreamId::from_random(n << 64 | n), &edges).unwrap()] += 1;
        }
        assert!(count.iter().all(|&share| (1_850..2_150).contains(&share)), "{count:?}");
    }

    proptest! {
        #[test]
        fn order_does_not_matter_and_a_leaving_edge_moves_only_its_own(
            bits: u128, names in prop::collection::btree_set("[a-z]{1,8}", 2..8), leaving: prop::sample::Index,
        ) {
            let stream = StreamId::from_random(bits);
            let edges: Vec<_> = names.into_iter().collect();
            let owner = &edges[owner_of(stream, &edges).unwrap()];
            let reversed: Vec<_> = edges.iter().rev().collect();
            prop_assert_eq!(reversed[owner_of(stream, &reversed).unwrap()], owner);

            let gone = &edges[leaving.index(edges.len())];
            if gone != owner {
                let left: Vec<_> = edges.iter().filter(|&edge| edge != gone).collect();
                prop_assert_eq!(left[owner_of(stream, &left).unwrap()], owner);
            }
        }
    }

    const GOLDEN: [usize; 16] = [0, 3, 2, 2, 1, 0, 0, 0, 0, 2, 1, 2, 2, 2, 2, 0];
}
