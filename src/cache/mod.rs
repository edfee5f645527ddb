//! Caches of keys and values, decoding from them, and the ordinary passes through them.

#[cfg(feature = "gpu")]
mod append;
#[cfg(feature = "gpu")]
mod backward;
mod batch;
#[cfg(feature = "gpu")]
mod bind;
pub(crate) mod cpu;
#[cfg(feature = "gpu")]
mod decode;
#[cfg(feature = "safetensors")]
mod file;
#[cfg(feature = "gpu")]
mod gather;
#[cfg(feature = "gpu")]
mod gpu;
#[cfg(feature = "gpu")]
mod host;
mod places;
#[cfg(feature = "gpu")]
mod prefill;
mod rotary;
#[cfg(all(test, feature = "gpu"))]
mod shaders;
#[cfg(feature = "gpu")]
mod step;

#[cfg(feature = "gpu")]
pub use self::append::{AppendBuffers, PreparedAppend};
#[cfg(feature = "gpu")]
pub use self::backward::{CacheBackwardBuffers, PreparedCacheBackward};
pub use self::batch::Prefill;
#[cfg(feature = "gpu")]
pub use self::decode::{DecodeBuffers, PreparedDecode};
#[cfg(feature = "gpu")]
pub use self::gpu::KvCache;
#[cfg(feature = "gpu")]
pub use self::host::HostCache;
#[cfg(feature = "gpu")]
pub use self::prefill::{PrefillBuffers, PreparedPrefill};
pub use self::rotary::{RotaryFrequencies, RotaryScaling, Yarn};
#[cfg(feature = "gpu")]
pub use self::step::{Step, StepPass};
