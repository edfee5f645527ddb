//! Rows of results computed again in f64, where f32 had no room for the sums on the way. bf16 has the range of f32, so sums of bf16 numbers
//! can leave it.
//!
//! A row is computed again if it is not finite although everything that it depends on is, and from these numbers alone. So keys and values
//! that a query does not see change none of its bits. Infinity and NaN never become finite again in the tiled passes, so no other row can
//! be wrong for want of room.

use std::collections::BTreeMap;

use rayon::prelude::*;

use super::reference::{Operands, Query, Tensor, add_scaled, dot, queries, sink_logit, sink_weight, widen};
use super::rows::Rows;
use super::scores::Scores;
use crate::problem::{Gradients, Inputs, Output, Problem, Upstream};

/// Computes the rows of o again that are not finite.
pub(super) fn forward(problem: &Problem, inputs: &Inputs<'_>, output: &mut Output) {
    if all_finite(&output.o) {
        return;
    }
    let operands = Operands::new(problem, inputs);
    let places = Tensor::new(Vec::new(), problem.options().layout, problem.o_shape());
    let width = problem.shape().value_dim;
    let is_wanted = |query: &Query| {
        let start = places.start(query.place);
        output.lse[query.index].is_finite() && !all_finite(&output.o[start..start + width])
    };
    let wanted: Vec<Query> = queries(problem).filter(is_wanted).collect();
    let row = |query: Query| {
        let (start, row) = (places.start(query.place), operands.row(problem, &query));
        let mut o = vec![0.0; width];
        let mut finite = is_finite(operands.q.row(query.place));
        for pair in row.pairs {
            let (k, v) = (operands.k.row(query.key(pair.j)), operands.v.row(query.key(pair.j)));
            finite &= is_finite(k) && is_finite(v);
            add_scaled(&mut o, pair.p, v);
        }
        finite.then_some((start, o))
    };
    let rows: Vec<(usize, Vec<f64>)> = wanted.into_par_iter().filter_map(row).collect();
    rows.iter().for_each(|(start, row)| write(&mut output.o, *start, row));
}

/// Computes the rows and elements of the gradients again that are not finite. In `(o, lse)`, o is unrounded.
pub(super) fn backward(
    problem: &Problem,
    inputs: &Inputs<'_>,
    (o, lse): (&[f32], &[f32]),
    upstream: &Upstream<'_>,
    gradients: &mut Gradients,
) {
    let Gradients { d_q, d_k, d_v, d_sink_logits, d_alibi_slopes, d_bias } = gradients;
    let optional = [&*d_sink_logits, &*d_alibi_slopes, &*d_bias].into_iter().flatten();
    if [&*d_q, &*d_k, &*d_v].into_iter().chain(optional).all(|gradient| all_finite(gradient)) {
        return;
    }
    let layout = problem.options().layout;
    let tensor = |data: &[f32], shape| Tensor::new(widen(data), layout, shape);
    let rows = Pass {
        problem,
        operands: Operands::new(problem, inputs),
        d_o: tensor(upstream.d_o, problem.o_shape()),
        o: tensor(o, problem.o_shape()),
        lse,
        delta: {
            let delta = Delta::new(problem, o, upstream);
            let mut all = vec![0.0; lse.len()];
            queries(problem).for_each(|q| all[q.index] = delta.of(problem, inputs, q.place, lse[q.index]));
            all
        },
        shares: Scores::new(problem, inputs).shares(lse),
    };
    let per_head = |gradient: &Option<Vec<f32>>| {
        gradient.as_ref().map_or(Vec::new(), |gradient| gradient.iter().map(|x| !x.is_finite()).collect::<Vec<_>>())
    };
    let wanted = Wanted {
        d_q: not_finite(d_q, problem.shape().head_dim),
        d_k: not_finite(d_k, problem.shape().head_dim),
        d_v: not_finite(d_v, problem.shape().value_dim),
        d_alibi_slopes: per_head(d_alibi_slopes),
        d_bias: per_head(d_bias),
    };

    let shape = problem.shape();
    // Groups are added one after the other in a fixed order, so that sums have the same bits for any number of threads.
    let mut by_group: Vec<Vec<Query>> = (0..problem.sequence_count() * shape.kv_heads).map(|_| Vec::new()).collect();
    queries(problem).for_each(|query| by_group[query.number * shape.kv_heads + query.kv_head].push(query));
    let sums: Vec<Sums> = by_group.into_par_iter().map(|queries| rows.sums(queries, &wanted)).collect();
    let mut all = Sums::default();
    for sums in sums {
        let of = [(&mut all.d_q, sums.d_q), (&mut all.d_k, sums.d_k), (&mut all.d_v, sums.d_v)];
        let others = [(&mut all.d_alibi_slopes, sums.d_alibi_slopes), (&mut all.d_bias, sums.d_bias)];
        for (all, sums) in of.into_iter().chain(others) {
            for (start, sum) in sums {
                all.entry(start).or_insert_with(|| Sum::new(sum.row.len())).add(&sum);
            }
        }
    }
    let optional = [(d_alibi_slopes, all.d_alibi_slopes), (d_bias, all.d_bias)];
    let optional = optional.into_iter().filter_map(|(gradient, sums)| Some((gradient.as_mut()?, sums)));
    for (gradient, sums) in [(d_q, all.d_q), (d_k, all.d_k), (d_v, all.d_v)].into_iter().chain(optional) {
        let sums = sums.iter().filter(|(_, sum)| sum.finite);
        sums.for_each(|(start, sum)| write(gradient, *start, &sum.row));
    }
    for (head, d_sink) in d_sink_logits.iter_mut().flatten().enumerate().filter(|(_, x)| !x.is_finite()) {
        let Some(sink) = sink_logit(problem, inputs, head) else { continue };
        let of_head = queries(problem).filter(|query| query.head == head && rows.counts(query));
        let sum = of_head.map(|q| sink_weight(sink, lse[q.index].into()) * rows.delta[q.index]).sum::<f64>();
        if sum.is_finite() {
            *d_sink = -sum as f32;
        }
    }
}

/// The sums to compute again: rows of d_q, d_k and d_v by number, elements of the other gradients.
struct Wanted {
    d_q: Vec<bool>,
    d_k: Vec<bool>,
    d_v: Vec<bool>,
    d_alibi_slopes: Vec<bool>,
    d_bias: Vec<bool>,
}

/// A row of a gradient, or an element.
#[derive(Clone)]
struct Sum {
    row: Vec<f64>,
    /// Whether everything that the sum depends on is finite.
    finite: bool,
}

impl Sum {
    fn new(width: usize) -> Self {
        Sum { row: vec![0.0; width], finite: true }
    }

    fn add(&mut self, other: &Sum) {
        add_scaled(&mut self.row, 1.0, &other.row);
        self.finite &= other.finite;
    }
}

/// The sums of each gradient, by their first element in it.
#[derive(Default)]
struct Sums {
    d_q: BTreeMap<usize, Sum>,
    d_k: BTreeMap<usize, Sum>,
    d_v: BTreeMap<usize, Sum>,
    d_alibi_slopes: BTreeMap<usize, Sum>,
    d_bias: BTreeMap<usize, Sum>,
}

/// The pass on operands in f64.
struct Pass<'a> {
    problem: &'a Problem,
    operands: Operands,
    d_o: Tensor,
    o: Tensor,
    lse: &'a [f32],
    /// delta_i, with d_lse subtracted.
    delta: Vec<f64>,
    shares: Option<Vec<f32>>,
}

impl Pass<'_> {
    /// Whether anything in a row has a weight.
    fn counts(&self, query: &Query) -> bool {
        query.i < query.sequence.band.seq_q() && self.lse[query.index] != f32::NEG_INFINITY
    }

    /// Sums the terms that the queries of a group of heads of one sequence add to the wanted sums.
    fn sums(&self, queries: Vec<Query>, wanted: &Wanted) -> Sums {
        let (mut sums, operands) = (Sums::default(), &self.operands);
        let (shape, scale) = (self.problem.shape(), f64::from(self.problem.scale()));
        let (d, e) = (shape.head_dim, shape.value_dim);
        let is = |wanted: &[bool], n: usize| wanted.get(n).is_some_and(|&wanted| wanted);
        for query in queries.iter().filter(|query| self.counts(query)) {
            let (q, d_o) = (operands.q.row(query.place), self.d_o.row(query.place));
            let (lse, delta) = (f64::from(self.lse[query.index]), self.delta[query.index]);
            let finite = [q, d_o, self.o.row(query.place), &[lse, delta]].into_iter().all(is_finite);
            let share = self.shares.as_ref().map_or(1.0, |shares| f64::from(shares[query.index]));
            let own = operands.q.start(query.place);
            let of_row = is(&wanted.d_q, own / d) || is(&wanted.d_alibi_slopes, query.head);
            let starts = |j: usize| (operands.k.start(query.key(j)), operands.v.start(query.key(j)));
            let bias = |j: usize| operands.bias_index(query, j).filter(|&n| is(&wanted.d_bias, n));
            let is_wanted = |j: usize| {
                let (key, value) = starts(j);
                of_row || is(&wanted.d_k, key / d) || is(&wanted.d_v, value / e) || bias(j).is_some()
            };
            for (score, pair) in operands.scores(self.problem, query, is_wanted) {
                let (k, v) = (operands.k.row(query.key(pair.j)), operands.v.row(query.key(pair.j)));
                let finite = finite && is_finite(k) && is_finite(v);
                let p = (score - lse).exp() * share;
                let d_s = p * (dot(d_o, v) - delta);
                let add = |sums: &mut BTreeMap<usize, Sum>, start: usize, factor: f64, x: &[f64]| {
                    let sum = sums.entry(start).or_insert_with(|| Sum::new(x.len()));
                    add_scaled(&mut sum.row, factor, x);
                    sum.finite &= finite;
                };
                let (key, value) = starts(pair.j);
                if is(&wanted.d_q, own / d) {
                    add(&mut sums.d_q, own, scale * pair.slope * d_s, k);
                }
                if is(&wanted.d_k, key / d) {
                    add(&mut sums.d_k, key, scale * pair.slope * d_s, q);
                }
                if is(&wanted.d_v, value / e) {
                    add(&mut sums.d_v, value, p, d_o);
                }
                if is(&wanted.d_alibi_slopes, query.head) {
                    add(&mut sums.d_alibi_slopes, query.head, -d_s, &[pair.distance]);
                }
                if let Some(n) = bias(pair.j) {
                    add(&mut sums.d_bias, n, d_s, &[1.0]);
                }
            }
        }
        sums
    }
}

fn is_finite(x: &[f64]) -> bool {
    x.iter().all(|x| x.is_finite())
}

fn all_finite(x: &[f32]) -> bool {
    // The loop has no branch within a chunk, so that it vectorises.
    x.par_chunks(1 << 12).all(|x| x.iter().fold(true, |finite, x| finite & x.is_finite()))
}

/// Which rows are not finite, in the order of memory.
fn not_finite(x: &[f32], width: usize) -> Vec<bool> {
    x.par_chunks(width).map(|row| !row.iter().all(|x| x.is_finite())).collect()
}

fn write(x: &mut [f32], start: usize, row: &[f64]) {
    x[start..].iter_mut().zip(row).for_each(|(x, &y)| *x = y as f32);
}

/// `delta_i = d_o_i . o_i - d_lse_i` in f64.
pub(super) struct Delta<'a> {
    o: Rows<'a>,
    d_o: Rows<'a>,
    d_lse: Option<&'a [f32]>,
}

impl<'a> Delta<'a> {
    pub(super) fn new(problem: &Problem, o: &'a [f32], upstream: &Upstream<'a>) -> Self {
        let s = problem.shape();
        let rows = |data| Rows::new(data, problem.options().layout, s.heads, s.seq_q, s.value_dim);
        Delta { o: rows(o), d_o: rows(upstream.d_o), d_lse: upstream.d_lse }
    }

    /// delta of the row of a batch entry, head and position.
    ///
    /// The d_o of a row that saw nothing does not count, even if it is NaN. Such a row is recognised by its results, an lse that equals the
    /// sink logit and an o of zeros, because the keys here may be only a shard of the keys that the row saw.
    pub(super) fn of(&self, problem: &Problem, inputs: &Inputs<'_>, [b, h, i]: [usize; 3], lse: f32) -> f64 {
        let s = problem.shape();
        let o = self.o.row(b, h, i);
        let products = o.iter().zip(self.d_o.row(b, h, i)).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum::<f64>();
        let saw_nothing = || sink_logit(problem, inputs, h) == Some(lse.into()) && o.iter().all(|&o| o == 0.0);
        let products = if products.is_nan() && saw_nothing() { 0.0 } else { products };
        products - self.d_lse.map_or(0.0, |d_lse| f64::from(d_lse[(b * s.heads + h) * s.seq_q + i]))
    }
}
