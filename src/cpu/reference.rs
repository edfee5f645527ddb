//! The definition: dense attention in f64, written for readability and not for speed. Operands of any element type are widened exactly.
//!
//! Every other path of the crate is tested against this one.

use crate::problem::element::Element;
use crate::problem::error::Result;
use crate::problem::varlen::Sequence;
use crate::problem::{Bias, Gradients, Inputs, Layout, MaskData, MaskPacking, Output, Problem, SinkLogits, Upstream};

/// Forward pass in f64: `lse_i = log(sum_j exp(s_ij) + exp(sink))`, `o_i = sum_j exp(s_ij - lse_i) v_j`.
///
/// # Errors
/// Those of [`Problem::check_inputs`].
pub fn forward<T: Element>(problem: &Problem, inputs: &Inputs<'_, T>) -> Result<Output<f64, f64>> {
    problem.check_inputs(inputs)?;
    Ok(Operands::new(problem, inputs).forward(problem, &mut None))
}

/// The largest score of each row in f64, `row_max_i = max_j s_ij`, `[batch, heads, seq_q]`: scaled, capped and biased, without the sink
/// logit. It is -infinity if a query sees nothing, and NaN if a visible score is NaN.
///
/// # Errors
/// Those of [`Problem::check_inputs`].
pub fn row_max<T: Element>(problem: &Problem, inputs: &Inputs<'_, T>) -> Result<Vec<f64>> {
    problem.check_inputs(inputs)?;
    let operands = Operands::new(problem, inputs);
    let mut row_max = vec![f64::NEG_INFINITY; problem.lse_shape().iter().product()];
    for query in queries(problem).filter(|query| query.i < query.sequence.band.seq_q()) {
        let scores = operands.scores(problem, &query, |_| true);
        let larger = |a: f64, (b, _): &(f64, Pair)| if a.is_nan() || b.is_nan() { f64::NAN } else { a.max(*b) };
        row_max[query.index] = scores.iter().fold(f64::NEG_INFINITY, larger);
    }
    Ok(row_max)
}

/// Backward pass in f64, which computes the forward pass itself:
///
/// ```text
/// delta_i = d_o_i . o_i
/// d_s_ij  = p_ij (d_o_i . v_j - delta_i + d_lse_i)
/// d_x_ij  = d_s_ij (1 - tanh(scale q_i.k_j / softcap)^2)      or d_s_ij without softcap
/// d_q_i   = scale sum_j d_x_ij k_j
/// d_k_j   = scale sum_i d_x_ij q_i
/// d_v_j   = sum_i p_ij d_o_i
/// d_sink  = - sum_i exp(sink - lse_i) (delta_i - d_lse_i)
/// d_slope = - sum_ij |p - j| d_s_ij
/// d_bias  = sum of d_s_ij over what an element of the bias is added to
/// ```
///
/// The sums over i run over all query heads that read the key, and over the batch for a sink logit and a slope.
///
/// # Errors
/// Those of [`Problem::check_inputs`] and [`Problem::check_upstream`].
pub fn backward<T: Element>(
    problem: &Problem,
    inputs: &Inputs<'_, T>,
    upstream: &Upstream<'_, T>,
) -> Result<Gradients<f64, f64>> {
    problem.check_inputs(inputs)?;
    let operands = Operands::new(problem, inputs);
    let saved = operands.forward(problem, &mut None);
    problem.check_upstream(&saved, upstream)?;
    Ok(operands.backward(problem, &saved, upstream, &mut None))
}

/// The sizes of the terms of results: for each element, the sum of the absolute values of the terms that it is a sum of. An error is judged
/// against that size, because terms may cancel. The shapes are those of the results.
///
/// ```text
/// o_ie  = sum_j p_ij |v_je|                      d_s_ij = p_ij (sum_e |d_o_ie| (|v_je| + o_ie) + |d_lse_i|)
/// d_q_i = |scale| sum_j d_s_ij |k_j|             d_k_j  = |scale| sum_i d_s_ij |q_i|
/// d_v_j = sum_i p_ij |d_o_i|
/// ```
///
/// Devices flush weights below f32's normal numbers to zero, so a whole term with such a weight may be lost. Here each p_ij of a visible
/// pair is raised by 2^24 times the least normal number. A lost term is then at most one part in 2^24 of its magnitude, like the rounding
/// error of any other term. Weights that are not small hardly change.
#[derive(Debug, Clone, PartialEq)]
pub struct Magnitudes {
    /// Of o.
    pub o: Vec<f64>,
    /// Of the gradient by q; empty without a backward pass, as the next two.
    pub d_q: Vec<f64>,
    /// Of the gradient by k.
    pub d_k: Vec<f64>,
    /// Of the gradient by v.
    pub d_v: Vec<f64>,
}

/// The number that [`Magnitudes`] add to a weight: 2^24 times the least normal number of f32.
const LOST_WEIGHT: f64 = f32::MIN_POSITIVE as f64 * (1u32 << 24) as f64;

/// Results, and the sizes of their terms.
pub type WithMagnitudes = (Output<f64, f64>, Option<Gradients<f64, f64>>, Magnitudes);

/// The forward pass as [`forward`], and if there is an `upstream` the backward pass as [`backward`], with [`Magnitudes`].
///
/// # Errors
/// Those of [`Problem::check_inputs`] and [`Problem::check_upstream`].
pub fn with_magnitudes<T: Element>(
    problem: &Problem,
    inputs: &Inputs<'_, T>,
    upstream: Option<&Upstream<'_, T>>,
) -> Result<WithMagnitudes> {
    problem.check_inputs(inputs)?;
    let operands = Operands::new(problem, inputs);
    let mut o = Some(Tensor::zeros(problem.options().layout, problem.o_shape()));
    let output = operands.forward(problem, &mut o);
    let o = o.map_or_else(Vec::new, |o| o.data);
    let mut magnitudes = Some(Magnitudes { o, d_q: Vec::new(), d_k: Vec::new(), d_v: Vec::new() });
    let gradients = match upstream {
        Some(upstream) => {
            problem.check_upstream(&output, upstream)?;
            Some(operands.backward(problem, &output, upstream, &mut magnitudes))
        }
        None => None,
    };
    let none = || Magnitudes { o: Vec::new(), d_q: Vec::new(), d_k: Vec::new(), d_v: Vec::new() };
    Ok((output, gradients, magnitudes.unwrap_or_else(none)))
}

/// The operands in f64. Finite differences can move them by less than an f32 resolves.
#[derive(Clone)]
pub(super) struct Operands {
    pub(super) q: Tensor,
    pub(super) k: Tensor,
    pub(super) v: Tensor,
    /// One for each query head, if the problem has any.
    sink_logits: Option<Vec<f64>>,
    /// One for each query head, if the problem has any.
    alibi_slopes: Option<Vec<f64>>,
    bias: Option<Pairs<f64>>,
    mask: Option<Pairs<bool>>,
}

impl Operands {
    pub(super) fn new<T: Element>(problem: &Problem, inputs: &Inputs<'_, T>) -> Self {
        let layout = problem.options().layout;
        let bias = inputs.bias.map(|bias| match bias {
            Bias::F32(bias) => widen(bias),
            Bias::Operand(bias) => widen(bias),
        });
        let mask = inputs.mask.map(|mask| match mask {
            MaskData::Bytes(mask) => mask.iter().map(|&byte| byte != 0).collect(),
            MaskData::Bits(mask) => mask.iter().flat_map(|word| (0..32).map(move |j| word >> j & 1 != 0)).collect(),
        });
        Operands {
            q: Tensor::new(widen(inputs.q), layout, problem.q_shape()),
            k: Tensor::new(widen(inputs.k), layout, problem.k_shape()),
            v: Tensor::new(widen(inputs.v), layout, problem.v_shape()),
            sink_logits: (0..problem.shape().heads).map(|h| sink_logit(problem, inputs, h)).collect(),
            alibi_slopes: inputs.alibi_slopes.map(widen),
            bias: bias.zip(problem.bias_shape()).map(|(data, shape)| Pairs { data, shape }),
            mask: mask.zip(problem.mask_shape()).map(|(data, [b, h, m, n]): (Vec<bool>, _)| {
                // Rows of bits end in whole words.
                let n = if problem.options().mask_packing == MaskPacking::Bits { 32 * n } else { n };
                Pairs { data, shape: [b, h, m, n] }
            }),
        }
    }

    /// Results, and if wanted the sizes of their terms.
    fn forward(&self, problem: &Problem, magnitudes: &mut Option<Tensor>) -> Output<f64, f64> {
        let mut o = Tensor::zeros(problem.options().layout, problem.o_shape());
        let mut lse = vec![f64::NEG_INFINITY; problem.lse_shape().iter().product()];
        for query in queries(problem) {
            let row = self.row(problem, &query);
            for pair in row.pairs {
                add_scaled(o.row_mut(query.place), pair.p, self.v.row(query.key(pair.j)));
                if let Some(magnitudes) = magnitudes {
                    add_magnitude(magnitudes.row_mut(query.place), pair.p + LOST_WEIGHT, self.v.row(query.key(pair.j)));
                }
            }
            lse[query.index] = row.lse;
        }
        Output { o: o.data, o_lo: None, lse }
    }

    fn backward<T: Element>(
        &self,
        problem: &Problem,
        saved: &Output<f64, f64>,
        upstream: &Upstream<'_, T>,
        magnitudes: &mut Option<Magnitudes>,
    ) -> Gradients<f64, f64> {
        let layout = problem.options().layout;
        let scale = f64::from(problem.scale());
        let o = Tensor::new(saved.o.clone(), layout, problem.o_shape());
        let mut sizes = magnitudes.as_ref().map(|magnitudes| Sizes {
            o: Tensor::new(magnitudes.o.clone(), layout, problem.o_shape()),
            d_q: Tensor::zeros(layout, problem.q_shape()),
            d_k: Tensor::zeros(layout, problem.k_shape()),
            d_v: Tensor::zeros(layout, problem.v_shape()),
        });
        let d_o = Tensor::new(widen(upstream.d_o), layout, problem.o_shape());
        let mut d_q = Tensor::zeros(layout, problem.q_shape());
        let mut d_k = Tensor::zeros(layout, problem.k_shape());
        let mut d_v = Tensor::zeros(layout, problem.v_shape());
        let mut d_sink_logits = vec![0.0; problem.shape().heads];
        let mut d_alibi_slopes = self.alibi_slopes.as_ref().map(|slopes| vec![0.0; slopes.len()]);
        let mut d_bias = self.bias.as_ref().map(|bias| Pairs { data: vec![0.0; bias.data.len()], ..*bias });
        for query in queries(problem) {
            let Row { pairs, lse } = self.row(problem, &query);
            if lse == f64::NEG_INFINITY {
                continue; // No key has a weight, so nothing has a gradient, whatever flows in.
            }
            let d_lse = upstream.d_lse.map_or(0.0, |d_lse| f64::from(d_lse[query.index]));
            let d_o = d_o.row(query.place);
            // The d_o of a row that sees nothing does not count, even if it is NaN.
            let delta = if pairs.is_empty() { 0.0 } else { dot(d_o, o.row(query.place)) };
            for Pair { j, p, distance, slope } in pairs {
                let key = query.key(j);
                let d_s = p * (dot(d_o, self.v.row(key)) - delta + d_lse);
                add_scaled(d_q.row_mut(query.place), scale * slope * d_s, self.k.row(key));
                add_scaled(d_k.row_mut(key), scale * slope * d_s, self.q.row(query.place));
                add_scaled(d_v.row_mut(key), p, d_o);
                if let Some(Sizes { o, d_q, d_k, d_v }) = &mut sizes {
                    let terms = d_o.iter().zip(self.v.row(key)).zip(o.row(query.place));
                    let d_p = terms.map(|((d_o, v), o)| d_o.abs() * (v.abs() + o)).sum::<f64>() + d_lse.abs();
                    let weight = p + LOST_WEIGHT;
                    // Gradients by scores below normal numbers may be lost, too.
                    let d_x = (scale * slope).abs() * (weight * d_p + LOST_WEIGHT);
                    add_magnitude(d_q.row_mut(query.place), d_x, self.k.row(key));
                    add_magnitude(d_k.row_mut(key), d_x, self.q.row(query.place));
                    add_magnitude(d_v.row_mut(key), weight, d_o);
                }
                if let Some(d_alibi_slopes) = &mut d_alibi_slopes {
                    d_alibi_slopes[query.head] -= distance * d_s;
                }
                if let Some(d_bias) = &mut d_bias {
                    *d_bias.at_mut(query.pair(j)) += d_s;
                }
            }
            if let Some(sink_logits) = &self.sink_logits {
                d_sink_logits[query.head] -= sink_weight(sink_logits[query.head], lse) * (delta - d_lse);
            }
        }
        if let Some((magnitudes, sizes)) = magnitudes.as_mut().zip(sizes) {
            (magnitudes.d_q, magnitudes.d_k, magnitudes.d_v) = (sizes.d_q.data, sizes.d_k.data, sizes.d_v.data);
        }
        let per_head = problem.options().sink_logits == SinkLogits::PerHead;
        Gradients {
            d_q: d_q.data,
            d_k: d_k.data,
            d_v: d_v.data,
            d_sink_logits: per_head.then_some(d_sink_logits),
            d_alibi_slopes,
            d_bias: d_bias.map(|d_bias| d_bias.data),
        }
    }

    /// The keys that a query sees.
    pub(super) fn row(&self, problem: &Problem, query: &Query) -> Row {
        if query.i >= query.sequence.band.seq_q() {
            return Row { pairs: Vec::new(), lse: f64::NEG_INFINITY };
        }
        let scores = self.scores(problem, query, |_| true);
        let sink = self.sink_logits.as_ref().map(|sink_logits| sink_logits[query.head]);
        let denominator = Denominator::new(scores.iter().map(|&(s, _)| s).chain(sink).map(|x| (x, 1.0)));
        let p = |s| if s == f64::NEG_INFINITY { 0.0 } else { denominator.weight(s) };
        let pairs = scores.into_iter().map(|(s, pair)| Pair { p: p(s), ..pair }).collect();
        Row { pairs, lse: denominator.log() }
    }

    /// The scores of the wanted keys that a query sees. Their probabilities are left at 0.
    pub(super) fn scores(&self, problem: &Problem, query: &Query, wanted: impl Fn(usize) -> bool) -> Vec<(f64, Pair)> {
        let Query { sequence, i, head, .. } = *query;
        let position = i as f64 + sequence.band.offset() as f64;
        let mut scores = Vec::new();
        for j in sequence.band.visible_keys(i).into_iter().flatten().filter(|&j| wanted(j)) {
            let bias = self.bias.as_ref().map_or(0.0, |bias| *bias.at(query.pair(j)));
            let is_hidden = self.mask.as_ref().is_some_and(|mask| !mask.at(query.pair(j)));
            if is_hidden || bias == f64::NEG_INFINITY {
                continue;
            }
            let product = f64::from(problem.scale()) * dot(self.q.row(query.place), self.k.row(query.key(j)));
            let (capped, slope) = match problem.options().softcap.map(f64::from) {
                Some(softcap) => (softcap * (product / softcap).tanh(), 1.0 - (product / softcap).tanh().powi(2)),
                None => (product, 1.0),
            };
            let distance = (position - j as f64).abs();
            let alibi = self.alibi_slopes.as_ref().map_or(0.0, |slopes| slopes[head] * distance);
            scores.push((capped - alibi + bias, Pair { j, p: 0.0, distance, slope }));
        }
        scores
    }

    /// The element of the bias that a pair has.
    pub(super) fn bias_index(&self, query: &Query, j: usize) -> Option<usize> {
        self.bias.as_ref().map(|bias| bias.index(query.pair(j)))
    }
}

/// [`Magnitudes`] while they are summed.
struct Sizes {
    o: Tensor,
    d_q: Tensor,
    d_k: Tensor,
    d_v: Tensor,
}

/// The keys that a query sees, and its lse.
pub(super) struct Row {
    pub(super) pairs: Vec<Pair>,
    lse: f64,
}

/// A query and a key that it sees.
pub(super) struct Pair {
    /// The key's place in the sequence.
    pub(super) j: usize,
    /// The probability.
    pub(super) p: f64,
    /// |p - j|, the distance that ALiBi multiplies with a slope.
    pub(super) distance: f64,
    /// The score's derivative by the product times the scale.
    pub(super) slope: f64,
}

/// A query of a head of a sequence.
pub(super) struct Query {
    pub(super) sequence: Sequence,
    /// The number of the sequence in the batch.
    pub(super) number: usize,
    pub(super) head: usize,
    pub(super) kv_head: usize,
    /// Its place in the sequence.
    pub(super) i: usize,
    /// Its row in q and o: batch entry, head, position.
    pub(super) place: [usize; 3],
    /// Its place in lse.
    pub(super) index: usize,
}

impl Query {
    /// The row of a key of the sequence in k and v.
    pub(super) fn key(&self, j: usize) -> [usize; 3] {
        [self.sequence.entry, self.kv_head, self.sequence.k_start + j]
    }

    /// The place of a pair in a bias or a mask.
    fn pair(&self, j: usize) -> [usize; 4] {
        [self.number, self.head, self.i, j]
    }
}

/// All queries of all heads and sequences.
pub(super) fn queries(problem: &Problem) -> impl Iterator<Item = Query> + use<'_> {
    let heads = problem.shape().heads;
    problem.sequences().enumerate().flat_map(move |(number, sequence)| {
        (0..heads * sequence.q_rows).map(move |n| {
            let (head, i) = (n / sequence.q_rows, n % sequence.q_rows);
            let place = [sequence.entry, head, sequence.q_start + i];
            let index = (sequence.entry * heads + head) * problem.shape().seq_q + sequence.q_start + i;
            Query { sequence, number, head, kv_head: head / problem.heads_per_kv(), i, place, index }
        })
    })
}

/// A bias or a mask: a number for each pair, broadcast along the axes whose size is 1.
#[derive(Clone)]
struct Pairs<T> {
    data: Vec<T>,
    shape: [usize; 4],
}

impl<T> Pairs<T> {
    fn index(&self, pair: [usize; 4]) -> usize {
        let axes = self.shape.iter().zip(pair);
        axes.fold(0, |index, (&size, n)| index * size + if size == 1 { 0 } else { n })
    }

    fn at(&self, pair: [usize; 4]) -> &T {
        &self.data[self.index(pair)]
    }

    fn at_mut(&mut self, pair: [usize; 4]) -> &mut T {
        let index = self.index(pair);
        &mut self.data[index]
    }
}

/// An operand whose rows are addressed by batch, head and position in either layout.
#[derive(Clone)]
pub(super) struct Tensor {
    data: Vec<f64>,
    strides: [usize; 3],
    width: usize,
}

impl Tensor {
    pub(super) fn new(data: Vec<f64>, layout: Layout, shape: [usize; 4]) -> Self {
        let [_, axis1, axis2, width] = shape;
        let (heads, seq) = match layout {
            Layout::Bshd | Layout::Thd => (axis2, axis1),
            Layout::Bhsd => (axis1, axis2),
        };
        Tensor { data, strides: layout.strides(heads, seq, width).map(|s| s as usize), width }
    }

    fn zeros(layout: Layout, shape: [usize; 4]) -> Self {
        Tensor::new(vec![0.0; shape.iter().product()], layout, shape)
    }

    /// Where a row starts.
    pub(super) fn start(&self, [b, h, i]: [usize; 3]) -> usize {
        b * self.strides[0] + h * self.strides[1] + i * self.strides[2]
    }

    pub(super) fn row(&self, row: [usize; 3]) -> &[f64] {
        &self.data[self.start(row)..][..self.width]
    }

    fn row_mut(&mut self, row: [usize; 3]) -> &mut [f64] {
        let start = self.start(row);
        &mut self.data[start..][..self.width]
    }
}

pub(super) fn widen<T: Element>(x: &[T]) -> Vec<f64> {
    x.iter().map(|&x| x.into()).collect()
}

pub(super) fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// `sum += factor * x`.
pub(super) fn add_scaled(sum: &mut [f64], factor: f64, x: &[f64]) {
    for (sum, x) in sum.iter_mut().zip(x) {
        *sum += factor * x;
    }
}

/// `sum += factor * |x|`.
fn add_magnitude(sum: &mut [f64], factor: f64, x: &[f64]) {
    for (sum, x) in sum.iter_mut().zip(x) {
        *sum += factor * x.abs();
    }
}

/// The sink logit of a query head, if the problem has one.
pub(super) fn sink_logit<T>(problem: &Problem, inputs: &Inputs<'_, T>, head: usize) -> Option<f64> {
    match problem.options().sink_logits {
        SinkLogits::None => None,
        SinkLogits::OffByOne => Some(0.0),
        SinkLogits::PerHead => inputs.sink_logits.map(|s| f64::from(s[head])),
    }
}

/// The sink's share of a row: 1 if both are +inf, which is the limit of ever larger sink logits.
pub(super) fn sink_weight(sink_logit: f64, lse: f64) -> f64 {
    if sink_logit == lse { 1.0 } else { (sink_logit - lse).exp() }
}

/// The softmax's denominator, a sum of `count * exp(x)`, kept as its largest exponent and the remaining factor. If exponents are so large
/// that they absorb the logarithm of the sum, weights still add up to one.
pub(super) struct Denominator {
    most: f64,
    sum: f64,
}

impl Denominator {
    /// The denominator of terms `(x, count)`.
    pub(super) fn new(terms: impl Iterator<Item = (f64, f64)> + Clone) -> Self {
        let most = terms.clone().fold(f64::NEG_INFINITY, |most, (x, _)| most.max(x));
        let sum = match most.is_infinite() {
            // The count of exp(inf) may be NaN, a sum of exp(inf - inf), and is not used.
            true => terms.map(|(x, count)| if x.is_nan() || x == f64::INFINITY { x } else { count }).sum(),
            false => terms.map(|(x, count)| count * (x - most).exp()).sum(),
        };
        Denominator { most, sum }
    }

    /// The logarithm: -inf if there are no terms or all are exp(-inf), and inf if one is exp(inf).
    pub(super) fn log(&self) -> f64 {
        match (self.most.is_infinite(), self.sum.is_nan()) {
            (_, true) => f64::NAN,
            (true, false) => self.most,
            (false, false) => self.most + self.sum.ln(),
        }
    }

    /// `exp(x)` divided by the denominator. NaN for one exp(inf), whose share is unknown.
    pub(super) fn weight(&self, x: f64) -> f64 {
        if self.most.is_infinite() { (x - self.log()).exp() } else { (x - self.most).exp() / self.sum }
    }
}

#[cfg(test)]
mod tests;
