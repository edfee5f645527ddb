//! Numbers: the GPU's forward pass against the f64 definition, over sizes, widths, options, tiles and
//! operands that are out to break it.

use crate::common::buffers::{Buffers, gpu_with};
use crate::common::{every, gpu, this_many, with_others};
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use sink_attention::cpu::reference;
use sink_attention::plan::{Kernel, LoopHints, Pass, Plan, PortableTile, Tiling};
use sink_attention::plan::{MicroKernel, OptionalOperands, Preference};
use sink_attention::testing::operands::{Operands, SIZES, agree, check, check_within, options, problem, row};
use sink_attention::{Alignment, Attention, Error, Layout, Options, Problem, SinkLogits, Window};

const INF: f32 = f32::INFINITY;

#[test]
fn sizes_and_options() {
    let Some(gpu) = gpu() else { return };
    for (seed, size) in (0..).zip(SIZES) {
        for options in options() {
            let problem = problem([2, 4, 2], size, [64, 64], options);
            check(gpu, &problem, &Operands::random(&problem, seed));
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
            check(gpu, &problem, &Operands::random(&problem, bound as u64));
        }
    }
}

#[test]
fn many_tiles() {
    let Some(gpu) = gpu() else { return };
    for (seed, options) in (0..).zip([
        Options::new().causal(true).sink_logits(SinkLogits::PerHead),
        Options::new().window(Window::keys(100)).sink_tokens(70),
        Options::new(),
    ]) {
        let problem = problem([1, 2, 1], [1023, 1024], [64, 64], options);
        check(gpu, &problem, &Operands::random(&problem, seed));
    }
}

#[test]
fn widths() {
    let Some(gpu) = gpu() else { return };
    let equal = [1, 3, 16, 32, 33, 80, 96, 128, 192, 256].map(|width| [width, width]);
    let unequal = [[192, 128], [1, 256], [256, 1], [3, 16], [64, 33], [128, 255], [512, 320]];
    let unequal = with_others(unequal, [[512, 512], [511, 320]]);
    let options = Options::new().causal(true).sink_logits(SinkLogits::PerHead);
    for (seed, width) in (0..).zip(equal.into_iter().chain(unequal)) {
        let layouts = [options, options.layout(Layout::Bhsd).window(Window::keys(40)).sink_tokens(7)];
        for (size, options) in [[63, 65], [1, 257]].into_iter().zip(layouts) {
            let problem = problem([1, 3, 1], size, width, options);
            check(gpu, &problem, &Operands::random(&problem, seed));
        }
    }
}

/// The micro-kernel that was asked for, or an error that says why not: never another one.
#[test]
fn micro_kernels() {
    let problem = problem([1, 2, 2], [20, 20], [16, 16], Options::new());
    let operands = Operands::random(&problem, 0);
    let forward = |attention: &Attention, micro_kernel| {
        attention.clone().with_micro_kernel(micro_kernel).forward(&problem, &operands.inputs())
    };
    let cpu = Attention::cpu();
    forward(&cpu, MicroKernel::Auto).unwrap();
    for micro_kernel in [MicroKernel::Portable, MicroKernel::Cooperative] {
        match forward(&cpu, micro_kernel) {
            Err(Error::NeedsGpu { call }) => assert!(call.contains(&micro_kernel.to_string()), "{call}"),
            other => panic!("{other:?}"),
        }
    }
    let Some(gpu) = gpu() else { return };
    assert_eq!(forward(gpu, MicroKernel::Portable).unwrap(), forward(gpu, MicroKernel::Auto).unwrap());
    let error = forward(gpu, MicroKernel::Cooperative).unwrap_err();
    assert!(matches!(error, Error::NoKernel { .. }) && error.to_string().contains("cooperative"), "{error}");
}

#[test]
fn heads_and_batches() {
    let Some(gpu) = gpu() else { return };
    for (seed, heads) in (0..).zip([[1, 8, 1], [1, 8, 8], [3, 6, 2], [2, 5, 5], [7, 1, 1], [1, 64, 8]]) {
        for layout in [Layout::Bshd, Layout::Bhsd] {
            let options = Options::new().sink_logits(SinkLogits::PerHead).layout(layout);
            let problem = problem(heads, [35, 37], [64, 64], options);
            check(gpu, &problem, &Operands::random(&problem, seed));
        }
    }
}

#[test]
fn extreme_sink_logits() {
    let Some(gpu) = gpu() else { return };
    let sinks = [-100.0, -1e4, -1e30, -INF, 0.0, 30.0, 100.0, 1e4, 1e30, INF, f32::MAX, f32::MIN];
    let options = Options::new().sink_logits(SinkLogits::PerHead);
    // The last one hides all keys of the first 20 queries: lse is the sink logit itself.
    for options in [options, options.causal(true), options.causal(true).query_offset(-20)] {
        let problem = problem([1, sinks.len(), 1], [40, 40], [64, 64], options);
        let operands = Operands { sink_logits: Some(sinks.to_vec()), ..Operands::random(&problem, 1) };
        let output = check(gpu, &problem, &operands);
        let s = problem.shape();
        for (h, sink) in sinks.into_iter().enumerate() {
            for i in 0..s.seq_q {
                let o = &output.o[row(&problem, [s.heads, s.seq_q, s.value_dim], [0, h, i])];
                if sink >= 1e4
                    || problem.sequences().next().unwrap().band.visible_keys(i).iter().all(|keys| keys.is_empty())
                {
                    assert!(o.iter().all(|&o| o == 0.0), "{problem}: sink {sink}, query {i}: {o:?}");
                    assert_eq!(output.lse[h * s.seq_q + i], sink, "{problem}: query {i}");
                }
            }
        }
    }
}

#[test]
fn sink_logits_beside_large_scores() {
    let Some(gpu) = gpu() else { return };
    let options = Options::new().sink_logits(SinkLogits::PerHead);
    // Of the scores' own size, so that neither side vanishes.
    for size in [300.0, -300.0] {
        let problem = problem([1, 4, 4], [40, 70], [64, 64], options);
        let mut operands = Operands::random(&problem, 2);
        operands.sink_logits = Some(vec![size - 1.0, size, size + 1.0, size + 3.0]);
        // One feature carries q.k * scale = size, the others little.
        for row in operands.q.chunks_mut(64) {
            row.iter_mut().for_each(|x| *x *= 0.25);
            row[0] = 8.0;
        }
        operands.k.chunks_mut(64).for_each(|row| row[0] = size);
        // Scores of this size are rounded to 2^-15 = 3e-5, and so are the logarithms of p.
        check_within(1e-4, gpu, &problem, &operands);
    }
}

#[test]
fn large_logits() {
    let Some(gpu) = gpu() else { return };
    for (scale, options) in [(8.0, Options::new()), (30.0, Options::new().causal(true)), (-30.0, Options::new())] {
        let problem = problem([1, 2, 2], [70, 70], [64, 64], options.scale(scale));
        check(gpu, &problem, &Operands::random(&problem, 3));
    }
}

/// Rows that see nothing give exact zeros, whatever stands in the operands.
#[test]
fn rows_that_see_nothing() {
    let Some(gpu) = gpu() else { return };
    for sinks in [SinkLogits::None, SinkLogits::OffByOne, SinkLogits::PerHead] {
        // Alone in their tiles, and beside rows that see something.
        for offset in [-1000, -100, -33, -5] {
            let options = Options::new().causal(true).query_offset(offset).sink_logits(sinks);
            let problem = problem([2, 2, 1], [100, 100], [64, 64], options);
            let operands = Operands::random(&problem, 4);
            let output = check(gpu, &problem, &operands);
            let blind = 100.min(-offset as usize);
            for (b, h) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
                for i in 0..blind {
                    let o = &output.o[row(&problem, [2, 100, 64], [b, h, i])];
                    assert!(o.iter().all(|&o| o == 0.0), "{problem}: query {i}: {o:?}");
                    let lse = match sinks {
                        SinkLogits::None => -INF,
                        SinkLogits::OffByOne => 0.0,
                        SinkLogits::PerHead => operands.sink_logits.as_ref().unwrap()[h],
                    };
                    assert_eq!(output.lse[(b * 2 + h) * 100 + i], lse, "{problem}: query {i}");
                }
            }
        }
    }
}

/// Writes NaN and infinities over keys and values; rows that see none of them must not notice, bit for bit,
/// and rows that see one must.
fn poison(gpu: &Attention, problem: &Problem, poisoned: &[usize]) {
    let s = problem.shape();
    let clean = Operands::random(problem, 5);
    let expected = gpu.forward(problem, &clean.inputs()).unwrap();
    for bad in [f32::NAN, INF, -INF] {
        for (in_keys, in_values) in [(true, false), (false, true), (true, true)] {
            let mut operands = clean.clone();
            for &j in poisoned {
                if in_keys {
                    operands.key(problem, 0, 0, j).fill(bad);
                }
                if in_values {
                    operands.value(problem, 0, 0, j).fill(bad);
                }
            }
            let actual = gpu.forward(problem, &operands.inputs()).unwrap();
            for h in 0..s.heads {
                for i in 0..s.seq_q {
                    let sees = poisoned.iter().any(|&j| problem.sequences().next().unwrap().band.visible(i, j));
                    let o = row(problem, [s.heads, s.seq_q, s.value_dim], [0, h, i]);
                    let lse = h * s.seq_q + i;
                    let at = format!("{problem}: {bad} at {poisoned:?}, query {i}: {:?}", &actual.o[o.clone()]);
                    if !sees {
                        assert_eq!(actual.o[o.clone()], expected.o[o], "something hidden came through, {at}");
                        assert_eq!(actual.lse[lse], expected.lse[lse], "something hidden came through, {at}");
                    } else if in_keys || bad.is_nan() {
                        // Infinite features of both signs of q add up to NaN.
                        assert!(actual.o[o].iter().all(|x| x.is_nan()), "a visible NaN is lost, {at}");
                        assert_eq!(actual.lse[lse].is_nan(), in_keys, "lse, {at}");
                    } else {
                        assert!(actual.o[o].iter().all(|&x| x == bad), "a visible infinity is lost, {at}");
                    }
                }
            }
        }
    }
}

#[test]
fn hidden_nan_and_infinity() {
    let Some(gpu) = gpu() else { return };
    let causal = Options::new().causal(true);
    for (options, poisoned) in [
        // In the tile of the diagonal, where half of the queries see them.
        (causal, vec![5]),
        (causal, vec![40, 69]),
        // Seen by nobody: beyond every diagonal, in a tile of their own and beside visible ones.
        (causal.alignment(Alignment::TopLeft).query_offset(-10), vec![60, 61]),
        // Behind a window, and between the sink tokens and the window.
        (Options::new().window(Window::keys(9)), vec![0, 17, 33]),
        (Options::new().window(Window::keys(9)).sink_tokens(4).sink_logits(SinkLogits::PerHead), vec![4, 20]),
        (Options::new().window(Window::keys(9)).sink_tokens(4), vec![3]),
        (Options::new().window(Window::new(3, 5)), vec![35]),
        // Nothing is hidden: every row sees it.
        (Options::new(), vec![69]),
        // Every query stands before the keys, and sees nothing.
        (causal.query_offset(-100), (0..70).collect()),
    ] {
        poison(gpu, &problem([1, 2, 1], [70, 70], [64, 64], options), &poisoned);
    }
}

#[test]
fn a_query_with_nan_keeps_it_to_itself() {
    let Some(gpu) = gpu() else { return };
    let problem = problem([2, 4, 2], [50, 50], [64, 64], Options::new().sink_logits(SinkLogits::PerHead));
    let clean = Operands::random(&problem, 6);
    let expected = gpu.forward(&problem, &clean.inputs()).unwrap();
    let poisoned_row = row(&problem, [4, 50, 64], [1, 2, 17]);
    let mut operands = clean.clone();
    operands.q[poisoned_row.start + 3] = f32::NAN;
    let actual = gpu.forward(&problem, &operands.inputs()).unwrap();
    for (at, (actual, expected)) in actual.o.iter().zip(&expected.o).enumerate() {
        assert!(if poisoned_row.contains(&at) { actual.is_nan() } else { actual == expected }, "element {at}");
    }
    agree(&actual, &reference::forward(&problem, &operands.inputs()).unwrap()).unwrap();
}

/// Runs a problem with tiles of our choice against the definition.
fn check_tiles(gpu: &Attention, problem: &Problem, tiles: impl Into<Tiling>, seed: u64) {
    let tiles = tiles.into();
    let device = gpu.device().unwrap();
    let mut operands = Operands::random(problem, seed);
    // A hidden NaN sends masked tiles through the careful path of the accumulation.
    if let Some(hidden) = (0..problem.shape().seq_k)
        .find(|&j| (0..problem.shape().seq_q).all(|i| !problem.sequences().next().unwrap().band.visible(i, j)))
    {
        operands.value(problem, 0, 0, hidden).fill(f32::NAN);
    }
    let buffers = Buffers::new(device, problem, &operands);
    let chosen = [(Kernel::FORWARD, tiles)];
    let prepared = gpu.prepare_forward_with(problem, &buffers.views(), &chosen).unwrap();
    assert_eq!(prepared.plan().passes[0].variant.tiling, Some(tiles));
    let expected = reference::forward(problem, &operands.inputs()).unwrap();
    agree(&buffers.run(device, &prepared), &expected).unwrap_or_else(|error| panic!("{problem}, {tiles}: {error}"));
}

/// Keys before the first query's window are hidden from all.
fn some_hidden() -> Options {
    Options::new().window(Window::keys(50)).sink_tokens(2).sink_logits(SinkLogits::PerHead)
}

/// What the planner gives to any sample device, as far as this one can run it.
#[test]
fn tiles_of_every_device() {
    let Some(gpu) = gpu() else { return };
    let own = gpu.device().unwrap().capabilities();
    let mut seen = Vec::new();
    for width in with_others([[64, 64], [256, 256], [20, 33]], [[128, 128]]) {
        let vec4 = width.iter().all(|w| w % 4 == 0);
        for device in sink_attention::plan::Capabilities::samples() {
            for seq_q in [1, 33, 65] {
                let problem = |seq_q| problem([1, 2, 1], [seq_q, 140], width, some_hidden());
                let tiles = Plan::forward_with(
                    &problem(seq_q),
                    OptionalOperands::default().scalar(!vec4),
                    &device,
                    &Preference::default(),
                )
                .unwrap()
                .passes[0]
                    .variant
                    .tiling
                    .unwrap();
                let problem = problem(90);
                if !seen.contains(&(width, tiles)) && Pass::with_tiles(Kernel::FORWARD, &problem, own, tiles).is_ok() {
                    seen.push((width, tiles));
                    check_tiles(gpu, &problem, tiles, 7);
                }
            }
        }
    }
    assert!(seen.len() >= 5, "{seen:?}");
}

/// Tiles that nobody would pick: every number away from the table's.
#[test]
fn unusual_tiles() {
    let Some(gpu) = gpu() else { return };
    let tiles = |threads: [u32; 2], thread: [u32; 2], k_step, n_step| {
        let [threads_r, threads_c] = threads;
        let [rows, quads] = thread;
        PortableTile { threads_r, threads_c, rows, quads, k_step, n_step, loops: LoopHints::NONE }
    };
    for (n, (width, tiles)) in [
        // The largest of the table with half of their rows, so that they fit 32 KiB.
        ([64, 64], tiles([32, 8], [2, 2], 8, 16)),
        ([256, 256], tiles([16, 16], [2, 1], 8, 16)),
        // Values staged whole, and in the smallest parts.
        ([64, 64], tiles([8, 8], [4, 1], 4, 32)),
        ([64, 64], tiles([8, 8], [4, 1], 16, 4)),
        // Chunks that do not divide the width, odd ones, and longer ones than the row.
        ([64, 64], tiles([8, 8], [4, 1], 5, 16)),
        ([80, 48], tiles([8, 8], [4, 1], 8, 16)),
        ([20, 20], tiles([8, 8], [4, 1], 5, 16)),
        ([16, 16], tiles([8, 8], [4, 1], 9, 32)),
        // Few threads, many keys a thread, more threads than value columns.
        ([32, 40], tiles([2, 4], [1, 1], 1, 4)),
        ([32, 40], tiles([6, 12], [3, 3], 3, 36)),
        ([32, 8], tiles([2, 32], [3, 1], 8, 16)),
        ([7, 5], tiles([10, 8], [3, 2], 2, 16)),
        ([7, 130], tiles([16, 4], [1, 2], 1, 8)),
    ]
    .into_iter()
    .enumerate()
    {
        let options = [some_hidden(), Options::new().causal(true)];
        for options in every(2, options.into_iter().cycle().skip(n % 2).take(2)) {
            check_tiles(gpu, &problem([1, 2, 1], [70, 140], width, options), tiles, 8);
        }
    }
}

/// A seeded walk through what `Tiles` can say.
#[test]
fn random_tiles() {
    let Some(gpu) = gpu() else { return };
    let capabilities = gpu.device().unwrap().capabilities();
    let mut rng = StdRng::seed_from_u64(9);
    let mut tried = 0;
    while tried < this_many(6, 40) {
        let mut pick = |range: std::ops::RangeInclusive<u32>| rng.random_range(range);
        let tiles = PortableTile {
            threads_r: 2 * pick(1..=6),
            threads_c: 4 * pick(1..=4),
            rows: pick(1..=4),
            quads: pick(1..=2),
            k_step: pick(1..=9),
            n_step: 4 * pick(1..=8),
            loops: LoopHints::NONE,
        };
        let width = [pick(1..=100) as usize, pick(1..=100) as usize];
        let size = [pick(1..=100) as usize, pick(1..=150) as usize];
        let problem = problem([1, 2, 1], size, width, some_hidden());
        if Pass::with_tiles(Kernel::FORWARD, &problem, capabilities, tiles).is_ok() {
            check_tiles(gpu, &problem, tiles, tried.into());
            tried += 1;
        }
    }
}

/// More workgroups than one dimension of a dispatch holds: the grid is folded, and its last row is not full.
#[test]
fn folded_grid() {
    let Some(small) = gpu_with(|limits| limits.max_compute_workgroups_per_dimension = 7) else { return };
    let options = Options::new().causal(true).sink_logits(SinkLogits::PerHead);
    let problem = problem([3, 3, 1], [130, 130], [64, 64], options);
    let plan = Plan::forward(&problem, small.device().unwrap().capabilities()).unwrap();
    let pass = plan.passes[0];
    let [x, y, _] = pass.grid;
    assert!(x <= 7 && y > 1 && u64::from(x * y) > pass.workgroups, "{pass} is not folded with a rest");
    check(&small, &problem, &Operands::random(&problem, 10));
}

/// The same on the device as it is, which allows 65535 or more.
#[test]
fn more_heads_than_a_dimension_holds() {
    let Some(gpu) = gpu() else { return };
    let heads = gpu.device().unwrap().capabilities().grid_dimension as usize + 6;
    if heads > 100_000 {
        return; // folded_grid is enough
    }
    let problem = problem([1, heads, 1], [1, 5], [4, 4], Options::new());
    check(gpu, &problem, &Operands::random(&problem, 11));
}

/// No atomics on floats, no order that varies: the same inputs give the same bits.
#[test]
fn same_bits_every_time() {
    let Some(gpu) = gpu() else { return };
    let options = Options::new().causal(true).sink_logits(SinkLogits::PerHead);
    let problem = problem([2, 4, 2], [203, 203], [64, 64], options);
    let operands = Operands::random(&problem, 12);
    let bits = || {
        let output = gpu.forward(&problem, &operands.inputs()).unwrap();
        [output.o, output.lse].concat().iter().map(|x| x.to_bits()).collect::<Vec<_>>()
    };
    let first = bits();
    for _ in 0..5 {
        assert!(bits() == first);
    }
}
