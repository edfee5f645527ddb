//! Attention on the CPU: the definition, and a fast path for machines without a GPU.

pub mod reference;
mod rows;
mod simd;
mod tiled;

pub use tiled::forward;
