//! Numbers: the GPU's backward pass against the f64 definition, over sizes, widths, options, tiles and
//! operands that are out to break it. tests/cpu/backward.rs is its twin.

use crate::common::buffers::{GradientBuffers, gpu_with, read, submit};
use crate::common::{all_cases, compare, gpu, this_many, with_others};
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use sink_attention::plan::{
    Capabilities, Kernel, LoopHints, OptionalOperands, Pass, Plan, PortableTile, Preference, Tiling,
};
use sink_attention::testing::gradients::Backward;
use sink_attention::testing::operands::{BOUND, SIZES, options, problem, row};
use sink_attention::{Attention, Gradients, Layout, Options, Problem, SinkLogits, Window, wgpu};

const INF: f32 = f32::INFINITY;

/// The kernels that have tiles.
const TILED: [Kernel; 2] = [Kernel::D_Q, Kernel::D_KV];

#[test]
fn sizes_and_options() {
    let Some(gpu) = gpu() else { return };
    let mut seed = 0;
    for size in SIZES {
        for options in options() {
            let problem = problem([2, 4, 2], size, [64, 64], options);
            Backward::random(&problem, seed).check(gpu, &problem);
            // Of three seeds one has no d_lse: every option meets both in the end.
            seed += 1;
        }
    }
}

/// Every bound at every place within a tile and across its edges.
#[test]
fn bounds_at_every_place() {
    let Some(gpu) = gpu() else { return };
    for bound in 0..70 {
        let left = Options::new().window(Window { left: Some(bound), right: None });
        let right = Options::new().window(Window { left: None, right: Some(bound) });
        let sinks = Options::new().window(Window::keys(3)).sink_tokens(bound);
        for options in [left, right, sinks, left.query_offset(0), right.query_offset(-40)] {
            let problem = problem([1, 1, 1], [100, 120], [4, 4], options);
            Backward::random(&problem, bound as u64).check(gpu, &problem);
        }
    }
}

#[test]
fn many_tiles() {
    let Some(gpu) = gpu() else { return };
    for (seed, options) in (0..).zip([
        Options::new().causal(true).sink_logits(SinkLogits::PerHead),
        Options::new().window(Window::keys(100)).sink_tokens(70),
    ]) {
        let problem = problem([1, 2, 1], [499, 601], [64, 64], options);
        Backward::random(&problem, seed).check(gpu, &problem);
    }
}

#[test]
fn widths() {
    let Some(gpu) = gpu() else { return };
    let equal = with_others([1, 3, 16, 33, 80, 128, 256], [96, 192]).into_iter().map(|width| [width, width]);
    let unequal = [[192, 128], [1, 256], [256, 1], [3, 16], [64, 33], [320, 512]];
    let unequal = with_others(unequal, [[512, 512], [320, 511]]);
    let options = Options::new().causal(true).sink_logits(SinkLogits::PerHead);
    for (seed, width) in (0..).zip(equal.into_iter().chain(unequal)) {
        let layouts = [options, options.layout(Layout::Bhsd).window(Window::keys(40)).sink_tokens(7)];
        // Kernels for wide heads take a software driver many seconds: the sizes by turns.
        let turn = seed as usize % 2;
        let taken = |n| all_cases() || width.iter().all(|width| *width <= 96) || n == turn;
        let cases = [[63, 65], [1, 257]].into_iter().zip(layouts).enumerate();
        for (size, options) in cases.filter_map(|(n, case)| taken(n).then_some(case)) {
            let problem = problem([1, 4, 2], size, width, options);
            Backward::random(&problem, seed).check(gpu, &problem);
        }
    }
}

#[test]
fn heads_and_batches() {
    let Some(gpu) = gpu() else { return };
    for (seed, heads) in (0..).zip([[1, 8, 1], [1, 8, 8], [3, 6, 2], [2, 5, 5], [7, 1, 1], [1, 64, 8]]) {
        for layout in [Layout::Bshd, Layout::Bhsd] {
            let options = Options::new().sink_logits(SinkLogits::PerHead).layout(layout);
            let problem = problem(heads, [35, 37], [64, 64], options);
            Backward::random(&problem, seed).check(gpu, &problem);
        }
    }
}

#[test]
fn extreme_sink_logits() {
    let Some(gpu) = gpu() else { return };
    let sinks = [-100.0, -30.0, 0.0, 30.0, 100.0, 1e4, -1e4, 1e30, -1e30, f32::MAX, f32::MIN, INF, -INF];
    let heads = sinks.len();
    let options = Options::new().sink_logits(SinkLogits::PerHead).layout(Layout::Bhsd);
    // The last one hides all keys of the first 20 queries: lse is the sink logit itself.
    for options in [options, options.causal(true), options.causal(true).query_offset(-20)] {
        let problem = problem([1, heads, 1], [40, 40], [64, 64], options);
        let mut backward = Backward::random(&problem, 1);
        backward.operands.sink_logits = Some(sinks.to_vec());
        let gradients = backward.check(gpu, &problem);
        let d_sink_logits = gradients.d_sink_logits.unwrap();
        let d_lse: Vec<f64> = backward.d_lse.unwrap().iter().map(|&x| f64::from(x)).collect();
        for (h, sink) in sinks.into_iter().enumerate() {
            let d_q = &gradients.d_q[h * 40 * 64..][..40 * 64];
            // The rows in which the sink has all the weight have all of its gradient: what flows into lse.
            let alone = match sink {
                sink if sink >= 1e4 => 40,
                sink if sink <= -1e4 && options.query_offset.is_some() => 20,
                sink if sink <= -1e4 => 0,
                _ => continue,
            };
            // An lse of -inf passes nothing on.
            let expected: f64 = if sink == -INF { 0.0 } else { d_lse[h * 40..][..alone].iter().sum() };
            assert!(d_q[..alone * 64].iter().all(|&x| x == 0.0), "{problem}: sink {sink}");
            assert!((f64::from(d_sink_logits[h]) - expected).abs() < 1e-5, "{problem}: sink {sink}");
        }
    }
}

/// A head whose sink has nearly all of the weight, and one whose sink has nearly none: each gradient of a sink
/// logit is right by itself, not only beside the larger ones.
#[test]
fn every_sink_gradient_by_itself() {
    let Some(gpu) = gpu() else { return };
    let sinks = [-12.0, -6.0, 0.0, 6.0, 12.0, 16.0];
    let options = Options::new().causal(true).sink_logits(SinkLogits::PerHead);
    let problem = problem([2, sinks.len(), 1], [90, 100], [64, 64], options);
    let mut backward = Backward::random(&problem, 2);
    backward.operands.sink_logits = Some(sinks.to_vec());
    // All of one sign, so that no sum cancels by chance.
    backward.d_lse.as_mut().unwrap().iter_mut().for_each(|x| *x = x.abs() + 1.0);
    let actual = backward.check(gpu, &problem).d_sink_logits.unwrap();
    let expected = backward.expected(&problem).d_sink_logits.unwrap();
    for (head, expected) in expected.into_iter().enumerate() {
        compare(&actual[head..=head], &[expected], BOUND).unwrap_or_else(|error| panic!("{}: {error}", sinks[head]));
    }
}

/// Scores of some tens hold the usual bound. Each is rounded to 2^-24 of itself, and with it the logarithm of p:
/// of hundreds, the last bits are 2^-16, and where few keys share a row nothing averages that out.
#[test]
fn large_logits() {
    let Some(gpu) = gpu() else { return };
    let causal = Options::new().causal(true).sink_logits(SinkLogits::PerHead);
    for (scale, bound, options) in
        [(1.0, 1e-5, Options::new()), (8.0, 5e-5, causal), (30.0, 1e-4, causal), (-30.0, 1e-4, Options::new())]
    {
        let problem = problem([1, 2, 2], [70, 70], [64, 64], options.scale(scale));
        Backward::random(&problem, 3).check_within(bound, gpu, &problem);
    }
    // All rows alike, far below zero and far above: lse is rounded by as much in each of them.
    for sign in [-1.0, 1.0] {
        let problem = problem([1, 1, 1], [63, 65], [64, 64], Options::new());
        let mut backward = Backward::random(&problem, 4);
        backward.operands.q.fill(2.0);
        backward.operands.k.iter_mut().for_each(|k| *k = sign * (20.0 + *k / 8.0));
        backward.check_within(1e-4, gpu, &problem);
    }
}

#[test]
fn rows_that_see_nothing() {
    let Some(gpu) = gpu() else { return };
    for sinks in [SinkLogits::None, SinkLogits::OffByOne, SinkLogits::PerHead] {
        // Alone in their tiles, and beside rows that see something.
        for offset in [-1000, -100, -33, -5] {
            let options = Options::new().causal(true).query_offset(offset).sink_logits(sinks).layout(Layout::Bhsd);
            let problem = problem([2, 2, 1], [100, 100], [64, 64], options);
            let mut backward = Backward::random(&problem, 5);
            let clean = backward.check(gpu, &problem);
            let blind = 100.min(-offset as usize);
            for head in clean.d_q.chunks(100 * 64) {
                assert!(head[..blind * 64].iter().all(|&x| x == 0.0), "{problem}");
            }
            if blind == 100 {
                assert!(clean.d_k.iter().chain(&clean.d_v).all(|&x| x == 0.0), "{problem}");
            }
            // An lse of -inf cannot pass a gradient on, whatever it is.
            if sinks == SinkLogits::None {
                for head in 0..4 {
                    backward.d_lse.as_mut().unwrap()[head * 100..][..blind].fill(f32::NAN);
                    backward.d_o[head * 100 * 64..][..blind * 64].fill(INF);
                }
                assert!(backward.run(gpu, &problem) == clean, "{problem}: something came out of a blind row");
            }
        }
    }
}

/// Masks with keys that nobody sees, that some see, and queries that see nothing.
fn masks() -> [Options; 6] {
    let causal = Options::new().causal(true);
    let window = Options::new().window(Window::keys(9));
    [
        causal,
        causal.query_offset(-10),
        window,
        window.sink_tokens(4).sink_logits(SinkLogits::PerHead),
        window.sink_tokens(2).query_offset(40),
        Options::new().window(Window::new(3, 5)),
    ]
}

/// Rows of `width` of an operand of one batch in the layout bhsd.
fn at(x: &[f32], row: usize, width: usize) -> &[f32] {
    &x[row * width..][..width]
}

#[test]
fn hidden_keys_never_reach_a_gradient() {
    let Some(gpu) = gpu() else { return };
    let [m, n, width] = [70, 75, 16];
    for options in masks() {
        let problem = problem([1, 2, 1], [m, n], [width, width], options.layout(Layout::Bhsd));
        let sees = |i: usize, j: usize| problem.sequences().next().unwrap().band.visible(i, j);
        let mut backward = Backward::random(&problem, 7);
        let clean = backward.check(gpu, &problem);

        // Keys that no query sees: no gradient of theirs, and no bit of others.
        for j in (0..n).filter(|&j| !(0..m).any(|i| sees(i, j))) {
            let poison = [f32::NAN, INF, -INF][j % 3];
            backward.operands.key(&problem, 0, 0, j).fill(poison);
            backward.operands.value(&problem, 0, 0, j).fill(poison);
            assert!([&clean.d_k, &clean.d_v].iter().all(|x| at(x, j, width).iter().all(|&x| x == 0.0)));
        }
        assert!(backward.run(gpu, &problem) == clean, "{problem}: a hidden key came through");

        // Keys that some queries see: the others, and the keys that share no query with them, stay as they are.
        for j in [0, 3, 20, 33, 64].into_iter().filter(|&j| (0..m).any(|i| sees(i, j))) {
            for in_keys in [true, false] {
                let mut dirty = backward.clone();
                if in_keys {
                    dirty.operands.key(&problem, 0, 0, j).fill(f32::NAN);
                } else {
                    dirty.operands.value(&problem, 0, 0, j).fill(f32::NAN);
                }
                let dirty = dirty.run(gpu, &problem);
                for row in 0..2 * m {
                    let [actual, expected] = [&dirty, &clean].map(|gradients| at(&gradients.d_q, row, width));
                    if sees(row % m, j) {
                        assert!(actual.iter().all(|x| x.is_nan()), "{problem}: key {j} is lost in row {row}");
                    } else {
                        assert_eq!(actual, expected, "{problem}: key {j} came through to row {row}");
                    }
                }
                for other in (0..n).filter(|&other| !(0..m).any(|i| sees(i, j) && sees(i, other))) {
                    for (actual, expected) in [(&dirty.d_k, &clean.d_k), (&dirty.d_v, &clean.d_v)] {
                        let [actual, expected] = [actual, expected].map(|x| at(x, other, width));
                        assert_eq!(actual, expected, "{problem}: key {j} came through to key {other}");
                    }
                }
            }
        }
    }
}

#[test]
fn a_query_with_nan_reaches_the_keys_that_it_sees() {
    let Some(gpu) = gpu() else { return };
    let [m, n, width] = [70, 75, 16];
    for options in masks() {
        let problem = problem([1, 2, 1], [m, n], [width, width], options.layout(Layout::Bhsd));
        let backward = Backward::random(&problem, 8);
        let saved = gpu.forward(&problem, &backward.operands.inputs()).unwrap();
        let clean = backward.run_with(gpu, &problem, &saved);
        for i in [0, 5, 31, 32, 69] {
            for in_q in [true, false] {
                let mut dirty = backward.clone();
                let operand = if in_q { &mut dirty.operands.q } else { &mut dirty.d_o };
                // One feature of one row of the second head.
                operand[(m + i) * width + 3] = f32::NAN;
                let dirty = if in_q { dirty.run(gpu, &problem) } else { dirty.run_with(gpu, &problem, &saved) };
                for row in (0..2 * m).filter(|&row| row != m + i) {
                    let [actual, expected] = [&dirty, &clean].map(|gradients| at(&gradients.d_q, row, width));
                    assert_eq!(actual, expected, "{problem}: query {i} came through to row {row}");
                }
                for j in 0..n {
                    let [actual, expected] = [&dirty, &clean].map(|g| [at(&g.d_k, j, width), at(&g.d_v, j, width)]);
                    if !problem.sequences().next().unwrap().band.visible(i, j) {
                        assert_eq!(actual, expected, "{problem}: query {i} came through to key {j}");
                    } else if in_q {
                        let all = actual.iter().all(|x| x.iter().all(|x| x.is_nan()));
                        assert!(all, "{problem}: query {i} is lost at key {j}");
                    } else {
                        // p is what it was: only the feature itself is NaN in d_v.
                        let [d_k, d_v] = actual;
                        assert!(d_k.iter().all(|x| x.is_nan()), "{problem}: query {i} is lost at key {j}");
                        for (e, (actual, expected)) in d_v.iter().zip(expected[1]).enumerate() {
                            assert!(
                                if e == 3 { actual.is_nan() } else { actual == expected },
                                "{problem}: {i} {j} {e}"
                            );
                        }
                    }
                }
            }
        }
    }
}

/// Runs the backward kernels with tiles of our choice against the definition, from the definition's o and lse.
fn check_tiles(gpu: &Attention, problem: &Problem, chosen: &[(Kernel, Tiling)], seed: u64) {
    let device = gpu.device().unwrap();
    let mut backward = Backward::random(problem, seed);
    // A hidden NaN sends masked tiles through the careful path of the accumulation, on either side.
    let s = *problem.shape();
    let sees = |i, j| problem.sequences().next().unwrap().band.visible(i, j);
    for j in (0..s.seq_k).filter(|&j| !(0..s.seq_q).any(|i| sees(i, j))) {
        backward.operands.key(problem, 0, 0, j).fill(f32::NAN);
        backward.operands.value(problem, 0, 0, j).fill(f32::NAN);
    }
    for i in (0..s.seq_q).filter(|&i| !(0..s.seq_k).any(|j| sees(i, j))) {
        backward.operands.q[row(problem, [s.heads, s.seq_q, s.head_dim], [0, 0, i])].fill(f32::NAN);
    }
    let buffers = GradientBuffers::new(device, problem, &backward);
    buffers.save(device, &backward.saved(problem));
    let prepared = gpu.prepare_backward_with(problem, &buffers.views(), chosen).unwrap();
    for (kernel, tiles) in chosen {
        let pass = prepared.plan().passes.iter().find(|pass| pass.variant.kernel == *kernel).unwrap();
        assert_eq!(pass.variant.tiling, Some(*tiles));
    }
    let actual = buffers.run(device, &prepared);
    backward.agree(&actual, &backward.expected(problem)).unwrap_or_else(|error| {
        panic!("{problem}, {chosen:?}: {error}");
    });
}

/// The first queries see nothing, and the last keys are hidden from all.
fn some_hidden() -> Options {
    Options::new().window(Window::keys(50)).sink_tokens(2).query_offset(-10).sink_logits(SinkLogits::PerHead)
}

/// What the planner gives to any sample device, and to any that offers less, as far as this one can run it.
#[test]
fn tiles_of_every_device() {
    let Some(gpu) = gpu() else { return };
    let own = gpu.device().unwrap().capabilities();
    let mut seen = Vec::new();
    for width in [[64, 64], [256, 256], [20, 33]] {
        let vec4 = width.iter().all(|w| w % 4 == 0);
        let ran = problem([1, 2, 1], [70, 90], width, some_hidden());
        let mut chosen: Vec<Vec<Tiling>> = vec![Vec::new(); TILED.len()];
        for sample in Capabilities::samples() {
            for (seq, bytes) in [1, 33, 65].iter().flat_map(|seq| [16, 20, 24, 32, 64].map(|kib| (*seq, kib * 1024))) {
                let mut sample = sample.clone();
                sample.workgroup_bytes = bytes.min(sample.workgroup_bytes);
                let planned = problem([1, 2, 1], [seq, seq], width, some_hidden());
                let plan = Plan::backward_with(
                    &planned,
                    OptionalOperands::default().scalar(!vec4).d_lse(true),
                    &sample,
                    &Preference::default(),
                )
                .unwrap();
                for (kernel, chosen) in TILED.into_iter().zip(&mut chosen) {
                    let pass = plan.passes.iter().find(|pass| pass.variant.kernel == kernel).unwrap();
                    let tiles = pass.variant.tiling.unwrap();
                    if !chosen.contains(&tiles) && Pass::with_tiles(kernel, &ran, own, tiles).is_ok() {
                        chosen.push(tiles);
                    }
                }
            }
        }
        // Both kernels at once, as long as both have tiles that were not run.
        let rounds = chosen.iter().map(Vec::len).max().unwrap();
        for round in 0..rounds {
            let tiles: Vec<_> =
                TILED.into_iter().zip(&chosen).filter_map(|(k, tiles)| Some((k, *tiles.get(round)?))).collect();
            check_tiles(gpu, &ran, &tiles, 10);
            seen.extend(tiles);
        }
    }
    for kernel in TILED {
        assert!(seen.iter().filter(|(k, _)| *k == kernel).count() >= 5, "{seen:?}");
    }
}

/// A seeded walk through what `Tiles` can say.
#[test]
fn random_tiles() {
    let Some(gpu) = gpu() else { return };
    let capabilities = gpu.device().unwrap().capabilities();
    let mut rng = StdRng::seed_from_u64(11);
    let mut tried = 0;
    while tried < this_many(3, 24) {
        let mut pick = |range: std::ops::RangeInclusive<u32>| rng.random_range(range);
        let mut tiles = || PortableTile {
            threads_r: 2 * pick(1..=6),
            threads_c: 4 * pick(1..=4),
            rows: pick(1..=4),
            quads: pick(1..=2),
            k_step: pick(1..=9),
            n_step: 4 * pick(1..=8),
            loops: LoopHints::NONE,
        };
        let chosen = [(Kernel::D_Q, tiles().into()), (Kernel::D_KV, tiles().into())];
        let width = [pick(1..=100) as usize, pick(1..=100) as usize];
        let size = [pick(1..=100) as usize, pick(1..=150) as usize];
        let problem = problem([1, 2, 1], size, width, some_hidden());
        let fits = |&(kernel, tiles): &_| Pass::with_tiles(kernel, &problem, capabilities, tiles).is_ok();
        if chosen.iter().all(fits) {
            check_tiles(gpu, &problem, &chosen, tried.into());
            tried += 1;
        }
    }
}

/// More workgroups than one dimension of a dispatch holds: every grid is folded, with a rest in its last row.
#[test]
fn folded_grid() {
    let Some(small) = gpu_with(|limits| limits.max_compute_workgroups_per_dimension = 9) else { return };
    let options = Options::new().causal(true).sink_logits(SinkLogits::PerHead);
    let problem = problem([1, 11, 11], [130, 130], [16, 16], options);
    let plan = Plan::backward_with(
        &problem,
        OptionalOperands::default().d_lse(true),
        small.device().unwrap().capabilities(),
        &Preference::default(),
    )
    .unwrap();
    assert_eq!(plan.passes.len(), 4);
    for pass in &plan.passes {
        let [x, y, _] = pass.grid;
        assert!(x <= 9 && y > 1 && u64::from(x * y) > pass.workgroups, "{pass} is not folded with a rest");
    }
    Backward::random(&problem, 13).check(&small, &problem);
}

fn bits(gradients: &Gradients) -> Vec<u32> {
    let sinks = gradients.d_sink_logits.as_deref().unwrap_or_default();
    [&gradients.d_q, &gradients.d_k, &gradients.d_v, sinks].concat().iter().map(|x| x.to_bits()).collect()
}

/// No atomics on floats, no order that varies: the same inputs give the same bits.
#[test]
fn same_bits_every_time() {
    let Some(gpu) = gpu() else { return };
    let device = gpu.device().unwrap();
    let options = Options::new().causal(true).sink_logits(SinkLogits::PerHead);
    let problem = problem([2, 4, 2], [203, 203], [64, 64], options);
    let backward = Backward::random(&problem, 14);
    let first = bits(&backward.run(gpu, &problem));
    assert!((0..2).all(|_| bits(&backward.run(gpu, &problem)) == first));

    // Both passes three times over in one encoder.
    let buffers = GradientBuffers::new(device, &problem, &backward);
    let forward = gpu.prepare_forward(&problem, &buffers.views().forward).unwrap();
    let prepared = gpu.prepare_backward(&problem, &buffers.views()).unwrap();
    submit(device, |encoder| {
        for _ in 0..3 {
            forward.encode(encoder);
            prepared.encode(encoder);
        }
    });
    assert!(bits(&buffers.read(device)) == first);
}

/// By the two kernels that form it alone.
#[test]
fn sink_gradients_of_a_million_rows() {
    let Some(gpu) = gpu() else { return };
    let device = gpu.device().unwrap();
    let options = Options::new().sink_logits(SinkLogits::PerHead);
    let problem = problem([125, 2, 1], [4000, 3], [1, 2], options);
    let mut backward = Backward::random(&problem, 16);
    // A mean far from zero, so that a plain f32 sum would lose most of each term in the end.
    backward.operands.v.iter_mut().for_each(|v| *v += 2.0);
    backward.d_o.iter_mut().for_each(|d_o| *d_o += 1.0);

    let buffers = GradientBuffers::new(device, &problem, &backward);
    let forward = gpu.prepare_forward(&problem, &buffers.views().forward).unwrap();
    let prepared = gpu.prepare_backward(&problem, &buffers.views()).unwrap();
    let kernels = [0, 1].map(|index: usize| prepared.plan().passes[index].variant.kernel);
    assert_eq!(kernels, [Kernel::DELTA, Kernel::D_SINK_LOGITS]);
    submit(device, |encoder| {
        forward.encode(encoder);
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
        (0..2).for_each(|index| prepared.encode_pass_in(&mut pass, index));
    });
    let actual = read(device, buffers.d_sink_logits.as_ref().unwrap());
    let expected = backward.expected(&problem).d_sink_logits.unwrap();
    for (actual, expected) in actual.into_iter().zip(expected) {
        compare(&[actual], &[expected], BOUND).unwrap();
    }
}
