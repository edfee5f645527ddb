//! The description of a kernel: its name, the operands that it binds, the options that its pipeline fixes, its tiles and its text.

mod append;
pub(crate) mod binding;
pub(crate) mod cache;
mod d_bias;
mod d_kv;
mod d_q;
mod decode;
mod delta;
mod forward;
mod head_sums;
pub(crate) mod loops;
mod mask_bits;
mod merge;
pub(crate) mod micro_kernel;
mod moves;
pub(crate) mod names;
pub(crate) mod params;
pub(crate) mod precision;
pub(crate) mod sizes;
pub(crate) mod spec;
pub(crate) mod template;
pub mod tile;
mod token_scales;
pub(crate) mod variant;

pub(crate) use binding::Binding;
pub use micro_kernel::MicroKernel;
pub use names::Kernel;
pub(crate) use names::{BACKWARD_PASS, DECODE_PASS, FORWARD_PASS, MERGE_PASS};
pub use precision::Precision;
pub(crate) use sizes::{DELTA_ROWS, MASK_BLOCK_ROWS, MASK_READ_BEYOND, MASK_TILE, SEQUENCE_WORDS};
pub use spec::OptionalOperands;
pub use variant::Variant;
