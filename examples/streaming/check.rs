//! Results of the stream against the f64 definition over all that a query should see.

use std::collections::BTreeSet;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use sink_attention::cpu::reference;
use sink_attention::{Inputs, Options, Problem, Result, Shape, SinkLogits};

use crate::model::{HEAD_DIM, HEADS, KV_HEADS, rotate};
use crate::policy::{Policy, Settings};
use crate::stream::Scene;

/// The largest error accepted.
pub const TOLERANCE: f64 = 1e-5;
const ROWS: usize = 16;

/// The tokens to check: the first, the last, those at the edges of the window and of the full cache, others at random.
pub fn choose_rows(tokens: usize, settings: &Settings, seed: u64) -> Vec<usize> {
    if tokens <= ROWS {
        return (0..tokens).collect();
    }
    let Settings { window, sink_tokens, capacity } = *settings;
    let edges =
        [0, tokens - 1, window - 1, window, window + sink_tokens, window + sink_tokens + 1, capacity - 1, capacity];
    let mut rows: BTreeSet<usize> = edges.into_iter().filter(|&t| t < tokens).collect();
    let mut rng = StdRng::seed_from_u64(seed);
    while rows.len() < ROWS {
        rows.insert(rng.random_range(0..tokens));
    }
    rows.into_iter().collect()
}

/// The worst errors of any token and head.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
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

    pub fn worst(self, other: Errors) -> Errors {
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

/// The errors of a token's results, all heads: its keys and values are made anew from the text, those that the policy
/// keeps, and rotated by their places among them.
pub fn against_reference(scene: &Scene<'_>, policy: Policy, t: usize, o: &[f32], lse: &[f32]) -> Result<Errors> {
    let (mut k, mut v) = (Vec::new(), Vec::new());
    let tokens: Vec<usize> = policy.visible(&scene.settings, t).into_iter().flatten().collect();
    for (place, &key) in tokens.iter().enumerate() {
        let mut turned = scene.model.k(scene.text.token(key)).to_vec();
        rotate(&mut turned, place, scene.table);
        k.extend(turned);
        v.extend(scene.model.v(scene.text.token(key), key < scene.settings.sink_tokens));
    }
    let mut q = scene.model.q(scene.text.token(t)).to_vec();
    rotate(&mut q, tokens.len() - 1, scene.table);
    let shape = Shape {
        batch: 1,
        heads: HEADS,
        kv_heads: KV_HEADS,
        seq_q: 1,
        seq_k: tokens.len(),
        head_dim: HEAD_DIM,
        value_dim: HEAD_DIM,
    };
    let problem = Problem::new(shape, Options::new().sink_logits(SinkLogits::PerHead))?;
    let inputs = Inputs::new(&q, &k, &v).sink_logits(&scene.model.sink_logits[..]);
    let expected = reference::forward(&problem, &inputs)?;
    Ok(compare(o, lse, &expected.o, &expected.lse))
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
        let settings = Settings { window: 128, sink_tokens: 4, capacity: 2048 };
        let rows = choose_rows(100_000, &settings, 1);
        assert_eq!(rows.len(), ROWS);
        let edges = [0, 127, 128, 132, 133, 2047, 2048, 99_999];
        assert!(rows.is_sorted() && edges.iter().all(|t| rows.contains(t)), "{rows:?}");
        for tokens in 1..40 {
            let rows = choose_rows(tokens, &settings, 1);
            assert_eq!(rows.len(), tokens.min(ROWS));
            assert!(rows.contains(&0) && rows.contains(&(tokens - 1)), "{rows:?}");
        }
    }
}
