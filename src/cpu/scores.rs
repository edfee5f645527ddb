//! Scores of a tile from its products, and the visibility of its pairs. Forward and backward share both, so that the saved lse belongs to
//! the scores of the backward pass bit for bit.

use std::borrow::Cow;
use std::ops::Range;

use pulp::Simd;
use rayon::prelude::*;

use super::rows::Side;
use super::simd::{Panel, tanh};
use crate::problem::{Bias, Inputs, MaskData, Options, Problem, mask_word};

/// Most rows of a tile on either side. The visible pairs of a row fit a word.
pub(super) const TILE: usize = u64::BITS as usize;

/// A number from here down to the lowest finite one absorbs the logarithm of a count, and products below 32.
const ABSORBING: f32 = -1e9;

/// Query rows of one sequence that are computed together: `queries` of `heads`, head by head.
#[derive(Debug, Clone)]
pub(super) struct RowTile {
    pub(super) sequence: usize,
    pub(super) heads: Range<usize>,
    pub(super) queries: Range<usize>,
}

impl RowTile {
    pub(super) fn len(&self) -> usize {
        self.heads.len() * self.queries.len()
    }

    /// Query head and query of a row.
    pub(super) fn row(&self, r: usize) -> (usize, usize) {
        (self.heads.start + r / self.queries.len(), self.queries.start + r % self.queries.len())
    }

    /// Query head and query of each row from `first` on, `count` at most.
    fn rows(&self, first: usize, count: usize) -> impl Iterator<Item = (usize, usize)> {
        (first..self.len()).take(count).map(|r| self.row(r))
    }
}

/// Which pairs of a tile are visible.
#[expect(clippy::large_enum_variant, reason = "one lives on the stack for as long as a tile takes")]
pub(super) enum Seen {
    All,
    None,
    /// A row of bits for each query: bit n is the n-th key of the tile.
    Some([u64; TILE]),
}

/// Numbers, or bits, for all pairs, broadcast along the axes whose size is 1.
struct Pairs<'a, T: Clone> {
    data: Cow<'a, [T]>,
    /// Strides of sequence, head and query.
    strides: [usize; 3],
    width: usize,
}

impl<'a, T: Clone> Pairs<'a, T> {
    fn new(data: Cow<'a, [T]>, [b, h, m, width]: [usize; 4]) -> Self {
        let stride = |size: usize, stride: usize| if size == 1 { 0 } else { stride };
        Pairs { data, strides: [stride(b, h * m * width), stride(h, m * width), stride(m, width)], width }
    }

    fn row(&self, sequence: usize, head: usize, query: usize) -> &[T] {
        let [b, h, m] = self.strides;
        &self.data[sequence * b + head * h + query * m..][..self.width]
    }
}

/// The way from products to scores.
pub(super) struct Scores<'a> {
    problem: &'a Problem,
    /// The magnitude of the scale multiplies the products. Its sign multiplies the operand along the lanes, which is exact. So the largest
    /// score is the largest product, and -inf hides a key before scaling as well as after it.
    magnitude: f32,
    pub(super) sign: f32,
    slopes: Option<&'a [f32]>,
    bias: Option<Pairs<'a, f32>>,
    /// A bit for each pair: of the mask, and of the bias if it hides keys.
    bits: Vec<Pairs<'a, u32>>,
}

impl<'a> Scores<'a> {
    pub(super) fn new(problem: &'a Problem, inputs: &Inputs<'a>) -> Self {
        // Options of scores are read from the problem and the inputs. Options of the visibility rule are in the bands of its sequences.
        // `sink_logits` enters the finished row, and the callers handle layout and element types.
        let Options {
            causal: _,
            window: _,
            sink_tokens: _,
            sink_logits: _,
            scale: _,
            softcap: _,
            alibi: _,
            bias: _,
            bias_dtype: _,
            mask: _,
            mask_packing: _,
            alignment: _,
            query_offset: _,
            layout: _,
            dtype: _,
        } = *problem.options();
        let scale = problem.scale();
        let (magnitude, sign) = if scale == 0.0 { (1.0, 0.0) } else { (scale.abs(), scale.signum()) };
        let bias = inputs.bias.map(|bias| match bias {
            Bias::F32(bias) | Bias::Operand(bias) => bias,
        });
        let bias = bias.zip(problem.bias_shape());
        // The loop has no branch within a chunk, so that it vectorises.
        let hides = |bias: &[f32]| bias.iter().fold(false, |hides, &bias| hides | (bias == f32::NEG_INFINITY));
        let hiding = bias.filter(|(bias, _)| bias.par_chunks(1 << 12).any(hides));
        let hiding = hiding.map(|(bias, shape)| {
            bits(bias, shape, |row| {
                row.iter().rev().fold(0, |word, &bias| word << 1 | u32::from(bias != f32::NEG_INFINITY))
            })
        });
        let mask = inputs.mask.zip(problem.mask_shape()).map(|(mask, shape)| match mask {
            MaskData::Bytes(mask) => bits(mask, shape, mask_word),
            MaskData::Bits(mask) => Pairs::new(mask.into(), shape),
        });
        Scores {
            problem,
            magnitude,
            sign,
            slopes: inputs.alibi_slopes,
            bias: bias.map(|(bias, shape)| Pairs::new(bias.into(), shape)),
            bits: mask.into_iter().chain(hiding).collect(),
        }
    }

    /// The factor of the scores in the softmax. If [`form`](Self::form) does not make whole scores, the softmax applies the scale in its
    /// exponential and does not round the scores.
    pub(super) fn factor(&self) -> f32 {
        if self.problem.modifies_scores() { 1.0 } else { self.magnitude }
    }

    /// The keys of a tile that its queries see.
    #[inline]
    pub(super) fn seen(&self, queries: &RowTile, keys: &Range<usize>) -> Seen {
        let band = &self.problem.sequence(queries.sequence).band;
        if self.bits.is_empty() && band.all_visible(&queries.queries, keys) {
            return Seen::All;
        }
        let mut seen = [0; TILE];
        let full = ones(keys, keys);
        let (mut all, mut any) = (full, 0);
        let rows = queries.heads.clone().flat_map(|head| queries.queries.clone().map(move |query| (head, query)));
        for (seen, (head, query)) in seen.iter_mut().zip(rows) {
            let [sinks, window] = band.visible_keys(query);
            *seen = ones(&sinks, keys) | ones(&window, keys);
            for pairs in &self.bits {
                *seen &= word(pairs.row(queries.sequence, head, query), keys.start);
            }
            (all, any) = (all & *seen, any | *seen);
        }
        match (any, all) {
            (0, _) => Seen::None,
            (_, all) if all == full => Seen::All,
            _ => Seen::Some(seen),
        }
    }

    /// The factor of the probabilities of each row of lse. None if it is 1 in every row.
    ///
    /// A bias close to the lowest finite number absorbs the products, and its row's lse the logarithm of their number. Each of the n keys
    /// with the row's largest bias has a probability of 1 / n, but exp(score - lse) is 1.
    pub(super) fn shares(&self, lse: &[f32]) -> Option<Vec<f32>> {
        let bias = self.bias.as_ref()?;
        let absorbs = |lse: &f32| lse.is_finite() && *lse <= ABSORBING;
        lse.par_iter().any(absorbs).then_some(())?;
        let (s, mut shares) = (self.problem.shape(), vec![1.0; lse.len()]);
        for (number, sequence) in self.problem.sequences().enumerate() {
            for (head, i) in (0..s.heads).flat_map(|head| (0..sequence.band.seq_q()).map(move |i| (head, i))) {
                let n = (sequence.entry * s.heads + head) * s.seq_q + sequence.q_start + i;
                if absorbs(&lse[n]) {
                    let row = bias.row(number, head, i);
                    let visible =
                        |j: usize| self.bits.iter().all(|bits| bits.row(number, head, i)[j / 32] >> (j % 32) & 1 != 0);
                    let keys = sequence.band.visible_keys(i).into_iter().flatten();
                    let count = keys.filter(|&j| row[j] == lse[n] && visible(j)).count();
                    shares[n] = 1.0 / count.max(1) as f32;
                }
            }
        }
        Some(shares)
    }

    /// Turns the products of one panel into whole scores, if scores are more than products times the scale. Leaves softcap's derivative in
    /// `derivatives`, if that has room. The rows of `s` are those of the side that passes by.
    #[inline(always)]
    pub(super) fn form<S: Simd, const NV: usize>(
        &self,
        simd: S,
        lanes: Side,
        (queries, keys): (&RowTile, &Range<usize>),
        panel: usize,
        s: &mut [Panel<S, NV>],
        derivatives: &mut [Panel<S, NV>],
    ) {
        if !self.problem.modifies_scores() {
            return;
        }
        let factor = simd.splat_f32s(self.magnitude);
        match self.problem.options().softcap {
            None => {
                for s in s.iter_mut() {
                    *s = s.map(|s| simd.mul_f32s(s, factor));
                }
            }
            Some(softcap) => {
                let softcap = simd.splat_f32s(softcap);
                for (n, s) in s.iter_mut().enumerate() {
                    for (v, s) in s.iter_mut().enumerate() {
                        let (t, derivative) = tanh(simd, simd.div_f32s(simd.mul_f32s(*s, factor), softcap));
                        *s = simd.mul_f32s(softcap, t);
                        if let Some(derivatives) = derivatives.get_mut(n) {
                            derivatives[v] = derivative;
                        }
                    }
                }
            }
        }
        let width = NV * S::F32_LANES;
        let first = panel * width;
        let s: &mut [f32] = bytemuck::cast_slice_mut(s);
        if let Some(slopes) = self.slopes {
            self.subtract_distances(slopes, lanes, (queries, keys), first, s.chunks_exact_mut(width));
        }
        let Some(bias) = &self.bias else { return };
        match lanes {
            Side::Queries => {
                for (lane, (head, query)) in queries.rows(first, width).enumerate() {
                    let bias = &bias.row(queries.sequence, head, query)[keys.clone()];
                    for (s, bias) in s[lane..].iter_mut().step_by(width).zip(bias) {
                        *s += bias;
                    }
                }
            }
            Side::Keys => {
                for (s, (head, query)) in s.chunks_exact_mut(width).zip(queries.rows(0, TILE)) {
                    let bias = &bias.row(queries.sequence, head, query)[keys.start + first..keys.end];
                    s.iter_mut().zip(bias).for_each(|(s, bias)| *s += bias);
                }
            }
        }
    }

    /// ALiBi: `s -= slope * |p - j|`, for one panel that starts at lane `first`.
    #[inline(always)]
    fn subtract_distances<'b>(
        &self,
        slopes: &[f32],
        lanes: Side,
        (queries, keys): (&RowTile, &Range<usize>),
        first: usize,
        s: impl Iterator<Item = &'b mut [f32]>,
    ) {
        match lanes {
            Side::Queries => {
                let positions = self.positions(queries, first);
                let mut own = [0.0; TILE];
                for (own, (head, _)) in own.iter_mut().zip(queries.rows(first, TILE)) {
                    *own = slopes[head];
                }
                for (s, j) in s.zip(keys.clone()) {
                    for ((s, &slope), &p) in s.iter_mut().zip(&own).zip(&positions) {
                        *s -= slope * distance(p, j as i32);
                    }
                }
            }
            Side::Keys => {
                let positions = self.positions(queries, 0);
                for ((s, p), (head, _)) in s.zip(positions).zip(queries.rows(0, TILE)) {
                    let (slope, start) = (slopes[head], (keys.start + first) as i32);
                    for (s, j) in s.iter_mut().zip(start..) {
                        *s -= slope * distance(p, j);
                    }
                }
            }
        }
    }

    /// ALiBi's gradient: `sums -= |p - j| * d_s`, for one panel of queries.
    #[inline(always)]
    pub(super) fn add_slope_gradients<S: Simd, const NV: usize>(
        &self,
        (queries, keys): (&RowTile, &Range<usize>),
        panel: usize,
        d_s: &[Panel<S, NV>],
        sums: &mut [f64],
    ) {
        if self.slopes.is_none() {
            return;
        }
        let width = NV * S::F32_LANES;
        let positions = self.positions(queries, panel * width);
        let d_s: &[f32] = bytemuck::cast_slice(d_s);
        for (d_s, j) in d_s.chunks_exact(width).zip(keys.clone()) {
            for ((sum, &d_s), &p) in sums[panel * width..].iter_mut().zip(d_s).zip(&positions) {
                *sum -= f64::from(distance(p, j as i32)) * f64::from(d_s);
            }
        }
    }

    /// The positions of a tile's queries among the keys, from row `first` on. ALiBi's offsets are within 2^30 of 0.
    fn positions(&self, queries: &RowTile, first: usize) -> [i32; TILE] {
        let offset = self.problem.sequence(queries.sequence).band.offset();
        let mut positions = [0; TILE];
        for (position, (_, query)) in positions.iter_mut().zip(queries.rows(first, TILE)) {
            *position = (query as i64 + offset) as i32;
        }
        positions
    }
}

/// |p - j|.
#[inline(always)]
fn distance(p: i32, j: i32) -> f32 {
    p.wrapping_sub(j).wrapping_abs() as f32
}

/// The bits of the keys in `keys` that are in `range`.
#[inline(always)]
fn ones(range: &Range<usize>, keys: &Range<usize>) -> u64 {
    let [start, end] = [range.start, range.end].map(|j| j.clamp(keys.start, keys.end) - keys.start);
    if start < end { u64::MAX >> (TILE - (end - start)) << start } else { 0 }
}

/// Which of the lowest `count` bits are not set.
#[inline(always)]
pub(super) fn zeros(bits: u64, count: usize) -> impl Iterator<Item = usize> {
    let mut left = !bits & ones(&(0..count), &(0..count));
    std::iter::from_fn(move || {
        let n = left.trailing_zeros();
        left &= left.wrapping_sub(1);
        (n < u64::BITS).then_some(n as usize)
    })
}

/// The bits of a row from `start` on.
fn word(row: &[u32], start: usize) -> u64 {
    let words = row[start / 32..].iter().take(3).rev().fold(0, |words, &word| words << 32 | u128::from(word));
    (words >> (start % 32)) as u64
}

/// A visibility bit for each pair, in rows of whole words. `word` makes a word of up to 32 pairs.
fn bits<'a, T: Sync>(data: &[T], [b, h, m, n]: [usize; 4], word: impl Fn(&[T]) -> u32 + Sync) -> Pairs<'a, u32> {
    let shape = [b, h, m, n.div_ceil(32)];
    let mut words = vec![0; shape.iter().product()];
    words.par_chunks_mut(shape[3]).zip(data.par_chunks(n)).for_each(|(words, row)| {
        words.iter_mut().zip(row.chunks(32)).for_each(|(bits, row)| *bits = word(row));
    });
    Pairs::new(words.into(), shape)
}
