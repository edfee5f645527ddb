//! A cache on the CPU.

use super::batch::{CopyRun, Prefill, PrefillBatch, PrefillOperands, ScatterSum, check_total};
use super::block_table::BlockTable;
use super::tree::Pairs;
use crate::plan::decode::{Decode, DecodeOperands};
use crate::problem::cache::{CacheConfig, CacheKind, Rotary, RotaryPositions, RotaryStyle};
use crate::problem::row_format::{BLOCK, Quantisation, UNBOUNDED};
use crate::problem::tree::TreeMask;
use half::f16;

use crate::cpu;
use crate::problem::element::Element;
use crate::problem::error::{Error, Result};
use crate::problem::{Gradients, Inputs, Options, Output, Problem, Shape, SinkLogits, Upstream, check_length};

/// Keys and values of a number of sequences in host memory: the twin of [`KvCache`](crate::cache::KvCache). Quantised ones are held as what
/// they stand for, rounded to the element type.
///
/// ```
/// use sink_attention::cpu::KvCache;
/// use sink_attention::cache::{CacheConfig, CacheKind, Decode, DecodeOperands};
/// use sink_attention::Options;
///
/// // Two sequences of one key/value head, with the first token and the last two.
/// let kind = CacheKind::Rolling { sink_tokens: 1, window: 2, queries: 1 };
/// let mut cache = KvCache::new(&CacheConfig::new(kind, 2, 1, 2).value_dim(1))?;
/// for token in 0..5 {
///     // One token for the second sequence, none for the first.
///     cache.append(&[0, 1], &[0.0, 0.0], &[token as f32], None, None)?;
/// }
/// assert_eq!(cache.lengths(), [0, 5]);
///
/// // Keys of zero weigh the same: the mean of the values 0, 3 and 4 that are left.
/// let decode = Decode::new(1, Options::new()).sequences([1]);
/// let output = cache.decode(&decode, &[1.0, 1.0], &DecodeOperands::default())?;
/// assert!((output.o[0] - 7.0 / 3.0).abs() < 1e-6);
/// # Ok::<(), sink_attention::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct KvCache<T> {
    pub(super) config: CacheConfig,
    pub(super) block_table: BlockTable,
    pub(super) keys: Vec<T>,
    pub(super) values: Vec<T>,
    /// Scales of the blocks of quantised keys and values, row by row.
    pub(super) scales: [Vec<f16>; 2],
}

impl<T: Element> KvCache<T> {
    /// An empty cache.
    ///
    /// # Errors
    /// Those of [`CacheConfig::check`]; [`Error::CacheElementType`] unless `T` is of the config's element type.
    pub fn new(config: &CacheConfig) -> Result<Self> {
        config.check()?;
        check_element::<T>(config)?;
        let rows = config.blocks() * config.kv_heads * config.kind.rows();
        let blocks = |width| if config.quantisation.is_some() { rows * scales_of(width) } else { 0 };
        Ok(KvCache {
            config: *config,
            block_table: BlockTable::new(config),
            keys: vec![T::default(); rows * config.head_dim],
            values: vec![T::default(); rows * config.value_dim],
            scales: [config.head_dim, config.value_dim].map(|width| vec![f16::ZERO; blocks(width)]),
        })
    }

    /// Its kind and sizes.
    pub fn config(&self) -> &CacheConfig {
        &self.config
    }

    /// Tokens of each sequence: all that were appended, also those that a ring has given up.
    pub fn lengths(&self) -> &[usize] {
        self.block_table.lengths()
    }

    /// Pages of a sequence in the order of its tokens; none where the cache is not paged.
    pub fn pages(&self, sequence: usize) -> &[u32] {
        self.block_table.table(sequence)
    }

    /// Pages that no sequence holds.
    pub fn free_pages(&self) -> usize {
        self.block_table.free_pages()
    }

    /// Appends so many tokens to each sequence: keys `[tokens, G, D]` and values `[tokens, G, E]`, sequence by sequence. `q`,
    /// `[tokens, H, D]`, is rotated where it lies. `cos_sin` is the table of
    /// [`AppendBuffers::cos_sin`](crate::cache::AppendBuffers::cos_sin).
    ///
    /// # Errors
    /// [`Error::OperandLength`]; [`Error::MissingOperand`], [`Error::UnexpectedOperand`] for operands that do not go with the
    /// cache's rotary embedding; [`Error::CacheFull`], [`Error::PagesExhausted`], [`Error::RotaryPosition`]. Nothing has changed
    /// then.
    pub fn append(
        &mut self,
        tokens: &[usize],
        k: &[T],
        v: &[T],
        q: Option<&mut [T]>,
        cos_sin: Option<&[f32]>,
    ) -> Result<()> {
        let CacheConfig { kv_heads, head_dim, value_dim, .. } = self.config;
        let turning = self.check_tokens(tokens, k, v, q.as_deref(), cos_sin)?;
        let heads = q.as_ref().map_or(0, |q| q.len() / (tokens.iter().sum::<usize>().max(1) * head_dim));
        let changes = self.block_table.reserve(tokens)?;
        for [from, to] in changes.copies {
            self.copy_block(from as usize, to as usize);
        }
        let before = self.block_table.lengths().to_vec();
        self.block_table.advance(tokens, q.as_ref().map(|_| heads));
        let mut q = q;
        let all = tokens.iter().enumerate().flat_map(|(sequence, n)| (0..*n).map(move |number| (sequence, number)));
        for (token, (sequence, number)) in all.enumerate() {
            let position = before[sequence] + number;
            if let (Some(turning), Some(q)) = (&turning, &mut q) {
                let position = if turning.relative { position.min(self.config.kind.rows() - 1) } else { position };
                for head in 0..heads {
                    let at = (token * heads + head) * head_dim;
                    turning.turn(&mut q[at..at + head_dim], position);
                }
            }
            // Keys that a ring has given up have no place any more.
            let gone = self.block_table.lengths()[sequence] - self.block_table.keys(sequence);
            let place = match self.config.kind {
                CacheKind::Rolling { sink_tokens, .. } if position >= sink_tokens => {
                    let Some(place) = position.checked_sub(gone).filter(|place| *place >= sink_tokens) else {
                        continue;
                    };
                    place
                }
                _ => position,
            };
            let [block, row] = self.block_table.row(sequence, place);
            for head in 0..kv_heads {
                let row = (block * kv_heads + head) * self.config.kind.rows() + row;
                let of = token * kv_heads + head;
                let key = &mut self.keys[row * head_dim..(row + 1) * head_dim];
                key.copy_from_slice(&k[of * head_dim..(of + 1) * head_dim]);
                let value = &mut self.values[row * value_dim..(row + 1) * value_dim];
                value.copy_from_slice(&v[of * value_dim..(of + 1) * value_dim]);
                let [key_scales, value_scales] = &mut self.scales;
                let scales = [
                    key_scales.get_mut(row * scales_of(head_dim)..).unwrap_or_default(),
                    value_scales.get_mut(row * scales_of(value_dim)..).unwrap_or_default(),
                ];
                hold(&self.config, [key, value], scales, turning.as_ref(), position);
            }
        }
        Ok(())
    }

    /// Checks new tokens before anything is changed. Returns their rotation, if there is one.
    fn check_tokens<'a>(
        &self,
        tokens: &[usize],
        k: &[T],
        v: &[T],
        q: Option<&[T]>,
        cos_sin: Option<&'a [f32]>,
    ) -> Result<Option<Turning<'a>>> {
        let CacheConfig { kv_heads, head_dim, value_dim, .. } = self.config;
        let total = check_total(&self.config, tokens)?;
        for (operand, actual, width) in [("k", k.len(), head_dim), ("v", v.len(), value_dim)] {
            let expected = total.saturating_mul(kv_heads * width);
            if actual != expected {
                return Err(Error::OperandLength { operand, expected, actual, shape: vec![total, kv_heads, width] });
            }
        }
        let heads = q.map_or(0, |q| q.len() / (total.max(1) * head_dim));
        if let Some(q) = q.filter(|q| q.len() != heads * total * head_dim || heads == 0 && total > 0) {
            let expected = heads.max(1) * total * head_dim;
            let shape = vec![total, heads.max(1), head_dim];
            return Err(Error::OperandLength { operand: "q", expected, actual: q.len(), shape });
        }
        let turning = Turning::new(&self.config, q.is_some(), cos_sin)?;
        if let Some(turning) = &turning {
            turning.check(&self.block_table, tokens)?;
        }
        Ok(turning)
    }

    /// As [`KvCache::prepare_prefill`](crate::cache::KvCache::prepare_prefill), recorded: appends `k`, `[tokens, G, D]`, and `v`,
    /// `[tokens, G, E]`, and attends with `q`, `[tokens, H, D]`, which is rotated where it lies if the cache has a rotary embedding.
    /// o of the result is `[tokens, H, E]`, lse `[H, tokens]`. Without tokens there is nothing in either.
    ///
    /// # Errors
    /// As there, as far as they do not concern buffers, and those of [`append`](Self::append) and
    /// [`Problem::check_inputs`]. Nothing has changed then.
    pub fn prefill(
        &mut self,
        prefill: &Prefill,
        q: &mut [T],
        [k, v]: [&[T]; 2],
        operands: &PrefillOperands<'_, T>,
    ) -> Result<Output<T>> {
        let CacheConfig { kv_heads, head_dim, value_dim, .. } = self.config;
        let batch = PrefillBatch::appended(&self.config, prefill, &self.block_table)?;
        let turned_q = self.config.rotary.map(|_| &*q);
        let turning = self.check_tokens(&prefill.tokens, k, v, turned_q, operands.cos_sin)?;
        let Some(batch) = batch else {
            check_length("q", q.len(), &[0, prefill.heads, head_dim])?;
            return Ok(Output { o: vec![], o_lo: None, lse: vec![] });
        };
        let alibi_of_sinks = batch.alibi_of_sinks(operands.alibi_slopes);
        let operands = batch.operands(operands, alibi_of_sinks.as_deref())?;
        let (problem, entries) = (&batch.problem, &batch.entries);
        // The keys that are given up, and behind them the new ones in the format in which the cache will hold them.
        let mut gathered = self.gather_rows(batch.runs(&self.block_table), batch.rows);
        let [keys, values] = &mut gathered;
        // The append below stores the scales.
        let mut scales = [head_dim, value_dim].map(|width| vec![f16::ZERO; scales_of(width)]);
        let mut token = 0;
        for entry in entries {
            for number in 0..entry.keys - entry.cached {
                for head in 0..kv_heads {
                    let (of, to) =
                        (token * kv_heads + head, (entry.first_row + entry.cached + number) * kv_heads + head);
                    let key = &mut keys[to * head_dim..(to + 1) * head_dim];
                    key.copy_from_slice(&k[of * head_dim..(of + 1) * head_dim]);
                    let value = &mut values[to * value_dim..(to + 1) * value_dim];
                    value.copy_from_slice(&v[of * value_dim..(of + 1) * value_dim]);
                    hold(
                        &self.config,
                        [key, value],
                        scales.each_mut().map(|scales| &mut scales[..]),
                        turning.as_ref(),
                        entry.length + number,
                    );
                }
                token += 1;
            }
        }
        problem.check_inputs(&operands.inputs(q, gathered.each_ref().map(Vec::as_slice)))?;
        let turned_q = self.config.rotary.is_some().then_some(&mut *q);
        self.append(&prefill.tokens, k, v, turned_q, operands.cos_sin)?;
        cpu::forward(problem, &operands.inputs(q, gathered.each_ref().map(Vec::as_slice)))
    }

    /// As [`KvCache::prepare_backward`](crate::cache::KvCache::prepare_backward), recorded; q and the result's d_q as q of
    /// [`prefill`](Self::prefill). The gradients by keys and values are `[blocks, G, rows, width]` without padding, of all of the
    /// cache's blocks: sequences or pages.
    ///
    /// # Errors
    /// As there, as far as they do not concern buffers, and those of [`Problem::check_inputs`] and
    /// [`Problem::check_upstream`].
    pub fn backward(
        &self,
        prefill: &Prefill,
        q: &[T],
        saved: &Output<T>,
        upstream: &Upstream<'_, T>,
        operands: &PrefillOperands<'_, T>,
    ) -> Result<Gradients<T>> {
        let batch = PrefillBatch::held(&self.config, prefill, &self.block_table)?;
        if operands.cos_sin.is_some() {
            let hint = "keys have been rotated as they were appended";
            return Err(Error::UnexpectedOperand { operand: "cos_sin", hint });
        }
        let gathered = self.gather_rows(batch.runs(&self.block_table), batch.rows);
        let inputs = operands.inputs(q, gathered.each_ref().map(Vec::as_slice));
        batch.problem.check_inputs(&inputs)?;
        batch.problem.check_upstream(saved, upstream)?;
        let gradients = cpu::backward(&batch.problem, &inputs, saved, upstream)?;
        let sums = batch.sums(&self.block_table);
        let scatter = |gathered: &[T], len: usize, width: usize| {
            let mut gradient = vec![T::default(); len];
            let (heads, block_rows) = (self.config.kv_heads, self.config.kind.rows());
            for ScatterSum { block, row, rows, terms } in &sums {
                for (n, head) in (0..*rows).flat_map(|n| (0..heads).map(move |head| (n, head))) {
                    let to = ((block * heads + head) * block_rows + row + n) * width;
                    for (d, to) in gradient[to..to + width].iter_mut().enumerate() {
                        let term = |term: &usize| gathered[((term + n) * heads + head) * width + d].to_f32();
                        *to = T::from_f32(terms.iter().map(term).sum());
                    }
                }
            }
            gradient
        };
        Ok(Gradients {
            d_k: scatter(&gradients.d_k, self.keys.len(), self.config.head_dim),
            d_v: scatter(&gradients.d_v, self.values.len(), self.config.value_dim),
            ..gradients
        })
    }

    /// Keys and values of runs of rows, `[rows, G, width]`.
    fn gather_rows(&self, runs: impl IntoIterator<Item = CopyRun>, all: usize) -> [Vec<T>; 2] {
        let CacheConfig { kv_heads, head_dim, value_dim, kind, .. } = self.config;
        let mut gathered = [head_dim, value_dim].map(|width| vec![T::default(); all * kv_heads * width]);
        for CopyRun { sequence, number, row, to, rows } in runs {
            let block = self.block_table.block(sequence, number);
            for (n, head) in (0..rows).flat_map(|n| (0..kv_heads).map(move |head| (n, head))) {
                let from = (block * kv_heads + head) * kind.rows() + row + n;
                let to = (to + n) * kv_heads + head;
                for (into, cached, width) in [(0, &self.keys, head_dim), (1, &self.values, value_dim)] {
                    gathered[into][to * width..(to + 1) * width]
                        .copy_from_slice(&cached[from * width..(from + 1) * width]);
                }
            }
        }
        gathered
    }

    /// A decoding step: q, and o of the result, `[B, M, H, D]` or in the options' layout; lse is `[B, H, M]`.
    ///
    /// # Errors
    /// As [`KvCache::prepare_decode`](crate::cache::KvCache::prepare_decode) and
    /// [`PreparedDecode::encode`](crate::cache::PreparedDecode::encode); [`Error::OperandLength`].
    pub fn decode(&self, decode: &Decode, q: &[T], operands: &DecodeOperands<'_>) -> Result<Output<T>> {
        Ok(self.decode_with_row_max(decode, q, operands)?.0)
    }

    /// As [`decode`](Self::decode), and the largest score of each row, `[B, H, M]`; see
    /// [`Attention::forward_with_row_max`](crate::Attention::forward_with_row_max).
    ///
    /// # Errors
    /// As [`decode`](Self::decode).
    pub fn decode_with_row_max(
        &self,
        decode: &Decode,
        q: &[T],
        operands: &DecodeOperands<'_>,
    ) -> Result<(Output<T>, Vec<f32>)> {
        let DecodeOperands { sink_logits, alibi_slopes, tree_mask, cos_sin } = *operands;
        let (problem, bounds) = decode.problem(&self.config)?;
        let entries = decode.entries(&self.config)?;
        for &sequence in &entries {
            self.block_table.check_queries(sequence, decode.queries, bounds.left as usize)?;
            if let Some(heads) = decode.rotated_heads(&self.config) {
                self.block_table.check_rotated(sequence, decode.queries, heads)?;
            }
        }
        let options = *problem.options();
        let s = *problem.shape();
        let expected = s.batch * s.heads * s.seq_q * s.head_dim;
        if q.len() != expected {
            let shape = problem.q_shape().to_vec();
            return Err(Error::OperandLength { operand: "q", expected, actual: q.len(), shape });
        }
        problem.check_optional_inputs(&Inputs::new(q, &[], &[]).sink_logits(sink_logits).alibi_slopes(alibi_slopes))?;
        decode.check_tree_mask(s.batch, tree_mask.map(<[u32]>::len))?;
        let relative = self.config.is_relative();
        if let (false, Some(_)) = (relative, cos_sin) {
            let hint = "keys have been rotated as they were appended";
            return Err(Error::UnexpectedOperand { operand: "cos_sin", hint });
        }
        let turning = if relative { Turning::new(&self.config, true, cos_sin)? } else { None };
        if let Some(turning) = &turning {
            let (positions, rows) = (turning.positions(), self.config.kind.rows());
            if rows > positions {
                return Err(Error::RotaryPosition { sequence: 0, position: rows - 1, positions });
            }
        }
        let bound = |bound: i32| (bound < UNBOUNDED).then_some(bound as usize);
        let options = Options { sink_tokens: bounds.sink_tokens as usize, ..options };
        let options = options.window(crate::problem::Window { left: bound(bounds.left), right: bound(bounds.right) });
        let mut output =
            Output { o: Vec::with_capacity(s.batch * s.heads * s.seq_q * s.value_dim), o_lo: None, lse: vec![] };
        let mut row_max = Vec::with_capacity(s.batch * s.heads * s.seq_q);
        for (entry, &sequence) in entries.iter().enumerate() {
            let keys = self.block_table.keys(sequence);
            let shape = Shape { batch: 1, seq_k: keys.max(1), ..s };
            // Without keys, the checks use one.
            let words = tree_mask.map(|words| match decode.tree_mask {
                Some(TreeMask::PerSequence) => &words[entry * s.seq_q..][..s.seq_q],
                _ => words,
            });
            let length = self.block_table.lengths()[sequence];
            let pairs = Pairs::new(&self.config, &shape, length, (options, &bounds), words, alibi_slopes);
            let problem = Problem::new(shape, pairs.options)?;
            let q = &q[entry * s.heads * s.seq_q * s.head_dim..][..s.heads * s.seq_q * s.head_dim];
            let [k, v] = self.gather(sequence, keys, &problem, turning.as_ref());
            let inputs = pairs.inputs(q, [&k, &v], operands);
            problem.check_inputs(&inputs)?;
            if keys == 0 {
                output.o.extend(std::iter::repeat_n(T::default(), s.heads * s.seq_q * s.value_dim));
                for head in 0..s.heads {
                    let sink = match (options.sink_logits, sink_logits) {
                        (SinkLogits::PerHead, Some(logits)) => logits[head],
                        (SinkLogits::OffByOne, _) => 0.0,
                        _ => f32::NEG_INFINITY,
                    };
                    output.lse.extend(std::iter::repeat_n(sink, s.seq_q));
                    row_max.extend(std::iter::repeat_n(f32::NEG_INFINITY, s.seq_q));
                }
                continue;
            }
            let (Output { o, lse, .. }, largest) = cpu::forward_with_row_max(&problem, &inputs)?;
            output.o.extend(o);
            output.lse.extend(lse);
            row_max.extend(largest);
        }
        Ok((output, row_max))
    }

    /// The keys and values of a sequence in the order of their places, in the problem's layout.
    fn gather(&self, sequence: usize, keys: usize, problem: &Problem, turning: Option<&Turning<'_>>) -> [Vec<T>; 2] {
        let CacheConfig { kv_heads, head_dim, value_dim, .. } = self.config;
        let mut gathered = [
            vec![T::default(); keys.max(1) * kv_heads * head_dim],
            vec![T::default(); keys.max(1) * kv_heads * value_dim],
        ];
        for place in 0..keys {
            let [block, row] = self.block_table.row(sequence, place);
            for head in 0..kv_heads {
                let row = (block * kv_heads + head) * self.config.kind.rows() + row;
                for (to, from, width) in [(0, &self.keys, head_dim), (1, &self.values, value_dim)] {
                    let [_, of_head, of_seq] = problem.options().layout.strides(kv_heads, keys, width);
                    let at = head * of_head as usize + place * of_seq as usize;
                    let row = &from[row * width..(row + 1) * width];
                    let into = &mut gathered[to][at..at + width];
                    into.copy_from_slice(row);
                    if let Some(turning) = turning.filter(|_| to == 0) {
                        turning.turn(into, place);
                    }
                }
            }
        }
        gathered
    }

    /// As [`KvCache::truncate`](crate::cache::KvCache::truncate).
    ///
    /// # Errors
    /// As there.
    pub fn truncate(&mut self, sequence: usize, length: usize) -> Result<()> {
        self.block_table.truncate(sequence, length)
    }

    /// As [`KvCache::fork`](crate::cache::KvCache::fork).
    ///
    /// # Errors
    /// As there.
    pub fn fork(&mut self, from: usize, to: usize) -> Result<()> {
        self.block_table.fork(from, to)?;
        if !matches!(self.config.kind, CacheKind::Paged { .. }) {
            self.copy_block(from, to);
        }
        Ok(())
    }

    /// As [`KvCache::assign`](crate::cache::KvCache::assign).
    ///
    /// # Errors
    /// As there.
    pub fn assign(&mut self, sequence: usize, pages: &[u32], length: usize) -> Result<()> {
        self.block_table.assign(sequence, pages, length)
    }

    pub(super) fn copy_block(&mut self, from: usize, to: usize) {
        let rows = self.config.kv_heads * self.config.kind.rows();
        for (cached, width) in [(&mut self.keys, self.config.head_dim), (&mut self.values, self.config.value_dim)] {
            let len = rows * width;
            cached.copy_within(from * len..(from + 1) * len, to * len);
        }
        for (scales, width) in self.scales.iter_mut().zip([self.config.head_dim, self.config.value_dim]) {
            let len = if scales.is_empty() { 0 } else { rows * scales_of(width) };
            scales.copy_within(from * len..(from + 1) * len, to * len);
        }
    }
}

/// Turns a new row of keys, and one of values, into the numbers that the cache holds. Fills their scales if they are quantised.
fn hold<T: Element>(
    config: &CacheConfig,
    [key, value]: [&mut [T]; 2],
    [key_scales, value_scales]: [&mut [f16]; 2],
    turning: Option<&Turning<'_>>,
    position: usize,
) {
    let turning = turning.filter(|turning| !turning.relative);
    match (config.quantisation, turning) {
        (None, None) => {}
        (None, Some(turning)) => turning.turn(key, position),
        (Some(Quantisation::Q8_0), turning) => {
            // The key stays in f32 until it is quantised.
            let mut turned: Vec<f32> = key.iter().map(|x| x.to_f32()).collect();
            if let Some(turning) = turning {
                turning.turn(&mut turned, position);
            }
            quantise(key, &turned, key_scales);
            let value_numbers: Vec<f32> = value.iter().map(|x| x.to_f32()).collect();
            quantise(value, &value_numbers, value_scales);
        }
    }
}

/// Scales of a row.
pub(super) fn scales_of(width: usize) -> usize {
    width.div_ceil(BLOCK)
}

/// Quantises a row. `row` becomes the numbers that are left, rounded to the element type, and `scales` the scales of its blocks. Twin of
/// shaders/cache/append.wgsl.
fn quantise<T: Element>(row: &mut [T], numbers: &[f32], scales: &mut [f16]) {
    for ((row, block), kept) in row.chunks_mut(BLOCK).zip(numbers.chunks(BLOCK)).zip(scales) {
        let most = block.iter().map(|x| x.to_bits() & 0x7fff_ffff).max().unwrap_or(0);
        let scale = f16::from_f32(f32::from_bits(most) * (1.0 / 127.0));
        *kept = if scale.is_finite() { scale } else { f16::NAN };
        let inverse = if *kept > f16::ZERO { 1.0 / kept.to_f32() } else { 0.0 };
        for (to, x) in row.iter_mut().zip(block) {
            *to = of_block((x * inverse).round_ties_even().clamp(-127.0, 127.0), *kept);
        }
    }
}

/// The value of a number of a quantised block, rounded to the element type.
pub(super) fn of_block<T: Element>(number: f32, scale: f16) -> T {
    // Integers have no negative zero, so the sign is removed.
    T::from_f32((number + 0.0) * scale.to_f32())
}

fn check_element<T: Element>(config: &CacheConfig) -> Result<()> {
    if T::DTYPE == config.dtype {
        return Ok(());
    }
    Err(Error::CacheElementType { operands: T::DTYPE, cache: config.dtype })
}

/// A rotary embedding with its table.
struct Turning<'a> {
    rotary: Rotary,
    relative: bool,
    table: &'a [f32],
}

impl<'a> Turning<'a> {
    /// The rotation of an append or a read, if there is one.
    fn new(config: &CacheConfig, has_q: bool, table: Option<&'a [f32]>) -> Result<Option<Self>> {
        let hint = "set CacheConfig::rotary";
        let Some(rotary) = config.rotary else {
            return match (has_q, table) {
                (true, _) => Err(Error::UnexpectedOperand { operand: "q", hint }),
                (false, Some(_)) => Err(Error::UnexpectedOperand { operand: "cos_sin", hint }),
                (false, None) => Ok(None),
            };
        };
        let relative = rotary.positions == RotaryPositions::CacheRelative;
        if relative && !has_q {
            return Ok(None);
        }
        let Some(table) = table else { return Err(Error::MissingOperand { operand: "cos_sin" }) };
        let dim = rotary.dim as usize;
        if table.is_empty() || !table.len().is_multiple_of(dim) {
            let expected = table.len().next_multiple_of(dim).max(dim);
            let shape = vec![expected / dim, dim];
            return Err(Error::OperandLength { operand: "cos_sin", expected, actual: table.len(), shape });
        }
        Ok(Some(Turning { rotary, relative, table }))
    }

    fn positions(&self) -> usize {
        self.table.len() / self.rotary.dim as usize
    }

    fn check(&self, block_table: &BlockTable, tokens: &[usize]) -> Result<()> {
        let positions = self.positions();
        for (sequence, added) in tokens.iter().enumerate().filter(|(_, added)| **added > 0) {
            let end = block_table.lengths()[sequence].saturating_add(*added);
            let end = if self.relative { end.min(block_table.rows()) } else { end };
            if end > positions {
                return Err(Error::RotaryPosition { sequence, position: end - 1, positions });
            }
        }
        Ok(())
    }

    /// Twin of shaders/cache/rotary.wgsl.
    fn turn<T: Element>(&self, row: &mut [T], position: usize) {
        let dim = self.rotary.dim as usize;
        let (cosines, sines) = self.table[position * dim..(position + 1) * dim].split_at(dim / 2);
        for (i, (&cos, &sin)) in cosines.iter().zip(sines).enumerate() {
            let [a, b] = match self.rotary.style {
                RotaryStyle::HalfSplit => [i, i + dim / 2],
                RotaryStyle::Interleaved => [2 * i, 2 * i + 1],
            };
            let (x, y) = (row[a].to_f32(), row[b].to_f32());
            row[a] = T::from_f32(x * cos - y * sin);
            row[b] = T::from_f32(y * cos + x * sin);
        }
    }
}
