//! placeholder

mod attention;
mod capabilities;
pub mod compare;
pub mod cpu;
mod device;
mod dispatch;
mod error;
#[cfg(feature = "cli")]
pub mod io;
mod mask;
mod pipeline;
mod plan;
mod problem;
mod shader;
mod tensor;
mod tiles;

pub use attention::Attention;
pub use capabilities::{Capabilities, DeviceClass};
pub use device::{ADAPTER_VARIABLE, Device, DeviceChoice, adapters, describe, device_descriptor};
pub use dispatch::{BackwardBuffers, ForwardBuffers, Prepared};
pub use error::{Error, Result};
pub use mask::{KeyTiles, Mask};
pub use pipeline::DUMP_VARIABLE;
pub use plan::{Pass, Plan};
pub use problem::{
    Alignment, DType, Gradients, Inputs, Layout, Options, Output, Problem, Shape, SinkLogits, Upstream, Window,
};
pub use shader::{Kernel, Variant};
pub use tensor::TensorView;
pub use tiles::Tiles;
pub use wgpu;
