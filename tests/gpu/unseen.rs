//! What a query does not see changes no bit of its results, on a GPU.

use crate::common::{cooperative, gpu};
use crate::laws::{both_passes, by_shards, nothing_unseen_matters};
use sink_attention::half::{bf16, f16};
use sink_attention::testing::hidden::FAMILIES;

/// A family for each element type, whose kernels are compiled once.
#[test]
fn nothing_unseen_matters_on_the_gpu() {
    let Some(gpu) = gpu() else { return };
    nothing_unseen_matters::<f32>(&FAMILIES[..1], 0..12, "the GPU", both_passes(gpu, true));
    nothing_unseen_matters::<f16>(&FAMILIES[3..4], 0..12, "the GPU", both_passes(gpu, true));
    nothing_unseen_matters::<bf16>(&FAMILIES[2..3], 0..12, "the GPU", both_passes(gpu, false));
}

#[test]
fn nothing_unseen_matters_on_cooperative_matrices() {
    let Some(gpu) = cooperative() else { return };
    for rest in [true, false] {
        nothing_unseen_matters::<f16>(&FAMILIES[..2], 0..6, "cooperative matrices", both_passes(&gpu, rest));
        nothing_unseen_matters::<bf16>(&FAMILIES[2..4], 0..6, "cooperative matrices", both_passes(&gpu, rest));
    }
}

#[test]
fn nothing_unseen_matters_to_partial_states() {
    if let Some(gpu) = gpu() {
        nothing_unseen_matters::<f32>(&FAMILIES[..1], 0..6, "shards on the GPU", by_shards(gpu));
    }
}
