//! The definition: dense attention in f64, written for reading, not for speed. Operands of any element type are
//! widened exactly.
//!
//! Every other path of the crate is tested against this one.

use crate::element::Element;
use crate::error::Result;
use crate::problem::{Gradients, Inputs, Layout, Output, Problem, SinkLogits, Upstream};

/// Forward pass in f64: `lse_i = log(sum_j exp(s_ij) + exp(sink))`, `o_i = sum_j exp(s_ij - lse_i) v_j`.
///
/// # Errors
/// Those of [`Problem::check_inputs`].
pub fn forward<T: Element>(problem: &Problem, inputs: &Inputs<'_, T>) -> Result<Output<f64, f64>> {
    problem.check_inputs(inputs)?;
    Ok(Operands::new(problem, inputs).forward(problem))
}

/// Backward pass in f64, from a forward pass of its own:
///
/// ```text
/// delta_i = d_o_i . o_i
/// d_s_ij  = p_ij (d_o_i . v_j - delta_i + d_lse_i)
/// d_q_i   = scale sum_j d_s_ij k_j
/// d_k_j   = scale sum_i d_s_ij q_i
/// d_v_j   = sum_i p_ij d_o_i
/// d_sink  = - sum_i exp(sink - lse_i) (delta_i - d_lse_i)
/// ```
///
/// The sums over i run over all query heads that read the key, and over the batch for a sink logit.
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
    let saved = operands.forward(problem);
    problem.check_upstream(&saved, upstream)?;
    Ok(operands.backward(problem, saved, upstream))
}

/// The operands in f64, which finite differences can move by less than an f32 resolves.
#[derive(Clone)]
struct Operands {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    /// One for each query head, if the problem has any.
    sink_logits: Option<Vec<f64>>,
}

impl Operands {
    fn new<T: Element>(problem: &Problem, inputs: &Inputs<'_, T>) -> Self {
        let layout = problem.options().layout;
        Operands {
            q: Tensor::new(widen(inputs.q), layout, problem.q_shape()),
            k: Tensor::new(widen(inputs.k), layout, problem.k_shape()),
            v: Tensor::new(widen(inputs.v), layout, problem.v_shape()),
            sink_logits: (0..problem.shape().heads).map(|h| sink_logit(problem, inputs, h)).collect(),
        }
    }

    fn forward(&self, problem: &Problem) -> Output<f64, f64> {
        let mut o = Tensor::zeros(problem.options().layout, problem.o_shape());
        let mut lse = Vec::new();
        for [b, h, i] in queries(problem) {
            let g = h / problem.group();
            let (p, row_lse) = self.probabilities(problem, [b, h, i]);
            for (j, p) in p {
                add_scaled(o.row_mut([b, h, i]), p, self.v.row([b, g, j]));
            }
            lse.push(row_lse);
        }
        Output { o: o.data, o_rest: None, lse }
    }

    fn backward<T: Element>(
        &self,
        problem: &Problem,
        saved: Output<f64, f64>,
        upstream: &Upstream<'_, T>,
    ) -> Gradients<f64, f64> {
        let layout = problem.options().layout;
        let scale = f64::from(problem.scale());
        let o = Tensor::new(saved.o, layout, problem.o_shape());
        let d_o = Tensor::new(widen(upstream.d_o), layout, problem.o_shape());
        let mut d_q = Tensor::zeros(layout, problem.q_shape());
        let mut d_k = Tensor::zeros(layout, problem.k_shape());
        let mut d_v = Tensor::zeros(layout, problem.v_shape());
        let mut d_sink_logits = vec![0.0; problem.shape().heads];
        for (n, query @ [b, h, _]) in queries(problem).enumerate() {
            let g = h / problem.group();
            let (p, lse) = self.probabilities(problem, query);
            if lse == f64::NEG_INFINITY {
                continue; // Nothing has a weight, so nothing has a gradient, whatever flows in.
            }
            let d_lse = upstream.d_lse.map_or(0.0, |d_lse| f64::from(d_lse[n]));
            let delta = dot(d_o.row(query), o.row(query));
            for (j, p) in p {
                let key = [b, g, j];
                let d_s = p * (dot(d_o.row(query), self.v.row(key)) - delta + d_lse);
                add_scaled(d_q.row_mut(query), scale * d_s, self.k.row(key));
                add_scaled(d_k.row_mut(key), scale * d_s, self.q.row(query));
                add_scaled(d_v.row_mut(key), p, d_o.row(query));
            }
            if let Some(sink_logits) = &self.sink_logits {
                d_sink_logits[h] -= sink_weight(sink_logits[h], lse) * (delta - d_lse);
            }
        }
        let per_head = problem.options().sink_logits == SinkLogits::PerHead;
        Gradients { d_q: d_q.data, d_k: d_k.data, d_v: d_v.data, d_sink_logits: per_head.then_some(d_sink_logits) }
    }

    /// The keys that a query sees, with their probabilities, and the row's lse.
    fn probabilities(&self, problem: &Problem, query @ [b, h, i]: [usize; 3]) -> (Vec<(usize, f64)>, f64) {
        let g = h / problem.group();
        let score = |j| f64::from(problem.scale()) * dot(self.q.row(query), self.k.row([b, g, j]));
        let keys = problem.mask().visible_keys(i).into_iter().flatten();
        let scores: Vec<(usize, f64)> = keys.map(|j| (j, score(j))).collect();
        let sink = self.sink_logits.as_ref().map(|sink_logits| sink_logits[h]);
        let lse = log_sum_exp(scores.iter().map(|&(_, s)| s).chain(sink));
        let p = |s| if s == f64::NEG_INFINITY { 0.0 } else { f64::exp(s - lse) };
        (scores.into_iter().map(|(j, s)| (j, p(s))).collect(), lse)
    }
}

/// Batch, head and position of every query, in the order of lse.
fn queries(problem: &Problem) -> impl Iterator<Item = [usize; 3]> + use<> {
    let [batch, heads, seq_q] = problem.lse_shape();
    (0..batch * heads * seq_q).map(move |n| [n / seq_q / heads, n / seq_q % heads, n % seq_q])
}

/// An operand whose rows are addressed by batch, head and position in either layout.
#[derive(Clone)]
struct Tensor {
    data: Vec<f64>,
    strides: [usize; 3],
    width: usize,
}

impl Tensor {
    fn new(data: Vec<f64>, layout: Layout, shape: [usize; 4]) -> Self {
        let [_, axis1, axis2, width] = shape;
        let (heads, seq) = match layout {
            Layout::Bshd => (axis2, axis1),
            Layout::Bhsd => (axis1, axis2),
        };
        Tensor { data, strides: layout.strides(heads, seq, width).map(|s| s as usize), width }
    }

    fn zeros(layout: Layout, shape: [usize; 4]) -> Self {
        Tensor::new(vec![0.0; shape.iter().product()], layout, shape)
    }

    fn start(&self, [b, h, i]: [usize; 3]) -> usize {
        b * self.strides[0] + h * self.strides[1] + i * self.strides[2]
    }

    fn row(&self, row: [usize; 3]) -> &[f64] {
        &self.data[self.start(row)..][..self.width]
    }

    fn row_mut(&mut self, row: [usize; 3]) -> &mut [f64] {
        let start = self.start(row);
        &mut self.data[start..][..self.width]
    }
}

fn widen<T: Element>(x: &[T]) -> Vec<f64> {
    x.iter().map(|&x| x.into()).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// `sum += factor * x`.
fn add_scaled(sum: &mut [f64], factor: f64, x: &[f64]) {
    for (sum, x) in sum.iter_mut().zip(x) {
        *sum += factor * x;
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

/// The sink's share of a row: all of it where both are +inf, the limit of ever larger sink logits.
pub(super) fn sink_weight(sink_logit: f64, lse: f64) -> f64 {
    if sink_logit == lse { 1.0 } else { (sink_logit - lse).exp() }
}

/// `log(sum exp(x))`, shifted by the maximum; -inf for no terms, or where all are -inf.
pub(super) fn log_sum_exp(terms: impl Iterator<Item = f64> + Clone) -> f64 {
    let max = terms.clone().fold(f64::NEG_INFINITY, f64::max);
    if max.is_infinite() && terms.clone().all(|x| !x.is_nan()) {
        return max;
    }
    max + terms.map(|x| (x - max).exp()).sum::<f64>().ln()
}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};

    use super::*;
    use crate::problem::{Alignment, Options, Shape, Window};

    fn one_head(m: usize, n: usize, d: usize) -> Shape {
        Shape { batch: 1, heads: 1, kv_heads: 1, seq_q: m, seq_k: n, head_dim: d, value_dim: 1 }
    }

    #[test]
    fn by_hand() {
        // Scores 0 and ln 3 with a sink logit of ln 4: the probabilities are 1/8, 3/8 and 4/8.
        let problem =
            Problem::new(one_head(1, 2, 1), Options::new().scale(1.0).sink_logits(SinkLogits::PerHead)).unwrap();
        let inputs = Inputs { q: &[1.0], k: &[0.0, 3f32.ln()], v: &[8.0, 16.0], sink_logits: Some(&[4f32.ln()]) };
        let output = forward(&problem, &inputs).unwrap();
        approx::assert_relative_eq!(output.o[0], 7.0, epsilon = 1e-6);
        approx::assert_relative_eq!(output.lse[0], 8f64.ln(), epsilon = 1e-6);
    }

    #[test]
    fn a_row_that_sees_nothing() {
        let shape = one_head(2, 1, 1);
        let data = Inputs { q: &[1.0, 1.0], k: &[f32::NAN], v: &[f32::INFINITY], sink_logits: None };
        let options = Options::new().causal(true).query_offset(-2);
        let none = forward(&Problem::new(shape, options).unwrap(), &data).unwrap();
        assert_eq!((none.o, none.lse), (vec![0.0; 2], vec![f64::NEG_INFINITY; 2]));
        let options = options.sink_logits(SinkLogits::PerHead);
        let data = Inputs { sink_logits: Some(&[-3.5]), ..data };
        let sink = forward(&Problem::new(shape, options).unwrap(), &data).unwrap();
        assert_eq!((sink.o, sink.lse), (vec![0.0; 2], vec![-3.5; 2]));
    }

    /// A loss that every gradient flows from, and its gradients by central differences.
    fn finite_differences(problem: &Problem, operands: &Operands, upstream: &Upstream<'_>) -> Gradients<f64, f64> {
        let weighted = |x: &[f64], weights: &[f32]| -> f64 {
            // Rows that see nothing have an lse of -inf and d_lse is ignored.
            x.iter().zip(weights).filter(|(x, _)| x.is_finite()).map(|(x, &w)| x * f64::from(w)).sum()
        };
        let loss = |operands: &Operands| {
            let output = operands.forward(problem);
            weighted(&output.o, upstream.d_o) + upstream.d_lse.map_or(0.0, |d_lse| weighted(&output.lse, d_lse))
        };
        // The error of a step h is about h^2 + 1e-16 / h.
        let step = 1e-5;
        let differences = |entries: fn(&mut Operands) -> &mut [f64]| -> Vec<f64> {
            let mut moved = operands.clone();
            let count = entries(&mut moved).len();
            let mut at = |n: usize, x: f64| {
                entries(&mut moved)[n] = x;
                loss(&moved)
            };
            let start = entries(&mut operands.clone()).to_vec();
            (0..count)
                .map(|n| {
                    let difference = at(n, start[n] + step) - at(n, start[n] - step);
                    at(n, start[n]);
                    difference / (2.0 * step)
                })
                .collect()
        };
        let per_head = problem.options().sink_logits == SinkLogits::PerHead;
        Gradients {
            d_q: differences(|o| &mut o.q.data),
            d_k: differences(|o| &mut o.k.data),
            d_v: differences(|o| &mut o.v.data),
            d_sink_logits: per_head.then(|| differences(|o| o.sink_logits.as_mut().unwrap())),
        }
    }

    #[test]
    fn gradients_are_finite_differences() {
        let full = Options::new;
        let masks = [
            full(),
            full().causal(true),
            full().causal(true).alignment(Alignment::TopLeft),
            full().window(Window::keys(2)).sink_tokens(1),
            full().window(Window::new(1, 1)).scale(-0.7),
            full().causal(true).query_offset(-2),
            full().window(Window::keys(2)).query_offset(1).scale(0.0),
        ];
        let mut seed = 0;
        for (m, n) in [(1, 1), (1, 5), (3, 3), (4, 2), (3, 6)] {
            for mask in masks {
                for sink_logits in [SinkLogits::None, SinkLogits::OffByOne, SinkLogits::PerHead] {
                    for (layout, heads, kv_heads) in [(Layout::Bshd, 2, 1), (Layout::Bhsd, 4, 2)] {
                        let shape = Shape { batch: 2, heads, kv_heads, seq_q: m, seq_k: n, head_dim: 3, value_dim: 2 };
                        let problem = Problem::new(shape, mask.layout(layout).sink_logits(sink_logits)).unwrap();
                        seed += 1;
                        let mut rng = StdRng::seed_from_u64(seed);
                        let mut random = |shape: &[usize]| -> Vec<f32> {
                            (0..shape.iter().product()).map(|_| rng.random_range(-1.0..1.0)).collect()
                        };
                        let (q, k, v) =
                            (random(&problem.q_shape()), random(&problem.k_shape()), random(&problem.v_shape()));
                        let (d_o, d_lse) = (random(&problem.o_shape()), random(&problem.lse_shape()));
                        let sinks = (sink_logits == SinkLogits::PerHead).then(|| random(&[heads]));
                        let inputs = Inputs { q: &q, k: &k, v: &v, sink_logits: sinks.as_deref() };
                        let upstream = Upstream { d_o: &d_o, d_lse: (seed % 4 > 0).then_some(&d_lse[..]) };

                        let gradients = backward(&problem, &inputs, &upstream).unwrap();
                        let expected = finite_differences(&problem, &Operands::new(&problem, &inputs), &upstream);
                        assert_eq!(gradients.d_sink_logits.is_some(), sinks.is_some());
                        let all = |g: Gradients<f64, f64>| {
                            [g.d_q, g.d_k, g.d_v, g.d_sink_logits.unwrap_or_default()].map(|g| g.into_iter())
                        };
                        for (name, (actual, expected)) in
                            ["d_q", "d_k", "d_v", "d_sink"].iter().zip(all(gradients).into_iter().zip(all(expected)))
                        {
                            assert_eq!(actual.len(), expected.len());
                            for (n, (x, y)) in actual.zip(expected).enumerate() {
                                assert!((x - y).abs() <= 1e-8, "{problem}: {name}[{n}] is {x}, not {y}");
                            }
                        }
                    }
                }
            }
        }
    }
}
