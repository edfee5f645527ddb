//! Every variant of the kernels of caches parses, validates, translates and fits.

use naga::AddressSpace;
use naga::back::{hlsl, msl, spv};
use naga::valid::{Capabilities as Wgsl, ShaderStages, SubgroupOperationSet, ValidationFlags, Validator};
use rayon::prelude::*;

use crate::testing::variants::cache_variants;

#[path = "../../tests/common/tint.rs"]
mod tint;

#[test]
fn every_variant_validates_translates_and_fits() {
    cache_variants().into_par_iter().for_each(|(variant, device)| {
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
