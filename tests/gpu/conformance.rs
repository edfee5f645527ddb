//! Every conformance file against the GPU.

use crate::common;
use crate::common::conformance::{check_all, check_with, files};
use sink_attention::testing::compare::accepted;

#[test]
fn on_the_gpu() {
    if let Some(gpu) = common::gpu() {
        check_all(gpu);
    }
}

/// The files in half precision, on the cooperative micro-kernel: o is a sum of rounded p there, and delta with it.
#[test]
fn on_cooperative_matrices() {
    let Some(attention) = common::cooperative() else { return };
    let halves: Vec<_> = files().into_iter().filter(|(name, _)| name.contains("f16")).collect();
    assert!(halves.len() >= 3, "{halves:?}");
    let failures: Vec<String> = halves
        .into_iter()
        .filter_map(|(name, bytes)| Some(format!("{name}: {}", check_with(&attention, &bytes, accepted).err()?)))
        .collect();
    assert!(failures.is_empty(), "\n{}", failures.join("\n"));
}
