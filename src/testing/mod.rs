//! Random problems, operands and comparisons, which tests, the command's `check` and `bench`, and the benchmarks share.
//!
//! **Unstable.** This module is for the tests of this crate and of crates built on it. It is not part of semantic versioning: any release
//! may change or remove its items.

#![allow(
    missing_debug_implementations,
    missing_docs,
    reason = "fields of operands have the names of the crate's documentation, and nobody prints them"
)]

#[cfg(not(target_family = "wasm"))]
pub mod buffers;
pub mod cases;
pub mod compare;
#[cfg(not(target_family = "wasm"))]
pub mod devices;
pub mod folder;
#[cfg(not(target_family = "wasm"))]
pub mod gradients;
#[cfg(not(target_family = "wasm"))]
pub mod hidden;
#[cfg(not(target_family = "wasm"))]
pub mod operands;
pub mod random;
#[cfg(test)]
mod shaders;
#[cfg(not(target_family = "wasm"))]
pub mod spirv;
#[cfg(not(target_family = "wasm"))]
pub mod variants;
