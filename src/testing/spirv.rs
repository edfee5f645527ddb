//! SPIR-V that is made for drivers, for those who look at it.

use crate::device::markers::Operands;
use crate::device::{SpirvVersion, memory_model, probe};

/// What naga writes, with what it leaves out under Vulkan's memory model.
///
/// # Errors
/// Words that are no module.
pub fn mended(words: &[u32]) -> Result<Vec<u32>, String> {
    memory_model::mend(words)
}

/// The kernel that asks a device with fragments of a side, and subgroups of so many lanes, where it keeps elements: of matrices that
/// multiply f16, or bf16.
///
/// # Errors
/// A number of lanes that cannot share a fragment.
pub fn probe_kernel(side: u32, lanes: u32, bf16: bool, version: SpirvVersion) -> Result<Vec<u32>, String> {
    let operands = if bf16 { Operands::Bf16 } else { Operands::F16 };
    probe::spirv(side, lanes, operands, version)
}
