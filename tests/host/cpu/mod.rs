//! The tiled CPU path against the f64 definition, and against the laws of the operator.

mod backward;
mod options;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use sink_attention::testing::compare::accepted;
use sink_attention::{
    Alignment, Bias, DType, Element, Inputs, Layout, MaskData, MaskPacking, Options, Output, Problem, Shape,
    SinkLogits, Window, cpu,
};

const SIZES: [(usize, usize); 8] = [(1, 1), (1, 257), (3, 3), (64, 1), (63, 65), (113, 203), (239, 1), (300, 300)];
/// (head_dim, value_dim)
const WIDTHS: [(usize, usize); 15] = [
    (1, 1),
    (3, 5),
    (16, 16),
    (33, 7),
    (64, 64),
    (80, 80),
    (96, 33),
    (128, 128),
    (192, 128),
    (256, 256),
    (7, 256),
    (256, 1),
    (320, 320),
    (512, 512),
    (7, 500),
];
/// (heads, kv_heads)
const HEADS: [(usize, usize); 4] = [(1, 1), (2, 2), (6, 2), (5, 1)];

/// A problem with its operands.
#[derive(Clone)]
struct Case<T = f32> {
    problem: Problem,
    q: Vec<T>,
    k: Vec<T>,
    v: Vec<T>,
    sink_logits: Option<Vec<f32>>,
    alibi_slopes: Option<Vec<f32>>,
    /// In f32 and in the operands' type, for the options to choose from.
    bias: Option<(Vec<f32>, Vec<T>)>,
    /// In bytes and in bits.
    mask: Option<(Vec<u8>, Vec<u32>)>,
}

impl Case {
    fn new(shape: Shape, options: Options, seed: u64) -> Self {
        Case::of(Problem::new(shape, options).unwrap(), seed)
    }

    fn of(problem: Problem, seed: u64) -> Self {
        let (options, heads) = (*problem.options(), problem.shape().heads);
        let mut rng = StdRng::seed_from_u64(seed);
        let mut random = |shape: [usize; 4], scale: f32| -> Vec<f32> {
            (0..shape.iter().product()).map(|_| scale * rng.random_range(-1.0..1.0)).collect()
        };
        let (q, k, v) =
            (random(problem.q_shape(), 2.0), random(problem.k_shape(), 2.0), random(problem.v_shape(), 1.0));
        let per_head = options.sink_logits == SinkLogits::PerHead;
        let sink_logits = per_head.then(|| random([1, 1, 1, heads], 4.0));
        // Mostly positive, as they are: scores that grow with the distance are rounded by as much.
        let alibi_slopes = options.alibi.then(|| {
            let slopes = random([1, 1, 1, heads], 0.3).into_iter().enumerate();
            slopes.map(|(h, x)| if h % 3 == 2 { -0.03 * x.abs() } else { x.abs() }).collect()
        });
        let bias = problem.bias_shape().map(|shape| {
            let mut bias = random(shape, 2.0);
            bias.iter_mut().filter(|x| **x > 1.6).for_each(|x| *x = f32::NEG_INFINITY);
            (bias.clone(), bias)
        });
        let mask = problem.mask_shape().map(|[b, h, m, _]| {
            let keys = problem.sequences().map(|sequence| sequence.k_rows).max().unwrap();
            let mask =
                random([b, h, m, keys], 1.0).into_iter().map(|x| if x > -0.5 { x.to_bits() as u8 | 2 } else { 0 });
            with_bits(mask.collect(), keys)
        });
        Case { problem, q, k, v, sink_logits, alibi_slopes, bias, mask }
    }

    fn cast<T: Element>(self) -> Case<T> {
        let Case { problem, q, k, v, sink_logits, alibi_slopes, bias, mask } = self;
        let bias = bias.map(|(bias, _)| (bias.clone(), T::narrow(bias)));
        let [q, k, v] = [q, k, v].map(T::narrow);
        Case { problem, q, k, v, sink_logits, alibi_slopes, bias, mask }
    }
}

fn with_bits(mask: Vec<u8>, keys: usize) -> (Vec<u8>, Vec<u32>) {
    let bits = MaskData::pack(&mask, keys);
    (mask, bits)
}

impl<T: Element> Case<T> {
    fn inputs(&self) -> Inputs<'_, T> {
        let options = self.problem.options();
        let bias = self.bias.as_ref().map(|(bias, narrow)| match options.bias_dtype {
            DType::F32 => Bias::F32(bias),
            _ => Bias::Operand(narrow),
        });
        let mask = self.mask.as_ref().map(|(bytes, bits)| match options.mask_packing {
            MaskPacking::Bytes => MaskData::Bytes(bytes),
            MaskPacking::Bits => MaskData::Bits(bits),
        });
        let inputs = Inputs::new(&self.q, &self.k, &self.v).sink_logits(self.sink_logits.as_deref());
        inputs.alibi_slopes(self.alibi_slopes.as_deref()).bias(bias).mask(mask)
    }

    fn forward(&self) -> Output<T> {
        cpu::forward(&self.problem, &self.inputs()).unwrap()
    }

    /// Compares with the definition and returns the result.
    fn check(&self) -> Output<T> {
        let expected = cpu::reference::forward(&self.problem, &self.inputs()).unwrap();
        let output = self.forward();
        if let Err(difference) = compare(&output, &expected) {
            panic!("{}: {difference}", self.problem);
        }
        output
    }
}

/// `|o - expected| / |expected|` as [`accepted`], 1e-5 in f32, and each lse within 1e-5 absolute + relative.
/// Infinities and NaN must stand in the same places.
fn compare<T: Element>(output: &Output<T>, expected: &Output<f64, f64>) -> Result<(), String> {
    assert_eq!((output.o.len(), output.lse.len()), (expected.o.len(), expected.lse.len()));
    let (mut difference, mut norm) = (0.0, 0.0);
    for (n, (&x, &y)) in output.o.iter().zip(&expected.o).enumerate() {
        let x: f64 = x.into();
        if x.is_finite() != y.is_finite() {
            return Err(format!("o[{n}] is {x}, not {y}"));
        }
        if y.is_finite() {
            difference += (x - y).powi(2);
            norm += y * y;
        }
    }
    // Only finite numbers were summed.
    if difference.sqrt() > accepted(T::DTYPE) * norm.sqrt() {
        return Err(format!("o is off by {:e}", (difference / norm).sqrt()));
    }
    for (n, (&x, &y)) in output.lse.iter().zip(&expected.lse).enumerate() {
        let same = if y.is_finite() {
            (f64::from(x) - y).abs() <= 1e-5 * (1.0 + y.abs())
        } else {
            f64::from(x) == y || x.is_nan() && y.is_nan()
        };
        if !same {
            return Err(format!("lse[{n}] is {x}, not {y}"));
        }
    }
    Ok(())
}

fn shape((heads, kv_heads): (usize, usize), (seq_q, seq_k): (usize, usize), (d, e): (usize, usize)) -> Shape {
    Shape { batch: 1, heads, kv_heads, seq_q, seq_k, head_dim: d, value_dim: e }
}

/// Every kind of visibility.
fn masks((m, n): (usize, usize)) -> Vec<Options> {
    let new = Options::new;
    let far = (n + m) as i64;
    let mut options = vec![
        new(),
        new().causal(true),
        new().causal(true).alignment(Alignment::TopLeft),
        new().window(Window::keys(17)),
        new().window(Window::new(5, 3)).sink_tokens(4),
        new().window(Window { left: Some(70), right: None }),
        new().window(Window { left: None, right: Some(9) }).alignment(Alignment::TopLeft),
        new().causal(true).window(Window::keys(100)).sink_tokens(70),
    ];
    for offset in [-far, -3, 2, far] {
        options.push(new().causal(true).query_offset(offset));
        options.push(new().window(Window::keys(33)).sink_tokens(3).query_offset(offset));
    }
    options
}

#[test]
fn the_comparison_notices_errors() {
    let expected = Output::new(vec![1.0, 2.0], vec![3.0, f64::NEG_INFINITY]);
    let good = Output::new(vec![1.0, 2.0], vec![3.0, f32::NEG_INFINITY]);
    assert!(compare(&good, &expected).is_ok());
    for (o, lse) in [
        ([1.0, 2.0001], [3.0, f32::NEG_INFINITY]),
        ([f32::NAN, 2.0], [3.0, f32::NEG_INFINITY]),
        ([1.0, 2.0], [3.001, f32::NEG_INFINITY]),
        ([1.0, 2.0], [f32::NAN, f32::NEG_INFINITY]),
        ([1.0, 2.0], [3.0, -1e30]),
    ] {
        assert!(compare(&Output::new(o.to_vec(), lse.to_vec()), &expected).is_err());
    }
}

#[test]
fn sizes_and_masks() {
    let sinks = [SinkLogits::None, SinkLogits::OffByOne, SinkLogits::PerHead];
    let mut seed = 0;
    for size in SIZES {
        for mask in masks(size) {
            for (layout, width) in [(Layout::Bshd, (33, 7)), (Layout::Bhsd, (16, 18))] {
                let (heads, sinks) = (HEADS[seed % 4], sinks[seed % 3]);
                seed += 1;
                let shape = Shape { batch: 2, ..shape(heads, size, width) };
                Case::new(shape, mask.layout(layout).sink_logits(sinks), seed as u64).check();
            }
        }
    }
}

#[test]
fn widths() {
    for (n, width) in WIDTHS.into_iter().enumerate() {
        for size in [(1, 257), (63, 65), (113, 203)] {
            let layout = [Layout::Bshd, Layout::Bhsd][n % 2];
            let options = Options::new().causal(true).layout(layout).sink_logits(SinkLogits::PerHead);
            Case::new(shape(HEADS[n % 4], size, width), options, 1).check();
        }
    }
}

#[test]
fn long_rows_are_split_and_merged() {
    for (m, n) in [(1, 10_000), (2, 4097), (70, 6000)] {
        for options in [Options::new(), Options::new().window(Window::keys(3000)).sink_tokens(1000)] {
            let options = options.sink_logits(SinkLogits::PerHead);
            Case::new(shape((4, 2), (m, n), (24, 40)), options, 2).check();
        }
    }
}

#[test]
fn scales() {
    for scale in [0.0, -0.7, 1.0, 1e-20, -1e-3, 60.0] {
        let options = Options::new().causal(true).window(Window::keys(50)).scale(scale);
        Case::new(shape((2, 1), (63, 65), (16, 16)), options, 3).check();
    }
}

#[test]
fn large_logits() {
    for options in [Options::new(), Options::new().causal(true).sink_logits(SinkLogits::PerHead)] {
        // Powers of two, so that the operands' magnitude alone is what changes.
        for magnitude in [8.0, 16.0] {
            let mut case = Case::new(shape((2, 2), (113, 203), (64, 64)), options, 4);
            case.q.iter_mut().chain(&mut case.k).for_each(|x| *x *= magnitude);
            let output = case.check();
            assert!(output.lse.iter().any(|lse| lse.abs() > 100.0));
        }
    }
    // All scores far below zero, and far above.
    for sign in [-1.0, 1.0] {
        let mut case = Case::new(shape((1, 1), (63, 65), (64, 64)), Options::new(), 5);
        case.q.fill(8.0);
        case.k.iter_mut().for_each(|x| *x = sign * (8.0 + *x));
        case.check();
    }
}

#[test]
fn extreme_sink_logits() {
    let inf = f32::INFINITY;
    let sinks = [-100.0, -30.0, 0.0, 30.0, 100.0, 1e4, -1e4, 1e30, -1e30, f32::MAX, f32::MIN, inf, -inf];
    let options = Options::new().causal(true).sink_logits(SinkLogits::PerHead);
    for size in [(63, 65), (5, 2), (1, 2000)] {
        let mut case = Case::new(shape((sinks.len(), 1), size, (16, 16)), options, 6);
        case.sink_logits = Some(sinks.to_vec());
        let output = case.check();
        for (row, lse) in output.lse.iter().enumerate() {
            if sinks[row / size.0] == inf {
                assert_eq!(*lse, inf);
                assert!(output.o[..].iter().all(|o| o.is_finite()));
            }
        }
    }
}

#[test]
fn rows_that_see_nothing() {
    let options = Options::new().causal(true).query_offset(-3).layout(Layout::Bhsd);
    let shape = shape((2, 1), (70, 65), (16, 3));
    let mut case = Case::new(shape, options, 7);
    // The keys that nothing but later rows may see must not reach the first three.
    case.k[0] = f32::NAN;
    case.v[0] = f32::INFINITY;
    for (sinks, lse) in [(None, [f32::NEG_INFINITY; 2]), (Some(vec![-3.25, 1e30]), [-3.25, 1e30])] {
        let sink_logits = if sinks.is_some() { SinkLogits::PerHead } else { SinkLogits::None };
        case.problem = Problem::new(shape, options.sink_logits(sink_logits)).unwrap();
        case.sink_logits = sinks;
        let output = case.forward();
        for (h, lse) in lse.into_iter().enumerate() {
            assert_eq!(output.o[h * 70 * 3..][..9], [0.0; 9]);
            assert_eq!(output.lse[h * 70..][..3], [lse; 3]);
            assert!(output.o[h * 70 * 3 + 9].is_nan());
            assert!(output.lse[h * 70 + 3].is_nan());
        }
    }
}

#[test]
fn hidden_keys_never_reach_the_result() {
    for size in SIZES.into_iter().chain([(8, 3000)]) {
        for options in masks(size) {
            let shape = shape((2, 1), size, (16, 18));
            let mut case = Case::new(shape, options.layout(Layout::Bhsd), 8);
            let mask = case.problem.sequences().next().unwrap().band;
            // Whole rows that no query sees: the numbers must not change by a bit.
            let clean = case.forward();
            for j in (0..size.1).filter(|&j| !(0..size.0).any(|i| mask.visible(i, j))) {
                let poison = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][j % 3];
                case.k[j * 16..][..16].fill(poison);
                case.v[j * 18..][..18].fill(poison);
            }
            assert_eq!(case.forward(), clean, "{}", case.problem);
            // One key that some queries see and others do not.
            let Some(j) = (0..size.1).find(|&j| {
                let seen = (0..size.0).filter(|&i| mask.visible(i, j)).count();
                seen > 0 && seen < size.0
            }) else {
                continue;
            };
            let (old_k, old_v) = (case.k.clone(), case.v.clone());
            for poison in [f32::NAN, f32::INFINITY] {
                for in_k in [true, false] {
                    let (operand, width) = if in_k { (&mut case.k, 16) } else { (&mut case.v, 18) };
                    operand[j * width..][..width].fill(poison);
                    let dirty = case.forward();
                    for row in 0..2 * size.0 {
                        let (o, expected) = (&dirty.o[row * 18..][..18], &clean.o[row * 18..][..18]);
                        if mask.visible(row % size.0, j) {
                            // A key of infinity may be one with a score of -inf, which has no weight.
                            let loud = o.iter().all(|o| !o.is_finite());
                            assert!(loud || in_k && poison.is_infinite(), "{} row {row}", case.problem);
                            assert!(!poison.is_nan() || o.iter().all(|o| o.is_nan()));
                            assert!(!in_k || !poison.is_nan() || dirty.lse[row].is_nan());
                        } else {
                            assert_eq!((o, dirty.lse[row]), (expected, clean.lse[row]), "{}", case.problem);
                        }
                    }
                    case.k.clone_from(&old_k);
                    case.v.clone_from(&old_v);
                }
            }
        }
    }
}

#[test]
fn nan_in_a_query_or_a_sink_is_not_silent() {
    let options = Options::new().causal(true).layout(Layout::Bhsd).sink_logits(SinkLogits::PerHead);
    let mut case = Case::new(shape((2, 2), (63, 65), (16, 16)), options, 9);
    case.q[5 * 16 + 3] = f32::NAN;
    case.sink_logits = Some(vec![0.5, f32::NAN]);
    let output = case.forward();
    for row in 0..2 * 63 {
        let nan = row == 5 || row >= 63;
        assert_eq!(output.lse[row].is_nan(), nan, "row {row}");
        assert!(output.o[row * 16..][..16].iter().all(|o| o.is_nan() == nan), "row {row}");
    }
}

#[test]
fn a_sink_logit_of_minus_infinity_is_none() {
    for size in SIZES {
        let options = Options::new().causal(true);
        let shape = shape((6, 2), size, (16, 16));
        let none = Case::new(shape, options, 10).forward();
        let mut case = Case::new(shape, options.sink_logits(SinkLogits::PerHead), 10);
        case.sink_logits = Some(vec![f32::NEG_INFINITY; 6]);
        assert_eq!(case.forward(), none);
        let off_by_one = Case::new(shape, options.sink_logits(SinkLogits::OffByOne), 10).forward();
        case.sink_logits = Some(vec![0.0; 6]);
        assert_eq!(case.forward(), off_by_one);
    }
}

#[test]
fn a_window_of_everything_is_causal() {
    for size in SIZES {
        let shape = shape((2, 1), size, (16, 16));
        let causal = Case::new(shape, Options::new().causal(true), 11).forward();
        for keys in [size.1.max(size.0), usize::MAX] {
            assert_eq!(Case::new(shape, Options::new().window(Window::keys(keys)), 11).forward(), causal);
        }
    }
}

#[test]
fn groups_are_repeated_heads() {
    for (m, n) in SIZES {
        let options = Options::new().causal(true).layout(Layout::Bhsd);
        let grouped = Case::new(shape((6, 2), (m, n), (16, 16)), options, 12);
        let mut repeated = Case::new(shape((6, 6), (m, n), (16, 16)), options, 12);
        let repeat = |x: &[f32]| x.chunks(n * 16).flat_map(|head| [head; 3].concat()).collect();
        (repeated.k, repeated.v) = (repeat(&grouped.k), repeat(&grouped.v));
        repeated.q.clone_from(&grouped.q);
        // Tiles differ, and with them the order of no sum: the same bits.
        assert_eq!(grouped.forward(), repeated.forward());
    }
}

#[test]
fn threads_do_not_change_a_bit() {
    for size in [(300, 300), (1, 5000)] {
        let options = Options::new().causal(true).sink_logits(SinkLogits::PerHead);
        let case = Case::new(shape((6, 2), size, (33, 64)), options, 13);
        let results: Vec<_> = [1, 2, 3, 8]
            .into_iter()
            .map(|threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| [case.forward(), case.forward()])
            })
            .collect();
        assert!(results.iter().flatten().all(|result| *result == results[0][0]));
    }
}

#[test]
fn wrong_operands_are_errors() {
    let case = Case::new(shape((2, 1), (3, 3), (4, 4)), Options::new(), 14);
    let inputs = case.inputs();
    for bad in [inputs.q(&inputs.q[1..]), inputs.k(&[]), inputs.v(inputs.q), inputs.sink_logits(&[0.0, 0.0][..])] {
        assert!(cpu::forward(&case.problem, &bad).is_err());
    }
}
