//! The computation: options, sizes, operands in host memory, the visibility rule. Nothing here knows of devices.

pub(crate) mod cache;
pub mod element;
pub mod error;
pub(crate) mod host;
pub mod mask;
pub(crate) mod options;
pub(crate) mod row_format;
pub(crate) mod shape;
pub(crate) mod sizes;
pub(crate) mod tree;
pub mod varlen;

pub(crate) use host::mask_word;
pub use host::{Bias, Gradients, Inputs, MaskData, Output, PartialState, Upstream};
pub use options::{Alignment, Axes, Layout, MaskPacking, Options, SinkLogits, Window};
pub use shape::Problem;
pub(crate) use shape::{MAX_WIDTH, check_length};
pub use sizes::Shape;
