//! Tables of cosines and sines for rotary embeddings.

use std::f64::consts::TAU;

use crate::problem::error::{Error, Result};

/// The frequencies by which the pairs of features of a rotary embedding turn, and the table of them that a cache takes
/// ([`AppendBuffers::cos_sin`](crate::cache::AppendBuffers::cos_sin)).
///
/// Pair i of dim / 2 turns by `theta^(-2 i / dim)` radians from position to position (Su et al., "RoFormer", arXiv 2104.09864), as
/// [`scaling`](Self::scaling) changes it. Numbers are f64 until the table is rounded to f32: angles grow with the position.
///
/// ```
/// use sink_attention::cache::RotaryFrequencies;
///
/// let table = RotaryFrequencies::new(10_000.0).table(64, 4096)?; // [4096, 64]
/// assert_eq!(table[64 + 0], 1f32.cos()); // position 1, pair 0
/// # Ok::<(), sink_attention::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct RotaryFrequencies {
    /// Base of the frequencies, more than 1: `rope_theta` in Hugging Face's configurations.
    pub theta: f64,
    /// The change for sequences that are longer than those of the training.
    pub scaling: RotaryScaling,
}

/// How a rotary embedding is stretched over sequences that are longer than those of the training.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum RotaryScaling {
    /// Not at all.
    None,
    /// All pairs turn `factor` times slower: position interpolation (Chen et al., arXiv 2306.15595; `linear` in Hugging Face's
    /// configurations).
    Linear {
        /// How much longer sequences are than those of the training.
        factor: f64,
    },
    /// The base grows, to `theta * factor^(dim / (dim - 2))`, so that the slowest pair turns `factor` times slower, and the fastest
    /// as it did: "NTK-aware" (as in section 3.1 of Peng et al., arXiv 2309.00071, with a fixed factor).
    Ntk {
        /// How much longer sequences are than those of the training.
        factor: f64,
    },
    /// Pairs that turn often turn as they did, rare ones `factor` times slower.
    Yarn(Yarn),
}

/// YaRN (Peng et al., "YaRN: Efficient Context Window Extension of Large Language Models", arXiv 2309.00071, section 3.2 and 3.4), with
/// the names and defaults of `rope_scaling` in Hugging Face's configurations.
///
/// A pair turns r times over the positions of the training. From `beta_fast` turns up its frequency f stays, from `beta_slow` down
/// it is f / factor; in between it is on a line from one to the other, by the number i of the pair:
///
/// ```text
/// bound(r) = dim * ln(original_positions / (2 pi r)) / (2 ln theta)
/// low  = max(floor(bound(beta_fast)), 0)
/// high = min(ceil(bound(beta_slow)), dim - 1)
/// slow = clamp((i - low) / (high - low), 0, 1)
/// f_i  = theta^(-2 i / dim) * (slow / factor + 1 - slow)
/// ```
///
/// Cosines and sines are multiplied by `attention_factor`, 0.1 ln(factor) + 1 unless it is given, so that scores grow by its
/// square.
///
/// ```
/// use sink_attention::cache::{RotaryFrequencies, RotaryScaling, Yarn};
///
/// // GPT-OSS: 4096 positions of training, 32 times as many in use.
/// let yarn = Yarn::new(32.0, 4096.0).truncate(false);
/// let table = RotaryFrequencies::new(150_000.0).scaling(RotaryScaling::Yarn(yarn)).table(64, 2)?;
/// let factor = 0.1 * 32f32.ln() + 1.0;
/// assert!((table[0] - factor).abs() < 1e-6); // position 0 does not turn
/// assert!((table[64] - factor * 1f32.cos()).abs() < 1e-6); // position 1: the fastest pair turns as it did
/// # Ok::<(), sink_attention::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Yarn {
    /// How much longer sequences are than those of the training, at least 1.
    pub factor: f64,
    /// Positions of the training: `original_max_position_embeddings`.
    pub original_positions: f64,
    /// Turns from which a pair is left as it is; 32.
    pub beta_fast: f64,
    /// Turns up to which a pair is slowed by the whole factor; 1.
    pub beta_slow: f64,
    /// On cosines and sines; `None` is 0.1 ln(factor) + 1.
    pub attention_factor: Option<f64>,
    /// Whether the bounds of the line are whole numbers, as in the formula above; GPT-OSS says no.
    pub truncate: bool,
}

impl Yarn {
    /// With the defaults of everything else.
    pub fn new(factor: f64, original_positions: f64) -> Self {
        Yarn { factor, original_positions, beta_fast: 32.0, beta_slow: 1.0, attention_factor: None, truncate: true }
    }

    /// Sets [`Yarn::beta_fast`] and [`Yarn::beta_slow`].
    pub fn betas(self, beta_fast: f64, beta_slow: f64) -> Self {
        Yarn { beta_fast, beta_slow, ..self }
    }

    /// Sets [`Yarn::attention_factor`].
    pub fn attention_factor(self, attention_factor: impl Into<Option<f64>>) -> Self {
        Yarn { attention_factor: attention_factor.into(), ..self }
    }

    /// Sets [`Yarn::truncate`].
    pub fn truncate(self, truncate: bool) -> Self {
        Yarn { truncate, ..self }
    }

    /// The factor of cosines and sines.
    fn concentration(&self) -> f64 {
        self.attention_factor.unwrap_or_else(|| 0.1 * self.factor.ln() + 1.0)
    }

    fn frequencies(&self, theta: f64, dim: u32) -> Vec<f64> {
        let dim = f64::from(dim);
        let bound = |turns: f64| dim * (self.original_positions / (turns * TAU)).ln() / (2.0 * theta.ln());
        let (mut low, mut high) = (bound(self.beta_fast), bound(self.beta_slow));
        if self.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        let (low, mut high) = (low.max(0.0), high.min(dim - 1.0));
        // The line becomes a step.
        if low == high {
            high += 0.001;
        }
        let of = |(i, frequency): (usize, f64)| {
            let slow = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
            frequency / self.factor * slow + frequency * (1.0 - slow)
        };
        plain(theta, dim as u32).into_iter().enumerate().map(of).collect()
    }
}

fn plain(theta: f64, dim: u32) -> Vec<f64> {
    (0..dim / 2).map(|i| theta.powf(-2.0 * f64::from(i) / f64::from(dim))).collect()
}

/// Most positions of a table, as many as a sequence has tokens.
const MOST_POSITIONS: usize = 1 << 30;

impl RotaryFrequencies {
    /// Without scaling.
    pub fn new(theta: f64) -> Self {
        RotaryFrequencies { theta, scaling: RotaryScaling::None }
    }

    /// Sets [`RotaryFrequencies::scaling`].
    pub fn scaling(self, scaling: RotaryScaling) -> Self {
        RotaryFrequencies { scaling, ..self }
    }

    /// Radians from position to position of each of the dim / 2 pairs.
    ///
    /// # Errors
    /// [`Error::InvalidOption`] for a dim that is not an even number from 2 up, a theta that is not more than 1, a factor that is not
    /// more than 0 (of YaRN, not at least 1), and for other numbers of [`Yarn`] that are not more than 0 or not finite.
    pub fn frequencies(&self, dim: u32) -> Result<Vec<f64>> {
        self.check(dim)?;
        let theta = self.theta;
        Ok(match self.scaling {
            RotaryScaling::None => plain(theta, dim),
            RotaryScaling::Linear { factor } => plain(theta, dim).into_iter().map(|x| x / factor).collect(),
            // The only pair is the fastest one.
            RotaryScaling::Ntk { .. } if dim == 2 => plain(theta, dim),
            RotaryScaling::Ntk { factor } => plain(theta * factor.powf(f64::from(dim) / (f64::from(dim) - 2.0)), dim),
            RotaryScaling::Yarn(yarn) => yarn.frequencies(theta, dim),
        })
    }

    /// The table for so many features and positions from 0 on, `[positions, dim]`: dim / 2 cosines, then dim / 2 sines for each
    /// position, of YaRN times its attention factor.
    ///
    /// # Errors
    /// As [`frequencies`](Self::frequencies); [`Error::DimensionTooLarge`] for more than 2^30 positions.
    pub fn table(&self, dim: u32, positions: usize) -> Result<Vec<f32>> {
        let frequencies = self.frequencies(dim)?;
        if positions > MOST_POSITIONS {
            let (dimension, value, most) = ("positions", positions as u64, MOST_POSITIONS as u64);
            return Err(Error::DimensionTooLarge { dimension, value, most });
        }
        let size = match self.scaling {
            RotaryScaling::Yarn(yarn) => yarn.concentration(),
            _ => 1.0,
        };
        let of = |position: usize| {
            let turn = move |frequency: &f64| (position as f64 * frequency).sin_cos();
            let cosines = frequencies.iter().map(move |frequency| turn(frequency).1);
            cosines.chain(frequencies.iter().map(move |frequency| turn(frequency).0))
        };
        Ok((0..positions).flat_map(of).map(|x| (size * x) as f32).collect())
    }

    fn check(&self, dim: u32) -> Result<()> {
        let invalid = |option, reason: String| Err(Error::InvalidOption { option, reason });
        if dim < 2 || !dim.is_multiple_of(2) {
            return invalid("rotary", format!("{dim} features; it must be an even number from 2 up"));
        }
        if !(self.theta > 1.0 && self.theta.is_finite()) {
            return invalid("theta", format!("{}; it must be more than 1, and finite", self.theta));
        }
        let (factor, least) = match self.scaling {
            RotaryScaling::None => return Ok(()),
            RotaryScaling::Linear { factor } | RotaryScaling::Ntk { factor } => (factor, f64::MIN_POSITIVE),
            RotaryScaling::Yarn(yarn) => {
                let numbers = [
                    ("original_positions", yarn.original_positions),
                    ("beta_fast", yarn.beta_fast),
                    ("beta_slow", yarn.beta_slow),
                    ("attention_factor", yarn.concentration()),
                ];
                // Without a valid factor, its logarithm is not a number.
                for (option, x) in numbers.into_iter().filter(|_| yarn.factor >= 1.0) {
                    if !(x > 0.0 && x.is_finite()) {
                        return invalid(option, format!("{x}; it must be more than 0, and finite"));
                    }
                }
                (yarn.factor, 1.0)
            }
        };
        if !(factor >= least && factor.is_finite()) {
            return invalid("factor", format!("{factor}; it must be at least {least}, and finite"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn close(a: f64, b: f64) {
        assert!((a - b).abs() <= 1e-12 * b.abs(), "{a} {b}");
    }

    #[test]
    fn frequencies_by_hand() {
        let rotary = RotaryFrequencies::new(10_000.0);
        let plain = rotary.frequencies(8).unwrap();
        plain.iter().zip([1.0, 0.1, 0.01, 0.001]).for_each(|(a, b)| close(*a, b));
        let linear = rotary.scaling(RotaryScaling::Linear { factor: 4.0 }).frequencies(8).unwrap();
        linear.iter().zip(&plain).for_each(|(a, b)| close(*a, b / 4.0));
        let ntk = rotary.scaling(RotaryScaling::Ntk { factor: 4.0 }).frequencies(8).unwrap();
        close(ntk[0], 1.0);
        close(ntk[3], plain[3] / 4.0);
        assert!(ntk[1] < plain[1] && ntk[1] > plain[1] / 4.0);
        // 4096 positions: pairs 0 and 1 turn 652 and 65 times, pairs 2 and 3 six times and less than once.
        // bound(32) = 8 ln(4096 / (64 pi)) / (2 ln 10000) = 1.309, bound(1) = 2.814.
        let yarn = Yarn::new(8.0, 4096.0).truncate(false);
        let found = rotary.scaling(RotaryScaling::Yarn(yarn)).frequencies(8).unwrap();
        let bound = |turns: f64| 8.0 * (4096.0 / (turns * TAU)).ln() / (2.0 * 10_000f64.ln());
        let (low, high) = (bound(32.0), bound(1.0));
        assert!((low - 1.309).abs() < 1e-3 && (high - 2.814).abs() < 1e-3, "{low} {high}");
        close(found[0], 1.0);
        close(found[1], 0.1);
        let slow = (2.0 - low) / (high - low);
        close(found[2], 0.01 * (slow / 8.0 + 1.0 - slow));
        close(found[3], 0.001 / 8.0);
        // Whole bounds are 1 and 3.
        let found = rotary.scaling(RotaryScaling::Yarn(yarn.truncate(true))).frequencies(8).unwrap();
        close(found[2], 0.01 * (0.5 / 8.0 + 0.5));
    }

    #[test]
    fn a_table_is_cosines_then_sines() {
        let yarn = RotaryScaling::Yarn(Yarn::new(8.0, 4096.0));
        for (scaling, size) in [(RotaryScaling::None, 1.0), (yarn, 0.1 * 8f64.ln() + 1.0)] {
            let rotary = RotaryFrequencies::new(500.0).scaling(scaling);
            let (table, frequencies) = (rotary.table(6, 40).unwrap(), rotary.frequencies(6).unwrap());
            assert_eq!(table.len(), 240);
            for (position, row) in table.chunks(6).enumerate() {
                for (i, frequency) in frequencies.iter().enumerate() {
                    let angle = position as f64 * frequency;
                    assert_eq!([row[i], row[3 + i]], [angle.cos(), angle.sin()].map(|x| (size * x) as f32));
                }
            }
        }
    }

    #[test]
    fn wrong_numbers() {
        let good = RotaryFrequencies::new(10_000.0);
        let yarn = |yarn| good.scaling(RotaryScaling::Yarn(yarn));
        for (rotary, dim, text) in [
            (good, 0, "0 features"),
            (good, 7, "7 features"),
            (RotaryFrequencies::new(1.0), 8, "option theta: 1;"),
            (RotaryFrequencies::new(f64::NAN), 8, "option theta: NaN;"),
            (good.scaling(RotaryScaling::Linear { factor: 0.0 }), 8, "option factor: 0;"),
            (good.scaling(RotaryScaling::Ntk { factor: -1.0 }), 8, "option factor: -1;"),
            (yarn(Yarn::new(0.5, 4096.0)), 8, "option factor: 0.5; it must be at least 1"),
            (yarn(Yarn::new(f64::NAN, 4096.0)), 8, "option factor: NaN"),
            (yarn(Yarn::new(2.0, 0.0)), 8, "option original_positions: 0;"),
            (yarn(Yarn::new(2.0, 4096.0).betas(f64::INFINITY, 1.0)), 8, "option beta_fast: inf;"),
            (yarn(Yarn::new(2.0, 4096.0).attention_factor(-1.0)), 8, "option attention_factor: -1;"),
        ] {
            let error = rotary.table(dim, 3).unwrap_err().to_string();
            assert!(error.contains(text), "{error}, wanted {text}");
        }
        let error = good.table(2, usize::MAX).unwrap_err().to_string();
        assert!(error.contains("positions is 18446744073709551615, the most is 1073741824"), "{error}");
    }
}
