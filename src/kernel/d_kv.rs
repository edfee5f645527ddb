//! The gradients by k and v.

use crate::kernel::binding::Binding::{Bias, DK, DO, DV, K, MaskBits, Params, Q, RowStats, Sequences, V};
use crate::kernel::micro_kernel::MicroKernel;
use crate::kernel::spec::{Body, KernelSpec, Side, Tiled, Width, Work, adjusts_nothing, always, binds_all};

pub(crate) const D_KV: KernelSpec = KernelSpec {
    name: "d_kv",
    template: include_str!("../../shaders/d_kv.wgsl"),
    wanted: always,
    reads: &[Params, Q, K, V, Bias, MaskBits, Sequences, DO, RowStats],
    writes: &[DK, DV],
    binds: binds_all,
    adjust: adjusts_nothing,
    work: Work::PortableTile(Side::Keys),
    body: Body::Tiled(Tiled {
        products: &[Width::HeadDim, Width::ValueDim],
        accumulators: &[Width::HeadDim, Width::ValueDim],
        softmax: false,
        sums_rows: false,
        sums_pairs: false,
        micro_kernels: &MicroKernel::ALL,
        units: |dtype| if dtype.needs_token_scales() { &["d_k", "d_v"] } else { &["d_k"] },
    }),
};
