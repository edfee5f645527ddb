//! Rows of the stream against the f64 definition on the full sequence.

use std::collections::BTreeSet;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use sink_attention::cpu::reference;
use sink_attention::{Inputs, Problem, Result, Shape};

use crate::model::{HEAD_DIM, HEADS, KV_HEADS, KV_ROW, Model, Q_ROW, Rotary};
use crate::stream::{Settings, Text};

/// The largest error accepted.
pub const TOLERANCE: f64 = 1e-5;
const ROWS: usize = 16;

/// The results of one token, all heads.
pub struct Row {
    pub position: usize,
    /// `[HEADS, HEAD_DIM]`
    pub o: Vec<f32>,
    /// `[HEADS]`
    pub lse: Vec<f32>,
}

/// The rows to check: the first, the last, those at the edges of chunks and of the window, the others at random.
pub fn choose_rows(tokens: usize, settings: &Settings, seed: u64) -> Vec<usize> {
    if tokens <= ROWS {
        return (0..tokens).collect();
    }
    let Settings { window, sink_tokens, chunk } = *settings;
    let middle = tokens / chunk / 2 * chunk;
    let edges = [0, tokens - 1, chunk - 1, chunk, window - 1, window, window + sink_tokens, middle, middle + chunk - 1];
    let mut rows: BTreeSet<usize> = edges.into_iter().filter(|&t| t < tokens).collect();
    let mut rng = StdRng::seed_from_u64(seed);
    while rows.len() < ROWS {
        rows.insert(rng.random_range(0..tokens));
    }
    rows.into_iter().collect()
}

/// The worst errors of any row and head.
#[derive(Debug, Clone, Copy, Default)]
pub struct Errors {
    /// ||o - expected|| / ||expected||
    pub o: f64,
    /// |lse - expected| / (1 + |expected|): absolute for small ones, relative for large ones.
    pub lse: f64,
}

impl Errors {
    /// Not so where an error is NaN.
    pub fn within(&self, tolerance: f64) -> bool {
        self.o <= tolerance && self.lse <= tolerance
    }

    fn worst(self, other: Errors) -> Errors {
        // f64::max would let a number hide a NaN.
        let worst = |a: f64, b: f64| if a.is_nan() || a > b { a } else { b };
        Errors { o: worst(self.o, other.o), lse: worst(self.lse, other.lse) }
    }
}

/// The worst errors of some heads: `o` is `[heads, HEAD_DIM]`, `lse` is `[heads]`.
fn compare(o: &[f32], lse: &[f32], expected_o: &[f64], expected_lse: &[f64]) -> Errors {
    assert_eq!((o.len(), lse.len()), (expected_o.len(), expected_lse.len()));
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    let heads = o.chunks_exact(HEAD_DIM).zip(expected_o.chunks_exact(HEAD_DIM)).zip(lse.iter().zip(expected_lse));
    heads.fold(Errors::default(), |errors, ((o, expected_o), (&lse, &expected_lse))| {
        let difference = norm(&mut o.iter().zip(expected_o).map(|(&o, &e)| f64::from(o) - e));
        errors.worst(Errors {
            o: difference / norm(&mut expected_o.iter().copied()),
            lse: (f64::from(lse) - expected_lse).abs() / (1.0 + expected_lse.abs()),
        })
    })
}

/// The worst errors of `rows`, each against the definition with all keys up to it, made anew from the text.
///
/// One key head at a time, as this is the only place that holds the whole sequence. It is quick nevertheless, as
/// the definition touches visible keys only.
pub fn against_reference(rows: &[Row], model: &Model, text: &Text, settings: &Settings) -> Result<Errors> {
    const GROUP: usize = HEADS / KV_HEADS;
    let rotary = Rotary::new();
    let keys = rows.iter().map(|row| row.position + 1).max().unwrap_or(0);
    let (mut k, mut v) = (Vec::with_capacity(keys * HEAD_DIM), Vec::with_capacity(keys * HEAD_DIM));
    let (mut q, mut all_k) = ([0.0; Q_ROW], [0.0; KV_ROW]);
    let mut errors = Errors::default();
    for g in 0..KV_HEADS {
        k.clear();
        v.clear();
        let head = g * HEAD_DIM..(g + 1) * HEAD_DIM;
        for t in 0..keys {
            model.write_k(text.byte(t), &rotary.at(t), &mut all_k);
            k.extend_from_slice(&all_k[head.clone()]);
            v.extend_from_slice(&model.v(text.byte(t))[head.clone()]);
        }
        let group = g * GROUP..(g + 1) * GROUP;
        let group_row = group.start * HEAD_DIM..group.end * HEAD_DIM;
        for row in rows {
            let t = row.position;
            let shape = Shape {
                batch: 1,
                heads: GROUP,
                kv_heads: 1,
                seq_q: 1,
                seq_k: t + 1,
                head_dim: HEAD_DIM,
                value_dim: HEAD_DIM,
            };
            let problem = Problem::new(shape, settings.options().query_offset(t as i64))?;
            model.write_q(text.byte(t), &rotary.at(t), &mut q);
            let keys = ..(t + 1) * HEAD_DIM;
            let inputs = Inputs::new(&q[group_row.clone()], &k[keys], &v[keys]);
            let inputs = inputs.sink_logits(&model.sink_logits[group.clone()]);
            let expected = reference::forward(&problem, &inputs)?;
            let (o, lse) = (&row.o[group_row.clone()], &row.lse[group.clone()]);
            errors = errors.worst(compare(o, lse, &expected.o, &expected.lse));
        }
    }
    Ok(errors)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_result_fails() {
        // Two heads, the second one small: its error must not drown in the first one's size.
        let expected_o = [[100.0; HEAD_DIM], [1e-3; HEAD_DIM]].concat();
        let expected_lse = [3.0, -20.0];
        let o: Vec<f32> = expected_o.iter().map(|&x| x as f32).collect();
        let lse = expected_lse.map(|x| x as f32);
        assert!(compare(&o, &lse, &expected_o, &expected_lse).within(TOLERANCE));

        for (index, value) in [(0, 100.01), (70, 1.001e-3), (70, 0.0), (5, f32::NAN), (70, f32::INFINITY)] {
            let mut wrong = o.clone();
            wrong[index] = value;
            let errors = compare(&wrong, &lse, &expected_o, &expected_lse);
            assert!(!errors.within(TOLERANCE), "o[{index}] = {value}: {errors:?}");
        }
        for wrong in [[3.0001, -20.0], [3.0, -20.001], [f32::NAN, -20.0], [3.0, f32::NEG_INFINITY]] {
            let errors = compare(&o, &wrong, &expected_o, &expected_lse);
            assert!(!errors.within(TOLERANCE), "lse = {wrong:?}: {errors:?}");
        }
    }

    #[test]
    fn rows_include_the_ends_and_edges() {
        let settings = Settings { window: 128, sink_tokens: 4, chunk: 256 };
        let rows = choose_rows(100_000, &settings, 1);
        assert_eq!(rows.len(), ROWS);
        assert!(rows.is_sorted() && [0, 127, 128, 132, 255, 256, 99_999].iter().all(|t| rows.contains(t)), "{rows:?}");
        for tokens in 1..40 {
            let rows = choose_rows(tokens, &settings, 1);
            assert_eq!(rows.len(), tokens.min(ROWS));
            assert!(rows.contains(&0) && rows.contains(&(tokens - 1)), "{rows:?}");
        }
    }
}
