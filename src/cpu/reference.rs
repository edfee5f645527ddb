//! The definition: dense attention in f64, written for reading, not for speed.
//!
//! Every other path of the crate is tested against this one.

use super::rows::Rows;
use crate::error::Result;
use crate::problem::{Inputs, Output, Problem, SinkLogits};

/// Forward pass in f64: `lse_i = log(sum_j exp(s_ij) + exp(sink))`, `o_i = sum_j exp(s_ij - lse_i) v_j`.
///
/// # Errors
/// Those of [`Problem::check_inputs`].
pub fn forward(problem: &Problem, inputs: &Inputs<'_>) -> Result<Output<f64>> {
    problem.check_inputs(inputs)?;
    let shape = problem.shape();
    let layout = problem.options().layout;
    let q = Rows::new(inputs.q, layout, shape.heads, shape.seq_q, shape.head_dim);
    let k = Rows::new(inputs.k, layout, shape.kv_heads, shape.seq_k, shape.head_dim);
    let v = Rows::new(inputs.v, layout, shape.kv_heads, shape.seq_k, shape.value_dim);
    let o_strides = layout.strides(shape.heads, shape.seq_q, shape.value_dim).map(|s| s as usize);
    let scale = f64::from(problem.scale());

    let mut o = vec![0.0; shape.batch * shape.heads * shape.seq_q * shape.value_dim];
    let mut lse = Vec::with_capacity(shape.batch * shape.heads * shape.seq_q);
    for b in 0..shape.batch {
        for h in 0..shape.heads {
            let g = h / problem.group();
            let sink = sink_logit(problem, inputs, h);
            for i in 0..shape.seq_q {
                let scores: Vec<(usize, f64)> = problem
                    .mask()
                    .visible_keys(i)
                    .into_iter()
                    .flatten()
                    .map(|j| (j, scale * dot(q.row(b, h, i), k.row(b, g, j))))
                    .collect();
                let row_lse = log_sum_exp(scores.iter().map(|&(_, s)| s).chain(sink));
                let start = b * o_strides[0] + h * o_strides[1] + i * o_strides[2];
                let o_row = &mut o[start..start + shape.value_dim];
                for (j, s) in scores {
                    let p = if s == f64::NEG_INFINITY { 0.0 } else { (s - row_lse).exp() };
                    for (o, &v) in o_row.iter_mut().zip(v.row(b, g, j)) {
                        *o += p * f64::from(v);
                    }
                }
                lse.push(row_lse);
            }
        }
    }
    Ok(Output { o, lse })
}

/// The sink logit of a query head, if the problem has one.
pub(super) fn sink_logit(problem: &Problem, inputs: &Inputs<'_>, head: usize) -> Option<f64> {
    match problem.options().sink_logits {
        SinkLogits::None => None,
        SinkLogits::OffByOne => Some(0.0),
        SinkLogits::PerHead => inputs.sink_logits.map(|s| f64::from(s[head])),
    }
}

/// `log(sum exp(x))`, shifted by the maximum; -inf for no terms, or where all are -inf.
pub(super) fn log_sum_exp(terms: impl Iterator<Item = f64> + Clone) -> f64 {
    let max = terms.clone().fold(f64::NEG_INFINITY, f64::max);
    if max.is_infinite() && terms.clone().all(|x| !x.is_nan()) {
        return max;
    }
    max + terms.map(|x| (x - max).exp()).sum::<f64>().ln()
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::problem::{Options, Shape};

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
}
