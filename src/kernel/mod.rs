//! How one kernel looks: its name, what it binds, what its pipeline fixes, its tiles, its text.

pub(crate) mod binding;
mod d_bias;
mod d_kv;
mod d_q;
mod delta;
mod forward;
mod head_sums;
mod mask_bits;
mod merge;
pub(crate) mod names;
pub(crate) mod params;
pub(crate) mod sizes;
pub(crate) mod spec;
pub(crate) mod template;
pub mod tile;
mod token_scales;
pub(crate) mod variant;

pub(crate) use binding::Binding;
pub(crate) use names::{BACKWARD_PASS, FORWARD_PASS, MERGE_PASS};
pub use names::{Kernel, MicroKernel};
pub(crate) use sizes::{DELTA_ROWS, MASK_BLOCK_ROWS, MASK_READ_BEYOND, MASK_TILE, SEQUENCE_WORDS};
pub use spec::OptionalOperands;
pub(crate) use template::{Compose, render};
pub use variant::Variant;
