//! Shared by the integration tests: the GPU there is, operands, and the comparing functions.

#![allow(dead_code, reason = "each test binary uses its own part")]

pub mod buffers;
pub mod operands;

use std::io::Write as _;
use std::sync::OnceLock;

use sink_attention::{Attention, DeviceChoice, Error};

/// The adapter that `SINK_ATTENTION_ADAPTER` names, else the best one; opened once per test binary.
///
/// Without one, says so where it is seen, and fails where `SINK_ATTENTION_REQUIRE_GPU=1`: a machine
/// that lost its driver must not look like one whose tests pass.
pub fn gpu() -> Option<&'static Attention> {
    static GPU: OnceLock<Option<Attention>> = OnceLock::new();
    let gpu = GPU.get_or_init(|| {
        let choice = match DeviceChoice::from_env() {
            adapter @ DeviceChoice::Adapter(_) => adapter,
            _ => DeviceChoice::Gpu,
        };
        match Attention::open(&choice) {
            Ok(attention) => {
                assert!(attention.is_gpu(), "{choice:?} opened {}", attention.device_name());
                Some(attention)
            }
            Err(Error::NoAdapter) => None,
            Err(error) => panic!("{choice:?} does not open: {error}"),
        }
    });
    if gpu.is_none() {
        let required = std::env::var("SINK_ATTENTION_REQUIRE_GPU").is_ok_and(|value| value == "1");
        assert!(!required, "SINK_ATTENTION_REQUIRE_GPU=1, but there is no GPU adapter");
        // Past the test harness, which swallows eprintln! of a test that passes.
        let thread = std::thread::current();
        let test = thread.name().unwrap_or("a test");
        let _ = writeln!(std::io::stderr(), "\n!!!! NO GPU ADAPTER: the GPU part of {test} DID NOT RUN !!!!\n");
    }
    gpu.as_ref()
}

/// Checks ||actual - expected|| <= bound * ||expected||, all of it finite.
pub fn compare<T: Copy + Into<f64>>(actual: &[T], expected: &[f32], bound: f64) -> Result<(), String> {
    same_length(actual.len(), expected.len())?;
    let (mut error, mut norm) = (0.0, 0.0);
    for (i, (&a, &e)) in actual.iter().zip(expected).enumerate() {
        let (a, e): (f64, f64) = (a.into(), e.into());
        if !a.is_finite() || !e.is_finite() {
            return Err(format!("element {i} is {a}, expected {e}"));
        }
        error += (a - e) * (a - e);
        norm += e * e;
    }
    let (error, norm) = (f64::sqrt(error), f64::sqrt(norm));
    if error <= bound * norm {
        return Ok(());
    }
    Err(format!("relative error {:.3e} (norm {norm:.3e}), at most {bound:.1e}", error / norm))
}

/// Checks |actual - expected| <= bound + bound * |expected| for every element; infinities must be equal.
pub fn compare_lse<T: Copy + Into<f64>>(actual: &[T], expected: &[f32], bound: f64) -> Result<(), String> {
    same_length(actual.len(), expected.len())?;
    for (i, (&a, &e)) in actual.iter().zip(expected).enumerate() {
        let (a, e): (f64, f64) = (a.into(), e.into());
        let close = if e.is_finite() { (a - e).abs() <= bound + bound * e.abs() } else { a == e };
        if !close {
            return Err(format!("element {i} is {a}, expected {e} within {bound:.1e} absolute + relative"));
        }
    }
    Ok(())
}

fn same_length(actual: usize, expected: usize) -> Result<(), String> {
    match expected {
        0 => Err("nothing is expected, so nothing would be compared".into()),
        _ if actual == expected => Ok(()),
        _ => Err(format!("{actual} elements, expected {expected}")),
    }
}
