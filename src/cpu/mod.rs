//! Attention on the CPU: the definition, and a fast path for machines without a GPU.

pub mod reference;
mod rows;
mod simd;
mod tiled;

pub use tiled::forward;

/// placeholder until the CPU backward lands
pub fn backward(
    _: &crate::Problem,
    _: &crate::Inputs<'_>,
    _: &crate::Output,
    _: &crate::Upstream<'_>,
) -> crate::Result<crate::Gradients> {
    Err(crate::Error::NoAdapter)
}
