//! f16 and bf16 in GPU buffers: halves of words wherever they lie, every bit pattern, rounding. Numbers are held
//! against the definition in tests/low_precision.rs.

use crate::common::buffers::empty;
use crate::common::views::run_at;
use crate::common::{every, gpu};
use sink_attention::half::{bf16, f16};
use sink_attention::plan::MicroKernel;
use sink_attention::plan::{
    Capabilities, Kernel, LoopHints, OptionalOperands, Pass, Plan, PortableTile, Preference, Tiling,
};
use sink_attention::testing::gradients::Backward;
use sink_attention::testing::operands::problem;
use sink_attention::wgpu::BufferUsages;
use sink_attention::{
    DType, Element, Error, ForwardBuffers, Inputs, Layout, Options, Problem, SinkLogits, TensorView, Upstream, Window,
};

/// A test for both types.
macro_rules! both {
    ($($name:ident)*) => {$(
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
    views_with_offsets_and_strides
    every_number_passes_through
    results_are_rounded_to_nearest_even
    same_bits_every_time
    buffers_that_are_too_small
}

/// The problem in an element type, with operands.
fn random<T: Element>(problem: &Problem, seed: u64) -> (Problem, Backward<T>) {
    let problem = Problem::new(*problem.shape(), problem.options().dtype(T::DTYPE)).unwrap();
    let operands = Backward::random(&problem, seed).cast();
    (problem, operands)
}

fn views_with_offsets_and_strides<T: Element>() {
    let Some(gpu) = gpu() else { return };
    let options = Options::new().window(Window::keys(9)).sink_tokens(2).sink_logits(SinkLogits::PerHead);
    let narrow = problem([2, 2, 1], [19, 19], [5, 3], options.layout(Layout::Bhsd));
    let by_fours = problem([2, 4, 2], [33, 33], [16, 8], options);
    for (seed, problem) in (1..).zip([narrow, by_fours]) {
        let (problem, case) = random::<T>(&problem, seed);
        for place in [[0, 0], [1, 0], [2, 2], [3, 1], [4, 4], [8, 0], [129, 3], [132, 4]] {
            for keeps_o_lo in [false, true] {
                run_at(gpu, &problem, &case, place, &[], keeps_o_lo);
            }
        }
    }
}

/// Of the kernel that f32 does not have: what the planner gives to any sample device, and what nobody would pick. In
/// one type: the other differs in how words are read.
#[test]
fn tiles_of_the_exact_delta() {
    let Some(gpu) = gpu() else { return };
    let own = gpu.device().unwrap().capabilities();
    let tiles = |threads: [u32; 2], thread: [u32; 2], k_step, n_step| {
        let [threads_r, threads_c] = threads;
        let [rows, quads] = thread;
        PortableTile { threads_r, threads_c, rows, quads, k_step, n_step, loops: LoopHints::NONE }
    };
    let mut all: Vec<Tiling> = vec![tiles([6, 12], [3, 3], 3, 36).into(), tiles([2, 32], [5, 1], 8, 16).into()];
    // The first queries see nothing, and the last keys are hidden from all.
    let options = Options::new().window(Window::keys(50)).sink_tokens(2).query_offset(-10);
    let options = options.sink_logits(SinkLogits::PerHead).dtype(DType::F16);
    for device in Capabilities::samples() {
        for seq in [1, 33, 65] {
            let problem = problem([1, 2, 1], [seq, seq], [20, 33], options);
            let portable = Preference::default().micro_kernel(MicroKernel::Portable);
            let optional = OptionalOperands::default().d_lse(true);
            let plan = Plan::backward_with(&problem, optional.scalar(true), &device, &portable);
            let planned = plan.unwrap().passes[0].variant;
            assert_eq!(planned.kernel, Kernel::EXACT_DELTA);
            all.extend(planned.tiling.filter(|tiles| !all.contains(tiles)));
        }
    }
    let (problem, mut case) = random::<f16>(&problem([1, 2, 1], [70, 90], [20, 33], options), 1);
    for j in 60..90 {
        case.operands.key(&problem, 0, 0, j).fill(f16::NAN);
        case.operands.value(&problem, 0, 0, j).fill(f16::NAN);
    }
    let fits = |tiles: &Tiling| Pass::with_tiles(Kernel::EXACT_DELTA, &problem, own, *tiles).is_ok();
    let fit: Vec<Tiling> = all.into_iter().filter(fits).collect();
    assert!(fit.len() >= 5, "{fit:?}");
    for tiles in every(2, fit) {
        run_at(gpu, &problem, &case, [0, 0], &[(Kernel::EXACT_DELTA, tiles)], false);
    }
}

/// Every bit pattern of the type.
fn numbers<T: Element>() -> Vec<T> {
    (0..=u16::MAX).map(|bits| bytemuck::cast(bits)).collect()
}

/// But for the sign of zero, which a sum that starts with zero loses.
fn same<T: Element>(a: T, b: T) -> bool {
    a == b || a.to_f32().is_nan() && b.to_f32().is_nan()
}

/// One key: o is its value, whatever that is. Infinities and NaN are no exceptions; subnormal numbers are where WGSL
/// lets a device take them for zero, which llvmpipe does not.
fn every_number_passes_through<T: Element>() {
    let Some(gpu) = gpu() else { return };
    let least_normal = f32::from_bits(if T::DTYPE == DType::F16 { 0x3880_0000 } else { 0x0080_0000 });
    let flushes = !gpu.device_name().contains("llvmpipe");
    // 65536 values in rows that are read by fours, and 65535 = 257 * 255 and one more in rows that are not.
    for (heads, width) in [(256, 256), (258, 255)] {
        let problem = problem([1, heads, heads], [1, 1], [4, width], Options::new().dtype(T::DTYPE));
        let v: Vec<T> = numbers().into_iter().cycle().take(heads * width).collect();
        let q = vec![T::default(); heads * 4];
        let output = gpu.forward(&problem, &Inputs::new(&q, &q, &v)).unwrap();
        for (n, (&o, &v)) in output.o.iter().zip(&v).enumerate() {
            let flushed = flushes && v.to_f32().abs() < least_normal && o.to_f32() == 0.0;
            assert!(same(o, v) || flushed, "{:#06x} came back as {:#06x}", n, bytemuck::cast::<T, u16>(o));
        }
        let taken = output.o_lo.unwrap().iter().position(|&rest| rest != 0);
        assert_eq!(taken, None, "nothing was rounded");
    }
}

/// d_v of one key that two queries see is the sum of their d_o, exact in f32 but for the last step.
fn results_are_rounded_to_nearest_even<T: Element>() {
    let Some(gpu) = gpu() else { return };
    let all = numbers::<T>();
    let finite: Vec<T> = all.into_iter().filter(|x| x.to_f32().is_finite()).collect();
    for width in [256, 255] {
        let heads = 512;
        let problem =
            problem([1, heads, heads], [2, 1], [4, width], Options::new().dtype(T::DTYPE).layout(Layout::Bhsd));
        let (mut a, mut b) = (Vec::new(), Vec::new());
        for n in 0..heads * width {
            let x = finite[n * 37 % finite.len()];
            // Half an ulp of x, for ties; a bit more; something of its own size, for carries and infinities; anything.
            let size = x.to_f32().abs();
            let ulp = if T::DTYPE == DType::F16 { size / 2048.0 } else { size / 256.0 };
            let exponent = f32::from_bits(ulp.to_bits() & 0x7f80_0000);
            let y = match n % 5 {
                0 => T::from_f32(exponent),
                1 => T::from_f32(exponent * 1.25),
                2 => T::from_f32(exponent * 3.0),
                3 => x,
                _ => finite[n * 7919 % finite.len()],
            };
            a.push(x);
            b.push(y);
        }
        let rows = a.chunks(width).zip(b.chunks(width));
        let d_o: Vec<T> = rows.flat_map(|(a, b)| a.iter().chain(b)).copied().collect();
        let q = vec![T::default(); heads * 2 * 4];
        let [k, v] = [heads * 4, heads * width].map(|len| vec![T::default(); len]);
        let inputs = Inputs::new(&q, &k, &v);
        let output = gpu.forward(&problem, &inputs).unwrap();
        let gradients = gpu.backward(&problem, &inputs, &output, &Upstream::new(&d_o)).unwrap();
        let mut kinds = [0; 3];
        for (n, &sum) in gradients.d_v.iter().enumerate() {
            let terms = [a[n], b[n]].map(|x| f64::from(x.to_f32()));
            let exact = terms[0] + terms[1];
            // Subnormal numbers of f32, which drivers take for zero, and sums that f32 does not hold.
            let is_subnormal = |x: &f64| *x != 0.0 && x.abs() < 1.2e-38;
            let subnormal = is_subnormal(&exact) || terms.iter().any(is_subnormal);
            if subnormal || f64::from(exact as f32) != exact && exact.abs() < 3e38 {
                continue;
            }
            let expected = T::from_f32(exact as f32);
            assert!(same(sum, expected), "{:?} + {:?} is {sum:?}, expected {expected:?}", a[n], b[n]);
            let wide = expected.to_f32();
            kinds[if wide.is_infinite() { 2 } else { usize::from(f64::from(wide) != exact) }] += 1;
        }
        assert!(kinds.iter().all(|&kind| kind > 100), "exact, rounded and infinite: {kinds:?}");
    }
}

fn same_bits_every_time<T: Element>() {
    let Some(gpu) = gpu() else { return };
    for width in [64, 31] {
        let options = Options::new().causal(true).sink_logits(SinkLogits::PerHead);
        let (problem, case) = random::<T>(&problem([2, 4, 2], [150, 150], [width, width], options), 1);
        let bits = || {
            let output = gpu.forward(&problem, &case.operands.inputs()).unwrap();
            let gradients = case.run_with(gpu, &problem, &output);
            let without = case.run_with(gpu, &problem, &output.clone().o_lo(None));
            let rest = output.o_lo.unwrap();
            let halves = [output.o, gradients.d_q, gradients.d_k, gradients.d_v, without.d_q, without.d_k].concat();
            let singles = [output.lse, gradients.d_sink_logits.unwrap(), without.d_sink_logits.unwrap()].concat();
            (
                rest,
                bytemuck::cast_slice::<T, u16>(&halves).to_vec(),
                bytemuck::cast_slice::<f32, u32>(&singles).to_vec(),
            )
        };
        let first = bits();
        assert!((0..3).all(|_| bits() == first));
    }
}

/// Sizes in errors are those of the element type, in whole words.
fn buffers_that_are_too_small<T: Element>() {
    let Some(gpu) = gpu() else { return };
    let device = gpu.device().unwrap();
    let problem = problem([1, 1, 1], [3, 3], [5, 5], Options::new().dtype(T::DTYPE));
    let storage = |size| empty(device, size, BufferUsages::STORAGE);
    // 15 halves are 30 bytes, which end in the word up to byte 32; lse has 3 singles.
    let [q, k, v, o, short, lse] = [32, 32, 32, 32, 30, 12].map(storage);
    let views = ForwardBuffers::new(
        TensorView::new(&q),
        TensorView::new(&k),
        TensorView::new(&v),
        TensorView::new(&o),
        TensorView::new(&lse),
    );
    let prepare = |views: ForwardBuffers<'_>| gpu.prepare_forward(&problem, &views);
    prepare(views).unwrap();
    prepare(views.q(views.q.offset(1))).unwrap();
    let too_small = |views, operand, needed, actual| match prepare(views) {
        Err(Error::BufferTooSmall { operand: o, needed: n, actual: a }) => {
            assert_eq!((o, n, a), (operand, needed, actual))
        }
        other => panic!("{operand}: {other:?}"),
    };
    too_small(views.v(TensorView::new(&short)), "v", 32, 30);
    too_small(views.o(views.o.offset(2)), "o", 36, 32);
    too_small(views.lse(views.lse.offset(1)), "lse", 16, 12);
    let rest = storage(32);
    let with = |o_lo| views.o_lo(o_lo);
    prepare(with(TensorView::new(&rest))).unwrap();
    too_small(with(TensorView::new(&short)), "o_lo", 32, 30);
    let large = storage(64);
    let shared = TensorView::new(&large);
    for (aliased, named) in
        [(with(views.o), ["o", "o_lo"]), (with(views.q), ["o_lo", "q"]), (with(shared).lse(shared), ["o_lo", "lse"])]
    {
        match prepare(aliased) {
            Err(Error::Aliasing { output, other }) => assert_eq!([output, other], named),
            other => panic!("{named:?}: {other:?}"),
        }
    }
    match prepare(with(TensorView::new(&rest).strides([15, 15, 4]))) {
        Err(Error::OverlappingStrides { operand: "o_lo", .. }) => {}
        other => panic!("{other:?}"),
    }
    match prepare(views.k(views.k.offset(u64::from(u32::MAX) - 13))) {
        Err(Error::BufferTooSmall { operand: "k", needed: 8_589_934_596, .. }) => {}
        other => panic!("{other:?}"),
    }
}
