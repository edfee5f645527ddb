//! The boolean mask in bits, with the classes of its blocks.

use crate::kernel::binding::Binding::{self, Mask, Params};
use crate::kernel::sizes::{MASK_BLOCK_ROWS, MASK_STEP_WORDS};
use crate::kernel::spec::{Body, KernelSpec, Plain, Work, adjusts_nothing, binds_all};

pub(crate) const MASK_BITS: KernelSpec = KernelSpec {
    name: "mask_bits",
    template: include_str!("../../shaders/mask_bits.wgsl"),
    wanted: |problem, optional| (problem.options().mask.is_some() && !optional.mask_bits).into(),
    reads: &[Params, Mask],
    writes: &[Binding::MaskBits],
    binds: binds_all,
    adjust: adjusts_nothing,
    work: Work::MaskBlocks,
    body: Body::Plain(Plain {
        threads: MASK_BLOCK_ROWS * MASK_STEP_WORDS,
        workgroup_bytes: 16 + 4 * MASK_BLOCK_ROWS * MASK_STEP_WORDS,
        flops: |_| 65536.0,
        // Each step loops over up to 32 keys, or queries, twice.
        loop_iterations: |_, _| 4 * (1 + 2 * 32),
    }),
};
