//! The kernels, in the order of the passes.

use std::fmt;
use std::hash::{Hash, Hasher};

use crate::kernel::spec::{Body, Cached, KernelSpec, Tiled};
use crate::kernel::{
    append, d_bias, d_kv, d_q, decode, delta, forward, head_sums, mask_bits, merge, moves, token_scales,
};

/// A kernel of the crate: a handle of its description.
#[derive(Clone, Copy)]
pub struct Kernel(&'static KernelSpec);

impl Kernel {
    /// o and lse.
    pub const FORWARD: Kernel = Kernel(&forward::FORWARD);
    /// delta = d_o . o - d_lse, and the first level of the sink logits' gradient. Used in f32, and in half precision with o_lo.
    pub const DELTA: Kernel = Kernel(&delta::DELTA);
    /// delta as the sum of p (d_o . v), less d_lse. Used in half precision without o_lo, where o is rounded.
    pub const EXACT_DELTA: Kernel = Kernel(&delta::EXACT_DELTA);
    /// The second level of the sink logits' gradient, or all of it after [`EXACT_DELTA`](Self::EXACT_DELTA).
    pub const D_SINK_LOGITS: Kernel = Kernel(&head_sums::D_SINK_LOGITS);
    /// The gradient by q.
    pub const D_Q: Kernel = Kernel(&d_q::D_Q);
    /// The gradients by k and v.
    pub const D_KV: Kernel = Kernel(&d_kv::D_KV);
    /// The powers of two that bring each token's keys and values to the range of halves.
    pub const KEY_SCALES: Kernel = Kernel(&token_scales::KEY_SCALES);
    /// The powers of two that bring each token's queries and d_o to the range of halves.
    pub const QUERY_SCALES: Kernel = Kernel(&token_scales::QUERY_SCALES);
    /// The boolean mask in bits, and the classes of its blocks: nothing visible, nothing hidden, or both kinds of pairs.
    pub const MASK_BITS: Kernel = Kernel(&mask_bits::MASK_BITS);
    /// The gradient by the bias.
    pub const D_BIAS: Kernel = Kernel(&d_bias::D_BIAS);
    /// The gradient by the ALiBi slopes, from the sums that the d_q kernel leaves for each row.
    pub const D_ALIBI_SLOPES: Kernel = Kernel(&head_sums::D_ALIBI_SLOPES);
    /// One state of several partial ones, see [`Attention::prepare_merge`](crate::Attention::prepare_merge).
    pub const MERGE: Kernel = Kernel(&merge::MERGE);

    /// Appends new keys and values to a cache, and rotates queries in place.
    pub const APPEND: Kernel = Kernel(&append::APPEND);
    /// A few queries against splits of the keys of a cache.
    pub const DECODE: Kernel = Kernel(&decode::DECODE);
    /// o and lse from the splits of each row.
    pub const COMBINE: Kernel = Kernel(&decode::COMBINE);
    /// Copies keys and values of some sequences of a cache, one sequence after the other.
    pub const GATHER: Kernel = Kernel(&moves::GATHER);
    /// Copies gradients by gathered keys and values into the layout of the cache.
    pub const SCATTER: Kernel = Kernel(&moves::SCATTER);

    /// The kernels that have tiles.
    pub const TILED: [Kernel; 5] = [Kernel::FORWARD, Kernel::EXACT_DELTA, Kernel::D_Q, Kernel::D_KV, Kernel::D_BIAS];

    /// A kernel that exists in a test only.
    #[cfg(test)]
    pub(crate) const fn new(spec: &'static KernelSpec) -> Self {
        Kernel(spec)
    }

    pub(crate) fn spec(self) -> &'static KernelSpec {
        self.0
    }

    /// The short name that files and tables use.
    pub fn name(self) -> &'static str {
        self.0.name
    }

    /// The description of a kernel of caches, and `None` for every other kernel.
    pub(crate) fn cached(self) -> Option<&'static Cached> {
        match &self.0.body {
            Body::Cached(cached) => Some(cached),
            Body::Plain(_) | Body::Tiled(_) => None,
        }
    }

    /// The products, accumulators and sums of a kernel that has tiles, and `None` for every other kernel.
    pub(crate) fn tiled(self) -> Option<&'static Tiled> {
        match &self.0.body {
            Body::Tiled(tiled) => Some(tiled),
            Body::Plain(_) | Body::Cached(_) => None,
        }
    }
}

/// Kernels are equal if their names are equal.
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

/// The words of the name, joined like `ExactDelta`.
impl fmt::Debug for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for word in self.name().split('_') {
            let (first, rest) = word.split_at(word.len().min(1));
            write!(f, "{}{rest}", first.to_ascii_uppercase())?;
        }
        Ok(())
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

/// The kernels of a decoding step, in their order.
pub(crate) const DECODE_PASS: &[Kernel] = &[Kernel::DECODE, Kernel::COMBINE];
