//! Text: every variant that the planner can pick validates, translates to every driver's language, fits
//! the memory that it was promised, and builds on devices with real limits, all without a GPU.

use std::collections::HashSet;
use std::path::Path;
use std::sync::OnceLock;

use crate::common::buffers::empty;
use crate::common::tint::mixed_operators;
use naga::back::{hlsl, msl, spv};
use naga::valid::{ModuleInfo, ShaderStages, SubgroupOperationSet, ValidationFlags, Validator};
use naga::{AddressSpace, Module, StorageAccess};
use rayon::prelude::*;
use sink_attention::half::bf16;
use sink_attention::plan::MicroKernel;
use sink_attention::plan::{
    Capabilities, CooperativeMatrices, ElementLayout, Kernel, LoopHint, LoopHints, LoopName, OptionalOperands, Pass,
    Plan, Precision, Preference, Rounding, SpirvVersion, TilesOrigin, Tiling, Variant,
};
use sink_attention::testing::cases::texts;
use sink_attention::testing::folder::Folder;
use sink_attention::testing::operands::problem;
use sink_attention::testing::spirv::probe_kernel;
use sink_attention::wgpu::{self, BufferUsages};
use sink_attention::{
    Attention, Axes, BackwardBuffers, DType, Device, ForwardBuffers, Layout, Lengths, MaskPacking, MergeBuffers,
    Options, Problem, SinkLogits, TensorView, Window,
};

/// D and E: equal ones of every class (below, at and between multiples of four; narrow, wide), and unequal ones.
const WIDTHS: [[usize; 2]; 22] = [
    [1, 1],
    [3, 3],
    [4, 4],
    [16, 16],
    [33, 33],
    [64, 64],
    [80, 80],
    [96, 96],
    [128, 128],
    [192, 192],
    [255, 255],
    [256, 256],
    [1, 256],
    [256, 1],
    [3, 255],
    [64, 33],
    [192, 128],
    [255, 4],
    [257, 257],
    [512, 512],
    [1, 512],
    [512, 3],
];

/// Those for kernels on elements of fragments, whose texts are long: one of each number of fragments in the tables, and a few that are no
/// multiples of four.
const WIDTHS_ON_ELEMENTS: [[usize; 2]; 6] = [[4, 4], [33, 33], [64, 64], [128, 128], [64, 33], [256, 256]];

const SINKS: [SinkLogits; 3] = [SinkLogits::None, SinkLogits::OffByOne, SinkLogits::PerHead];

const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::Bf16];

/// A problem on a device, its operands readable by fours or not, and what the planner makes of it.
struct Planned {
    device: Capabilities,
    problem: Problem,
    vec4: bool,
    optional: OptionalOperands,
    forward: Plan,
    backward: Plan,
    merge: Plan,
}

/// Of so many partial states, with the sink logits.
const STATES: usize = 3;

fn plan_merge(problem: &Problem, vec4: bool, optional: OptionalOperands, device: &Capabilities) -> Plan {
    Plan::merge(problem, STATES, true, optional.scalar(!vec4), device).unwrap()
}

impl Planned {
    fn passes(&self) -> impl Iterator<Item = &Pass> {
        self.forward.passes.iter().chain(&self.backward.passes).chain(&self.merge.passes)
    }
}

/// Numbers of f32 are split on fragments.
fn precision(dtype: DType, micro_kernel: MicroKernel) -> Precision {
    match (dtype, micro_kernel) {
        (DType::F32, MicroKernel::Fragments) => Precision::Split,
        _ => Precision::Full,
    }
}

/// Problems that reach every variant that some sample device can get.
fn reachable() -> &'static [Planned] {
    static REACHABLE: OnceLock<Vec<Planned>> = OnceLock::new();
    REACHABLE.get_or_init(|| {
        let mut seen = HashSet::new();
        let mut reachable = Vec::new();
        for device in Capabilities::samples() {
            for width in WIDTHS {
                for (sinks, dtype) in SINKS.into_iter().flat_map(|sinks| DTYPES.map(|dtype| (sinks, dtype))) {
                    // Both sides of every length at which the planner might change its mind.
                    for seq in [1, 32, 33, 64, 65, 1000] {
                        let problem =
                            problem([1, 2, 1], [seq, seq], width, Options::new().sink_logits(sinks).dtype(dtype));
                        // Packed operands of such widths can be read by fours; strides may still forbid it.
                        let by_fours = width.iter().all(|w| w % 4 == 0);
                        for [vec4, o_lo] in [[false, false], [by_fours, false], [false, true], [by_fours, true]] {
                            let optional = OptionalOperands::default()
                                .d_lse(seq % 2 == 0)
                                .o_lo(o_lo && dtype.has_rounding_error());
                            for micro_kernel in MicroKernel::ALL {
                                if micro_kernel == MicroKernel::Fragments && !WIDTHS_ON_ELEMENTS.contains(&width) {
                                    continue;
                                }
                                let preference = Preference::default().micro_kernel(micro_kernel);
                                let preference = preference.precision(precision(dtype, micro_kernel));
                                let (Ok(forward), Ok(backward)) = (
                                    Plan::forward_with(&problem, optional.scalar(!vec4), &device, &preference),
                                    Plan::backward_with(&problem, optional.scalar(!vec4), &device, &preference),
                                ) else {
                                    assert_ne!(micro_kernel, MicroKernel::Portable, "{problem}");
                                    continue;
                                };
                                let merge = plan_merge(&problem, vec4, optional, &device);
                                let (device, problem) = (device.clone(), problem.clone());
                                let planned = Planned { device, problem, vec4, optional, forward, backward, merge };
                                let new = |pass: &&Pass| seen.insert((planned.device.name.clone(), pass.variant));
                                if planned.passes().filter(new).count() > 0 {
                                    reachable.push(planned);
                                }
                            }
                        }
                    }
                }
            }
        }
        reachable.extend(with_options());
        reachable
    })
}

/// What makes scores more than products, hides single pairs, and makes sequences differ in length.
fn with_options() -> Vec<Planned> {
    let (new, keys) = (Options::new().sink_logits(SinkLogits::PerHead), Axes::KEYS);
    let options = [
        new.softcap(1.0),
        new.softcap(1.0).mask(Axes::ALL),
        new.alibi(true),
        new.bias(Axes::ALL),
        new.bias(keys.heads()),
        new.mask(keys),
        new.mask(Axes::ALL).mask_packing(MaskPacking::Bits),
        new.bias(keys.batch()).mask(keys.seq_q()),
        new.alibi(true).bias(keys.seq_q()).mask(Axes::ALL).softcap(2.0),
    ];
    let mut planned = Vec::new();
    let devices = Capabilities::samples();
    for (turn, device) in devices.iter().enumerate() {
        for (n, options) in options.into_iter().enumerate() {
            // Element types take turns.
            let dtype = DTYPES[(n + turn) % 3];
            for (width, has_lengths) in [([64, 64], false), ([33, 80], true), ([512, 256], n % 2 == 0)] {
                let options = options.dtype(dtype).bias_dtype(if n % 2 == 0 { dtype } else { DType::F32 });
                let shape = *problem([1, 2, 1], [100, 100], width, Options::new()).shape();
                let problem = if has_lengths {
                    let cumulative = &[0, 40, 40, 100][..];
                    let lengths = Lengths::Cumulative { q: cumulative, k: cumulative };
                    Problem::with_lengths(shape, options.layout(Layout::Thd), lengths)
                } else {
                    Problem::new(shape, options)
                };
                let problem = problem.unwrap();
                let vec4 = width == [64, 64];
                for (micro_kernel, o_lo) in [
                    (MicroKernel::Portable, false),
                    (MicroKernel::Portable, dtype.has_rounding_error()),
                    (MicroKernel::Cooperative, false),
                    (MicroKernel::Fragments, false),
                ] {
                    let (d_alibi_slopes, d_bias, packed) = (true, true, n % 2 == 0);
                    // A merge with all that is optional binds more than 8 buffers.
                    let row_max = (n + turn) % 2 == 0 && !o_lo;
                    let optional = OptionalOperands::default()
                        .o_lo(o_lo)
                        .d_alibi_slopes(d_alibi_slopes)
                        .d_bias(d_bias)
                        .packed(packed)
                        .row_max(row_max);
                    let preference = Preference::default().micro_kernel(micro_kernel);
                    let preference = preference.precision(precision(dtype, micro_kernel));
                    let plans = [
                        Plan::forward_with(&problem, optional.scalar(!vec4), device, &preference),
                        Plan::backward_with(&problem, optional.scalar(!vec4), device, &preference),
                    ];
                    match plans {
                        [Ok(forward), Ok(backward)] => {
                            let merge = plan_merge(&problem, vec4, optional, device);
                            let (device, problem) = (device.clone(), problem.clone());
                            planned.push(Planned { device, problem, vec4, optional, forward, backward, merge });
                        }
                        _ if micro_kernel != MicroKernel::Portable => {}
                        [Err(error), _] | [_, Err(error)] => {
                            // One option beside the sink logits has a plan on every WebGPU device.
                            let (few, buffers) =
                                (device.storage_buffers == 8, error.to_string().contains("storage buffers"));
                            let more = n >= 6 || has_lengths || o_lo;
                            assert!(few && buffers && more, "{}: {problem}: {error}", device.name);
                        }
                    }
                }
            }
        }
    }
    planned
}

/// The variants of [`reachable`], each once.
pub fn variants() -> Vec<Variant> {
    let mut seen = HashSet::new();
    let all = reachable().iter().flat_map(|planned| planned.passes().map(|pass| pass.variant));
    all.filter(|variant| seen.insert(*variant)).collect()
}

/// Whether it multiplies cooperative matrices.
pub fn on_matrices(variant: &Variant) -> bool {
    variant.micro_kernel != MicroKernel::Portable
}

/// Whether it computes with the elements of fragments, which reaches drivers as SPIR-V alone.
pub fn on_elements(variant: &Variant) -> bool {
    variant.micro_kernel == MicroKernel::Fragments
}

/// Parses and validates with what WebGPU guarantees; a cooperative kernel with its extensions, too.
pub fn validated(variant: &Variant) -> (Module, ModuleInfo) {
    let text = variant.wgsl().unwrap();
    // Of another extension than browsers' where it is cooperative, but in the same grammar.
    assert_eq!(mixed_operators(&text), [""; 0], "{}", variant.name());
    let module = naga::front::wgsl::parse_str(&text)
        .unwrap_or_else(|error| panic!("{}: {}", variant.name(), error.emit_to_string(&text)));
    // unpack2x16float, which is no extension: naga counts it as one for the sake of OpenGL ES 3.0.
    let mut guaranteed = naga::valid::Capabilities::SHADER_FLOAT16_IN_FLOAT32;
    let mut subgroups = (ShaderStages::empty(), SubgroupOperationSet::empty());
    if on_matrices(variant) {
        guaranteed |= naga::valid::Capabilities::COOPERATIVE_MATRIX
            | naga::valid::Capabilities::SHADER_FLOAT16
            | naga::valid::Capabilities::SUBGROUP
            | naga::valid::Capabilities::SUBGROUP_BARRIER;
        subgroups = (ShaderStages::COMPUTE, SubgroupOperationSet::all());
    }
    let info = Validator::new(ValidationFlags::all(), guaranteed)
        .subgroup_stages(subgroups.0)
        .subgroup_operations(subgroups.1)
        .validate(&module)
        .unwrap_or_else(|error| panic!("{}: {}", variant.name(), error.emit_to_string(&text)));
    (module, info)
}

#[test]
fn the_list_reaches_every_class() {
    let variants = variants();
    for dtype in DTYPES {
        let variants: Vec<_> = variants.iter().filter(|v| v.dtype == dtype).collect();
        for sinks in SINKS {
            for vec4 in [false, true] {
                // A logit of zero has no gradient, so delta knows it as little as none; the exact one knows no sinks.
                let delta = Some(Kernel::DELTA).filter(|_| sinks != SinkLogits::OffByOne);
                for kernel in [Some(Kernel::FORWARD), Some(Kernel::MERGE), delta].into_iter().flatten() {
                    assert!(variants.iter().any(|v| (v.kernel, v.sink_logits, v.vec4) == (kernel, sinks, vec4)));
                }
            }
        }
        let delta = if dtype.has_rounding_error() { Kernel::EXACT_DELTA } else { Kernel::DELTA };
        // The exact delta has no accumulators, whose width would choose among the rows of the table.
        let least = if dtype == DType::F32 { 1 } else { 4 };
        for (kernel, least) in [(Kernel::FORWARD, 5), (delta, least), (Kernel::D_Q, 5), (Kernel::D_KV, 5)] {
            let tiles: HashSet<_> = variants.iter().filter(|v| v.kernel == kernel).map(|v| v.tiling).collect();
            assert!(tiles.len() >= least, "the tuning table of {kernel:?} has more rows than {tiles:?}");
        }
        for d_lse in [false, true] {
            assert!(variants.iter().any(|v| v.kernel == delta && v.d_lse == d_lse));
        }
        assert!(variants.iter().any(|v| v.kernel == Kernel::D_SINK_LOGITS));
    }
}

/// To the languages of all drivers.
fn translates(variant: &Variant, module: &Module, info: &ModuleInfo) {
    let entry = |name: &str| panic!("{}: no {name}", variant.name());
    let name = || variant.name();
    if on_elements(variant) {
        // Marker functions mean nothing but to the translation of the crate.
        let words = variant.spirv(SpirvVersion { major: 1, minor: 3 }).unwrap();
        assert_eq!((words[0], words[1]), (0x0723_0203, 0x0001_0300), "{}: SPIR-V's magic number", name());
        return;
    }

    let options = spv::Options { lang_version: (1, 3), ..Default::default() };
    let words = spv::write_vec(module, info, &options, None).unwrap_or_else(|e| panic!("{}: {e}", name()));
    assert_eq!(words[0], 0x0723_0203, "{}: SPIR-V's magic number", name());

    // Metal's matrices are 8x8; Direct3D has none.
    let side = variant.matrices.map(|matrices| matrices.side);
    if side == Some(16) {
        return;
    }
    let options = msl::Options { lang_version: (2, 4), ..Default::default() };
    let (_, written) = msl::write_string(module, info, &options, &msl::PipelineOptions::default())
        .unwrap_or_else(|e| panic!("{}: {e}", name()));
    written.entry_point_names[0].as_ref().unwrap_or_else(|e| entry(&e.to_string()));

    if side.is_some() {
        return;
    }
    let options = hlsl::Options {
        shader_model: hlsl::ShaderModel::V6_0,
        // Where the kernel's num_workgroups comes from, as in wgpu.
        special_constants_binding: Some(hlsl::BindTarget { register: 0, space: 1, ..Default::default() }),
        ..Default::default()
    };
    let mut text = String::new();
    let written = hlsl::Writer::new(&mut text, &options, &hlsl::PipelineOptions::default())
        .write(module, info, None)
        .unwrap_or_else(|e| panic!("{}: {e}", name()));
    written.entry_point_names[0].as_ref().unwrap_or_else(|e| entry(&e.to_string()));
}

/// The planner promises workgroup memory and threads by arithmetic of its own; the text must agree.
fn keeps_the_planners_promises(variant: &Variant, module: &Module) {
    let name = variant.name();
    let mut layouter = naga::proc::Layouter::default();
    layouter.update(module.to_ctx()).unwrap();
    // As WebGPU counts: each variable rounded up to 16 bytes.
    let bytes: u32 = module
        .global_variables
        .iter()
        .filter(|(_, variable)| variable.space == AddressSpace::WorkGroup)
        .map(|(_, variable)| layouter[variable.ty].size.next_multiple_of(16))
        .sum();
    let promised = variant.workgroup_bytes();
    assert!(bytes <= promised, "{name}: {bytes} bytes of workgroup memory, {promised} were planned");
    // Where memory is what decides between tiles, none is given away either.
    assert!(bytes == promised || variant.tiling.is_none(), "{name}: {bytes} bytes, {promised} were planned");
    let [entry] = &module.entry_points[..] else { panic!("{name}: one entry point") };
    assert_eq!((&*entry.name, entry.workgroup_size), ("main", [variant.threads(), 1, 1]), "{name}");
}

/// Slots are never renumbered: hosts that bind by themselves, and captures of old runs, rely on them.
fn bindings_stay_where_they_are(variant: &Variant, module: &Module) {
    const NAMES: [&str; 41] = [
        "params",
        "q",
        "k",
        "v",
        "o",
        "lse",
        "sink_logits",
        "d_o",
        "d_lse",
        "d_q",
        "d_k",
        "d_v",
        "d_sink_logits",
        "row_stats",
        "sink_partials",
        "fallback",
        "key_scales",
        "query_scales",
        "o_lo",
        "bias",
        "mask",
        "mask_bits",
        "alibi_slopes",
        "d_slope_rows",
        "d_bias",
        "d_alibi_slopes",
        "sequences",
        "states",
        "states_lo",
        "states_lse",
        "keys",
        "values",
        "state",
        "tokens",
        "entries",
        "cos_sin",
        "partials",
        "gathered_keys",
        "gathered_values",
        "row_max",
        "states_row_max",
    ];
    let name = variant.name();
    let mut written = Vec::new();
    let mut storage = 0;
    for (_, global) in module.global_variables.iter() {
        let Some(binding) = global.binding else { continue };
        let operand = NAMES[binding.binding as usize];
        assert_eq!((global.name.as_deref(), binding.group), (Some(operand), 0), "{name}");
        match global.space {
            AddressSpace::Uniform => assert_eq!(operand, "params", "{name}"),
            AddressSpace::Storage { access } => {
                storage += 1;
                written.extend(access.contains(StorageAccess::STORE).then_some(operand));
            }
            other => panic!("{name}: {operand} in {other:?}"),
        }
    }
    // Devices with matrices bind more than every WebGPU device does, and only they repair.
    let options = [variant.alibi, variant.bias.is_some(), variant.mask, variant.lengths];
    let options = options.iter().filter(|there| **there).count();
    let most = match variant.kernel {
        _ if on_matrices(variant) || variant.fallback.is_some() => 10 + options,
        // With o_lo, sink logits and d_lse it has no room for slopes.
        kernel if kernel == Kernel::DELTA => 8 + options,
        // One option goes with everything else on every WebGPU device.
        _ => 7 + options.max(1),
    };
    assert!(storage <= most, "{name}: {storage} storage buffers");
    assert_eq!(written.contains(&"fallback"), on_matrices(variant), "{name}");
    written.retain(|operand| *operand != "fallback");
    written.sort_unstable();
    let results: &[&str] = match variant.kernel.name() {
        "forward" | "merge" if variant.row_max && variant.o_lo => &["lse", "o", "o_lo", "row_max"],
        "forward" | "merge" if variant.row_max => &["lse", "o", "row_max"],
        "forward" | "merge" if variant.o_lo => &["lse", "o", "o_lo"],
        "forward" | "merge" => &["lse", "o"],
        "delta" if variant.sink_logits == SinkLogits::PerHead => &["row_stats", "sink_partials"],
        "delta" | "exact_delta" => &["row_stats"],
        "d_q" if variant.slope_rows => &["d_q", "d_slope_rows"],
        "d_kv" if variant.packed => &["d_k"],
        "d_kv" => &["d_k", "d_v"],
        own => &[own],
    };
    assert_eq!(written, results, "{name}");
}

/// Each is parsed once, which takes longer than all that follows.
#[test]
fn variants_validate_and_translate() {
    texts(variants()).par_iter().for_each(|variant| {
        let (module, info) = validated(variant);
        keeps_the_planners_promises(variant, &module);
        bindings_stay_where_they_are(variant, &module);
        translates(variant, &module, &info);
    });
}

/// Where subgroups have several sizes, every kernel on matrices looks at its own before the first of them, and reports what it leaves to the
/// portable kernel. Elsewhere the text has nothing of it.
#[test]
fn kernels_on_matrices_look_at_their_subgroups() {
    let looks = |variant: &Variant| {
        let text = variant.wgsl().unwrap();
        let main = &text[text.find("fn main(").unwrap()..];
        let matrices = variant.matrices.unwrap();
        if !matrices.guarded {
            assert!(!text.contains("has_lanes") && !text.contains("subgroup_size"), "{}", variant.name());
            return false;
        }
        let place = |part: &str| main.find(part).unwrap_or_else(|| panic!("no {part} in {}", variant.name()));
        let count = variant.threads() / matrices.lanes;
        let looks = place(&format!("subgroup_size == {}u && subgroup_count == {count}u", matrices.lanes));
        let leaves = place("if (!has_lanes) {");
        let ends = leaves + main[leaves..].find("return;").unwrap();
        assert!(looks < leaves && ends < place("coop"), "{}", variant.name());
        assert_ne!(variant.sanitize, main[leaves..ends].contains("fallback[slot + word] = 0xffffffffu"));
        true
    };
    let variants: Vec<Variant> = texts(variants().into_iter().filter(on_matrices));
    let guarded = variants.par_iter().filter(|variant| looks(variant)).count();
    assert!(guarded > 10 && variants.len() - guarded > 10, "{guarded} of {} texts", variants.len());
}

/// Layouts of the elements of fragments that no sample has, and tiles that no table has.
#[test]
fn elements_of_every_layout() {
    let h200 = &Capabilities::samples()[0];
    // Side and lanes; element of each component of each lane, row by row: neighbours in a row, in a column, and far apart.
    let layout = |side: u32, lanes: u32, element: &dyn Fn(u32, u32) -> [u32; 2]| -> CooperativeMatrices {
        let components = side * side / lanes;
        let all = (0..lanes).flat_map(|lane| (0..components).map(move |i| (lane, i)));
        let elements: Vec<u32> =
            all.map(|(lane, i)| element(lane, i)).map(|[row, column]| row * side + column).collect();
        let layout = ElementLayout::new(side, lanes, &elements).unwrap();
        h200.cooperative.unwrap().side(side).lanes(lanes).guarded(lanes == 64).elements(layout)
    };
    let matrices = [
        layout(8, 32, &|lane, i| [lane / 4, 2 * (lane % 4) + i]),
        layout(8, 32, &|lane, i| [lane / 8 + 4 * i, lane % 8]),
        layout(16, 64, &|lane, i| [lane / 16 + 4 * i, lane % 16]),
        layout(16, 32, &|lane, i| [lane / 16 * 8 + i, lane % 16]),
        layout(16, 64, &|lane, i| [lane / 4, lane % 4 * 4 + i]),
        layout(16, 32, &|lane, i| [lane / 16 + 2 * i, lane % 16]),
    ];
    let new = Options::new().causal(true).window(Window::keys(128)).sink_logits(SinkLogits::PerHead);
    let mut variants = Vec::new();
    for matrices in matrices.into_iter().chain([h200.cooperative.unwrap()]) {
        let device = &h200.clone().cooperative(matrices);
        let one_a_fragment = matrices.to_string().contains("rows of 1 elements");
        for (n, options) in
            [new, new.softcap(1.0).alibi(true), new.mask(Axes::ALL), new.bias(Axes::KEYS)].into_iter().enumerate()
        {
            let dtype = [DType::F16, DType::Bf16][n % 2];
            let problem = problem([1, 2, 1], [1000, 1000], [48, 40], options.dtype(dtype));
            for kernel in [Kernel::FORWARD, Kernel::EXACT_DELTA, Kernel::D_Q, Kernel::D_KV] {
                let tilings = Tiling::candidates(kernel, &problem, device, MicroKernel::Fragments);
                // Four columns of a lane are in four fragments, and a mask has them in two words.
                let is_far = options.mask.is_some() && matrices.side == 16 && one_a_fragment;
                assert_eq!(tilings.is_empty(), is_far, "{kernel:?} with {matrices}");
                // The candidates are many, and two of them are apart.
                let two = tilings.iter().skip(n).step_by(tilings.len() / 2 + 1);
                variants.extend(two.map(|tiling| Pass::with_tiles(kernel, &problem, device, *tiling).unwrap().variant));
            }
            let problem = self::problem([1, 2, 1], [1000, 1000], [48, 40], options);
            let split = Preference::default().precision(Precision::Split);
            for plan in [Plan::forward_with, Plan::backward_with] {
                let plan = plan(&problem, OptionalOperands::default(), device, &split);
                // The table has no four fragments for a quad.
                let has_no_quads = matrices.side == 16 && one_a_fragment;
                assert_eq!(plan.is_err(), has_no_quads, "split numbers with {matrices}: {plan:?}");
                let passes = plan.into_iter().flat_map(|plan| plan.passes).map(|pass| pass.variant);
                variants.extend(passes.filter(on_elements));
            }
        }
    }
    assert!(variants.len() >= 6 * 4 * 4, "{} texts", variants.len());
    variants.par_iter().for_each(|variant| {
        let (module, info) = validated(variant);
        keeps_the_planners_promises(variant, &module);
        translates(variant, &module, &info);
    });
}

/// What a current spirv-val has against words, where `SINK_ATTENTION_SPIRV_VAL` says how to run it.
fn spirv_val(folder: &Folder, name: &str, words: &[u32]) -> Option<String> {
    let command = std::env::var("SINK_ATTENTION_SPIRV_VAL").ok()?;
    let path = folder.path(&format!("{name}.spv"));
    std::fs::write(&path, bytemuck::cast_slice(words)).unwrap();
    let mut parts = command.split_whitespace();
    let mut command = std::process::Command::new(parts.next().unwrap());
    // Not of Vulkan: since 2025 it wants no strides of arrays in workgroup memory, which naga 30 writes, for wgpu too.
    let told = command.args(parts).args(["--target-env", "spv1.6"]).arg(&path).output().unwrap();
    (!told.status.success()).then(|| String::from_utf8_lossy(&[told.stdout, told.stderr].concat()).into_owned())
}

/// The kernel that asks a device for its layout of elements is right for every size of fragments.
#[test]
fn spirv_of_the_probe_is_valid() {
    let folder = Folder::new(env!("CARGO_TARGET_TMPDIR"), "probe");
    for (side, lanes) in [(16, 32), (8, 8), (8, 32), (16, 64)] {
        for bf16 in [false, true] {
            let words = probe_kernel(side, lanes, bf16, SpirvVersion { major: 1, minor: 3 }).unwrap();
            assert_eq!(spirv_val(&folder, &format!("{side} {lanes} {bf16}"), &words), None);
        }
    }
}

/// Each loop that a kernel is said to have is there, and a driver that takes SPIR-V gets a hint for it. spirv-val has nothing against the
/// words.
#[test]
fn spirv_takes_hints_for_loops() {
    let folder = Folder::new(env!("CARGO_TARGET_TMPDIR"), "spirv");
    let mut seen = HashSet::new();
    let planned = reachable().iter().filter_map(|planned| Some((planned, planned.device.spirv?)));
    let all = planned.flat_map(|(planned, version)| planned.passes().map(move |pass| (pass.variant, version)));
    let tiled: Vec<_> = all.filter(|(v, _)| v.tiling.is_some() && seen.insert(*v)).collect();
    for micro_kernel in MicroKernel::ALL {
        assert!(tiled.iter().any(|(variant, _)| variant.micro_kernel == micro_kernel));
    }
    assert!(tiled.iter().any(|(variant, _)| variant.sanitize));
    texts(tiled.into_iter().enumerate()).par_iter().for_each(|&(number, (plain, version))| {
        let names = LoopName::of(plain.kernel, plain.micro_kernel);
        let text = plain.wgsl().unwrap();
        for name in LoopName::ALL {
            let is_there = text.contains(&format!("// Loop: {name}\n"));
            assert_eq!(is_there, names.contains(&name), "{name} of {}", plain.name());
        }
        // One after the other, so that no two neighbours have the same.
        let of_names = names.iter().zip(LoopHint::ALL.into_iter().cycle());
        let hints = of_names.fold(LoopHints::every(LoopHint::Keep), |hints, (name, hint)| hints.with(*name, hint));
        let mut variant = plain;
        variant.tiling = plain.tiling.map(|tiling| tiling.with_loops(hints));
        let words = variant.spirv(version).unwrap();
        let [entry, merges, hinted] = loops(&words);
        assert!(entry == 1 && merges >= names.len() && hinted == merges, "{hinted} of {merges} in {}", variant.name());
        assert_eq!(spirv_val(&folder, &number.to_string(), &words), None, "{}", variant.name());
    });
}

/// Entry points, and the loops of the last function, which is the entry point: all of them, and those with a hint.
fn loops(words: &[u32]) -> [usize; 3] {
    let (mut entries, mut merges, mut hinted, mut at) = (0, 0, 0, 5);
    while at < words.len() {
        let (op, len) = (words[at] & 0xffff, (words[at] >> 16) as usize);
        match op {
            15 => entries += 1,
            54 => (merges, hinted) = (0, 0),
            246 => (merges, hinted) = (merges + 1, hinted + usize::from(words[at + 3] != 0)),
            _ => {}
        }
        at += len;
    }
    assert_eq!(at, words.len());
    [entries, merges, hinted]
}

/// P and dS become bf16 by the driver's conversion. Where it cuts bits off, they are larger by the average before, by a constant in the
/// shift; with ALiBi, and where it rounds in another way, kernels round them.
#[test]
fn probabilities_become_bf16() {
    let nvidia = Capabilities::samples().swap_remove(0);
    let new = Options::new().dtype(DType::Bf16);
    let (zero, nearest, other) = (Rounding::TowardsZero, Rounding::Nearest, Rounding::Other);
    for (rounding, options, lifted, rounded) in [
        (zero, new, true, false),
        (zero, new.softcap(3.0).bias(Axes::KEYS).mask(Axes::KEYS), true, false),
        (zero, new.alibi(true), false, true),
        (nearest, new, false, false),
        (nearest, new.alibi(true), false, false),
        (other, new, false, true),
    ] {
        let device = nvidia.clone().cooperative(nvidia.cooperative.map(|matrices| matrices.bf16(rounding)));
        let problem = problem([1, 2, 1], [100, 100], [64, 64], options);
        let preference = Preference::default().micro_kernel(MicroKernel::Fragments);
        let optional = OptionalOperands::default().o_lo(true);
        let plans =
            [Plan::forward_with, Plan::backward_with].map(|plan| plan(&problem, optional, &device, &preference));
        let passes = plans.into_iter().flat_map(|plan| plan.unwrap().passes);
        let mut kernels = HashSet::new();
        for variant in passes.map(|pass| pass.variant).filter(|variant| variant.name().contains("_native")) {
            let (name, text) = (variant.name(), variant.wgsl().unwrap());
            let round = "fn rounded(x: f32) -> f32 {\n  return fma(x, 65536.0, -fma(x, 65536.0, -x));\n}";
            let calls = text.matches("rounded(").count();
            assert_eq!((text.contains(round), calls > 1), (rounded, rounded), "{name}");
            let gain = if variant.kernel == Kernel::D_KV { "LOG2_GAIN - " } else { " - LOG2_GAIN;" };
            assert_eq!(text.contains(gain), lifted, "{name}");
            assert_eq!(text.contains(".factor * GAIN;"), lifted && variant.kernel == Kernel::FORWARD, "{name}");
            kernels.insert(variant.kernel);
        }
        assert_eq!(kernels, HashSet::from([Kernel::FORWARD, Kernel::D_Q, Kernel::D_KV]));
    }
}

/// Two multiply-adds round to bf16 with the bits of the type's own rounding up to 2^111.
#[test]
fn two_multiply_adds_round_to_bf16() {
    // Every mantissa next to a bf16 number or to a tie, in many exponents.
    for exponent in (1..=238).step_by(3) {
        for (high, low) in (0..128).flat_map(|high| [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff].map(move |low| (high, low)))
        {
            let x = f32::from_bits(exponent << 23 | high << 16 | low);
            for x in [x, -x] {
                let rounded = x.mul_add(65536.0, -x.mul_add(65536.0, -x));
                assert_eq!(rounded, bf16::from_f32(x).to_f32(), "{x:e}");
            }
        }
    }
}

/// Numbers of all sizes that are larger by GAIN before bits are cut off have no error on average, and one is off by 0.7 units in the last
/// place at most, where rounding to nearest has 0.5. A probability of 1 stays 1.
#[test]
fn numbers_that_are_lifted_before_bits_are_cut_off() {
    let [gain, lift] = [1.0027076f32, 0.003900971];
    let lost = 2f64.powi(-8) * std::f64::consts::LN_2;
    assert!(
        (f64::from(gain) - 1.0 - lost).abs() < 1e-7
            && (f64::from(lift) - lost.ln_1p() / std::f64::consts::LN_2).abs() < 1e-9
    );
    let cut = |x: f32| f32::from_bits(x.to_bits() >> 16 << 16);
    let (mut all, mut sums, mut squares, mut most) = (0.0, [0.0; 3], [0.0; 2], [0f64; 2]);
    // Logarithms in equal steps, four octaves.
    for n in 0..400_000 {
        let x = (f64::from(n) / 1e5 - 3.0).exp2() as f32;
        let exact = f64::from(x);
        let errors = [cut(x * gain), bf16::from_f32(x).to_f32(), cut(x)].map(|x| f64::from(x) - exact);
        let unit = 2f64.powf(exact.log2().floor() - 7.0);
        all += exact;
        for (sum, error) in sums.iter_mut().zip(errors) {
            *sum += error;
        }
        for (n, error) in errors.into_iter().take(2).enumerate() {
            squares[n] += (error / exact).powi(2);
            most[n] = most[n].max((error / unit).abs());
        }
    }
    let [lifted, nearest, cut_off] = sums.map(|sum| sum / all);
    assert!(lifted.abs() < 2e-5 && nearest.abs() < 2e-5, "{lifted:e} {nearest:e}");
    assert!((cut_off + lost).abs() < 2e-5, "{cut_off:e}");
    assert!(most[0] < 0.7 && most[1] <= 0.5, "{most:?}");
    assert!((squares[0] / squares[1]).sqrt() < 1.1, "{squares:?}");
    assert_eq!(cut(gain), 1.0);
}

/// Four composed texts as files, so that a change of a template shows in a review as what it does to WGSL. After a change that is
/// meant, `UPDATE_SNAPSHOTS=1 cargo test --test suites shaders::` rewrites tests/snapshots.
#[test]
fn composed_texts_are_the_reviewed_ones() {
    let causal = Options::new().causal(true);
    let gpt_oss = causal.sink_logits(SinkLogits::PerHead).window(Window::keys(128)).dtype(DType::F16);
    let gpt_oss = problem([1, 64, 8], [4096, 4096], [64, 64], gpt_oss);
    let plain = problem([1, 32, 8], [4096, 4096], [64, 64], causal);
    let device = |name: &str| Capabilities::samples().into_iter().find(|device| device.name == name).unwrap();
    let forward = |problem: &Problem, device| Plan::forward(problem, device).unwrap();
    let cooperative = Preference::default().micro_kernel(MicroKernel::Cooperative);
    let cooperative = |plan: fn(&_, _, &_, &_) -> _, device: &Capabilities| -> Plan {
        let plan: sink_attention::Result<Plan> = plan(&gpt_oss, OptionalOperands::default(), device, &cooperative);
        plan.unwrap()
    };
    let (h200, least) = (device("NVIDIA H200"), device("WebGPU defaults"));
    let split = Preference::default().precision(Precision::Split);
    let split = Plan::forward_with(&plain, OptionalOperands::default(), &h200, &split).unwrap();
    let snapshots = [
        ("forward_causal_f32_fragments", Kernel::FORWARD, split),
        ("forward_gpt_oss_f16_fragments", Kernel::FORWARD, forward(&gpt_oss, &h200)),
        ("forward_gpt_oss_f16_cooperative", Kernel::FORWARD, cooperative(Plan::forward_with, &h200)),
        ("forward_causal_f32_portable", Kernel::FORWARD, forward(&plain, &least)),
        ("d_kv_gpt_oss_f16_cooperative", Kernel::D_KV, cooperative(Plan::backward_with, &h200)),
    ];
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/snapshots");
    for (name, kernel, plan) in snapshots {
        // The first pass of a cooperative kernel: neither its second run nor the portable one for the rows that remain.
        let pass = plan.passes.iter().find(|pass| pass.variant.kernel == kernel).unwrap();
        assert!(name.ends_with(&pass.variant.micro_kernel.to_string()), "{name}: {pass}");
        let composed = pass.variant.wgsl().unwrap();
        let path = folder.join(name).with_extension("wgsl");
        if std::env::var_os("UPDATE_SNAPSHOTS").is_some() {
            std::fs::write(&path, &composed).unwrap();
        }
        let reviewed = std::fs::read_to_string(&path).unwrap().replace("\r\n", "\n");
        let changed = reviewed.lines().zip(composed.lines()).find(|(reviewed, composed)| reviewed != composed);
        assert!(
            reviewed == composed,
            "{name} has changed, first at {changed:#?}; if that is meant: UPDATE_SNAPSHOTS=1"
        );
    }
}

/// A device without a driver that validates as one with these capabilities does.
fn noop(capabilities: &Capabilities) -> Attention {
    let limits = wgpu::Limits {
        max_compute_workgroup_storage_size: capabilities.workgroup_bytes,
        max_compute_invocations_per_workgroup: capabilities.workgroup_threads,
        max_compute_workgroup_size_x: capabilities.workgroup_threads,
        max_compute_workgroups_per_dimension: capabilities.grid_dimension,
        max_storage_buffers_per_shader_stage: capabilities.storage_buffers,
        max_storage_buffer_binding_size: capabilities.binding_bytes,
        max_buffer_size: capabilities.buffer_bytes,
        min_storage_buffer_offset_alignment: capabilities.offset_alignment,
        ..wgpu::Limits::defaults()
    };
    let descriptor = wgpu::DeviceDescriptor { required_limits: limits, ..Default::default() };
    let (device, queue) = wgpu::Device::noop(&descriptor);
    Attention::on(Device::from_wgpu(device, queue))
}

/// Prepares both passes with the tiles that were planned, on a device that has no driver.
fn build(attention: &Attention, planned: &Planned) {
    let device = attention.device().unwrap();
    let Planned { problem, vec4, optional, forward, backward, merge, .. } = planned;
    // An element's offset makes the kernels read one by one.
    let offset = u64::from(!vec4);
    let buffer = |elements: usize, bytes: usize| {
        let size = (elements as u64 + offset) * bytes as u64;
        empty(device, size.next_multiple_of(4), BufferUsages::STORAGE)
    };
    let operands = || {
        let shapes = [problem.q_shape(), problem.k_shape(), problem.v_shape(), problem.o_shape()];
        shapes.map(|shape| buffer(shape.iter().product(), problem.options().dtype.bytes()))
    };
    let ([q, k, v, o], [d_q, d_k, d_v, d_o]) = (operands(), operands());
    let [.., o_lo] = operands();
    let rows = || buffer(problem.lse_shape().iter().product(), 4);
    let (lse, row_max, flows_into_lse) = (rows(), rows(), rows());
    let heads = || buffer(problem.shape().heads, 4);
    let (sinks, d_sinks) = (heads(), heads());

    let at = |buffer| TensorView::new(buffer).offset(offset);
    let (alibi_slopes, d_alibi_slopes) = (heads(), heads());
    let elements = |shape: Option<[usize; 4]>| shape.map_or(1, |shape| shape.iter().product());
    let mask_bytes = if problem.options().mask_packing == MaskPacking::Bits { 4 } else { 1 };
    let mask = buffer(elements(problem.mask_shape()), mask_bytes);
    let bias = buffer(elements(problem.bias_shape()), problem.options().bias_dtype.bytes());
    let d_bias = buffer(elements(problem.bias_shape()), 4);
    let options = problem.options();
    let per_head = options.sink_logits == SinkLogits::PerHead;
    let forward_buffers = ForwardBuffers::new(at(&q), at(&k), at(&v), at(&o), at(&lse))
        .alibi_slopes(options.alibi.then(|| at(&alibi_slopes)))
        .bias(options.bias.map(|_| at(&bias)))
        .mask(options.mask.map(|_| at(&mask)))
        .sink_logits(per_head.then(|| at(&sinks)))
        .o_lo(optional.o_lo.then(|| at(&o_lo)))
        .row_max(optional.row_max.then(|| at(&row_max)));
    // The gradients by k and v one after the other in one buffer.
    let k_elements = problem.k_shape().iter().product::<usize>().next_multiple_of(4);
    let v_elements = problem.v_shape().iter().product::<usize>();
    let fused = buffer(k_elements + v_elements, problem.options().dtype.bytes());
    let (d_k, d_v) = match optional.packed {
        true => (at(&fused), at(&fused).offset(offset + k_elements as u64)),
        false => (at(&d_k), at(&d_v)),
    };
    let backward_buffers = BackwardBuffers::new(forward_buffers, at(&d_o), at(&d_q), d_k, d_v)
        .d_alibi_slopes(optional.d_alibi_slopes.then(|| at(&d_alibi_slopes)).filter(|_| options.alibi))
        .d_bias(optional.d_bias.then(|| at(&d_bias)).filter(|_| options.bias.is_some()))
        .d_lse(optional.d_lse.then(|| at(&flows_into_lse)))
        .d_sink_logits(per_head.then(|| at(&d_sinks)));
    // wgpu's validation sees WGSL, which has no hints for loops.
    let plain = |tiling: Option<Tiling>| tiling.map(|tiling| tiling.with_loops(LoopHints::NONE));
    let tiles = |plan: &Plan| -> Vec<_> {
        plan.passes.iter().filter_map(|pass| Some((pass.variant.kernel, plain(pass.variant.tiling)?))).collect()
    };
    let [forward_tiles, backward_tiles] = [tiles(forward), tiles(backward)];
    // The same passes, but for where their tiles come from.
    let passes = |plan: &Plan| {
        let mut passes = plan.passes.clone();
        passes.iter_mut().for_each(|pass| {
            pass.tiles_origin = TilesOrigin::Caller;
            pass.variant.tiling = plain(pass.variant.tiling);
        });
        passes
    };
    let prepared = attention.prepare_forward_with_async(problem, &forward_buffers, &forward_tiles);
    assert_eq!(passes(pollster::block_on(prepared).unwrap().plan()), passes(forward), "{problem}");
    let prepared = attention.prepare_backward_with_async(problem, &backward_buffers, &backward_tiles);
    assert_eq!(passes(pollster::block_on(prepared).unwrap().plan()), passes(backward), "{problem}");

    let states = || buffer(STATES * problem.o_shape().iter().product::<usize>(), problem.options().dtype.bytes());
    let (states, states_lo) = (states(), states());
    let state_rows = || buffer(STATES * problem.lse_shape().iter().product::<usize>(), 4);
    let (states_lse, states_row_max) = (state_rows(), state_rows());
    let buffers = MergeBuffers::new(at(&states), at(&states_lse), at(&o), at(&lse))
        .states_lo(optional.o_lo.then(|| at(&states_lo)))
        .sink_logits(per_head.then(|| at(&sinks)))
        .o_lo(optional.o_lo.then(|| at(&o_lo)))
        .states_row_max(optional.row_max.then(|| at(&states_row_max)))
        .row_max(optional.row_max.then(|| at(&row_max)));
    let prepared = attention.prepare_finish(problem, STATES, &buffers).unwrap();
    assert_eq!(passes(prepared.plan()), passes(merge), "{problem}");
}

/// Layouts, pipelines and bind groups pass wgpu's validation with each device's limits.
#[test]
fn variants_build_on_every_device() {
    Capabilities::samples().par_iter().for_each(|capabilities| {
        let attention = noop(capabilities);
        assert_eq!(attention.device().unwrap().capabilities().workgroup_bytes, capabilities.workgroup_bytes);
        let own: Vec<_> = reachable().iter().filter(|planned| planned.device == *capabilities).collect();
        assert!(!own.is_empty());
        // It has no matrices.
        let portable = |planned: &&Planned| !planned.passes().any(|pass| on_matrices(&pass.variant));
        texts(own.into_iter().filter(portable)).into_iter().for_each(|planned| build(&attention, planned));
    });
}

/// The test above proves something: such a device refuses what exceeds its limits. (Not workgroup memory:
/// browsers count it, wgpu does not, so `keeps_the_planners_promises` does.)
#[test]
fn noop_devices_do_validate() {
    let least = Capabilities::webgpu_defaults();
    let attention = noop(&least);
    let gpu = attention.device().unwrap().wgpu();
    let refusal = |threads: u32| {
        let scope = gpu.push_error_scope(wgpu::ErrorFilter::Validation);
        let text = format!("@compute @workgroup_size({threads}) fn main() {{}}");
        let source = wgpu::ShaderSource::Wgsl(text.into());
        let module = gpu.create_shader_module(wgpu::ShaderModuleDescriptor { label: None, source });
        let _pipeline = gpu.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: None,
            layout: None,
            module: &module,
            entry_point: None,
            compilation_options: Default::default(),
            cache: None,
        });
        pollster::block_on(scope.pop())
    };
    assert!(refusal(least.workgroup_threads).is_none());
    assert!(refusal(least.workgroup_threads + 1).is_some());
}
