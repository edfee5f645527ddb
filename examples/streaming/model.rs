//! A layer's q, k and v without a trained model: a fixed random embedding and projections, made so that heads do what
//! trained ones do (Xiao et al., StreamingLLM).
//!
//! - They look at what is near: a part of q and k that all tokens share turns with the position, so that scores fall with
//!   the distance.
//! - They leave their surplus attention on the first token, whose key fits every query, and whose value is next to nothing.
//!   Where it is dropped, that attention falls on whatever else there is.
//!
//! Half of each head turns with the position, as in models with a partial rotary embedding; what fits the first token does
//! not, so that it fits at any distance.

use std::array;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

pub const HEADS: usize = 8;
pub const KV_HEADS: usize = 2;
pub const HEAD_DIM: usize = 64;
/// Features that turn with the position, the first ones.
pub const ROTARY_DIM: usize = 32;
/// Elements of a token's q (or o), and of its k or v.
pub const Q_ROW: usize = HEADS * HEAD_DIM;
pub const KV_ROW: usize = KV_HEADS * HEAD_DIM;
/// The feature of v that tells whether its token is one of the first: o has there what share of the probability they get.
pub const MARK: usize = HEAD_DIM - 1;

const ROPE_THETA: f64 = 10_000.0;
const EMBEDDING: usize = 128;
/// With 1 for k and the scale of 1/sqrt(D), also the standard deviation of a score, but for what follows.
const Q_DEVIATION: f32 = 1.5;
/// The score of a token with itself, of what all tokens share.
const NEAR: f32 = 6.0;
/// Pairs of features that carry it: they turn once in 60 to 6000 tokens.
const NEAR_PAIRS: std::ops::Range<usize> = 4..12;
/// The feature that fits the first token, and the score it has with it.
const FIRST: usize = ROTARY_DIM;
const FIRST_SCORE: f32 = 14.0;

/// The first token, which is no byte of the text.
pub const START: usize = 256;
const TOKENS: usize = START + 1;

/// There are only 257 tokens, so each is projected once.
pub struct Model {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    pub sink_logits: [f32; HEADS],
}

impl Model {
    pub fn new(seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let embedding = random(&mut rng, TOKENS * EMBEDDING, 1.0);
        let mut project = |width, deviation: f32| -> Vec<f32> {
            let weights = random(&mut rng, width * EMBEDDING, deviation / (EMBEDDING as f32).sqrt());
            let rows = embedding.chunks_exact(EMBEDDING);
            rows.flat_map(|row| weights.chunks_exact(EMBEDDING).map(|w| dot(row, w) as f32)).collect()
        };
        let (mut q, mut k, mut v) = (project(Q_ROW, Q_DEVIATION), project(KV_ROW, 1.0), project(KV_ROW, 1.0));
        let scale = (HEAD_DIM as f32).sqrt();
        let near = (NEAR * scale / NEAR_PAIRS.len() as f32).sqrt();
        let first = FIRST_SCORE * scale;
        for q in q.chunks_exact_mut(HEAD_DIM) {
            NEAR_PAIRS.for_each(|pair| q[pair] += near);
            q[FIRST] = first.sqrt();
        }
        for (token, (k, v)) in k.chunks_exact_mut(KV_ROW).zip(v.chunks_exact_mut(KV_ROW)).enumerate() {
            for (k, v) in k.chunks_exact_mut(HEAD_DIM).zip(v.chunks_exact_mut(HEAD_DIM)) {
                if token == START {
                    k.fill(0.0);
                    v.iter_mut().for_each(|x| *x *= 0.01);
                } else {
                    NEAR_PAIRS.for_each(|pair| k[pair] += near);
                }
                k[FIRST] = if token == START { first.sqrt() } else { 0.0 };
            }
        }
        // Beside the window's keys, whose scores sum to about e^10, without the first token 1 to 5 percent.
        let sink_logits = array::from_fn(|_| rng.random_range(5.5..7.0));
        Model { q, k, v, sink_logits }
    }

    /// q of all heads, `[HEADS, HEAD_DIM]`, not rotated.
    pub fn q(&self, token: usize) -> &[f32] {
        row(&self.q, token, Q_ROW)
    }

    /// k of all key heads, `[KV_HEADS, HEAD_DIM]`, not rotated.
    pub fn k(&self, token: usize) -> &[f32] {
        row(&self.k, token, KV_ROW)
    }

    /// v of all key heads, `[KV_HEADS, HEAD_DIM]`, with the mark of the first tokens.
    pub fn v(&self, token: usize, is_first: bool) -> [f32; KV_ROW] {
        let mut v = array::from_fn(|i| row(&self.v, token, KV_ROW)[i]);
        for head in v.chunks_exact_mut(HEAD_DIM) {
            head[MARK] = if is_first { 1.0 } else { 0.0 };
        }
        v
    }
}

fn row(table: &[f32], token: usize, width: usize) -> &[f32] {
    &table[token * width..][..width]
}

/// Uniform numbers: the projections sum many of them, so what attention sees is nearly normal anyway.
fn random(rng: &mut StdRng, n: usize, deviation: f32) -> Vec<f32> {
    let bound = deviation * 3f32.sqrt();
    (0..n).map(|_| rng.random_range(-bound..bound)).collect()
}

pub fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}

/// Cosines and sines, `[positions, ROTARY_DIM]`: the cosines of all pairs, then their sines.
pub fn rotary_table(positions: usize) -> Vec<f32> {
    let angle = |position: usize, i: usize| position as f64 * ROPE_THETA.powf(-2.0 * i as f64 / ROTARY_DIM as f64);
    let of = |position: usize| {
        let of = move |turn: fn(f64) -> f64| (0..ROTARY_DIM / 2).map(move |i| turn(angle(position, i)) as f32);
        of(f64::cos).chain(of(f64::sin))
    };
    (0..positions).flat_map(of).collect()
}

/// Rotates each head of a token; feature i pairs with i + ROTARY_DIM / 2 ("half-split").
pub fn rotate(heads: &mut [f32], position: usize, table: &[f32]) {
    let (cosines, sines) = table[position * ROTARY_DIM..][..ROTARY_DIM].split_at(ROTARY_DIM / 2);
    for head in heads.chunks_exact_mut(HEAD_DIM) {
        for (i, (&cos, &sin)) in cosines.iter().zip(sines).enumerate() {
            let (a, b, cos, sin) =
                (f64::from(head[i]), f64::from(head[i + ROTARY_DIM / 2]), f64::from(cos), f64::from(sin));
            head[i] = (a * cos - b * sin) as f32;
            head[i + ROTARY_DIM / 2] = (b * cos + a * sin) as f32;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Scores of the first query head.
    fn score(q: usize, k: usize, positions: [usize; 2]) -> f64 {
        let (model, table) = (Model::new(1), rotary_table(10_000));
        let (mut q, mut k) = (model.q(q).to_vec(), model.k(k).to_vec());
        rotate(&mut q, positions[0], &table);
        rotate(&mut k, positions[1], &table);
        dot(&q[..HEAD_DIM], &k[..HEAD_DIM]) / 8.0
    }

    #[test]
    fn scores_depend_on_the_distance_only() {
        let [q, k] = [b'q', b'k'].map(usize::from);
        approx::assert_abs_diff_eq!(score(q, k, [9, 2]), score(q, k, [9009, 9002]), epsilon = 1e-4);
        assert!((score(q, k, [9, 2]) - score(q, k, [9, 3])).abs() > 1e-3);
    }

    #[test]
    fn heads_look_at_what_is_near_and_at_the_first_token() {
        let mean = |distance: usize| {
            let pairs = (b'a'..=b'h').flat_map(|a| (b'n'..=b'u').map(move |b| [a, b].map(usize::from)));
            pairs.map(|[q, k]| score(q, k, [distance, 0])).sum::<f64>() / 64.0
        };
        assert!(mean(1) > mean(100) + 1.0 && mean(100) > mean(5000) + 1.0, "{} {} {}", mean(1), mean(100), mean(5000));
        for distance in [1, 300, 9000] {
            approx::assert_abs_diff_eq!(
                score(b'q'.into(), START, [distance, 0]),
                f64::from(FIRST_SCORE),
                epsilon = 1e-3
            );
        }
    }
}
