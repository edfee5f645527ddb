//! o and lse, and row_max if it is wanted.

use crate::kernel::binding::Binding::{
    AlibiSlopes, Bias, K, Lse, MaskBits, O, OLo, Params, Q, RowMax, Sequences, SinkLogits, V,
};
use crate::kernel::micro_kernel::MicroKernel;
use crate::kernel::spec::{Body, KernelSpec, Side, Tiled, Width, Work, adjusts_nothing, always, binds_all};

pub(crate) const FORWARD: KernelSpec = KernelSpec {
    name: "forward",
    template: include_str!("../../shaders/forward.wgsl"),
    wanted: always,
    reads: &[Params, Q, K, V, SinkLogits, AlibiSlopes, Bias, MaskBits, Sequences],
    writes: &[O, OLo, Lse, RowMax],
    binds: binds_all,
    adjust: adjusts_nothing,
    work: Work::PortableTile(Side::Queries),
    body: Body::Tiled(Tiled {
        products: &[Width::HeadDim],
        accumulators: &[Width::ValueDim],
        softmax: true,
        sums_rows: true,
        sums_pairs: false,
        micro_kernels: &MicroKernel::ALL,
        units: |_| &[],
    }),
};
