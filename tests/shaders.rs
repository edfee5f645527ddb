//! Text: every variant that the planner can pick validates, translates to every driver's language, fits
//! the memory that it was promised, and builds on devices with real limits, all without a GPU.

mod common;

use std::collections::HashSet;
use std::sync::OnceLock;

use common::buffers::empty;
use common::operands::problem;
use naga::back::{hlsl, msl, spv};
use naga::valid::{ModuleInfo, ValidationFlags, Validator};
use naga::{AddressSpace, Module, StorageAccess};
use rayon::prelude::*;
use sink_attention::wgpu::{self, BufferUsages};
use sink_attention::{
    Attention, Capabilities, Device, ForwardBuffers, Options, Plan, Problem, SinkLogits, TensorView, Variant,
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
    [4, 64],
    [64, 33],
    [80, 96],
    [128, 192],
    [192, 128],
    [255, 4],
    [256, 16],
];

const SINKS: [SinkLogits; 3] = [SinkLogits::None, SinkLogits::OffByOne, SinkLogits::PerHead];

/// The device, the problem and the plan of every variant that some sample device can get.
fn reachable() -> &'static [(Capabilities, Problem, Plan)] {
    static REACHABLE: OnceLock<Vec<(Capabilities, Problem, Plan)>> = OnceLock::new();
    REACHABLE.get_or_init(|| {
        let mut seen = HashSet::new();
        let mut reachable = Vec::new();
        for device in Capabilities::samples() {
            for width in WIDTHS {
                for sinks in SINKS {
                    // Both sides of every number of queries at which the planner might change its mind.
                    for seq_q in [1, 32, 33, 64, 65, 1000] {
                        let problem = problem([1, 2, 1], [seq_q, 70], width, Options::new().sink_logits(sinks));
                        // Packed operands of such widths can be read by fours; strides may still forbid it.
                        let vec4 = width.iter().all(|w| w % 4 == 0);
                        for vec4 in [false, vec4] {
                            let plan = Plan::forward(&problem, vec4, &device).unwrap();
                            if seen.insert((device.name.clone(), plan.variant)) {
                                reachable.push((device.clone(), problem, plan));
                            }
                        }
                    }
                }
            }
        }
        reachable
    })
}

/// The variants of [`reachable`], each once.
fn variants() -> Vec<Variant> {
    let mut seen = HashSet::new();
    reachable().iter().map(|(_, _, plan)| plan.variant).filter(|variant| seen.insert(*variant)).collect()
}

/// Parses and validates with what WebGPU guarantees, no extensions.
fn validated(variant: &Variant) -> (Module, ModuleInfo) {
    let text = variant.wgsl().unwrap();
    let module = naga::front::wgsl::parse_str(&text)
        .unwrap_or_else(|error| panic!("{}: {}", variant.name(), error.emit_to_string(&text)));
    let info = Validator::new(ValidationFlags::all(), naga::valid::Capabilities::empty())
        .validate(&module)
        .unwrap_or_else(|error| panic!("{}: {}", variant.name(), error.emit_to_string(&text)));
    (module, info)
}

#[test]
fn the_list_reaches_every_class() {
    let variants = variants();
    for sinks in SINKS {
        for vec4 in [false, true] {
            assert!(variants.iter().any(|v| v.sink_logits == sinks && v.vec4 == vec4));
        }
    }
    let tiles: HashSet<_> = variants.iter().map(|v| v.tiles).collect();
    assert!(tiles.len() >= 5, "the tuning table has more rows than {tiles:?}");
}

#[test]
fn variants_validate_and_translate() {
    variants().par_iter().for_each(|variant| {
        let (module, info) = validated(variant);
        let entry = |name: &str| panic!("{}: no {name}", variant.name());
        let name = || variant.name();

        let options = spv::Options { lang_version: (1, 3), ..Default::default() };
        let words = spv::write_vec(&module, &info, &options, None).unwrap_or_else(|e| panic!("{}: {e}", name()));
        assert_eq!(words[0], 0x0723_0203, "{}: SPIR-V's magic number", name());

        let options = msl::Options { lang_version: (2, 4), ..Default::default() };
        let (_, written) = msl::write_string(&module, &info, &options, &msl::PipelineOptions::default())
            .unwrap_or_else(|e| panic!("{}: {e}", name()));
        written.entry_point_names[0].as_ref().unwrap_or_else(|e| entry(&e.to_string()));

        let options = hlsl::Options {
            shader_model: hlsl::ShaderModel::V6_0,
            // Where the kernel's num_workgroups comes from, as in wgpu.
            special_constants_binding: Some(hlsl::BindTarget { register: 0, space: 1, ..Default::default() }),
            ..Default::default()
        };
        let mut text = String::new();
        let written = hlsl::Writer::new(&mut text, &options, &hlsl::PipelineOptions::default())
            .write(&module, &info, None)
            .unwrap_or_else(|e| panic!("{}: {e}", name()));
        written.entry_point_names[0].as_ref().unwrap_or_else(|e| entry(&e.to_string()));
    });
}

/// The planner promises workgroup memory and threads by arithmetic of its own; the text must agree.
#[test]
fn variants_keep_the_planners_promises() {
    variants().par_iter().for_each(|variant| {
        let name = variant.name();
        let (module, _) = validated(variant);
        let mut layouter = naga::proc::Layouter::default();
        layouter.update(module.to_ctx()).unwrap();
        // As WebGPU counts: each variable rounded up to 16 bytes. Equal, so that nothing is given away either.
        let bytes: u32 = module
            .global_variables
            .iter()
            .filter(|(_, variable)| variable.space == AddressSpace::WorkGroup)
            .map(|(_, variable)| layouter[variable.ty].size.next_multiple_of(16))
            .sum();
        let tiles = &variant.tiles;
        assert_eq!(bytes, tiles.workgroup_bytes(variant.head_dim, variant.value_dim), "{name}: workgroup memory");
        let [entry] = &module.entry_points[..] else { panic!("{name}: one entry point") };
        assert_eq!((&*entry.name, entry.workgroup_size), ("forward", [tiles.threads(), 1, 1]), "{name}");
    });
}

/// Slots are never renumbered: hosts that bind by themselves, and captures of old runs, rely on them.
#[test]
fn bindings_stay_where_they_are() {
    let read = AddressSpace::Storage { access: StorageAccess::LOAD };
    let write = AddressSpace::Storage { access: StorageAccess::LOAD | StorageAccess::STORE };
    let all = [
        ("params", 0, AddressSpace::Uniform),
        ("q", 1, read),
        ("k", 2, read),
        ("v", 3, read),
        ("o", 4, write),
        ("lse", 5, write),
        ("sink_logits", 6, read),
    ];
    for variant in variants() {
        let (module, _) = validated(&variant);
        let mut bound: Vec<_> = module
            .global_variables
            .iter()
            .filter_map(|(_, g)| {
                let binding = g.binding?;
                assert_eq!(binding.group, 0);
                Some((g.name.clone().unwrap(), binding.binding, g.space))
            })
            .collect();
        bound.sort_by_key(|(_, slot, _)| *slot);
        let expected = &all[..if variant.sink_logits == SinkLogits::PerHead { 7 } else { 6 }];
        let bound: Vec<_> = bound.iter().map(|(name, slot, space)| (name.as_str(), *slot, *space)).collect();
        assert_eq!(bound, expected, "{}", variant.name());
        let storage = bound.iter().filter(|(_, _, space)| *space != AddressSpace::Uniform).count();
        assert!(storage <= 8, "{}: {storage} storage buffers", variant.name());
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

/// Layouts, pipelines and bind groups pass wgpu's validation with each device's limits.
#[test]
fn variants_build_on_every_device() {
    Capabilities::samples().par_iter().for_each(|capabilities| {
        let attention = noop(capabilities);
        let device = attention.device().unwrap();
        assert_eq!(device.capabilities().workgroup_bytes, capabilities.workgroup_bytes);
        let mut built = 0;
        for (_, problem, plan) in reachable().iter().filter(|(device, ..)| device == capabilities) {
            let variant = &plan.variant;
            // An element's offset makes the kernel read one by one.
            let offset = u64::from(!variant.vec4);
            let bytes = |shape: &[usize]| (shape.iter().product::<usize>() as u64 + offset) * 4;
            let buffer = |shape: &[usize]| empty(device, bytes(shape), BufferUsages::STORAGE);
            let [q, k, v, o] = [problem.q_shape(), problem.k_shape(), problem.v_shape(), problem.o_shape()]
                .map(|shape| buffer(&shape));
            let lse = buffer(&problem.lse_shape());
            let sinks = buffer(&[problem.shape().heads]);
            let buffers = ForwardBuffers {
                q: TensorView::new(&q).offset(offset),
                k: TensorView::new(&k).offset(offset),
                v: TensorView::new(&v).offset(offset),
                sink_logits: (variant.sink_logits == SinkLogits::PerHead).then(|| TensorView::new(&sinks)),
                o: TensorView::new(&o).offset(offset),
                lse: TensorView::new(&lse),
            };
            let prepared =
                pollster::block_on(attention.prepare_forward_with(problem, &buffers, Some(variant.tiles))).unwrap();
            assert_eq!(prepared.plan(), plan, "{problem} on {}", capabilities.name);
            built += 1;
        }
        assert!(built > 0);
    });
}

/// The test above proves something: such a device refuses what exceeds its limits. (Not workgroup memory:
/// browsers count it, wgpu does not, so `variants_keep_the_planners_promises` does.)
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
