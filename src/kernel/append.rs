//! Appends new keys and values to a cache, or to rows that were gathered from it, and rotates queries in place.

use minijinja::{Value, context};

use crate::kernel::binding::Binding::{CacheState, CachedKeys, CachedValues, CosSin, K, Params, Q, Tokens, V};
use crate::kernel::cache::{Access, CacheOptions};
use crate::kernel::sizes::ROW_THREADS;
use crate::kernel::spec::{Body, Cached, KernelSpec, Work, adjusts_nothing, always, binds_all};

pub(crate) const APPEND: KernelSpec = KernelSpec {
    name: "append",
    template: include_str!("../../shaders/cache/append.wgsl"),
    wanted: always,
    reads: &[Params, K, V, Tokens, CosSin],
    writes: &[Q, CachedKeys, CachedValues, CacheState],
    binds: binds_all,
    adjust: adjusts_nothing,
    work: Work::Listed,
    body: Body::Cached(Cached {
        threads: |_| ROW_THREADS,
        workgroup_bytes: |_| 0,
        access: |options| if options.gathered { Access::GatheredQuads } else { Access::Quads },
        depends: |options| options,
        binds: |options, binding| match binding {
            Q => options.rotates_q,
            CosSin => has_table(options),
            _ => true,
        },
        context: own_context,
    }),
};

/// Whether the kernel rotates keys or queries.
fn has_table(options: &CacheOptions) -> bool {
    options.rotates_q || options.rotary.is_some() && !options.is_relative()
}

fn own_context(options: &CacheOptions) -> Value {
    let halves = options.format.dtype.is_half();
    let operand = |name: &str, width: u32, atomic: bool| context! { name, buffer => name, width, atomic };
    let q = options.rotates_q.then(|| operand("q", options.head_dim, halves && !options.vec4));
    let [k, v] = [("k", options.head_dim), ("v", options.value_dim)].map(|(name, width)| operand(name, width, false));
    let stores: Vec<Value> = q.into_iter().collect();
    context! {
        loads => stores.iter().cloned().chain([k, v]).collect::<Vec<_>>(),
        stores,
        rotates_q => options.rotates_q,
        lanes => options.append_lanes(),
        ..options.context(has_table(options))
    }
}
