//! Random shapes, options, lengths and operands against the definition in f64, and laws that hold for all of them.
//!
//! The numbers are the same in every run. For a long run with other ones:
//!
//! ```text
//! PROPTEST_CASES=5000 PROPTEST_RNG_SEED=1 cargo test --test properties
//! ```
//!
//! `PROPTEST_CASES` counts the problems of each test. What fails is shrunk to the simplest problem that still does, and printed.

use crate::common;
use std::fmt::Debug;

use proptest::prelude::*;
use proptest::test_runner::{Config, RngSeed, TestCaseResult, TestRunner};
use rand::SeedableRng as _;
use rand::rngs::StdRng;
use sink_attention::compare::accepted;
use sink_attention::cpu::reference;
use sink_attention::half::{bf16, f16};
use sink_attention::{
    Alignment, Attention, Axes, Bias, DType, Element, Gradients, Inputs, Layout, Lengths, MaskData, MaskPacking,
    MicroKernel, Options, Output, Problem, Shape, SinkLogits, Upstream, Window, pack_mask,
};

/// A problem in plain numbers, which shrink: to fewer and shorter sequences, narrower heads, and options that are off.
#[derive(Debug, Clone)]
struct Plain {
    /// Queries and keys of each sequence, how many of them count, and whether they lie one after the other or padded.
    sequences: Vec<[usize; 2]>,
    packing: Packing,
    kv_heads: usize,
    group: usize,
    widths: [usize; 2],
    causal: bool,
    window: [Option<usize>; 2],
    sink_tokens: usize,
    sink_logits: SinkLogits,
    /// Factor on the default scale.
    scale: Option<i8>,
    softcap: Option<u8>,
    alibi: bool,
    bias: Option<[bool; 3]>,
    narrow_bias: bool,
    mask: Option<[bool; 3]>,
    mask_bits: bool,
    top_left: bool,
    query_offset: Option<i64>,
    d_lse: bool,
    dtype: DType,
    /// Of the operands.
    seed: u64,
}

/// How sequences lie in the operands.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Packing {
    /// All as long as the first one.
    Batch(Layout),
    /// As long as the longest one, with lengths.
    Padded(Layout),
    Thd,
}

fn plain(longest: usize) -> impl Strategy<Value = Plain> {
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

fn axes([batch, heads, seq_q]: [bool; 3]) -> Axes {
    Axes { batch, heads, seq_q }
}

impl Plain {
    fn options(&self) -> Options {
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

    fn problem(&self) -> Problem {
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

/// Operands and what flows in, with a bias and a mask in every form that a problem may want.
#[derive(Debug, Clone)]
struct Operands<T> {
    q: Vec<T>,
    k: Vec<T>,
    v: Vec<T>,
    sink_logits: Option<Vec<f32>>,
    alibi_slopes: Option<Vec<f32>>,
    bias: Option<Vec<f32>>,
    narrow_bias: Option<Vec<T>>,
    mask: Option<Vec<u8>>,
    words: Option<Vec<u32>>,
    d_o: Vec<T>,
    d_lse: Option<Vec<f32>>,
}

/// The shape of the mask in bytes.
fn mask_shape(problem: &Problem) -> Option<[usize; 4]> {
    let [batch, heads, seq_q, _] = problem.mask_shape()?;
    Some([batch, heads, seq_q, problem.sequences().map(|sequence| sequence.k_rows).max().unwrap()])
}

impl<T: Element> Operands<T> {
    fn random(problem: &Problem, seed: u64, d_lse: bool) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let half_width = 3f32.sqrt();
        let mut random = |shape: &[usize]| -> Vec<f32> {
            (0..shape.iter().product()).map(|_| rng.random_range(-half_width..half_width)).collect()
        };
        let (options, heads) = (*problem.options(), problem.shape().heads);
        let mut bias = problem.bias_shape().map(|shape| random(&shape));
        // A part is hidden; where the sign of a number says so, sequences of any length have some of both.
        bias.iter_mut().flatten().filter(|x| **x < -1.4).for_each(|x| *x = f32::NEG_INFINITY);
        let narrow_bias = bias.clone().filter(|_| options.bias_dtype != DType::F32).map(T::narrow);
        let shape = mask_shape(problem);
        let mask: Option<Vec<u8>> = shape.map(|shape| random(&shape).into_iter().map(|x| u8::from(x > -0.6)).collect());
        let bits = options.mask_packing == MaskPacking::Bits;
        let words = mask.as_ref().zip(shape).filter(|_| bits).map(|(mask, shape)| pack_mask(mask, shape[3]));
        Operands {
            sink_logits: (options.sink_logits == SinkLogits::PerHead).then(|| random(&[heads])),
            // Steeper ones leave nothing to far keys, or nothing to near ones.
            alibi_slopes: options.alibi.then(|| random(&[heads]).into_iter().map(|x| 0.1 * x).collect()),
            bias: bias.filter(|_| narrow_bias.is_none()),
            narrow_bias,
            mask: mask.filter(|_| words.is_none()),
            words,
            q: T::narrow(random(&problem.q_shape())),
            k: T::narrow(random(&problem.k_shape())),
            v: T::narrow(random(&problem.v_shape())),
            d_o: T::narrow(random(&problem.o_shape())),
            d_lse: d_lse.then(|| random(&problem.lse_shape())),
        }
    }

    fn inputs(&self) -> Inputs<'_, T> {
        let bias = self.narrow_bias.as_deref().map(Bias::Operand).or(self.bias.as_deref().map(Bias::F32));
        let mask = self.words.as_deref().map(MaskData::Bits).or(self.mask.as_deref().map(MaskData::Bytes));
        let inputs = Inputs::new(&self.q, &self.k, &self.v).sink_logits(self.sink_logits.as_deref());
        inputs.alibi_slopes(self.alibi_slopes.as_deref()).bias(bias).mask(mask)
    }

    fn upstream(&self) -> Upstream<'_, T> {
        Upstream { d_o: &self.d_o, d_lse: self.d_lse.as_deref() }
    }
}

fn norm<T: Copy + Into<f64>>(x: &[T]) -> f64 {
    x.iter().map(|&x| x.into().powi(2)).sum::<f64>().sqrt()
}

/// Holds a result to a share of its norm; where its terms cancel, to one of theirs.
fn close<T, N>(name: &str, actual: &[T], expected: &[N], bound: f64, terms: f64) -> Result<(), String>
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
fn zero<T: Copy + Into<f64>>(name: &str, actual: &[T], expected: &[f64]) -> Result<(), String> {
    match actual.iter().zip(expected).position(|(&a, &e)| e == 0.0 && a.into() != 0.0) {
        Some(n) => Err(format!("{name}[{n}] is {}, not 0", actual[n].into())),
        None => Ok(()),
    }
}

/// Whether the forward pass of a path rounds probabilities, and with them delta.
fn rounds_p(attention: &Attention, problem: &Problem) -> bool {
    let cooperative = |plan: sink_attention::Plan| {
        plan.passes.iter().any(|pass| pass.variant.micro_kernel == MicroKernel::Cooperative)
    };
    attention.plan_forward(problem).is_ok_and(cooperative)
}

fn run<T: Element>(
    attention: &Attention,
    problem: &Problem,
    operands: &Operands<T>,
) -> Result<(Output<T>, Gradients<T>), String> {
    let output = attention.forward(problem, &operands.inputs()).map_err(|error| error.to_string())?;
    let gradients = attention.backward(problem, &operands.inputs(), &output, &operands.upstream());
    Ok((output, gradients.map_err(|error| error.to_string())?))
}

/// Holds a path to the definition, and to bits that what is hidden cannot change.
fn agrees<T: Element>(attention: &Attention, plain: &Plain) -> Result<(), String> {
    let problem = plain.problem();
    let operands = Operands::<T>::random(&problem, plain.seed, plain.d_lse);
    let expected = reference::forward(&problem, &operands.inputs()).unwrap();
    let gradients = reference::backward(&problem, &operands.inputs(), &operands.upstream()).unwrap();
    let (output, actual) = run(attention, &problem, &operands)?;

    let own = accepted(T::DTYPE);
    let single = accepted(if rounds_p(attention, &problem) { T::DTYPE } else { DType::F32 });
    let inflow = norm(&operands.d_o).hypot(norm(operands.d_lse.as_deref().unwrap_or_default()));
    let far = problem.sequences().map(|s| s.band.offset().unsigned_abs() as usize + s.q_rows.max(s.k_rows)).max();
    let holds = |output: &Output<T>, actual: &Gradients<T>| -> Result<(), String> {
        close("o", &output.o, &expected.o, own, 0.0)?;
        zero("o", &output.o, &expected.o)?;
        sink_attention::compare::lse(&output.lse, &expected.lse, accepted(DType::F32))
            .map_err(|error| format!("lse: {error}"))?;
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
            poisoned.k[row * head_dim..][..head_dim].fill(T::from_f32(f32::NAN));
            poisoned.v[row * value_dim..][..value_dim].fill(T::from_f32(f32::NAN));
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
fn same<T: Element>(name: &str, again: &[T], first: &[T]) -> Result<(), String> {
    match (0..first.len()).find(|&n| bytemuck::bytes_of(&again[n]) != bytemuck::bytes_of(&first[n])) {
        Some(n) => Err(format!("{name}[{n}] is {:?} with NaN in hidden keys, {:?} without", again[n], first[n])),
        None => Ok(()),
    }
}

/// So many problems by default, the same ones in every run; the environment may ask for others.
fn check<S: Strategy>(cases: u32, strategy: S, law: impl Fn(S::Value) -> Result<(), String>)
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

fn agrees_in_its_type(attention: &Attention, plain: &Plain) -> Result<(), String> {
    match plain.dtype {
        DType::F16 => agrees::<f16>(attention, plain),
        DType::Bf16 => agrees::<bf16>(attention, plain),
        _ => agrees::<f32>(attention, plain),
    }
}

#[test]
fn the_cpu_agrees_with_the_definition() {
    let attention = Attention::cpu();
    check(200, plain(90), |plain| agrees_in_its_type(&attention, &plain));
}

#[test]
fn the_gpu_agrees_with_the_definition() {
    if let Some(gpu) = common::gpu() {
        // A software driver compiles kernels for wide heads for longer.
        let widest = if common::all_cases() { 80 } else { 16 };
        let plain = plain(90).prop_map(|plain| Plain { widths: plain.widths.map(|width| width.min(widest)), ..plain });
        check(common::this_many(6, 24), plain, |plain| agrees_in_its_type(gpu, &plain));
    }
}

#[test]
fn cooperative_matrices_agree_with_the_definition() {
    let Some(attention) = common::cooperative() else { return };
    // What there are kernels for.
    let halves = plain(90).prop_map(|plain| Plain {
        dtype: if plain.dtype == DType::Bf16 { DType::Bf16 } else { DType::F16 },
        widths: plain.widths.map(|width| width.next_multiple_of(16)),
        ..plain
    });
    check(24, halves, |plain| agrees_in_its_type(&attention, &plain));
}

/// A mismatch must be found and shrunk, or the tests above prove nothing.
#[test]
fn a_mistake_is_found_and_shrunk() {
    // An operator that takes the keys at a window's left bound for hidden.
    let wrong = |plain: &Plain| {
        let problem = plain.problem();
        let operands = Operands::<f32>::random(&problem, plain.seed, false);
        let right = reference::forward(&problem, &operands.inputs()).unwrap();
        let narrow = Plain { window: plain.window.map(|bound| bound.map(|bound| bound.max(1) - 1)), ..plain.clone() };
        let wrong = reference::forward(&narrow.problem(), &operands.inputs()).unwrap();
        close("o", &wrong.o, &right.o, 1e-5, 0.0)
    };
    let config = Config {
        cases: 200,
        max_shrink_iters: 4096,
        rng_seed: RngSeed::Fixed(0),
        failure_persistence: None,
        ..Config::default()
    };
    let found = TestRunner::new(config).run(&plain(30), |plain| wrong(&plain).map_err(TestCaseError::fail));
    let Err(proptest::test_runner::TestError::Fail(_, simplest)) = found else { panic!("nothing was found") };
    // The other options make no difference, so they are off.
    assert!(!simplest.alibi && simplest.bias.is_none() && simplest.softcap.is_none(), "{simplest:?}");
    assert!(simplest.sequences.len() == 1 && simplest.widths == [4, 4] && simplest.seed == 0, "{simplest:?}");
}

/// In f32, with what the laws below give up.
fn single(longest: usize) -> impl Strategy<Value = Plain> {
    plain(longest).prop_map(|plain| Plain { dtype: DType::F32, narrow_bias: false, mask_bits: false, ..plain })
}

/// The keys in two shares, by masks: each share computed without the sink, both merged, and the sink applied once.
fn split_merges(attention: &Attention, plain: &Plain) -> Result<(), String> {
    let whole = Plain { mask: Some([true; 3]), ..plain.clone() };
    let problem = whole.problem();
    let operands = Operands::<f32>::random(&problem, plain.seed, false);
    let all = attention.forward(&problem, &operands.inputs()).map_err(|error| error.to_string())?;
    let share = |own: fn(usize) -> bool| {
        let problem = Plain { sink_logits: SinkLogits::None, ..whole.clone() }.problem();
        let mut operands = Operands { sink_logits: None, ..operands.clone() };
        operands.mask.iter_mut().flatten().enumerate().for_each(|(n, byte)| *byte &= u8::from(own(n)));
        attention.forward(&problem, &operands.inputs()).map_err(|error| error.to_string())
    };
    // Pairs to one share or the other, without a pattern.
    let shares = [share(|n| n.count_ones() % 2 == 0)?, share(|n| n.count_ones() % 2 == 1)?];

    let mut merged = Output { o: vec![0f64; all.o.len()], o_lo: None, lse: vec![0f64; all.lse.len()] };
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
    sink_attention::compare::lse(&all.lse, &merged.lse, 1e-5).map(|_| ()).map_err(|error| format!("lse: {error}"))
}

#[test]
fn any_split_of_the_pairs_merges_to_the_whole() {
    check(100, single(60), |plain| split_merges(&Attention::cpu(), &plain));
    if let Some(gpu) = common::gpu() {
        check(common::this_many(4, 8), single(60), |plain| split_merges(gpu, &plain));
    }
}

/// The gradients by everything, one after the other.
fn all_gradients(gradients: Gradients<f64, f64>) -> Vec<f64> {
    let optional = [gradients.d_sink_logits, gradients.d_alibi_slopes, gradients.d_bias];
    let all = [gradients.d_q, gradients.d_k, gradients.d_v].into_iter().chain(optional.into_iter().flatten());
    all.flatten().collect()
}

/// Laws of the definition itself, which the others are held to.
#[test]
fn the_definition_obeys_laws() {
    check(100, single(24), |plain| {
        let problem = plain.problem();
        let operands = Operands::<f32>::random(&problem, plain.seed, true);
        let backward = |problem: &Problem, operands: &Operands<f32>| {
            all_gradients(reference::backward(problem, &operands.inputs(), &operands.upstream()).unwrap())
        };
        let gradients = backward(&problem, &operands);

        // Linear in what flows in: powers of two are exact.
        let mut twice = operands.clone();
        twice.d_o.iter_mut().chain(twice.d_lse.iter_mut().flatten()).for_each(|x| *x *= 2.0);
        let expected: Vec<f64> = gradients.iter().map(|x| 2.0 * x).collect();
        close("gradients of twice the inflow", &backward(&problem, &twice), &expected, 1e-12, 0.0)?;

        // What a mask hides, a bias of -infinity hides.
        let masked = Plain { mask: Some([true; 3]), bias: Some([true; 3]), ..plain.clone() };
        let operands = Operands::<f32>::random(&masked.problem(), plain.seed, true);
        let mut hidden = Operands { mask: None, ..operands.clone() };
        for (bias, &mask) in hidden.bias.iter_mut().flatten().zip(operands.mask.iter().flatten()) {
            *bias = if mask == 0 { f32::NEG_INFINITY } else { *bias };
        }
        let biased = Plain { mask: None, ..masked.clone() }.problem();
        let expected = reference::forward(&masked.problem(), &operands.inputs()).unwrap();
        let actual = reference::forward(&biased, &hidden.inputs()).unwrap();
        if actual != expected || backward(&masked.problem(), &operands) != backward(&biased, &hidden) {
            return Err("a bias of -infinity is not a mask".into());
        }

        // Bits are bytes.
        let bits = Plain { mask_bits: true, ..masked.clone() }.problem();
        let packed = Operands::<f32>::random(&bits, plain.seed, true);
        if reference::forward(&bits, &packed.inputs()).unwrap() != expected {
            return Err("a mask in bits is not the mask in bytes".into());
        }
        Ok(())
    });
}

/// Every sequence of a batch gives what it gives alone.
#[test]
fn sequences_are_on_their_own() {
    check(100, single(24), |plain| {
        let plain = Plain { packing: Packing::Thd, bias: None, mask: None, sink_logits: SinkLogits::None, ..plain };
        let problem = plain.problem();
        let operands = Operands::<f32>::random(&problem, plain.seed, false);
        let together = reference::forward(&problem, &operands.inputs()).unwrap();
        let (shape, [.., seq_q]) = (*problem.shape(), problem.lse_shape());
        for sequence in problem.sequences().filter(|sequence| sequence.q_rows > 0 && sequence.k_rows > 0) {
            let alone = Shape { seq_q: sequence.q_rows, seq_k: sequence.k_rows, ..shape };
            let alone = Problem::new(alone, plain.options().layout(Layout::Bshd)).unwrap();
            let rows = |x: &[f32], start: usize, rows: usize, row: usize| x[start * row..][..rows * row].to_vec();
            let (q_row, k_row) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
            let own = Operands {
                q: rows(&operands.q, sequence.q_start, sequence.q_rows, q_row),
                k: rows(&operands.k, sequence.k_start, sequence.k_rows, k_row),
                v: rows(&operands.v, sequence.k_start, sequence.k_rows, shape.kv_heads * shape.value_dim),
                ..operands.clone()
            };
            let output = reference::forward(&alone, &own.inputs()).unwrap();
            let row = shape.heads * shape.value_dim;
            if output.o != together.o[sequence.q_start * row..][..sequence.q_rows * row] {
                return Err(format!("o of {sequence:?} differs"));
            }
            for head in 0..shape.heads {
                let lse = &together.lse[head * seq_q + sequence.q_start..][..sequence.q_rows];
                if output.lse[head * sequence.q_rows..][..sequence.q_rows] != *lse {
                    return Err(format!("lse of {sequence:?} differs"));
                }
            }
        }
        Ok(())
    });
}
