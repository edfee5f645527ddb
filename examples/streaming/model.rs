//! A layer's q, k and v without a trained model: a fixed random embedding and projections, and rotary positions.
//!
//! Random weights have no reason to favour the first tokens, as trained ones do: the sink tokens get the
//! probability of any other token. The sink logits are drawn to take a share of the size seen in practice.

use std::array;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

pub const HEADS: usize = 8;
pub const KV_HEADS: usize = 2;
pub const HEAD_DIM: usize = 64;
/// Elements of a token's q, and of its k or v.
pub const Q_ROW: usize = HEADS * HEAD_DIM;
pub const KV_ROW: usize = KV_HEADS * HEAD_DIM;

/// Base of the rotary frequencies, as in GPT-OSS.
const ROPE_THETA: f64 = 150_000.0;
const EMBEDDING: usize = 128;
/// With 1 for k and the scale of 1/sqrt(D), also the standard deviation of a score.
const Q_DEVIATION: f32 = 1.5;

/// There are only 256 tokens, so each is projected once; what is left to do along the stream is the rotation.
pub struct Model {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    pub sink_logits: [f32; HEADS],
}

impl Model {
    pub fn new(seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let embedding = random(&mut rng, 256 * EMBEDDING, 1.0);
        let mut project = |width, deviation: f32| {
            let weights = random(&mut rng, width * EMBEDDING, deviation / (EMBEDDING as f32).sqrt());
            let rows = embedding.chunks_exact(EMBEDDING);
            rows.flat_map(|row| weights.chunks_exact(EMBEDDING).map(|w| dot(row, w) as f32)).collect()
        };
        let (q, k, v) = (project(Q_ROW, Q_DEVIATION), project(KV_ROW, 1.0), project(KV_ROW, 1.0));
        // 260 keys with such scores sum to about e^6.7; these logits take 2 to 15 percent beside them.
        let sink_logits = array::from_fn(|_| rng.random_range(3.0..5.0));
        Model { q, k, v, sink_logits }
    }

    /// Writes the rotated q of all heads, `[HEADS, HEAD_DIM]`.
    pub fn write_q(&self, byte: u8, rotation: &Rotation, q: &mut [f32]) {
        rotation.apply(row(&self.q, byte, Q_ROW), q);
    }

    /// Writes the rotated k of all key heads, `[KV_HEADS, HEAD_DIM]`.
    pub fn write_k(&self, byte: u8, rotation: &Rotation, k: &mut [f32]) {
        rotation.apply(row(&self.k, byte, KV_ROW), k);
    }

    /// v of all key heads, `[KV_HEADS, HEAD_DIM]`: values are not rotated.
    pub fn v(&self, byte: u8) -> &[f32] {
        row(&self.v, byte, KV_ROW)
    }
}

fn row(table: &[f32], byte: u8, width: usize) -> &[f32] {
    &table[usize::from(byte) * width..][..width]
}

/// Uniform numbers: the projections sum many of them, so what attention sees is nearly normal anyway.
fn random(rng: &mut StdRng, n: usize, deviation: f32) -> Vec<f32> {
    let bound = deviation * 3f32.sqrt();
    (0..n).map(|_| rng.random_range(-bound..bound)).collect()
}

pub fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}

/// Angular frequencies of the rotary pairs.
pub struct Rotary([f64; HEAD_DIM / 2]);

impl Rotary {
    pub fn new() -> Self {
        Rotary(array::from_fn(|i| ROPE_THETA.powf(-2.0 * i as f64 / HEAD_DIM as f64)))
    }

    /// In f64: an f32 angle of 100,000 radians would be off by up to 0.004.
    pub fn at(&self, position: usize) -> Rotation {
        Rotation(self.0.map(|frequency| (position as f64 * frequency).sin_cos()))
    }
}

/// Sine and cosine of every rotary pair at one position.
pub struct Rotation([(f64, f64); HEAD_DIM / 2]);

impl Rotation {
    /// Rotates each head; feature i pairs with i + D/2 ("half-split").
    fn apply(&self, heads: &[f32], rotated: &mut [f32]) {
        for (x, y) in heads.chunks_exact(HEAD_DIM).zip(rotated.chunks_exact_mut(HEAD_DIM)) {
            for (i, (sin, cos)) in self.0.iter().enumerate() {
                let (a, b) = (f64::from(x[i]), f64::from(x[i + HEAD_DIM / 2]));
                y[i] = (a * cos - b * sin) as f32;
                y[i + HEAD_DIM / 2] = (b * cos + a * sin) as f32;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_depend_on_the_distance_only() {
        let (model, rotary) = (Model::new(1), Rotary::new());
        let score = |i, j| {
            let (mut q, mut k) = ([0.0; Q_ROW], [0.0; KV_ROW]);
            model.write_q(b'q', &rotary.at(i), &mut q);
            model.write_k(b'k', &rotary.at(j), &mut k);
            dot(&q[..HEAD_DIM], &k[..HEAD_DIM])
        };
        for far in [1_000, 1_000_000] {
            approx::assert_abs_diff_eq!(score(9, 2), score(far + 9, far + 2), epsilon = 1e-4);
        }
        assert!((score(9, 2) - score(9, 3)).abs() > 1e-3);
    }

    #[test]
    fn scores_are_neither_flat_nor_one_hot() {
        let model = Model::new(1);
        let bytes = || b' '..=b'z';
        let scores: Vec<f64> = bytes()
            .flat_map(|a| bytes().map(move |b| (a, b)))
            .map(|(a, b)| dot(&row(&model.q, a, Q_ROW)[..HEAD_DIM], &row(&model.k, b, KV_ROW)[..HEAD_DIM]) / 8.0)
            .collect();
        let deviation = (scores.iter().map(|s| s * s).sum::<f64>() / scores.len() as f64).sqrt();
        assert!((1.0..2.0).contains(&deviation), "{deviation}");
    }
}
