//! Micro-kernels: ways to form matrix products.

use std::fmt;

/// How a kernel forms matrix products.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum MicroKernel {
    /// The one that a [`Tuning`](crate::tuning::Tuning) has found faster, else cooperative matrices where they have been measured (NVIDIA
    /// through Vulkan, f16 and bf16), else the portable one.
    #[default]
    Auto,
    /// Multiply-adds in f32, on every device.
    Portable,
    /// Cooperative matrices (tensor cores).
    Cooperative,
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
