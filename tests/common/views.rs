//! Operands in half precision wherever they may lie in a buffer.

use sink_attention::cpu::reference;
use sink_attention::plan::{Kernel, MicroKernel, Tiling};
use sink_attention::wgpu::{self, BufferUsages};
use sink_attention::{
    Attention, BackwardBuffers, DType, Device, Element, ForwardBuffers, Gradients, Layout, Output, Problem, TensorView,
};

use super::buffers::{empty, submit};
use sink_attention::testing::gradients::Backward;
use sink_attention::testing::operands::agree;

/// A buffer of halves, whole words of them.
fn buffer<T: Element>(device: &Device, data: &[T]) -> wgpu::Buffer {
    let mut data = data.to_vec();
    data.resize(data.len().next_multiple_of(2), T::default());
    let usage = BufferUsages::STORAGE | BufferUsages::COPY_SRC | BufferUsages::COPY_DST;
    let buffer = empty(device, size_of_val(&data[..]) as u64, usage);
    device.queue().write_buffer(&buffer, 0, bytemuck::cast_slice(&data));
    buffer
}

fn read<T: Element>(device: &Device, buffer: &wgpu::Buffer) -> Vec<T> {
    let words = super::buffers::read(device, buffer);
    bytemuck::cast_slice(&words).to_vec()
}

/// A place for an operand in a buffer that holds other things, too: rows of `width` in rows of `row` elements.
struct Place {
    extents: [usize; 4],
    offset: usize,
    row: usize,
}

impl Place {
    /// Positions, heads, batches from the inside out; neither of the layouts where the rows are padded.
    fn strides(&self) -> [usize; 3] {
        let [_, heads, seq, _] = self.extents;
        [heads * seq * self.row, seq * self.row, self.row]
    }

    fn len(&self) -> usize {
        self.offset + self.extents[..3].iter().product::<usize>() * self.row
    }

    /// Elements of the buffer and of the packed operand.
    fn elements(&self, layout: Layout) -> Vec<(usize, usize)> {
        let [batch, heads, seq, width] = self.extents;
        let (own, packed) = (self.strides(), layout.strides(heads, seq, width).map(|stride| stride as usize));
        let at = |strides: [usize; 3], row: [usize; 3]| (0..3).map(|axis| strides[axis] * row[axis]).sum::<usize>();
        let rows = (0..batch).flat_map(|b| (0..heads).flat_map(move |h| (0..seq).map(move |i| [b, h, i])));
        rows.flat_map(|row| (0..width).map(move |d| (self.offset + at(own, row) + d, at(packed, row) + d))).collect()
    }

    fn view<'a>(&self, buffer: &'a wgpu::Buffer) -> TensorView<'a> {
        TensorView::new(buffer).offset(self.offset as u64).strides(self.strides().map(|stride| stride as u64))
    }

    /// A buffer with the operand at its place and `rest` everywhere else.
    fn fill<T: Element>(&self, device: &Device, layout: Layout, data: &[T], rest: f32) -> wgpu::Buffer {
        let mut elements = vec![T::from_f32(rest); self.len() + 5];
        self.elements(layout).into_iter().for_each(|(at, packed)| elements[at] = data[packed]);
        buffer(device, &elements)
    }

    /// The operand out of its place; everything else must be `rest` still.
    fn take<T: Element>(&self, device: &Device, layout: Layout, buffer: &wgpu::Buffer, rest: f32) -> Vec<T> {
        let mut all = read::<T>(device, buffer);
        let mut data = vec![T::default(); self.extents.iter().product()];
        for (at, packed) in self.elements(layout) {
            data[packed] = std::mem::replace(&mut all[at], T::from_f32(rest));
        }
        let written = all[..self.len() + 5].iter().position(|&x| x != T::from_f32(rest));
        assert_eq!(written, None, "wrote outside of the view");
        data
    }
}

/// Runs both passes on operands `offset` elements into their buffers and in rows with `pad` elements between them, with
/// tiles of our choice, with or without o_lo, against the definition.
pub fn run_at<T: Element>(
    gpu: &Attention,
    problem: &Problem,
    case: &Backward<T>,
    [offset, pad]: [usize; 2],
    tiles: &[(Kernel, Tiling)],
    keeps_o_lo: bool,
) {
    const SENTINEL: f32 = -12345.0;
    let device = gpu.device().unwrap();
    let (operands, layout) = (&case.operands, problem.options().layout);
    let s = problem.shape();
    let place = |heads, seq, width: usize| Place { extents: [s.batch, heads, seq, width], offset, row: width + pad };
    let queries = |width| place(s.heads, s.seq_q, width);
    let keys = |width| place(s.kv_heads, s.seq_k, width);
    // NaN wherever no operand lies: whatever is read from there shows.
    let given = |place: &Place, data: &[T]| place.fill(device, layout, data, f32::NAN);
    let result = |place: &Place| {
        place.fill(device, layout, &vec![T::from_f32(SENTINEL); place.extents.iter().product()], SENTINEL)
    };
    let [q_at, o_at, k_at, v_at] = [queries(s.head_dim), queries(s.value_dim), keys(s.head_dim), keys(s.value_dim)];
    let [q, k, v, d_o] =
        [given(&q_at, &operands.q), given(&k_at, &operands.k), given(&v_at, &operands.v), given(&o_at, &case.d_o)];
    let [o, d_q, d_k, d_v] = [result(&o_at), result(&q_at), result(&k_at), result(&v_at)];
    let o_lo = keeps_o_lo.then(|| result(&o_at));
    // f32 operands begin anywhere, too.
    let single = |data: &[f32]| super::buffers::buffer(device, &[&vec![f32::NAN; offset], data].concat());
    let rows = problem.lse_shape().iter().product();
    let sinks = single(operands.sink_logits.as_ref().unwrap());
    let [lse, d_sinks] = [rows, s.heads].map(|len| single(&vec![f32::NAN; len]));
    let d_lse = case.d_lse.as_deref().map(single);
    let at = |buffer| TensorView::new(buffer).offset(offset as u64);
    let forward = ForwardBuffers::new(q_at.view(&q), k_at.view(&k), v_at.view(&v), o_at.view(&o), at(&lse))
        .sink_logits(at(&sinks))
        .o_lo(o_lo.as_ref().map(|o_lo| o_at.view(o_lo)));
    let backward = BackwardBuffers::new(forward, o_at.view(&d_o), q_at.view(&d_q), k_at.view(&d_k), v_at.view(&d_v))
        .d_lse(d_lse.as_ref().map(at))
        .d_sink_logits(at(&d_sinks));
    let forward = gpu.prepare_forward_with(problem, &forward, tiles).unwrap();
    let backward = gpu.prepare_backward_with(problem, &backward, tiles).unwrap();
    let multiples_of = |n: usize| [offset, pad, s.head_dim, s.value_dim].iter().all(|number| number % n == 0);
    let variant = &forward.plan().passes.iter().find(|pass| pass.variant.kernel == Kernel::FORWARD).unwrap().variant;
    assert_eq!(variant.vec4, multiples_of(4), "{problem}, offset {offset}, pad {pad}");
    let copies =
        variant.micro_kernel == MicroKernel::Fragments && (T::DTYPE == DType::F16 || variant.multiplies_bf16());
    let vec8 = copies && multiples_of(8) && s.head_dim.max(s.value_dim) <= 64;
    assert_eq!(variant.vec8, vec8, "{problem}, offset {offset}, pad {pad}");
    submit(device, |encoder| {
        forward.encode(encoder);
        backward.encode(encoder);
    });
    let single = |buffer| super::buffers::read(device, buffer)[offset..].to_vec();
    if let Some(o_lo) = &o_lo {
        o_at.take::<T>(device, layout, o_lo, SENTINEL);
    }
    let output = Output::new(o_at.take::<T>(device, layout, &o, SENTINEL), single(&lse));
    let what = format!("{problem}, offset {offset}, pad {pad}, {tiles:?}, o_lo: {keeps_o_lo}");
    let expected = reference::forward(problem, &operands.inputs()).unwrap();
    agree(&output, &expected).unwrap_or_else(|error| panic!("{what}: {error}"));
    let gradients = Gradients::new(
        q_at.take::<T>(device, layout, &d_q, SENTINEL),
        k_at.take(device, layout, &d_k, SENTINEL),
        v_at.take(device, layout, &d_v, SENTINEL),
    )
    .d_sink_logits(single(&d_sinks));
    case.agree(&gradients, &case.expected(problem)).unwrap_or_else(|error| panic!("{what}: {error}"));
}
