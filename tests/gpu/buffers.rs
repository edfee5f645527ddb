//! The caller's own buffers: any offsets and strides, prepared once and run often, errors instead of
//! panics, and an operator that many threads share.

use crate::common::buffers::{Buffers, GradientBuffers, buffer, empty, gpu_with, read, submit};
use crate::common::gpu;
use sink_attention::testing::gradients::Backward;
use sink_attention::testing::operands::{Operands, agree, check, problem};
use sink_attention::wgpu::{self, BufferUsages};
use sink_attention::{
    Attention, BackwardBuffers, Device, DeviceChoice, Error, ForwardBuffers, Gradients, Layout, Options, Problem,
    Shape, SinkLogits, TensorView, Window,
};

/// Stands where nothing may be written.
const SENTINEL: f32 = -12345.678;

/// Asserts what kind of error a result is, numbers included.
macro_rules! expect_error {
    ($result:expr, $pattern:pat) => {
        match $result {
            Err(error) => {
                assert!(matches!(error, $pattern), "{error:?} instead of {}", stringify!($pattern));
                assert!(!error.to_string().is_empty());
            }
            Ok(_) => panic!("no error, expected {}", stringify!($pattern)),
        }
    };
}

/// Sinks, groups and several batches; an even width that can be read by fours.
fn typical() -> Problem {
    let options = Options::new().window(Window::keys(30)).sink_tokens(2).sink_logits(SinkLogits::PerHead);
    problem([2, 4, 2], [50, 50], [16, 16], options)
}

/// A place for an operand of `[batch, heads, seq, width]` in some buffer.
#[derive(Clone, Copy)]
struct Place {
    extents: [usize; 4],
    offset: usize,
    strides: [u64; 3],
}

impl Place {
    /// Element of the buffer and element of the packed operand, for all elements.
    fn elements(&self, layout: Layout) -> impl Iterator<Item = (usize, usize)> + use<> {
        let Place { extents: [batch, heads, seq, width], offset, strides } = *self;
        let packed = layout.strides(heads, seq, width);
        let rows = (0..batch).flat_map(move |b| (0..heads).flat_map(move |h| (0..seq).map(move |i| [b, h, i])));
        let start = |row: [usize; 3], strides: [u64; 3]| (0..3).map(|a| row[a] * strides[a] as usize).sum::<usize>();
        rows.flat_map(move |row| (0..width).map(move |d| (offset + start(row, strides) + d, start(row, packed) + d)))
    }

    fn end(&self, layout: Layout) -> usize {
        self.elements(layout).map(|(at, _)| at).max().unwrap() + 1
    }

    fn view<'a>(&self, buffer: &'a wgpu::Buffer) -> TensorView<'a> {
        TensorView::new(buffer).offset(self.offset as u64).strides(self.strides)
    }
}

/// Runs `problem` with q, k and v side by side in the rows of one buffer, as a fused projection leaves
/// them, o in padded rows and lse somewhere in a buffer. Everything starts `offset` elements in.
fn run_strided(gpu: &Attention, problem: &Problem, operands: &Operands, offset: usize, pad: usize) {
    let device = gpu.device().unwrap();
    let Shape { batch, heads, kv_heads, seq_q: seq, seq_k, head_dim: width, value_dim } = *problem.shape();
    assert_eq!([seq, width], [seq_k, value_dim], "the fused buffer has one row for each position");
    let layout = problem.options().layout;

    // NaN wherever no operand lies: whatever is read from there shows.
    let row = (heads + 2 * kv_heads) * width + pad;
    let strides = [(seq * row) as u64, width as u64, row as u64];
    let place = |heads: usize, first: usize| Place {
        extents: [batch, heads, seq, width],
        offset: offset + first * width,
        strides,
    };
    let places = [place(heads, 0), place(kv_heads, heads), place(kv_heads, heads + kv_heads)];
    let mut fused = vec![f32::NAN; offset + batch * seq * row];
    for (place, data) in places.iter().zip([&operands.q, &operands.k, &operands.v]) {
        place.elements(layout).for_each(|(at, packed)| fused[at] = data[packed]);
    }
    let o_row = width + pad;
    let o = Place {
        extents: [batch, heads, seq, width],
        offset,
        // Heads, batches, positions from the outside in: neither of the two layouts.
        strides: [(seq * o_row) as u64, (batch * seq * o_row) as u64, o_row as u64],
    };
    let lse_range = offset..offset + batch * heads * seq;
    let sinks = operands.sink_logits.as_ref().map(|sinks| [&vec![f32::NAN; offset], &sinks[..]].concat());

    let fused = buffer(device, &fused);
    let o_buffer = buffer(device, &vec![SENTINEL; o.end(layout) + 9]);
    let lse_buffer = buffer(device, &vec![SENTINEL; lse_range.end + 9]);
    let sinks = sinks.map(|sinks| buffer(device, &sinks));
    let buffers = ForwardBuffers::new(
        places[0].view(&fused),
        places[1].view(&fused),
        places[2].view(&fused),
        o.view(&o_buffer),
        TensorView::new(&lse_buffer).offset(offset as u64),
    )
    .sink_logits(sinks.as_ref().map(|sinks| TensorView::new(sinks).offset(offset as u64)));
    let prepared = gpu.prepare_forward(problem, &buffers).unwrap();
    let vec4 = [offset, pad, width].iter().all(|n| n % 4 == 0);
    assert_eq!(prepared.plan().passes[0].variant.vec4, vec4, "{problem}, offset {offset}, pad {pad}");
    submit(device, |encoder| prepared.encode(encoder));

    let mut actual = check(gpu, problem, operands);
    let expected = actual.clone();
    let mut o_data = read(device, &o_buffer);
    for (at, packed) in o.elements(layout) {
        actual.o[packed] = std::mem::replace(&mut o_data[at], SENTINEL);
    }
    let mut lse_data = read(device, &lse_buffer);
    actual.lse.copy_from_slice(&lse_data[lse_range.clone()]);
    lse_data[lse_range].fill(SENTINEL);
    let what = format!("{problem}, offset {offset}, pad {pad}");
    assert!(o_data.iter().all(|&x| x == SENTINEL), "{what}: wrote outside of the view of o");
    assert!(lse_data.iter().all(|&x| x == SENTINEL), "{what}: wrote outside of the view of lse");
    if vec4 {
        assert!(actual == expected, "{what}: not the bits of the host path");
    } else {
        agree(&actual, &expected).unwrap_or_else(|error| panic!("{what}: {error}"));
    }
}

#[test]
fn offsets_and_strides() {
    let Some(gpu) = gpu() else { return };
    let narrow = problem([3, 2, 1], [37, 37], [5, 5], Options::new().causal(true).layout(Layout::Bhsd));
    for problem in [typical(), narrow] {
        let operands = Operands::random(&problem, 1);
        // None, the least, a vector's, just off it, at and beside every usual alignment of bindings.
        for offset in [0, 1, 4, 7, 8, 60, 64, 65, 68, 1024] {
            for pad in [0, 4, 3] {
                run_strided(gpu, &problem, &operands, offset, pad);
            }
        }
    }
}

/// The stride of an axis with one element is never used, whatever it is.
#[test]
fn strides_of_single_elements() {
    let Some(gpu) = gpu() else { return };
    let device = gpu.device().unwrap();
    let problem = problem([1, 1, 1], [20, 20], [16, 16], Options::new());
    let operands = Operands::random(&problem, 2);
    let buffers = Buffers::new(device, &problem, &operands);
    let strides = [u64::MAX, 3, 16];
    let views = buffers.views();
    let views = views.q(views.q.strides(strides)).o(views.o.strides(strides));
    let prepared = gpu.prepare_forward(&problem, &views).unwrap();
    assert!(prepared.plan().passes[0].variant.vec4);
    assert!(buffers.run(device, &prepared) == check(gpu, &problem, &operands));
}

/// Keys and values may be one buffer, and one view: nothing is written to them.
#[test]
fn inputs_may_share() {
    let Some(gpu) = gpu() else { return };
    let device = gpu.device().unwrap();
    let problem = problem([1, 2, 2], [30, 30], [16, 16], Options::new().causal(true));
    let mut operands = Operands::random(&problem, 3);
    let buffers = Buffers::new(device, &problem, &operands);
    let views = buffers.views().q(TensorView::new(&buffers.k)).v(TensorView::new(&buffers.k));
    let prepared = gpu.prepare_forward(&problem, &views).unwrap();
    (operands.q, operands.v) = (operands.k.clone(), operands.k.clone());
    assert!(buffers.run(device, &prepared) == check(gpu, &problem, &operands));
}

#[test]
fn prepared_once_encoded_often() {
    let Some(gpu) = gpu() else { return };
    let device = gpu.device().unwrap();
    let problem = typical();
    let operands = Operands::random(&problem, 4);
    let expected = check(gpu, &problem, &operands);
    let buffers = Buffers::new(device, &problem, &operands);
    let prepared = gpu.prepare_forward(&problem, &buffers.views()).unwrap();

    // Several passes in one encoder, and several dispatches in one pass.
    submit(device, |encoder| {
        (0..5).for_each(|_| prepared.encode(encoder));
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
        (0..5).for_each(|_| prepared.encode_in(&mut pass));
    });
    assert!(read(device, &buffers.o) == expected.o && read(device, &buffers.lse) == expected.lse);

    // What is new in the buffers is what the next run sees.
    let operands = Operands::random(&problem, 5);
    for (buffer, data) in [(&buffers.q, &operands.q), (&buffers.k, &operands.k), (&buffers.v, &operands.v)] {
        device.queue().write_buffer(buffer, 0, bytemuck::cast_slice(data));
    }
    let sinks = operands.sink_logits.as_ref().unwrap();
    device.queue().write_buffer(buffers.sink_logits.as_ref().unwrap(), 0, bytemuck::cast_slice(sinks));
    assert!(buffers.run(device, &prepared) == check(gpu, &problem, &operands));

    // It keeps alive what it needs.
    let Buffers { o, lse, .. } = buffers;
    device.queue().write_buffer(&o, 0, bytemuck::cast_slice(&[0f32; 4]));
    submit(device, |encoder| prepared.encode(encoder));
    assert!(read(device, &o) == check(gpu, &problem, &operands).o);
    drop(lse);
}

#[test]
fn views_that_do_not_fit() {
    let Some(gpu) = gpu() else { return };
    let device = gpu.device().unwrap();
    let problem = typical();
    let operands = Operands::random(&problem, 6);
    let buffers = Buffers::new(device, &problem, &operands);
    let good = buffers.views();
    let prepare = |buffers: ForwardBuffers<'_>| gpu.prepare_forward(&problem, &buffers);
    prepare(good).unwrap();

    // q has 2 * 50 * 4 * 16 elements, k and v half of them, lse 2 * 4 * 50, the sink logits 4.
    let bytes = 6400 * 4;
    let short = buffer(device, &[0.0; 6399]);
    expect_error!(
        prepare(good.q(TensorView::new(&short))),
        Error::BufferTooSmall { operand: "q", needed: 25_600, actual: 25_596 }
    );
    assert_eq!(bytes, buffers.q.size());
    expect_error!(
        prepare(good.k(good.k.offset(1))),
        Error::BufferTooSmall { operand: "k", needed: 12_804, actual: 12_800 }
    );
    expect_error!(
        prepare(good.v(good.v.strides([1600, 16, 33]))),
        // (1600 + 16 + 49 * 33 + 16) * 4
        Error::BufferTooSmall { operand: "v", needed: 12_996, actual: 12_800 }
    );
    expect_error!(
        prepare(good.o(good.o.offset(4))),
        Error::BufferTooSmall { operand: "o", needed: 25_616, actual: 25_600 }
    );
    expect_error!(
        prepare(good.lse(good.lse.offset(2))),
        Error::BufferTooSmall { operand: "lse", needed: 1608, actual: 1600 }
    );
    expect_error!(
        prepare(good.sink_logits(good.sink_logits.map(|s| s.offset(1)))),
        Error::BufferTooSmall { operand: "sink_logits", needed: 20, actual: 16 }
    );

    let plain = empty(device, bytes, BufferUsages::COPY_DST);
    expect_error!(
        prepare(good.v(TensorView::new(&plain))),
        Error::BufferUsage { operand: "v", needed: BufferUsages::STORAGE, actual: BufferUsages::COPY_DST }
    );

    expect_error!(
        prepare(good.q(good.q.offset(u64::from(u32::MAX) - 6398))),
        Error::BufferTooSmall { operand: "q", needed: 17_179_869_188, actual: 25_600 }
    );
    expect_error!(
        prepare(good.k(good.k.offset(u64::MAX).strides([u64::MAX; 3]))),
        // offset + (1 + 1 + 49) * stride + 15
        // Bytes are counted in 64 bits.
        Error::IndexOverflow {
            operand: "k",
            last_element: 959_230_691_832_896_683_995,
            most: 4_611_686_018_427_387_901
        }
    );

    // Packed strides of o are [3200, 16, 64].
    for strides in [[3200, 16, 0], [3200, 15, 64], [3199, 16, 64], [0, 16, 64], [0, 0, 0], [1, 2, 3]] {
        match prepare(good.o(good.o.strides(strides))) {
            Err(Error::OverlappingStrides { operand: "o", strides: named }) => assert_eq!(named, strides),
            other => panic!("{strides:?}: {other:?}"),
        }
    }

    expect_error!(prepare(good.lse(good.lse.strides([200, 50, 1]))), Error::InvalidOption { option: "lse", .. });

    // After all that, the operator and the buffers are as good as before.
    assert!(buffers.run(device, &prepare(good).unwrap()) == check(gpu, &problem, &operands));
}

#[test]
fn results_need_buffers_of_their_own() {
    let Some(gpu) = gpu() else { return };
    let device = gpu.device().unwrap();
    let problem = typical();
    let buffers = Buffers::new(device, &problem, &Operands::random(&problem, 7));
    let large = empty(device, 1 << 20, BufferUsages::STORAGE);
    let all = TensorView::new(&large);
    let good = buffers.views();
    let prepare = |buffers: ForwardBuffers<'_>| gpu.prepare_forward(&problem, &buffers);
    // Even at places that do not overlap: WebGPU allows no buffer to be read and written in one pass.
    let far = all.offset(100_000);
    expect_error!(prepare(good.q(all).o(far)), Error::Aliasing { output: "o", other: "q" });
    expect_error!(prepare(good.k(all).o(far)), Error::Aliasing { output: "o", other: "k" });
    expect_error!(prepare(good.v(all).lse(far)), Error::Aliasing { output: "lse", other: "v" });
    expect_error!(prepare(good.lse(all).o(far)), Error::Aliasing { output: "o", other: "lse" });
    expect_error!(prepare(good.sink_logits(all).lse(far)), Error::Aliasing { output: "lse", other: "sink_logits" });
    prepare(good).unwrap();
}

/// f32 is not rounded: whoever gives a buffer for it has mistaken something.
#[test]
fn nothing_is_rounded_off_f32() {
    let Some(gpu) = gpu() else { return };
    let device = gpu.device().unwrap();
    let problem = typical();
    let buffers = GradientBuffers::new(device, &problem, &Backward::random(&problem, 7));
    let rest = empty(device, 1 << 16, BufferUsages::STORAGE);
    let views = buffers.views();
    let forward = views.forward.o_lo(TensorView::new(&rest));
    expect_error!(gpu.prepare_forward(&problem, &forward), Error::UnexpectedOperand { operand: "o_lo", .. });
    let backward = views.forward(forward);
    expect_error!(gpu.prepare_backward(&problem, &backward), Error::UnexpectedOperand { operand: "o_lo", .. });
}

#[test]
fn sink_logits_as_the_options_say() {
    let Some(gpu) = gpu() else { return };
    let with = typical();
    let without = Problem::new(*with.shape(), with.options().sink_logits(SinkLogits::OffByOne)).unwrap();
    let operands = Operands::random(&with, 8);
    let buffers = Buffers::new(gpu.device().unwrap(), &with, &operands);
    let views = buffers.views();
    expect_error!(
        gpu.prepare_forward(&with, &views.sink_logits(None)),
        Error::MissingOperand { operand: "sink_logits" }
    );
    expect_error!(gpu.prepare_forward(&without, &views), Error::UnexpectedOperand { operand: "sink_logits", .. });
    for attention in [gpu, &Attention::cpu()] {
        let inputs = operands.inputs();
        expect_error!(
            attention.forward(&with, &inputs.sink_logits(None)),
            Error::MissingOperand { operand: "sink_logits" }
        );
        expect_error!(attention.forward(&without, &inputs), Error::UnexpectedOperand { operand: "sink_logits", .. });
        expect_error!(
            attention.forward(&with, &inputs.sink_logits(&[0.0; 3][..])),
            Error::OperandLength { operand: "sink_logits", expected: 4, actual: 3, .. }
        );
        expect_error!(
            attention.forward(&with, &inputs.q(&operands.q[1..])),
            Error::OperandLength { operand: "q", expected: 6400, actual: 6399, .. }
        );
        check(attention, &with, &operands);
    }
}

#[test]
fn buffers_that_the_device_cannot_use() {
    let Some(gpu) = gpu() else { return };
    let device = gpu.device().unwrap();
    let problem = typical();
    let operands = Operands::random(&problem, 9);
    let buffers = Buffers::new(device, &problem, &operands);
    let good = buffers.views();

    let destroyed = buffer(device, &operands.q);
    destroyed.destroy();
    let views = good.q(TensorView::new(&destroyed));
    expect_error!(gpu.prepare_forward(&problem, &views), Error::Gpu { during: "binding operands", .. });

    assert!(buffers.run(device, &gpu.prepare_forward(&problem, &good).unwrap()) == check(gpu, &problem, &operands));
}

/// Devices that this crate opens are of one wgpu instance, however they are opened: wgpu can tell their buffers apart.
#[test]
fn buffers_of_another_device() {
    if gpu().is_none() {
        return;
    }
    let [device, other] = [0, 1].map(|_| {
        let adapters = sink_attention::device::adapters();
        Device::open(&adapters[0]).unwrap()
    });
    let gpu = Attention::on(device.clone());
    let problem = typical();
    let operands = Operands::random(&problem, 9);
    let buffers = Buffers::new(&device, &problem, &operands);
    let foreign = buffer(&other, &operands.q);
    let views = buffers.views().q(TensorView::new(&foreign));
    expect_error!(gpu.prepare_forward(&problem, &views), Error::Gpu { during: "binding operands", .. });
    check(&gpu, &problem, &operands);
}

#[test]
fn small_bindings() {
    let Some(small) = gpu_with(|limits| limits.max_storage_buffer_binding_size = 25_600) else { return };
    let device = small.device().unwrap();
    let problem = typical();
    let operands = Operands::random(&problem, 10);
    check(&small, &problem, &operands);

    // The limit is on what a view reaches, not on the buffer: the same operand far inside of a larger one.
    let buffers = Buffers::new(device, &problem, &operands);
    let large = buffer(device, &[&[f32::NAN; 10_240], &operands.q[..], &[f32::NAN; 1000]].concat());
    let views = buffers.views().q(TensorView::new(&large).offset(10_240));
    let prepared = small.prepare_forward(&problem, &views).unwrap();
    assert!(buffers.run(device, &prepared) == check(&small, &problem, &operands));

    // One element before the limit of alignment, a binding of all of it would start earlier than the view: it is cut.
    let shifted = buffer(device, &[&[f32::NAN; 10_239], &operands.q[..], &[f32::NAN; 1000]].concat());
    let views = buffers.views().q(TensorView::new(&shifted).offset(10_239));
    let prepared = small.prepare_forward(&problem, &views).unwrap();
    assert!(prepared.dispatches().eq([2]));
    agree(&buffers.run(device, &prepared), &check(&small, &problem, &operands)).unwrap();

    let longer = sink_attention::testing::operands::problem([2, 4, 2], [51, 50], [16, 16], *problem.options());
    check(&small, &longer, &Operands::random(&longer, 11));
}

/// Where not even a tile of a key head fits, the error says of what, and what would help does.
#[test]
fn bindings_smaller_than_the_smallest_piece() {
    let Some(small) = gpu_with(|limits| limits.max_storage_buffer_binding_size = 4096) else { return };
    let of = |options| problem([1, 4, 2], [1, 50], [16, 16], options);
    let whole = of(Options::new());
    expect_error!(
        small.forward(&whole, &Operands::random(&whole, 11).inputs()),
        // (49 * 2 + 1) * 16 * 4: from the first row of a head to its last.
        Error::BindingTooLarge { operand: "k", bytes: 6336, limit: 4096 }
    );
    for helped in [of(Options::new().layout(Layout::Bhsd)), of(Options::new().window(Window::keys(10)))] {
        check(&small, &helped, &Operands::random(&helped, 11));
    }
}

#[test]
fn small_buffers() {
    let Some(small) = gpu_with(|limits| {
        limits.max_buffer_size = 25_600;
        limits.max_storage_buffer_binding_size = 25_600;
    }) else {
        return;
    };
    let problem = typical();
    check(&small, &problem, &Operands::random(&problem, 12));
    let longer = sink_attention::testing::operands::problem([2, 4, 4], [50, 51], [16, 16], *problem.options());
    expect_error!(
        small.forward(&longer, &Operands::random(&longer, 13).inputs()),
        Error::BufferTooLarge { operand: "k", bytes: 26_112, limit: 25_600 }
    );
    let wide = sink_attention::testing::operands::problem([2, 4, 2], [50, 50], [16, 20], *problem.options());
    expect_error!(
        small.forward(&wide, &Operands::random(&wide, 14).inputs()),
        Error::BufferTooLarge { operand: "o", bytes: 32_000, limit: 25_600 }
    );
    check(&small, &problem, &Operands::random(&problem, 12));
}

#[test]
fn small_workgroups() {
    let problem = typical();
    let operands = Operands::random(&problem, 15);
    let Some(small) = gpu_with(|limits| limits.max_compute_workgroup_storage_size = 1024) else { return };
    let Err(Error::NoKernel { problem: named, reason }) = small.forward(&problem, &operands.inputs()) else {
        panic!("1 KiB of workgroup memory is enough?")
    };
    assert_eq!(named, problem.to_string());
    assert!(reason.contains("workgroup memory") && reason.contains("offers 1024"), "{reason}");

    let Some(small) = gpu_with(|limits| limits.max_compute_invocations_per_workgroup = 32) else { return };
    let Err(Error::NoKernel { reason, .. }) = small.forward(&problem, &operands.inputs()) else {
        panic!("32 threads are enough?")
    };
    assert!(reason.contains("threads") && reason.contains("offers 32"), "{reason}");
}

#[test]
fn small_grids() {
    let Some(small) = gpu_with(|limits| limits.max_compute_workgroups_per_dimension = 3) else { return };
    let operands = |problem: &Problem| Operands::random(problem, 16);
    // One query is one workgroup a head, whatever the tiles: 9 are numbered, 10 are not.
    let fits = problem([1, 9, 1], [1, 5], [16, 16], Options::new());
    check(&small, &fits, &operands(&fits));
    let large = problem([1, 10, 1], [1, 5], [16, 16], Options::new());
    expect_error!(
        small.forward(&large, &operands(&large).inputs()),
        Error::TooManyWorkgroups { workgroups: 10, most: 9 }
    );
    // Of several key heads, each has a dispatch of its own.
    let several = problem([1, 10, 2], [1, 5], [16, 16], Options::new());
    check(&small, &several, &operands(&several));
}

#[test]
fn encoding_needs_a_gpu() {
    let Some(gpu) = gpu() else { return };
    let problem = typical();
    let buffers = Buffers::new(gpu.device().unwrap(), &problem, &Operands::random(&problem, 17));
    expect_error!(
        Attention::cpu().prepare_forward(&problem, &buffers.views()),
        Error::NeedsGpu { call: "prepare_forward" }
    );
}

#[test]
fn an_adapter_that_is_not_there() {
    let wanted = "no adapter has this name";
    match Attention::open(&DeviceChoice::Adapter(wanted.into())) {
        Err(Error::AdapterNotFound { wanted: named, available }) => {
            assert_eq!(named, wanted);
            assert_eq!(available.len(), sink_attention::device::adapters().len());
        }
        other => panic!("{other:?}"),
    }
}

/// One operator, many threads, some of which make mistakes: nobody gets another's result or error.
#[test]
fn many_threads() {
    let Some(gpu) = gpu() else { return };
    let device = gpu.device().unwrap();
    std::thread::scope(|scope| {
        for thread in 0..8 {
            scope.spawn(move || {
                for round in 0..4 {
                    // Four variants, first wanted by two threads each at the same time.
                    let width = [4, 8, 12, 20][(thread + round) % 4];
                    let options = Options::new().causal(thread % 2 == 0);
                    let problem = problem([1, 2, 1], [20 + thread, 40 + round], [width, width], options);
                    let operands = Operands::random(&problem, thread as u64);
                    check(gpu, &problem, &operands);
                    if thread % 3 == 0 {
                        let buffers = Buffers::new(device, &problem, &operands);
                        buffers.q.destroy();
                        expect_error!(gpu.prepare_forward(&problem, &buffers.views()), Error::Gpu { .. });
                    }
                }
            });
        }
    });
}

mod backward {
    use super::*;

    /// A result in a buffer full of sentinels.
    struct Target {
        place: Place,
        buffer: wgpu::Buffer,
    }

    impl Target {
        fn new(device: &Device, layout: Layout, place: Place) -> Self {
            Target { place, buffer: buffer(device, &vec![SENTINEL; place.end(layout) + 9]) }
        }

        /// Reads the result, packed; nothing may have been written beside it.
        fn read(&self, device: &Device, layout: Layout) -> Vec<f32> {
            let mut data = read(device, &self.buffer);
            let mut packed = vec![f32::NAN; self.place.extents.iter().product()];
            for (at, to) in self.place.elements(layout) {
                packed[to] = std::mem::replace(&mut data[at], SENTINEL);
            }
            assert!(data.iter().all(|&x| x == SENTINEL), "wrote outside of the view");
            packed
        }
    }

    /// Runs both passes of `problem` with q, k and v side by side in the rows of one buffer, everything else in
    /// padded rows, and everything `offset` elements in.
    fn run_strided(gpu: &Attention, problem: &Problem, backward: &Backward, offset: usize, pad: usize) {
        let device = gpu.device().unwrap();
        let Shape { batch, heads, kv_heads, seq_q: seq, head_dim: width, .. } = *problem.shape();
        let layout = problem.options().layout;
        let what = format!("{problem}, offset {offset}, pad {pad}");

        // NaN wherever no operand lies: whatever is read from there shows.
        let fused_row = (heads + 2 * kv_heads) * width + pad;
        let fused_place = |heads: usize, first: usize| Place {
            extents: [batch, heads, seq, width],
            offset: offset + first * width,
            strides: [(seq * fused_row) as u64, width as u64, fused_row as u64],
        };
        // Heads, batches, positions from the outside in: neither of the two layouts.
        let row = width + pad;
        let padded = |heads: usize| Place {
            extents: [batch, heads, seq, width],
            offset,
            strides: [(seq * row) as u64, (batch * seq * row) as u64, row as u64],
        };
        let dense = |len: usize| Place { extents: [1, 1, 1, len], offset, strides: [0; 3] };
        let source = |parts: &[(Place, &Vec<f32>)]| {
            let len = parts.iter().map(|(place, _)| place.end(layout)).max().unwrap();
            let mut data = vec![f32::NAN; len];
            for (place, packed) in parts {
                place.elements(layout).for_each(|(at, from)| data[at] = packed[from]);
            }
            buffer(device, &data)
        };
        let operands = &backward.operands;
        let places = [fused_place(heads, 0), fused_place(kv_heads, heads), fused_place(kv_heads, heads + kv_heads)];
        let [q, k, v] = places;
        let fused = source(&[(q, &operands.q), (k, &operands.k), (v, &operands.v)]);
        let sinks = operands.sink_logits.as_ref().map(|sinks| source(&[(dense(heads), sinks)]));
        let d_o = source(&[(padded(heads), &backward.d_o)]);
        let d_lse = backward.d_lse.as_ref().map(|d_lse| source(&[(dense(batch * heads * seq), d_lse)]));

        let target = |place| Target::new(device, layout, place);
        let [o, lse] = [padded(heads), dense(batch * heads * seq)].map(target);
        let [d_q, d_k, d_v] = [heads, kv_heads, kv_heads].map(|heads| target(padded(heads)));
        let d_sink_logits = sinks.as_ref().map(|_| target(dense(heads)));
        let at_offset = |buffer| TensorView::new(buffer).offset(offset as u64);
        let buffers = BackwardBuffers::new(
            ForwardBuffers::new(
                q.view(&fused),
                k.view(&fused),
                v.view(&fused),
                o.place.view(&o.buffer),
                at_offset(&lse.buffer),
            )
            .sink_logits(sinks.as_ref().map(at_offset)),
            padded(heads).view(&d_o),
            d_q.place.view(&d_q.buffer),
            d_k.place.view(&d_k.buffer),
            d_v.place.view(&d_v.buffer),
        )
        .d_lse(d_lse.as_ref().map(at_offset))
        .d_sink_logits(d_sink_logits.as_ref().map(|target| at_offset(&target.buffer)));
        let forward = gpu.prepare_forward(problem, &buffers.forward).unwrap();
        let prepared = gpu.prepare_backward(problem, &buffers).unwrap();
        let vec4 = [offset, pad, width].iter().all(|n| n % 4 == 0);
        assert_eq!(prepared.plan().passes.last().unwrap().variant.vec4, vec4, "{what}");
        // What one pass leaves the next one reads: no barrier of the caller's stands between them.
        submit(device, |encoder| {
            forward.encode(encoder);
            prepared.encode(encoder);
        });
        for target in [&o, &lse] {
            target.read(device, layout);
        }
        let actual = Gradients::new(d_q.read(device, layout), d_k.read(device, layout), d_v.read(device, layout))
            .d_sink_logits(d_sink_logits.map(|target| target.read(device, layout)));
        let expected = backward.check(gpu, problem);
        if vec4 {
            assert!(actual == expected, "{what}: not the bits of the host path");
        } else {
            backward.agree(&actual, &expected).unwrap_or_else(|error| panic!("{what}: {error}"));
        }
    }

    #[test]
    fn offsets_and_strides() {
        let Some(gpu) = gpu() else { return };
        let narrow = problem([3, 2, 1], [37, 37], [5, 5], Options::new().causal(true).layout(Layout::Bhsd));
        for problem in [typical(), narrow] {
            let backward = Backward::random(&problem, 1);
            for offset in [0, 1, 4, 60, 65, 1024] {
                for pad in [0, 4, 3] {
                    run_strided(gpu, &problem, &backward, offset, pad);
                }
            }
        }
    }

    #[test]
    fn prepared_once_encoded_often() {
        let Some(gpu) = gpu() else { return };
        let device = gpu.device().unwrap();
        let problem = typical();
        let mut backward = Backward::random(&problem, 4);
        let buffers = GradientBuffers::new(device, &problem, &backward);
        let forward = gpu.prepare_forward(&problem, &buffers.views().forward).unwrap();
        let prepared = gpu.prepare_backward(&problem, &buffers.views()).unwrap();

        // Several passes in one encoder, several dispatches in one pass, and each kernel by itself.
        submit(device, |encoder| {
            forward.encode(encoder);
            (0..3).for_each(|_| prepared.encode(encoder));
            let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
            (0..3).for_each(|_| prepared.encode_in(&mut pass));
            (0..prepared.plan().passes.len()).for_each(|index| prepared.encode_pass_in(&mut pass, index));
        });
        assert!(buffers.read(device) == backward.check(gpu, &problem));

        // What is new in the buffers is what the next run sees.
        backward.d_o.rotate_left(77);
        backward.operands.k.rotate_left(16);
        for (buffer, data) in [(&buffers.d_o, &backward.d_o), (&buffers.forward.k, &backward.operands.k)] {
            device.queue().write_buffer(buffer, 0, bytemuck::cast_slice(data));
        }
        submit(device, |encoder| forward.encode(encoder));
        assert!(buffers.run(device, &prepared) == backward.check(gpu, &problem));
    }

    #[test]
    fn views_that_do_not_fit() {
        let Some(gpu) = gpu() else { return };
        let device = gpu.device().unwrap();
        let problem = typical();
        let backward = Backward::random(&problem, 7);
        let buffers = GradientBuffers::new(device, &problem, &backward);
        let good = buffers.views();
        let forward = good.forward;
        let prepare = |buffers: BackwardBuffers<'_>| gpu.prepare_backward(&problem, &buffers);
        prepare(good).unwrap();

        // q, o and their gradients have 2 * 50 * 4 * 16 elements, those of k and v half of them, lse 2 * 4 * 50.
        expect_error!(
            prepare(good.d_lse(good.d_lse.map(|d_lse| d_lse.offset(1)))),
            Error::BufferTooSmall { operand: "d_lse", needed: 1604, actual: 1600 }
        );
        expect_error!(
            prepare(good.d_o(TensorView::new(&buffers.d_k))),
            Error::BufferTooSmall { operand: "d_o", needed: 25_600, actual: 12_800 }
        );
        expect_error!(
            prepare(good.d_q(good.d_q.offset(4))),
            Error::BufferTooSmall { operand: "d_q", needed: 25_616, actual: 25_600 }
        );
        expect_error!(
            prepare(good.d_sink_logits(good.d_sink_logits.map(|d_sink| d_sink.offset(1)))),
            Error::BufferTooSmall { operand: "d_sink_logits", needed: 20, actual: 16 }
        );
        let plain = empty(device, 1 << 16, BufferUsages::COPY_DST);
        for (views, named) in [
            (good.d_o(TensorView::new(&plain)), "d_o"),
            (good.d_k(TensorView::new(&plain)), "d_k"),
            (good.forward(forward.o(TensorView::new(&plain))), "o"),
        ] {
            match prepare(views) {
                Err(Error::BufferUsage { operand, needed: BufferUsages::STORAGE, actual: BufferUsages::COPY_DST }) => {
                    assert_eq!(operand, named);
                }
                other => panic!("{named}: {other:?}"),
            }
        }
        // Packed strides of d_k are [1600, 16, 32].
        for strides in [[1600, 16, 0], [1600, 15, 32], [0, 16, 32]] {
            expect_error!(
                prepare(good.d_k(good.d_k.strides(strides))),
                Error::OverlappingStrides { operand: "d_k", .. }
            );
        }
        expect_error!(
            prepare(good.d_lse(good.d_lse.map(|d_lse| d_lse.strides([200, 50, 1])))),
            Error::InvalidOption { option: "d_lse", .. }
        );
        let per_head = good.d_sink_logits.unwrap();
        expect_error!(
            prepare(good.d_sink_logits(per_head.strides([4, 4, 1]))),
            Error::InvalidOption { option: "d_sink_logits", .. }
        );

        // After all that, the operator and the buffers are as good as before.
        buffers.save(device, &gpu.forward(&problem, &backward.operands.inputs()).unwrap());
        assert!(buffers.run(device, &prepare(good).unwrap()) == backward.check(gpu, &problem));
    }

    /// The gradients of a fused projection: side by side in each row of one buffer, head by head, or one after the other.
    #[test]
    fn gradients_of_a_fused_projection() {
        let Some(gpu) = gpu() else { return };
        let device = gpu.device().unwrap();
        let problem = typical();
        let Shape { batch, heads, kv_heads, seq_q: seq, head_dim: width, .. } = *problem.shape();
        let case = Backward::random(&problem, 7);
        let expected = case.run(gpu, &problem);
        let buffers = GradientBuffers::new(device, &problem, &case);
        buffers.save(device, &gpu.forward(&problem, &case.operands.inputs()).unwrap());
        let all = heads + 2 * kv_heads;
        for (start, strides) in [
            // [batch, seq, heads of q, k and v, width]
            (1, [seq * all * width, width, all * width]),
            // [batch, heads of q, k and v, seq, width]
            (seq, [all * seq * width, seq * width, width]),
            // [heads of q, k and v, batch, seq, width]
            (batch * seq, [seq * width, batch * seq * width, width]),
        ] {
            let fused = buffer(device, &vec![f32::NAN; batch * seq * all * width]);
            let part = |first: usize| {
                TensorView::new(&fused).offset((first * start * width) as u64).strides(strides.map(|n| n as u64))
            };
            let (d_q, d_k, d_v) = (part(0), part(heads), part(heads + kv_heads));
            let prepared = gpu.prepare_backward(&problem, &buffers.views().d_q(d_q).d_k(d_k).d_v(d_v)).unwrap();
            submit(device, |encoder| prepared.encode(encoder));
            let written = read(device, &fused);
            for (view, heads, expected) in
                [(d_q, heads, &expected.d_q), (d_k, kv_heads, &expected.d_k), (d_v, kv_heads, &expected.d_v)]
            {
                let place = Place {
                    extents: [batch, heads, seq, width],
                    offset: view.offset as usize,
                    strides: view.strides.unwrap(),
                };
                for (at, packed) in place.elements(problem.options().layout) {
                    assert_eq!(written[at].to_bits(), expected[packed].to_bits(), "{strides:?}, element {packed}");
                }
            }
        }
    }

    #[test]
    fn results_need_buffers_of_their_own() {
        let Some(gpu) = gpu() else { return };
        let device = gpu.device().unwrap();
        let problem = typical();
        let buffers = GradientBuffers::new(device, &problem, &Backward::random(&problem, 7));
        let good = buffers.views();
        let forward = good.forward;
        let prepare = |buffers: BackwardBuffers<'_>| gpu.prepare_backward(&problem, &buffers);
        expect_error!(prepare(good.d_q(forward.q)), Error::Aliasing { output: "d_q", other: "q" });
        expect_error!(prepare(good.d_q(good.d_o)), Error::Aliasing { output: "d_q", other: "d_o" });
        expect_error!(prepare(good.d_v(good.d_k)), Error::Aliasing { output: "d_k", other: "d_v" });
        expect_error!(
            prepare(good.d_sink_logits(forward.sink_logits)),
            Error::Aliasing { output: "d_sink_logits", other: "sink_logits" }
        );

        // Gradients in one buffer that share an element: the last head of d_q is the first of d_k, or of d_v.
        let fused = empty(device, 2 * 50 * 8 * 16 * 4, BufferUsages::STORAGE);
        let part = |first: u64| TensorView::new(&fused).offset(first * 16).strides([50 * 128, 16, 128]);
        for [q, k, v, other] in [[0, 3, 6, 0], [0, 5, 3, 1]] {
            let buffers = good.d_q(part(q)).d_k(part(k)).d_v(part(v));
            let (error, other) = (prepare(buffers).unwrap_err(), ["d_k", "d_v"][other as usize]);
            assert!(matches!(error, Error::Aliasing { output: "d_q", other: o } if o == other), "{error}");
        }
        let buffers = good.d_q(part(0)).d_k(part(4)).d_v(part(5));
        expect_error!(prepare(buffers), Error::Aliasing { output: "d_k", other: "d_v" });

        // Inputs may share: nothing is written to them.
        prepare(good.d_o(forward.o).d_lse(forward.lse)).unwrap();
    }

    #[test]
    fn sink_logits_as_the_options_say() {
        let Some(gpu) = gpu() else { return };
        let with = typical();
        let without = Problem::new(*with.shape(), with.options().sink_logits(SinkLogits::None)).unwrap();
        let backward = Backward::random(&with, 8);
        let buffers = GradientBuffers::new(gpu.device().unwrap(), &with, &backward);
        let views = buffers.views();
        expect_error!(
            gpu.prepare_backward(&with, &views.d_sink_logits(None)),
            Error::MissingOperand { operand: "d_sink_logits" }
        );
        let forward = views.forward.sink_logits(None);
        expect_error!(
            gpu.prepare_backward(&with, &views.forward(forward)),
            Error::MissingOperand { operand: "sink_logits" }
        );
        expect_error!(
            gpu.prepare_backward(&without, &views.forward(forward)),
            Error::UnexpectedOperand { operand: "d_sink_logits", .. }
        );
        gpu.prepare_backward(&without, &views.forward(forward).d_sink_logits(None)).unwrap();
        expect_error!(Attention::cpu().prepare_backward(&with, &views), Error::NeedsGpu { call: "prepare_backward" });
    }

    #[test]
    fn host_slices_of_wrong_length() {
        let Some(gpu) = gpu() else { return };
        let problem = typical();
        let backward = Backward::random(&problem, 8);
        let saved = backward.saved(&problem);
        for attention in [gpu, &Attention::cpu()] {
            let run = |saved, upstream| attention.backward(&problem, &backward.operands.inputs(), saved, &upstream);
            let upstream = backward.upstream();
            run(&saved, upstream).unwrap();
            let short = saved.clone().lse(saved.lse[1..].to_vec());
            expect_error!(
                run(&short, upstream),
                Error::OperandLength { operand: "lse", expected: 400, actual: 399, .. }
            );
            expect_error!(
                run(&saved, upstream.d_o(&[])),
                Error::OperandLength { operand: "d_o", expected: 6400, actual: 0, .. }
            );
            expect_error!(
                run(&saved, upstream.d_lse(&backward.d_o[..])),
                Error::OperandLength { operand: "d_lse", expected: 400, actual: 6400, .. }
            );
        }
    }
}
