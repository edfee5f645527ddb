//! The kernels, in the order of the passes, and the micro-kernels.

use std::fmt;
use std::hash::{Hash, Hasher};

use crate::device::capabilities::{Capabilities, DeviceClass};
use crate::kernel::spec::{Body, KernelSpec, Tiled};
use crate::kernel::{d_bias, d_kv, d_q, delta, forward, head_sums, mask_bits, merge, token_scales};

/// A kernel of the crate: a handle of its description.
#[derive(Clone, Copy)]
pub struct Kernel(&'static KernelSpec);

impl Kernel {
    /// o and lse.
    pub const FORWARD: Kernel = Kernel(&forward::FORWARD);
    /// delta = d_o . o - d_lse, and the first level of the sink logits' gradient: in f32, and in half precision where
    /// o_lo is there.
    pub const DELTA: Kernel = Kernel(&delta::DELTA);
    /// delta as the sum of p (d_o . v), less d_lse; in half precision without o_lo, where o is rounded.
    pub const EXACT_DELTA: Kernel = Kernel(&delta::EXACT_DELTA);
    /// The sink logits' gradient: its second level, but after [`EXACT_DELTA`](Self::EXACT_DELTA) the whole of it.
    pub const D_SINK_LOGITS: Kernel = Kernel(&head_sums::D_SINK_LOGITS);
    /// The gradient by q.
    pub const D_Q: Kernel = Kernel(&d_q::D_Q);
    /// The gradients by k and v.
    pub const D_KV: Kernel = Kernel(&d_kv::D_KV);
    /// The powers of two that bring each token's keys and values to the range of halves.
    pub const KEY_SCALES: Kernel = Kernel(&token_scales::KEY_SCALES);
    /// The same for queries and d_o.
    pub const QUERY_SCALES: Kernel = Kernel(&token_scales::QUERY_SCALES);
    /// The boolean mask in bits, with the classes of its blocks: which hold nothing visible, and which nothing hidden.
    pub const MASK_BITS: Kernel = Kernel(&mask_bits::MASK_BITS);
    /// The gradient by the bias.
    pub const D_BIAS: Kernel = Kernel(&d_bias::D_BIAS);
    /// The gradient by the ALiBi slopes, from what the d_q kernel has left for each row.
    pub const D_ALIBI_SLOPES: Kernel = Kernel(&head_sums::D_ALIBI_SLOPES);
    /// One state of several partial ones, see [`Attention::prepare_merge`](crate::Attention::prepare_merge).
    pub const MERGE: Kernel = Kernel(&merge::MERGE);

    /// The kernels that have tiles.
    pub const TILED: [Kernel; 5] = [Kernel::FORWARD, Kernel::EXACT_DELTA, Kernel::D_Q, Kernel::D_KV, Kernel::D_BIAS];

    /// A kernel of the tests' own.
    #[cfg(test)]
    pub(crate) const fn new(spec: &'static KernelSpec) -> Self {
        Kernel(spec)
    }

    pub(crate) fn spec(self) -> &'static KernelSpec {
        self.0
    }

    /// Its short name, as in files and tables.
    pub fn name(self) -> &'static str {
        self.0.name
    }

    /// The products, accumulators and sums of a kernel that has tiles; `None` for others.
    pub(crate) fn tiled(self) -> Option<&'static Tiled> {
        match &self.0.body {
            Body::Tiled(tiled) => Some(tiled),
            Body::Plain(_) => None,
        }
    }
}

/// By name.
impl PartialEq for Kernel {
    fn eq(&self, other: &Kernel) -> bool {
        self.name() == other.name()
    }
}

impl Eq for Kernel {}

impl Hash for Kernel {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.name().hash(state);
    }
}

/// The words of its name, as `ExactDelta`.
impl fmt::Debug for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for word in self.name().split('_') {
            let (first, rest) = word.split_at(word.len().min(1));
            write!(f, "{}{rest}", first.to_ascii_uppercase())?;
        }
        Ok(())
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

/// The kernels of a forward pass, in their order.
pub(crate) const FORWARD_PASS: &[Kernel] = &[Kernel::MASK_BITS, Kernel::KEY_SCALES, Kernel::FORWARD];

/// The kernels of a backward pass, in their order.
pub(crate) const BACKWARD_PASS: &[Kernel] = &[
    Kernel::MASK_BITS,
    Kernel::KEY_SCALES,
    Kernel::QUERY_SCALES,
    Kernel::DELTA,
    Kernel::EXACT_DELTA,
    Kernel::D_SINK_LOGITS,
    Kernel::D_Q,
    Kernel::D_KV,
    Kernel::D_ALIBI_SLOPES,
    Kernel::D_BIAS,
];

/// The kernels of a merge of partial states.
pub(crate) const MERGE_PASS: &[Kernel] = &[Kernel::MERGE];
