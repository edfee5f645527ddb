//! The tiled backward pass against the f64 definition, and against the laws of its gradients.

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use sink_attention::testing::compare::accepted;
use sink_attention::{Element, Gradients, Layout, Options, Output, Shape, SinkLogits, Upstream, Window, cpu};

use super::{Case, HEADS, SIZES, WIDTHS, masks, shape};

/// A case with the gradients that flow into its results.
pub struct Backward<T = f32> {
    pub case: Case<T>,
    pub d_o: Vec<T>,
    pub d_lse: Option<Vec<f32>>,
}

impl Backward {
    pub fn new(case: Case, seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed ^ 0xd0);
        let mut random = |len| -> Vec<f32> { (0..len).map(|_| rng.random_range(-1.0..1.0)).collect() };
        let d_o = random(case.problem.o_shape().iter().product());
        let d_lse = (!seed.is_multiple_of(3)).then(|| random(case.problem.lse_shape().iter().product()));
        Backward { case, d_o, d_lse }
    }

    pub fn cast<T: Element>(self) -> Backward<T> {
        Backward { case: self.case.cast(), d_o: T::narrow(self.d_o), d_lse: self.d_lse }
    }
}

impl<T: Element> Backward<T> {
    pub fn upstream(&self) -> Upstream<'_, T> {
        Upstream::new(&self.d_o).d_lse(self.d_lse.as_deref())
    }

    pub fn run(&self) -> Gradients<T> {
        self.run_with(&self.case.forward())
    }

    pub fn run_with(&self, saved: &Output<T>) -> Gradients<T> {
        cpu::backward(&self.case.problem, &self.case.inputs(), saved, &self.upstream()).unwrap()
    }

    /// Compares with the definition and returns the result.
    pub fn check(&self) -> Gradients<T> {
        let gradients = self.run();
        let expected = cpu::reference::backward(&self.case.problem, &self.case.inputs(), &self.upstream()).unwrap();
        let sequences = self.case.problem.sequences();
        let most = sequences.map(|s| s.band.offset().unsigned_abs() as f64 + s.q_rows.max(s.k_rows) as f64);
        let failures = differences_within(&gradients, &expected, norm(&self.d_o), most.fold(0.0, f64::max));
        assert!(failures.is_empty(), "{}: {}", self.case.problem, failures.join(", "));
        gradients
    }
}

fn backward(shape: Shape, options: Options, seed: u64) -> Backward {
    Backward::new(Case::new(shape, options, seed), seed)
}

pub fn norm<T: Copy + Into<f64>>(x: &[T]) -> f64 {
    x.iter().map(|&x| x.into().powi(2)).sum::<f64>().sqrt()
}

/// The gradients for which `|x - expected| / |expected|` is more than [`accepted`]; those in f32 whatever the operands are,
/// more than 1e-5.
///
/// Where a gradient vanishes because terms cancel, as d_q does with one key and no sink, its error
/// is relative to those terms, of the order of `terms`.
pub fn differences<T: Element>(gradients: &Gradients<T>, expected: &Gradients<f64, f64>, terms: f64) -> Vec<String> {
    differences_within(gradients, expected, terms, 0.0)
}

/// As [`differences`]. What is summed for a slope of ALiBi is as much larger as the distances are, `most` at most.
fn differences_within<T: Element>(x: &Gradients<T>, y: &Gradients<f64, f64>, terms: f64, most: f64) -> Vec<String> {
    let accepted = accepted(T::DTYPE);
    let bound =
        |accepted: f64| move |norm: f64| if norm > 1e-3 * terms { accepted * norm } else { 0.1 * accepted * terms };
    let operands = [("d_q", &x.d_q, &y.d_q), ("d_k", &x.d_k, &y.d_k), ("d_v", &x.d_v, &y.d_v)];
    let operands = operands.map(|(name, x, y)| difference(name, x, y, bound(accepted)));
    let optional = [("d_sink_logits", &x.d_sink_logits, &y.d_sink_logits), ("d_bias", &x.d_bias, &y.d_bias)];
    let optional = optional.map(|(name, x, y)| {
        assert_eq!(x.is_some(), y.is_some());
        difference(name, x.as_ref()?, y.as_ref()?, bound(1e-5))
    });
    assert_eq!(x.d_alibi_slopes.is_some(), y.d_alibi_slopes.is_some());
    let slopes = x.d_alibi_slopes.as_ref().zip(y.d_alibi_slopes.as_ref());
    let slopes = slopes.and_then(|(x, y)| difference("d_alibi_slopes", x, y, |norm| 1e-5 * norm + 1e-7 * terms * most));
    operands.into_iter().chain(optional).chain([slopes]).flatten().collect()
}

fn difference<T: Element>(name: &str, x: &[T], expected: &[f64], bound: impl Fn(f64) -> f64) -> Option<String> {
    assert_eq!(x.len(), expected.len());
    let error: Vec<f64> = x.iter().zip(expected).map(|(&x, y)| x.into() - y).collect();
    let (error, norm) = (norm(&error), norm(expected));
    // So written that NaN is a difference.
    let close = error <= bound(norm);
    (!close).then(|| format!("{name} is off by {:e} (norm {norm:e})", error / norm))
}

/// Rows of `width` of an operand with the axes `[.., seq, width]`.
fn row(x: &[f32], row: usize, width: usize) -> &[f32] {
    &x[row * width..][..width]
}

#[test]
fn the_comparison_notices_errors() {
    let expected = Gradients::new(vec![1.0, 2.0], vec![0.0; 2], vec![3.0])
        .d_sink_logits(vec![4.0])
        .d_alibi_slopes(vec![5.0])
        .d_bias(vec![6.0]);
    let good = Gradients::new(vec![1.0, 2.0], vec![0.0; 2], vec![3.0])
        .d_sink_logits(vec![4.0])
        .d_alibi_slopes(vec![5.0])
        .d_bias(vec![6.0]);
    assert!(differences(&good, &expected, 1.0).is_empty());
    for bad in [
        good.clone().d_q(vec![1.0, 2.0001]),
        good.clone().d_k(vec![0.0, 0.0001]),
        good.clone().d_v(vec![f32::NAN]),
        good.clone().d_sink_logits(vec![f32::INFINITY]),
        good.clone().d_alibi_slopes(vec![5.001]),
        good.clone().d_bias(vec![-6.0]),
    ] {
        assert_eq!(differences(&bad, &expected, 1.0).len(), 1);
    }
}

#[test]
fn sizes_and_masks() {
    let sinks = [SinkLogits::None, SinkLogits::OffByOne, SinkLogits::PerHead];
    let mut seed = 0;
    for size in SIZES {
        for mask in masks(size) {
            for (layout, width) in [(Layout::Bshd, (33, 7)), (Layout::Bhsd, (16, 18))] {
                let shape = Shape { batch: 2, ..shape(HEADS[seed % 4], size, width) };
                let options = mask.layout(layout).sink_logits(sinks[seed % 3]);
                seed += 1;
                backward(shape, options, seed as u64).check();
            }
        }
    }
}

#[test]
fn widths() {
    for (n, width) in WIDTHS.into_iter().enumerate() {
        for size in [(1, 257), (63, 65), (113, 203)] {
            let options = Options::new().causal(true).layout([Layout::Bshd, Layout::Bhsd][n % 2]);
            backward(shape(HEADS[n % 4], size, width), options.sink_logits(SinkLogits::PerHead), 1).check();
        }
    }
}

#[test]
fn long_sweeps_are_split_and_added_up() {
    for (m, n) in [(1, 10_000), (3000, 2), (70, 3000)] {
        for options in [Options::new(), Options::new().window(Window::keys(1500)).sink_tokens(1000)] {
            backward(shape((4, 2), (m, n), (24, 40)), options.sink_logits(SinkLogits::PerHead), 2).check();
        }
    }
}

#[test]
fn scales() {
    for scale in [0.0, -0.7, 1.0, 1e-20, -1e-3] {
        let options = Options::new().causal(true).window(Window::keys(50)).scale(scale);
        backward(shape((2, 1), (63, 65), (16, 16)), options, 3).check();
    }
}

#[test]
fn large_logits() {
    for options in [Options::new(), Options::new().causal(true).sink_logits(SinkLogits::PerHead)] {
        for magnitude in [4.0, 8.0, 11.0] {
            let mut backward = backward(shape((2, 2), (113, 203), (64, 64)), options, 4);
            backward.case.q.iter_mut().chain(&mut backward.case.k).for_each(|x| *x *= magnitude);
            backward.check();
        }
    }
    // All rows alike, far below zero and far above: lse is rounded by as much in each of them.
    for sign in [-1.0, 1.0] {
        let mut backward = backward(shape((1, 1), (63, 65), (64, 64)), Options::new(), 5);
        backward.case.q.fill(2.0);
        backward.case.k.iter_mut().for_each(|x| *x = sign * (6.0 + *x / 8.0));
        backward.check();
        assert!(backward.case.forward().lse.iter().all(|lse| lse.abs() > 85.0));
    }
}

#[test]
fn extreme_sink_logits() {
    let inf = f32::INFINITY;
    let sinks = [-100.0, -30.0, 0.0, 30.0, 100.0, 1e4, -1e4, 1e30, -1e30, f32::MAX, f32::MIN, inf, -inf];
    let options = Options::new().causal(true).layout(Layout::Bhsd).sink_logits(SinkLogits::PerHead);
    for size in [(63, 65), (5, 2), (1, 2000)] {
        let mut backward = backward(shape((sinks.len(), 1), size, (16, 16)), options, 7);
        backward.case.sink_logits = Some(sinks.to_vec());
        let gradients = backward.check();
        let d_sink = gradients.d_sink_logits.unwrap();
        let d_lse = backward.d_lse.unwrap();
        for (h, sink) in sinks.into_iter().enumerate() {
            let d_q = row(&gradients.d_q, h, size.0 * 16);
            if sink >= 1e4 {
                // The sink has all the weight, and all of the gradient that flows into lse.
                assert!(d_q.iter().all(|&x| x == 0.0));
                let expected: f64 = row(&d_lse, h, size.0).iter().map(|&x| f64::from(x)).sum();
                assert_eq!(d_sink[h], expected as f32);
            } else if sink <= -1e4 && size.0 <= size.1 {
                // No row is left to the sink alone.
                assert_eq!(d_sink[h], 0.0);
            }
        }
    }
}

#[test]
fn rows_that_see_nothing() {
    let options = Options::new().causal(true).query_offset(-3).layout(Layout::Bhsd);
    let shape = shape((2, 1), (70, 65), (16, 3));
    for sinks in [None, Some(vec![-3.25, 1e30])] {
        let sink_logits = if sinks.is_some() { SinkLogits::PerHead } else { SinkLogits::None };
        let mut backward = backward(shape, options.sink_logits(sink_logits), 8);
        backward.case.sink_logits = sinks;
        let clean = backward.check();
        for h in 0..2 {
            assert_eq!(clean.d_q[h * 70 * 16..][..3 * 16], [0.0; 3 * 16]);
        }
        if backward.case.sink_logits.is_none() {
            // An lse of -inf cannot pass a gradient on, whatever it is.
            for h in 0..2 {
                backward.d_lse.as_mut().unwrap()[h * 70..][..3].fill(f32::NAN);
                backward.d_o[h * 70 * 3..][..3 * 3].fill(f32::INFINITY);
            }
            assert_eq!(backward.run(), clean);
        }
    }
}

#[test]
fn hidden_keys_never_reach_a_gradient() {
    for size in SIZES.into_iter().chain([(8, 3000)]) {
        for options in masks(size) {
            let mut backward = backward(shape((2, 1), size, (16, 18)), options.layout(Layout::Bhsd), 10);
            let problem = backward.case.problem.clone();
            let visible = |i, j| problem.sequences().next().unwrap().band.visible(i, j);
            // Whole keys that no query sees: no gradient of theirs, and no bit of others.
            let clean = backward.run();
            for j in (0..size.1).filter(|&j| !(0..size.0).any(|i| visible(i, j))) {
                let poison = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][j % 3];
                backward.case.k[j * 16..][..16].fill(poison);
                backward.case.v[j * 18..][..18].fill(poison);
                assert!(row(&clean.d_k, j, 16).iter().chain(row(&clean.d_v, j, 18)).all(|&x| x == 0.0));
            }
            assert_eq!(backward.run(), clean, "{problem}");
            let expected = cpu::reference::backward(&problem, &backward.case.inputs(), &backward.upstream()).unwrap();
            assert!(differences(&clean, &expected, norm(&backward.d_o)).is_empty(), "{problem}");

            // One key that some queries see and others do not.
            let Some(j) = (0..size.1).find(|&j| {
                let seen = (0..size.0).filter(|&i| visible(i, j)).count();
                seen > 0 && seen < size.0
            }) else {
                continue;
            };
            let sees = |i: usize, j: usize| visible(i, j);
            let clean_saved = backward.case.forward();
            for in_k in [true, false] {
                let old = (backward.case.k.clone(), backward.case.v.clone());
                let (operand, width) = if in_k { (&mut backward.case.k, 16) } else { (&mut backward.case.v, 18) };
                operand[j * width..][..width].fill(f32::NAN);
                let dirty = backward.run();
                for r in 0..2 * size.0 {
                    let d_q = row(&dirty.d_q, r, 16);
                    if sees(r % size.0, j) {
                        assert!(d_q.iter().all(|x| x.is_nan()), "{problem} row {r}");
                    } else {
                        assert_eq!(d_q, row(&clean.d_q, r, 16), "{problem} row {r}");
                    }
                }
                // Keys that share no query with it.
                let apart = |other: usize| !(0..size.0).any(|i| sees(i, j) && sees(i, other));
                for other in (0..size.1.min(300)).filter(|&other| apart(other)) {
                    assert_eq!(row(&dirty.d_k, other, 16), row(&clean.d_k, other, 16), "{problem} key {other}");
                    assert_eq!(row(&dirty.d_v, other, 18), row(&clean.d_v, other, 18), "{problem} key {other}");
                }
                (backward.case.k, backward.case.v) = old;
            }

            // One query: nothing of it may reach a key that it does not see.
            for in_q in [true, false] {
                let i = size.0 / 2;
                let old = (backward.case.q.clone(), backward.d_o.clone());
                let (operand, width) = if in_q { (&mut backward.case.q, 16) } else { (&mut backward.d_o, 18) };
                operand[i * width..][..width].fill(f32::NAN);
                let dirty = if in_q { backward.run() } else { backward.run_with(&clean_saved) };
                for r in (0..2 * size.0).filter(|&r| r != i) {
                    assert_eq!(row(&dirty.d_q, r, 16), row(&clean.d_q, r, 16), "{problem} row {r}");
                }
                for key in 0..size.1 {
                    let (d_k, d_v) = (row(&dirty.d_k, key, 16), row(&dirty.d_v, key, 18));
                    if sees(i, key) {
                        assert!(d_k.iter().chain(d_v).all(|x| x.is_nan()), "{problem} key {key}");
                    } else {
                        assert_eq!(d_k, row(&clean.d_k, key, 16), "{problem} key {key}");
                        assert_eq!(d_v, row(&clean.d_v, key, 18), "{problem} key {key}");
                    }
                }
                (backward.case.q, backward.d_o) = old;
            }
        }
    }
}

#[test]
fn a_sink_logit_of_minus_infinity_is_none() {
    for size in SIZES {
        let options = Options::new().causal(true);
        let shape = shape((6, 2), size, (16, 16));
        let none = backward(shape, options, 11).run();
        assert_eq!(none.d_sink_logits, None);
        let mut with_sinks = backward(shape, options.sink_logits(SinkLogits::PerHead), 11);
        with_sinks.case.sink_logits = Some(vec![f32::NEG_INFINITY; 6]);
        assert_eq!(with_sinks.run(), none.d_sink_logits(vec![0.0; 6]));

        let off_by_one = backward(shape, options.sink_logits(SinkLogits::OffByOne), 11).run();
        assert_eq!(off_by_one.d_sink_logits, None);
        with_sinks.case.sink_logits = Some(vec![0.0; 6]);
        assert_eq!(with_sinks.run().d_sink_logits(None), off_by_one);
    }
}

#[test]
fn a_window_of_everything_is_causal() {
    for size in SIZES {
        let shape = shape((2, 1), size, (16, 16));
        let causal = backward(shape, Options::new().causal(true), 12).run();
        for keys in [size.1.max(size.0), usize::MAX] {
            assert_eq!(backward(shape, Options::new().window(Window::keys(keys)), 12).run(), causal);
        }
    }
}

#[test]
fn groups_add_up_repeated_heads() {
    for (m, n) in SIZES {
        let options = Options::new().causal(true).layout(Layout::Bhsd).sink_logits(SinkLogits::PerHead);
        let grouped = backward(shape((6, 2), (m, n), (16, 16)), options, 13);
        let mut repeated = backward(shape((6, 6), (m, n), (16, 16)), options, 13);
        let repeat = |x: &[f32]| x.chunks(n * 16).flat_map(|head| [head; 3].concat()).collect();
        (repeated.case.k, repeated.case.v) = (repeat(&grouped.case.k), repeat(&grouped.case.v));
        repeated.case.q.clone_from(&grouped.case.q);
        repeated.case.sink_logits.clone_from(&grouped.case.sink_logits);

        let (grouped_run, repeated_run) = (grouped.run(), repeated.run());
        let sum = |x: &[f32]| -> Vec<f64> {
            let heads: Vec<&[f32]> = x.chunks(n * 16).collect();
            let sum = |heads: &[&[f32]]| -> Vec<f64> {
                (0..n * 16).map(|x| heads.iter().map(|head| f64::from(head[x])).sum()).collect()
            };
            heads.chunks(3).flat_map(sum).collect()
        };
        let widen = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect();
        let expected = Gradients::new(widen(&repeated_run.d_q), sum(&repeated_run.d_k), sum(&repeated_run.d_v))
            .d_sink_logits(repeated_run.d_sink_logits.as_deref().map(widen));
        let failures = differences(&grouped_run, &expected, norm(&grouped.d_o));
        assert!(failures.is_empty(), "{}: {}", grouped.case.problem, failures.join(", "));
    }
}

#[test]
fn gradients_are_linear_in_what_flows_in() {
    let options = Options::new().window(Window::keys(40)).sink_tokens(3).sink_logits(SinkLogits::PerHead);
    let new = || backward(shape((4, 2), (113, 203), (16, 16)), options, 14);
    let first = new();
    let mut second = new();
    second.d_o.rotate_left(77);
    second.d_lse.as_mut().unwrap().rotate_left(7);
    let mut sum = new();
    for (sum, second) in sum.d_o.iter_mut().zip(&second.d_o) {
        *sum += second;
    }
    for (sum, second) in sum.d_lse.iter_mut().flatten().zip(second.d_lse.iter().flatten()) {
        *sum += second;
    }
    let (first_run, second_run) = (first.run(), second.run());
    let add = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(&x, &y)| f64::from(x) + f64::from(y)).collect();
    let expected = Gradients::new(
        add(&first_run.d_q, &second_run.d_q),
        add(&first_run.d_k, &second_run.d_k),
        add(&first_run.d_v, &second_run.d_v),
    )
    .d_sink_logits(first_run.d_sink_logits.as_ref().zip(second_run.d_sink_logits.as_ref()).map(|(x, y)| add(x, y)));
    assert_eq!(differences(&sum.run(), &expected, norm(&sum.d_o)), Vec::<String>::new());
    // A power of two changes exponents alone.
    let mut scaled = new();
    scaled.d_o.iter_mut().chain(scaled.d_lse.iter_mut().flatten()).for_each(|x| *x *= 4.0);
    let times = |x: &[f32]| x.iter().map(|x| 4.0 * x).collect();
    let expected = Gradients::new(times(&first_run.d_q), times(&first_run.d_k), times(&first_run.d_v))
        .d_sink_logits(first_run.d_sink_logits.as_deref().map(times));
    assert_eq!(scaled.run(), expected);
}

#[test]
fn values_of_one_leave_what_the_sink_does_not_take() {
    let options = Options::new().causal(true).layout(Layout::Bhsd).sink_logits(SinkLogits::PerHead);
    let mut backward = backward(shape((5, 1), (63, 65), (16, 1)), options, 15);
    backward.case.v.fill(1.0);
    backward.d_o.fill(1.0);
    backward.d_lse = None;
    let saved = backward.case.forward();
    let d_sink = backward.check().d_sink_logits.unwrap();
    for (h, o) in saved.o.chunks(63).enumerate() {
        // o = 1 - p, and p' = p (1 - p).
        let expected: f64 = -o.iter().map(|&o| f64::from(o) * (1.0 - f64::from(o))).sum::<f64>();
        let error = (f64::from(d_sink[h]) - expected).abs();
        assert!(error <= 1e-5 * expected.abs(), "{} is not {expected}", d_sink[h]);
    }
}

#[test]
fn shards_of_the_keys_add_up() {
    let new = |n, offset| {
        let options = Options::new().causal(true).query_offset(offset).layout(Layout::Bhsd);
        backward(shape((2, 1), (70, n), (16, 16)), options, 16)
    };
    let whole = new(203, 133);
    let expected = cpu::reference::backward(&whole.case.problem, &whole.case.inputs(), &whole.upstream()).unwrap();
    let saved = whole.case.forward();
    let mut sum = Gradients::new(vec![0.0; whole.case.q.len()], vec![], vec![]);
    for keys in [0..90, 90..91, 91..203] {
        let mut shard = new(keys.len(), 133 - keys.start as i64);
        shard.case.q.clone_from(&whole.case.q);
        shard.case.k = whole.case.k[keys.start * 16..keys.end * 16].to_vec();
        shard.case.v = whole.case.v[keys.start * 16..keys.end * 16].to_vec();
        (shard.d_o, shard.d_lse) = (whole.d_o.clone(), whole.d_lse.clone());
        let gradients = shard.run_with(&saved);
        sum.d_q.iter_mut().zip(gradients.d_q).for_each(|(sum, x)| *sum += x);
        sum.d_k.extend(gradients.d_k);
        sum.d_v.extend(gradients.d_v);
    }
    assert_eq!(differences(&sum, &expected, norm(&whole.d_o)), Vec::<String>::new());
}

#[test]
fn sink_gradients_of_a_million_rows() {
    let options = Options::new().sink_logits(SinkLogits::PerHead);
    let shape = Shape { batch: 4, ..shape((2, 1), (125_000, 3), (1, 2)) };
    // A mean far from zero, so that a plain f32 sum would lose most of each term in the end.
    let mut backward = backward(shape, options, 17);
    backward.case.v.iter_mut().for_each(|v| *v += 2.0);
    backward.d_o.iter_mut().for_each(|d_o| *d_o += 1.0);
    backward.check();
}

#[test]
fn threads_do_not_change_a_bit() {
    for size in [(300, 300), (1, 5000), (3000, 40)] {
        let options = Options::new().causal(true).sink_logits(SinkLogits::PerHead);
        let backward = backward(shape((6, 2), size, (33, 64)), options, 19);
        let results: Vec<_> = [1, 2, 3, 8]
            .into_iter()
            .map(|threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| [backward.run(), backward.run()])
            })
            .collect();
        assert!(results.iter().flatten().all(|result| *result == results[0][0]));
    }
}

#[test]
fn wrong_operands_are_errors() {
    let backward = backward(shape((2, 1), (3, 3), (4, 4)), Options::new(), 20);
    let (inputs, saved, upstream) = (backward.case.inputs(), backward.case.forward(), backward.upstream());
    let run = |saved: &Output, upstream: Upstream<'_>| cpu::backward(&backward.case.problem, &inputs, saved, &upstream);
    assert!(run(&saved, upstream).is_ok());
    let short = |x: &[f32]| x[1..].to_vec();
    assert!(run(&saved.clone().o(short(&saved.o)), upstream).is_err());
    assert!(run(&saved.clone().lse(short(&saved.lse)), upstream).is_err());
    for bad in [upstream.d_o(&[]), upstream.d_lse(&backward.d_o[..])] {
        assert!(run(&saved, bad).is_err());
        assert!(cpu::reference::backward(&backward.case.problem, &inputs, &bad).is_err());
    }
}
