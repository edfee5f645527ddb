//! Tiled backward pass in f32 on all cores. The three sweeps share tiles, splits and accumulators, so they are in one file.
//!
//! Two sweeps visit the visible tiles of the score matrix. In each sweep one side of the matrix stays (a tile of its rows lies along the
//! lanes), and the other side passes by:
//!
//! ```text
//!           stays    passes   s, d_p           sums
//! d_q       q, d_o   k, v     k q, v d_o       d_q = scale d_s k
//! d_k, d_v  k, v     q, d_o   q k, d_o v       d_k = scale d_s q,  d_v = p d_o
//!
//! p = exp(scale * s - lse),  d_s = p * (d_p - delta),  delta = d_o . o - d_lse
//! ```
//!
//! A third sweep sums d_s alone: for each tile of a bias, over the pairs that the tile is added to. Softcap's derivative is a factor of d_s
//! in the first two sweeps only, because the bias is added after softcap. The scores are therefore formed several times. In return every
//! result has one writer and one order of summation. Scores come from the forward pass's own functions, so they have its bits, and the
//! saved lse and o fit them exactly.

use std::cmp::Reverse;
use std::ops::Range;

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::exact;
use super::reference::{sink_logit, sink_weight};
use super::rows::{Head, Places, Rows, Side, rows_mut};
use super::scores::{RowTile, Scores, Seen, TILE, zeros};
use super::simd::{Panel, accumulate, accumulate_visible, column, column_mut, exp, panels, panels_mut, products};
use super::tiled::{FEW_ITEMS, SPLIT_TILES, forward_widened, widen_bias};
use crate::problem::element::Element;
use crate::problem::error::Result;
use crate::problem::varlen::Sequence;
use crate::problem::{Axes, Gradients, Inputs, Layout, Output, Problem, SinkLogits, Upstream};

/// Rows of a tile of the bias. It has several tiles of queries, because loading its keys costs as much as a tile's products.
const BIAS_ROWS: usize = 4 * TILE;
/// Tiles of queries that pass by a tile of the bias in one step.
const BIAS_STEPS: usize = 16;

/// Backward pass on all cores of the CPU, from the results of the forward pass. It computes in f32 whatever the operands are, and rounds
/// d_q, d_k and d_v once.
///
/// `delta_i = d_o_i . o_i` is summed from the saved o in f32. In half precision o has been rounded, and delta would inherit that error,
/// which is too large for d_sink_logits, a sum whose terms cancel. So the rounding error, the saved o_lo, is added to o. Without o_lo, o is
/// computed anew by its definition, `o_i = sum_j p_ij v_j`, so that delta amounts to `sum_j p_ij (d_o_i . v_j)`. This costs another forward
/// pass, and the saved o is then checked for its length only.
///
/// The result has the same bits in every run, for any number of threads. In f32, and in half precision with o_lo, `saved` may also be the
/// final o and lse of an attention over more keys than these. The gradients are then this shard's share, except the gradient by the sink
/// logits, which is whole in every shard.
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
    let (q, k, v) = (T::widen(inputs.q), T::widen(inputs.k), T::widen(inputs.v));
    let bias = inputs.bias.map(widen_bias);
    let inputs = inputs.with_operands([&q, &k, &v], bias.as_deref());
    let d_o = T::widen(upstream.d_o);
    let upstream = Upstream { d_o: &d_o, d_lse: upstream.d_lse };
    let o = match (T::DTYPE.has_rounding_error(), &saved.o_lo) {
        (false, _) => T::widen(&saved.o),
        (true, Some(o_lo)) => saved.o.par_iter().zip(o_lo).map(|(o, &rest)| o.with_lo(rest)).collect(),
        (true, None) => forward_widened(problem, &inputs).o.into(),
    };
    let Gradients { d_q, d_k, d_v, d_sink_logits, d_alibi_slopes, d_bias } =
        backward_widened(problem, &inputs, &o, &saved.lse, &upstream);
    let [d_q, d_k, d_v] = [d_q, d_k, d_v].map(T::narrow);
    Ok(Gradients { d_q, d_k, d_v, d_sink_logits, d_alibi_slopes, d_bias })
}

/// The pass on operands of any element type, which have been checked and widened. The gradients are not rounded.
fn backward_widened(
    problem: &Problem,
    inputs: &Inputs<'_>,
    o: &[f32],
    lse: &[f32],
    upstream: &Upstream<'_>,
) -> Gradients {
    let mut gradients = backward_on(Arch::new(), problem, inputs, o, lse, upstream);
    // f32 has no room for products of d_o and v, and for sums of them, where bf16 numbers are largest.
    if problem.options().dtype.overflows_f32_sums() {
        exact::backward(problem, inputs, (o, lse), upstream, &mut gradients);
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

    let (lse, delta) = row_stats(problem, inputs, o, lse, upstream);
    let scores = Scores::new(problem, inputs);
    let shares = scores.shares(&lse);
    let sweep = Sweep {
        arch,
        problem,
        scores,
        queries: (queries(inputs.q, s.head_dim), queries(upstream.d_o, s.value_dim)),
        keys: (keys(inputs.k, s.head_dim), keys(inputs.v, s.value_dim)),
        lse: &lse,
        delta: &delta,
        shares: shares.as_deref(),
    };
    let mut gradients = Gradients {
        d_q: vec![0.0; inputs.q.len()],
        d_k: vec![0.0; inputs.k.len()],
        d_v: vec![0.0; inputs.v.len()],
        d_sink_logits: d_sink_logits(problem, inputs, &lse, &delta),
        d_alibi_slopes: None,
        d_bias: problem.options().bias.map(|axes| sweep.d_bias(axes)),
    };
    let d_alibi_slopes = sweep.run(Side::Queries, &mut gradients.d_q, None);
    gradients.d_alibi_slopes = problem.options().alibi.then_some(d_alibi_slopes);
    sweep.run(Side::Keys, &mut gradients.d_k, Some(&mut gradients.d_v));
    gradients
}

/// The lse of each row, and its delta less d_lse.
///
/// A row without any weight, whose lse is -inf, gets an lse of +inf, so that every probability becomes 0. So do rows beyond the lengths in
/// use.
fn row_stats(
    problem: &Problem,
    inputs: &Inputs<'_>,
    o: &[f32],
    lse: &[f32],
    upstream: &Upstream<'_>,
) -> (Vec<f32>, Vec<f32>) {
    let s = problem.shape();
    let used = |b| match problem.options().layout {
        Layout::Thd => s.seq_q,
        Layout::Bshd | Layout::Bhsd => problem.sequence(b).band.seq_q(),
    };
    let delta = exact::Delta::new(problem, o, upstream);
    (0..lse.len())
        .into_par_iter()
        .map(|n| {
            let (b, h, i) = (n / s.seq_q / s.heads, n / s.seq_q % s.heads, n % s.seq_q);
            if lse[n] == f32::NEG_INFINITY || i >= used(b) {
                return (f32::INFINITY, 0.0);
            }
            (lse[n], delta.of(problem, inputs, [b, h, i], lse[n]) as f32)
        })
        .unzip()
}

/// The gradient by the sink logits, summed in f64 because it is a sum over all rows of a head.
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

/// Rows of one head of one sequence, counted from its start.
struct Tile {
    sequence: usize,
    head: usize,
    rows: Range<usize>,
}

impl Tile {
    /// The n-th tile of a head of the other side, which has `count` rows.
    fn other(&self, head: usize, n: usize, count: usize) -> Tile {
        Tile { sequence: self.sequence, head, rows: n * TILE..((n + 1) * TILE).min(count) }
    }

    /// The tile as a tile of queries.
    fn queries(&self) -> RowTile {
        RowTile { sequence: self.sequence, heads: self.head..self.head + 1, queries: self.rows.clone() }
    }
}

/// A tile that stays, the tiles that pass by it, and its rows of the results.
struct Item<'a> {
    /// Place in the order of summation.
    number: usize,
    tile: Tile,
    passing: Vec<Tile>,
    d_x: Vec<&'a mut [f32]>,
    d_y: Vec<&'a mut [f32]>,
}

/// The results that a sweep sums.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Sums {
    /// The gradients of the operands of the side that stays.
    Operands,
    /// d_s alone, in tiles of the bias with this number of rows.
    Bias { rows: usize },
}

/// All sweeps. x is the operand that the scores come from (q or k), and y the other one (d_o or v).
struct Sweep<'a> {
    arch: Arch,
    problem: &'a Problem,
    scores: Scores<'a>,
    queries: (Rows<'a>, Rows<'a>),
    keys: (Rows<'a>, Rows<'a>),
    lse: &'a [f32],
    delta: &'a [f32],
    /// See [`Scores::shares`].
    shares: Option<&'a [f32]>,
}

impl<'a> Sweep<'a> {
    /// Computes the gradients of the side that stays: by x, and if wanted by y. Returns the gradients by the slopes of ALiBi if queries
    /// stay.
    fn run(&self, side: Side, d_x: &mut [f32], d_y: Option<&mut [f32]>) -> Vec<f32> {
        let mut items = self.items(side, d_x, d_y);
        let splits = FEW_ITEMS / items.len().max(1);
        // Long items come first, so that the short ones even out the end.
        items.sort_by_key(|item| Reverse(item.passing.len()));
        let new = || State::new(self.problem, Sums::Operands);
        let attend = |tile: &Tile, passing: &[Tile], state: &mut State| {
            self.attend(Sums::Operands, side, tile, passing, state);
        };
        let terms = items.into_iter().par_bridge().map_init(new, |state, item| {
            let splits = splits.min(item.passing.len() / SPLIT_TILES);
            let (number, head) = (item.number, item.tile.head);
            let d_slope = if splits <= 1 {
                attend(&item.tile, &item.passing, state);
                item.finish(self.problem, std::slice::from_ref(state))
            } else {
                let states: Vec<State> = (0..splits)
                    .into_par_iter()
                    .map(|n| {
                        let range = item.passing.len() * n / splits..item.passing.len() * (n + 1) / splits;
                        let mut state = new();
                        attend(&item.tile, &item.passing[range], &mut state);
                        state
                    })
                    .collect();
                item.finish(self.problem, &states)
            };
            (number, head, d_slope)
        });
        let mut terms: Vec<(usize, usize, f64)> = terms.collect();
        terms.sort_unstable_by_key(|&(number, ..)| number);
        let mut d_slopes = vec![0.0; self.problem.shape().heads];
        terms.into_iter().for_each(|(_, head, d_slope)| d_slopes[head] += d_slope);
        d_slopes.into_iter().map(|d_slope| d_slope as f32).collect()
    }

    /// Cuts a side into items, ordered by sequence, head and position.
    fn items<'b>(&self, side: Side, d_x: &'b mut [f32], d_y: Option<&'b mut [f32]>) -> Vec<Item<'b>> {
        let s = self.problem.shape();
        let (heads, seq) = match side {
            Side::Queries => (s.heads, s.seq_q),
            Side::Keys => (s.kv_heads, s.seq_k),
        };
        let (mut items, mut cuts) = (Vec::new(), Vec::with_capacity(self.problem.sequence_count()));
        for (sequence, band) in self.problem.sequences().map(|sequence| sequence.band).enumerate() {
            let rows = match side {
                Side::Queries => band.seq_q(),
                Side::Keys => band.seq_k(),
            };
            // Tiles are of equal length, so that the last one is not short.
            let len = rows.div_ceil(rows.div_ceil(TILE).max(1)).max(1);
            cuts.push((items.len(), rows, len));
            for head in 0..heads {
                for start in (0..rows).step_by(len) {
                    let tile = Tile { sequence, head, rows: start..(start + len).min(rows) };
                    let (number, passing) = (items.len(), self.passing(side, &tile));
                    items.push(Item { number, passing, tile, d_x: Vec::new(), d_y: Vec::new() });
                }
            }
        }
        // In every layout the rows of one head are in the order of their positions.
        let layout = self.problem.options().layout;
        let places = Places::new(self.problem, side);
        let item = |[b, h, i]: [usize; 3]| {
            let [sequence, i] = places.find(b, i);
            let (first, rows, len) = cuts[sequence];
            (i < rows).then(|| first + h * rows.div_ceil(len) + i / len)
        };
        for (row, d_x) in rows_mut(d_x, layout, heads, seq, s.head_dim) {
            let Some(n) = item(row) else { continue };
            items[n].d_x.push(d_x);
        }
        for (row, d_y) in d_y.into_iter().flat_map(|d_y| rows_mut(d_y, layout, heads, seq, s.value_dim)) {
            let Some(n) = item(row) else { continue };
            items[n].d_y.push(d_y);
        }
        items
    }

    /// The tiles of the other side with which a tile has visible pairs.
    fn passing(&self, side: Side, tile: &Tile) -> Vec<Tile> {
        let (band, group) = (self.problem.sequence(tile.sequence).band, self.problem.heads_per_kv());
        match side {
            Side::Queries => {
                let keys = band.key_tiles(&tile.rows, TILE);
                keys.iter().map(|n| tile.other(tile.head / group, n, band.seq_k())).collect()
            }
            Side::Keys => {
                let heads = tile.head * group..(tile.head + 1) * group;
                let queries = band.query_tiles(&tile.rows, TILE);
                heads.flat_map(|h| queries.clone().map(move |n| tile.other(h, n, band.seq_q()))).collect()
            }
        }
    }

    /// The gradient by the bias: d_s, summed over the axes along which the bias is broadcast.
    fn d_bias(&self, axes: Axes) -> Vec<f32> {
        let [sequences, heads, rows, keys] = self.problem.bias_shape().unwrap_or_default();
        let mut d_bias = vec![0.0; sequences * heads * rows * keys];
        // The longest sequences come first, so those that reach a tile of keys come before all others.
        let mut by_keys: Vec<usize> = (0..self.problem.sequence_count()).collect();
        by_keys.sort_by_key(|&n| Reverse(self.problem.sequence(n).band.seq_k()));
        let sums = Sums::Bias { rows: rows.min(BIAS_ROWS) };
        let splits = FEW_ITEMS / (sequences * heads * rows.div_ceil(BIAS_ROWS) * keys.div_ceil(TILE)).max(1);

        let blocks = d_bias.chunks_mut(rows * keys).enumerate().flat_map(|(n, head)| {
            let place = move |(block, rows)| (n / heads, n % heads, block * BIAS_ROWS, rows);
            head.chunks_mut(BIAS_ROWS * keys).enumerate().map(place)
        });
        let blocks: Vec<_> = blocks.collect();
        let few = blocks.len() < FEW_ITEMS;
        let new = || State::new(self.problem, sums);
        blocks.into_par_iter().for_each_init(new, |state, (sequence, head, first, rows)| {
            let tile = |state: &mut State, n: usize| {
                let keys = n * TILE..((n + 1) * TILE).min(keys);
                let own = if axes.batch { std::slice::from_ref(&sequence) } else { &by_keys };
                let heads = if axes.heads { head..head + 1 } else { 0..self.problem.shape().heads };
                let steps = self.bias_steps(own, heads, axes.seq_q.then_some(first), &keys);
                self.bias_tile(&steps, splits, sums, state)
            };
            let tiles = 0..keys.div_ceil(TILE);
            let tiles: Vec<_> = if few {
                tiles.into_par_iter().map_init(new, tile).collect()
            } else {
                tiles.map(|n| tile(state, n)).collect()
            };
            for (n, sums) in tiles.into_iter().enumerate() {
                for (row, sums) in rows.chunks_exact_mut(keys).zip(sums.chunks_exact(TILE)) {
                    row[n * TILE..].iter_mut().zip(sums).for_each(|(x, &sum)| *x = sum);
                }
            }
        });
        d_bias
    }

    /// The steps that are summed into a tile of the bias: tiles of keys, each with the tiles of queries that see some of its keys. `first`
    /// is the tile's first query, if the bias has a row for each query.
    fn bias_steps(
        &self,
        sequences: &[usize],
        heads: Range<usize>,
        first: Option<usize>,
        keys: &Range<usize>,
    ) -> Vec<(Tile, Vec<Tile>)> {
        let group = self.problem.heads_per_kv();
        let mut steps = Vec::new();
        for &sequence in sequences {
            let band = self.problem.sequence(sequence).band;
            let keys = keys.start..keys.end.min(band.seq_k());
            if keys.is_empty() {
                break; // Later sequences are not longer, so they have no keys here either.
            }
            let queries = band.query_tiles(&keys, TILE);
            let queries = match first.map(|first| first / TILE) {
                Some(n) => n.max(queries.start)..(n + BIAS_ROWS / TILE).min(queries.end),
                None => queries,
            };
            for kv_head in heads.start / group..heads.end.div_ceil(group) {
                let tile = || Tile { sequence, head: kv_head, rows: keys.clone() };
                let heads = (kv_head * group).max(heads.start)..((kv_head + 1) * group).min(heads.end);
                let queries = heads.flat_map(|head| queries.clone().map(move |n| (head, n)));
                let mut queries = queries.map(|(head, n)| tile().other(head, n, band.seq_q())).peekable();
                while queries.peek().is_some() {
                    steps.push((tile(), queries.by_ref().take(BIAS_STEPS).collect()));
                }
            }
        }
        steps
    }

    /// Sums d_s over all steps: `[query or 1][key]` of the tile, in f64, because many terms may cancel. The sum is empty if there are no
    /// steps.
    fn bias_tile(&self, steps: &[(Tile, Vec<Tile>)], splits: usize, of: Sums, state: &mut State) -> Vec<f32> {
        let round = |sums: &[f64]| sums.iter().map(|&sum| sum as f32).collect();
        let attend = |steps: &[(Tile, Vec<Tile>)], state: &mut State| {
            state.d_bias.fill(0.0);
            for (tile, passing) in steps {
                self.attend(of, Side::Keys, tile, passing, state);
            }
        };
        if steps.is_empty() {
            return Vec::new();
        }
        if splits.min(steps.len()) <= 1 {
            attend(steps, state);
            return round(&state.d_bias);
        }
        let chunks = steps.par_chunks(steps.len().div_ceil(splits));
        let sums = chunks.map(|steps| {
            let mut state = State::new(self.problem, of);
            attend(steps, &mut state);
            state.d_bias
        });
        let add = |mut sum: Vec<f64>, x: Vec<f64>| {
            sum.iter_mut().zip(x).for_each(|(sum, x)| *sum += x);
            sum
        };
        round(&sums.collect::<Vec<_>>().into_iter().reduce(add).unwrap_or_default())
    }

    /// x and y of one side: the rows of a head from the start of a sequence on.
    fn operands(&self, side: Side, sequence: &Sequence, head: usize) -> (Head<'a>, Head<'a>) {
        let ((x, y), start) = match side {
            Side::Queries => (self.queries, sequence.q_start),
            Side::Keys => (self.keys, sequence.k_start),
        };
        (x.head(sequence.entry, head, start), y.head(sequence.entry, head, start))
    }

    /// lse and delta of a tile of queries.
    fn row_stats(&self, sequence: &Sequence, queries: &Tile) -> (&'a [f32], &'a [f32]) {
        let range = self.in_lse(sequence, queries);
        (&self.lse[range.clone()], &self.delta[range])
    }

    /// The range of a tile of queries in lse.
    fn in_lse(&self, sequence: &Sequence, queries: &Tile) -> Range<usize> {
        let [_, heads, seq_q] = self.problem.lse_shape();
        let start = (sequence.entry * heads + queries.head) * seq_q + sequence.q_start;
        start + queries.rows.start..start + queries.rows.end
    }

    fn attend(&self, sums: Sums, side: Side, tile: &Tile, passing: &[Tile], state: &mut State) {
        let sequence = &self.problem.sequence(tile.sequence);
        self.arch.dispatch(Attend { sweep: self, sums, sequence, side, tile, passing, state });
    }
}

impl Item<'_> {
    /// Adds up the sums of the splits of the passing side, and returns the sum for a slope of ALiBi.
    fn finish(self, problem: &Problem, states: &[State]) -> f64 {
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
        states.iter().flat_map(|state| &state.d_slope[..self.tile.rows.len()]).sum()
    }
}

/// The sums of a tile so far, and scratch. It is allocated once a thread (or split).
struct State {
    /// Rows of a panel.
    panel: usize,
    /// The tile's rows with the sign that the scores need: `[panel][head_dim][row]`.
    x: Vec<f32>,
    /// `[panel][value_dim][row]`.
    y: Vec<f32>,
    /// `[row]`, if the tile's rows are queries.
    lse: Vec<f32>,
    delta: Vec<f32>,
    /// Scores, then probabilities of one panel: `[passing][row]`.
    p: Vec<f32>,
    /// Gradients by the probabilities, then gradients by the scores.
    d_s: Vec<f32>,
    /// Softcap's derivative, with softcap only.
    derivative: Vec<f32>,
    /// Sum of d_s with the passing x: `[panel][head_dim][row]`.
    d_x: Vec<f32>,
    /// Sum of p with the passing y: `[panel][value_dim][row]`.
    d_y: Vec<f32>,
    /// ALiBi's `-sum |p - j| d_s`: `[row]`.
    d_slope: Vec<f64>,
    /// Sum of d_s: `[query or 1][key]`.
    d_bias: Vec<f64>,
}

impl State {
    fn new(problem: &Problem, sums: Sums) -> Self {
        let rows = |width| vec![0.0; TILE * width];
        let (d, e) = (problem.shape().head_dim, problem.shape().value_dim);
        let if_operands = |width| if sums == Sums::Operands { width } else { 0 };
        let bias_rows = match sums {
            Sums::Operands => 0,
            Sums::Bias { rows } => rows,
        };
        State {
            panel: 1,
            x: rows(d),
            y: rows(e),
            lse: rows(1),
            delta: rows(1),
            p: rows(TILE),
            d_s: rows(TILE),
            derivative: rows(if_operands(problem.options().softcap.map_or(0, |_| TILE))),
            d_x: rows(if_operands(d)),
            d_y: rows(if_operands(e)),
            d_slope: vec![0.0; TILE],
            d_bias: vec![0.0; bias_rows * TILE],
        }
    }
}

/// One tile against some of the tiles that pass by: a function of its fields, generic over the instruction set.
struct Attend<'a> {
    sweep: &'a Sweep<'a>,
    sums: Sums,
    sequence: &'a Sequence,
    side: Side,
    tile: &'a Tile,
    passing: &'a [Tile],
    state: &'a mut State,
}

impl WithSimd for Attend<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        // Panels are chosen as in the forward pass.
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
        let one = [simd.splat_f32s(1.0); NV];
        for passing in self.passing {
            let (x, y) = self.sweep.operands(self.side.other(), self.sequence, passing.head);
            let rows = passing.rows.clone();
            let (queries, keys) = match self.side {
                Side::Queries => (self.tile.queries(), &passing.rows),
                Side::Keys => (passing.queries(), &self.tile.rows),
            };
            let pairs = (&queries, keys);
            let seen = match self.sweep.scores.seen(&queries, keys) {
                Seen::None => continue,
                Seen::All => None,
                Seen::Some(seen) => Some(seen),
            };
            // A product lets NaN through even where the gradient is 0.
            let exact = seen
                .filter(|_| self.sums == Sums::Operands && !(x.is_finite(rows.clone()) && y.is_finite(rows.clone())));
            for panel in 0..self.tile.rows.len().div_ceil(NV * S::F32_LANES) {
                let state = &mut *self.state;
                let own_x = column::<S, NV>(&state.x, panel, x.width());
                let own_y = column::<S, NV>(&state.y, panel, y.width());
                let s = &mut panels_mut::<S, NV>(&mut state.p)[..rows.len()];
                products::<S, NV, NR>(simd, s, own_x, x, rows.clone());
                products::<S, NV, NR>(simd, panels_mut::<S, NV>(&mut state.d_s), own_y, y, rows.clone());
                let derivatives = panels_mut::<S, NV>(&mut state.derivative);
                self.sweep.scores.form::<S, NV>(simd, self.side, pairs, panel, s, derivatives);
                self.score_gradients::<S, NV>(simd, panel, passing);
                if let Some(shares) = self.sweep.shares {
                    self.share(shares, panel, passing);
                }
                if let Some(seen) = &seen {
                    self.hide(panel, seen, rows.len());
                }

                let state = &mut *self.state;
                let d_s = &mut panels_mut::<S, NV>(&mut state.d_s)[..rows.len()];
                if self.sums != Sums::Operands {
                    add_bias_gradients::<S, NV>(panel, self.tile, passing, d_s, &mut state.d_bias);
                    continue;
                }
                if self.side == Side::Queries {
                    self.sweep.scores.add_slope_gradients::<S, NV>(pairs, panel, d_s, &mut state.d_slope);
                }
                for (d_s, derivative) in d_s.iter_mut().zip(panels::<S, NV>(&state.derivative)) {
                    for v in 0..NV {
                        d_s[v] = simd.mul_f32s(d_s[v], derivative[v]);
                    }
                }
                let (p, d_s) = (panels::<S, NV>(&state.p), panels::<S, NV>(&state.d_s));
                let d_x = column_mut::<S, NV>(&mut state.d_x, panel, x.width());
                let d_y = column_mut::<S, NV>(&mut state.d_y, panel, y.width());
                if let Some(seen) = &exact {
                    let first = panel * state.panel;
                    let visible = |lane: usize, n: usize| match self.side {
                        Side::Queries => seen[first + lane] >> (n - rows.start) & 1 != 0,
                        Side::Keys => seen[n - rows.start] >> (first + lane) & 1 != 0,
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

    /// Clears the sums over operands, and copies the tile's rows into the state by panels.
    fn load(&mut self, panel: usize) {
        let state = &mut *self.state;
        state.panel = panel;
        state.d_x.fill(0.0);
        state.d_y.fill(0.0);
        state.d_slope.fill(0.0);
        let Tile { head, rows, .. } = self.tile;
        let (x, y) = self.sweep.operands(self.side, self.sequence, *head);
        for (buffer, operand, factor) in [(&mut state.x, x, self.sweep.scores.sign), (&mut state.y, y, 1.0)] {
            let width = operand.width();
            for (r, row) in operand.rows(rows.clone()).enumerate() {
                let column = buffer[r / panel * panel * width..][..panel * width].chunks_exact_mut(panel);
                for (out, &x) in column.zip(row) {
                    out[r % panel] = factor * x;
                }
            }
        }
        if self.side == Side::Queries {
            let (lse, delta) = self.sweep.row_stats(self.sequence, self.tile);
            state.lse[..lse.len()].copy_from_slice(lse);
            state.delta[..delta.len()].copy_from_slice(delta);
        }
    }

    /// Turns scores into probabilities, and gradients by probabilities into gradients by scores.
    #[inline(always)]
    fn score_gradients<S: Simd, const NV: usize>(&mut self, simd: S, panel: usize, passing: &Tile) {
        let State { p, d_s, lse, delta, .. } = &mut *self.state;
        let rows = panels_mut::<S, NV>(p).iter_mut().zip(panels_mut::<S, NV>(d_s)).take(passing.rows.len());
        let factor = self.sweep.scores.factor();
        match self.side {
            Side::Queries => {
                let (lse, delta) = (panels::<S, NV>(lse)[panel], panels::<S, NV>(delta)[panel]);
                for (p, d_s) in rows {
                    score_gradient(simd, p, d_s, factor, lse, delta);
                }
            }
            Side::Keys => {
                let (lse, delta) = self.sweep.row_stats(self.sequence, passing);
                for ((p, d_s), (&lse, &delta)) in rows.zip(lse.iter().zip(delta)) {
                    let (lse, delta) = ([simd.splat_f32s(lse); NV], [simd.splat_f32s(delta); NV]);
                    score_gradient(simd, p, d_s, factor, lse, delta);
                }
            }
        }
    }

    /// Divides the probability of a row among the keys that its lse does not count, see [`Scores::shares`].
    fn share(&mut self, shares: &[f32], panel: usize, passing: &Tile) {
        let State { panel: width, p, d_s, .. } = &mut *self.state;
        let queries = if self.side == Side::Queries { self.tile } else { passing };
        let shares = &shares[self.sweep.in_lse(self.sequence, queries)];
        for n in 0..passing.rows.len() {
            for lane in 0..*width {
                let query = if self.side == Side::Queries { panel * *width + lane } else { n };
                let share = shares.get(query).copied().unwrap_or(1.0);
                p[n * *width + lane] *= share;
                d_s[n * *width + lane] *= share;
            }
        }
    }

    /// Sets probabilities and gradients of keys that a query does not see to 0.
    fn hide(&mut self, panel: usize, seen: &[u64; TILE], passing: usize) {
        let State { panel: width, p, d_s, derivative, .. } = &mut *self.state;
        let (width, first) = (*width, panel * *width);
        let own = (self.tile.rows.len() - first).min(width);
        let mut zero = |n: usize, lane: usize| {
            p[n * width + lane] = 0.0;
            d_s[n * width + lane] = 0.0;
            if let Some(derivative) = derivative.get_mut(n * width + lane) {
                *derivative = 0.0;
            }
        };
        match self.side {
            Side::Queries => {
                for (lane, &seen) in seen[first..][..own].iter().enumerate() {
                    zeros(seen, passing).for_each(|n| zero(n, lane));
                }
            }
            Side::Keys => {
                for (n, seen) in seen[..passing].iter().enumerate() {
                    zeros(seen >> first, own).for_each(|lane| zero(n, lane));
                }
            }
        }
    }
}

/// `sums += d_s` for one panel of keys: each row into a row of its own, or all rows into the only row.
#[inline(always)]
fn add_bias_gradients<S: Simd, const NV: usize>(
    panel: usize,
    keys: &Tile,
    queries: &Tile,
    d_s: &[Panel<S, NV>],
    sums: &mut [f64],
) {
    let first = panel * NV * S::F32_LANES;
    let own = (keys.rows.len() - first).min(NV * S::F32_LANES);
    let stride = if sums.len() > TILE { TILE } else { 0 };
    for (d_s, query) in d_s.iter().zip(queries.rows.start % BIAS_ROWS..) {
        let d_s: &[f32] = bytemuck::cast_slice(d_s);
        let sums = &mut sums[query * stride + first..][..own];
        sums.iter_mut().zip(d_s).for_each(|(sum, &d_s)| *sum += f64::from(d_s));
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
        // The multiply-add is fused, so the score itself is never rounded, as in the forward pass.
        p[v] = exp(simd, simd.mul_add_e_f32s(p[v], factor, simd.neg_f32s(lse[v])));
        d_s[v] = simd.mul_f32s(p[v], simd.sub_f32s(d_s[v], delta[v]));
    }
}

#[cfg(test)]
mod tests;
