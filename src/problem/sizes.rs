//! Sizes.

use std::fmt;

/// The sizes of a problem.
///
/// ```
/// use sink_attention::Shape;
///
/// // A prompt of 700 tokens through a layer of GPT-OSS, and the decoding of the token behind it.
/// let prompt = Shape { batch: 1, heads: 64, kv_heads: 8, seq_q: 700, seq_k: 700, head_dim: 64, value_dim: 64 };
/// let decoding = Shape { seq_q: 1, seq_k: 701, ..prompt };
/// assert_eq!(decoding.to_string(), "B=1 H=64 G=8 M=1 N=701 D=64 E=64");
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shape {
    /// B, sequences in the batch.
    pub batch: usize,
    /// H, query heads.
    pub heads: usize,
    /// G, key/value heads; H is a multiple of G, query head h reads key head h / (H / G).
    pub kv_heads: usize,
    /// M, queries in each sequence.
    pub seq_q: usize,
    /// N, keys in each sequence.
    pub seq_k: usize,
    /// D, width of q and k, 1 to 512.
    pub head_dim: usize,
    /// E, width of v and o, 1 to 512.
    pub value_dim: usize,
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "B={} H={} G={} M={} N={} D={} E={}",
            self.batch, self.heads, self.kv_heads, self.seq_q, self.seq_k, self.head_dim, self.value_dim
        )
    }
}
