//! placeholder

mod attention;
pub mod cpu;
mod error;
mod mask;
mod problem;

pub use attention::{Attention, DeviceChoice};
pub use error::{Error, Result};
pub use mask::{KeyTiles, Mask};
pub use problem::{Alignment, DType, Inputs, Layout, Options, Output, Problem, Shape, SinkLogits, Window};
