//! The mask among the new tokens of a decoding step: which of them each of them sees, and which positions follow from that.

use crate::problem::cache::MOST_QUERIES;
use crate::problem::error::{Error, Result};
use crate::problem::row_format::Bounds;

/// A mask among the new tokens of a decoding step, the last M that were appended to each sequence: tree attention, as speculative decoding
/// with several continuations needs it (SpecInfer, Medusa, EAGLE).
///
/// The operand has a word of 32 bits for each new token. Bit j of word i says whether new token i sees new token j, itself included; bits
/// from M on do not count. The mask is the same for all heads. It hides keys that causality and the window would show, and shows none that
/// they hide. It has no part in what is visible of the tokens before the new ones.
///
/// The position of a new token follows from its word. With N tokens in the sequence, token i has position N - M + depth, where its depth is
/// the number of new tokens that it sees besides itself. In a tree these are its ancestors, so that all continuations of a token have the
/// same position. Causality, the window, sink tokens and ALiBi count by these positions.
///
/// ```
/// use sink_attention::Options;
/// use sink_attention::cache::{CacheConfig, CacheKind, Decode, DecodeOperands, TreeMask};
/// use sink_attention::cpu::KvCache;
///
/// let mut cache = KvCache::new(&CacheConfig::new(CacheKind::Contiguous { capacity: 8 }, 1, 1, 1))?;
/// cache.append(&[1], &[0.0f32], &[6.0], None, None)?;
/// // Two continuations of the first token: token 0 with its successor 2, and token 1.
/// let words = TreeMask::of_parents(&[None, None, Some(0)])?;
/// assert_eq!(words, [0b001, 0b010, 0b101]);
/// cache.append(&[3], &[0.0; 3], &[2.0, 4.0, 1.0], None, None)?;
/// let decode = Decode::new(1, Options::new().causal(true)).queries(3).tree_mask(TreeMask::Shared);
/// let output = cache.decode(&decode, &[0.0; 3], &DecodeOperands::default().tree_mask(&words[..]))?;
/// assert_eq!(output.o, [4.0, 5.0, 3.0]); // means of 6 and 2, of 6 and 4, of 6, 2 and 1
/// # Ok::<(), sink_attention::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TreeMask {
    /// The words are `[M]`, the same tree for all sequences.
    Shared,
    /// The words are `[B, M]`, a tree for each sequence of the step.
    PerSequence,
}

impl TreeMask {
    /// The words of a tree of new tokens: each sees its ancestors and itself. `None` is the parent of tokens that follow what was there
    /// before the new tokens.
    ///
    /// # Errors
    /// [`Error::DimensionTooLarge`] for more than 16 tokens; [`Error::InvalidOption`] where a token does not come after its parent.
    pub fn of_parents(parents: &[Option<usize>]) -> Result<Vec<u32>> {
        if parents.len() > MOST_QUERIES {
            let (value, most) = (parents.len() as u64, MOST_QUERIES as u64);
            return Err(Error::DimensionTooLarge { dimension: "queries", value, most });
        }
        let mut words: Vec<u32> = Vec::with_capacity(parents.len());
        for (token, &parent) in parents.iter().enumerate() {
            let ancestors = match parent.map(|parent| (parent, words.get(parent))) {
                None => 0,
                Some((_, Some(word))) => *word,
                Some((parent, None)) => {
                    let reason = format!("token {token} has parent {parent}; a token comes after its parent");
                    return Err(Error::InvalidOption { option: "tree_mask", reason });
                }
            };
            words.push(ancestors | 1 << token);
        }
        Ok(words)
    }

    /// Extents of the words, of so many sequences and new tokens.
    pub(crate) fn shape(self, sequences: usize, queries: usize) -> [usize; 2] {
        match self {
            TreeMask::Shared => [1, queries],
            TreeMask::PerSequence => [sequences, queries],
        }
    }
}

/// The new tokens of a sequence. Twin of shaders/cache/tree.wgsl.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tree<'a> {
    /// A word for each.
    pub(crate) words: &'a [u32],
    /// Place of the first one. It is negative for a sequence that has fewer tokens.
    pub(crate) first: i64,
}

impl Tree<'_> {
    /// New tokens that a new token sees besides itself.
    fn depth(&self, token: usize) -> i64 {
        let others = ((1u32 << self.words.len()) - 1) & !(1 << token);
        (self.words[token] & others).count_ones().into()
    }

    /// The number of a key among the new tokens, if it is one of them.
    fn token(&self, place: i64) -> Option<usize> {
        usize::try_from(place - self.first).ok().filter(|token| *token < self.words.len())
    }

    /// The position of a query.
    pub(crate) fn query_position(&self, query: usize) -> i64 {
        self.first + self.depth(query)
    }

    /// The position of a key.
    pub(crate) fn key_position(&self, place: i64) -> i64 {
        self.token(place).map_or(place, |token| self.query_position(token))
    }

    /// Whether a query sees a key.
    pub(crate) fn visible(&self, query: usize, place: i64, bounds: &Bounds) -> bool {
        let (position, key) = (self.query_position(query), self.key_position(place));
        self.token(place).is_none_or(|token| self.words[query] >> token & 1 == 1)
            && key <= position + i64::from(bounds.right)
            && (key >= position - i64::from(bounds.left) || key < i64::from(bounds.sink_tokens))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::problem::row_format::UNBOUNDED;

    #[test]
    fn words_of_a_tree() {
        assert_eq!(TreeMask::of_parents(&[]).unwrap(), [0; 0]);
        let chain: Vec<Option<usize>> = (0..16usize).map(|token| token.checked_sub(1)).collect();
        let words = TreeMask::of_parents(&chain).unwrap();
        assert!(words.iter().enumerate().all(|(token, word)| *word == (2 << token) - 1), "{words:?}");
        let says = |parents: &[Option<usize>], text: &str| {
            let error = TreeMask::of_parents(parents).unwrap_err().to_string();
            assert!(error.contains(text), "{error}");
        };
        says(&[None, Some(1)], "token 1 has parent 1");
        says(&[None, Some(0), Some(usize::MAX)], "token 2 has parent 18446744073709551615");
        says(&[None; 17], "queries is 17, the most is 16");
    }

    /// A chain is what causal queries see without a mask, whatever the bounds are. Bits beyond the tokens do not count.
    #[test]
    fn a_chain_is_causal() {
        let words: Vec<u32> = (0..5).map(|token| ((2 << token) - 1) | 0xffff_ffe0).collect();
        for first in [-2i64, 0, 7] {
            let tree = Tree { words: &words, first };
            for (left, sink_tokens) in [(UNBOUNDED, 0), (3, 0), (3, 2), (0, 9)] {
                let bounds = Bounds { left, right: 0, sink_tokens };
                for query in 0..5 {
                    let position = first + query as i64;
                    assert_eq!(tree.query_position(query), position);
                    for place in 0..first + 5 {
                        let expected = place <= position
                            && (place >= position - i64::from(left) || place < i64::from(sink_tokens));
                        assert_eq!(tree.visible(query, place, &bounds), expected, "{first} {bounds:?} {query} {place}");
                    }
                }
            }
        }
    }
}
