//! Every variant of the kernels of caches parses, validates, translates and fits.

use naga::AddressSpace;
use naga::back::{hlsl, msl, spv};
use naga::valid::{Capabilities as Wgsl, ShaderStages, SubgroupOperationSet, ValidationFlags, Validator};
use rayon::prelude::*;

use crate::device::capabilities::Capabilities;
use crate::kernel::cache::CacheOptions;
use crate::kernel::tile::decode::DecodeTiles;
use crate::kernel::{Kernel, Variant};
use crate::plan::pass::check_limits;
use crate::plan::splits::DecodeTiling;
use crate::problem::SinkLogits;
use crate::problem::cache::{CacheConfig, CacheKind, Rotary, RotaryPositions, RotaryStyle};
use crate::problem::element::DType;
use crate::problem::row_format::Quantisation;

#[path = "../../tests/common/tint.rs"]
mod tint;

const KINDS: [CacheKind; 3] = [
    CacheKind::Contiguous { capacity: 1000 },
    CacheKind::Paged { page_size: 16, pages: 64, sequence_pages: 64 },
    CacheKind::Rolling { sink_tokens: 4, window: 128, queries: 16 },
];

/// The planner's variants for widths, types, kinds and groups on any device. Every option occurs in one of them.
fn variants() -> Vec<(Variant, Capabilities)> {
    let mut found = Vec::new();
    let widths = [[1, 1], [5, 33], [64, 64], [80, 16], [128, 128], [192, 128], [256, 256], [512, 1], [512, 512]];
    let mut turn = 0;
    for [head_dim, value_dim] in widths {
        for dtype in [DType::F32, DType::F16, DType::Bf16] {
            for kind in KINDS {
                for (rows, quantisation) in
                    [(1usize, None), (3, None), (8, None), (128, None), (4, Some(Quantisation::Q8_0))]
                {
                    turn += 1;
                    let devices = Capabilities::samples();
                    let device = devices[turn % devices.len()].clone();
                    let style = [RotaryStyle::HalfSplit, RotaryStyle::Interleaved][turn % 2];
                    let positions = match kind {
                        CacheKind::Rolling { .. } if turn % 4 > 1 && quantisation.is_none() => {
                            RotaryPositions::CacheRelative
                        }
                        _ => RotaryPositions::Absolute,
                    };
                    let dim = head_dim as u32 / 16 * 16;
                    let rotary = (dim > 0 && !turn.is_multiple_of(3)).then_some(Rotary { dim, style, positions });
                    let config = CacheConfig::new(kind, 2, 2, head_dim)
                        .value_dim(value_dim)
                        .dtype(dtype)
                        .rotary(rotary)
                        .quantisation(quantisation);
                    let several = rows > 8;
                    let cooperative = DecodeTiling::cooperative(&config, rows, 4, several, &device).ok();
                    let fragments = DecodeTiling::fragments(&config, rows, 4, &device).ok();
                    let tiling = fragments.filter(|_| !turn.is_multiple_of(4)).or(cooperative);
                    let tiling = tiling.filter(|_| !turn.is_multiple_of(3));
                    let tiling = tiling.unwrap_or_else(|| DecodeTiling::portable(&config, rows, 4, &device));
                    let matrices = device.cooperative;
                    let sink_logits = [SinkLogits::None, SinkLogits::OffByOne, SinkLogits::PerHead][turn % 3];
                    let softcap = turn.is_multiple_of(5);
                    let alibi = turn % 4 > 1;
                    let one = matches!(tiling.tiles, DecodeTiles::Cooperative { .. });
                    let tree = turn % 2 == 1 && !one && rotary.is_none();
                    let rotates_q = rotary.is_some() && !turn.is_multiple_of(5);
                    let vec4 = [head_dim, value_dim].iter().all(|n: &usize| n.is_multiple_of(4)) && turn % 7 > 0;
                    let moved = CacheOptions { rotary, ..CacheOptions::new(&config, vec4) };
                    let decoded = CacheOptions {
                        tiles: Some(tiling.tiles),
                        tile: tiling.tiles.keys(matrices),
                        matrices,
                        several: several || tree,
                        tree,
                        softcap,
                        alibi: alibi && !config.is_relative(),
                        sink_logits,
                        row_max: turn % 4 < 2,
                        rotary: rotary.filter(|_| config.is_relative()),
                        indexed: turn.is_multiple_of(2),
                        ..moved
                    };
                    let append = CacheOptions { rotates_q, ..moved };
                    // Keys that are rotated as they are read are not gathered and have no gradients, and neither are quantised ones.
                    let behind = CacheOptions { gathered: true, ..moved };
                    let unrotated = CacheOptions { rotary: None, ..moved };
                    let gathers = [(Kernel::APPEND, behind), (Kernel::GATHER, unrotated)];
                    let gathers = gathers.into_iter().filter(|_| !config.is_relative());
                    let scatters = quantisation.is_none().then_some((Kernel::SCATTER, unrotated));
                    let kernels = [(Kernel::DECODE, decoded), (Kernel::COMBINE, decoded), (Kernel::APPEND, append)];
                    for (kernel, options) in kernels.into_iter().chain(gathers).chain(scatters) {
                        let variant = Variant::of_cache(kernel, options);
                        check_limits(&variant, &device).unwrap();
                        found.push((variant, device.clone()));
                    }
                }
            }
        }
    }
    found
}

#[test]
fn every_variant_validates_translates_and_fits() {
    variants().into_par_iter().for_each(|(variant, device)| {
        let name = variant.name();
        let text = variant.wgsl().unwrap();
        assert_eq!(tint::mixed_operators(&text), [""; 0], "{name}");
        let module = naga::front::wgsl::parse_str(&text)
            .unwrap_or_else(|error| panic!("{name}: {}\n{text}", error.emit_to_string(&text)));
        let needs_matrices = variant.micro_kernel.properties().needs_matrices;
        let matrices = Wgsl::COOPERATIVE_MATRIX | Wgsl::SHADER_FLOAT16 | Wgsl::SUBGROUP | Wgsl::SUBGROUP_BARRIER;
        let needed = if needs_matrices { matrices } else { Wgsl::empty() };
        let mut validator = Validator::new(ValidationFlags::all(), Wgsl::SHADER_FLOAT16_IN_FLOAT32 | needed);
        if needs_matrices {
            validator.subgroup_stages(ShaderStages::COMPUTE).subgroup_operations(SubgroupOperationSet::all());
        } else {
            validator.subgroup_stages(ShaderStages::empty()).subgroup_operations(SubgroupOperationSet::empty());
        }
        let info = validator.validate(&module).unwrap_or_else(|error| panic!("{name}: {error:?}"));

        let spv = spv::Options { lang_version: (1, 3), ..Default::default() };
        spv::write_vec(&module, &info, &spv, None).unwrap_or_else(|error| panic!("{name}: {error}"));
        if let Some(version) = device.spirv {
            variant.spirv(version).unwrap();
        }
        let msl = msl::Options { lang_version: (2, 4), ..Default::default() };
        msl::write_string(&module, &info, &msl, &msl::PipelineOptions::default())
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        // DX12 has no cooperative matrices.
        if !needs_matrices {
            let options = hlsl::Options {
                shader_model: hlsl::ShaderModel::V6_0,
                special_constants_binding: Some(hlsl::BindTarget { register: 0, space: 1, ..Default::default() }),
                ..Default::default()
            };
            hlsl::Writer::new(&mut String::new(), &options, &hlsl::PipelineOptions::default())
                .write(&module, &info, None)
                .unwrap_or_else(|error| panic!("{name}: {error}"));
        }

        let mut layouter = naga::proc::Layouter::default();
        layouter.update(module.to_ctx()).unwrap();
        let variables = || module.global_variables.iter();
        let memory: u32 = variables()
            .filter(|(_, variable)| variable.space == AddressSpace::WorkGroup)
            .map(|(_, variable)| layouter[variable.ty].size)
            .sum();
        assert_eq!(memory, variant.workgroup_bytes(), "{name}");
        assert!(memory <= device.workgroup_bytes, "{name}: {memory} bytes of workgroup memory");
        let storage = variables().filter(|(_, v)| matches!(v.space, AddressSpace::Storage { .. })).count();
        assert!(storage <= 8, "{name}: {storage} storage buffers");
        let bound = variables().filter(|(_, variable)| variable.binding.is_some()).count();
        assert_eq!(bound, variant.bindings().len(), "{name}");
    });
}
