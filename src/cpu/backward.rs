//! Tiled backward pass in f32 on all cores.
//!
//! Two sweeps over the visible tiles of the score matrix. In each, one side of the matrix stays, a tile of
//! its rows along the lanes, and the other passes by:
//!
//! ```text
//!           stays    passes   s, d_p           sums
//! d_q       q, d_o   k, v     k q, v d_o       d_q = scale d_s k
//! d_k, d_v  k, v     q, d_o   q k, d_o v       d_k = scale d_s q,  d_v = p d_o
//!
//! p = exp(scale * s - lse),  d_s = p * (d_p - delta),  delta = d_o . o - d_lse
//! ```
//!
//! So the scores are formed twice, and in return every result has one writer and one order of summation. Scores
//! come from the forward pass's own product: they have its bits, and the saved lse and o are truly theirs.

use std::cmp::Reverse;
use std::ops::Range;

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::range;
use super::reference::{sink_logit, sink_weight};
use super::rows::{Rows, rows_mut};
use super::simd::{Panel, accumulate, accumulate_visible, column, column_mut, exp, panels, panels_mut, products};
use super::tiled::{FEW_ITEMS, SPLIT_TILES, factor_and_sign, forward_widened, widen_bias};
use crate::element::{DType, Element};
use crate::error::Result;
use crate::mask::Band;
use crate::problem::{Gradients, Inputs, Output, Problem, SinkLogits, Upstream};

/// Rows of a tile, of queries as of keys.
const TILE: usize = 64;

/// Backward pass on all cores of the CPU, from the results of the forward pass: in f32 whatever the operands are, and
/// d_q, d_k and d_v rounded once.
///
/// `delta_i = d_o_i . o_i` is summed from the saved o in f32. In half precision o has been rounded, and delta would
/// inherit that error, which outweighs what cancels in d_sink_logits: what rounding took, the saved o_rest, is added.
/// Where there is none, o is computed anew by its definition, `o_i = sum_j p_ij v_j`, and delta so amounts to
/// `sum_j p_ij (d_o_i . v_j)`, at the price of another forward pass; the saved o is then checked for its length only.
///
/// The result has the same bits in every run, for any number of threads. In f32 and with o_rest, `saved` may also be the
/// final o and lse of an attention over more keys than these: the gradients are then this shard's share, but that by the
/// sink logits, which is whole in every shard.
///
/// # Errors
/// Those of [`Problem::check_inputs`] and [`Problem::check_upstream`].
pub fn backward<T: Element>(
    problem: &Problem,
    inputs: &Inputs<'_, T>,
    saved: &Output<T>,
    upstream: &Upstream<'_, T>,
) -> Result<Gradients<T>> {
    problem.check_inputs(inputs)?;
    problem.check_upstream(saved, upstream)?;
    problem.check_plain()?;
    let (q, k, v) = (T::widen(inputs.q), T::widen(inputs.k), T::widen(inputs.v));
    let bias = inputs.bias.map(widen_bias);
    let inputs = inputs.with_operands([&q, &k, &v], bias.as_deref());
    let d_o = T::widen(upstream.d_o);
    let upstream = Upstream { d_o: &d_o, d_lse: upstream.d_lse };
    let o = match (T::DTYPE, &saved.o_rest) {
        (DType::F32, _) => T::widen(&saved.o),
        (_, Some(o_rest)) => saved.o.par_iter().zip(o_rest).map(|(o, &rest)| o.whole(rest)).collect(),
        (_, None) => forward_widened(problem, &inputs).o.into(),
    };
    let Gradients { d_q, d_k, d_v, d_sink_logits, d_alibi_slopes, d_bias } =
        backward_widened(problem, &inputs, &o, &saved.lse, &upstream);
    let [d_q, d_k, d_v] = [d_q, d_k, d_v].map(T::narrow);
    Ok(Gradients { d_q, d_k, d_v, d_sink_logits, d_alibi_slopes, d_bias })
}

/// The pass on operands of any element type, checked and widened; the gradients unrounded.
fn backward_widened(
    problem: &Problem,
    inputs: &Inputs<'_>,
    o: &[f32],
    lse: &[f32],
    upstream: &Upstream<'_>,
) -> Gradients {
    let pass = |units| backward_in(units, problem, inputs, o, lse, upstream);
    // d_s is summed with k for d_q, and with q for d_k.
    let [d_q_units, units] = match problem.options().dtype {
        DType::Bf16 => [inputs.k, inputs.q].map(|x| gradient_units(problem, x, inputs.v, upstream.d_o)),
        DType::F32 | DType::F16 => [[0; 2]; 2],
    };
    let gradients = pass(units);
    if d_q_units == units { gradients } else { Gradients { d_q: pass(d_q_units).d_q, ..gradients } }
}

/// The units of d_o and v in which d_s, its sums with `x` and those of d_o have room.
fn gradient_units(problem: &Problem, x: &[f32], v: &[f32], d_o: &[f32]) -> [i32; 2] {
    let s = problem.shape();
    let [x, v, d_o] = [x, v, d_o].map(range::exponent);
    // d_s is below twice d_p; a sum is over keys or over the queries of a group.
    let d_s = d_o + v + range::exponent_of(s.value_dim) + 1;
    let terms = range::exponent_of(s.seq_k.max(s.seq_q * problem.group()));
    let d_s_unit = range::unit(d_s).max(range::unit(d_s + x + terms));
    // v takes its part of it as far as its own elements allow, d_o the rest.
    let least = range::unit(d_o + terms);
    let v_unit = (d_s_unit - least).clamp(0, (v + 64).max(0));
    [d_s_unit.max(least) - v_unit, v_unit]
}

/// The pass with d_o and v in units of powers of two.
fn backward_in(
    [d_o_unit, v_unit]: [i32; 2],
    problem: &Problem,
    inputs: &Inputs<'_>,
    o: &[f32],
    lse: &[f32],
    upstream: &Upstream<'_>,
) -> Gradients {
    if [d_o_unit, v_unit] == [0; 2] {
        return backward_on(Arch::new(), problem, inputs, o, lse, upstream);
    }
    let scaled = |x: &[f32], exponent| {
        let mut x = x.to_vec();
        range::scale(&mut x, exponent);
        x
    };
    // d_s comes from products of the two.
    let d_s_unit = d_o_unit + v_unit;
    let (o, v) = (scaled(o, -v_unit), scaled(inputs.v, -v_unit));
    let (d_o, d_lse) = (scaled(upstream.d_o, -d_o_unit), upstream.d_lse.map(|d_lse| scaled(d_lse, -d_s_unit)));
    let upstream = Upstream { d_o: &d_o, d_lse: d_lse.as_deref() };
    let mut gradients = backward_on(Arch::new(), problem, &Inputs { v: &v, ..*inputs }, &o, lse, &upstream);
    let Gradients { d_q, d_k, d_v, d_sink_logits, d_alibi_slopes, d_bias } = &mut gradients;
    range::scale(d_v, d_o_unit);
    for gradient in [d_q, d_k].into_iter().chain(d_sink_logits).chain(d_alibi_slopes).chain(d_bias) {
        range::scale(gradient, d_s_unit);
    }
    gradients
}

/// The pass in f32, on operands that have been checked.
fn backward_on(
    arch: Arch,
    problem: &Problem,
    inputs: &Inputs<'_>,
    o: &[f32],
    lse: &[f32],
    upstream: &Upstream<'_>,
) -> Gradients {
    let s = problem.shape();
    let layout = problem.options().layout;
    let queries = |data, width| Rows::new(data, layout, s.heads, s.seq_q, width);
    let keys = |data, width| Rows::new(data, layout, s.kv_heads, s.seq_k, width);

    let (lse, delta) = row_terms(problem, o, lse, upstream);
    let sweep = Sweep {
        arch,
        problem,
        queries: (queries(inputs.q, s.head_dim), queries(upstream.d_o, s.value_dim)),
        keys: (keys(inputs.k, s.head_dim), keys(inputs.v, s.value_dim)),
        lse: &lse,
        delta: &delta,
    };
    let mut gradients = Gradients {
        d_q: vec![0.0; inputs.q.len()],
        d_k: vec![0.0; inputs.k.len()],
        d_v: vec![0.0; inputs.v.len()],
        d_sink_logits: d_sink_logits(problem, inputs, &lse, &delta),
        d_alibi_slopes: None,
        d_bias: None,
    };
    sweep.run(Side::Queries, &mut gradients.d_q, None);
    sweep.run(Side::Keys, &mut gradients.d_k, Some(&mut gradients.d_v));
    gradients
}

/// What the gradients of a row's scores need beside the operands: lse, and delta less d_lse.
///
/// Rows without any weight, whose lse is -inf, get +inf, with which every probability becomes 0.
fn row_terms(problem: &Problem, o: &[f32], lse: &[f32], upstream: &Upstream<'_>) -> (Vec<f32>, Vec<f32>) {
    let s = problem.shape();
    let rows = |data| Rows::new(data, problem.options().layout, s.heads, s.seq_q, s.value_dim);
    let (o, d_o) = (rows(o), rows(upstream.d_o));
    (0..lse.len())
        .into_par_iter()
        .map(|n| {
            if lse[n] == f32::NEG_INFINITY {
                return (f32::INFINITY, 0.0);
            }
            let (b, h, i) = (n / s.seq_q / s.heads, n / s.seq_q % s.heads, n % s.seq_q);
            let products = o.row(b, h, i).iter().zip(d_o.row(b, h, i)).map(|(&x, &y)| f64::from(x) * f64::from(y));
            let d_lse = upstream.d_lse.map_or(0.0, |d_lse| f64::from(d_lse[n]));
            (lse[n], (products.sum::<f64>() - d_lse) as f32)
        })
        .unzip()
}

/// The gradient by the sink logits. In f64, as it is a sum over all rows of a head.
fn d_sink_logits(problem: &Problem, inputs: &Inputs<'_>, lse: &[f32], delta: &[f32]) -> Option<Vec<f32>> {
    let s = problem.shape();
    let head = |h| {
        let sink = sink_logit(problem, inputs, h)?;
        let rows = (0..s.batch).flat_map(|b| (b * s.heads + h) * s.seq_q..(b * s.heads + h + 1) * s.seq_q);
        let terms = rows.map(|n| sink_weight(sink, lse[n].into()) * f64::from(delta[n]));
        Some(-terms.sum::<f64>() as f32)
    };
    let per_head = problem.options().sink_logits == SinkLogits::PerHead;
    if per_head { (0..s.heads).into_par_iter().map(head).collect() } else { None }
}

/// A side of the score matrix.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Side {
    Queries,
    Keys,
}

impl Side {
    fn other(self) -> Self {
        match self {
            Side::Queries => Side::Keys,
            Side::Keys => Side::Queries,
        }
    }
}

/// Rows of one head of one sequence.
struct Tile {
    batch: usize,
    head: usize,
    rows: Range<usize>,
}

/// A tile that stays, with the tiles that pass by and its rows of the results.
struct Item<'a> {
    tile: Tile,
    passing: Vec<Tile>,
    d_x: Vec<&'a mut [f32]>,
    d_y: Vec<&'a mut [f32]>,
}

/// Both sweeps. The operand that the scores come from is x, the other y: q and d_o, k and v.
struct Sweep<'a> {
    arch: Arch,
    problem: &'a Problem,
    queries: (Rows<'a>, Rows<'a>),
    keys: (Rows<'a>, Rows<'a>),
    lse: &'a [f32],
    delta: &'a [f32],
}

impl<'a> Sweep<'a> {
    /// Computes the gradients of the side that stays: by x, and if wanted by y.
    fn run(&self, side: Side, d_x: &mut [f32], d_y: Option<&mut [f32]>) {
        let mut items = self.items(side, d_x, d_y);
        let splits = FEW_ITEMS / items.len();
        // Long items first: the short ones then even out the end.
        items.sort_by_key(|item| Reverse(item.passing.len()));
        items.into_iter().par_bridge().for_each_init(
            || State::new(self.problem),
            |state, item| {
                let splits = splits.min(item.passing.len() / SPLIT_TILES);
                if splits <= 1 {
                    self.attend(side, &item.tile, &item.passing, state);
                    item.finish(self.problem, std::slice::from_ref(state));
                } else {
                    let states: Vec<State> = (0..splits)
                        .into_par_iter()
                        .map(|n| {
                            let range = item.passing.len() * n / splits..item.passing.len() * (n + 1) / splits;
                            let mut state = State::new(self.problem);
                            self.attend(side, &item.tile, &item.passing[range], &mut state);
                            state
                        })
                        .collect();
                    item.finish(self.problem, &states);
                }
            },
        );
    }

    /// Cuts a side into items, ordered by batch, head and position.
    fn items<'b>(&self, side: Side, d_x: &'b mut [f32], d_y: Option<&'b mut [f32]>) -> Vec<Item<'b>> {
        let s = self.problem.shape();
        let (heads, seq) = match side {
            Side::Queries => (s.heads, s.seq_q),
            Side::Keys => (s.kv_heads, s.seq_k),
        };
        // Equal tiles rather than a short last one.
        let len = seq.div_ceil(seq.div_ceil(TILE));
        let mut items = Vec::with_capacity(s.batch * heads * seq.div_ceil(len));
        for batch in 0..s.batch {
            for head in 0..heads {
                for start in (0..seq).step_by(len) {
                    let tile = Tile { batch, head, rows: start..(start + len).min(seq) };
                    items.push(Item { passing: self.passing(side, &tile), tile, d_x: Vec::new(), d_y: Vec::new() });
                }
            }
        }
        // In either layout, the rows of one head come in the order of their positions.
        let layout = self.problem.options().layout;
        let index = |[b, h, i]: [usize; 3]| (b * heads + h) * seq.div_ceil(len) + i / len;
        for (row, d_x) in rows_mut(d_x, layout, heads, seq, s.head_dim) {
            items[index(row)].d_x.push(d_x);
        }
        for (row, d_y) in d_y.into_iter().flat_map(|d_y| rows_mut(d_y, layout, heads, seq, s.value_dim)) {
            items[index(row)].d_y.push(d_y);
        }
        items
    }

    /// The tiles of the other side that have something to do with a tile.
    fn passing(&self, side: Side, tile: &Tile) -> Vec<Tile> {
        let (mask, group) = (&self.problem.sequence(0).band, self.problem.group());
        let tiles = |head: usize, seq: usize, n: usize| Tile {
            batch: tile.batch,
            head,
            rows: n * TILE..((n + 1) * TILE).min(seq),
        };
        match side {
            Side::Queries => {
                let keys = mask.key_tiles(&tile.rows, TILE);
                keys.iter().map(|n| tiles(tile.head / group, self.problem.shape().seq_k, n)).collect()
            }
            Side::Keys => {
                let heads = tile.head * group..(tile.head + 1) * group;
                let queries = mask.query_tiles(&tile.rows, TILE);
                let tiles = &tiles;
                heads.flat_map(|h| queries.clone().map(move |n| tiles(h, self.problem.shape().seq_q, n))).collect()
            }
        }
    }

    fn operands(&self, side: Side) -> (Rows<'a>, Rows<'a>) {
        match side {
            Side::Queries => self.queries,
            Side::Keys => self.keys,
        }
    }

    /// lse and delta of a tile of queries.
    fn row_terms(&self, queries: &Tile) -> (&'a [f32], &'a [f32]) {
        let [_, heads, seq_q] = self.problem.lse_shape();
        let start = (queries.batch * heads + queries.head) * seq_q;
        let range = start + queries.rows.start..start + queries.rows.end;
        (&self.lse[range.clone()], &self.delta[range])
    }

    fn attend(&self, side: Side, tile: &Tile, passing: &[Tile], state: &mut State) {
        self.arch.dispatch(Attend { sweep: self, mask: &self.problem.sequence(0).band, side, tile, passing, state });
    }
}

impl Item<'_> {
    /// Adds up what the splits of the passing side have summed.
    fn finish(self, problem: &Problem, states: &[State]) {
        let write = |rows: Vec<&mut [f32]>, factor: f32, sum: fn(&State) -> &[f32]| {
            for (r, row) in rows.into_iter().enumerate() {
                for state in states {
                    let (panel, width) = (state.panel, row.len());
                    let column = sum(state)[r / panel * panel * width..][..panel * width].chunks_exact(panel);
                    for (x, sum) in row.iter_mut().zip(column) {
                        *x += factor * sum[r % panel];
                    }
                }
            }
        };
        write(self.d_x, problem.scale(), |state| &state.d_x);
        write(self.d_y, 1.0, |state| &state.d_y);
    }
}

/// What a tile has summed so far, and scratch. Allocated once a thread (or split).
struct State {
    /// Rows of a panel.
    panel: usize,
    /// The tile's rows, signed as the scores want them: `[panel][head_dim][row]`.
    x: Vec<f32>,
    /// `[panel][value_dim][row]`.
    y: Vec<f32>,
    /// `[row]`, if the tile's rows are queries.
    lse: Vec<f32>,
    delta: Vec<f32>,
    /// Scores, then probabilities of one panel: `[passing][row]`.
    p: Vec<f32>,
    /// Gradients by the probabilities, then by the scores.
    d_s: Vec<f32>,
    /// Sum of d_s with the passing x: `[panel][head_dim][row]`.
    d_x: Vec<f32>,
    /// Sum of p with the passing y: `[panel][value_dim][row]`.
    d_y: Vec<f32>,
}

impl State {
    fn new(problem: &Problem) -> Self {
        let rows = |width| vec![0.0; TILE * width];
        let (d, e) = (problem.shape().head_dim, problem.shape().value_dim);
        State {
            panel: 1,
            x: rows(d),
            y: rows(e),
            lse: rows(1),
            delta: rows(1),
            p: rows(TILE),
            d_s: rows(TILE),
            d_x: rows(d),
            d_y: rows(e),
        }
    }
}

/// One tile against some of those that pass by: a function of its fields, generic over the instruction set.
struct Attend<'a> {
    sweep: &'a Sweep<'a>,
    mask: &'a Band,
    side: Side,
    tile: &'a Tile,
    passing: &'a [Tile],
    state: &'a mut State,
}

impl WithSimd for Attend<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        // As in the forward pass.
        if self.tile.rows.len() <= S::F32_LANES {
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
        self.load(NV * S::F32_LANES);
        let (x, y) = self.sweep.operands(self.side.other());
        let one = [simd.splat_f32s(1.0); NV];
        for passing in self.passing {
            let (x, y) = (x.head(passing.batch, passing.head), y.head(passing.batch, passing.head));
            let rows = passing.rows.clone();
            let masked = match self.side {
                Side::Queries => !self.mask.all_visible(&self.tile.rows, &rows),
                Side::Keys => !self.mask.all_visible(&rows, &self.tile.rows),
            };
            // In a product even a gradient of 0 lets NaN through.
            let exact = masked && !(x.is_finite(rows.clone()) && y.is_finite(rows.clone()));
            for panel in 0..self.tile.rows.len().div_ceil(NV * S::F32_LANES) {
                let state = &mut *self.state;
                let own_x = column::<S, NV>(&state.x, panel, x.width());
                let own_y = column::<S, NV>(&state.y, panel, y.width());
                products::<S, NV, NR>(simd, panels_mut::<S, NV>(&mut state.p), own_x, x, rows.clone());
                products::<S, NV, NR>(simd, panels_mut::<S, NV>(&mut state.d_s), own_y, y, rows.clone());
                self.score_gradients::<S, NV>(simd, panel, passing);
                if masked {
                    self.hide(panel, rows.clone());
                }

                let state = &mut *self.state;
                let (p, d_s) = (panels::<S, NV>(&state.p), panels::<S, NV>(&state.d_s));
                let d_x = column_mut::<S, NV>(&mut state.d_x, panel, x.width());
                let d_y = column_mut::<S, NV>(&mut state.d_y, panel, y.width());
                if exact {
                    let own = self.tile.rows.start + panel * state.panel..self.tile.rows.end;
                    let visible = |lane, n| match self.side {
                        _ if lane >= own.len() => false,
                        Side::Queries => self.mask.visible(own.start + lane, n),
                        Side::Keys => self.mask.visible(n, own.start + lane),
                    };
                    accumulate_visible::<S, NV>(d_x, one, d_s, x, rows.clone(), visible);
                    if self.side == Side::Keys {
                        accumulate_visible::<S, NV>(d_y, one, p, y, rows.clone(), visible);
                    }
                } else {
                    accumulate::<S, NV, NR>(simd, d_x, one, d_s, x, rows.clone());
                    if self.side == Side::Keys {
                        accumulate::<S, NV, NR>(simd, d_y, one, p, y, rows.clone());
                    }
                }
            }
        }
    }

    /// Clears the sums, and copies the tile's rows into the state by panels.
    fn load(&mut self, panel: usize) {
        let state = &mut *self.state;
        state.panel = panel;
        state.d_x.fill(0.0);
        state.d_y.fill(0.0);
        let Tile { batch, head, rows } = self.tile;
        let (x, y) = self.sweep.operands(self.side);
        let (_, sign) = factor_and_sign(self.sweep.problem.scale());
        for (buffer, operand, factor) in
            [(&mut state.x, x.head(*batch, *head), sign), (&mut state.y, y.head(*batch, *head), 1.0)]
        {
            let width = operand.width();
            for (r, row) in operand.rows(rows.clone()).enumerate() {
                let column = buffer[r / panel * panel * width..][..panel * width].chunks_exact_mut(panel);
                for (out, &x) in column.zip(row) {
                    out[r % panel] = factor * x;
                }
            }
        }
        if self.side == Side::Queries {
            let (lse, delta) = self.sweep.row_terms(self.tile);
            state.lse[..lse.len()].copy_from_slice(lse);
            state.delta[..delta.len()].copy_from_slice(delta);
        }
    }

    /// Turns scores into probabilities, and gradients by those into gradients by the scores.
    #[inline(always)]
    fn score_gradients<S: Simd, const NV: usize>(&mut self, simd: S, panel: usize, passing: &Tile) {
        let State { p, d_s, lse, delta, .. } = &mut *self.state;
        let rows = panels_mut::<S, NV>(p).iter_mut().zip(panels_mut::<S, NV>(d_s)).take(passing.rows.len());
        let (factor, _) = factor_and_sign(self.sweep.problem.scale());
        match self.side {
            Side::Queries => {
                let (lse, delta) = (panels::<S, NV>(lse)[panel], panels::<S, NV>(delta)[panel]);
                for (p, d_s) in rows {
                    score_gradient(simd, p, d_s, factor, lse, delta);
                }
            }
            Side::Keys => {
                let (lse, delta) = self.sweep.row_terms(passing);
                for ((p, d_s), (&lse, &delta)) in rows.zip(lse.iter().zip(delta)) {
                    let (lse, delta) = ([simd.splat_f32s(lse); NV], [simd.splat_f32s(delta); NV]);
                    score_gradient(simd, p, d_s, factor, lse, delta);
                }
            }
        }
    }

    /// Zeroes what belongs to keys that a query does not see.
    fn hide(&mut self, panel: usize, passing: Range<usize>) {
        let width = self.state.panel;
        let start = self.tile.rows.start + panel * width;
        let own = start..(start + width).min(self.tile.rows.end);
        let hidden = |query: usize, keys: Range<usize>| self.mask.hidden_keys(query, &keys).into_iter().flatten();
        match self.side {
            Side::Queries => {
                for (lane, i) in own.enumerate() {
                    for j in hidden(i, passing.clone()) {
                        self.state.d_s[(j - passing.start) * width + lane] = 0.0;
                    }
                }
            }
            Side::Keys => {
                for (n, i) in passing.enumerate() {
                    for j in hidden(i, own.clone()) {
                        self.state.p[n * width + j - own.start] = 0.0;
                        self.state.d_s[n * width + j - own.start] = 0.0;
                    }
                }
            }
        }
    }
}

/// `p = exp(factor * p - lse)`, `d_s = p * (d_s - delta)`.
#[inline(always)]
fn score_gradient<S: Simd, const NV: usize>(
    simd: S,
    p: &mut Panel<S, NV>,
    d_s: &mut Panel<S, NV>,
    factor: f32,
    lse: Panel<S, NV>,
    delta: Panel<S, NV>,
) {
    let factor = simd.splat_f32s(factor);
    for v in 0..NV {
        // Fused: as in the forward pass, the score itself is never rounded.
        p[v] = exp(simd, simd.mul_add_e_f32s(p[v], factor, simd.neg_f32s(lse[v])));
        d_s[v] = simd.mul_f32s(p[v], simd.sub_f32s(d_s[v], delta[v]));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::{forward, reference};
    use crate::problem::{Options, Shape, Window};

    /// `tests/cpu` covers the best instruction set of the machine; this, the others.
    #[test]
    fn every_instruction_set() {
        let mut archs = vec![Arch::Scalar, Arch::new()];
        #[cfg(target_arch = "x86_64")]
        archs.extend(pulp::x86::V3::try_new().map(Arch::V3));
        for (m, n) in [(1, 257), (5, 70), (113, 203), (70, 5)] {
            let shape = Shape { batch: 1, heads: 4, kv_heads: 2, seq_q: m, seq_k: n, head_dim: 33, value_dim: 21 };
            let options = Options::new().window(Window::keys(90)).sink_tokens(5).sink_logits(SinkLogits::PerHead);
            let problem = Problem::new(shape, options).unwrap();
            let wave = |shape: [usize; 4], step: f32| -> Vec<f32> {
                (0..shape.iter().product()).map(|x| 2.0 * (x as f32 * step).sin()).collect()
            };
            let (q, k, v) = (wave(problem.q_shape(), 0.7), wave(problem.k_shape(), 1.3), wave(problem.v_shape(), 2.1));
            let d_o = wave(problem.o_shape(), 1.7);
            let inputs = Inputs::new(&q, &k, &v).sink_logits(&[0.0, -1.0, 2.0, 1.0][..]);
            let upstream = Upstream { d_o: &d_o, d_lse: None };
            let expected = reference::backward(&problem, &inputs, &upstream).unwrap();
            let saved = forward(&problem, &inputs).unwrap();
            let expected = [expected.d_q, expected.d_k, expected.d_v, expected.d_sink_logits.unwrap()].concat();
            for &arch in &archs {
                let x = backward_on(arch, &problem, &inputs, &saved.o, &saved.lse, &upstream);
                let actual = [x.d_q, x.d_k, x.d_v, x.d_sink_logits.unwrap()].concat();
                assert_eq!(actual.len(), expected.len());
                for (x, y) in actual.iter().zip(&expected) {
                    assert!((f64::from(*x) - y).abs() <= 1e-5 * (1.0 + y.abs()), "{arch:?} {problem}: {x}, not {y}");
                }
            }
        }
    }
}
