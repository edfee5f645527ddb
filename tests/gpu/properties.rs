//! Random problems on a GPU. `PROPTEST_CASES` and `PROPTEST_RNG_SEED` ask for others.

use proptest::prelude::*;
use sink_attention::DType;

use crate::common;
use crate::common::properties::{Plain, agrees_in_its_type, check, plain, single, split_merges};

#[test]
fn the_gpu_agrees_with_the_definition() {
    if let Some(gpu) = common::gpu() {
        // A software driver compiles kernels for wide heads for longer.
        let widest = if common::all_cases() { 80 } else { 16 };
        let plain = plain(90).prop_map(|plain| Plain { widths: plain.widths.map(|width| width.min(widest)), ..plain });
        check(common::this_many(6, 24), plain, |plain| agrees_in_its_type(gpu, &plain));
    }
}

#[test]
fn cooperative_matrices_agree_with_the_definition() {
    let Some(attention) = common::cooperative() else { return };
    // Problems that have cooperative kernels.
    let halves = plain(90).prop_map(|plain| Plain {
        dtype: if plain.dtype == DType::Bf16 { DType::Bf16 } else { DType::F16 },
        widths: plain.widths.map(|width| width.next_multiple_of(16)),
        ..plain
    });
    check(24, halves, |plain| agrees_in_its_type(&attention, &plain));
}

#[test]
fn any_split_of_the_pairs_merges_to_the_whole() {
    if let Some(gpu) = common::gpu() {
        check(common::this_many(4, 8), single(60), |plain| split_merges(gpu, &plain));
    }
}
