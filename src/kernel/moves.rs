//! Copies rows of a cache to where the ordinary passes read them, and gradients by these rows back into the cache's layout.

use minijinja::{Value, context};

use crate::kernel::binding::Binding::{
    CacheState, CachedKeys, CachedValues, GatheredKeys, GatheredValues, Params, Tokens,
};
use crate::kernel::cache::{Access, CacheOptions, named};
use crate::kernel::sizes::ROW_THREADS;
use crate::kernel::spec::{Body, Cached, KernelSpec, Work, adjusts_nothing, always, binds_all};
use crate::problem::row_format::Addressing;

/// Copies keys and values of some sequences, one sequence after the other.
pub(crate) const GATHER: KernelSpec = KernelSpec {
    name: "gather",
    template: include_str!("../../shaders/cache/gather.wgsl"),
    wanted: always,
    reads: &[Params, CachedKeys, CachedValues, CacheState, Tokens],
    writes: &[GatheredKeys, GatheredValues],
    binds: binds_all,
    adjust: adjusts_nothing,
    work: Work::Listed,
    body: Body::Cached(Cached {
        // Only a paged cache has block tables to look up.
        binds: |options, binding| binding != CacheState || options.addressing == Addressing::Paged,
        ..MOVES
    }),
};

/// Copies gradients by gathered keys and values into the layout of the cache.
pub(crate) const SCATTER: KernelSpec = KernelSpec {
    name: "scatter",
    template: include_str!("../../shaders/cache/scatter.wgsl"),
    wanted: always,
    reads: &[Params, Tokens, GatheredKeys, GatheredValues],
    writes: &[CachedKeys, CachedValues],
    binds: binds_all,
    adjust: adjusts_nothing,
    work: Work::Listed,
    body: Body::Cached(MOVES),
};

const MOVES: Cached = Cached {
    threads: |_| ROW_THREADS,
    workgroup_bytes: |_| 0,
    access: |_| Access::Rows,
    depends: |options| options,
    binds: |_, _| true,
    context: own_context,
};

fn own_context(options: &CacheOptions) -> Value {
    let widths = [options.head_dim, options.value_dim];
    let gathered = options.gathered_format();
    context! {
        gathered_vectors => named(widths.map(|width| gathered.vectors(width as usize))),
        data_quads => named(options.data_vectors().map(|n| n * options.vector_quads())),
        ..options.context(false)
    }
}
