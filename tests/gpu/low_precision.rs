//! f16 and bf16 on every path: no worse than a plain dense computation in f32 whose results are rounded once, against
//! the f64 definition of the same rounded operands; and numbers at the ends of their ranges.

use crate::common::{all_cases, compare, compare_low_precision, compare_lse, gpu, low_precision, with_others};
use sink_attention::cpu::reference;
use sink_attention::half::{bf16, f16};
use sink_attention::testing::compare::accepted;
use sink_attention::testing::gradients::Backward;
use sink_attention::testing::operands::{Operands, options, problem};
use sink_attention::{
    Attention, DType, Element, Error, Gradients, Inputs, Layout, Options, Output, Problem, SinkLogits, Upstream,
    Window, cpu,
};

/// A test for both types.
macro_rules! both {
    ($($(#[$meta:meta])* $name:ident)*) => {$(
        $(#[$meta])*
        mod $name {
            #[test]
            fn f16() {
                super::$name::<super::f16>();
            }

            #[test]
            fn bf16() {
                super::$name::<super::bf16>();
            }
        }
    )*};
}

both! {
    sizes_and_options
    widths
    the_cpu_computes_in_f32
    values_far_from_zero
    the_rest_makes_it_f32
    the_saved_output_is_not_precise_enough
    hidden_keys_never_come_through
    subnormal_operands
    the_largest_operands
    sums_beyond_the_range
}

/// The CPU, and the GPU where there is one.
fn paths() -> Vec<Attention> {
    [Some(Attention::cpu()), gpu().cloned()].into_iter().flatten().collect()
}

/// What a backward pass may be given: all that the forward pass returned, and without what rounding took from o.
fn both_ways<T: Element>(output: &Output<T>) -> [Output<T>; 2] {
    assert!(output.o_lo.is_some());
    [output.clone(), output.clone().o_lo(None)]
}

/// Operands in an element type, and the problem in it.
fn random<T: Element>(problem: &Problem, seed: u64) -> (Problem, Backward<T>) {
    let problem = Problem::new(*problem.shape(), problem.options().dtype(T::DTYPE)).unwrap();
    let operands = Backward::random(&problem, seed).cast();
    (problem, operands)
}

/// Holds a path against the definition, by norm and by element.
fn check<T: Element>(path: &Attention, problem: &Problem, backward: &Backward<T>) {
    let (inputs, upstream) = (backward.operands.inputs(), backward.upstream());
    let name = format!("{problem} on {}", path.device_name());
    let output = path.forward(problem, &inputs).unwrap();
    let gradients = both_ways(&output).map(|saved| backward.run_with(path, problem, &saved));
    let expected = (reference::forward(problem, &inputs).unwrap(), backward.expected(problem));
    sink_attention::testing::operands::agree(&output, &expected.0).unwrap_or_else(|error| panic!("{name}: {error}"));
    for gradients in &gradients {
        backward.agree(gradients, &expected.1).unwrap_or_else(|error| panic!("{name}: {error}"));
    }

    let low = (low_precision::forward(problem, &inputs), low_precision::backward(problem, &inputs, &upstream));
    for (result, actual, low, expected) in [
        ("o", &output.o, &low.0.o, &expected.0.o),
        ("d_q", &gradients[0].d_q, &low.1.d_q, &expected.1.d_q),
        ("d_k", &gradients[0].d_k, &low.1.d_k, &expected.1.d_k),
        ("d_v", &gradients[0].d_v, &low.1.d_v, &expected.1.d_v),
        ("d_q without o_lo", &gradients[1].d_q, &low.1.d_q, &expected.1.d_q),
        ("d_k without o_lo", &gradients[1].d_k, &low.1.d_k, &expected.1.d_k),
        ("d_v without o_lo", &gradients[1].d_v, &low.1.d_v, &expected.1.d_v),
    ] {
        // Where terms cancel to nothing, two orders of f32 sums may be a few roundings apart.
        let noise = expected.iter().all(|x| x.abs() < 1e-6);
        if !noise {
            compare_low_precision(actual, low, expected).unwrap_or_else(|error| panic!("{name}: {result}: {error}"));
        }
    }
}

/// The yardstick in f32 is the definition up to the rounding of f32, or it would measure nothing.
#[test]
fn the_yardstick_is_straight() {
    for (seed, options) in (0..).zip(options()) {
        let problem = problem([2, 4, 2], [33, 40], [24, 16], options);
        let backward = Backward::random(&problem, seed);
        let (inputs, upstream) = (backward.operands.inputs(), backward.upstream());
        let expected = reference::forward(&problem, &inputs).unwrap();
        sink_attention::testing::operands::agree(&low_precision::forward(&problem, &inputs), &expected).unwrap();
        let gradients = low_precision::backward(&problem, &inputs, &upstream);
        backward.agree(&gradients, &backward.expected(&problem)).unwrap();
    }
}

fn sizes_and_options<T: Element>() {
    for path in paths() {
        for (seed, size) in
            (0..).zip(with_others([[1, 1], [1, 257], [63, 65], [113, 203], [239, 1]], [[3, 3], [64, 1]]))
        {
            for options in options() {
                let (problem, backward) = random::<T>(&problem([1, 2, 1], size, [16, 18], options), seed);
                check(&path, &problem, &backward);
            }
        }
    }
}

fn widths<T: Element>() {
    let all = with_others([[16, 16], [3, 7], [80, 33], [128, 128], [256, 255]], [[64, 64], [192, 128]]);
    // A software driver compiles each for long: the types by turns, which differ in how words are read.
    let turn = usize::from(T::DTYPE == DType::F16);
    for path in paths() {
        let taken = |n: usize| all_cases() || !path.is_gpu() || n % 2 == turn;
        for (seed, width) in (0..).zip(all.iter().copied()).filter(|(seed, _)| taken(*seed as usize)) {
            let options = Options::new().causal(true).sink_logits(SinkLogits::PerHead);
            let layout = if seed % 2 == 0 { Layout::Bshd } else { Layout::Bhsd };
            let (problem, backward) = random::<T>(&problem([2, 6, 2], [63, 65], width, options.layout(layout)), seed);
            check(&path, &problem, &backward);
        }
    }
}

/// On the CPU all bits are those of the f32 path on the same numbers, each result rounded once.
fn the_cpu_computes_in_f32<T: Element>() {
    let path = Attention::cpu();
    for (seed, options) in (0..).zip(options()) {
        let (problem, backward) = random::<T>(&problem([2, 4, 2], [70, 90], [33, 20], options), seed);
        let operands = &backward.operands;
        let widened = |x: &[T]| T::widen(x).into_owned();
        let sink_logits = operands.sink_logits.clone();
        let operands = Operands::new(widened(&operands.q), widened(&operands.k), widened(&operands.v));
        let operands = Operands { sink_logits, ..operands };
        let single = Backward { operands, d_o: widened(&backward.d_o), d_lse: backward.d_lse.clone() };
        let single_problem = Problem::new(*problem.shape(), problem.options().dtype(DType::F32)).unwrap();
        let expected = path.forward(&single_problem, &single.operands.inputs()).unwrap();
        let gradients = single.run_with(&path, &single_problem, &expected);
        let output = path.forward(&problem, &backward.operands.inputs()).unwrap();
        let o_lo = Some(expected.o.iter().map(|&o| T::lo(o)).collect());
        assert_eq!(output, Output::new(T::narrow(expected.o), expected.lse).o_lo(o_lo), "{problem}");
        let expected = Gradients::new(T::narrow(gradients.d_q), T::narrow(gradients.d_k), T::narrow(gradients.d_v))
            .d_sink_logits(gradients.d_sink_logits);
        assert_eq!(backward.run_with(&path, &problem, &output), expected, "{problem}");
        let without = output.o_lo(None);
        assert_eq!(backward.run_with(&path, &problem, &without), expected, "{problem} without o_lo");
    }
}

/// What cancels in d_o . v is no part of what o is rounded by.
fn far_from_zero<T: Element>() -> (Problem, Backward<T>) {
    let options = Options::new().sink_logits(SinkLogits::PerHead).layout(Layout::Bhsd);
    let (problem, mut backward) = random::<T>(&problem([2, 4, 2], [200, 90], [64, 64], options), 4);
    backward.operands.v.iter_mut().for_each(|v| *v = T::from_f32(v.to_f32() + 16.0));
    backward.d_o.as_chunks_mut().0.iter_mut().for_each(|[a, b]| *b = T::from_f32(-a.to_f32()));
    backward.d_lse = None;
    (problem, backward)
}

fn values_far_from_zero<T: Element>() {
    for path in paths() {
        let (problem, backward) = far_from_zero::<T>();
        let expected = backward.expected(&problem);
        let output = path.forward(&problem, &backward.operands.inputs()).unwrap();
        for saved in both_ways(&output) {
            let gradients = backward.run_with(&path, &problem, &saved);
            backward.agree(&gradients, &expected).unwrap_or_else(|error| panic!("{}: {error}", path.device_name()));
            // All of it cancels but for a hundredth, which is what the rounding of f32 leaves alone.
            let d_sink_logits = expected.d_sink_logits.as_ref().unwrap();
            compare(&gradients.d_sink_logits.unwrap(), d_sink_logits, 1e-4).unwrap();
        }
    }
}

/// o and o_lo are o in f32, subnormal numbers of the type among them, and delta comes from both.
fn the_rest_makes_it_f32<T: Element>() {
    for path in paths() {
        let keeps_subnormals = !path.is_gpu() || path.device_name().contains("llvmpipe");
        for (seed, size) in (0..).zip([1.0, 2f32.powi(-12), 2f32.powi(-16)]) {
            if size < 1.0 && T::DTYPE == DType::F16 && !keeps_subnormals {
                continue;
            }
            for width in [16, 33] {
                let options = Options::new().causal(true).sink_logits(SinkLogits::PerHead);
                let (problem, mut backward) = random::<T>(&problem([2, 4, 2], [100, 120], [16, width], options), seed);
                backward.operands.v.iter_mut().for_each(|v| *v = T::from_f32(v.to_f32() * size));
                backward.d_lse = None;
                let output = path.forward(&problem, &backward.operands.inputs()).unwrap();
                let expected = reference::forward(&problem, &backward.operands.inputs()).unwrap();
                let rest = output.o_lo.as_ref().unwrap();
                let whole: Vec<f32> = output.o.iter().zip(rest).map(|(o, &rest)| o.with_lo(rest)).collect();
                let name = format!("{problem}, values of {size}, on {}", path.device_name());
                compare(&whole, &expected.o, accepted(DType::F32)).unwrap_or_else(|error| panic!("{name}: {error}"));
                compare(&T::widen(&output.o), &expected.o, accepted(DType::F32)).unwrap_err();

                let expected = backward.expected(&problem).d_sink_logits.unwrap();
                let d_sink = |saved| backward.run_with(&path, &problem, saved).d_sink_logits.unwrap();
                compare(&d_sink(&output), &expected, 3e-5).unwrap_or_else(|error| panic!("{name}: {error}"));
                // It is read: without it, but with o as it is, the result is another.
                let none = output.clone().o_lo(vec![0; rest.len()]);
                compare(&d_sink(&none), &expected, 3e-5).unwrap_err();
            }
        }
    }
}

/// Why delta is not summed from the saved o.
fn the_saved_output_is_not_precise_enough<T: Element>() {
    let (problem, backward) = far_from_zero::<T>();
    let saved = backward.saved(&problem);
    let widened = |x: &[T]| T::widen(x).into_owned();
    let operands = &backward.operands;
    let (q, k, v, d_o) = (widened(&operands.q), widened(&operands.k), widened(&operands.v), widened(&backward.d_o));
    let inputs = Inputs::new(&q, &k, &v).sink_logits(operands.sink_logits.as_deref());
    let single = Problem::new(*problem.shape(), problem.options().dtype(DType::F32)).unwrap();
    let saved = Output::new(widened(&saved.o), saved.lse);
    let rough = cpu::backward(&single, &inputs, &saved, &Upstream::new(&d_o)).unwrap();
    let expected = backward.expected(&problem);
    compare(&rough.d_sink_logits.unwrap(), &expected.d_sink_logits.unwrap(), accepted(T::DTYPE)).unwrap_err();
}

fn hidden_keys_never_come_through<T: Element>() {
    for path in paths() {
        let options = Options::new().window(Window::keys(9)).query_offset(-10).layout(Layout::Bhsd);
        for sinks in [SinkLogits::None, SinkLogits::PerHead] {
            let options = options.sink_logits(sinks);
            let (problem, mut backward) = random::<T>(&problem([1, 2, 1], [70, 70], [16, 16], options), 4);
            let run = |backward: &Backward<T>| {
                let output = path.forward(&problem, &backward.operands.inputs()).unwrap();
                let gradients = both_ways(&output).map(|saved| backward.run_with(&path, &problem, &saved));
                (output, gradients)
            };
            let (output, [gradients, without]) = run(&backward);
            for j in 60..70 {
                let bad = T::from_f32([f32::NAN, f32::INFINITY, f32::NEG_INFINITY][j % 3]);
                backward.operands.key(&problem, 0, 0, j).fill(bad);
                backward.operands.value(&problem, 0, 0, j).fill(bad);
            }
            let name = format!("{problem} on {}", path.device_name());
            assert_eq!(run(&backward), (output.clone(), [gradients.clone(), without]), "{name}");
            // The first ten queries of each head see nothing.
            for head in 0..2 {
                let rows = head * 70 * 16..(head * 70 + 10) * 16;
                assert!(output.o[rows.clone()].iter().all(|x| x.to_f32() == 0.0), "{name}");
                assert!(gradients.d_q[rows].iter().all(|x| x.to_f32() == 0.0), "{name}");
            }
            assert!(gradients.d_k[60 * 16..].iter().chain(&gradients.d_v[60 * 16..]).all(|x| x.to_f32() == 0.0));
        }
    }
}

/// Subnormal values and gradients come through, as far as f32 holds their products: nothing is flushed.
fn subnormal_operands<T: Element>() {
    // WGSL lets a device take subnormal numbers for zero, which llvmpipe does not.
    for path in paths().into_iter().filter(|path| !path.is_gpu() || path.device_name().contains("llvmpipe")) {
        let (problem, mut backward) = random::<T>(&problem([1, 2, 1], [20, 30], [16, 16], Options::new()), 5);
        let small = |x: &mut T, n: usize| *x = bytemuck::cast((n % 63) as u16 + 1);
        backward.operands.v.iter_mut().enumerate().for_each(|(n, x)| small(x, n));
        let inputs = backward.operands.inputs();
        let output = path.forward(&problem, &inputs).unwrap();
        let expected = reference::forward(&problem, &inputs).unwrap();
        let low = low_precision::forward(&problem, &inputs);
        assert!(output.o.iter().all(|o| o.to_f32() > 0.0));
        compare_low_precision(&output.o, &low.o, &expected.o).unwrap();
        compare_lse(&output.lse, &expected.lse, 1e-5).unwrap();

        // And d_o, which d_v is a mean of.
        backward.d_o.iter_mut().enumerate().for_each(|(n, x)| small(x, n));
        backward.d_lse = None;
        let gradients = backward.run(&path, &problem);
        assert!(gradients.d_v.iter().all(|x| x.to_f32() > 0.0));
        let low = low_precision::backward(&problem, &backward.operands.inputs(), &backward.upstream());
        compare_low_precision(&gradients.d_v, &low.d_v, &backward.expected(&problem).d_v).unwrap();
    }
}

/// The largest number of the type.
fn largest<T: Element>() -> T {
    // One below infinity.
    let bits: u16 = bytemuck::cast(T::from_f32(f32::INFINITY));
    bytemuck::cast(bits - 1)
}

/// What is finite once it is rounded to the type must come out as that, wherever the scores are finite in f32.
/// Subnormal results may be lost beside numbers as large as these.
fn no_worse_than_rounding<T: Element>(name: &str, actual: &[T], expected: &[f64]) {
    let most = expected.iter().fold(0.0, |most, x| f64::max(most, x.abs()));
    let subnormal = if T::DTYPE == DType::F16 { 2f64.powi(-24) } else { 2f64.powi(-126) };
    for (n, (&x, &y)) in actual.iter().zip(expected).enumerate() {
        let (x, rounded) = (f64::from(x.to_f32()), f64::from(T::from_f32(y as f32).to_f32()));
        if rounded.is_infinite() {
            assert_eq!(x, rounded, "{name}[{n}]");
        } else {
            let error = (x - y).abs();
            assert!(error <= accepted(T::DTYPE) * most + subnormal, "{name}[{n}] is {x}, expected {y}");
        }
    }
}

/// The largest values, upstream gradients and, with queries so small that scores are moderate, keys.
fn the_largest_operands<T: Element>() {
    // Kernels sum in f32 without units, in which numbers as large as bf16 has overflow.
    for path in paths().into_iter().filter(|path| !path.is_gpu() || T::DTYPE == DType::F16) {
        let largest = largest::<T>();
        let options = Options::new().causal(true).sink_logits(SinkLogits::PerHead).layout(Layout::Bhsd);
        for what in ["v", "d_o", "v and d_o", "k", "q", "all but q"] {
            let (problem, mut backward) = random::<T>(&problem([1, 2, 1], [60, 300], [16, 16], options), 6);
            // Never above the largest number, and it among them.
            let grow = |x: &mut [T]| {
                for (n, x) in x.iter_mut().enumerate() {
                    *x = if n % 7 == 0 { largest } else { T::from_f32(x.to_f32() / 2.0 * largest.to_f32()) };
                }
            };
            let shrink = |x: &mut [T]| x.iter_mut().for_each(|x| *x = T::from_f32(x.to_f32() / largest.to_f32()));
            match what {
                "v" => grow(&mut backward.operands.v),
                "d_o" => grow(&mut backward.d_o),
                "v and d_o" => {
                    grow(&mut backward.operands.v);
                    grow(&mut backward.d_o);
                }
                "k" => {
                    grow(&mut backward.operands.k);
                    shrink(&mut backward.operands.q);
                }
                "q" => {
                    grow(&mut backward.operands.q);
                    shrink(&mut backward.operands.k);
                }
                _ => {
                    grow(&mut backward.operands.k);
                    grow(&mut backward.operands.v);
                    grow(&mut backward.d_o);
                    shrink(&mut backward.operands.q);
                }
            }
            let output = path.forward(&problem, &backward.operands.inputs()).unwrap();
            let gradients = backward.run_with(&path, &problem, &output);
            let expected = reference::forward(&problem, &backward.operands.inputs()).unwrap();
            no_worse_than_rounding(&format!("{what}: o"), &output.o, &expected.o);
            compare_lse(&output.lse, &expected.lse, accepted(DType::F32)).unwrap();
            let expected = backward.expected(&problem);
            for (name, actual, expected) in [
                ("d_q", &gradients.d_q, &expected.d_q),
                ("d_k", &gradients.d_k, &expected.d_k),
                ("d_v", &gradients.d_v, &expected.d_v),
            ] {
                no_worse_than_rounding(&format!("{what}: {name}"), actual, expected);
            }
            for (x, y) in gradients.d_sink_logits.unwrap().iter().zip(expected.d_sink_logits.unwrap()) {
                let as_expected = f64::from(*x) == f64::from(y as f32) || (f64::from(*x) / y - 1.0).abs() < 1e-4;
                assert!(as_expected, "{what}: d_sink_logits is {x}, expected {y}");
            }
        }
    }
}

/// d_v of one key is the sum of the d_o: infinite where the type ends, by rounding, with the right sign.
fn sums_beyond_the_range<T: Element>() {
    for path in paths() {
        let problem = problem([1, 2, 2], [2, 1], [1, 1], Options::new().dtype(T::DTYPE).layout(Layout::Bhsd));
        let (large, zero) = (largest::<T>(), [T::default(); 4]);
        let minus = T::from_f32(-large.to_f32());
        let operands = Operands::new(zero.to_vec(), zero[..2].to_vec(), zero[..2].to_vec());
        let backward = Backward { operands, d_o: vec![large, large, minus, minus], d_lse: None };
        let gradients = backward.run(&path, &problem);
        assert_eq!(gradients.d_v, [f32::INFINITY, f32::NEG_INFINITY].map(T::from_f32), "{}", path.device_name());
        assert!(gradients.d_q.iter().chain(&gradients.d_k).all(|x| x.to_f32() == 0.0), "{}", path.device_name());
    }
}

/// f16 scores reach 256 * 65504^2, which f32 holds: nothing overflows, one key takes all.
#[test]
fn the_largest_scores_of_f16() {
    for path in paths() {
        let problem = problem([1, 1, 1], [1, 3], [256, 4], Options::new().scale(1.0).dtype(DType::F16));
        let q = [f16::MAX; 256];
        let k = [[f16::MAX; 256], [f16::MIN; 256], [f16::ZERO; 256]].concat();
        let v: Vec<f16> = (0..12).map(|n| f16::from_f32(n as f32)).collect();
        let inputs = Inputs::new(&q, &k, &v);
        let output = path.forward(&problem, &inputs).unwrap();
        assert_eq!(output.o, v[..4]);
        compare_lse(&output.lse, &[256.0 * 65504f64.powi(2)], 1e-5).unwrap();
        let d_o = [f16::MAX; 4];
        let gradients = path.backward(&problem, &inputs, &output, &Upstream::new(&d_o)).unwrap();
        assert_eq!(gradients.d_v, [d_o, [f16::ZERO; 4], [f16::ZERO; 4]].concat());
        assert!(gradients.d_q.iter().chain(&gradients.d_k).all(|x| x.is_finite()));
    }
}

/// What does not fit: a length, and o_lo where nothing is rounded.
#[test]
fn a_rest_that_does_not_fit_is_an_error() {
    for path in paths() {
        let shape = problem([1, 1, 1], [2, 2], [4, 4], Options::new());
        let backward = Backward::random(&shape, 1);
        let mut output = path.forward(&shape, &backward.operands.inputs()).unwrap();
        assert_eq!(output.o_lo, None);
        output.o_lo = Some(vec![0; 8]);
        match path.backward(&shape, &backward.operands.inputs(), &output, &backward.upstream()) {
            Err(error @ Error::UnexpectedOperand { operand: "o_lo", .. }) => {
                assert!(error.to_string().contains("f32"), "{error}");
            }
            other => panic!("{other:?}"),
        }
        let (problem, backward) = random::<f16>(&shape, 1);
        let mut output = path.forward(&problem, &backward.operands.inputs()).unwrap();
        output.o_lo = Some(vec![0; 7]);
        match path.backward(&problem, &backward.operands.inputs(), &output, &backward.upstream()) {
            Err(Error::OperandLength { operand: "o_lo", expected: 8, actual: 7, .. }) => {}
            other => panic!("{other:?}"),
        }
    }
}

/// The type of the slices is that of the options, or an error with both names.
#[test]
fn a_mixed_up_element_type_is_an_error() {
    for path in [Some(Attention::cpu()), gpu().cloned()].into_iter().flatten() {
        let problem = problem([1, 1, 1], [1, 1], [1, 1], Options::new().dtype(DType::Bf16));
        let x = [f16::ONE];
        let inputs = Inputs::new(&x, &x, &x);
        let saved = Output::new(x.to_vec(), vec![0.0]);
        let forward = path.forward(&problem, &inputs).map(drop);
        let backward = path.backward(&problem, &inputs, &saved, &Upstream::new(&x)).map(drop);
        for error in [forward, backward, reference::forward(&problem, &inputs).map(drop)] {
            let error = error.unwrap_err();
            assert!(matches!(error, Error::WrongElementType { operands: DType::F16, options: DType::Bf16 }));
            assert_eq!(error.to_string(), "the operands are f16, the options say bf16: see Options::dtype");
        }
    }
}
