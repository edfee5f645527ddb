//! Tests that need an adapter, be it a software one, in one program: each program links wgpu and all that belongs to it, which
//! takes longer than the tests of most files. A file by itself: `cargo test -p sink-attention --test gpu forward::`.

#[path = "../common/mod.rs"]
mod common;
#[path = "../both/extremes.rs"]
mod extremes;
#[path = "../both/laws.rs"]
mod laws;
#[path = "../both/users.rs"]
mod users;

mod backward;
mod buffers;
mod cache;
mod cache_errors;
mod cache_files;
mod cache_hidden;
mod cache_prefill;
mod cache_steps;
mod cache_tree;
mod cache_unseen;
mod concurrency;
mod conformance;
mod cooperative;
mod device_buffers;
mod errors;
mod forward;
mod fragments;
mod half;
mod host_cache;
mod loops;
mod low_precision;
mod options;
mod partial;
mod properties;
mod row_max;
mod size;
mod split;
mod streaming_llm;
mod subgroups;
mod tuning;
mod unseen;

use common::cooperative;

/// Where the suites of both programs run in this one.
fn paths() -> Vec<sink_attention::Attention> {
    common::gpu().cloned().into_iter().collect()
}
