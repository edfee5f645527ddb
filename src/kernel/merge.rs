//! Merges several partial states into one.

use crate::kernel::binding::Binding::{
    Lse, O, OLo, Params, RowMax, Sequences, SinkLogits as Sinks, States, StatesLo, StatesLse, StatesRowMax,
};
use crate::kernel::sizes::{DELTA_LANES, DELTA_ROWS};
use crate::kernel::spec::{Body, KernelSpec, Plain, Side, Work, always, binds_all};
use crate::problem::{Layout, SinkLogits};

pub(crate) const MERGE: KernelSpec = KernelSpec {
    name: "merge",
    template: include_str!("../../shaders/merge.wgsl"),
    wanted: always,
    reads: &[Params, States, StatesLo, StatesLse, StatesRowMax, Sinks, Sequences],
    writes: &[O, OLo, Lse, RowMax],
    binds: binds_all,
    // Lengths matter only in padded batches with sink logits: rows beyond the end of a sequence have no sink logit.
    adjust: |own, problem, _| {
        let options = problem.options();
        own.lengths &= options.sink_logits != SinkLogits::None && options.layout != Layout::Thd;
    },
    work: Work::Rows(Side::Queries),
    body: Body::Plain(Plain {
        threads: DELTA_ROWS * DELTA_LANES,
        workgroup_bytes: 16,
        flops: |problem| {
            let shape = problem.shape();
            8.0 * f64::from(DELTA_ROWS) * shape.value_dim as f64 * (shape.seq_k + 1) as f64
        },
        loop_iterations: |problem, _| {
            let shape = problem.shape();
            (2 + shape.value_dim.div_ceil(4 * DELTA_LANES as usize)) as u64 * (shape.seq_k as u64 + 1)
        },
    }),
};
