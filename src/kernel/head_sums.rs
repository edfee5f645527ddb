//! Gradients of parameters that have one number a head: sums over the batch and the rows.

use crate::kernel::binding::Binding::{
    DAlibiSlopes, DSinkLogits, DSlopeRows, Params, RowStats, SinkLogits as Sinks, SinkPartials,
};
use crate::kernel::sizes::{DELTA_LANES, DELTA_ROWS};
use crate::kernel::spec::{Body, KernelSpec, OwnOptions, Plain, Work, adjusts_nothing, binds_all};
use crate::problem::{Problem, SinkLogits};

const THREADS: u32 = DELTA_ROWS * DELTA_LANES;

const fn body(loop_iterations: fn(&Problem, &OwnOptions) -> u64) -> Body {
    Body::Plain(Plain {
        threads: THREADS,
        workgroup_bytes: 2 * 16 * DELTA_ROWS * (DELTA_LANES + 1) + 4 * THREADS,
        flops: |problem| 32.0 * (problem.shape().batch * problem.shape().seq_q) as f64,
        loop_iterations,
    })
}

/// Loop iterations of a thread that sums one number for every `rows` rows.
fn sums_of(problem: &Problem, rows: usize) -> u64 {
    let shape = problem.shape();
    (shape.batch as u64 * shape.seq_q.div_ceil(rows) as u64).div_ceil(THREADS.into()) + 8
}

/// Whether rows are summed one by one, because the kernel that computed delta has left no sums of tiles.
fn sums_delta(own: &OwnOptions) -> bool {
    own.dtype.has_rounding_error() && !own.o_lo
}

pub(crate) const D_SINK_LOGITS: KernelSpec = KernelSpec {
    name: "d_sink_logits",
    template: include_str!("../../shaders/head_sums.wgsl"),
    wanted: |problem, _| (problem.options().sink_logits == SinkLogits::PerHead).into(),
    reads: &[Params, Sinks, RowStats, SinkPartials],
    writes: &[DSinkLogits],
    binds: |own, binding| match binding {
        Sinks | RowStats => sums_delta(own),
        SinkPartials => !sums_delta(own),
        _ => true,
    },
    adjust: |own, _, optional| own.o_lo = optional.o_lo,
    work: Work::Heads,
    body: body(|problem, own| sums_of(problem, if sums_delta(own) { 1 } else { DELTA_ROWS as usize })),
};

pub(crate) const D_ALIBI_SLOPES: KernelSpec = KernelSpec {
    name: "d_alibi_slopes",
    template: include_str!("../../shaders/head_sums.wgsl"),
    wanted: |problem, optional| (problem.options().alibi && optional.d_alibi_slopes).into(),
    reads: &[Params, DSlopeRows],
    writes: &[DAlibiSlopes],
    binds: binds_all,
    adjust: adjusts_nothing,
    work: Work::Heads,
    body: body(|problem, _| sums_of(problem, 1)),
};
