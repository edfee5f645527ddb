//! The objects that wgpu runs: pipelines, operands that are checked and bound, recorded passes.

pub(crate) mod bind;
pub(crate) mod bound_operand;
pub mod buffers;
pub(crate) mod pipeline;
pub(crate) mod pipeline_cache;
pub mod prepared;
#[cfg(not(target_family = "wasm"))]
mod spirv;
