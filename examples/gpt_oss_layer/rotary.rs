//! Cosines and sines of the rotary embedding, YaRN's among them.

use std::f64::consts::TAU;

use crate::config::{Rope, Yarn};

/// `[positions, dim]`: dim / 2 cosines, then dim / 2 sines for each position, YaRN's concentration in both.
pub fn table(rope: &Rope, dim: usize, positions: usize) -> Vec<f32> {
    let (frequencies, concentration) = match rope {
        Rope::Default { theta } => ((0..dim / 2).map(|i| plain(*theta, i, dim)).collect(), 1.0),
        Rope::Yarn(yarn) => (frequencies(yarn, dim), concentration(yarn)),
    };
    let of = |position: usize| {
        // In f64: angles grow with the position.
        let turn = move |frequency: &f64| (position as f64 * frequency).sin_cos();
        let cosines = frequencies.iter().map(move |frequency| turn(frequency).1);
        cosines.chain(frequencies.iter().map(move |frequency| turn(frequency).0))
    };
    (0..positions).flat_map(of).map(|x| (concentration * x) as f32).collect()
}

fn plain(theta: f64, i: usize, dim: usize) -> f64 {
    theta.powf(-2.0 * i as f64 / dim as f64)
}

/// Fast pairs turn as they did in training, slow ones `factor` times slower, with a ramp in between.
fn frequencies(yarn: &Yarn, dim: usize) -> Vec<f64> {
    // The pair that turns so many times over the positions of the training.
    let pair = |turns: f64| dim as f64 * (yarn.original_positions / (turns * TAU)).ln() / (2.0 * yarn.theta.ln());
    let (mut low, mut high) = (pair(yarn.beta_fast), pair(yarn.beta_slow));
    if yarn.truncate {
        (low, high) = (low.floor(), high.ceil());
    }
    let (low, mut high) = (low.max(0.0), high.min(dim as f64 - 1.0));
    if low == high {
        high += 0.001;
    }
    let of = |i: usize| {
        let slow = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
        let plain = plain(yarn.theta, i, dim);
        plain / yarn.factor * slow + plain * (1.0 - slow)
    };
    (0..dim / 2).map(of).collect()
}

fn concentration(yarn: &Yarn) -> f64 {
    yarn.attention_factor.unwrap_or(0.1 * yarn.factor.ln() + 1.0)
}

/// Rotates rows of `[tokens, heads, dim]` from position 0 on; feature i pairs with i + dim / 2.
pub fn rotate(x: &mut [f32], heads: usize, dim: usize, table: &[f32]) {
    for (token, turn) in x.chunks_exact_mut(heads * dim).zip(table.chunks_exact(dim)) {
        let (cosines, sines) = turn.split_at(dim / 2);
        for head in token.chunks_exact_mut(dim) {
            let (low, high) = head.split_at_mut(dim / 2);
            for (((a, b), cos), sin) in low.iter_mut().zip(high).zip(cosines).zip(sines) {
                (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
            }
        }
    }
}
