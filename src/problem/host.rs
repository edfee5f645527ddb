//! Operands and results in host memory.

use crate::problem::element::{DType, Element};
use crate::problem::error::{Error, Result};
use crate::problem::options::{MaskPacking, SinkLogits};
use crate::problem::shape::{Problem, check_length};

/// A bias on the host: f32, or of the operands' element type, see [`Options::bias_dtype`](crate::Options::bias_dtype).
///
/// ```
/// use sink_attention::{Attention, Axes, Bias, Inputs, Options, Problem, Shape};
///
/// let shape = Shape { batch: 1, heads: 1, kv_heads: 1, seq_q: 1, seq_k: 3, head_dim: 1, value_dim: 1 };
/// let problem = Problem::new(shape, Options::new().bias(Axes::KEYS))?; // [1, 1, 1, N]
/// let bias = [0.0, 3f32.ln(), f32::NEG_INFINITY]; // weights 1 and 3, and a hidden key
/// let inputs = Inputs::new(&[0.0f32], &[0.0; 3], &[4.0, 8.0, 100.0]).bias(Bias::F32(&bias));
/// let output = Attention::cpu().forward(&problem, &inputs)?;
/// assert!((output.o[0] - 7.0).abs() < 1e-5); // (1 * 4 + 3 * 8) / 4
/// # Ok::<(), sink_attention::Error>(())
/// ```
#[derive(Debug, Clone, Copy)]
pub enum Bias<'a, T = f32> {
    /// f32, whatever the operands are.
    F32(&'a [f32]),
    /// Of the operands' element type.
    Operand(&'a [T]),
}

impl<T: Element> Bias<'_, T> {
    /// Elements.
    #[expect(clippy::len_without_is_empty, reason = "no bias is empty")]
    pub fn len(&self) -> usize {
        match self {
            Bias::F32(bias) => bias.len(),
            Bias::Operand(bias) => bias.len(),
        }
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        match self {
            Bias::F32(_) => DType::F32,
            Bias::Operand(_) => T::DTYPE,
        }
    }
}

/// A boolean mask on the host, see [`Options::mask_packing`](crate::Options::mask_packing).
///
/// ```
/// use sink_attention::{Attention, Axes, Inputs, MaskData, MaskPacking, Options, Problem, Shape};
///
/// let shape = Shape { batch: 1, heads: 1, kv_heads: 1, seq_q: 1, seq_k: 3, head_dim: 1, value_dim: 1 };
/// let packed = MaskData::pack(&[1, 0, 1], 3);
/// assert_eq!(packed, [0b101]); // a bit for each key
/// let problem = Problem::new(shape, Options::new().mask(Axes::KEYS).mask_packing(MaskPacking::Bits))?;
/// let inputs = Inputs::new(&[0.0f32], &[0.0; 3], &[4.0, 100.0, 8.0]).mask(MaskData::Bits(&packed));
/// let output = Attention::cpu().forward(&problem, &inputs)?;
/// assert!((output.o[0] - 6.0).abs() < 1e-5); // the mean of 4 and 8
/// # Ok::<(), sink_attention::Error>(())
/// ```
#[derive(Debug, Clone, Copy)]
pub enum MaskData<'a> {
    /// [`MaskPacking::Bytes`].
    Bytes(&'a [u8]),
    /// [`MaskPacking::Bits`].
    Bits(&'a [u32]),
}

impl MaskData<'_> {
    /// Bytes or words.
    #[expect(clippy::len_without_is_empty, reason = "no mask is empty")]
    pub fn len(&self) -> usize {
        match self {
            MaskData::Bytes(mask) => mask.len(),
            MaskData::Bits(mask) => mask.len(),
        }
    }

    /// How it lies in memory.
    pub fn packing(&self) -> MaskPacking {
        match self {
            MaskData::Bytes(_) => MaskPacking::Bytes,
            MaskData::Bits(_) => MaskPacking::Bits,
        }
    }

    /// A mask of bytes, whose rows have `keys` of them, in [bits](MaskPacking::Bits). A last row that is shorter is packed as it is.
    pub fn pack(mask: &[u8], keys: usize) -> Vec<u32> {
        mask.chunks(keys.max(1)).flat_map(|row| row.chunks(32).map(mask_word)).collect()
    }
}

/// The bits of up to 32 bytes, eight at a time: carries set the highest bit of each that is not 0, and a product gathers them.
pub(crate) fn mask_word(bytes: &[u8]) -> u32 {
    const LOW: u64 = 0x7f7f_7f7f_7f7f_7f7f;
    let gather = |bytes: [u8; 8]| {
        let bytes = u64::from_le_bytes(bytes);
        let set = (((bytes & LOW) + LOW) | bytes) & !LOW;
        ((set >> 7).wrapping_mul(0x0102_0408_1020_4080) >> 56) as u32
    };
    let (chunks, rest) = bytes.as_chunks();
    let mut last = [0; 8];
    last[..rest.len()].copy_from_slice(rest);
    let last = gather(last).unbounded_shl(8 * chunks.len() as u32);
    chunks.iter().rev().fold(0, |word, &chunk| word << 8 | gather(chunk)) | last
}

/// Operands of a forward pass on the host, densely packed in the problem's layout; `T` is an [`Element`].
///
/// ```
/// use sink_attention::{Attention, Inputs, Options, Problem, Shape, SinkLogits};
///
/// let shape = Shape { batch: 1, heads: 1, kv_heads: 1, seq_q: 1, seq_k: 2, head_dim: 1, value_dim: 1 };
/// let problem = Problem::new(shape, Options::new().sink_logits(SinkLogits::PerHead))?;
/// let sink_logits = [2f32.ln()];
/// let inputs = Inputs::new(&[0.0f32], &[5.0, 7.0], &[1.0, 3.0]).sink_logits(&sink_logits[..]);
/// let output = Attention::cpu().forward(&problem, &inputs)?;
/// assert!((output.o[0] - 1.0).abs() < 1e-6); // (1 * 1 + 1 * 3) / (1 + 1 + 2)
/// # Ok::<(), sink_attention::Error>(())
/// ```
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct Inputs<'a, T = f32> {
    /// Queries, see [`Problem::q_shape`].
    pub q: &'a [T],
    /// Keys, see [`Problem::k_shape`].
    pub k: &'a [T],
    /// Values, see [`Problem::v_shape`].
    pub v: &'a [T],
    /// One logit per query head, where the options say [`SinkLogits::PerHead`].
    pub sink_logits: Option<&'a [f32]>,
    /// One slope per query head, where the options say [`Options::alibi`](crate::Options::alibi).
    pub alibi_slopes: Option<&'a [f32]>,
    /// Added to the scores, see [`Problem::bias_shape`].
    pub bias: Option<Bias<'a, T>>,
    /// The mask: the keys that may be seen, see [`Problem::mask_shape`].
    pub mask: Option<MaskData<'a>>,
}

impl<'a, T> Inputs<'a, T> {
    /// q, k and v, and no operand that goes with an option.
    pub fn new(q: &'a [T], k: &'a [T], v: &'a [T]) -> Self {
        Inputs { q, k, v, sink_logits: None, alibi_slopes: None, bias: None, mask: None }
    }

    /// The same with other q, k and v, and another element type, for which a bias of the operands' type is widened beforehand.
    pub(crate) fn with_operands<'b, U>(&self, [q, k, v]: [&'b [U]; 3], bias: Option<&'b [f32]>) -> Inputs<'b, U>
    where
        'a: 'b,
    {
        let Inputs { sink_logits, alibi_slopes, mask, .. } = *self;
        Inputs { q, k, v, sink_logits, alibi_slopes, bias: bias.map(Bias::F32), mask }
    }
}

setters! {
    impl['a, T] Inputs['a, T]
    plain {
        q: &'a [T],
        k: &'a [T],
        v: &'a [T],
    }
    optional {
        sink_logits: &'a [f32],
        alibi_slopes: &'a [f32],
        bias: Bias<'a, T>,
        mask: MaskData<'a>,
    }
}

/// Results of a forward pass on the host: `T` is the operands' type, `S` that of the softmax's state.
///
/// ```
/// use sink_attention::half::f16;
/// use sink_attention::{Attention, DType, Element, Inputs, Options, Problem, Shape};
///
/// let shape = Shape { batch: 1, heads: 1, kv_heads: 1, seq_q: 1, seq_k: 3, head_dim: 1, value_dim: 1 };
/// let problem = Problem::new(shape, Options::new().dtype(DType::F16))?;
/// let v = [f16::ONE, f16::ZERO, f16::ZERO];
/// let output = Attention::cpu().forward(&problem, &Inputs::new(&[f16::ZERO], &[f16::ZERO; 3], &v))?;
/// assert!((output.lse[0] - 3f32.ln()).abs() < 1e-6);
/// assert_eq!(output.o, [f16::from_f32(1.0 / 3.0)]); // 0.33325, rounded
/// for (o, rest) in output.o.iter().zip(output.o_lo.iter().flatten()) {
///     assert!((o.with_lo(*rest) - 1.0 / 3.0).abs() < 1e-6); // with o_lo as exact as in f32
/// }
/// # Ok::<(), sink_attention::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Output<T = f32, S = f32> {
    /// Attention outputs, see [`Problem::o_shape`].
    pub o: Vec<T>,
    /// The rounding error of o: [`Element::lo`] of each element before it was rounded; `None` in f32. With it the
    /// backward pass has o in f32. Without it (`None` in half precision, too) the backward pass computes delta anew.
    pub o_lo: Option<Vec<i16>>,
    /// Log of the softmax's denominator, the sink logit included, natural log, see [`Problem::lse_shape`].
    pub lse: Vec<S>,
}

impl<T, S> Output<T, S> {
    /// o and lse, without the rounding error of o.
    pub fn new(o: Vec<T>, lse: Vec<S>) -> Self {
        Output { o, o_lo: None, lse }
    }
}

setters! {
    impl[T, S] Output[T, S]
    plain {
        o: Vec<T>,
        lse: Vec<S>,
    }
    optional {
        o_lo: Vec<i16>,
    }
}

/// Gradients that flow into a forward pass's results, on the host.
///
/// ```
/// use sink_attention::{Attention, Inputs, Options, Problem, Shape, Upstream};
///
/// let shape = Shape { batch: 1, heads: 1, kv_heads: 1, seq_q: 1, seq_k: 2, head_dim: 1, value_dim: 1 };
/// let problem = Problem::new(shape, Options::new())?;
/// let inputs = Inputs::new(&[0.0f32], &[5.0, 7.0], &[1.0, 3.0]);
/// let attention = Attention::cpu();
/// let saved = attention.forward(&problem, &inputs)?; // both keys have the weight 1/2, o is 2
/// // The loss is o + lse. d_s is 1/2 (v - o) of o, and 1/2 of lse: [0, 1].
/// let gradients = attention.backward(&problem, &inputs, &saved, &Upstream::new(&[1.0]).d_lse(&[1.0][..]))?;
/// assert!((gradients.d_q[0] - 7.0).abs() < 1e-5); // 0 * 5 + 1 * 7
/// # Ok::<(), sink_attention::Error>(())
/// ```
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct Upstream<'a, T = f32> {
    /// Gradient of the loss by o, see [`Problem::o_shape`].
    pub d_o: &'a [T],
    /// Gradient of the loss by lse, see [`Problem::lse_shape`]; `None` is zero. Ignored where lse is -inf.
    pub d_lse: Option<&'a [f32]>,
}

impl<'a, T> Upstream<'a, T> {
    /// d_o, and no gradient by lse.
    pub fn new(d_o: &'a [T]) -> Self {
        Upstream { d_o, d_lse: None }
    }
}

setters! {
    impl['a, T] Upstream['a, T]
    plain {
        d_o: &'a [T],
    }
    optional {
        d_lse: &'a [f32],
    }
}

/// Gradients of a forward pass's operands, on the host; `T` and `S` as in [`Output`].
///
/// ```
/// use sink_attention::{Attention, Inputs, Options, Problem, Shape, SinkLogits, Upstream};
///
/// // Two query heads share one key head.
/// let shape = Shape { batch: 1, heads: 2, kv_heads: 1, seq_q: 1, seq_k: 2, head_dim: 1, value_dim: 1 };
/// let problem = Problem::new(shape, Options::new().sink_logits(SinkLogits::PerHead))?;
/// let sink_logits = [2f32.ln(); 2]; // weights: a quarter for each key, a half for the sink
/// let inputs = Inputs::new(&[0.0f32; 2], &[5.0, 7.0], &[1.0, 3.0]).sink_logits(&sink_logits[..]);
/// let attention = Attention::cpu();
/// let saved = attention.forward(&problem, &inputs)?; // o is 1 in both heads
/// let gradients = attention.backward(&problem, &inputs, &saved, &Upstream::new(&[1.0; 2]))?;
/// assert!(gradients.d_v.iter().all(|d_v| (d_v - 0.5).abs() < 1e-6)); // a quarter from each head
/// assert!(gradients.d_sink_logits.iter().flatten().all(|d_sink| (d_sink + 0.5).abs() < 1e-6)); // -1/2 * o
/// # Ok::<(), sink_attention::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Gradients<T = f32, S = f32> {
    /// Gradient by q, see [`Problem::q_shape`].
    pub d_q: Vec<T>,
    /// Gradient by k, see [`Problem::k_shape`]; summed over the query heads of the group.
    pub d_k: Vec<T>,
    /// Gradient by v, see [`Problem::v_shape`]; summed over the query heads of the group.
    pub d_v: Vec<T>,
    /// Gradient by the sink logits, `[heads]`, where the options say [`SinkLogits::PerHead`].
    pub d_sink_logits: Option<Vec<S>>,
    /// Gradient by the ALiBi slopes, `[heads]`, where the options say [`Options::alibi`](crate::Options::alibi).
    pub d_alibi_slopes: Option<Vec<S>>,
    /// Gradient by the bias, see [`Problem::bias_shape`], where there is one: summed over the axes that it does not have of its
    /// own.
    pub d_bias: Option<Vec<S>>,
}

impl<T, S> Gradients<T, S> {
    /// Gradients by q, k and v.
    pub fn new(d_q: Vec<T>, d_k: Vec<T>, d_v: Vec<T>) -> Self {
        Gradients { d_q, d_k, d_v, d_sink_logits: None, d_alibi_slopes: None, d_bias: None }
    }
}

setters! {
    impl[T, S] Gradients[T, S]
    plain {
        d_q: Vec<T>,
        d_k: Vec<T>,
        d_v: Vec<T>,
    }
    optional {
        d_sink_logits: Vec<S>,
        d_alibi_slopes: Vec<S>,
        d_bias: Vec<S>,
    }
}

/// o and lse of some of the keys, without the sink logit: in f32 whatever the operands are.
///
/// States of disjoint shards [merge](crate::Attention::merge) into the state of all their keys (Milakov and Gimelshein,
/// [2018](https://arxiv.org/abs/1805.02867); as partial attention states in Ye et al.,
/// [2025](https://arxiv.org/abs/2501.01005)):
///
/// ```text
/// lse = log(exp(lse_a) + exp(lse_b)),  o = o_a exp(lse_a - lse) + o_b exp(lse_b - lse)
/// ```
///
/// which is associative and commutative up to rounding. A row that sees nothing of its shard has o = 0 and lse =
/// -infinity; a state in which no row sees anything ([`empty`](Self::empty)) changes nothing. Where lse is -infinity, o is not read.
///
/// ```
/// use sink_attention::{Attention, Options, PartialState, Problem, Shape};
///
/// let shape = Shape { batch: 1, heads: 1, kv_heads: 1, seq_q: 1, seq_k: 3, head_dim: 1, value_dim: 1 };
/// let problem = Problem::new(shape, Options::new())?;
/// // One key of weight 1 and value 1, then two keys of weight 1 and mean 4, then no key.
/// let first = PartialState::new(vec![1.0], vec![0.0]);
/// let second = PartialState::new(vec![4.0], vec![2f32.ln()]);
/// let all = Attention::cpu().merge(&problem, &[&first, &second, &PartialState::empty(&problem)])?;
/// assert!((all.o[0] - 3.0).abs() < 1e-6); // (1 * 1 + 2 * 4) / 3
/// assert!((all.lse[0] - 3f32.ln()).abs() < 1e-6);
/// # Ok::<(), sink_attention::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct PartialState {
    /// Attention outputs, see [`Problem::o_shape`].
    pub o: Vec<f32>,
    /// Log of the sum of exp(score), natural log, see [`Problem::lse_shape`].
    pub lse: Vec<f32>,
    /// The largest score of each row, as lse lies, where it was asked for:
    /// [`Attention::attend_partial_with_row_max`](crate::Attention::attend_partial_with_row_max). A merge has it if all of its states
    /// have it, `row_max = max(row_max_a, row_max_b)`; where lse is -infinity, it is not read.
    pub row_max: Option<Vec<f32>>,
}

impl PartialState {
    /// o and lse, without row_max.
    pub fn new(o: Vec<f32>, lse: Vec<f32>) -> Self {
        PartialState { o, lse, row_max: None }
    }

    /// The state of no keys: o = 0, lse = -infinity and row_max = -infinity.
    pub fn empty(problem: &Problem) -> Self {
        let [o, lse] = [&problem.o_shape()[..], &problem.lse_shape()].map(|shape| shape.iter().product());
        let lse = vec![f32::NEG_INFINITY; lse];
        PartialState { o: vec![0.0; o], row_max: Some(lse.clone()), lse }
    }
}

setters! {
    impl[] PartialState[]
    plain {
        o: Vec<f32>,
        lse: Vec<f32>,
    }
    optional {
        row_max: Vec<f32>,
    }
}

/// Operands and results must fit the problem.
impl Problem {
    /// Checks host operands against the element type and the shapes.
    ///
    /// # Errors
    /// [`Error::WrongElementType`], [`Error::OperandLength`], [`Error::MissingOperand`], [`Error::UnexpectedOperand`],
    /// [`Error::BiasElementType`], [`Error::MaskPacking`].
    pub fn check_inputs<T: Element>(&self, inputs: &Inputs<'_, T>) -> Result<()> {
        if T::DTYPE != self.options().dtype {
            return Err(Error::WrongElementType { operands: T::DTYPE, options: self.options().dtype });
        }
        for (operand, slice, shape) in
            [("q", inputs.q, self.q_shape()), ("k", inputs.k, self.k_shape()), ("v", inputs.v, self.v_shape())]
        {
            check_length(operand, slice.len(), &shape)?;
        }
        self.check_optional_inputs(inputs)
    }

    /// Checks the operands that go with options.
    pub(crate) fn check_optional_inputs<T: Element>(&self, inputs: &Inputs<'_, T>) -> Result<()> {
        let heads = [self.shape().heads];
        self.check_sink_logits(inputs.sink_logits)?;
        let per_head = self.options().alibi.then_some(&heads[..]);
        check_optional("alibi_slopes", inputs.alibi_slopes.map(<[f32]>::len), per_head, "set Options::alibi")?;
        let (bias, mask) = (self.bias_shape(), self.mask_shape());
        let shape = bias.as_ref().map(<[usize; 4]>::as_slice);
        check_optional("bias", inputs.bias.map(|bias| bias.len()), shape, "set Options::bias")?;
        if let Some(bias) = inputs.bias.filter(|bias| bias.dtype() != self.options().bias_dtype) {
            return Err(Error::BiasElementType { bias: bias.dtype(), options: self.options().bias_dtype });
        }
        let shape = mask.as_ref().map(<[usize; 4]>::as_slice);
        check_optional("mask", inputs.mask.map(|mask| mask.len()), shape, "set Options::mask")?;
        match inputs.mask.filter(|mask| mask.packing() != self.options().mask_packing) {
            Some(mask) => Err(Error::MaskPacking { mask: mask.packing(), options: self.options().mask_packing }),
            None => Ok(()),
        }
    }

    /// One sink logit per head, where the options ask for them.
    pub(crate) fn check_sink_logits(&self, sink_logits: Option<&[f32]>) -> Result<()> {
        let heads = [self.shape().heads];
        let per_head = (self.options().sink_logits == SinkLogits::PerHead).then_some(&heads[..]);
        let hint = "set Options::sink_logits to SinkLogits::PerHead";
        check_optional("sink_logits", sink_logits.map(<[f32]>::len), per_head, hint)
    }

    /// Checks the results of a forward pass, and the gradients that flow into them.
    ///
    /// # Errors
    /// [`Error::OperandLength`]; [`Error::UnexpectedOperand`] for o_lo in f32.
    pub fn check_upstream<T, S, U>(&self, saved: &Output<T, S>, upstream: &Upstream<'_, U>) -> Result<()> {
        check_length("o", saved.o.len(), &self.o_shape())?;
        if let Some(o_lo) = &saved.o_lo {
            self.check_o_lo()?;
            check_length("o_lo", o_lo.len(), &self.o_shape())?;
        }
        check_length("lse", saved.lse.len(), &self.lse_shape())?;
        check_length("d_o", upstream.d_o.len(), &self.o_shape())?;
        upstream.d_lse.map_or(Ok(()), |d_lse| check_length("d_lse", d_lse.len(), &self.lse_shape()))
    }

    /// Whether rounding takes anything from o.
    pub(crate) fn check_o_lo(&self) -> Result<()> {
        if self.options().dtype.has_rounding_error() {
            return Ok(());
        }
        Err(Error::UnexpectedOperand {
            operand: "o_lo",
            hint: "in f32 nothing is rounded off o; set Options::dtype to DType::F16 or DType::Bf16, or leave it out",
        })
    }
}

/// An operand that is there if, and only if, an option asks for it with a shape.
fn check_optional(
    operand: &'static str,
    length: Option<usize>,
    shape: Option<&[usize]>,
    hint: &'static str,
) -> Result<()> {
    match (length, shape) {
        (Some(length), Some(shape)) => check_length(operand, length, shape),
        (None, Some(_)) => Err(Error::MissingOperand { operand }),
        (Some(_), None) => Err(Error::UnexpectedOperand { operand, hint }),
        (None, None) => Ok(()),
    }
}

impl Problem {
    /// Checks a partial state against the problem.
    ///
    /// # Errors
    /// [`Error::OperandLength`].
    pub fn check_state(&self, state: &PartialState) -> Result<()> {
        check_length("o of a partial state", state.o.len(), &self.o_shape())?;
        check_length("lse of a partial state", state.lse.len(), &self.lse_shape())?;
        let check = |row_max: &Vec<f32>| check_length("row_max of a partial state", row_max.len(), &self.lse_shape());
        state.row_max.as_ref().map_or(Ok(()), check)
    }

    /// Checks the operands of the last step of partial states.
    ///
    /// # Errors
    /// Those of [`check_state`](Self::check_state); [`Error::WrongElementType`]; [`Error::MissingOperand`],
    /// [`Error::UnexpectedOperand`] and [`Error::OperandLength`] of the sink logits.
    pub fn check_finish<T: Element>(&self, state: &PartialState, sink_logits: Option<&[f32]>) -> Result<()> {
        if T::DTYPE != self.options().dtype {
            return Err(Error::WrongElementType { operands: T::DTYPE, options: self.options().dtype });
        }
        self.check_state(state)?;
        self.check_sink_logits(sink_logits)
    }

    /// Checks the operands of a shard without keys.
    pub(crate) fn check_no_keys<T: Element>(&self, inputs: &Inputs<'_, T>) -> Result<()> {
        if T::DTYPE != self.options().dtype {
            return Err(Error::WrongElementType { operands: T::DTYPE, options: self.options().dtype });
        }
        check_length("q", inputs.q.len(), &self.q_shape())?;
        for (operand, slice) in [("k", inputs.k), ("v", inputs.v)] {
            check_length(operand, slice.len(), &[0])?;
        }
        match self.options().sink_logits {
            SinkLogits::PerHead if inputs.sink_logits.is_none() => Ok(()),
            _ => self.check_sink_logits(inputs.sink_logits),
        }
    }
}
