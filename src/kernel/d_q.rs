//! The gradient by q.

use crate::kernel::binding::Binding::{Bias, DO, DQ, DSlopeRows, K, MaskBits, Params, Q, RowStats, Sequences, V};
use crate::kernel::micro_kernel::MicroKernel;
use crate::kernel::spec::{Body, KernelSpec, Side, Tiled, Width, Work, adjusts_nothing, always, binds_all};

pub(crate) const D_Q: KernelSpec = KernelSpec {
    name: "d_q",
    template: include_str!("../../shaders/d_q.wgsl"),
    wanted: always,
    reads: &[Params, Q, K, V, Bias, MaskBits, Sequences, DO, RowStats],
    writes: &[DQ, DSlopeRows],
    binds: binds_all,
    adjust: adjusts_nothing,
    work: Work::PortableTile(Side::Queries),
    body: Body::Tiled(Tiled {
        products: &[Width::HeadDim, Width::ValueDim],
        accumulators: &[Width::HeadDim],
        softmax: false,
        sums_rows: false,
        sums_pairs: false,
        micro_kernels: &MicroKernel::ALL,
        // The delta kernel has found the unit of a query, unless the unit depends on the keys' token scales.
        units: |dtype| if dtype.needs_token_scales() { &["d_q"] } else { &[] },
    }),
};
