//! Problems in one line, random and handmade operands, and the check against the definition.

use std::ops::Range;

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

use super::compare::{accepted, lse as compare_lse, rows as compare_rows, tensor as compare};
use super::random::Random;
use crate::cpu::reference;
use crate::plan::Sequence;
use crate::{
    Alignment, Attention, Bias, DType, Element, Inputs, Layout, MaskData, MaskPacking, Options, Output, Problem, Shape,
    SinkLogits, Window,
};

/// Accepted error of an f32 path: relative to the norm for o, absolute and relative for lse.
pub const BOUND: f64 = 1e-5;

/// Sizes around, below and above those of tiles. None of them is even.
pub const SIZES: [[usize; 2]; 7] = [[1, 1], [1, 257], [3, 3], [64, 1], [63, 65], [113, 203], [239, 1]];

/// Every option, alone and with other options.
pub fn options() -> Vec<Options> {
    let new = Options::new();
    let causal = new.causal(true);
    let per_head = new.sink_logits(SinkLogits::PerHead);
    let left_only = Window { left: Some(20), right: None };
    let right_only = Window { left: None, right: Some(6) };
    vec![
        new,
        per_head.causal(true),
        causal.sink_logits(SinkLogits::OffByOne).alignment(Alignment::TopLeft),
        per_head.window(Window::keys(17)).sink_tokens(3).layout(Layout::Bhsd),
        new.window(Window::new(9, 4)).layout(Layout::Bhsd),
        causal.window(left_only).sink_tokens(40),
        per_head.window(right_only),
        new.window(left_only).alignment(Alignment::TopLeft),
        // Windows and sink tokens with whole tiles hidden between them.
        per_head.window(Window::keys(2)).sink_tokens(33),
        new.window(Window::keys(1)),
        // The first 30 queries see nothing.
        per_head.causal(true).query_offset(-30),
        causal.query_offset(-30),
        // Every query is far behind the keys: the window sees nothing, and the sink tokens remain.
        per_head.window(Window::keys(50)).query_offset(1000),
        new.window(Window::keys(50)).sink_tokens(5).query_offset(1000),
        causal.query_offset(i64::MIN),
        new.scale(0.37),
        new.scale(0.0),
        per_head.scale(-0.5),
    ]
}

/// The problem with `[batch, heads, kv_heads]`, `[seq_q, seq_k]` and `[head_dim, value_dim]`.
pub fn problem(heads: [usize; 3], seq: [usize; 2], width: [usize; 2], options: Options) -> Problem {
    let [batch, heads, kv_heads] = heads;
    let [seq_q, seq_k] = seq;
    let [head_dim, value_dim] = width;
    Problem::new(Shape { batch, heads, kv_heads, seq_q, seq_k, head_dim, value_dim }, options).unwrap()
}

/// Operands on the host that a test may change.
#[derive(Debug, Clone)]
pub struct Operands<T = f32> {
    pub q: Vec<T>,
    pub k: Vec<T>,
    pub v: Vec<T>,
    pub sink_logits: Option<Vec<f32>>,
    pub alibi_slopes: Option<Vec<f32>>,
    pub bias: Option<BiasValues<T>>,
    pub mask: Option<MaskValues>,
}

/// A bias of either element type.
#[derive(Debug, Clone)]
pub enum BiasValues<T> {
    F32(Vec<f32>),
    Operand(Vec<T>),
}

impl<T: Element> BiasValues<T> {
    /// An element, in f32.
    pub fn at(&self, n: usize) -> f32 {
        match self {
            BiasValues::F32(bias) => bias[n],
            BiasValues::Operand(bias) => bias[n].to_f32(),
        }
    }
}

/// A mask of either packing.
#[derive(Debug, Clone)]
pub enum MaskValues {
    Bytes(Vec<u8>),
    Bits(Vec<u32>),
}

impl MaskValues {
    /// A random mask: a tenth of the pairs is hidden one by one, and whole blocks of 48 keys by 40 queries are hidden or visible.
    fn new(problem: &Problem, rng: &mut StdRng) -> Option<Self> {
        let options = problem.options().mask_packing(MaskPacking::Bytes);
        let axes = options.mask?;
        let [batch, heads, seq_q, seq_k] = {
            let [b, h, m, n] = full_pairs(problem);
            let own = |own: bool, size| if own { size } else { 1 };
            [own(axes.batch, b), own(axes.heads, h), own(axes.seq_q, m), n]
        };
        let mut bytes = Vec::with_capacity(batch * heads * seq_q * seq_k);
        for _ in 0..batch * heads {
            let blocks: Vec<u8> =
                (0..seq_q.div_ceil(40) * seq_k.div_ceil(48)).map(|_| rng.random_range(0..3)).collect();
            for i in 0..seq_q {
                for j in 0..seq_k {
                    bytes.push(match blocks[i / 40 * seq_k.div_ceil(48) + j / 48] {
                        0 => 0,
                        1 => 7,
                        _ => u8::from(rng.random_range(0..10) > 0),
                    });
                }
            }
        }
        Some(MaskValues::packed(bytes, problem.options().mask_packing, seq_k))
    }

    /// A mask in bytes, of rows of `keys`, converted to a packing.
    fn packed(bytes: Vec<u8>, packing: MaskPacking, keys: usize) -> Self {
        match packing {
            MaskPacking::Bytes => MaskValues::Bytes(bytes),
            MaskPacking::Bits => MaskValues::Bits(MaskData::pack(&bytes, keys)),
        }
    }
}

/// The slopes of ALiBi's authors for the problem's heads: 2^(-8 h / H), h from 1 (Press et al., arXiv:2108.12409).
pub fn slopes(problem: &Problem) -> Vec<f32> {
    let heads = problem.shape().heads;
    (1..=heads).map(|h| (-8.0 * h as f32 / heads as f32).exp2()).collect()
}

/// A mask for timing: causal if the problem is not, and otherwise one that hides one pair in 256.
pub fn timed_mask(problem: &Problem) -> Option<MaskValues> {
    let (options, mut random) = (problem.options(), Random::new(0, "timed mask"));
    let [batch, heads, rows, _] = problem.mask_shape()?;
    let keys = full_pairs(problem)[3];
    let mut shows = |at: usize| match options.causal {
        true => random.below(256) > 0,
        false => at % keys <= at / keys % rows + keys.saturating_sub(rows),
    };
    let bytes = (0..batch * heads * rows * keys).map(|at| u8::from(shows(at))).collect();
    Some(MaskValues::packed(bytes, options.mask_packing, keys))
}

/// `[B, H, M, N]` of the longest sequence.
fn full_pairs(problem: &Problem) -> [usize; 4] {
    let longest = |of: fn(Sequence) -> usize| problem.sequences().map(of).max().unwrap_or(0);
    [problem.sequence_count(), problem.shape().heads, longest(|s| s.q_rows), longest(|s| s.k_rows)]
}

impl Operands {
    /// Numbers of unit variance, which depend on the seed alone.
    pub fn random(problem: &Problem, seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let half_width = 3f32.sqrt();
        let mut vector = |len: usize| (0..len).map(|_| rng.random_range(-half_width..half_width)).collect::<Vec<_>>();
        Operands {
            q: vector(problem.q_shape().iter().product()),
            k: vector(problem.k_shape().iter().product()),
            v: vector(problem.v_shape().iter().product()),
            sink_logits: (problem.options().sink_logits == SinkLogits::PerHead).then(|| vector(problem.shape().heads)),
            // Slopes up to 1, as models have them. Steep slopes below 0 would leave a row to its farthest key.
            alibi_slopes: problem.options().alibi.then(|| {
                let slopes = vector(problem.shape().heads);
                slopes.into_iter().map(|x| if x < 0.0 { x / -2.0 } else { x / 20.0 }).collect()
            }),
            bias: problem.bias_shape().map(|shape| {
                let mut bias = vector(shape.iter().product());
                // Every 29th element hides its pair.
                bias.iter_mut().step_by(29).skip(1).for_each(|x| *x = f32::NEG_INFINITY);
                match problem.options().bias_dtype {
                    DType::F32 => BiasValues::F32(bias),
                    _ => BiasValues::Operand(bias),
                }
            }),
            mask: MaskValues::new(problem, &mut StdRng::seed_from_u64(seed ^ 0xa5)),
        }
    }

    /// Like [`random`](Self::random), but a bias and a mask hide pairs one by one, so that sequences of any length have some hidden and
    /// some visible ones.
    pub fn scattered(problem: &Problem, seed: u64) -> Self {
        let (options, mut random) = (*problem.options(), Random::new(seed, "scattered"));
        let heads = problem.shape().heads;
        let mut vector = |shape: &[usize]| random.units(shape.iter().product());
        let bias = problem.bias_shape().map(|shape| {
            let mut bias = vector(&shape);
            bias.iter_mut().filter(|x| **x < -1.4).for_each(|x| *x = f32::NEG_INFINITY);
            match options.bias_dtype {
                DType::F32 => BiasValues::F32(bias),
                _ => BiasValues::Operand(bias),
            }
        });
        let mask = options.mask.map(|axes| {
            let [batch, heads, seq_q, seq_k] = full_pairs(problem);
            let own = |own: bool, size| if own { size } else { 1 };
            let shape = [own(axes.batch, batch), own(axes.heads, heads), own(axes.seq_q, seq_q), seq_k];
            let bytes: Vec<u8> = vector(&shape).into_iter().map(|x| u8::from(x > -0.6)).collect();
            MaskValues::packed(bytes, options.mask_packing, seq_k)
        });
        Operands {
            sink_logits: (options.sink_logits == SinkLogits::PerHead).then(|| vector(&[heads])),
            // Steeper slopes leave nothing to far keys, or nothing to near ones.
            alibi_slopes: options.alibi.then(|| vector(&[heads]).into_iter().map(|x| 0.1 * x).collect()),
            bias,
            mask,
            q: vector(&problem.q_shape()),
            k: vector(&problem.k_shape()),
            v: vector(&problem.v_shape()),
        }
    }

    /// Operands for timing, the same for every problem of a shape: the slopes of ALiBi's authors, and a mask that hides no more than causal
    /// attention does.
    pub fn timed(problem: &Problem) -> Self {
        let mut random = Random::new(0, "timed");
        let mut vector = |shape: [usize; 4]| random.numbers(shape.iter().product());
        let [q, k, v] = [problem.q_shape(), problem.k_shape(), problem.v_shape()].map(&mut vector);
        let per_head = problem.options().sink_logits == SinkLogits::PerHead;
        let sink_logits = per_head.then(|| vector([1, 1, 1, problem.shape().heads]));
        let bias = problem.bias_shape().map(|shape| match problem.options().bias_dtype {
            DType::F32 => BiasValues::F32(vector(shape)),
            _ => BiasValues::Operand(vector(shape)),
        });
        Operands {
            q,
            k,
            v,
            sink_logits,
            alibi_slopes: problem.options().alibi.then(|| slopes(problem)),
            bias,
            mask: timed_mask(problem),
        }
    }

    /// The operands, rounded to an element type.
    pub fn cast<T: Element>(self) -> Operands<T> {
        let Operands { q, k, v, sink_logits, alibi_slopes, bias, mask } = self;
        let bias = bias.map(|bias| match bias {
            BiasValues::F32(bias) => BiasValues::F32(bias),
            BiasValues::Operand(bias) => BiasValues::Operand(T::narrow(bias)),
        });
        let [q, k, v] = [q, k, v].map(T::narrow);
        Operands { q, k, v, sink_logits, alibi_slopes, bias, mask }
    }
}

impl<T: Element> Operands<T> {
    /// Operands without those that go with options.
    pub fn new(q: Vec<T>, k: Vec<T>, v: Vec<T>) -> Self {
        Operands { q, k, v, sink_logits: None, alibi_slopes: None, bias: None, mask: None }
    }

    pub fn inputs(&self) -> Inputs<'_, T> {
        let bias = self.bias.as_ref().map(|bias| match bias {
            BiasValues::F32(bias) => Bias::F32(bias),
            BiasValues::Operand(bias) => Bias::Operand(bias),
        });
        let mask = self.mask.as_ref().map(|mask| match mask {
            MaskValues::Bytes(mask) => MaskData::Bytes(mask),
            MaskValues::Bits(mask) => MaskData::Bits(mask),
        });
        let inputs = Inputs::new(&self.q, &self.k, &self.v).sink_logits(self.sink_logits.as_deref());
        inputs.alibi_slopes(self.alibi_slopes.as_deref()).bias(bias).mask(mask)
    }

    /// Key `j` of a key/value head.
    pub fn key(&mut self, problem: &Problem, batch: usize, kv_head: usize, j: usize) -> &mut [T] {
        let s = problem.shape();
        let row = row(problem, [s.kv_heads, s.seq_k, s.head_dim], [batch, kv_head, j]);
        &mut self.k[row]
    }

    /// Value `j` of a key/value head.
    pub fn value(&mut self, problem: &Problem, batch: usize, kv_head: usize, j: usize) -> &mut [T] {
        let s = problem.shape();
        let row = row(problem, [s.kv_heads, s.seq_k, s.value_dim], [batch, kv_head, j]);
        &mut self.v[row]
    }
}

/// The place of row `[batch, head, position]` of a packed operand of `[heads, seq, width]`.
pub fn row(problem: &Problem, [heads, seq, width]: [usize; 3], at: [usize; 3]) -> Range<usize> {
    let strides = problem.options().layout.strides(heads, seq, width);
    let start = at.iter().zip(strides).map(|(at, stride)| at * stride as usize).sum();
    start..start + width
}

/// Compares a path's result for these operands with the definition.
pub fn check<T: Element>(attention: &Attention, problem: &Problem, operands: &Operands<T>) -> Output<T> {
    check_within(accepted(T::DTYPE), attention, problem, operands)
}

/// Like [`check`], with a bound for problems that amplify the rounding of f32.
pub fn check_within<T: Element>(
    bound: f64,
    attention: &Attention,
    problem: &Problem,
    operands: &Operands<T>,
) -> Output<T> {
    let actual = attention.forward(problem, &operands.inputs()).unwrap();
    let (expected, _, magnitudes) = reference::with_magnitudes(problem, &operands.inputs(), None).unwrap();
    agree_within(bound, &actual, &expected).unwrap_or_else(|error| panic!("{problem}: {error}"));
    let row_bound = bound + score_rounding(problem, operands);
    rows_agree(problem, "o", &actual.o, &expected.o, &magnitudes.o, problem.shape().value_dim, row_bound);
    actual
}

/// The change of a weight by the rounding of the largest score that there may be. All weights of a row may be small.
pub fn score_rounding<T: Element>(problem: &Problem, operands: &Operands<T>) -> f64 {
    let longest = |x: &[T]| {
        let norms =
            x.chunks(problem.shape().head_dim).map(|row| row.iter().map(|&x| x.into().powi(2)).sum::<f64>().sqrt());
        norms.filter(|norm| norm.is_finite()).fold(0.0, f64::max)
    };
    let most = f64::from(problem.scale().abs()) * longest(&operands.q) * longest(&operands.k);
    most * f64::from(f32::EPSILON) / 2.0
}

/// Checks each row of a result against a bound relative to its terms. Rows follow one another. Rows that are not finite are left to other
/// comparisons.
pub fn rows_agree<T: Element>(
    problem: &Problem,
    name: &str,
    actual: &[T],
    expected: &[f64],
    magnitudes: &[f64],
    width: usize,
    bound: f64,
) {
    let rows = (0..expected.len() / width).map(|n| n * width..(n + 1) * width);
    let finite = rows.filter(|row| expected[row.clone()].iter().chain(&magnitudes[row.clone()]).all(|x| x.is_finite()));
    compare_rows(actual, expected, magnitudes, finite, T::DTYPE, bound)
        .unwrap_or_else(|error| panic!("{problem}: {name}: {error}"));
}

/// Compares two results. NaN and infinities must be in the same places.
pub fn agree<T: Element, N: Copy + Into<f64>, S: Copy + Into<f64>>(
    actual: &Output<T>,
    expected: &Output<N, S>,
) -> Result<(), String> {
    agree_within(accepted(T::DTYPE), actual, expected)
}

fn agree_within<T: Element, N: Copy + Into<f64>, S: Copy + Into<f64>>(
    bound: f64,
    actual: &Output<T>,
    expected: &Output<N, S>,
) -> Result<(), String> {
    let (actual_o, o) = finite("o", &actual.o, &expected.o)?;
    if !o.is_empty() {
        compare(&actual_o, &o, bound).map_err(|error| format!("o: {error}"))?;
    }
    let (actual_lse, lse) = finite("lse", &actual.lse, &expected.lse)?;
    if !lse.is_empty() {
        compare_lse(&actual_lse, &lse, BOUND).map_err(|error| format!("lse: {error}"))?;
    }
    Ok(())
}

/// The elements of both that are finite in f32. All other elements must be equal.
fn finite(
    operand: &str,
    actual: &[impl Copy + Into<f64>],
    expected: &[impl Copy + Into<f64>],
) -> Result<(Vec<f32>, Vec<f32>), String> {
    if actual.len() != expected.len() {
        return Err(format!("{operand} has {} elements, expected {}", actual.len(), expected.len()));
    }
    let mut both = (Vec::new(), Vec::new());
    for (i, (&a, &e)) in actual.iter().zip(expected).enumerate() {
        let (a, e) = (a.into() as f32, e.into() as f32);
        if e.is_finite() && a.is_finite() {
            both.0.push(a);
            both.1.push(e);
        } else if !(a == e || (a.is_nan() && e.is_nan())) {
            return Err(format!("{operand}: element {i} is {a}, expected {e}"));
        }
    }
    Ok(both)
}
