//! Caches of keys and values, decoding from them, and the ordinary passes through them.

mod append;
mod backward;
mod batch;
mod bind;
pub(crate) mod cpu;
mod decode;
#[cfg(feature = "safetensors")]
mod file;
mod gather;
mod gpu;
mod places;
mod prefill;
mod rotary;
#[cfg(test)]
mod shaders;
mod step;

pub use self::append::{AppendBuffers, PreparedAppend};
pub use self::backward::{CacheBackwardBuffers, PreparedCacheBackward};
pub use self::batch::Prefill;
pub use self::decode::{DecodeBuffers, PreparedDecode};
pub use self::gpu::KvCache;
pub use self::prefill::{PrefillBuffers, PreparedPrefill};
pub use self::rotary::{RotaryFrequencies, RotaryScaling, Yarn};
pub use self::step::{Step, StepPass};
pub use crate::kernel::tile::decode::DecodeTiles;
pub use crate::plan::decode::Decode;
pub use crate::plan::splits::DecodeTiling;
pub use crate::problem::cache::{CacheConfig, CacheKind, Rotary, RotaryPositions, RotaryStyle};
pub use crate::problem::row_format::Quantisation;
