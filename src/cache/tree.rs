//! ALiBi and tree masks of decoding steps on the CPU, as options and operands of the ordinary forward pass.

use crate::plan::decode::DecodeOperands;
use crate::problem::cache::{CacheConfig, CacheKind};
use crate::problem::element::DType;
use crate::problem::row_format::Bounds;
use crate::problem::tree::Tree;
use crate::problem::{Axes, Bias, Inputs, MaskData, MaskPacking, Options, Shape, Window};

/// What the queries of a sequence see, and the biases of what they see, where the options of a forward pass cannot say it.
#[derive(Debug)]
pub(super) struct Pairs {
    pub(super) options: Options,
    /// `[M, N]`.
    mask: Option<Vec<u8>>,
    /// `[H, M, N]`, in place of ALiBi.
    bias: Option<Vec<f32>>,
}

impl Pairs {
    /// Of a sequence that holds `shape.seq_k` keys, of `length` tokens. `options` are those of a forward pass over its keys, with the
    /// step's bounds.
    pub(super) fn new(
        config: &CacheConfig,
        shape: &Shape,
        length: usize,
        (options, bounds): (Options, &Bounds),
        words: Option<&[u32]>,
        alibi_slopes: Option<&[f32]>,
    ) -> Self {
        let (queries, keys) = (shape.seq_q, shape.seq_k);
        let first = keys as i64 - queries as i64;
        let tree = words.map(|words| Tree { words, first });
        let pairs = || (0..queries).flat_map(|query| (0..keys).map(move |place| (query, place as i64)));
        let mask = tree.map(|tree| pairs().map(|(query, place)| tree.visible(query, place, bounds).into()).collect());
        // Behind its sink tokens, which keep their positions, a ring has given up keys.
        let given_up = length.saturating_sub(keys) as i64;
        let kept = match config.kind {
            CacheKind::Rolling { sink_tokens, .. } => sink_tokens as i64,
            _ => 0,
        };
        let distance = |(query, place): (usize, i64)| {
            let (position, key) = match tree {
                Some(tree) => (tree.query_position(query), tree.key_position(place)),
                None => (first + query as i64, place),
            };
            let key = if place < kept { key - given_up } else { key };
            (position - key).abs() as f32
        };
        let slopes = alibi_slopes.filter(|_| tree.is_some() || (given_up > 0 && kept > 0));
        let bias = slopes.map(|slopes| {
            let of_head = |slope: &f32| {
                let slope = *slope;
                pairs().map(move |pair| -slope * distance(pair))
            };
            slopes.iter().flat_map(of_head).collect()
        });
        let options = match mask {
            // It holds the bounds.
            Some(_) => {
                let options = options.causal(false).window(Window::FULL).sink_tokens(0);
                options.mask(Axes::KEYS.seq_q()).mask_packing(MaskPacking::Bytes)
            }
            None => options,
        };
        let options = match bias {
            Some(_) => options.alibi(false).bias(Axes::KEYS.heads().seq_q()).bias_dtype(DType::F32),
            None => options,
        };
        Pairs { options, mask, bias }
    }

    /// The operands of the forward pass.
    pub(super) fn inputs<'a, T>(
        &'a self,
        q: &'a [T],
        [k, v]: [&'a [T]; 2],
        operands: &DecodeOperands<'a>,
    ) -> Inputs<'a, T> {
        Inputs::new(q, k, v)
            .sink_logits(operands.sink_logits)
            .alibi_slopes(operands.alibi_slopes.filter(|_| self.bias.is_none()))
            .mask(self.mask.as_deref().map(MaskData::Bytes))
            .bias(self.bias.as_deref().map(Bias::F32))
    }
}
