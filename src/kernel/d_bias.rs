//! The gradient by the bias.

use crate::kernel::binding::Binding::{Bias, DBias, DO, K, MaskBits, Params, Q, RowStats, Sequences, V};
use crate::kernel::micro_kernel::MicroKernel;
use crate::kernel::spec::{Body, KernelSpec, Tiled, Width, Work, adjusts_nothing, binds_all};

pub(crate) const D_BIAS: KernelSpec = KernelSpec {
    name: "d_bias",
    template: include_str!("../../shaders/d_bias.wgsl"),
    wanted: |problem, optional| (problem.options().bias.is_some() && optional.d_bias).into(),
    reads: &[Params, Q, K, V, Bias, MaskBits, Sequences, DO, RowStats],
    writes: &[DBias],
    binds: binds_all,
    adjust: adjusts_nothing,
    work: Work::BiasTiles,
    body: Body::Tiled(Tiled {
        products: &[Width::HeadDim, Width::ValueDim],
        accumulators: &[],
        softmax: false,
        sums_rows: false,
        sums_pairs: true,
        micro_kernels: &[MicroKernel::Portable],
        units: |_| &[],
    }),
};
