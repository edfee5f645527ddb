//! Kernels, micro-kernels, and the sizes that host and shaders agree on.

use std::fmt;

use crate::device::capabilities::{Capabilities, DeviceClass};

/// Rows of a workgroup of the delta kernel, and the threads that load a row together.
pub(crate) const DELTA_ROWS: u32 = 32;
pub(crate) const DELTA_LANES: u32 = 8;
/// Rows and words of 32 keys of a block of a boolean mask, which is classified as one.
pub(crate) const MASK_BLOCK_ROWS: u32 = 32;
pub(crate) const MASK_BLOCK_WORDS: u32 = 2;
/// Blocks whose classes are one word.
pub(crate) const MASK_GROUP: u32 = 16;
/// Words of a row that are packed at a time.
pub(crate) const MASK_STEP_WORDS: u32 = 8;
/// Words that kernels may read behind the last row of a mask's bits, and the rows or columns of a tile that they stand for.
pub(crate) const MASK_READ_BEYOND: u64 = 512;
pub(crate) const MASK_TILE: u64 = 32 * MASK_READ_BEYOND;
/// Words of a sequence in the table that kernels read.
pub(crate) const SEQUENCE_WORDS: u32 = 11;

/// The kernels of the crate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kernel {
    /// o and lse.
    Forward,
    /// delta = d_o . o - d_lse, and the first level of the sink logits' gradient: in f32, and in half precision where
    /// o_rest is there.
    Delta,
    /// delta as the sum of p (d_o . v), less d_lse; in half precision without o_rest, where o is rounded.
    ExactDelta,
    /// The sink logits' gradient: its second level, but after [`ExactDelta`](Self::ExactDelta) the whole of it.
    DSinkLogits,
    /// The gradient by q.
    DQ,
    /// The gradients by k and v.
    DKv,
    /// The powers of two that bring each token's keys and values to the range of halves.
    KeyScales,
    /// The same for queries and d_o.
    QueryScales,
    /// The boolean mask in bits, with the classes of its blocks: which hold nothing visible, and which nothing hidden.
    MaskBits,
    /// The gradient by the bias.
    DBias,
    /// The gradient by the ALiBi slopes, from what the d_q kernel has left for each row.
    DAlibiSlopes,
    /// One state of several partial ones, see [`Attention::prepare_merge`](crate::Attention::prepare_merge).
    Merge,
}

impl Kernel {
    /// The kernels that have tiles.
    pub const TILED: [Kernel; 5] = [Kernel::Forward, Kernel::ExactDelta, Kernel::DQ, Kernel::DKv, Kernel::DBias];

    /// Its short name, as in files and tables.
    pub fn name(self) -> &'static str {
        match self {
            Kernel::Forward => "forward",
            Kernel::Delta => "delta",
            Kernel::ExactDelta => "exact_delta",
            Kernel::DSinkLogits => "d_sink_logits",
            Kernel::DQ => "d_q",
            Kernel::DKv => "d_kv",
            Kernel::KeyScales => "key_scales",
            Kernel::QueryScales => "query_scales",
            Kernel::MaskBits => "mask_bits",
            Kernel::DBias => "d_bias",
            Kernel::DAlibiSlopes => "d_alibi_slopes",
            Kernel::Merge => "merge",
        }
    }

    pub(crate) fn template(self) -> String {
        match self {
            Kernel::KeyScales | Kernel::QueryScales => "token_scales.wgsl".into(),
            Kernel::DSinkLogits | Kernel::DAlibiSlopes => "head_sums.wgsl".into(),
            kernel => format!("{}.wgsl", kernel.name()),
        }
    }

    /// Whether it has tiles, or only sums along rows.
    pub(crate) fn has_tiles(self) -> bool {
        Kernel::TILED.contains(&self)
    }

    /// Widths of the accumulators that a row of a tile keeps in registers.
    pub(crate) fn accumulator_widths(self, head_dim: u32, value_dim: u32) -> [u32; 2] {
        match self {
            Kernel::Forward => [value_dim, 0],
            Kernel::DQ => [head_dim, 0],
            Kernel::DKv => [head_dim, value_dim],
            _ => [0, 0],
        }
    }

    /// Tiles of scores that a thread holds at once.
    pub(crate) fn score_tiles(self) -> u32 {
        match self {
            Kernel::Forward => 1,
            Kernel::DBias => 3,
            _ => 2,
        }
    }
}

/// How a kernel forms matrix products.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum MicroKernel {
    /// The one that a [`Tuning`](crate::Tuning) has found faster, else cooperative matrices where they have been measured (NVIDIA
    /// through Vulkan, f16 and bf16), else the portable one.
    #[default]
    Auto,
    /// Multiply-adds in f32, on every device.
    Portable,
    /// Cooperative matrices (tensor cores).
    Cooperative,
}

impl MicroKernel {
    /// Floating-point operations that the slowest device like this one worth the name does in a second, by which the time of a
    /// dispatch is estimated. Low on purpose: what is estimated too short may lose the device. Not lower than that: what is
    /// estimated too long is cut in vain, into dispatches that do not fill a fast device (on an H200, eight of 64 workgroups
    /// each took five times as long as one of 512).
    pub(crate) fn flops(self, capabilities: &Capabilities) -> f64 {
        let has_matrices = capabilities.cooperative.is_some();
        match (capabilities.class, self) {
            (DeviceClass::Nvidia, MicroKernel::Cooperative) => 1e13,
            (DeviceClass::Nvidia, _) if has_matrices => 5e12,
            (DeviceClass::Amd, MicroKernel::Cooperative) => 4e12,
            (DeviceClass::Nvidia | DeviceClass::Amd, _) => 1e12,
            (DeviceClass::Apple, _) => 5e11,
            (DeviceClass::Intel, _) => 1e11,
            (DeviceClass::Other, _) => 5e10,
            (DeviceClass::Software, _) => 2e9,
        }
    }
}

impl fmt::Display for MicroKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            MicroKernel::Auto => "auto",
            MicroKernel::Portable => "portable",
            MicroKernel::Cooperative => "cooperative",
        })
    }
}
