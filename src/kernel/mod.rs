//! How one kernel looks: its name, what it binds, what its pipeline fixes, its tiles, its text.

pub(crate) mod binding;
pub(crate) mod names;
pub(crate) mod template;
pub mod tile;
pub(crate) mod variant;

pub(crate) use binding::Binding;
pub(crate) use names::{
    DELTA_LANES, DELTA_ROWS, MASK_BLOCK_ROWS, MASK_BLOCK_WORDS, MASK_GROUP, MASK_READ_BEYOND, MASK_TILE, SEQUENCE_WORDS,
};
pub use names::{Kernel, MicroKernel};
pub(crate) use template::{Compose, render};
pub use variant::Variant;
