//! Where it is computed: what devices offer, how one is found and opened, buffers on it.

#[cfg(feature = "gpu")]
pub(crate) mod adapter;
#[cfg(feature = "gpu")]
mod bfloat16;
#[cfg(feature = "gpu")]
pub(crate) mod buffer;
pub(crate) mod capabilities;
pub(crate) mod elements;
#[cfg(all(feature = "gpu", not(target_family = "wasm")))]
pub(crate) mod markers;
#[cfg(all(feature = "gpu", not(target_family = "wasm")))]
pub(crate) mod memory_model;
#[cfg(feature = "gpu")]
mod open;
#[cfg(all(feature = "gpu", not(target_family = "wasm")))]
pub(crate) mod probe;
#[cfg(all(feature = "gpu", not(target_family = "wasm")))]
pub(crate) mod spirv;
#[cfg(all(feature = "gpu", not(target_family = "wasm")))]
pub(crate) mod subgroups;

#[cfg(feature = "gpu")]
pub use self::adapter::{device_descriptor, is_software};
#[cfg(feature = "gpu")]
pub use self::buffer::{BufferElement, DeviceBuffer, TensorView};
pub use self::capabilities::{
    Capabilities, CooperativeMatrices, DeviceClass, Multiprocessor, RegisterFile, Rounding, SpirvVersion,
};
pub use self::elements::ElementLayout;
#[cfg(all(feature = "gpu", not(target_family = "wasm")))]
pub use self::open::adapters;
#[cfg(feature = "gpu")]
pub use self::open::{ADAPTER_VARIABLE, Device, DeviceChoice, DeviceReason, Selection, adapters_async, describe};
pub use crate::problem::element::BufferType;
