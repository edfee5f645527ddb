//! Kernels on matrices where subgroups have several sizes: they look at the size that they have got, and leave their rows to the portable kernel
//! where it is another than they are built for.
//!
//! The tests tell the crate that a device with one size of subgroups has several. Kernels are built for the size it has, and for one that it never gives.

use crate::common::{cooperative, fragments};
use sink_attention::device::{BufferElement, DeviceBuffer};
use sink_attention::half::{bf16, f16};
use sink_attention::plan::{CooperativeMatrices, ElementLayout, Kernel, MicroKernel, Plan, Tiling};
use sink_attention::testing::gradients::Backward;
use sink_attention::{
    Attention, BackwardBuffers, Device, Element, ForwardBuffers, Options, Prepared, Problem, Shape, SinkLogits, Window,
};

/// A layout of twice as many lanes as llvmpipe has: four elements of a row each.
fn layout_of(side: u32, lanes: u32) -> ElementLayout {
    let across = side / 4;
    let place = |lane: u32, component: u32| lane / across * side + lane % across * 4 + component;
    let components = side * side / lanes;
    let elements: Vec<u32> =
        (0..lanes).flat_map(|lane| (0..components).map(move |component| place(lane, component))).collect();
    ElementLayout::new(side, lanes, &elements).unwrap()
}

/// The device, with other matrices than it has.
fn with(
    attention: &Attention,
    micro_kernel: MicroKernel,
    edit: impl FnOnce(CooperativeMatrices) -> CooperativeMatrices,
) -> Attention {
    let device = attention.device().unwrap();
    let matrices = device.capabilities().cooperative.unwrap();
    let device: Device = device.clone().with_matrices(Some(edit(matrices)));
    Attention::on(device).with_micro_kernel(micro_kernel)
}

/// Subgroups of a size that no kernel gets.
fn wrong(matrices: CooperativeMatrices) -> CooperativeMatrices {
    let lanes = if matrices.lanes == 2 * matrices.side { matrices.side } else { 2 * matrices.side };
    let elements = matrices.elements.map(|_| layout_of(matrices.side, lanes));
    matrices.lanes(lanes).guarded(true).elements(elements)
}

/// A problem of several tiles with hidden pairs, sink logits and grouped heads.
fn problem<T: Element>() -> Problem {
    let shape = Shape { batch: 1, heads: 4, kv_heads: 2, seq_q: 37, seq_k: 45, head_dim: 16, value_dim: 16 };
    let options = Options::new().causal(true).window(Window::keys(30)).sink_logits(SinkLogits::PerHead);
    Problem::new(shape, options.dtype(T::DTYPE)).unwrap()
}

/// Records the passes that are chosen.
fn run(device: &Device, prepared: &Prepared, chosen: impl Fn(usize) -> bool) {
    let mut encoder = device.wgpu().create_command_encoder(&Default::default());
    let mut compute = encoder.begin_compute_pass(&Default::default());
    (0..prepared.plan().passes.len()).filter(|n| chosen(*n)).for_each(|n| prepared.encode_pass_in(&mut compute, n));
    drop(compute);
    device.queue().submit([encoder.finish()]);
}

/// The passes that compute for the reports.
fn is_fallback(plan: &Plan, n: usize) -> bool {
    plan.passes[n].variant.fallback.is_some()
}

/// Rows of results that still hold what was there before.
fn untouched<T: Element + BufferElement>(device: &Device, buffer: &DeviceBuffer, width: usize) -> usize {
    let [data] = device.download([(buffer, 0..buffer.wgpu().size() as usize / size_of::<T>())]).unwrap();
    let data: Vec<T> = data;
    data.chunks(width).filter(|row| row.iter().all(|x| x.to_f32() == POISON)).count()
}

/// No result, and a number of both types.
const POISON: f32 = -1024.0;

/// Runs both passes, without the portable kernel and with it. The kernels on matrices write all rows, or none of them. Returns the bits of
/// o and the gradients.
fn both_passes<T: Element + BufferElement>(
    attention: &Attention,
    tiles: &[(Kernel, Tiling)],
    computes: bool,
) -> Vec<u8> {
    let device = attention.device().unwrap();
    let problem = problem::<T>();
    let case: Backward<T> = Backward::random(&problem, 17).cast();
    let s = problem.shape();
    let up = |data: &[T]| device.upload("operand", data).unwrap();
    let poison = |rows: usize| up(&vec![T::from_f32(POISON); rows * 16]);
    let [q_rows, k_rows] = [s.heads * s.seq_q, s.kv_heads * s.seq_k];
    let inputs = case.operands.inputs();
    let [q, k, v] = [inputs.q, inputs.k, inputs.v].map(up);
    let sinks = device.upload("sink_logits", inputs.sink_logits.unwrap()).unwrap();
    let (o, lse) = (poison(q_rows), device.upload("lse", &vec![POISON; q_rows]).unwrap());
    let forward = ForwardBuffers::new(&q, &k, &v, &o, &lse).sink_logits(sinks.view());
    let prepared = attention.prepare_forward_with(&problem, &forward, tiles).unwrap();
    let plan = prepared.plan();
    assert!(plan.passes.iter().any(|pass| pass.variant.matrices.is_some()));
    run(device, &prepared, |n| !is_fallback(plan, n));
    let expected = |rows: usize| if computes { 0 } else { rows };
    assert_eq!(untouched::<T>(device, &o, 16), expected(q_rows), "rows of o that the kernels on matrices leave");
    run(device, &prepared, |_| true);
    assert_eq!(untouched::<T>(device, &o, 16), 0);
    drop(prepared);

    let d_o = up(&case.d_o);
    let [d_q, d_k, d_v] = [q_rows, k_rows, k_rows].map(poison);
    let d_sinks = device.upload("d_sink_logits", &[POISON; 4]).unwrap();
    let backward = BackwardBuffers::new(forward, &d_o, &d_q, &d_k, &d_v).d_sink_logits(d_sinks.view());
    let prepared = attention.prepare_backward_with(&problem, &backward, tiles).unwrap();
    let plan = prepared.plan();
    run(device, &prepared, |n| !is_fallback(plan, n));
    for (name, buffer, rows) in [("d_q", &d_q, q_rows), ("d_k", &d_k, k_rows), ("d_v", &d_v, k_rows)] {
        assert_eq!(
            untouched::<T>(device, buffer, 16),
            expected(rows),
            "rows of {name} that the kernels on matrices leave"
        );
    }
    run(device, &prepared, |_| true);
    for buffer in [&d_q, &d_k, &d_v] {
        assert_eq!(untouched::<T>(device, buffer, 16), 0);
    }
    let bits = [&o, &d_q, &d_k, &d_v].map(|buffer| {
        let [data] = device.download([(buffer, 0..buffer.wgpu().size() as usize / size_of::<T>())]).unwrap();
        let data: Vec<T> = data;
        bytemuck::cast_slice(&data).to_vec()
    });

    // The numbers are right.
    let output = crate::cooperative::forward_agrees(attention, &problem, &case);
    let gradients = case.run_with(attention, &problem, &crate::cooperative::exact(&output));
    case.agree(&gradients, &case.expected(&problem)).unwrap_or_else(|error| panic!("{problem}: {error}"));
    bits.concat()
}

#[test]
fn a_wrong_size_costs_time_and_no_result() {
    let Some(strips) = cooperative() else { return };
    let attention = with(&strips, MicroKernel::Cooperative, wrong);
    both_passes::<f16>(&attention, &[], false);
    both_passes::<bf16>(&attention, &[], false);
}

#[test]
fn a_wrong_size_of_fragments_costs_time_and_no_result() {
    let Some(attention) = fragments() else { return };
    both_passes::<f16>(&with(&attention, MicroKernel::Fragments, wrong), &[], false);
}

/// The size is found, and kernels built for it compute, with the bits that they have where there is no other.
#[test]
fn the_size_that_kernels_get_is_found() {
    let Some(attention) = cooperative() else { return };
    let device = attention.device().unwrap();
    let matrices = device.capabilities().cooperative.unwrap();
    let probed = wrong(matrices).probe(device.wgpu(), device.queue(), device.capabilities()).unwrap();
    assert_eq!(probed.lanes, matrices.lanes);
    let guarded = with(&attention, MicroKernel::Cooperative, |matrices| matrices.guarded(true));
    // Of one stage and of two. In one stage the token scales of bf16 wait in workgroup memory, where subgroups have several sizes.
    for tiling in ["cooperative 2x1x1x1", "cooperative 2x1x1x2"] {
        let tiles = [Kernel::FORWARD, Kernel::D_Q, Kernel::D_KV].map(|kernel| (kernel, tiling.parse().unwrap()));
        assert_eq!(both_passes::<f16>(&guarded, &tiles, true), both_passes::<f16>(&attention, &tiles, true));
        assert_eq!(both_passes::<bf16>(&guarded, &tiles, true), both_passes::<bf16>(&attention, &tiles, true));
    }
}
