//! What changes scores, hides single pairs, and lengths: against the definition, and against the laws.

use sink_attention::half::{bf16, f16};
use sink_attention::{
    Axes, DType, Gradients, Layout, Lengths, MaskPacking, Options, Output, Problem, Shape, SinkLogits, Window, cpu,
};

use super::backward::{Backward, differences, norm};
use super::{Case, HEADS, SIZES, masks, shape, with_bits};

/// Every way to broadcast a bias or a mask.
fn all_axes() -> impl Iterator<Item = Axes> {
    (0..8).map(|n| Axes { batch: n & 1 != 0, heads: n & 2 != 0, seq_q: n & 4 != 0 })
}

/// What changes scores and hides pairs, alone and together.
fn extras(n: usize) -> impl Fn(Options) -> Options {
    let axes = |n: usize| all_axes().nth(n % 8).unwrap();
    let packing = [MaskPacking::Bytes, MaskPacking::Bits][n / 2 % 2];
    move |options| {
        let options = options.mask_packing(packing);
        match n % 7 {
            0 => options.softcap(1.5),
            1 => options.alibi(true),
            2 => options.bias(axes(n / 7)),
            3 => options.mask(axes(n / 7)),
            4 => options.bias(axes(n / 7 + 3)).mask(axes(n / 7)).softcap(3.0),
            5 => options.mask(axes(n / 7)).alibi(true),
            _ => options.bias(axes(n / 7)).mask(axes(n / 7 + 5)).alibi(true).softcap(0.7),
        }
    }
}

fn check<T: sink_attention::Element>(problem: Problem, seed: u64) -> (Output<T>, Gradients<T>) {
    let backward = Backward::new(Case::of(problem, seed), seed).cast::<T>();
    (backward.case.check(), backward.check())
}

/// Lengths that take turns, a sequence that is empty on either side among them.
fn packed(options: Options, n: usize, (heads, kv_heads): (usize, usize), (d, e): (usize, usize)) -> Problem {
    let lengths = [(3, 0), (1, 130), (70, 70), (0, 5), (0, 0), (9, 2), (129, 65), (33, 64), (0, 1)];
    let cumulative = |of: fn((u32, u32)) -> u32| -> Vec<u32> {
        let lengths = (0..lengths.len()).map(|i| of(lengths[(i + n) % lengths.len()]));
        std::iter::once(0)
            .chain(lengths.scan(0, |sum, length| {
                *sum += length;
                Some(*sum)
            }))
            .collect()
    };
    let (q, k) = (cumulative(|(q, _)| q), cumulative(|(_, k)| k));
    let [seq_q, seq_k] = [&q, &k].map(|starts| *starts.last().unwrap() as usize);
    let shape = Shape { batch: 1, heads, kv_heads, seq_q, seq_k, head_dim: d, value_dim: e };
    Problem::with_lengths(shape, options.layout(Layout::Thd), Lengths::Cumulative { q: &q, k: &k }).unwrap()
}

#[test]
fn sizes_and_masks_and_extras() {
    let sinks = [SinkLogits::None, SinkLogits::OffByOne, SinkLogits::PerHead];
    let mut seed = 0;
    for size in SIZES {
        for mask in masks(size) {
            for (layout, width) in [(Layout::Bshd, (33, 7)), (Layout::Bhsd, (16, 18))] {
                let shape = Shape { batch: 2, ..shape(HEADS[seed % 4], size, width) };
                let options = extras(seed)(mask.layout(layout).sink_logits(sinks[seed % 3]));
                seed += 1;
                check::<f32>(Problem::new(shape, options).unwrap(), seed as u64);
            }
        }
    }
}

#[test]
fn broadcasting() {
    for (n, axes) in all_axes().enumerate() {
        for other in all_axes() {
            let shape = Shape { batch: 3, ..shape(HEADS[n % 4], (70, 131), (8, 5)) };
            let options = Options::new().causal(n % 2 == 0).bias(axes).mask(other);
            let options = options.mask_packing([MaskPacking::Bytes, MaskPacking::Bits][n / 2 % 2]);
            check::<f32>(Problem::new(shape, options).unwrap(), n as u64);
        }
    }
}

#[test]
fn widths() {
    for (n, width) in super::WIDTHS.into_iter().enumerate() {
        let layout = [Layout::Bshd, Layout::Bhsd][n % 2];
        let options = extras(n)(Options::new().causal(true).layout(layout).sink_logits(SinkLogits::PerHead));
        check::<f32>(Problem::new(shape(HEADS[n % 4], (113, 203), width), options).unwrap(), 1);
    }
}

#[test]
fn half_precision() {
    for n in 0..35 {
        for bias_dtype in [DType::F32, DType::F16, DType::Bf16] {
            let options = extras(n)(Options::new().causal(n % 3 == 0).sink_logits(SinkLogits::PerHead));
            let shape = Shape { batch: 2, ..shape(HEADS[n % 4], SIZES[n % 8], (16, 18)) };
            for dtype in
                [DType::F16, DType::Bf16].into_iter().filter(|&dtype| [DType::F32, dtype].contains(&bias_dtype))
            {
                let problem = Problem::new(shape, options.dtype(dtype).bias_dtype(bias_dtype)).unwrap();
                match dtype {
                    DType::F16 => drop(check::<f16>(problem, n as u64)),
                    _ => drop(check::<bf16>(problem, n as u64)),
                }
            }
        }
    }
}

#[test]
fn packed_sequences() {
    for n in 0..15 {
        let sinks = [SinkLogits::None, SinkLogits::OffByOne, SinkLogits::PerHead][n % 3];
        for (m, mask) in masks((60, 60)).into_iter().enumerate() {
            let options = if (n + m) % 3 == 0 { mask } else { extras(n + m)(mask) };
            check::<f32>(packed(options.sink_logits(sinks), n, HEADS[n % 4], (9, 6)), n as u64);
        }
        check::<bf16>(packed(extras(n)(Options::new().dtype(DType::Bf16)), n, HEADS[n % 4], (9, 6)), n as u64);
    }
}

#[test]
fn padded_batches() {
    for n in 0..15 {
        for (m, mask) in masks((60, 60)).into_iter().enumerate() {
            let layout = [Layout::Bshd, Layout::Bhsd][n % 2];
            let options = if (n + m) % 3 == 0 { mask } else { extras(n + m)(mask) };
            let options = options.layout(layout).sink_logits([SinkLogits::None, SinkLogits::PerHead][m % 2]);
            let shape = Shape { batch: 4, ..shape(HEADS[n % 4], (80, 90), (9, 6)) };
            let (q, k) = ([80, 0, 65, 3], [90, 70, 0, 64]);
            let lengths = Lengths::Used { q: (n % 3 > 0).then_some(&q), k: (n % 3 < 2).then_some(&k) };
            let problem = Problem::with_lengths(shape, options, lengths).unwrap();
            let mut backward = Backward::new(Case::of(problem.clone(), n as u64), n as u64);
            let clean = (backward.case.check(), backward.check());

            // What lies beyond the lengths is never read.
            let s = problem.shape();
            let poison = |x: &mut [f32], heads, seq, width, used: &dyn Fn(usize) -> usize| {
                let strides = layout.strides(heads, seq, width).map(|stride| stride as usize);
                for (b, h) in (0..4).flat_map(|b| (0..heads).map(move |h| (b, h))) {
                    for i in used(b)..seq {
                        x[b * strides[0] + h * strides[1] + i * strides[2]..][..width].fill(f32::NAN);
                    }
                }
            };
            let used_q = |b| problem.sequences().nth(b).unwrap().band.seq_q();
            let used_k = |b| problem.sequences().nth(b).unwrap().band.seq_k();
            poison(&mut backward.case.q, s.heads, 80, 9, &used_q);
            poison(&mut backward.case.k, s.kv_heads, 90, 9, &used_k);
            poison(&mut backward.case.v, s.kv_heads, 90, 6, &used_k);
            poison(&mut backward.d_o, s.heads, 80, 6, &used_q);
            assert_eq!((backward.case.forward(), backward.run()), clean, "{problem}");
        }
    }
}

#[test]
fn packed_sequences_of_one_length_are_a_batch() {
    for n in 0..14 {
        let (heads, kv_heads) = HEADS[n % 4];
        let shape = Shape { batch: 3, heads, kv_heads, seq_q: 70, seq_k: 90, head_dim: 9, value_dim: 6 };
        let options = extras(n)(Options::new().causal(true).sink_logits(SinkLogits::PerHead));
        let batch = Backward::new(Case::new(shape, options, 3), 4);
        let tokens = Shape { batch: 1, seq_q: 210, seq_k: 270, ..shape };
        let lengths = Lengths::Cumulative { q: &[0, 70, 140, 210], k: &[0, 90, 180, 270] };
        let problem = Problem::with_lengths(tokens, options.layout(Layout::Thd), lengths).unwrap();
        // lse and its gradient are [batch, heads, seq_q] there, and [heads, tokens] here.
        let turn = |x: &[f32]| -> Vec<f32> {
            (0..x.len()).map(|n| x[(n % 210 / 70 * heads + n / 210) * 70 + n % 70]).collect()
        };
        let mut thd = Backward { case: Case { problem, ..batch.case.clone() }, d_o: batch.d_o.clone(), d_lse: None };
        thd.d_lse = batch.d_lse.as_deref().map(turn);
        let (expected, actual) = (batch.case.forward(), thd.case.forward());
        assert_eq!((actual.o, actual.lse), (expected.o, turn(&expected.lse)), "{}", thd.case.problem);
        // The rows of a head are summed in another order.
        let (expected, actual) = (batch.run(), thd.run());
        assert_eq!((actual.d_q, actual.d_k, actual.d_v), (expected.d_q, expected.d_k, expected.d_v));
        assert_eq!(actual.d_bias, expected.d_bias);
    }
}

/// With its bias, as `[B, H, M, N]`.
fn with_bias(case: &Case, options: Options, bias: Vec<f32>) -> Case {
    let problem = Problem::new(*case.problem.shape(), options.bias(Axes::ALL)).unwrap();
    Case { problem, bias: Some((bias.clone(), bias)), ..case.clone() }
}

#[test]
fn what_changes_nothing_changes_no_bit() {
    for (n, size) in SIZES.into_iter().enumerate() {
        let options = masks(size)[n % 8].sink_logits(SinkLogits::PerHead);
        let shape = Shape { batch: 2, ..shape(HEADS[n % 4], size, (16, 18)) };
        // A mask of ones, with the plain kernel and with whole scores.
        for options in [options, options.softcap(2.0), options.alibi(true)] {
            let plain = Backward::new(Case::new(shape, options, 5), 5);
            let expected = (plain.case.forward(), plain.run());
            for (axes, packing) in all_axes().zip([MaskPacking::Bytes, MaskPacking::Bits].into_iter().cycle()) {
                let problem = Problem::new(shape, options.mask(axes).mask_packing(packing)).unwrap();
                let bytes = problem.mask_shape().map(|[b, h, m, _]| vec![255; b * h * m * size.1]).unwrap();
                let mut masked = Backward::new(Case { problem, ..plain.case.clone() }, 5);
                masked.case.mask = Some(with_bits(bytes, size.1));
                assert_eq!((masked.case.forward(), masked.run()), expected, "{}", masked.case.problem);
            }
        }
        // A bias of zero and slopes of zero, where scores are whole already.
        let capped = Backward::new(Case::new(shape, options.softcap(2.0), 6), 6);
        let (output, gradients) = (capped.case.forward(), capped.run());
        let pairs = 2 * shape.heads * size.0 * size.1;
        let mut zero = with_bias(&capped.case, options.softcap(2.0).alibi(true), vec![0.0; pairs]);
        zero.alibi_slopes = Some(vec![0.0; shape.heads]);
        let zero = Backward::new(zero, 6);
        assert_eq!(zero.case.forward(), output);
        assert_eq!(zero.check().d_alibi_slopes(None).d_bias(None), gradients);
    }
}

#[test]
fn a_bias_of_minus_infinity_is_a_mask() {
    for (n, size) in SIZES.into_iter().enumerate() {
        let options = masks(size)[n % 8].softcap(2.0).sink_logits(SinkLogits::PerHead);
        let shape = Shape { batch: 2, ..shape(HEADS[n % 4], size, (16, 18)) };
        for axes in all_axes() {
            let masked = Backward::new(Case::new(shape, options.mask(axes), 7), 7);
            let bytes = &masked.case.mask.as_ref().unwrap().0;
            let bias: Vec<f32> = bytes.iter().map(|&x| if x == 0 { f32::NEG_INFINITY } else { 0.0 }).collect();
            let problem = Problem::new(shape, options.bias(axes)).unwrap();
            let biased = Case { problem, bias: Some((bias.clone(), bias.clone())), ..masked.case.clone() };
            let biased = Backward::new(Case { mask: None, ..biased }, 7);
            assert_eq!(biased.case.forward(), masked.case.forward());
            let gradients = biased.run();
            let hidden = gradients.d_bias.iter().flatten().zip(&bias).filter(|(_, bias)| bias.is_infinite());
            assert!(hidden.into_iter().all(|(&d_bias, _)| d_bias == 0.0));
            assert_eq!(gradients.d_bias(None), masked.run());
        }
    }
}

#[test]
fn alibi_is_the_bias_it_stands_for() {
    for size in SIZES {
        let shape = Shape { batch: 2, ..shape((6, 2), size, (16, 18)) };
        let options = Options::new().window(Window::new(50, 7)).query_offset(5);
        let alibi = Backward::new(Case::new(shape, options.alibi(true), 8), 8);
        let slopes = alibi.case.alibi_slopes.clone().unwrap();
        let distances = (0..12 * size.0 * size.1).map(|n| {
            let (h, i, j) = (n / size.1 / size.0 % 6, n / size.1 % size.0, n % size.1);
            (h, (i + 5).abs_diff(j) as f32)
        });
        let bias = distances.clone().map(|(h, distance)| -slopes[h] * distance).collect();
        let biased = with_bias(&Case { alibi_slopes: None, ..alibi.case.clone() }, options, bias);
        let biased = Backward::new(biased, 8);
        assert_eq!(alibi.case.forward(), biased.case.forward());
        let (alibi_run, biased_run) = (alibi.run(), biased.run());
        // Its gradient is that of the bias, by way of the slopes.
        let mut d_slopes = vec![0.0; 6];
        for ((h, distance), &d_bias) in distances.zip(biased_run.d_bias.iter().flatten()) {
            d_slopes[h] -= f64::from(distance) * f64::from(d_bias);
        }
        let error: Vec<f64> =
            alibi_run.d_alibi_slopes.iter().flatten().zip(&d_slopes).map(|(&x, y)| f64::from(x) - y).collect();
        assert!(norm(&error) <= 1e-6 * norm(&d_slopes).max(1.0), "{error:?} of {d_slopes:?}");
        assert_eq!(alibi_run.d_alibi_slopes(None), biased_run.d_bias(None), "{}", alibi.case.problem);
    }
}

#[test]
fn hidden_pairs_never_reach_a_result() {
    for (n, size) in SIZES.into_iter().chain([(8, 1500)]).enumerate() {
        for (by_bias, softcap) in [(false, None), (true, None), (false, Some(2.0)), (true, Some(2.0))] {
            let options = masks(size)[n % 8].layout(Layout::Bhsd);
            let options = softcap.map_or(options, |softcap| options.softcap(softcap));
            let shape = shape((2, 1), size, (16, 18));
            let axes = Axes::ALL;
            let options = if by_bias { options.bias(axes) } else { options.mask(axes) }.alibi(n % 2 == 0);
            let mut backward = Backward::new(Case::new(shape, options, 9), 9);
            // A quarter of the keys is hidden from everyone, a key from all but two rows.
            let nobody = |j: usize| j % 4 == 1;
            let special = size.1 / 2 / 4 * 4;
            let sees = |row: usize, j: usize| !nobody(j) && (j != special || row < 2);
            let seen: Vec<bool> = (0..2 * size.0 * size.1).map(|n| sees(n / size.1, n % size.1)).collect();
            if by_bias {
                let bias: Vec<f32> = seen.iter().map(|&seen| if seen { 0.25 } else { f32::NEG_INFINITY }).collect();
                backward.case.bias = Some((bias.clone(), bias));
            } else {
                backward.case.mask = Some(with_bits(seen.iter().map(|&seen| seen.into()).collect(), size.1));
            }
            let problem = backward.case.problem.clone();
            let band = problem.sequences().next().unwrap().band;
            let clean = (backward.case.check(), backward.check());
            for j in (0..size.1).filter(|&j| nobody(j)) {
                let poison = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][j % 3];
                backward.case.k[j * 16..][..16].fill(poison);
                backward.case.v[j * 18..][..18].fill(poison);
            }
            assert_eq!((backward.case.forward(), backward.run()), clean, "{problem}");

            // The key of two rows.
            for in_k in [true, false] {
                let old = backward.case.clone();
                if in_k {
                    backward.case.k[special * 16..][..16].fill(f32::NAN);
                } else {
                    backward.case.v[special * 18..][..18].fill(f32::NAN);
                }
                let (output, gradients) = (backward.case.forward(), backward.run());
                for row in 0..2 * size.0 {
                    let (o, d_q) = (&output.o[row * 18..][..18], &gradients.d_q[row * 16..][..16]);
                    let d_bias = gradients.d_bias.iter().flat_map(|x| &x[row * size.1..][..size.1]);
                    if sees(row, special) && band.visible(row % size.0, special) {
                        assert!(o.iter().chain(d_q).all(|x| x.is_nan()), "{problem} row {row}");
                        assert!(d_bias.clone().count() == 0 || d_bias.clone().any(|x| x.is_nan()));
                    } else {
                        assert_eq!(o, &clean.0.o[row * 18..][..18], "{problem} row {row}");
                        assert_eq!(output.lse[row], clean.0.lse[row]);
                        assert_eq!(d_q, &clean.1.d_q[row * 16..][..16], "{problem} row {row}");
                        assert!(d_bias.clone().all(|x| x.is_finite()));
                    }
                }
                backward.case = old;
            }

            // A query: nothing of it reaches a key that it does not see.
            let row = size.0 - 1;
            for in_q in [true, false] {
                let old = (backward.case.q.clone(), backward.d_o.clone());
                let dirty = if in_q {
                    backward.case.q[row * 16..][..16].fill(f32::NAN);
                    backward.run()
                } else {
                    backward.d_o[row * 18..][..18].fill(f32::NAN);
                    backward.run_with(&clean.0)
                };
                for j in 0..size.1 {
                    let (d_k, d_v) = (&dirty.d_k[j * 16..][..16], &dirty.d_v[j * 18..][..18]);
                    if sees(row, j) && band.visible(row, j) {
                        assert!(d_k.iter().chain(d_v).all(|x| x.is_nan()), "{problem} key {j}");
                    } else {
                        assert_eq!(d_k, &clean.1.d_k[j * 16..][..16], "{problem} key {j}");
                        assert_eq!(d_v, &clean.1.d_v[j * 18..][..18], "{problem} key {j}");
                    }
                }
                (backward.case.q, backward.d_o) = old;
            }
        }
    }
}

#[test]
fn rows_that_a_mask_leaves_nothing() {
    for sinks in [SinkLogits::None, SinkLogits::PerHead] {
        let options = Options::new().mask(Axes::ALL).softcap(5.0).layout(Layout::Bhsd).sink_logits(sinks);
        let mut backward = Backward::new(Case::new(shape((2, 1), (70, 200), (16, 3)), options, 10), 10);
        let bytes = (0..2 * 70 * 200).map(|n| u8::from(n / 200 % 70 >= 3)).collect();
        backward.case.mask = Some(with_bits(bytes, 200));
        let (output, gradients) = (backward.case.check(), backward.check());
        for h in 0..2 {
            let lse = backward.case.sink_logits.as_ref().map_or(f32::NEG_INFINITY, |sinks| sinks[h]);
            assert_eq!(output.lse[h * 70..][..3], [lse; 3]);
            assert_eq!(output.o[h * 70 * 3..][..9], [0.0; 9]);
            assert_eq!(gradients.d_q[h * 70 * 16..][..48], [0.0; 48]);
        }
    }
}

/// Deep in softcap's ends its derivative is tiny, and known as precisely as elsewhere.
#[test]
fn softcaps() {
    for softcap in [1e-30, 0.05, 0.5, 2.0, 30.0, 1e6, 1e30, f32::MAX] {
        for scale in [0.25, -1.0, 0.0] {
            let options = Options::new().causal(true).softcap(softcap).scale(scale);
            check::<f32>(Problem::new(shape((2, 1), (63, 65), (16, 16)), options).unwrap(), 11);
        }
    }
}

#[test]
fn far_positions() {
    for offset in [-(1 << 30), -(1 << 25) - 1, 1 << 20, 1 << 30] {
        let options = Options::new().alibi(true).query_offset(offset);
        let mut backward = Backward::new(Case::new(shape((2, 1), (63, 65), (16, 16)), options, 12), 12);
        let far = offset.abs() as f32;
        backward.case.alibi_slopes = Some(vec![3.0 / far, -0.5 / far]);
        backward.case.check();
        let gradients = backward.run();
        assert!(gradients.d_alibi_slopes.unwrap().iter().all(|x| x.is_finite()));
    }
}

#[test]
fn a_long_sum_of_the_bias() {
    // One tile of keys, split over all rows.
    for axes in [Axes::KEYS, Axes::KEYS.heads(), Axes::KEYS.seq_q()] {
        let shape = Shape { batch: 3, ..shape((4, 2), (3000, 20), (8, 8)) };
        check::<f32>(Problem::new(shape, Options::new().bias(axes).softcap(1.5)).unwrap(), 13);
    }
}

#[test]
fn thousands_of_short_sequences() {
    let count = 5000;
    let lengths: Vec<u32> = (0..count).map(|n| n * 7919 % 13).collect();
    let mut starts = vec![0];
    starts.extend(lengths.iter().scan(0, |sum, length| {
        *sum += length;
        Some(*sum)
    }));
    let tokens = *starts.last().unwrap() as usize;
    let shape = Shape { batch: 1, seq_q: tokens, seq_k: tokens, ..shape((4, 2), (1, 1), (16, 16)) };
    for options in [Options::new(), Options::new().alibi(true).bias(Axes::KEYS).mask(Axes::KEYS.seq_q())] {
        let options = options.causal(true).layout(Layout::Thd).sink_logits(SinkLogits::PerHead);
        let lengths = Lengths::Cumulative { q: &starts, k: &starts };
        check::<f32>(Problem::with_lengths(shape, options, lengths).unwrap(), 14);
    }
}

#[test]
fn threads_do_not_change_a_bit() {
    let options = |n| extras(n)(Options::new().causal(true).sink_logits(SinkLogits::PerHead));
    let problems = (0..14).map(|n| Problem::new(shape((6, 2), (300, 200), (33, 64)), options(n)).unwrap());
    let problems = problems.chain((0..7).map(|n| packed(options(n), n, (6, 2), (9, 6))));
    for problem in problems.chain([Problem::new(shape((2, 1), (3000, 40), (16, 16)), options(2)).unwrap()]) {
        let backward = Backward::new(Case::of(problem, 15), 15);
        let results: Vec<_> = [1, 2, 3, 8]
            .into_iter()
            .map(|threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| (backward.case.forward(), backward.run()))
            })
            .collect();
        assert!(results.iter().all(|result| *result == results[0]), "{}", backward.case.problem);
    }
}

/// Products of numbers near the ends of bf16's range, whose sums f32 does not hold.
#[test]
fn gradients_of_a_bias_in_all_of_bf16s_range() {
    let options = Options::new().dtype(DType::Bf16).bias(Axes::KEYS).alibi(true).scale(1e-3);
    let problem = Problem::new(shape((4, 2), (113, 70), (16, 16)), options).unwrap();
    let mut backward = Backward::new(Case::of(problem, 16), 16);
    backward.d_lse = None;
    backward.d_o.iter_mut().for_each(|x| *x *= 1e18);
    backward.case.v.iter_mut().for_each(|x| *x *= 1e17);
    let backward = backward.cast::<bf16>();
    let gradients = backward.run();
    let expected =
        cpu::reference::backward(&backward.case.problem, &backward.case.inputs(), &backward.upstream()).unwrap();
    assert!(expected.d_bias.iter().flatten().any(|x| x.abs() > 1e35));
    assert_eq!(differences(&gradients, &expected, norm(&backward.d_o)), Vec::<String>::new());
}
