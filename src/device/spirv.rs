//! From WGSL to SPIR-V, as wgpu does it for the driver.

use naga::back::spv;
use naga::proc::{BoundsCheckPolicies, BoundsCheckPolicy};
use naga::valid::{ValidationFlags, Validator};

use crate::device::capabilities::SpirvVersion;
use crate::device::markers::{self, Operands};
use crate::device::memory_model;

/// A translation of one text of WGSL.
pub(crate) struct Translation<'a> {
    /// The slots of its bindings, ascending. They are numbered one after the other.
    pub(crate) slots: &'a [u32],
    /// It multiplies cooperative matrices.
    pub(crate) needs_matrices: bool,
    /// It calls functions that stand for instructions of SPIR-V, and its matrices multiply these numbers.
    pub(crate) markers: Option<Operands>,
}

impl Translation<'_> {
    /// The words of a text, with the options of wgpu-hal 30, in its src/vulkan/adapter.rs and device.rs, for a module without run-time
    /// checks. [`memory_model`] adds what naga leaves out.
    ///
    /// # Errors
    /// The reason why naga refuses the text, or why a marker does not fit.
    pub(crate) fn of(&self, text: &str, version: SpirvVersion) -> Result<Vec<u32>, String> {
        use naga::valid::Capabilities as Needs;
        // unpack2x16float is no extension of WGSL, but naga counts it as one.
        let mut needs = Needs::SHADER_FLOAT16_IN_FLOAT32;
        // What every Vulkan offers, of what kernels may need.
        let mut offered = vec![spv::Capability::Shader, spv::Capability::Matrix];
        if self.needs_matrices {
            needs |= Needs::COOPERATIVE_MATRIX | Needs::SHADER_FLOAT16 | Needs::SUBGROUP | Needs::SUBGROUP_BARRIER;
            offered.extend([
                spv::Capability::GroupNonUniform,
                spv::Capability::GroupNonUniformVote,
                spv::Capability::GroupNonUniformArithmetic,
                spv::Capability::GroupNonUniformBallot,
                spv::Capability::GroupNonUniformShuffle,
                spv::Capability::GroupNonUniformShuffleRelative,
                spv::Capability::GroupNonUniformQuad,
                spv::Capability::Float16,
                spv::Capability::CooperativeMatrixKHR,
                spv::Capability::VulkanMemoryModel,
            ]);
        }
        let module = naga::front::wgsl::parse_str(text).map_err(|error| error.emit_to_string(text))?;
        let info = Validator::new(ValidationFlags::all(), needs).validate(&module);
        let info = info.map_err(|error| error.emit_to_string(text))?;

        let place = |(number, slot): (u32, &u32)| {
            let info = spv::BindingInfo { descriptor_set: 0, binding: number, binding_array_size: None };
            (naga::ResourceBinding { group: 0, binding: *slot }, info)
        };
        let options = spv::Options {
            lang_version: (version.major, version.minor),
            // Names tell markers apart.
            flags: match self.markers.is_some() {
                true => spv::WriterFlags::DEBUG,
                false => spv::WriterFlags::empty(),
            } | spv::WriterFlags::LABEL_VARYINGS
                | spv::WriterFlags::FORCE_POINT_SIZE,
            fake_missing_bindings: false,
            binding_map: (0..).zip(self.slots).map(place).collect(),
            capabilities: Some(offered.into_iter().collect()),
            bounds_check_policies: BoundsCheckPolicies {
                index: BoundsCheckPolicy::Unchecked,
                buffer: BoundsCheckPolicy::Unchecked,
                image_load: BoundsCheckPolicy::Unchecked,
                binding_array: BoundsCheckPolicy::Unchecked,
            },
            // As `compile` of src/exec/pipeline.rs asks for.
            zero_initialize_workgroup_memory: spv::ZeroInitializeWorkgroupMemoryMode::None,
            force_loop_bounding: false,
            emit_int_div_checks: false,
            ray_query_initialization_tracking: false,
            use_storage_input_output_16: false,
            ..spv::Options::default()
        };
        let entry = spv::PipelineOptions { shader_stage: naga::ShaderStage::Compute, entry_point: "main".into() };
        let words = spv::write_vec(&module, &info, &options, Some(&entry)).map_err(|error| error.to_string())?;
        let words = match self.markers {
            Some(operands) => markers::rewrite(&words, operands)?,
            None => words,
        };
        memory_model::mend(&words)
    }
}
