//! The caller's buffers: the operands and results of a pass.

use crate::device::buffer::TensorView;

/// The operands of a forward pass in buffers of the caller's.
///
/// ```
/// use sink_attention::{Attention, DType, DeviceChoice, Error, ForwardBuffers, Options, Problem, Shape, SinkLogits};
///
/// # fn main() -> Result<(), Error> {
/// # let attention = match Attention::open(&DeviceChoice::Gpu) { Err(Error::NoAdapter) => return Ok(()), opened => opened? };
/// let Some(device) = attention.device() else { return Ok(()) };
/// let shape = Shape { batch: 1, heads: 1, kv_heads: 1, seq_q: 1, seq_k: 2, head_dim: 1, value_dim: 1 };
/// let problem = Problem::new(shape, Options::new().sink_logits(SinkLogits::PerHead))?;
/// let [q, k, v] = [device.upload("q", &[1.0])?, device.upload("k", &[0.0, 0.0])?, device.upload("v", &[1.0, 3.0])?];
/// let sink_logits = device.upload("sink_logits", &[2f32.ln()])?;
/// let result = |name| device.zeros(name, DType::F32, &[1]);
/// let [o, lse, row_max] = [result("o")?, result("lse")?, result("row_max")?];
///
/// let buffers = ForwardBuffers::new(&q, &k, &v, &o, &lse).sink_logits(sink_logits.view()).row_max(row_max.view());
/// let forward = attention.prepare_forward(&problem, &buffers)?;
/// let mut encoder = device.wgpu().create_command_encoder(&Default::default());
/// forward.encode(&mut encoder);
/// device.queue().submit([encoder.finish()]);
/// assert!((o.download::<f32>()?[0] - 1.0).abs() < 1e-5); // (1 * 1 + 1 * 3) / (1 + 1 + 2)
/// assert_eq!(row_max.download::<f32>()?, [0.0]); // both scores are 0; the sink logit does not count
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct ForwardBuffers<'a> {
    /// Queries.
    pub q: TensorView<'a>,
    /// Keys.
    pub k: TensorView<'a>,
    /// Values.
    pub v: TensorView<'a>,
    /// One logit per query head, where the options say [`SinkLogits::PerHead`](crate::SinkLogits::PerHead); densely packed.
    pub sink_logits: Option<TensorView<'a>>,
    /// One slope per query head, f32, where the options say [`Options::alibi`](crate::Options::alibi); densely packed.
    pub alibi_slopes: Option<TensorView<'a>>,
    /// Added to the scores, of the element type that the options name, see [`Problem::bias_shape`](crate::Problem::bias_shape).
    /// Strides are those of batch, head and query.
    pub bias: Option<TensorView<'a>>,
    /// The mask: the keys that may be seen, see [`Problem::mask_shape`](crate::Problem::mask_shape). Offset and strides
    /// (of batch, head and query) count bytes, or words where it is packed.
    pub mask: Option<TensorView<'a>>,
    /// Scratch that both passes may share, [`Attention::mask_scratch_bytes`](crate::Attention::mask_scratch_bytes) long. The forward
    /// pass leaves there the mask in bits, and the list of its blocks that hide everything or nothing; the backward pass reads them.
    /// `None`: each pass finds them by itself.
    pub mask_scratch: Option<&'a wgpu::Buffer>,
    /// Result: attention outputs.
    pub o: TensorView<'a>,
    /// Result, in f16 and bf16 only, where the backward pass is to have it: the rounding error of o, an i16 in the place
    /// of each of its elements, see [`Element::lo`](crate::Element::lo). Views are as those of o, two bytes an element.
    pub o_lo: Option<TensorView<'a>>,
    /// Result: log of the denominators, `[batch, heads, seq_q]`, densely packed.
    pub lse: TensorView<'a>,
    /// Result, where it is wanted: the largest score of each row, f32, `[batch, heads, seq_q]` as lse, densely packed; see
    /// [`Attention::forward_with_row_max`](crate::Attention::forward_with_row_max). The backward pass does not look at it.
    pub row_max: Option<TensorView<'a>>,
}

impl<'a> ForwardBuffers<'a> {
    /// The operands and results of every forward pass. Those that go with options are `None`.
    pub fn new(
        q: impl Into<TensorView<'a>>,
        k: impl Into<TensorView<'a>>,
        v: impl Into<TensorView<'a>>,
        o: impl Into<TensorView<'a>>,
        lse: impl Into<TensorView<'a>>,
    ) -> Self {
        let (q, k, v, o, lse) = (q.into(), k.into(), v.into(), o.into(), lse.into());
        let (sink_logits, alibi_slopes, bias, mask, mask_scratch, o_lo) = (None, None, None, None, None, None);
        ForwardBuffers { q, k, v, sink_logits, alibi_slopes, bias, mask, mask_scratch, o, o_lo, lse, row_max: None }
    }
}

setters! {
    impl['a] ForwardBuffers['a]
    into {
        q: TensorView<'a>,
        k: TensorView<'a>,
        v: TensorView<'a>,
        o: TensorView<'a>,
        lse: TensorView<'a>,
    }
    optional {
        sink_logits: TensorView<'a>,
        alibi_slopes: TensorView<'a>,
        bias: TensorView<'a>,
        mask: TensorView<'a>,
        o_lo: TensorView<'a>,
        row_max: TensorView<'a>,
        mask_scratch: &'a wgpu::Buffer,
    }
}

/// The operands of a backward pass in buffers of the caller's: those of the forward pass, its results,
/// the gradients that flow into these, and the gradients to compute.
///
/// ```
/// use sink_attention::{Attention, BackwardBuffers, DType, DeviceChoice, Error, ForwardBuffers, Options, Problem, Shape};
///
/// # fn main() -> Result<(), Error> {
/// # let attention = match Attention::open(&DeviceChoice::Gpu) { Err(Error::NoAdapter) => return Ok(()), opened => opened? };
/// let Some(device) = attention.device() else { return Ok(()) };
/// let shape = Shape { batch: 1, heads: 1, kv_heads: 1, seq_q: 1, seq_k: 2, head_dim: 1, value_dim: 1 };
/// let problem = Problem::new(shape, Options::new())?;
/// let upload = |name, numbers: &[f32]| device.upload(name, numbers);
/// let [q, k, v] = [upload("q", &[0.0])?, upload("k", &[5.0, 7.0])?, upload("v", &[1.0, 3.0])?];
/// // As a forward pass leaves them: both keys have the weight 1/2.
/// let [o, lse] = [upload("o", &[2.0])?, upload("lse", &[2f32.ln()])?];
/// let d_o = upload("d_o", &[1.0])?;
/// let gradient = |name, len| device.zeros(name, DType::F32, &[len]);
/// let [d_q, d_k, d_v] = [gradient("d_q", 1)?, gradient("d_k", 2)?, gradient("d_v", 2)?];
///
/// let forward = ForwardBuffers::new(&q, &k, &v, &o, &lse); // the same operands as in the forward pass
/// let backward = attention.prepare_backward(&problem, &BackwardBuffers::new(forward, &d_o, &d_q, &d_k, &d_v))?;
/// let mut encoder = device.wgpu().create_command_encoder(&Default::default());
/// backward.encode(&mut encoder);
/// device.queue().submit([encoder.finish()]);
/// assert!((d_q.download::<f32>()?[0] - 1.0).abs() < 1e-5); // 1/2 (1 - 2) * 5 + 1/2 (3 - 2) * 7
/// assert!(d_v.download::<f32>()?.iter().all(|d_v| (d_v - 0.5).abs() < 1e-5));
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct BackwardBuffers<'a> {
    /// The forward pass's operands and results. o rounded to half precision would be too coarse: there it is read together
    /// with o_lo, which makes it f32 again, or not at all. Without o_lo two more matrix products are computed.
    pub forward: ForwardBuffers<'a>,
    /// Gradient by o.
    pub d_o: TensorView<'a>,
    /// Gradient by lse, densely packed; `None` is zero. Ignored where lse is -inf.
    pub d_lse: Option<TensorView<'a>>,
    /// Result: gradient by q. The gradients by q, k and v may be views of one buffer, such as a fused projection's.
    pub d_q: TensorView<'a>,
    /// Result: gradient by k.
    pub d_k: TensorView<'a>,
    /// Result: gradient by v.
    pub d_v: TensorView<'a>,
    /// Result: gradient by the sink logits, `[heads]`, where the options say
    /// [`SinkLogits::PerHead`](crate::SinkLogits::PerHead); densely packed.
    pub d_sink_logits: Option<TensorView<'a>>,
    /// Result: gradient by the ALiBi slopes, `[heads]`, f32, densely packed; `None` where it is not wanted.
    pub d_alibi_slopes: Option<TensorView<'a>>,
    /// Result: gradient by the bias, f32, densely packed in the bias' shape; `None` where it is not wanted, which saves two of
    /// nine matrix products.
    pub d_bias: Option<TensorView<'a>>,
}

impl<'a> BackwardBuffers<'a> {
    /// The operands and results of every backward pass. Those that go with options are `None`.
    pub fn new(
        forward: ForwardBuffers<'a>,
        d_o: impl Into<TensorView<'a>>,
        d_q: impl Into<TensorView<'a>>,
        d_k: impl Into<TensorView<'a>>,
        d_v: impl Into<TensorView<'a>>,
    ) -> Self {
        let (d_o, d_q, d_k, d_v) = (d_o.into(), d_q.into(), d_k.into(), d_v.into());
        let (d_lse, d_sink_logits, d_alibi_slopes, d_bias) = (None, None, None, None);
        BackwardBuffers { forward, d_o, d_lse, d_q, d_k, d_v, d_sink_logits, d_alibi_slopes, d_bias }
    }
}

setters! {
    impl['a] BackwardBuffers['a]
    plain {
        forward: ForwardBuffers<'a>,
    }
    into {
        d_o: TensorView<'a>,
        d_q: TensorView<'a>,
        d_k: TensorView<'a>,
        d_v: TensorView<'a>,
    }
    optional {
        d_lse: TensorView<'a>,
        d_sink_logits: TensorView<'a>,
        d_alibi_slopes: TensorView<'a>,
        d_bias: TensorView<'a>,
    }
}

/// The operands of a merge of partial states in buffers of the caller's.
///
/// S states lie one behind the other along the batch axis: entry b of state n is entry n * B + b of `[S * B, ..]`, in
/// `bshd` `[S * B, M, H, E]`, in `thd` `[S, queries, H, E]`. So a partial pass writes state n with an offset of n * B times
/// the stride of the batch.
///
/// ```
/// use sink_attention::{Attention, DType, DeviceChoice, Error, MergeBuffers, Options, Problem, Shape};
///
/// # fn main() -> Result<(), Error> {
/// # let attention = match Attention::open(&DeviceChoice::Gpu) { Err(Error::NoAdapter) => return Ok(()), opened => opened? };
/// let Some(device) = attention.device() else { return Ok(()) };
/// let shape = Shape { batch: 1, heads: 1, kv_heads: 1, seq_q: 1, seq_k: 3, head_dim: 1, value_dim: 1 };
/// let problem = Problem::new(shape, Options::new())?;
/// // Two states, one behind the other: a key of value 1, and two keys of mean 4; each key has the weight 1.
/// let states = device.upload("states", &[1.0, 4.0])?;
/// let states_lse = device.upload("states_lse", &[0.0, 2f32.ln()])?;
/// let [o, lse] = [device.zeros("o", DType::F32, &[1])?, device.zeros("lse", DType::F32, &[1])?];
/// let merge = attention.prepare_merge(&problem, 2, &MergeBuffers::new(&states, &states_lse, &o, &lse))?;
/// let mut encoder = device.wgpu().create_command_encoder(&Default::default());
/// merge.encode(&mut encoder);
/// device.queue().submit([encoder.finish()]);
/// assert!((o.download::<f32>()?[0] - 3.0).abs() < 1e-5); // (1 * 1 + 2 * 4) / 3
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct MergeBuffers<'a> {
    /// o of the states, of the problem's element type. Strides are those of batch, head and sequence.
    pub states: TensorView<'a>,
    /// In f16 and bf16: the rounding error of o of the states, an i16 for each element. Goes with `o_lo`; both or
    /// neither.
    pub states_lo: Option<TensorView<'a>>,
    /// lse of the states, f32, `[S * B, H, M]`, in `thd` `[S, H, queries]`; densely packed.
    pub states_lse: TensorView<'a>,
    /// One logit per query head, f32, densely packed: of the last merge, where the options say
    /// [`SinkLogits::PerHead`](crate::SinkLogits::PerHead).
    pub sink_logits: Option<TensorView<'a>>,
    /// Result: o of the whole, see [`Problem::o_shape`](crate::Problem::o_shape).
    pub o: TensorView<'a>,
    /// Result: the rounding error of o.
    pub o_lo: Option<TensorView<'a>>,
    /// Result: lse of the whole, see [`Problem::lse_shape`](crate::Problem::lse_shape); densely packed.
    pub lse: TensorView<'a>,
    /// The largest score of each row of the states, as `states_lse` lies. Goes with `row_max`; both or neither.
    pub states_row_max: Option<TensorView<'a>>,
    /// Result: the largest score of each row of the whole, as lse lies. The sink logit has no part in it.
    pub row_max: Option<TensorView<'a>>,
}

impl<'a> MergeBuffers<'a> {
    /// The operands and results of every merge. All others are `None`.
    pub fn new(
        states: impl Into<TensorView<'a>>,
        states_lse: impl Into<TensorView<'a>>,
        o: impl Into<TensorView<'a>>,
        lse: impl Into<TensorView<'a>>,
    ) -> Self {
        let (states, states_lse, o, lse) = (states.into(), states_lse.into(), o.into(), lse.into());
        let (states_lo, sink_logits, o_lo, states_row_max, row_max) = (None, None, None, None, None);
        MergeBuffers { states, states_lo, states_lse, sink_logits, o, o_lo, lse, states_row_max, row_max }
    }
}

setters! {
    impl['a] MergeBuffers['a]
    into {
        states: TensorView<'a>,
        states_lse: TensorView<'a>,
        o: TensorView<'a>,
        lse: TensorView<'a>,
    }
    optional {
        states_lo: TensorView<'a>,
        sink_logits: TensorView<'a>,
        o_lo: TensorView<'a>,
        states_row_max: TensorView<'a>,
        row_max: TensorView<'a>,
    }
}
