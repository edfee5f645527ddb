//! The micro-kernel that computes with the elements of fragments, against the definition.
//!
//! It takes an adapter with cooperative matrices whose elements have a known layout: the driver that tests/software-vulkan.sh installs has
//! them. That driver compiles one of these kernels for seconds, and a wide one for minutes, so that the widths are narrow here and the
//! variants few. Nothing but numbers differs between the problems of a variant.

use crate::common::caches::{Both, config, filled};
use crate::common::views::run_at;
use crate::common::{bf16_fragments, fragments, with_others};
use crate::cooperative::{exact, explained, forward_agrees, is_on_matrices, random};
use sink_attention::cache::{CacheKind, Decode, DecodeBuffers, DecodeTiles, DecodeTiling, TreeMask};
use sink_attention::cpu::reference;
use sink_attention::device::{adapters, device_descriptor};
use sink_attention::half::{bf16, f16};
use sink_attention::plan::{CooperativeMatrices, DeviceClass, ElementLayout, Kernel, LoopHints, MicroKernel, Tiling};
use sink_attention::testing::compare::accepted;
use sink_attention::testing::gradients::Backward;
use sink_attention::testing::operands::{agree, problem};
use sink_attention::wgpu;
use sink_attention::{
    Attention, Axes, DType, Device, Element, Error, Gradients, Layout, Lengths, Options, Output, Problem, Shape,
    SinkLogits, Window,
};

/// Both passes, with gradients whose delta is summed anew.
pub fn run<T: Element>(attention: &Attention, problem: &Problem, case: &Backward<T>) -> (Output<T>, Gradients<T>) {
    let output = attention.forward(problem, &case.operands.inputs()).unwrap();
    let gradients = case.run_with(attention, problem, &exact(&output));
    (output, gradients)
}

/// The bits of all results.
pub fn bits<T: Element>((output, gradients): &(Output<T>, Gradients<T>)) -> [Vec<u8>; 2] {
    let elements = [&output.o[..], &gradients.d_q, &gradients.d_k, &gradients.d_v].concat();
    let singles = [&output.lse[..], gradients.d_sink_logits.as_deref().unwrap_or_default()].concat();
    [bytemuck::cast_slice(&elements).to_vec(), bytemuck::cast_slice(&singles).to_vec()]
}

/// Holds both passes against the definition: by norm, and by element as far as low precision explains.
fn check<T: Element>(attention: &Attention, problem: &Problem, case: &Backward<T>) {
    let plans = [attention.plan_forward(problem), attention.plan_backward(problem)];
    assert!(plans.iter().all(|plan| is_on_matrices(plan.as_ref().unwrap(), MicroKernel::Fragments)), "{problem}");
    let output = forward_agrees(attention, problem, case);
    let gradients = case.run_with(attention, problem, &exact(&output));
    case.agree(&gradients, &case.expected(problem)).unwrap_or_else(|error| panic!("{problem}: {error}"));
    explained(problem, case, &output, &gradients);
}

/// What the driver says of the elements where it says it itself, by a kernel that asks it.
#[test]
fn the_layout_that_a_driver_has_is_found() {
    let Some(attention) = fragments() else { return };
    let device = attention.device().unwrap();
    let capabilities = device.capabilities();
    let found = ElementLayout::probe(device.wgpu(), device.queue(), capabilities).unwrap();
    assert_eq!(capabilities.cooperative.unwrap().elements, Some(found));
    let adapters = adapters();
    let adapter = adapters.iter().find(|adapter| adapter.get_info().name == capabilities.name).unwrap();
    assert_eq!(ElementLayout::of_adapter(adapter), Ok(found), "as another device of the adapter says");
    match capabilities.class {
        DeviceClass::Software => assert_eq!(found, ElementLayout::LLVMPIPE),
        DeviceClass::Nvidia => assert_eq!(found, ElementLayout::NVIDIA),
        _ => {}
    }
}

/// A device multiplies bf16 as itself where the crate has opened it with what that needs, and only there. A host's descriptor is obeyed.
#[test]
fn bf16_is_there_where_the_crate_has_asked_for_it() {
    if fragments().is_none() {
        return;
    }
    let bf16 = |device: &Device| device.capabilities().cooperative.and_then(|matrices| matrices.bf16);
    for adapter in adapters() {
        let offered = CooperativeMatrices::bf16_of_adapter(&adapter);
        assert_eq!(bf16(&Device::open(&adapter).unwrap()), offered.clone().ok(), "{offered:?}");
        let descriptor = device_descriptor(&adapter);
        assert_eq!(bf16(&Device::open_with(&adapter, &descriptor).unwrap()), offered.clone().ok(), "{offered:?}");
        let by_wgpu = || pollster::block_on(adapter.request_device(&descriptor)).unwrap();
        let (device, queue) = by_wgpu();
        assert_eq!(bf16(&Device::from_wgpu_on(&adapter, device, queue)), None, "of a device that wgpu has opened");
        if offered.is_err() {
            let (device, queue) = by_wgpu();
            // SAFETY: the adapter has no bf16, so that the device is not taken for one that has it.
            assert_eq!(bf16(&unsafe { Device::from_wgpu_with_bf16(&adapter, device, queue) }), None);
        }
        let plain = wgpu::DeviceDescriptor { required_features: wgpu::Features::empty(), ..descriptor.clone() };
        let plain = Device::open_with(&adapter, &plain).unwrap();
        assert_eq!((plain.capabilities().cooperative, plain.capabilities().timestamps), (None, false));
        let required_limits = wgpu::Limits { max_bind_groups: 1 << 20, ..descriptor.required_limits.clone() };
        let too_much = wgpu::DeviceDescriptor { required_limits, ..descriptor.clone() };
        let error = Device::open_with(&adapter, &too_much).unwrap_err();
        assert!(matches!(error, Error::DeviceRequest { .. }) && error.to_string().contains("1048576"), "{error}");
    }
}

/// Bands, sizes and heads of all kinds, with one pipeline for each kernel.
#[test]
fn bands_and_sizes() {
    if let Some(attention) = &fragments() {
        bands::<f16>(attention);
    }
}

/// bf16 without scales and units, where the device multiplies it as itself.
mod bf16_as_itself {
    use super::*;

    #[test]
    fn bands_and_sizes() {
        if let Some(attention) = &bf16_fragments() {
            bands::<bf16>(attention);
        }
    }

    /// Operands are multiplied with powers of two of which results know nothing but the last: q and k, the scale of their products, v and
    /// d_o. Visible products go to the ends of f32, below all that a kernel might hide scores with.
    #[test]
    fn operands_to_the_ends_of_the_range() {
        let Some(attention) = &bf16_fragments() else { return };
        let options = Options::new().causal(true).sink_logits(SinkLogits::PerHead);
        for (seed, ([q, k, v, d_o], scale)) in (0..).zip([
            ([100, -100, 20, 0], 1.0),
            ([-100, 100, -20, 0], 1.0),
            ([10, -10, 108, -60], 1.0),
            ([-10, 10, -60, -30], 1.0),
            ([60, 60, 0, 0], 2f32.powi(-120)),
            ([-20, -20, 3, 60], 2f32.powi(40)),
        ]) {
            for sign in [0f32, 1.0, -1.0] {
                let scaled = options.scale(0.3 * scale * if sign < 0.0 { -1.0 } else { 1.0 });
                let (problem, mut case) = random::<bf16>(&problem([1, 2, 1], [40, 70], [8, 8], scaled), seed);
                let multiply = |operand: &mut [bf16], power: i32, sign: f32| {
                    let size = |x: f32| if sign == 0.0 { x } else { sign * x.abs() };
                    operand.iter_mut().for_each(|x| *x = bf16::from_f32(size(x.to_f32()) * 2f32.powi(power)));
                };
                multiply(&mut case.operands.q, q, sign.abs());
                // All products have one sign: that of hidden scores, or the other one.
                multiply(&mut case.operands.k, k, sign);
                multiply(&mut case.operands.v, v, 0.0);
                multiply(&mut case.d_o, d_o, 0.0);
                check(attention, &problem, &case);
            }
        }
        // A scale that the kernels cannot take for a factor: the portable ones compute all rows.
        let (problem, case) = random::<bf16>(&problem([1, 2, 1], [40, 70], [8, 8], options.scale(0.0)), 9);
        check(attention, &problem, &case);
    }

    /// Gradients of one row that differ by 2^80 in size, without units; one element at a time, under a mask.
    #[test]
    fn gradients_of_all_sizes() {
        let Some(attention) = &bf16_fragments() else { return };
        let (problem, mut case) = random::<bf16>(&problem([1, 2, 1], [48, 48], [8, 8], Options::new().causal(true)), 3);
        for (i, d_o) in case.d_o.chunks_mut(2 * 8).enumerate() {
            let factor = 2f32.powi(if i < 32 { -40 } else { 40 });
            d_o.iter_mut().for_each(|x| *x = bf16::from_f32(x.to_f32() * factor));
        }
        check(attention, &problem, &case);
        case.rows_agree(accepted(DType::Bf16), &problem, &case.run(attention, &problem));
        let options = Options::new().mask(Axes::KEYS.seq_q()).sink_logits(SinkLogits::OffByOne);
        let (problem, case) = random::<bf16>(&self::problem([1, 2, 1], [70, 130], [5, 3], options), 5);
        check(attention, &problem, &case);
        // Distances multiply what is left of gradients that cancel.
        for options in [Options::new(), Options::new().causal(true)] {
            let (problem, case) = random::<bf16>(&self::problem([2, 4, 2], [70, 130], [8, 8], options.alibi(true)), 6);
            check(attention, &problem, &case);
        }
    }

    /// The tiles of models, for which a software driver would compile for minutes.
    #[test]
    fn widths_of_models() {
        let Some(attention) = &bf16_fragments() else { return };
        if attention.device().unwrap().capabilities().class == DeviceClass::Software {
            return;
        }
        let options = Options::new().causal(true).sink_logits(SinkLogits::PerHead);
        for (seed, width) in (0..).zip([[64, 64], [128, 128], [80, 80], [64, 128], [256, 256], [33, 20]]) {
            for options in [options, options.window(Window::keys(70)).sink_tokens(4), options.scale(-0.2)] {
                let (problem, case) = random::<bf16>(&problem([1, 4, 2], [190, 333], width, options), seed);
                check(attention, &problem, &case);
                hidden_keys_leave_no_trace::<bf16>(
                    attention,
                    options.window(Window::keys(17)).query_offset(-10),
                    width,
                );
            }
        }
    }
}

fn bands<T: Element>(attention: &Attention) {
    let new = Options::new().sink_logits(SinkLogits::PerHead);
    let window = new.window(Window::keys(17)).sink_tokens(3);
    for (seed, (heads, seq, options)) in (0..).zip([
        ([1, 4, 2], [45, 70], new.causal(true)),
        ([2, 2, 1], [70, 70], window),
        ([1, 2, 1], [63, 65], new),
        ([1, 1, 1], [1, 130], window.layout(Layout::Bhsd)),
        ([1, 2, 2], [40, 130], new.window(Window::new(9, 4)).layout(Layout::Bhsd)),
        // Whole tiles are hidden between the window and the sink tokens, and full ones are few.
        ([1, 2, 1], [130, 130], new.window(Window::keys(66)).sink_tokens(33)),
        // The first 30 queries see nothing.
        ([1, 2, 1], [50, 40], new.causal(true).query_offset(-30)),
        ([1, 2, 1], [3, 3], new.causal(true)),
    ]) {
        let (problem, case) = random::<T>(&problem(heads, seq, [8, 8], options), seed);
        check(attention, &problem, &case);
    }
    hidden_keys_leave_no_trace::<T>(attention, window.query_offset(-10), [8, 8]);
    maxima_are_raised_in_full_tiles::<T>(attention, new);
    chunks_and_rows::<T>(attention, new.window(Window::keys(70)).sink_tokens(3));
    let (problem, case) = random::<T>(&problem([2, 4, 2], [150, 150], [8, 8], new.causal(true)), 1);
    the_largest_scores(attention, &problem, &case);
    let first = bits(&run(attention, &problem, &case));
    assert!((0..2).all(|_| bits(&run(attention, &problem, &case)) == first), "other bits of the same problem");
}

/// row_max, and o and lse with the bits that they have without it.
fn the_largest_scores<T: Element>(attention: &Attention, problem: &Problem, case: &Backward<T>) {
    let inputs = case.operands.inputs();
    let (output, row_max) = attention.forward_with_row_max(problem, &inputs).unwrap();
    let expected = reference::row_max(problem, &inputs).unwrap();
    let off = row_max.iter().zip(&expected).find(|(actual, expected)| (f64::from(**actual) - *expected).abs() > 1e-5);
    assert_eq!(off, None);
    assert!(output == attention.forward(problem, &inputs).unwrap(), "other bits with row_max");
}

/// Keys that no query sees are no numbers: a second run computes their tiles, with the bits of finite keys.
pub fn hidden_keys_leave_no_trace<T: Element>(attention: &Attention, options: Options, width: [usize; 2]) {
    let (problem, mut case) = random::<T>(&problem([1, 2, 1], [70, 70], width, options), 4);
    let clean = run(attention, &problem, &case);
    // The last query sees keys up to 59.
    for j in 60..70 {
        let bad = T::from_f32([f32::NAN, f32::INFINITY, f32::NEG_INFINITY][j % 3]);
        case.operands.key(&problem, 0, 0, j).fill(bad);
        case.operands.value(&problem, 0, 0, j).fill(bad);
    }
    let found = run(attention, &problem, &case);
    agree(&found.0, &reference::forward(&problem, &case.operands.inputs()).unwrap()).unwrap();
    assert!(bits(&found) == bits(&clean), "{problem}: hidden keys that are not finite show");
}

/// Scores that grow from tile to tile, by more than halves can hold: the loop over full tiles is left at many of them. A row has the same
/// bits whatever the other rows of its tile do.
fn maxima_are_raised_in_full_tiles<T: Element>(attention: &Attention, options: Options) {
    let (problem, mut case) = random::<T>(&problem([1, 1, 1], [40, 300], [8, 8], options.scale(1.0)), 3);
    // Keys grow by steps, so that positive products leave the range of P, and negative ones never do.
    for j in 0..300 {
        let size = (1 + j / 40) as f32;
        case.operands.key(&problem, 0, 0, j).iter_mut().for_each(|x| *x = T::from_f32(x.to_f32() * size));
    }
    let forward = |case: &Backward<T>| attention.forward(&problem, &case.operands.inputs()).unwrap();
    forward_agrees(attention, &problem, &case);
    let first = forward(&case);
    assert!(forward(&case) == first, "other bits of the same problem");
    // Other rows reach their limits elsewhere.
    let mut other = case.clone();
    let half = other.operands.q.len() / 2;
    other.operands.q[half..].iter_mut().for_each(|x| *x = T::from_f32(x.to_f32() * -3.0));
    let second = forward(&other);
    assert!(second.o[half..] != first.o[half..]);
    assert!(second.o[..half] == first.o[..half] && second.lse[..20] == first.lse[..20], "rows change others");
    // A key that is no number shows in every row.
    case.operands.key(&problem, 0, 0, 100)[0] = T::from_f32(f32::NAN);
    assert!(forward(&case).o.iter().all(|x| x.to_f32().is_nan()));
}

/// Scores in several chunks. Two rows of fragments take the driver long.
fn chunks_and_rows<T: Element>(attention: &Attention, options: Options) {
    let (problem, case) = random::<T>(&problem([1, 2, 1], [70, 150], [8, 8], options), 2);
    let tiling = |rows, columns| Tiling::Fragments { subgroups: 1, rows, columns, chunk: 4, loops: LoopHints::NONE };
    let others = [(Kernel::FORWARD, tiling(2, 8)), (Kernel::D_Q, tiling(2, 4)), (Kernel::D_KV, tiling(2, 4))];
    for tiles in with_others([&[(Kernel::FORWARD, tiling(1, 8))][..]], [&others[..]]) {
        run_at(attention, &problem, &case, [0, 0], tiles, false);
    }
}

/// Scores that are more than products, of sequences that differ in length.
pub fn softcap_alibi_bias_and_lengths<T: Element>() -> [(Problem, Backward<T>); 2] {
    let options = Options::new().softcap(1.3).alibi(true).bias(Axes::KEYS.heads()).layout(Layout::Thd).dtype(T::DTYPE);
    let shape = Shape { batch: 1, heads: 4, kv_heads: 2, seq_q: 110, seq_k: 110, head_dim: 8, value_dim: 8 };
    let cumulative = &[0, 70, 70, 110][..];
    [(0, options), (1, options.causal(true).window(Window::keys(20)).sink_tokens(2))].map(|(seed, options)| {
        let lengths = Lengths::Cumulative { q: cumulative, k: cumulative };
        let problem = Problem::with_lengths(shape, options, lengths).unwrap();
        let case = Backward::random(&problem, seed).cast();
        (problem, case)
    })
}

/// Widths that are no multiples of four, so that elements are read and written one by one, under a mask.
pub fn odd_widths<T: Element>() -> [(Problem, Backward<T>); 2] {
    let options = Options::new().mask(Axes::KEYS.seq_q()).sink_logits(SinkLogits::OffByOne);
    let of = |(seed, options)| random(&problem([1, 2, 1], [70, 130], [5, 3], options), seed);
    [(0, options), (1, options.causal(true))].map(of)
}

/// bf16 has token scales where it is converted to f16.
#[test]
fn softcap_alibi_bias_and_lengths_in_bf16() {
    let Some(attention) = &fragments() else { return };
    softcap_alibi_bias_and_lengths::<bf16>().iter().for_each(|(problem, case)| check(attention, problem, case));
}

/// A bias in f16 enters the exponential: by quads of neighbouring keys, and one by one, where the number of keys is no multiple of four.
#[test]
fn a_bias_in_halves() {
    let Some(attention) = &fragments() else { return };
    let options = Options::new().dtype(DType::F16).bias(Axes::KEYS.seq_q()).bias_dtype(DType::F16);
    for (seed, (keys, options)) in (0..).zip([
        (132, options.causal(true)),
        (130, options.mask(Axes::KEYS.seq_q())),
        (132, options.scale(0.0)),
        (132, options.scale(-0.4).mask(Axes::KEYS.seq_q())),
    ]) {
        let (problem, case) = random::<f16>(&problem([1, 2, 1], [70, keys], [8, 8], options), seed);
        check(attention, &problem, &case);
    }
}

/// Rows of keys and values are read eight neighbours at a time only where offsets and strides are multiples of eight.
#[test]
fn offsets_and_strides() {
    let Some(attention) = &fragments() else { return };
    let options = Options::new().dtype(DType::F16).causal(true).sink_logits(SinkLogits::PerHead);
    let (problem, case) = random::<f16>(&problem([2, 2, 1], [37, 37], [8, 8], options), 3);
    for place in [[0, 0], [8, 16], [4, 8], [8, 4], [3, 0]] {
        run_at(attention, &problem, &case, place, &[], true);
    }
}

#[test]
fn odd_widths_under_a_mask() {
    let Some(attention) = &fragments() else { return };
    odd_widths::<f16>().iter().for_each(|(problem, case)| check(attention, problem, case));
}

/// Widths of keys and values that the lanes of every device can share.
const CACHED: [usize; 2] = [64, 64];

/// One query and several against keys of every length, whatever hides some of them, and whatever lies beyond the last. The driver compiles
/// a kernel of several queries for ten seconds, so there are few.
#[test]
fn decodes_from_caches() {
    let Some(attention) = fragments() else { return };
    let paged = CacheKind::Paged { page_size: 32, pages: 40, sequence_pages: 20 };
    let rolling = CacheKind::Rolling { sink_tokens: 3, window: 37, queries: 16 };
    let contiguous = CacheKind::Contiguous { capacity: 301 };
    let new = Options::new().dtype(DType::F16).causal(true);
    let per_head = new.sink_logits(SinkLogits::PerHead);
    let narrow = per_head.window(Window::keys(30)).sink_tokens(3);
    for (kind, heads, kv_heads, queries) in
        [(contiguous, 4, 2, 1), (paged, 10, 1, 1), (paged, 4, 2, 5), (rolling, 4, 2, 3)]
    {
        let mut both = Both::<f16>::new(config::<f16>(kind, kv_heads, CACHED));
        both.gpu = Some(attention.create_cache(&both.config).unwrap());
        let decode = |options| Decode::new(heads, options).queries(queries);
        let len = heads * queries * 3;
        let buffers = [0, 1].map(|n| filled(attention.device().unwrap(), &vec![f16::ZERO; len * CACHED[n]]));
        let lse = filled(attention.device().unwrap(), &vec![0f32; len]);
        let buffers = DecodeBuffers::new(&buffers[0], &buffers[1], &lse);
        let tiling = both.gpu.as_ref().unwrap().prepare_decode(&decode(new), &buffers).unwrap().tiling();
        assert!(matches!(tiling.tiles, DecodeTiles::Fragments { .. }), "{tiling}");
        both.append(&[181, 17, 1]);
        both.check(&decode(per_head.scale(-0.7)));
        if kind == rolling {
            both.check_row_max(&decode(per_head.alibi(true)));
        } else {
            both.check(&decode(narrow));
        }
        if kind == contiguous {
            both.check(&decode(new.softcap(1.1)));
            both.check(&decode(new.alibi(true)));
        } else if queries == 5 {
            // Subgroups that share keys and rows, with a tile under way behind the next one.
            let shared: DecodeTiling = "fragments 2x2 rows 8, columns 1, ahead 2, splits 3".parse().unwrap();
            both.check(&decode(narrow).tiling(shared));
            both.check(&decode(narrow.alibi(true)).tree_mask(TreeMask::PerSequence));
        }
        both.append(&[110, 200, 14]);
        both.check(&decode(per_head).sequences([2, 1]));
    }
}

/// What a query does not see changes no bit.
#[test]
fn decoding_sees_nothing_that_is_hidden() {
    let Some(attention) = fragments() else { return };
    crate::cache_hidden::hold_on_fragments(&attention, CACHED);
}

/// The same of new tokens in a tree.
#[test]
fn decoding_a_tree_sees_nothing_that_is_hidden() {
    let Some(attention) = fragments() else { return };
    crate::cache_tree::hold_on_fragments(&attention, CACHED);
}
