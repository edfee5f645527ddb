//! Caches of keys and values, decoding from them, and the ordinary passes through them.

#[cfg(feature = "gpu")]
mod append;
#[cfg(feature = "gpu")]
mod backward;
#[cfg(feature = "cpu")]
mod batch;
#[cfg(feature = "gpu")]
mod bind;
#[cfg(feature = "cpu")]
mod block_table;
#[cfg(feature = "cpu")]
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
#[cfg(feature = "cpu")]
mod keep;
#[cfg(feature = "gpu")]
mod prefill;
#[cfg(feature = "cpu")]
mod rotary;
#[cfg(feature = "gpu")]
mod step;
#[cfg(feature = "cpu")]
mod tree;

#[cfg(feature = "gpu")]
pub use self::append::{AppendBuffers, PreparedAppend};
#[cfg(feature = "gpu")]
pub use self::backward::{BackwardBuffers, PreparedBackward};
#[cfg(feature = "cpu")]
pub use self::batch::{Prefill, PrefillOperands};
#[cfg(feature = "gpu")]
pub use self::decode::{DecodeBuffers, PreparedDecode};
#[cfg(feature = "gpu")]
pub use self::gpu::KvCache;
#[cfg(feature = "gpu")]
pub use self::host::HostCache;
#[cfg(feature = "gpu")]
pub use self::prefill::{PrefillBuffers, PreparedPrefill};
#[cfg(feature = "cpu")]
pub use self::rotary::{RotaryFrequencies, RotaryScaling, Yarn};
#[cfg(feature = "gpu")]
pub use self::step::{Step, StepPass};
pub use crate::kernel::tile::decode::DecodeTiles;
pub use crate::plan::decode::{Decode, DecodeOperands};
pub use crate::plan::splits::DecodeTiling;
pub use crate::problem::cache::{CacheConfig, CacheKind, Rotary, RotaryPositions, RotaryStyle};
pub use crate::problem::row_format::Quantisation;
pub use crate::problem::tree::TreeMask;
