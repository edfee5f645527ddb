//! Tiled online-softmax attention in f32 on all cores. Operands in half precision are widened beforehand, all at once:
//! a product of matrices reads them many times.
//!
//! A work item is a tile of query rows of one key/value head; if there are few queries, the rows of
//! several query heads of the group are packed into one tile, so that decoding with grouped heads
//! reads k and v once a group. It visits the key tiles in which something is visible; per tile
//!
//! ```text
//! s = k q                                  [keys][rows]
//! m' = max(m, scale * s),  alpha = exp(m - m'),  p = exp(scale * s - m')
//! l = alpha * l + sum p,   o = alpha * o + p v
//! ```
//!
//! and in the end `lse = logaddexp(m + log l, sink)`, `o *= exp(m - lse)`. Items, and the splits of the
//! keys where items are few, are a function of the problem alone, so results never depend on the threads.

use std::borrow::Cow;
use std::cmp::Reverse;
use std::ops::Range;

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::range;
use super::reference::{log_sum_exp, sink_logit};
use super::rows::{Head, Rows, rows_mut};
use super::simd::{Panel, accumulate, accumulate_visible, column, column_mut, exp, panels, panels_mut, products};
use crate::element::{DType, Element};
use crate::error::Result;
use crate::mask::Band;
use crate::problem::{Bias, Inputs, Layout, Output, Problem};

/// Rows of a work item.
const ROW_TILE: usize = 64;
/// Keys between two updates of the softmax's maximum.
const KEY_TILE: usize = 64;
/// Beyond it, half a unit in the last place of a score is no small number any more.
const HUGE: f32 = (1 << 24) as f32;
/// With fewer items than this, each is split along the keys, to give every core work.
pub(super) const FEW_ITEMS: usize = 64;
/// The least key tiles worth a split.
pub(super) const SPLIT_TILES: usize = 8;

/// Forward pass on all cores of the CPU: in f32 whatever the operands are, o rounded once.
///
/// The result has the same bits in every run, for any number of threads.
///
/// # Errors
/// Those of [`Problem::check_inputs`].
pub fn forward<T: Element>(problem: &Problem, inputs: &Inputs<'_, T>) -> Result<Output<T>> {
    problem.check_inputs(inputs)?;
    problem.check_plain()?;
    let (q, k, v) = (T::widen(inputs.q), T::widen(inputs.k), T::widen(inputs.v));
    let bias = inputs.bias.map(widen_bias);
    let inputs = inputs.with_operands([&q, &k, &v], bias.as_deref());
    let Output { o, lse, .. } = forward_widened(problem, &inputs);
    let o_rest = (T::DTYPE != DType::F32).then(|| o.par_iter().map(|&o| T::rest(o)).collect());
    Ok(Output { o: T::narrow(o), o_rest, lse })
}

/// A bias in f32.
pub(super) fn widen_bias<T: Element>(bias: Bias<'_, T>) -> Cow<'_, [f32]> {
    match bias {
        Bias::F32(bias) => Cow::Borrowed(bias),
        Bias::Operand(bias) => T::widen(bias),
    }
}

/// The pass on operands of any element type, checked and widened; o unrounded.
pub(super) fn forward_widened(problem: &Problem, inputs: &Inputs<'_>) -> Output {
    // o is sums of up to N values before it is divided by the sum of the weights.
    let unit = match problem.options().dtype {
        DType::Bf16 => range::unit(range::exponent(inputs.v) + range::exponent_of(problem.shape().seq_k)),
        DType::F32 | DType::F16 => 0,
    };
    if unit == 0 {
        return forward_on(Arch::new(), problem, inputs);
    }
    let mut v = inputs.v.to_vec();
    range::scale(&mut v, -unit);
    let mut output = forward_on(Arch::new(), problem, &Inputs { v: &v, ..*inputs });
    range::scale(&mut output.o, unit);
    output
}

/// The pass in f32, on operands that have been checked.
fn forward_on(arch: Arch, problem: &Problem, inputs: &Inputs<'_>) -> Output {
    let s = problem.shape();
    let layout = problem.options().layout;
    let operands = Operands {
        arch,
        problem,
        q: Rows::new(inputs.q, layout, s.heads, s.seq_q, s.head_dim),
        k: Rows::new(inputs.k, layout, s.kv_heads, s.seq_k, s.head_dim),
        v: Rows::new(inputs.v, layout, s.kv_heads, s.seq_k, s.value_dim),
    };
    let rows = s.batch * s.heads * s.seq_q;
    let mut output = Output { o: vec![0.0; rows * s.value_dim], o_rest: None, lse: vec![0.0; rows] };

    let mut items = items(problem, &mut output);
    let splits = FEW_ITEMS / items.len();
    // Long items first: the short ones then even out the end.
    items.sort_by_key(|item| Reverse(problem.sequence(0).band.key_tiles(&item.tile.queries, KEY_TILE).count()));
    items.into_iter().par_bridge().for_each_init(
        || State::new(problem),
        |state, item| {
            let tiles = problem.sequence(0).band.key_tiles(&item.tile.queries, KEY_TILE).count();
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
    output
}

/// Query rows that are computed together: `queries` of `heads`, head by head.
struct RowTile {
    batch: usize,
    heads: Range<usize>,
    queries: Range<usize>,
}

impl RowTile {
    fn len(&self) -> usize {
        self.heads.len() * self.queries.len()
    }

    /// Query head and query of a row.
    fn row(&self, r: usize) -> (usize, usize) {
        (self.heads.start + r / self.queries.len(), self.queries.start + r % self.queries.len())
    }
}

/// A tile with its rows of the output.
struct Item<'a> {
    tile: RowTile,
    o: Vec<&'a mut [f32]>,
    lse: Vec<&'a mut f32>,
}

/// Cuts the problem into items, ordered by batch, head and query.
fn items<'a>(problem: &Problem, output: &'a mut Output) -> Vec<Item<'a>> {
    let s = problem.shape();
    // Equal tiles rather than a short last one, and as many heads of a group as fit.
    let query_tile = s.seq_q.div_ceil(s.seq_q.div_ceil(ROW_TILE));
    let head_tile = (ROW_TILE / query_tile).min(problem.group());
    let query_tiles = s.seq_q.div_ceil(query_tile);
    let group_tiles = problem.group().div_ceil(head_tile);

    let mut items = Vec::with_capacity(s.batch * s.kv_heads * group_tiles * query_tiles);
    for batch in 0..s.batch {
        for group in (0..s.heads).step_by(problem.group()) {
            let group = group..group + problem.group();
            for head in group.clone().step_by(head_tile) {
                for query in (0..s.seq_q).step_by(query_tile) {
                    let tile = RowTile {
                        batch,
                        heads: head..(head + head_tile).min(group.end),
                        queries: query..(query + query_tile).min(s.seq_q),
                    };
                    let o = (0..tile.len()).map(|_| Default::default()).collect();
                    items.push(Item { lse: Vec::with_capacity(tile.len()), o, tile });
                }
            }
        }
    }
    let index = |b: usize, h: usize, i: usize| {
        let (g, h) = (h / problem.group(), h % problem.group());
        ((b * s.kv_heads + g) * group_tiles + h / head_tile) * query_tiles + i / query_tile
    };
    for ([b, h, i], row) in rows_mut(&mut output.o, problem.options().layout, s.heads, s.seq_q, s.value_dim) {
        let item = &mut items[index(b, h, i)];
        let r = (h - item.tile.heads.start) * item.tile.queries.len() + i - item.tile.queries.start;
        item.o[r] = row;
    }
    // lse is [batch, heads, seq_q] in either layout, so rows come in the order of their tile.
    for ([b, h, i], row) in rows_mut(&mut output.lse, Layout::Bhsd, s.heads, s.seq_q, 1) {
        items[index(b, h, i)].lse.push(&mut row[0]);
    }
    items
}

impl Item<'_> {
    /// Merges the states of all key splits with the sink logit, which thereby counts once.
    fn finish(self, inputs: &Inputs<'_>, problem: &Problem, states: &[State]) {
        let width = problem.shape().value_dim;
        for (r, (o, lse)) in self.o.into_iter().zip(self.lse).enumerate() {
            let sink = sink_logit(problem, inputs, self.tile.row(r).0);
            let total = log_sum_exp(states.iter().map(|state| state.log_sum(r)).chain(sink));
            *lse = total as f32;
            o.fill(0.0);
            for state in states {
                // What was accumulated nowhere has no weight, even where lse is -inf or NaN.
                let weight = if state.l[r] == 0.0 { 0.0 } else { (f64::from(state.m[r]) - total).exp() as f32 };
                let panel = state.panel;
                let column = state.o[r / panel * panel * width..][..panel * width].chunks_exact(panel);
                for (o, acc) in o.iter_mut().zip(column) {
                    *o += weight * acc[r % panel];
                }
            }
        }
    }
}

/// What a row tile has accumulated over the keys visited so far, and scratch. Allocated once a thread (or key split).
struct State {
    /// Rows of a panel.
    panel: usize,
    /// `[panel][head_dim][row]`.
    q: Vec<f32>,
    /// Scores, then probabilities of one panel: `[key][row]`.
    s: Vec<f32>,
    /// Outputs relative to exp(m): `[panel][value_dim][row]`.
    o: Vec<f32>,
    /// Largest score; finite from the start, so that differences are never inf - inf.
    m: Vec<f32>,
    /// Sum of exp(score - m).
    l: Vec<f32>,
}

impl State {
    fn new(problem: &Problem) -> Self {
        let zeros = |len| vec![0.0; len];
        State {
            panel: 1,
            q: zeros(ROW_TILE * problem.shape().head_dim),
            s: zeros(ROW_TILE * KEY_TILE),
            o: zeros(ROW_TILE * problem.shape().value_dim),
            m: zeros(ROW_TILE),
            l: zeros(ROW_TILE),
        }
    }

    fn log_sum(&self, r: usize) -> f64 {
        f64::from(self.m[r]) + f64::from(self.l[r]).ln()
    }
}

struct Operands<'a> {
    arch: Arch,
    problem: &'a Problem,
    q: Rows<'a>,
    k: Rows<'a>,
    v: Rows<'a>,
}

impl Operands<'_> {
    /// Attends the tile's rows to a range of its visible key tiles.
    fn attend(&self, tile: &RowTile, key_tiles: Range<usize>, state: &mut State) {
        let kv_head = tile.heads.start / self.problem.group();
        let (factor, sign) = factor_and_sign(self.problem.scale());
        self.arch.dispatch(Attend {
            mask: &self.problem.sequence(0).band,
            seq_k: self.problem.shape().seq_k,
            tile,
            key_tiles,
            factor,
            sign,
            q: self.q,
            k: self.k.head(tile.batch, kv_head),
            v: self.v.head(tile.batch, kv_head),
            state,
        });
    }
}

/// The scale's magnitude for the products, and its sign for their operand along the lanes, where it is exact.
/// So the largest score is the largest product, and -inf hides a key before scaling as after it.
pub(super) fn factor_and_sign(scale: f32) -> (f32, f32) {
    if scale == 0.0 { (1.0, 0.0) } else { (scale.abs(), scale.signum()) }
}

/// One row tile against some of its key tiles: a function of its fields, generic over the instruction set.
struct Attend<'a> {
    mask: &'a Band,
    seq_k: usize,
    tile: &'a RowTile,
    key_tiles: Range<usize>,
    factor: f32,
    sign: f32,
    q: Rows<'a>,
    k: Head<'a>,
    v: Head<'a>,
    state: &'a mut State,
}

impl WithSimd for Attend<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        // Sums, one broadcast and the panel's vectors together fill the register file; a tile of few
        // rows wastes fewer lanes on a narrow panel.
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
        let all = self.mask.key_tiles(&self.tile.queries, KEY_TILE);
        for t in all.iter().skip(self.key_tiles.start).take(self.key_tiles.len()) {
            let keys = t * KEY_TILE..((t + 1) * KEY_TILE).min(self.seq_k);
            let masked = !self.mask.all_visible(&self.tile.queries, &keys);
            let exact = masked && !self.v.is_finite(keys.clone());
            for panel in 0..self.tile.len().div_ceil(NV * S::F32_LANES) {
                let q = column::<S, NV>(&self.state.q, panel, self.k.width());
                products::<S, NV, NR>(simd, panels_mut::<S, NV>(&mut self.state.s), q, self.k, keys.clone());
                if masked {
                    self.hide(panel, keys.clone());
                }
                let alpha = self.softmax::<S, NV>(simd, panel, keys.len());
                let p = panels::<S, NV>(&self.state.s);
                let o = column_mut::<S, NV>(&mut self.state.o, panel, self.v.width());
                if exact {
                    let rows = panel * NV * S::F32_LANES..self.tile.len();
                    let query = |lane| rows.clone().nth(lane).map(|r| self.tile.row(r).1);
                    let visible = |lane, j| query(lane).is_some_and(|i| self.mask.visible(i, j));
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
        o.fill(0.0);
        m.fill(f32::MIN);
        l.fill(0.0);
        let width = q.len() / ROW_TILE;
        for r in 0..self.tile.len() {
            let (h, i) = self.tile.row(r);
            let column = q[r / panel * panel * width..][..panel * width].chunks_exact_mut(panel);
            for (q, &x) in column.zip(self.q.row(self.tile.batch, h, i)) {
                q[r % panel] = self.sign * x;
            }
        }
    }

    /// Hides the keys that a row does not see.
    fn hide(&mut self, panel: usize, keys: Range<usize>) {
        let width = self.state.panel;
        for (lane, r) in (panel * width..self.tile.len()).take(width).enumerate() {
            for j in self.mask.hidden_keys(self.tile.row(r).1, &keys).into_iter().flatten() {
                self.state.s[(j - keys.start) * width + lane] = f32::NEG_INFINITY;
            }
        }
    }

    /// Turns the scores into probabilities relative to the new maximum; returns what the old ones are to be
    /// multiplied with.
    #[inline(always)]
    fn softmax<S: Simd, const NV: usize>(&mut self, simd: S, panel: usize, keys: usize) -> Panel<S, NV> {
        let s = &mut panels_mut::<S, NV>(&mut self.state.s)[..keys];
        let m = &mut panels_mut::<S, NV>(&mut self.state.m)[panel];
        let l = &mut panels_mut::<S, NV>(&mut self.state.l)[panel];
        let factor = simd.splat_f32s(self.factor);

        let mut most = [simd.splat_f32s(f32::NEG_INFINITY); NV];
        for s in s.iter() {
            for v in 0..NV {
                most[v] = simd.max_f32s(s[v], most[v]);
            }
        }
        let mut alpha = *m;
        let mut neg_m = *m;
        for v in 0..NV {
            let new = simd.max_f32s(m[v], simd.mul_f32s(factor, most[v]));
            alpha[v] = exp(simd, simd.sub_f32s(m[v], new));
            neg_m[v] = simd.neg_f32s(new);
            m[v] = new;
        }
        let mut sum = [simd.splat_f32s(0.0); NV];
        for s in s {
            for v in 0..NV {
                // Fused: the score itself is never rounded, only its difference from the maximum. That was rounded, by
                // so much where it is huge that the largest score would lie far above or below it: there both are.
                let fused = simd.mul_add_e_f32s(s[v], factor, neg_m[v]);
                let rounded = simd.add_f32s(simd.mul_f32s(s[v], factor), neg_m[v]);
                let huge = simd.less_than_f32s(neg_m[v], simd.splat_f32s(-HUGE));
                let huge = simd.or_m32s(huge, simd.greater_than_f32s(neg_m[v], simd.splat_f32s(HUGE)));
                s[v] = exp(simd, simd.select_f32s(huge, rounded, fused));
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
    use crate::problem::{Options, Shape, SinkLogits, Window};

    /// `tests/cpu` covers the best instruction set of the machine; this, the others.
    #[test]
    fn every_instruction_set() {
        let mut archs = vec![Arch::Scalar, Arch::new()];
        #[cfg(target_arch = "x86_64")]
        archs.extend(pulp::x86::V3::try_new().map(Arch::V3));
        for (m, n) in [(1, 257), (5, 70), (113, 203)] {
            let shape = Shape { batch: 1, heads: 4, kv_heads: 2, seq_q: m, seq_k: n, head_dim: 33, value_dim: 21 };
            let options = Options::new().window(Window::keys(90)).sink_tokens(5).sink_logits(SinkLogits::OffByOne);
            let problem = Problem::new(shape, options).unwrap();
            let wave = |shape: [usize; 4], step: f32| -> Vec<f32> {
                (0..shape.iter().product()).map(|x| 2.0 * (x as f32 * step).sin()).collect()
            };
            let (q, k) = (wave(problem.q_shape(), 0.7), wave(problem.k_shape(), 1.3));
            let mut v = wave(problem.v_shape(), 2.1);
            for poison in [None, Some(f32::NAN)] {
                // A key that some rows see and others do not, so that its tile is taken exactly.
                if let Some(nan) = poison {
                    v[6 * 2 * 21] = nan;
                }
                let inputs = Inputs::new(&q, &k, &v);
                let expected = reference::forward(&problem, &inputs).unwrap();
                for &arch in &archs {
                    let output = forward_on(arch, &problem, &inputs);
                    for (x, y) in output.o.iter().chain(&output.lse).zip(expected.o.iter().chain(&expected.lse)) {
                        let close = (f64::from(*x) - y).abs() <= 1e-5 * (1.0 + y.abs());
                        assert!(close || x.is_nan() && y.is_nan(), "{arch:?} {problem}: {x}, not {y}");
                    }
                }
            }
        }
    }
}
