//! The powers of two that bring each token's numbers to the range of halves.

use crate::kernel::binding::Binding::{self, DO, K, Params, Q, V};
use crate::kernel::sizes::{DELTA_LANES, DELTA_ROWS};
use crate::kernel::spec::{Body, KernelSpec, Plain, Side, Wanted, Work, adjusts_nothing, binds_all};

const BODY: Body = Body::Plain(Plain {
    threads: DELTA_ROWS * DELTA_LANES,
    workgroup_bytes: 2 * 16 * DELTA_ROWS * (DELTA_LANES + 1) + 4 * DELTA_ROWS * DELTA_LANES,
    flops: |problem| 8.0 * f64::from(DELTA_ROWS) * (problem.shape().head_dim + problem.shape().value_dim) as f64,
    loop_iterations: |problem, _| {
        2 * problem.shape().head_dim.max(problem.shape().value_dim).div_ceil(4 * DELTA_LANES as usize) as u64 + 8
    },
});

pub(crate) const KEY_SCALES: KernelSpec = KernelSpec {
    name: "key_scales",
    template: include_str!("../../shaders/token_scales.wgsl"),
    wanted: |_, _| Wanted::WhereRead,
    reads: &[Params, K, V],
    writes: &[Binding::KeyScales],
    binds: binds_all,
    adjust: adjusts_nothing,
    work: Work::Rows(Side::Keys),
    body: BODY,
};

pub(crate) const QUERY_SCALES: KernelSpec = KernelSpec {
    name: "query_scales",
    template: include_str!("../../shaders/token_scales.wgsl"),
    wanted: |_, _| Wanted::WhereRead,
    reads: &[Params, Q, DO],
    writes: &[Binding::QueryScales],
    binds: binds_all,
    adjust: adjusts_nothing,
    work: Work::Rows(Side::Queries),
    body: BODY,
};
