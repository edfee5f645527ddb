//! Caches of keys and values, decoding from them, and the ordinary passes through them.

mod append;
mod backward;
mod batch;
mod bind;
mod config;
pub(crate) mod cpu;
mod decode;
#[cfg(feature = "safetensors")]
mod file;
mod format;
mod gather;
mod gpu;
mod limits;
mod places;
mod plan;
mod prefill;
mod rotary;
pub(crate) mod shader;
mod step;

pub use self::append::{AppendBuffers, PreparedAppend};
pub use self::backward::{CacheBackwardBuffers, PreparedCacheBackward};
pub use self::batch::Prefill;
pub use self::config::{CacheConfig, CacheKind, Rotary, RotaryPositions, RotaryStyle};
pub use self::decode::{Decode, DecodeBuffers, PreparedDecode};
pub use self::format::Quantisation;
pub use self::gpu::KvCache;
pub use self::plan::{DecodeTiles, DecodeTiling};
pub use self::prefill::{PrefillBuffers, PreparedPrefill};
pub use self::rotary::{RotaryFrequencies, RotaryScaling, Yarn};
pub use self::step::{Step, StepPass};
