//! Shared by the two programs of tests, each of which uses a part.

#![allow(dead_code, unused_imports, reason = "each program uses a part")]

pub mod buffers;
pub mod caches;
pub mod conformance;
pub mod dxc;
pub mod low_precision;
pub mod prefills;
pub mod properties;
pub mod saved;
pub mod shards;
pub mod tint;
pub mod views;

pub use sink_attention::testing::cases::{all_cases, every, this_many, with_others};
/// The comparing functions of the project; their own tests are in src/testing/compare.rs.
pub use sink_attention::testing::compare::{
    low_precision as compare_low_precision, lse as compare_lse, tensor as compare,
};
pub use sink_attention::testing::devices::{another_gpu, bf16_fragments, cooperative, fragments, gpu};
