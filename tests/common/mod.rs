//! Shared by the integration tests: the GPU there is, operands, and the comparing functions.

#![allow(dead_code, unused_imports, reason = "each test binary uses its own part")]

#[cfg(feature = "cli")]
pub mod binary;
#[cfg(feature = "cli")]
pub mod files;

pub mod buffers;
pub mod caches;
pub mod gradients;
pub mod low_precision;
pub mod operands;
pub mod prefills;
pub mod shards;
pub mod views;

use std::io::Write as _;
use std::sync::OnceLock;

/// The comparing functions of the project; their own tests are in src/compare.rs.
pub use sink_attention::compare::{low_precision as compare_low_precision, lse as compare_lse, tensor as compare};
use sink_attention::{Attention, DeviceChoice, Error, MicroKernel};

/// A device of its own on the adapter of [`gpu`].
pub fn another_gpu() -> Option<Attention> {
    gpu()?;
    Some(Attention::open(&choice()).expect("a device opened before").with_micro_kernel(MicroKernel::Portable))
}

fn choice() -> DeviceChoice {
    match DeviceChoice::from_env() {
        adapter @ DeviceChoice::Adapter(_) => adapter,
        _ => DeviceChoice::Gpu,
    }
}

/// The adapter that `SINK_ATTENTION_ADAPTER` names, else the best one; opened once per test binary. With the portable
/// micro-kernel, whatever the adapter has: the other one, whose gradients of sink logits have wider bounds, is
/// [`cooperative`]'s.
///
/// Without one, says so where it is seen, and fails where `SINK_ATTENTION_REQUIRE_GPU=1`: a machine
/// that lost its driver must not look like one whose tests pass.
pub fn gpu() -> Option<&'static Attention> {
    static GPU: OnceLock<Option<Attention>> = OnceLock::new();
    let gpu = GPU.get_or_init(|| {
        let choice = choice();
        match Attention::open(&choice) {
            Ok(attention) => {
                assert!(attention.is_gpu(), "{choice:?} opened {}", attention.device_name());
                Some(attention.with_micro_kernel(MicroKernel::Portable))
            }
            Err(Error::NoAdapter) => None,
            Err(error) => panic!("{choice:?} does not open: {error}"),
        }
    });
    if gpu.is_none() {
        let required = std::env::var("SINK_ATTENTION_REQUIRE_GPU").is_ok_and(|value| value == "1");
        assert!(!required, "SINK_ATTENTION_REQUIRE_GPU=1, but there is no GPU adapter");
        did_not_run("NO GPU ADAPTER: the GPU part");
    }
    gpu.as_ref()
}

/// The adapter with the cooperative micro-kernel, where it has cooperative matrices.
///
/// Where it has none, says so, and fails where `SINK_ATTENTION_REQUIRE_COOPERATIVE=1`.
pub fn cooperative() -> Option<Attention> {
    let required = std::env::var("SINK_ATTENTION_REQUIRE_COOPERATIVE").is_ok_and(|value| value == "1");
    let gpu = gpu().filter(|gpu| gpu.device().is_some_and(|device| device.capabilities().cooperative.is_some()));
    if gpu.is_none() {
        assert!(!required, "SINK_ATTENTION_REQUIRE_COOPERATIVE=1, but no adapter with cooperative matrices");
        did_not_run("NO COOPERATIVE MATRICES: the part with them");
    }
    gpu.map(|gpu| gpu.clone().with_micro_kernel(MicroKernel::Cooperative))
}

/// Past the test harness, which swallows eprintln! of a test that passes.
fn did_not_run(what: &str) {
    let thread = std::thread::current();
    let test = thread.name().unwrap_or("a test");
    let _ = writeln!(std::io::stderr(), "\n!!!! {what} of {test} DID NOT RUN !!!!\n");
}
