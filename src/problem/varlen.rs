//! Sequences of different lengths: where each lies among the rows of the operands.

use std::ops::Range;
use std::sync::Arc;

use crate::problem::error::{Error, Result};
use crate::problem::mask::Band;
use crate::problem::options::{Layout, Options};
use crate::problem::sizes::Shape;

/// Lengths of the sequences of a batch.
///
/// ```
/// use sink_attention::{Attention, Inputs, Lengths, Options, Problem, Shape};
///
/// // A padded batch: the first sequence has one key, the second has two.
/// let shape = Shape { batch: 2, heads: 1, kv_heads: 1, seq_q: 1, seq_k: 2, head_dim: 1, value_dim: 1 };
/// let problem = Problem::with_lengths(shape, Options::new(), Lengths::Used { q: None, k: Some(&[1, 2]) })?;
/// let v = [3.0, f32::NAN, 4.0, 6.0]; // padding is never read
/// let output = Attention::cpu().forward(&problem, &Inputs::new(&[0.0; 2], &[0.0; 4], &v))?;
/// assert_eq!(output.o, [3.0, 5.0]); // scores of zero: means of the values
/// # Ok::<(), sink_attention::Error>(())
/// ```
#[derive(Debug, Clone, Copy)]
pub enum Lengths<'a> {
    /// [`Layout::Thd`]: sequence n holds the tokens `cumulative[n]..cumulative[n + 1]`; the first number is 0, the last one the
    /// number of tokens. One more number than sequences, as FlashAttention's `cu_seqlens_q` and `cu_seqlens_k`. A sequence may
    /// be empty on either side.
    Cumulative {
        /// Of queries.
        q: &'a [u32],
        /// Of keys.
        k: &'a [u32],
    },
    /// A padded batch: the first so many queries and keys of each of its entries count, `None` is all of them. Queries beyond
    /// see nothing and get no gradient: o is 0, lse is -infinity, even with sink logits, and the backward pass wants to find it
    /// so. FlashAttention's `seqused_q` and `seqused_k`.
    Used {
        /// Of queries, one number for each entry of the batch.
        q: Option<&'a [u32]>,
        /// Of keys.
        k: Option<&'a [u32]>,
    },
}

/// A sequence: its rows among those of the operands, and which of its keys each of its queries sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sequence {
    /// Place along the batch axis of q, k, v and o; 0 in [`Layout::Thd`].
    pub entry: usize,
    /// First query, along the sequence axis of q and o.
    pub q_start: usize,
    /// Queries it has room for; the first `band.seq_q()` of them count.
    pub q_rows: usize,
    /// First key, along the sequence axis of k and v.
    pub k_start: usize,
    /// Keys it has room for; the first `band.seq_k()` of them count.
    pub k_rows: usize,
    /// Which of its keys its queries see, both counted from 0.
    pub band: Band,
}

/// The names of [`Lengths::Cumulative`] in messages, of queries and of keys.
pub(crate) const CUMULATIVE: [&str; 2] = ["Lengths::Cumulative { q }", "Lengths::Cumulative { k }"];

/// So many that kernels can count the words of their table.
const MOST_SEQUENCES: usize = 1 << 27;

/// The sequences of a batch in which lengths differ.
pub(crate) fn sequences(shape: &Shape, options: &Options, lengths: Lengths<'_>) -> Result<Arc<[Sequence]>> {
    match (options.layout, lengths) {
        (Layout::Thd, Lengths::Cumulative { q, k }) => cumulative(shape, options, q, k),
        (Layout::Thd, Lengths::Used { .. }) => {
            let reason = "thd takes cumulative lengths, Lengths::Cumulative".into();
            Err(Error::InvalidOption { option: "layout", reason })
        }
        (layout, Lengths::Cumulative { .. }) => {
            let reason = format!("cumulative lengths go with thd, not {layout}");
            Err(Error::InvalidOption { option: "layout", reason })
        }
        (_, Lengths::Used { q, k }) => used(shape, options, q, k),
    }
}

fn cumulative(shape: &Shape, options: &Options, q: &[u32], k: &[u32]) -> Result<Arc<[Sequence]>> {
    if shape.batch != 1 {
        let reason = format!("thd has no batch axis: batch must be 1, not {}", shape.batch);
        return Err(Error::InvalidOption { option: "layout", reason });
    }
    for (lengths, starts, tokens) in [(CUMULATIVE[0], q, shape.seq_q), (CUMULATIVE[1], k, shape.seq_k)] {
        let invalid = |reason: String| Err(Error::InvalidLengths { lengths, reason });
        let (Some(&first), Some(&last)) = (starts.first(), starts.last()) else {
            return invalid("no numbers; there must be one more than sequences".into());
        };
        if starts.len() < 2 {
            return invalid("one number; there must be one more than sequences".into());
        }
        if first != 0 {
            return invalid(format!("the first number is {first}; it must be 0"));
        }
        if let Some(n) = (1..starts.len()).find(|&n| starts[n] < starts[n - 1]) {
            return invalid(format!("number {n} is {}, less than {} before it", starts[n], starts[n - 1]));
        }
        if last as usize != tokens {
            return invalid(format!("the last number is {last}; it must be the number of tokens, {tokens}"));
        }
    }
    if q.len() > MOST_SEQUENCES {
        let reason = format!("{} numbers, the most is {MOST_SEQUENCES}", q.len());
        return Err(Error::InvalidLengths { lengths: CUMULATIVE[0], reason });
    }
    if q.len() != k.len() {
        let (q, k, of_q) = (q.len(), k.len(), CUMULATIVE[0]);
        let reason = format!("{k} numbers, {of_q} has {q}; there is one more than sequences in both");
        return Err(Error::InvalidLengths { lengths: CUMULATIVE[1], reason });
    }
    let ranges = |starts: &[u32], n: usize| (starts[n] as usize, (starts[n + 1] - starts[n]) as usize);
    let sequence = |n| {
        let ((q_start, q_rows), (k_start, k_rows)) = (ranges(q, n), ranges(k, n));
        Sequence { entry: 0, q_start, q_rows, k_start, k_rows, band: Band::new(q_rows, k_rows, options) }
    };
    Ok((0..q.len() - 1).map(sequence).collect())
}

fn used(shape: &Shape, options: &Options, q: Option<&[u32]>, k: Option<&[u32]>) -> Result<Arc<[Sequence]>> {
    for (lengths, used, most) in [("Lengths::Used { q }", q, shape.seq_q), ("Lengths::Used { k }", k, shape.seq_k)] {
        let Some(used) = used else { continue };
        if used.len() != shape.batch {
            let reason = format!("{} numbers; the batch has {}", used.len(), shape.batch);
            return Err(Error::InvalidLengths { lengths, reason });
        }
        if let Some(n) = used.iter().position(|&used| used as usize > most) {
            let reason = format!("number {n} is {}; there is room for {most}", used[n]);
            return Err(Error::InvalidLengths { lengths, reason });
        }
    }
    let sequence = |entry| {
        let of = |used: Option<&[u32]>, all| used.map_or(all, |used| used[entry] as usize);
        let band = Band::new(of(q, shape.seq_q), of(k, shape.seq_k), options);
        Sequence { band, ..Sequence::whole(shape, entry, band) }
    };
    Ok((0..shape.batch).map(sequence).collect())
}

impl Sequence {
    /// The part of the sequence that a range of the rows of keys holds.
    pub(crate) fn shard(&self, rows: &Range<usize>, options: &Options) -> Self {
        let all = self.k_start..self.k_start + self.k_rows;
        let start = rows.start.clamp(all.start, all.end);
        let end = rows.end.clamp(start, all.end);
        let skipped = start - all.start;
        let used = self.band.seq_k().saturating_sub(skipped).min(end - start);
        Sequence {
            k_start: start.saturating_sub(rows.start).min(rows.len()),
            k_rows: end - start,
            band: self.band.shard(skipped, used, options),
            ..*self
        }
    }

    /// An entry of a batch whose rows all count.
    pub(crate) fn whole(shape: &Shape, entry: usize, band: Band) -> Self {
        Sequence { entry, q_start: 0, q_rows: shape.seq_q, k_start: 0, k_rows: shape.seq_k, band }
    }
}
