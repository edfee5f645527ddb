//! Attention on the CPU: the definition, and a fast path for machines without a GPU.

mod backward;
mod exact;
mod merge;
pub mod reference;
mod rows;
mod scores;
mod simd;
mod tiled;

pub use crate::cache::PrefillOperands;
pub use crate::cache::cpu::KvCache;
pub use backward::backward;
pub use merge::{finish, merge};
pub use tiled::{forward, forward_with_row_max};
