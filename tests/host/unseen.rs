//! What a query does not see changes no bit of its results, on the CPU.

use crate::laws::{both_passes, by_shards, nothing_unseen_matters};
use sink_attention::half::{bf16, f16};
use sink_attention::testing::hidden::FAMILIES;
use sink_attention::{Attention, Element};

#[test]
fn nothing_unseen_matters_on_the_cpu() {
    fn holds<T: Element>() {
        for rest in [true, false] {
            nothing_unseen_matters::<T>(&FAMILIES, 0..8, "the CPU", both_passes(&Attention::cpu(), rest));
        }
    }
    holds::<f32>();
    holds::<f16>();
    holds::<bf16>();
}

#[test]
fn nothing_unseen_matters_to_partial_states() {
    for families in [&FAMILIES[..2], &FAMILIES[5..]] {
        nothing_unseen_matters::<f32>(families, 0..6, "shards on the CPU", by_shards(&Attention::cpu()));
        nothing_unseen_matters::<f16>(families, 6..9, "shards on the CPU", by_shards(&Attention::cpu()));
        nothing_unseen_matters::<bf16>(families, 9..15, "shards on the CPU", by_shards(&Attention::cpu()));
    }
}
