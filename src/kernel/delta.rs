//! delta = d_o . o - d_lse, the term that every d_s of a row subtracts.

use crate::kernel::binding::Binding::{
    AlibiSlopes, Bias, DLse, DO, K, Lse, MaskBits, O, OLo, Params, Q, RowStats, Sequences, SinkLogits as Sinks,
    SinkPartials, V,
};
use crate::kernel::micro_kernel::MicroKernel;
use crate::kernel::sizes::{DELTA_LANES, DELTA_ROWS, DELTA_STEPS};
use crate::kernel::spec::{
    Body, KernelSpec, OptionalOperands, Plain, Side, Tiled, Width, Work, adjusts_nothing, binds_all,
};
use crate::problem::{Problem, SinkLogits};

/// Whether o is as precise as delta needs. Rounded, and without its rounding error, it is not.
fn reads_o(problem: &Problem, optional: OptionalOperands) -> bool {
    !problem.options().dtype.has_rounding_error() || optional.o_lo
}

pub(crate) const DELTA: KernelSpec = KernelSpec {
    name: "delta",
    template: include_str!("../../shaders/delta.wgsl"),
    wanted: |problem, optional| reads_o(problem, optional).into(),
    // The kernel copies the slopes into the row statistics.
    reads: &[Params, O, OLo, Lse, Sinks, AlibiSlopes, DO, DLse],
    writes: &[RowStats, SinkPartials],
    binds: binds_all,
    adjust: |own, _, _| {
        // An implicit sink logit of zero has no gradient.
        if own.sink_logits == SinkLogits::OffByOne {
            own.sink_logits = SinkLogits::None;
        }
    },
    work: Work::Rows(Side::Queries),
    body: Body::Plain(Plain {
        threads: DELTA_ROWS * DELTA_LANES,
        // Products of a step, four sums of each thread, and a share of each row.
        workgroup_bytes: DELTA_ROWS * (4 * (DELTA_LANES * DELTA_STEPS + 1) + 16 * (DELTA_LANES + 1) + 4),
        flops: |problem| 8.0 * f64::from(DELTA_ROWS) * problem.shape().value_dim as f64,
        // Quads of a row, of o and of d_o where they are looked at for zeros, and lanes.
        loop_iterations: |problem, _| 3 * problem.shape().value_dim.div_ceil(4) as u64 + 2 * u64::from(DELTA_LANES) + 8,
    }),
};

pub(crate) const EXACT_DELTA: KernelSpec = KernelSpec {
    name: "exact_delta",
    template: include_str!("../../shaders/exact_delta.wgsl"),
    wanted: |problem, optional| (!reads_o(problem, optional)).into(),
    reads: &[Params, Q, K, V, Lse, AlibiSlopes, Bias, MaskBits, Sequences, DO, DLse],
    writes: &[RowStats],
    binds: binds_all,
    adjust: adjusts_nothing,
    work: Work::PortableTile(Side::Queries),
    body: Body::Tiled(Tiled {
        products: &[Width::HeadDim, Width::ValueDim],
        accumulators: &[],
        softmax: false,
        sums_rows: true,
        sums_pairs: false,
        micro_kernels: &MicroKernel::ALL,
        units: |_| &[],
    }),
};
