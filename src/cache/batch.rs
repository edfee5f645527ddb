//! Chunks of tokens as one batch of the ordinary passes: its problem, and where its keys come from and its gradients go to.
//! Pure; the caches on the GPU and on the CPU both use it.

use std::collections::BTreeMap;

use super::block_table::BlockTable;
use crate::problem::cache::{CacheConfig, CacheKind, check_absent};
use crate::problem::element::DType;
use crate::problem::error::{Error, Result};
use crate::problem::varlen::Lengths;
use crate::problem::{Axes, Bias, Inputs, Layout, MaskData, Options, Problem, Shape};

/// Chunks of tokens, one of each sequence, as queries against all that their sequences hold: a prompt, or a part of it.
///
/// The tokens of all sequences lie one after the other, `[tokens, heads, width]`, sequence by sequence, in q, k, v, o and their
/// gradients; lse is `[heads, tokens]`.
///
/// ```
/// use sink_attention::Options;
/// use sink_attention::cache::{CacheConfig, CacheKind, Prefill, PrefillOperands};
/// use sink_attention::cpu::KvCache;
///
/// let mut cache = KvCache::new(&CacheConfig::new(CacheKind::Contiguous { capacity: 8 }, 3, 1, 1))?;
/// // Two tokens of the first sequence, none of the second, one of the third. Queries of zero give means of values.
/// let prefill = Prefill::new(1, [2, 0, 1], Options::new().causal(true));
/// let output = cache.prefill(&prefill, &mut [0.0f32; 3], [&[1.0; 3], &[2.0, 4.0, 7.0]], &PrefillOperands::default())?;
/// assert_eq!(output.o, [2.0, 3.0, 7.0]);
/// assert_eq!(cache.lengths(), [2, 0, 1]);
/// # Ok::<(), sink_attention::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Prefill {
    /// H, query heads.
    pub heads: usize,
    /// Tokens of each sequence of the cache, any number; sequences without any take no part.
    pub tokens: Vec<usize>,
    /// All options of a forward pass; `layout` is that of the tokens, [`Layout::Thd`] or, which is the same to them,
    /// [`Layout::Bshd`], and `dtype` the cache's. Positions count from the start of a sequence. Tokens of a chunk see those that
    /// come after unless they are causal.
    ///
    /// A bias and a mask are `[B or 1, H or 1, M or 1, N]`: B the sequences with tokens, M the most tokens, N the most keys of one
    /// of them, the new ones among them. A rolling cache implies its window and sink tokens, and takes no bias or mask; ALiBi counts
    /// from true positions, and is an error on a GPU's buffers where there are sink tokens ([`HostCache`](crate::cache::HostCache)
    /// takes it).
    pub options: Options,
}

impl Prefill {
    /// So many tokens of each sequence.
    pub fn new(heads: usize, tokens: impl Into<Vec<usize>>, options: Options) -> Self {
        Prefill { heads, tokens: tokens.into(), options }
    }
}

setters! {
    impl[] Prefill[]
    plain {
        heads: usize,
        options: Options,
    }
    into {
        tokens: Vec<usize>,
    }
}

/// Operands of a prefill, and of its backward pass, that go with options; see [`PrefillBuffers`](crate::cache::PrefillBuffers).
///
/// ```
/// use sink_attention::cache::{CacheConfig, CacheKind, Prefill, PrefillOperands};
/// use sink_attention::cpu::KvCache;
/// use sink_attention::{Options, SinkLogits};
///
/// let mut cache = KvCache::new(&CacheConfig::new(CacheKind::Contiguous { capacity: 8 }, 1, 1, 1))?;
/// let prefill = Prefill::new(1, [1], Options::new().sink_logits(SinkLogits::PerHead));
/// let operands = PrefillOperands::default().sink_logits(&[0.0][..]);
/// let output = cache.prefill(&prefill, &mut [0.0f32], [&[1.0], &[6.0]], &operands)?;
/// assert!((output.o[0] - 3.0).abs() < 1e-6); // the key and the sink share the weight
/// # Ok::<(), sink_attention::Error>(())
/// ```
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct PrefillOperands<'a, T = f32> {
    /// One logit per query head.
    pub sink_logits: Option<&'a [f32]>,
    /// One slope per query head.
    pub alibi_slopes: Option<&'a [f32]>,
    /// Added to the scores.
    pub bias: Option<Bias<'a, T>>,
    /// The mask: the keys that may be seen.
    pub mask: Option<MaskData<'a>>,
    /// The table of [`AppendBuffers::cos_sin`](crate::cache::AppendBuffers::cos_sin); not in the backward pass.
    pub cos_sin: Option<&'a [f32]>,
}

impl<T> Default for PrefillOperands<'_, T> {
    /// No optional operands.
    fn default() -> Self {
        PrefillOperands { sink_logits: None, alibi_slopes: None, bias: None, mask: None, cos_sin: None }
    }
}

setters! {
    impl['a, T] PrefillOperands['a, T]
    optional {
        sink_logits: &'a [f32],
        alibi_slopes: &'a [f32],
        cos_sin: &'a [f32],
        bias: Bias<'a, T>,
        mask: MaskData<'a>,
    }
}

impl<T> PrefillOperands<'_, T> {
    pub(super) fn inputs<'b>(&'b self, q: &'b [T], [k, v]: [&'b [T]; 2]) -> Inputs<'b, T>
    where
        T: Copy,
    {
        let PrefillOperands { sink_logits, alibi_slopes, bias, mask, .. } = *self;
        Inputs { q, k, v, sink_logits, alibi_slopes, bias, mask }
    }
}

/// A sequence of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Chunk {
    pub(crate) sequence: usize,
    /// Tokens of the sequence without the new ones, including those that a ring has given up.
    pub(crate) length: usize,
    /// Keys that come from the cache. Keys of new tokens, if there are any, follow them.
    pub(crate) cached: usize,
    pub(crate) keys: usize,
    /// Row of the first key. Keys of all sequences follow one another.
    pub(crate) first_row: usize,
}

impl Chunk {
    /// Keys that a ring has given up, for tokens that come after those that the cache holds.
    fn given_up(&self) -> usize {
        self.length - self.cached
    }
}

/// The chunks of all sequences that have tokens.
#[derive(Debug, Clone)]
pub(crate) struct PrefillBatch {
    pub(crate) problem: Problem,
    pub(crate) entries: Vec<Chunk>,
    /// Rows of the keys of all sequences.
    pub(crate) rows: usize,
    /// Whether the problem's bias is that of [`alibi_of_sinks`](Self::alibi_of_sinks).
    pub(super) sinks_by_bias: bool,
}

/// Rows that lie one after the other, in the cache and among the keys of all sequences; all in one tile of a kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct CopyRun {
    pub(crate) sequence: usize,
    /// The number of the block in the sequence.
    pub(crate) number: usize,
    pub(crate) row: usize,
    /// First row among the keys of all sequences.
    pub(crate) to: usize,
    pub(crate) rows: usize,
}

/// Rows of a block of the cache, and the rows that add up to the first of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ScatterSum {
    pub(crate) block: usize,
    pub(crate) row: usize,
    pub(crate) rows: usize,
    /// Rows among the keys of all sequences, in the order of sequences.
    pub(crate) terms: Vec<usize>,
}

/// Rows of a run.
const RUN_ROWS: usize = 64;

impl PrefillBatch {
    /// The batch of tokens that come after those that the cache holds. `None` if there are none.
    ///
    /// A rolling cache gives up keys, as tokens are appended, that the first of these tokens still see. So its keys are those from before
    /// the append, followed by the new ones: sink tokens, then a run of the last positions without a gap. Let S be the kept sink tokens, R
    /// the ring's rows, R >= window, L the length before, and g = max(0, L - S - R) the number of keys that the ring has given up. The key
    /// at place j has position j for j < S, and otherwise j + g. The query of new token i has place p = S + R + i = L + i - g if g > 0.
    /// Window and sink rule give the same for places as for positions:
    /// - Between places from S on, differences are those of positions. No such place is that of a sink token, of which there are S.
    /// - For j < S and g > 0, j <= p in both, and j is before the window in both: L + i - left > S + R - left > S > j, and p - left >= S +
    ///   R - left > S > j, because left < window <= R. So it is seen if it is a sink token.
    /// - Positions that were given up, S <= j < S + g = L - R, are before every window: L + i - left > L - R.
    ///
    /// For g = 0 places are positions.
    pub(crate) fn appended(config: &CacheConfig, prefill: &Prefill, block_table: &BlockTable) -> Result<Option<Self>> {
        check_total(config, &prefill.tokens)?;
        block_table.check_capacity(&prefill.tokens)?;
        PrefillBatch::new(config, prefill, |sequence, tokens| {
            let [length, cached] = [block_table.lengths()[sequence], block_table.keys(sequence)];
            Ok(Chunk { sequence, length, cached, keys: cached + tokens, first_row: 0 })
        })
    }

    /// The batch of tokens that are the last ones of the cache.
    pub(crate) fn held(config: &CacheConfig, prefill: &Prefill, block_table: &BlockTable) -> Result<Self> {
        check_total(config, &prefill.tokens)?;
        let invalid = |option, reason: String| Err(Error::InvalidOption { option, reason });
        if let CacheKind::Rolling { .. } = config.kind {
            return invalid("cache kind", format!("{:?}; it gives up keys whose gradients are wanted", config.kind));
        }
        if let Some(quantisation) = config.quantisation {
            return invalid("quantisation", format!("{quantisation:?}; quantised keys and values have no gradients"));
        }
        let batch = PrefillBatch::new(config, prefill, |sequence, tokens| {
            let length = block_table.lengths()[sequence];
            if tokens > length {
                let reason = format!("{tokens} of sequence {sequence}, which has {length}");
                return Err(Error::InvalidOption { option: "tokens", reason });
            }
            Ok(Chunk { sequence, length, cached: length, keys: length, first_row: 0 })
        });
        batch?.ok_or(Error::ZeroDimension { dimension: "tokens" })
    }

    fn new(
        config: &CacheConfig,
        prefill: &Prefill,
        entry: impl Fn(usize, usize) -> Result<Chunk>,
    ) -> Result<Option<Self>> {
        let invalid = |option, reason: String| Err(Error::InvalidOption { option, reason });
        let Prefill { heads, tokens, options } = prefill;
        if options.dtype != config.dtype {
            return Err(Error::CacheElementType { operands: options.dtype, cache: config.dtype });
        }
        if options.layout == Layout::Bhsd {
            return invalid("layout", "bhsd; tokens of a prefill lie one after the other, thd".into());
        }
        if config.is_relative() {
            let reason = "keys that are rotated by their place as they are read take one query at a time: append and \
                          decode";
            return invalid("rotary", reason.into());
        }
        if let CacheKind::Rolling { .. } = config.kind {
            check_absent(&options.alibi(false), "a rolling cache does not take it: its keys have no fixed places")?;
        }
        let mut options = config.seen(options)?;
        let mut entries = Vec::new();
        let (mut q, mut k) = (vec![0u32], vec![0u32]);
        let mut rows = 0usize;
        for (sequence, &tokens) in tokens.iter().enumerate().filter(|(_, tokens)| **tokens > 0) {
            let entry = Chunk { first_row: rows, ..entry(sequence, tokens)? };
            rows = rows.saturating_add(entry.keys);
            let (most, value) = (MOST_TOKENS as u64, rows as u64);
            if value > most {
                return Err(Error::DimensionTooLarge { dimension: "keys of all sequences", value, most });
            }
            q.push(q.last().copied().unwrap_or(0) + tokens as u32);
            k.push(rows as u32);
            entries.push(entry);
        }
        // Only a rolling cache has given up keys, and it takes no other bias.
        let sinks_by_bias =
            options.alibi && options.sink_tokens > 0 && entries.iter().any(|e: &Chunk| e.given_up() > 0);
        if sinks_by_bias {
            let axes = Axes { batch: entries.len() > 1, heads: true, seq_q: false };
            options = options.bias(axes).bias_dtype(DType::F32);
        }
        let shape = Shape {
            batch: 1,
            heads: *heads,
            kv_heads: config.kv_heads,
            // Without tokens, or without keys, the checks use one.
            seq_q: tokens.iter().sum::<usize>().max(1),
            seq_k: rows.max(1),
            head_dim: config.head_dim,
            value_dim: config.value_dim,
        };
        let problem = match entries.len() {
            // The operands are the same, and these kernels need no table of sequences.
            0 | 1 => Problem::new(shape, options.layout(Layout::Bshd))?,
            _ => Problem::with_lengths(shape, options.layout(Layout::Thd), Lengths::Cumulative { q: &q, k: &k })?,
        };
        Ok((!entries.is_empty()).then_some(PrefillBatch { problem, entries, rows, sinks_by_bias }))
    }

    /// The bias that makes positions of places for ALiBi, `[sequences, H, 1, N]`. Behind the sink tokens a ring has given up g keys, so a
    /// sink token is g further from every query than the places say. Its bias is -slope * g.
    pub(crate) fn alibi_of_sinks(&self, alibi_slopes: Option<&[f32]>) -> Option<Vec<f32>> {
        let [_, heads, _, keys] = self.problem.bias_shape().filter(|_| self.sinks_by_bias)?;
        let mut bias = vec![0.0; self.entries.len() * heads * keys];
        for (entry, of_entry) in self.entries.iter().zip(bias.chunks_exact_mut(heads * keys)) {
            let gap = entry.given_up() as f32;
            // The checks that follow refuse a list of another length.
            for (row, slope) in of_entry.chunks_exact_mut(keys).zip(alibi_slopes.unwrap_or(&[])) {
                row[..self.problem.options().sink_tokens.min(keys)].fill(-slope * gap);
            }
        }
        Some(bias)
    }

    /// The operands of the pass: those of the caller, and the bias of [`alibi_of_sinks`](Self::alibi_of_sinks).
    pub(crate) fn operands<'a, T: Copy>(
        &self,
        of_caller: &PrefillOperands<'a, T>,
        alibi_of_sinks: Option<&'a [f32]>,
    ) -> Result<PrefillOperands<'a, T>> {
        match alibi_of_sinks {
            None => Ok(*of_caller),
            Some(_) if of_caller.bias.is_some() => {
                Err(Error::UnexpectedOperand { operand: "bias", hint: "a rolling cache takes none" })
            }
            Some(bias) => Ok(PrefillOperands { bias: Some(Bias::F32(bias)), ..*of_caller }),
        }
    }

    /// The rows that come from the cache.
    pub(crate) fn runs(&self, block_table: &BlockTable) -> Vec<CopyRun> {
        let mut runs = Vec::new();
        for &Chunk { sequence, length, cached, first_row, .. } in &self.entries {
            let mut place = 0;
            while place < cached {
                let [number, row, left] = block_table.stretch(length, place);
                let rows = left.min(cached - place).min(RUN_ROWS);
                runs.push(CopyRun { sequence, number, row, to: first_row + place, rows });
                place += rows;
            }
        }
        runs
    }

    /// The destinations of gradients by keys that all come from the cache. Pages that sequences share get the sum over these sequences.
    pub(crate) fn sums(&self, block_table: &BlockTable) -> Vec<ScatterSum> {
        // For each block: how many of its rows each sequence uses, and where these rows are.
        let mut users: BTreeMap<usize, Vec<[usize; 2]>> = BTreeMap::new();
        for &Chunk { sequence, length, keys, first_row, .. } in &self.entries {
            let mut place = 0;
            while place < keys {
                let [number, _, rows] = block_table.stretch(length, place);
                let used = rows.min(keys - place);
                users.entry(block_table.block(sequence, number)).or_default().push([used, first_row + place]);
                place += used;
            }
        }
        let mut sums = Vec::new();
        for (block, users) in users {
            let mut row = 0;
            // Each sum covers the rows that the same sequences use.
            while let Some(end) = users.iter().map(|[used, _]| *used).filter(|used| *used > row).min() {
                let rows = (end - row).min(RUN_ROWS);
                let terms = users.iter().filter(|[used, _]| *used > row).map(|[_, first]| first + row).collect();
                sums.push(ScatterSum { block, row, rows, terms });
                row += rows;
            }
        }
        sums
    }
}

/// Most tokens of all sequences, and most keys.
const MOST_TOKENS: usize = 1 << 29;

/// Checks that there is one number for each sequence, and that the sum is not too large.
pub(crate) fn check_total(config: &CacheConfig, tokens: &[usize]) -> Result<usize> {
    check_counts(config, tokens.len())?;
    let total = tokens.iter().try_fold(0usize, |sum, n| sum.checked_add(*n)).unwrap_or(usize::MAX);
    if total > MOST_TOKENS {
        let (value, most) = (total as u64, MOST_TOKENS as u64);
        return Err(Error::DimensionTooLarge { dimension: "tokens", value, most });
    }
    Ok(total)
}

/// Checks that there is one number for each sequence.
pub(super) fn check_counts(config: &CacheConfig, actual: usize) -> Result<()> {
    let expected = config.sequences;
    if actual == expected {
        return Ok(());
    }
    Err(Error::OperandLength { operand: "the list of token counts", expected, actual, shape: vec![expected] })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::problem::Window;

    fn config(kind: CacheKind) -> CacheConfig {
        CacheConfig {
            kind,
            sequences: 2,
            kv_heads: 1,
            head_dim: 4,
            value_dim: 4,
            dtype: DType::F32,
            rotary: None,
            quantisation: None,
        }
    }

    /// The rule for places gives what the rule for positions gives, by brute force; so do the rows of the runs.
    #[test]
    fn places_of_a_ring_see_what_positions_see() {
        for [kept, window, queries] in [[0, 1, 1], [2, 3, 1], [3, 5, 3], [1, 4, 2]] {
            let config = config(CacheKind::Rolling { sink_tokens: kept, window, queries });
            let rows = config.kind.rows();
            for length in [0, 1, kept, kept + 1, rows - 1, rows, rows + 1, 3 * rows + 2] {
                let mut block_table = BlockTable::new(&config);
                block_table.advance(&[length, 0], None);
                for tokens in [1, 2, window + 3] {
                    for (left, sink_tokens) in [(None, 0), (Some(window - 1), kept), (Some(window / 2), kept / 2)] {
                        let window_option = Window { left, right: Some(0) };
                        let options = Options::new().window(window_option).sink_tokens(sink_tokens);
                        let prefill = Prefill::new(1, [tokens, 0], options);
                        let batch = PrefillBatch::appended(&config, &prefill, &block_table).unwrap().unwrap();
                        let entry = batch.entries[0];
                        let mut positions = vec![usize::MAX; entry.keys];
                        for CopyRun { row, to, rows: run, .. } in batch.runs(&block_table) {
                            for n in 0..run {
                                // The last token that was written to the row.
                                let of = |p: usize| if p < kept { p } else { kept + (p - kept) % (rows - kept) };
                                positions[to + n] = (0..length).rev().find(|p| of(*p) == row + n).unwrap();
                            }
                        }
                        (0..tokens).for_each(|i| positions[entry.cached + i] = length + i);
                        let band = batch.problem.sequence(0).band;
                        let left = left.unwrap_or(window - 1);
                        let sinks = if window_option.left.is_none() { kept } else { sink_tokens };
                        for i in 0..tokens {
                            let seen: Vec<usize> =
                                (0..entry.keys).filter(|j| band.visible(i, *j)).map(|j| positions[j]).collect();
                            let p = length + i;
                            let expected: Vec<usize> = (0..=p).filter(|j| j + left >= p || *j < sinks).collect();
                            assert_eq!(seen, expected, "{:?} {length} + {tokens}, query {i}", config.kind);
                        }
                    }
                }
            }
        }
    }

    /// Every row of a page that a sequence uses gets its term, whoever else uses it.
    #[test]
    fn shared_pages_get_sums() {
        let config = config(CacheKind::Paged { page_size: 16, pages: 9, sequence_pages: 6 });
        let mut block_table = BlockTable::new(&config);
        block_table.assign(0, &[3, 1], 20).unwrap();
        block_table.assign(1, &[3, 1, 7, 8, 0], 75).unwrap();
        let batch = PrefillBatch::held(&config, &Prefill::new(1, [1, 75], Options::new()), &block_table).unwrap();
        let mut found = BTreeMap::new();
        for ScatterSum { block, row, rows, terms } in batch.sums(&block_table) {
            for n in 0..rows {
                let terms: Vec<usize> = terms.iter().map(|term| term + n).collect();
                assert_eq!(found.insert((block, row + n), terms), None);
            }
        }
        let mut expected: BTreeMap<_, Vec<usize>> = BTreeMap::new();
        for (sequence, first, length) in [(0, 0, 20), (1, 20, 75)] {
            for place in 0..length {
                let page = block_table.table(sequence)[place / 16] as usize;
                expected.entry((page, place % 16)).or_default().push(first + place);
            }
        }
        assert_eq!(found, expected);
    }
}
