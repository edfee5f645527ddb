//! Tiled online-softmax attention in f32 on all cores. Operands in half precision are widened beforehand, all at once, because a product of
//! matrices reads them many times.
//!
//! A work item is a tile of query rows of one key/value head. If there are few queries, the rows of several query heads of the group are
//! packed into one tile, so that decoding with grouped heads reads k and v once a group. The item visits the key tiles that have visible
//! pairs. For each tile it computes
//!
//! ```text
//! s = k q                                  [keys][rows]
//! m' = max(m, s),         alpha = exp(scale * (m - m')),  p = exp(scale * (s - m'))
//! l = alpha * l + sum p,  o = alpha * o + p v
//! ```
//!
//! If scores are more than products times the scale, s are whole scores and the scale here is 1, see [`Scores`]. In the end `lse =
//! logaddexp(scale * m + log l, sink)` and `o *= exp(scale * m - lse)`, so a score may exceed the range of f32. The items, and the splits
//! of the keys if items are few, depend on the problem alone, so results never depend on the threads.

use std::borrow::Cow;
use std::cmp::Reverse;
use std::ops::Range;

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::exact;
use super::reference::{Denominator, sink_logit};
use super::rows::{Head, Places, Rows, Side, rows_mut};
use super::scores::{RowTile, Scores, Seen, TILE, zeros};
use super::simd::{Panel, accumulate, accumulate_visible, column, column_mut, exp, panels, panels_mut, products};
use crate::problem::element::Element;
use crate::problem::error::Result;
use crate::problem::varlen::Sequence;
use crate::problem::{Bias, Inputs, Layout, Output, Problem};

/// With fewer items than this, each item is split along the keys, so that every core has work.
pub(super) const FEW_ITEMS: usize = 64;
/// Fewest key tiles that are worth a split.
pub(super) const SPLIT_TILES: usize = 8;

/// Forward pass on all cores of the CPU. It computes in f32 whatever the operands are, and rounds o once.
///
/// The result has the same bits in every run, for any number of threads.
///
/// # Errors
/// Those of [`Problem::check_inputs`].
pub fn forward<T: Element>(problem: &Problem, inputs: &Inputs<'_, T>) -> Result<Output<T>> {
    Ok(forward_with_row_max(problem, inputs)?.0)
}

/// Like [`forward`], with the largest score of each row. See [`Attention::forward_with_row_max`](crate::Attention::forward_with_row_max).
///
/// # Errors
/// As [`forward`].
pub fn forward_with_row_max<T: Element>(problem: &Problem, inputs: &Inputs<'_, T>) -> Result<(Output<T>, Vec<f32>)> {
    problem.check_inputs(inputs)?;
    let (q, k, v) = (T::widen(inputs.q), T::widen(inputs.k), T::widen(inputs.v));
    let bias = inputs.bias.map(widen_bias);
    let inputs = inputs.with_operands([&q, &k, &v], bias.as_deref());
    let (Output { o, lse, .. }, row_max) = widened_with_row_max(problem, &inputs);
    let o_lo = T::DTYPE.has_rounding_error().then(|| o.par_iter().map(|&o| T::lo(o)).collect());
    Ok((Output { o: T::narrow(o), o_lo, lse }, row_max))
}

/// A bias in f32.
pub(super) fn widen_bias<T: Element>(bias: Bias<'_, T>) -> Cow<'_, [f32]> {
    match bias {
        Bias::F32(bias) => Cow::Borrowed(bias),
        Bias::Operand(bias) => T::widen(bias),
    }
}

/// The pass on operands of any element type, which have been checked and widened. o is not rounded.
pub(super) fn forward_widened(problem: &Problem, inputs: &Inputs<'_>) -> Output {
    widened_with_row_max(problem, inputs).0
}

fn widened_with_row_max(problem: &Problem, inputs: &Inputs<'_>) -> (Output, Vec<f32>) {
    let (mut output, row_max) = forward_on(Arch::new(), problem, inputs);
    // o is a sum of up to N values before it is divided by the sum of the weights. f32 has no room for the sum of the largest bf16 values.
    if problem.options().dtype.overflows_f32_sums() {
        exact::forward(problem, inputs, &mut output);
    }
    (output, row_max)
}

/// The pass in f32, on operands that have been checked.
fn forward_on(arch: Arch, problem: &Problem, inputs: &Inputs<'_>) -> (Output, Vec<f32>) {
    let s = problem.shape();
    let layout = problem.options().layout;
    let operands = Operands {
        arch,
        problem,
        scores: Scores::new(problem, inputs),
        q: Rows::new(inputs.q, layout, s.heads, s.seq_q, s.head_dim),
        k: Rows::new(inputs.k, layout, s.kv_heads, s.seq_k, s.head_dim),
        v: Rows::new(inputs.v, layout, s.kv_heads, s.seq_k, s.value_dim),
    };
    let rows = s.batch * s.heads * s.seq_q;
    // Rows beyond the lengths in use keep these values.
    let mut output = Output { o: vec![0.0; rows * s.value_dim], o_lo: None, lse: vec![f32::NEG_INFINITY; rows] };
    let mut row_max = output.lse.clone();

    let mut items = items(problem, &mut output, &mut row_max);
    let splits = FEW_ITEMS / items.len().max(1);
    // Long items come first, so that the short ones even out the end.
    items.sort_by_key(|item| Reverse(item.tiles));
    items.into_iter().par_bridge().for_each_init(
        || State::new(problem),
        |state, item| {
            let tiles = item.tiles;
            let splits = splits.min(tiles / SPLIT_TILES);
            if splits <= 1 {
                operands.attend(&item.tile, 0..tiles, state);
                item.finish(inputs, problem, std::slice::from_ref(state));
            } else {
                let states: Vec<State> = (0..splits)
                    .into_par_iter()
                    .map(|n| {
                        let mut state = State::new(problem);
                        operands.attend(&item.tile, tiles * n / splits..tiles * (n + 1) / splits, &mut state);
                        state
                    })
                    .collect();
                item.finish(inputs, problem, &states);
            }
        },
    );
    (output, row_max)
}

/// A tile, the number of key tiles that it visits, and its rows of the output.
struct Item<'a> {
    tile: RowTile,
    tiles: usize,
    o: Vec<&'a mut [f32]>,
    lse: Vec<&'a mut f32>,
    row_max: Vec<&'a mut f32>,
}

/// The division of the rows of a sequence into items.
struct Cut {
    first_item: usize,
    queries: usize,
    query_tile: usize,
    head_tile: usize,
}

impl Cut {
    /// Tiles have equal lengths, so that the last one is not short, and as many heads of a group as fit.
    fn new(first_item: usize, queries: usize, group: usize) -> Self {
        let query_tile = queries.div_ceil(queries.div_ceil(TILE).max(1)).max(1);
        Cut { first_item, queries, query_tile, head_tile: (TILE / query_tile).min(group) }
    }

    /// The item of a query.
    fn item(&self, group: usize, head: usize, query: usize) -> usize {
        let (query_tiles, head_tiles) = (self.queries.div_ceil(self.query_tile), group.div_ceil(self.head_tile));
        let heads = head / group * head_tiles + head % group / self.head_tile;
        self.first_item + heads * query_tiles + query / self.query_tile
    }
}

/// Cuts the problem into items, ordered by sequence, head and query.
fn items<'a>(problem: &Problem, output: &'a mut Output, row_max: &'a mut [f32]) -> Vec<Item<'a>> {
    let (s, group) = (problem.shape(), problem.heads_per_kv());
    let (mut items, mut cuts) = (Vec::new(), Vec::with_capacity(problem.sequence_count()));
    for (sequence, band) in problem.sequences().map(|sequence| sequence.band).enumerate() {
        let cut = Cut::new(items.len(), band.seq_q(), group);
        for group in (0..s.heads).step_by(group).map(|head| head..head + group) {
            for head in group.clone().step_by(cut.head_tile) {
                for query in (0..cut.queries).step_by(cut.query_tile) {
                    let tile = RowTile {
                        sequence,
                        heads: head..(head + cut.head_tile).min(group.end),
                        queries: query..(query + cut.query_tile).min(cut.queries),
                    };
                    let o = (0..tile.len()).map(|_| Default::default()).collect();
                    let tiles = band.key_tiles(&tile.queries, TILE).count();
                    let [lse, row_max] = [(); 2].map(|()| Vec::with_capacity(tile.len()));
                    items.push(Item { lse, row_max, o, tiles, tile });
                }
            }
        }
        cuts.push(cut);
    }
    let places = Places::new(problem, Side::Queries);
    let item = |[b, h, i]: [usize; 3]| {
        let [sequence, i] = places.find(b, i);
        let cut = &cuts[sequence];
        (i < cut.queries).then(|| (cut.item(group, h, i), i))
    };
    for (row, o) in rows_mut(&mut output.o, problem.options().layout, s.heads, s.seq_q, s.value_dim) {
        let Some((n, i)) = item(row) else { continue };
        let tile = &items[n].tile;
        let r = (row[1] - tile.heads.start) * tile.queries.len() + i - tile.queries.start;
        items[n].o[r] = o;
    }
    // These results are [batch, heads, seq_q] in every layout, so rows are in the order of their tile.
    for ((row, lse), row_max) in rows_mut(&mut output.lse, Layout::Bhsd, s.heads, s.seq_q, 1).zip(row_max) {
        let Some((n, _)) = item(row) else { continue };
        items[n].lse.push(&mut lse[0]);
        items[n].row_max.push(row_max);
    }
    items
}

impl Item<'_> {
    /// Merges the states of all key splits with the sink logit, which is added here and so counts once.
    fn finish(self, inputs: &Inputs<'_>, problem: &Problem, states: &[State]) {
        let width = problem.shape().value_dim;
        for (r, ((o, lse), row_max)) in self.o.into_iter().zip(self.lse).zip(self.row_max).enumerate() {
            let sink = sink_logit(problem, inputs, self.tile.row(r).0);
            // A split in which a row has accumulated nothing has no weight, even where lse is -inf or NaN.
            let sums = states.iter().filter(|state| state.l[r] != 0.0);
            let factor = if problem.modifies_scores() { 1.0 } else { f64::from(problem.scale()).abs() };
            let most = |state: &State| f64::from(state.m[r]) * factor;
            let terms = sums.clone().map(|state| (most(state), f64::from(state.l[r])));
            let denominator = Denominator::new(terms.chain(sink.map(|sink| (sink, 1.0))));
            *lse = denominator.log() as f32;
            // A sum is NaN if a score is NaN, or if the largest score exceeds f32.
            let has_nan = sums.clone().any(|state| state.l[r].is_nan());
            let largest = sums.clone().map(most).fold(f64::NEG_INFINITY, f64::max) as f32;
            *row_max = if has_nan && largest < f32::INFINITY { f32::NAN } else { largest };
            o.fill(0.0);
            for state in sums {
                let weight = denominator.weight(most(state)) as f32;
                let panel = state.panel;
                let column = state.o[r / panel * panel * width..][..panel * width].chunks_exact(panel);
                for (o, acc) in o.iter_mut().zip(column) {
                    *o += weight * acc[r % panel];
                }
            }
        }
    }
}

/// The state of a row tile after the keys visited so far, and scratch. It is allocated once a thread (or key split).
struct State {
    /// Rows of a panel.
    panel: usize,
    /// `[panel][head_dim][row]`.
    q: Vec<f32>,
    /// Scores, then probabilities of one panel: `[key][row]`.
    s: Vec<f32>,
    /// Outputs relative to exp(m): `[panel][value_dim][row]`.
    o: Vec<f32>,
    /// Largest score, without the scale. It is finite from the start, so that differences are never inf - inf.
    m: Vec<f32>,
    /// Sum of exp(score - m).
    l: Vec<f32>,
}

impl State {
    fn new(problem: &Problem) -> Self {
        let zeros = |len| vec![0.0; len];
        State {
            panel: 1,
            q: zeros(TILE * problem.shape().head_dim),
            s: zeros(TILE * TILE),
            o: zeros(TILE * problem.shape().value_dim),
            m: zeros(TILE),
            l: zeros(TILE),
        }
    }
}

struct Operands<'a> {
    arch: Arch,
    problem: &'a Problem,
    scores: Scores<'a>,
    q: Rows<'a>,
    k: Rows<'a>,
    v: Rows<'a>,
}

impl Operands<'_> {
    /// Attends the tile's rows to a range of its visible key tiles.
    fn attend(&self, tile: &RowTile, key_tiles: Range<usize>, state: &mut State) {
        let sequence = self.problem.sequence(tile.sequence);
        let kv_head = tile.heads.start / self.problem.heads_per_kv();
        self.arch.dispatch(Attend {
            scores: &self.scores,
            sequence: &sequence,
            tile,
            key_tiles,
            q: self.q,
            k: self.k.head(sequence.entry, kv_head, sequence.k_start),
            v: self.v.head(sequence.entry, kv_head, sequence.k_start),
            state,
        });
    }
}

/// One row tile against some of its key tiles: a function of its fields, generic over the instruction set.
struct Attend<'a> {
    scores: &'a Scores<'a>,
    sequence: &'a Sequence,
    tile: &'a RowTile,
    key_tiles: Range<usize>,
    q: Rows<'a>,
    k: Head<'a>,
    v: Head<'a>,
    state: &'a mut State,
}

impl WithSimd for Attend<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        // The sums, one broadcast and the panel's vectors together fill the register file. A tile of few rows wastes fewer lanes on a
        // narrow panel.
        if self.tile.len() <= S::F32_LANES {
            self.run::<S, 1, 8>(simd);
        } else if S::REGISTER_COUNT >= 32 {
            self.run::<S, 4, 4>(simd);
        } else {
            self.run::<S, 2, 4>(simd);
        }
    }
}

impl Attend<'_> {
    #[inline(always)]
    fn run<S: Simd, const NV: usize, const NR: usize>(mut self, simd: S) {
        self.load_q(NV * S::F32_LANES);
        let band = &self.sequence.band;
        let all = band.key_tiles(&self.tile.queries, TILE);
        for t in all.iter().skip(self.key_tiles.start).take(self.key_tiles.len()) {
            let keys = t * TILE..((t + 1) * TILE).min(band.seq_k());
            let seen = match self.scores.seen(self.tile, &keys) {
                Seen::None => continue,
                Seen::All => None,
                Seen::Some(seen) => Some(seen),
            };
            let exact = seen.filter(|_| !self.v.is_finite(keys.clone()));
            for panel in 0..self.tile.len().div_ceil(NV * S::F32_LANES) {
                let q = column::<S, NV>(&self.state.q, panel, self.k.width());
                let s = &mut panels_mut::<S, NV>(&mut self.state.s)[..keys.len()];
                products::<S, NV, NR>(simd, s, q, self.k, keys.clone());
                self.scores.form::<S, NV>(simd, Side::Queries, (self.tile, &keys), panel, s, &mut []);
                if let Some(seen) = &seen {
                    self.hide(panel, seen, keys.len());
                }
                let alpha = self.softmax::<S, NV>(simd, panel, keys.len());
                let p = panels::<S, NV>(&self.state.s);
                let o = column_mut::<S, NV>(&mut self.state.o, panel, self.v.width());
                if let Some(seen) = &exact {
                    let seen = &seen[panel * NV * S::F32_LANES..];
                    let visible = |lane: usize, j: usize| seen[lane] >> (j - keys.start) & 1 != 0;
                    accumulate_visible::<S, NV>(o, alpha, p, self.v, keys.clone(), visible);
                } else {
                    accumulate::<S, NV, NR>(simd, o, alpha, p, self.v, keys.clone());
                }
            }
        }
    }

    /// Clears the state, and copies q into it by panels.
    fn load_q(&mut self, panel: usize) {
        let State { panel: state_panel, q, o, m, l, .. } = &mut *self.state;
        *state_panel = panel;
        o[..self.tile.len().next_multiple_of(panel) * self.v.width()].fill(0.0);
        m.fill(f32::MIN);
        l.fill(0.0);
        let width = q.len() / TILE;
        // A scale of zero must not multiply the -inf of a hidden score, so all products are zero instead.
        let sign = if self.scores.factor() == 0.0 { 0.0 } else { self.scores.sign };
        for r in 0..self.tile.len() {
            let (h, i) = self.tile.row(r);
            let column = q[r / panel * panel * width..][..panel * width].chunks_exact_mut(panel);
            for (q, &x) in column.zip(self.q.row(self.sequence.entry, h, self.sequence.q_start + i)) {
                q[r % panel] = sign * x;
            }
        }
    }

    /// Hides the keys that a row does not see.
    fn hide(&mut self, panel: usize, seen: &[u64; TILE], keys: usize) {
        let width = self.state.panel;
        for (lane, r) in (panel * width..self.tile.len()).take(width).enumerate() {
            for n in zeros(seen[r], keys) {
                self.state.s[n * width + lane] = f32::NEG_INFINITY;
            }
        }
    }

    /// Turns the scores into probabilities relative to the new maximum. Returns the factor of the old ones.
    #[inline(always)]
    fn softmax<S: Simd, const NV: usize>(&mut self, simd: S, panel: usize, keys: usize) -> Panel<S, NV> {
        let s = &mut panels_mut::<S, NV>(&mut self.state.s)[..keys];
        let m = &mut panels_mut::<S, NV>(&mut self.state.m)[panel];
        let l = &mut panels_mut::<S, NV>(&mut self.state.l)[panel];
        let factor = if self.scores.factor() == 0.0 { 1.0 } else { self.scores.factor() };
        let factor = simd.splat_f32s(factor);

        let mut most = [simd.splat_f32s(f32::NEG_INFINITY); NV];
        for s in s.iter() {
            for v in 0..NV {
                most[v] = simd.max_f32s(s[v], most[v]);
            }
        }
        let mut alpha = *m;
        for v in 0..NV {
            let new = simd.max_f32s(m[v], most[v]);
            alpha[v] = exp(simd, simd.mul_f32s(factor, simd.sub_f32s(m[v], new)));
            m[v] = new;
        }
        let mut sum = [simd.splat_f32s(0.0); NV];
        for s in s {
            for v in 0..NV {
                // The maximum less itself is 0, however large the scale is.
                s[v] = exp(simd, simd.mul_f32s(factor, simd.sub_f32s(s[v], m[v])));
                sum[v] = simd.add_f32s(sum[v], s[v]);
            }
        }
        for v in 0..NV {
            l[v] = simd.mul_add_e_f32s(l[v], alpha[v], sum[v]);
        }
        alpha
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::reference;
    use crate::problem::{Axes, MaskData, Options, Shape, SinkLogits, Window};

    /// `tests/cpu` covers the best instruction set of the machine, and this test the other ones.
    #[test]
    fn every_instruction_set() {
        let mut archs = vec![Arch::Scalar, Arch::new()];
        #[cfg(target_arch = "x86_64")]
        archs.extend(pulp::x86::V3::try_new().map(Arch::V3));
        for (m, n) in [(1, 257), (5, 70), (113, 203)] {
            let shape = Shape { batch: 1, heads: 4, kv_heads: 2, seq_q: m, seq_k: n, head_dim: 33, value_dim: 21 };
            let plain = Options::new().window(Window::keys(90)).sink_tokens(5).sink_logits(SinkLogits::OffByOne);
            let modified = plain.softcap(2.0).alibi(true).bias(Axes::ALL).mask(Axes::KEYS.heads());
            for options in [plain, modified] {
                let problem = Problem::new(shape, options).unwrap();
                let wave = |shape: [usize; 4], step: f32| -> Vec<f32> {
                    (0..shape.iter().product()).map(|x| 2.0 * (x as f32 * step).sin()).collect()
                };
                let (q, k) = (wave(problem.q_shape(), 0.7), wave(problem.k_shape(), 1.3));
                let mut v = wave(problem.v_shape(), 2.1);
                let slopes = options.alibi.then(|| vec![0.1, 0.02, 0.0, -0.01]);
                let bias = problem.bias_shape().map(|shape| wave(shape, 0.3));
                let mask = problem
                    .mask_shape()
                    .map(|shape| (0..shape.iter().product()).map(|n| (n % 5 != 3) as u8).collect::<Vec<_>>());
                for poison in [None, Some(f32::NAN)] {
                    // Some rows see the key and other rows do not, so that its tile is taken exactly.
                    if let Some(nan) = poison {
                        v[6 * 2 * 21] = nan;
                    }
                    let inputs = Inputs::new(&q, &k, &v).alibi_slopes(slopes.as_deref());
                    let inputs = inputs.bias(bias.as_deref().map(Bias::F32)).mask(mask.as_deref().map(MaskData::Bytes));
                    let expected = reference::forward(&problem, &inputs).unwrap();
                    for &arch in &archs {
                        let (output, _) = forward_on(arch, &problem, &inputs);
                        for (x, y) in output.o.iter().chain(&output.lse).zip(expected.o.iter().chain(&expected.lse)) {
                            let close = (f64::from(*x) - y).abs() <= 1e-5 * (1.0 + y.abs());
                            assert!(close || x.is_nan() && y.is_nan(), "{arch:?} {problem}: {x}, not {y}");
                        }
                    }
                }
            }
        }
    }
}
