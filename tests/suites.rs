//! Every integration test, in one program: each links wgpu and all that belongs to it, which takes longer than the tests
//! of most files. A file by itself: `cargo test -p sink-attention --test suites forward::`.

mod common;

mod backward;
mod buffers;
mod cache;
mod cache_errors;
mod cache_files;
mod cache_hidden;
mod cache_prefill;
mod cache_steps;
mod cache_unseen;
mod concurrency;
mod conformance;
mod cooperative;
#[path = "cpu/main.rs"]
mod cpu;
mod device_buffers;
mod errors;
mod extremes;
mod forward;
mod half;
mod laws;
mod layers;
mod low_precision;
mod options;
mod partial;
mod plans;
mod properties;
mod readme;
mod saved_files;
mod shaders;
mod size;
mod stream;
mod tuning;
