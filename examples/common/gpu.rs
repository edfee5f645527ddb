//! The GPU that an example's tests compute on, beside the CPU.

use std::io::Write as _;

use sink_attention::{Attention, DeviceChoice, Error};

/// The adapter that `SINK_ATTENTION_ADAPTER` names, else the best one, a software one where there is no other.
///
/// Without one, says so, and fails where `SINK_ATTENTION_REQUIRE_GPU=1`.
pub fn choice() -> Option<DeviceChoice> {
    let choice = match DeviceChoice::from_env() {
        adapter @ DeviceChoice::Adapter(_) => adapter,
        _ => DeviceChoice::Gpu,
    };
    match Attention::open_untuned(&choice) {
        Ok(_) => Some(choice),
        Err(Error::NoAdapter) => {
            let required = std::env::var("SINK_ATTENTION_REQUIRE_GPU").is_ok_and(|value| value == "1");
            assert!(!required, "SINK_ATTENTION_REQUIRE_GPU=1, but there is no GPU adapter");
            let thread = std::thread::current();
            let test = thread.name().unwrap_or("a test");
            // Past the test harness, which swallows eprintln! of a test that passes.
            let _ = writeln!(std::io::stderr(), "\n!!!! NO GPU ADAPTER: the GPU part of {test} DID NOT RUN !!!!\n");
            None
        }
        Err(error) => panic!("{choice:?} does not open: {error}"),
    }
}
