//! Shards of the keys of operands.

use std::ops::Range;

use sink_attention::{Attention, Element, Inputs, Layout, MaskData, PartialState, Problem};

use sink_attention::testing::operands::{BiasValues, MaskValues, Operands};

/// Rows `keys` of an operand of `[batch, kv_heads, seq_k, width]` in the problem's layout.
pub fn rows<T: Copy>(problem: &Problem, x: &[T], width: usize, keys: &Range<usize>) -> Vec<T> {
    let s = problem.shape();
    let inner = if problem.options().layout == Layout::Bhsd { width } else { s.kv_heads * width };
    let of = |rows: &[T]| rows[keys.start * inner..keys.end * inner].to_vec();
    x.chunks(s.seq_k * inner).flat_map(of).collect()
}

/// The operands of a shard, without sink logits. Bias and mask only where lengths do not differ.
pub fn shard<T: Element>(problem: &Problem, whole: &Operands<T>, keys: &Range<usize>) -> Operands<T> {
    let s = problem.shape();
    fn columns<T: Copy>(x: &[T], n: usize, keys: &Range<usize>) -> Vec<T> {
        x.chunks(n).flat_map(|row| row[keys.clone()].to_vec()).collect()
    }
    Operands {
        q: whole.q.clone(),
        k: rows(problem, &whole.k, s.head_dim, keys),
        v: rows(problem, &whole.v, s.value_dim, keys),
        sink_logits: None,
        alibi_slopes: whole.alibi_slopes.clone(),
        bias: whole.bias.as_ref().map(|bias| match bias {
            BiasValues::F32(bias) => BiasValues::F32(columns(bias, s.seq_k, keys)),
            BiasValues::Operand(bias) => BiasValues::Operand(columns(bias, s.seq_k, keys)),
        }),
        mask: whole.mask.as_ref().map(|mask| match mask {
            MaskValues::Bytes(mask) => MaskValues::Bytes(columns(mask, s.seq_k, keys)),
            MaskValues::Bits(mask) => {
                let bytes = mask
                    .chunks(s.seq_k.div_ceil(32))
                    .flat_map(|row| keys.clone().map(|j| (row[j / 32] >> (j % 32) & 1) as u8));
                MaskValues::Bits(MaskData::pack(&bytes.collect::<Vec<_>>(), keys.len()))
            }
        }),
    }
}

/// The ranges between cuts, ascending numbers up to the number of keys.
pub fn ranges(cuts: &[usize], keys: usize) -> Vec<Range<usize>> {
    let ends = cuts.iter().copied().chain([keys]);
    [0].iter().copied().chain(cuts.iter().copied()).zip(ends).map(|(start, end)| start..end).collect()
}

/// The partial state of each shard.
pub fn states<T: Element>(
    attention: &Attention,
    problem: &Problem,
    whole: &Operands<T>,
    shards: &[Range<usize>],
) -> Vec<PartialState> {
    let state = |keys: &Range<usize>| {
        let operands = shard(problem, whole, keys);
        attention.attend_partial(problem, keys.clone(), &operands.inputs()).unwrap()
    };
    shards.iter().map(state).collect()
}

/// Inputs of a shard with the whole's sink logits.
pub fn with_sinks<'a, T: Element>(shard: &'a Operands<T>, whole: &'a Operands<T>) -> Inputs<'a, T> {
    shard.inputs().sink_logits(whole.sink_logits.as_deref())
}
