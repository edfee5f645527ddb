//! f32 on tensor cores: numbers of two halves each, against the definition with the bounds of f32.
//!
//! It takes an adapter with cooperative matrices whose elements have a known layout, and a driver that compiles each of these kernels for
//! many seconds: widths are narrow and variants few.

use crate::common::{fragments, gpu};
use crate::cooperative::{forward_agrees, is_on_matrices, random};
use crate::fragments::{bits, hidden_keys_leave_no_trace, odd_widths, run, softcap_alibi_bias_and_lengths};
use sink_attention::cpu::reference;
use sink_attention::half::f16;
use sink_attention::plan::{Capabilities, MicroKernel, OptionalOperands, Plan, Precision, Preference};
use sink_attention::testing::compare::accepted;
use sink_attention::testing::gradients::Backward;
use sink_attention::testing::operands::{agree, problem};
use sink_attention::{Attention, DType, Error, Layout, Options, Problem, SinkLogits, Window};

fn split() -> Option<Attention> {
    fragments().map(|attention| attention.with_micro_kernel(MicroKernel::Auto).with_precision(Precision::Split))
}

/// Holds both passes against the definition: by norm, and row by row.
fn check(attention: &Attention, problem: &Problem, case: &Backward<f32>) {
    let plans = [attention.plan_forward(problem), attention.plan_backward(problem)];
    assert!(plans.iter().all(|plan| is_on_matrices(plan.as_ref().unwrap(), MicroKernel::Fragments)), "{problem}");
    forward_agrees(attention, problem, case);
    let gradients = case.run(attention, problem);
    let expected = case.rows_agree(accepted(DType::F32), problem, &gradients);
    case.agree(&gradients, &expected).unwrap_or_else(|error| panic!("{problem}: {error}"));
}

/// Bands, sizes, heads and ranges of all kinds, with one pipeline for each kernel.
#[test]
fn bands_sizes_and_ranges() {
    let Some(attention) = &split() else { return };
    let new = Options::new().sink_logits(SinkLogits::PerHead);
    let window = new.window(Window::keys(17)).sink_tokens(3);
    for (seed, (heads, seq, options)) in (0..).zip([
        ([1, 4, 2], [45, 70], new.causal(true)),
        ([2, 2, 1], [70, 70], window),
        ([1, 2, 1], [63, 65], new),
        ([1, 1, 1], [1, 130], window.layout(Layout::Bhsd)),
        ([1, 2, 1], [130, 130], new.window(Window::keys(66)).sink_tokens(33)),
        // The first 30 queries see nothing.
        ([1, 2, 1], [50, 40], new.causal(true).query_offset(-30)),
        ([1, 2, 1], [200, 1000], new),
    ]) {
        let (problem, case) = random::<f32>(&problem(heads, seq, [8, 8], options), seed);
        check(attention, &problem, &case);
    }
    powers_that_scores_do_not_show(attention, new.causal(true));
    tokens_of_all_sizes(attention, new.causal(true));
    gradients_beyond_halves(attention, new.causal(true));
    small_probabilities_count(attention, new);
    hidden_keys_leave_no_trace::<f32>(attention, window.query_offset(-10), [8, 8]);
    visible_keys_do(attention, new.causal(true));
    let (problem, case) = random::<f32>(&problem([2, 4, 2], [150, 150], [8, 8], new.causal(true)), 1);
    let first = bits(&run(attention, &problem, &case));
    assert!((0..2).all(|_| bits(&run(attention, &problem, &case)) == first), "other bits of the same problem");
}

/// Powers of two that leave the scores as they are. Beyond 2^60 the portable kernel computes the rows.
fn powers_that_scores_do_not_show(attention: &Attention, options: Options) {
    for [along, values] in [[30, 20], [-50, 55], [66, -66]] {
        let (problem, mut case) = random::<f32>(&problem([1, 2, 1], [40, 70], [8, 8], options), 6);
        let operands = &mut case.operands;
        for (operand, power) in [(&mut operands.q, along), (&mut operands.k, -along), (&mut operands.v, values)] {
            operand.iter_mut().for_each(|x| *x *= 2f32.powi(power));
        }
        check(attention, &problem, &case);
    }
}

/// Values of 1e-20 and 1e20 in neighbouring tokens, and keys and queries of 1e-20 among others.
fn tokens_of_all_sizes(attention: &Attention, options: Options) {
    for sizes in [[1e-20, 1.0, 1e20], [1e-15, 1.0, 1e15]] {
        let (problem, mut case) = random::<f32>(&problem([1, 1, 1], [70, 70], [8, 8], options), 7);
        for j in 0..70 {
            let scaled = |row: &mut [f32], factor: f32| row.iter_mut().for_each(|x| *x *= factor);
            scaled(case.operands.value(&problem, 0, 0, j), sizes[j % 3]);
            scaled(case.operands.key(&problem, 0, 0, j), sizes[j % 2]);
        }
        let output = attention.forward(&problem, &case.operands.inputs()).unwrap();
        let (expected, _, magnitudes) = reference::with_magnitudes(&problem, &case.operands.inputs(), None).unwrap();
        for (n, ((o, expected), size)) in output.o.iter().zip(&expected.o).zip(&magnitudes.o).enumerate() {
            let error = (f64::from(*o) - expected).abs();
            assert!(error <= 1e-5 * size, "{problem}: element {n} is {o}, not {expected}");
        }
        let gradients = case.run_with(attention, &problem, &output);
        case.agree(&gradients, &case.expected(&problem)).unwrap_or_else(|error| panic!("{problem}: {error}"));
    }
}

/// Later queries have gradients 2^40 times as large as those that set the units of keys.
fn gradients_beyond_halves(attention: &Attention, options: Options) {
    let (problem, mut case) = random::<f32>(&problem([1, 2, 1], [80, 80], [8, 8], options), 3);
    for (i, d_o) in case.d_o.chunks_mut(2 * 8).enumerate() {
        d_o.iter_mut().for_each(|x| *x *= 2f32.powi(if i < 40 { -20 } else { 20 }));
    }
    check(attention, &problem, &case);
}

/// One key has almost all of each row's probability. The others have 2^-26 of it each, together a part that the bound shows.
fn small_probabilities_count(attention: &Attention, options: Options) {
    let (problem, mut case) = random::<f32>(&problem([1, 1, 1], [40, 1000], [8, 8], options), 5);
    case.operands.q.fill(1.0);
    for j in 0..1000 {
        case.operands.key(&problem, 0, 0, j).fill(if j == 500 { 26.0 * 2f32.ln() / 8f32.sqrt() } else { 0.0 });
        case.operands.value(&problem, 0, 0, j).fill(if j == 500 { 0.0 } else { 1.0 + j as f32 / 1000.0 });
    }
    check(attention, &problem, &case);
}

/// A visible key that is no number reaches the rows that see it, as in full precision, and no others.
fn visible_keys_do(attention: &Attention, options: Options) {
    let full = gpu().unwrap().clone().with_micro_kernel(MicroKernel::Portable);
    for bad in [f32::NAN, f32::INFINITY] {
        let (problem, mut case) = random::<f32>(&problem([1, 2, 1], [40, 40], [8, 8], options), 3);
        case.operands.value(&problem, 0, 0, 20)[3] = bad;
        let output = attention.forward(&problem, &case.operands.inputs()).unwrap();
        agree(&output, &full.forward(&problem, &case.operands.inputs()).unwrap()).unwrap();
        assert!(output.o.iter().any(|o| !o.is_finite()), "{bad} in a value");
        // Two heads of eight features in each query's row.
        assert!(output.o[..20 * 16].iter().all(|o| o.is_finite()), "{bad} in queries that do not see it");
    }
}

#[test]
fn modified_scores_of_sequences_that_differ() {
    let Some(attention) = &split() else { return };
    softcap_alibi_bias_and_lengths().iter().for_each(|(problem, case)| check(attention, problem, case));
}

#[test]
fn odd_widths_under_a_mask() {
    let Some(attention) = &split() else { return };
    odd_widths().iter().for_each(|(problem, case)| check(attention, problem, case));
}

/// Operands of halves, another micro-kernel, a device without matrices or elements: the planner names what stands in the way. The CPU does,
/// too. Needs no device.
#[test]
fn what_cannot_be_split_says_why() {
    let samples = Capabilities::samples();
    let sample = |name: &str| samples.iter().find(|device| device.name.contains(name)).unwrap();
    let split = |micro_kernel| Preference::default().precision(Precision::Split).micro_kernel(micro_kernel);
    let refused = |dtype, micro_kernel, device: &Capabilities, reason: &str| {
        let problem = problem([1, 2, 1], [64, 64], [64, 64], Options::new().dtype(dtype));
        let (optional, preference) = (OptionalOperands::default(), split(micro_kernel));
        for plan in [
            Plan::forward_with(&problem, optional, device, &preference),
            Plan::backward_with(&problem, optional, device, &preference),
        ] {
            match plan {
                Err(error @ Error::NoKernel { .. }) => assert!(error.to_string().contains(reason), "{error}"),
                other => panic!("{reason}: {other:?}"),
            }
        }
    };
    let (h200, auto) = (sample("H200"), MicroKernel::Auto);
    refused(DType::F16, auto, h200, "divides numbers of f32 into halves; the operands are f16");
    refused(DType::Bf16, MicroKernel::Fragments, h200, "the operands are bf16");
    for other in [MicroKernel::Portable, MicroKernel::Cooperative] {
        refused(DType::F32, other, h200, &format!("the micro-kernel fragments alone; {other} was asked for"));
    }
    refused(DType::F32, auto, sample("Arc"), "Intel Arc A770 has no cooperative matrices of f16 with sums in f32");
    refused(DType::F32, auto, sample("M2"), "which has no arithmetic on the elements of fragments");
    let problem = problem([1, 2, 1], [64, 64], [64, 64], Options::new());
    for (preference, on) in [(split(auto), MicroKernel::Fragments), (Preference::default(), MicroKernel::Portable)] {
        let forward = Plan::forward_with(&problem, OptionalOperands::default(), h200, &preference).unwrap();
        let backward = Plan::backward_with(&problem, OptionalOperands::default(), h200, &preference).unwrap();
        for plan in [forward, backward] {
            assert_eq!(is_on_matrices(&plan, MicroKernel::Fragments), on == MicroKernel::Fragments, "{plan:?}");
        }
    }
    let cpu = Attention::cpu().with_precision(Precision::Split);
    let (problem, case) = random::<f32>(&problem, 0);
    let error = cpu.forward(&problem, &case.operands.inputs()).unwrap_err();
    assert!(matches!(error, Error::NeedsGpu { call: "the precision split" }), "{error}");
}

/// The operator refuses halves before any dispatch.
#[test]
fn halves_are_refused() {
    let Some(attention) = &split() else { return };
    let (problem, case) = random::<f16>(&problem([1, 2, 1], [20, 20], [8, 8], Options::new()), 0);
    let error = attention.forward(&problem, &case.operands.inputs()).unwrap_err();
    assert!(error.to_string().contains("the operands are f16"), "{error}");
}
