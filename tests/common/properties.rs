//! Random shapes, options, lengths and operands, to hold a path to the definition in f64, and laws for all of them.
//!
//! The numbers are the same in every run. For a long run with other ones:
//!
//! ```text
//! PROPTEST_CASES=5000 PROPTEST_RNG_SEED=1 cargo test -p sink-attention --test host properties::
//! ```
//!
//! `PROPTEST_CASES` counts the problems of each test. What fails is shrunk to the simplest problem that still does, and printed.

use std::fmt::Debug;

use proptest::prelude::*;
use proptest::test_runner::{Config, RngSeed, TestCaseResult, TestRunner};
use sink_attention::cpu::reference;
use sink_attention::half::{bf16, f16};
use sink_attention::testing::compare::{accepted, lse as compare_lse};
use sink_attention::testing::gradients::Backward;
use sink_attention::testing::operands::{MaskValues, Operands};
use sink_attention::{
    Alignment, Attention, Axes, DType, Element, Gradients, Layout, Lengths, MaskPacking, Options, Output, Problem,
    Shape, SinkLogits, Window,
};

/// A problem in plain numbers, which shrink: to fewer and shorter sequences, narrower heads, and options that are off.
#[derive(Debug, Clone)]
pub struct Plain {
    /// Queries and keys of each sequence, how many of them count, and whether they lie one after the other or padded.
    pub sequences: Vec<[usize; 2]>,
    pub packing: Packing,
    pub kv_heads: usize,
    pub group: usize,
    pub widths: [usize; 2],
    pub causal: bool,
    pub window: [Option<usize>; 2],
    pub sink_tokens: usize,
    pub sink_logits: SinkLogits,
    /// Factor on the default scale.
    pub scale: Option<i8>,
    pub softcap: Option<u8>,
    pub alibi: bool,
    pub bias: Option<[bool; 3]>,
    pub narrow_bias: bool,
    pub mask: Option<[bool; 3]>,
    pub mask_bits: bool,
    pub top_left: bool,
    pub query_offset: Option<i64>,
    pub d_lse: bool,
    pub dtype: DType,
    /// Of the operands.
    pub seed: u64,
}

/// How sequences lie in the operands.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Packing {
    /// All as long as the first one.
    Batch(Layout),
    /// As long as the longest one, with lengths.
    Padded(Layout),
    Thd,
}

pub fn plain(longest: usize) -> impl Strategy<Value = Plain> {
    use prop::option::of;
    use prop::sample::select;
    let layout = || select(vec![Layout::Bshd, Layout::Bhsd]);
    let packing = prop_oneof![
        2 => layout().prop_map(Packing::Batch),
        1 => layout().prop_map(Packing::Padded),
        1 => Just(Packing::Thd),
    ];
    let sequences = prop::collection::vec([0..longest, 0..longest], 1..5);
    // Few widths, as each has kernels of its own.
    let widths = || select(vec![4usize, 1, 7, 16, 32, 64, 80]);
    let axes = || of(any::<[bool; 3]>());
    let sink_logits = || select(vec![SinkLogits::None, SinkLogits::OffByOne, SinkLogits::PerHead]);
    let shape = (sequences, packing, 1..4usize, 1..4usize, [widths(), widths()]);
    let ranges = (any::<bool>(), [of(0..longest), of(0..longest)], 0..longest, sink_logits());
    let far = longest as i64;
    let scores = (of(-2..3i8), of(1..40u8), any::<bool>(), axes(), any::<bool>(), axes(), any::<bool>());
    let rest = (
        any::<bool>(),
        of(-far..2 * far),
        any::<bool>(),
        select(vec![DType::F32, DType::F16, DType::Bf16]),
        any::<u64>(),
    );
    (shape, ranges, scores, rest).prop_map(|(shape, ranges, scores, rest)| {
        let (sequences, packing, kv_heads, group, widths) = shape;
        let (causal, window, sink_tokens, sink_logits) = ranges;
        let (scale, softcap, alibi, bias, narrow_bias, mask, mask_bits) = scores;
        let (top_left, query_offset, d_lse, dtype, seed) = rest;
        Plain {
            sequences,
            packing,
            kv_heads,
            group,
            widths,
            causal,
            window,
            sink_tokens,
            sink_logits,
            scale,
            softcap,
            alibi,
            bias,
            narrow_bias,
            mask,
            mask_bits,
            top_left,
            query_offset,
            d_lse,
            dtype,
            seed,
        }
    })
}

pub fn axes([batch, heads, seq_q]: [bool; 3]) -> Axes {
    Axes { batch, heads, seq_q }
}

impl Plain {
    pub fn options(&self) -> Options {
        let layout = match self.packing {
            Packing::Batch(layout) | Packing::Padded(layout) => layout,
            Packing::Thd => Layout::Thd,
        };
        let [left, right] = self.window;
        let mut options = Options::new()
            .causal(self.causal)
            .window(Window { left, right })
            .sink_tokens(self.sink_tokens)
            .sink_logits(self.sink_logits)
            .alibi(self.alibi)
            .alignment(if self.top_left { Alignment::TopLeft } else { Alignment::BottomRight })
            .mask_packing(if self.mask_bits { MaskPacking::Bits } else { MaskPacking::Bytes })
            .layout(layout)
            .dtype(self.dtype)
            .bias_dtype(if self.narrow_bias { self.dtype } else { DType::F32 });
        options.bias = self.bias.map(axes);
        options.mask = self.mask.map(axes);
        options.query_offset = self.query_offset;
        options.scale = self.scale.map(|factor| f32::from(factor) / (self.widths[0] as f32).sqrt());
        options.softcap = self.softcap.map(|softcap| 0.5 * f32::from(softcap));
        options
    }

    pub fn problem(&self) -> Problem {
        let all = |axis: usize| self.sequences.iter().map(move |lengths| lengths[axis]);
        // No operand is empty, though sequences may be.
        let longest = |axis| all(axis).max().unwrap_or(0).max(1);
        let (batch, [seq_q, seq_k]) = match self.packing {
            Packing::Batch(_) => (self.sequences.len(), self.sequences[0].map(|length| length.max(1))),
            Packing::Padded(_) => (self.sequences.len(), [longest(0), longest(1)]),
            Packing::Thd => (1, [all(0).sum::<usize>().max(1), all(1).sum::<usize>().max(1)]),
        };
        let [head_dim, value_dim] = self.widths;
        let heads = self.kv_heads * self.group;
        let shape = Shape { batch, heads, kv_heads: self.kv_heads, seq_q, seq_k, head_dim, value_dim };
        let problem = match self.packing {
            Packing::Batch(_) => Problem::new(shape, self.options()),
            Packing::Padded(_) => {
                let used = |axis| all(axis).map(|length| length as u32).collect::<Vec<_>>();
                let (q, k) = (used(0), used(1));
                Problem::with_lengths(shape, self.options(), Lengths::Used { q: Some(&q), k: Some(&k) })
            }
            Packing::Thd => {
                let cumulative = |axis, tokens: usize| {
                    let mut starts: Vec<u32> = vec![0];
                    starts.extend(all(axis).scan(0, |start, length| {
                        *start += length as u32;
                        Some(*start)
                    }));
                    // The token that there is where all sequences are empty.
                    *starts.last_mut().unwrap() = tokens as u32;
                    starts
                };
                let (q, k) = (cumulative(0, seq_q), cumulative(1, seq_k));
                Problem::with_lengths(shape, self.options(), Lengths::Cumulative { q: &q, k: &k })
            }
        };
        problem.unwrap()
    }
}

/// Operands and what flows in.
pub fn scattered(problem: &Problem, plain: &Plain) -> Backward {
    Backward::scattered(problem, plain.seed, plain.d_lse)
}

/// The mask of a problem whose masks have bytes.
pub fn bytes(mask: &mut Option<MaskValues>) -> &mut [u8] {
    match mask {
        Some(MaskValues::Bytes(bytes)) => bytes,
        _ => &mut [],
    }
}

pub fn norm<T: Copy + Into<f64>>(x: &[T]) -> f64 {
    x.iter().map(|&x| x.into().powi(2)).sum::<f64>().sqrt()
}

/// Holds a result to a share of its norm; where its terms cancel, to one of theirs.
pub fn close<T, N>(name: &str, actual: &[T], expected: &[N], bound: f64, terms: f64) -> Result<(), String>
where
    T: Copy + Into<f64>,
    N: Copy + Into<f64>,
{
    if actual.len() != expected.len() {
        return Err(format!("{name} has {} elements, expected {}", actual.len(), expected.len()));
    }
    let differences: Vec<f64> = actual.iter().zip(expected).map(|(&a, &e)| a.into() - e.into()).collect();
    let (error, norm) = (norm(&differences), norm(expected));
    // So written that NaN is a difference.
    if error <= bound * norm.max(0.1 * terms) {
        return Ok(());
    }
    Err(format!("{name} is off by {error:.2e}, its norm is {norm:.2e}, that of its terms {terms:.2e}"))
}

/// What nothing visible reaches is zero, exactly.
pub fn zero<T: Copy + Into<f64>>(name: &str, actual: &[T], expected: &[f64]) -> Result<(), String> {
    match actual.iter().zip(expected).position(|(&a, &e)| e == 0.0 && a.into() != 0.0) {
        Some(n) => Err(format!("{name}[{n}] is {}, not 0", actual[n].into())),
        None => Ok(()),
    }
}

/// Whether the forward pass of a path rounds probabilities, and with them delta.
pub fn rounds_p(attention: &Attention, problem: &Problem) -> bool {
    let rounds =
        |plan: sink_attention::plan::Plan| plan.passes.iter().any(|pass| pass.variant.micro_kernel.multiplies_halves());
    attention.plan_forward(problem).is_ok_and(rounds)
}

pub fn run<T: Element>(
    attention: &Attention,
    problem: &Problem,
    operands: &Backward<T>,
) -> Result<(Output<T>, Gradients<T>), String> {
    let output = attention.forward(problem, &operands.operands.inputs()).map_err(|error| error.to_string())?;
    let gradients = attention.backward(problem, &operands.operands.inputs(), &output, &operands.upstream());
    Ok((output, gradients.map_err(|error| error.to_string())?))
}

/// Holds a path to the definition, and to bits that what is hidden cannot change.
pub fn agrees<T: Element>(attention: &Attention, plain: &Plain) -> Result<(), String> {
    let problem = plain.problem();
    let operands = scattered(&problem, plain).cast::<T>();
    let expected = reference::forward(&problem, &operands.operands.inputs()).unwrap();
    let gradients = reference::backward(&problem, &operands.operands.inputs(), &operands.upstream()).unwrap();
    let (output, actual) = run(attention, &problem, &operands)?;
    // On a GPU these are kernels of their own, which tests/gpu/row_max.rs has.
    if !attention.is_gpu() {
        let (_, row_max) = attention.forward_with_row_max(&problem, &operands.operands.inputs()).unwrap();
        let expected = reference::row_max(&problem, &operands.operands.inputs()).unwrap();
        for (n, (&actual, &expected)) in row_max.iter().zip(&expected).enumerate() {
            let error = (f64::from(actual) - expected).abs();
            if !(f64::from(actual) == expected || error <= 1e-5 * expected.abs().max(1.0)) {
                return Err(format!("row_max[{n}] is {actual}, not {expected}"));
            }
        }
    }

    let own = accepted(T::DTYPE);
    let single = accepted(if rounds_p(attention, &problem) { T::DTYPE } else { DType::F32 });
    let inflow = norm(&operands.d_o).hypot(norm(operands.d_lse.as_deref().unwrap_or_default()));
    let far = problem.sequences().map(|s| s.band.offset().unsigned_abs() as usize + s.q_rows.max(s.k_rows)).max();
    let holds = |output: &Output<T>, actual: &Gradients<T>| -> Result<(), String> {
        close("o", &output.o, &expected.o, own, 0.0)?;
        zero("o", &output.o, &expected.o)?;
        compare_lse(&output.lse, &expected.lse, accepted(DType::F32)).map_err(|error| format!("lse: {error}"))?;
        close("d_q", &actual.d_q, &gradients.d_q, own, inflow)?;
        close("d_k", &actual.d_k, &gradients.d_k, own, inflow)?;
        close("d_v", &actual.d_v, &gradients.d_v, own, inflow)?;
        zero("d_v", &actual.d_v, &gradients.d_v)?;
        for (name, actual, expected, terms) in [
            ("d_sink_logits", &actual.d_sink_logits, &gradients.d_sink_logits, inflow),
            ("d_alibi_slopes", &actual.d_alibi_slopes, &gradients.d_alibi_slopes, inflow * far.unwrap() as f64),
            ("d_bias", &actual.d_bias, &gradients.d_bias, inflow),
        ] {
            match (actual, expected) {
                (Some(actual), Some(expected)) => close(name, actual, expected, single, terms)?,
                (None, None) => {}
                _ => return Err(format!("{name} is there where it should not be, or the other way round")),
            }
        }
        Ok(())
    };
    holds(&output, &actual)?;

    // Keys that no query gives a weight may be anything.
    let mut poisoned = operands.clone();
    let Shape { head_dim, value_dim, .. } = *problem.shape();
    for (row, d_v) in gradients.d_v.chunks(value_dim).enumerate() {
        if d_v.iter().all(|&x| x == 0.0) {
            poisoned.operands.k[row * head_dim..][..head_dim].fill(T::from_f32(f32::NAN));
            poisoned.operands.v[row * value_dim..][..value_dim].fill(T::from_f32(f32::NAN));
        }
    }
    let (again, gradients) = run(attention, &problem, &poisoned)?;
    // On cooperative matrices such tiles are computed again, by another kernel.
    if rounds_p(attention, &problem) {
        return holds(&again, &gradients);
    }
    same("o", &again.o, &output.o)?;
    same("lse", &again.lse, &output.lse)?;
    same("d_q", &gradients.d_q, &actual.d_q)?;
    same("d_k", &gradients.d_k, &actual.d_k)?;
    same("d_v", &gradients.d_v, &actual.d_v)?;
    let singles =
        |g: Gradients<T>| [g.d_sink_logits, g.d_alibi_slopes, g.d_bias].map(Option::unwrap_or_default).concat();
    same("d_sink_logits, d_alibi_slopes, d_bias", &singles(gradients), &singles(actual))
}

/// Bit by bit, whatever lies in hidden keys.
pub fn same<T: Element>(name: &str, again: &[T], first: &[T]) -> Result<(), String> {
    match (0..first.len()).find(|&n| bytemuck::bytes_of(&again[n]) != bytemuck::bytes_of(&first[n])) {
        Some(n) => Err(format!("{name}[{n}] is {:?} with NaN in hidden keys, {:?} without", again[n], first[n])),
        None => Ok(()),
    }
}

/// So many problems by default, the same ones in every run; the environment may ask for others.
pub fn check<S: Strategy>(cases: u32, strategy: S, law: impl Fn(S::Value) -> Result<(), String>)
where
    S::Value: Debug,
{
    let mut config = Config { failure_persistence: None, ..Config::default() };
    if std::env::var_os("PROPTEST_CASES").is_none() {
        config.cases = cases;
    }
    if std::env::var_os("PROPTEST_RNG_SEED").is_none() {
        config.rng_seed = RngSeed::Fixed(0);
    }
    let law = |value| -> TestCaseResult { law(value).map_err(TestCaseError::fail) };
    TestRunner::new(config).run(&strategy, law).unwrap_or_else(|error| panic!("{error}"));
}

pub fn agrees_in_its_type(attention: &Attention, plain: &Plain) -> Result<(), String> {
    match plain.dtype {
        DType::F16 => agrees::<f16>(attention, plain),
        DType::Bf16 => agrees::<bf16>(attention, plain),
        _ => agrees::<f32>(attention, plain),
    }
}

/// In f32, with what the laws below give up.
pub fn single(longest: usize) -> impl Strategy<Value = Plain> {
    plain(longest).prop_map(|plain| Plain { dtype: DType::F32, narrow_bias: false, mask_bits: false, ..plain })
}

/// The keys in two shares, by masks: each share computed without the sink, both merged, and the sink applied once.
pub fn split_merges(attention: &Attention, plain: &Plain) -> Result<(), String> {
    let whole = Plain { mask: Some([true; 3]), ..plain.clone() };
    let problem = whole.problem();
    let operands = Operands::scattered(&problem, plain.seed);
    let all = attention.forward(&problem, &operands.inputs()).map_err(|error| error.to_string())?;
    let share = |own: fn(usize) -> bool| {
        let problem = Plain { sink_logits: SinkLogits::None, ..whole.clone() }.problem();
        let mut operands = Operands { sink_logits: None, ..operands.clone() };
        bytes(&mut operands.mask).iter_mut().enumerate().for_each(|(n, byte)| *byte &= u8::from(own(n)));
        attention.forward(&problem, &operands.inputs()).map_err(|error| error.to_string())
    };
    // Pairs to one share or the other, without a pattern.
    let shares = [share(|n| n.count_ones() % 2 == 0)?, share(|n| n.count_ones() % 2 == 1)?];

    let mut merged = Output::new(vec![0f64; all.o.len()], vec![0f64; all.lse.len()]);
    let [_, heads, seq_q] = problem.lse_shape();
    let width = problem.shape().value_dim;
    let strides = problem.options().layout.strides(heads, seq_q, width);
    // Rows that belong to no sequence have no sink.
    let mut counts = vec![false; all.lse.len()];
    for sequence in problem.sequences() {
        for n in 0..heads * sequence.band.seq_q() {
            let (head, i) = (n / sequence.band.seq_q(), n % sequence.band.seq_q());
            counts[(sequence.entry * heads + head) * seq_q + sequence.q_start + i] = true;
        }
    }
    for (n, counts) in counts.into_iter().enumerate() {
        let place = [n / seq_q / heads, n / seq_q % heads, n % seq_q];
        let start = place.iter().zip(strides).map(|(&at, stride)| at * stride as usize).sum::<usize>();
        let sink = match (&operands.sink_logits, plain.sink_logits) {
            _ if !counts => f64::NEG_INFINITY,
            (Some(sinks), _) => sinks[place[1]].into(),
            (None, SinkLogits::OffByOne) => 0.0,
            _ => f64::NEG_INFINITY,
        };
        let lses = [shares[0].lse[n].into(), shares[1].lse[n].into(), sink];
        let most = lses.into_iter().fold(f64::NEG_INFINITY, f64::max);
        if most == f64::NEG_INFINITY {
            merged.lse[n] = most;
            continue;
        }
        let lse = most + lses.iter().map(|lse| (lse - most).exp()).sum::<f64>().ln();
        merged.lse[n] = lse;
        for e in start..start + width {
            merged.o[e] = shares.iter().zip(lses).map(|(share, own)| f64::from(share.o[e]) * (own - lse).exp()).sum();
        }
    }
    close("o", &all.o, &merged.o, 1e-5, norm(&all.o))?;
    compare_lse(&all.lse, &merged.lse, 1e-5).map(|_| ()).map_err(|error| format!("lse: {error}"))
}
