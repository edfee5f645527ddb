//! Conformance files: one attention problem, its operands and options, in a safetensors file.
//!
//! | tensor | shape | element type |
//! |---|---|---|
//! | `q`, `k`, `v` | in `layout`; `thd` is `[tokens, heads, width]` | f32, f16 or bf16, all of one type |
//! | `sinks` | `[H]` | f32 |
//! | `alibi_slopes` | `[H]` | f32 |
//! | `bias` | `[B or 1, H or 1, M or 1, N]` | f32, or that of q |
//! | `mask` | `[B or 1, H or 1, M or 1, N]`, 1 = may attend | u8 or bool, each 0 or 1 |
//! | `cu_seqlens_q`, `cu_seqlens_k` | `[B + 1]`, with layout `thd` only | i32, u32 or i64 |
//! | `dout` | that of the result | that of q |
//! | `dlse` | `[B, H, M]`; `thd`: `[H, tokens]` | f32 |
//!
//! Only q, k and v (and with `thd` the lengths) must be there, and an option is on if its tensor is there. An axis of size 1 in a bias or a
//! mask is broadcast. With `thd`, M and N are those of the longest sequence. Tensors named `expected.*` are for tests and ignored here.
//! String metadata holds the other options. An absent key means the default:
//!
//! | key | value |
//! |---|---|
//! | `layout` | `bshd` (default), `bhsd`, `thd` |
//! | `causal` | `true`, `false` (default) |
//! | `align` | `bottom-right` (default), `top-left` |
//! | `window_left`, `window_right` | inclusive bounds, from 0 up; absent: unbounded |
//! | `sink_tokens` | first keys exempt from the left bound |
//! | `scale` | factor on q.k; absent: 1 / sqrt(D) |
//! | `softcap` | scores s become softcap * tanh(s / softcap); greater than 0 |
//! | `q_offset` | position of query 0 among the keys |
//! | `format` | ignored; other tools write it |
//!
//! Reading is strict: an unknown key or tensor is an error, because a misspelt name would otherwise change a result silently.
//!
//! Results have the names `out`, `lse`, `dq`, `dk`, `dv`, `dsinks`, `dalibi_slopes` and `dbias`, as far as they apply. `out` and the
//! gradients of q, k and v have the operands' element type, and all other results are f32.

mod error;
mod results;

use std::collections::BTreeMap;
use std::path::Path;
use std::str::FromStr;

use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};

use self::error::TENSORS;
pub use self::error::{Error, FormatError};
pub use self::results::{Tensor, check_output, write};
use crate::file::values::{Values, decode};
use crate::file::{Container, read_container};
use crate::problem::element::{DType, Element};
use crate::problem::varlen::{CUMULATIVE, Lengths};
use crate::problem::{Alignment, Axes, Bias, Inputs, Layout, MaskData, Options, Problem, Shape, SinkLogits, Upstream};

/// A conformance file: a validated problem with operands that fit it.
#[derive(Debug, Clone, PartialEq)]
pub struct Case {
    /// Shape and options.
    pub problem: Problem,
    /// Queries.
    pub q: Values,
    /// Keys.
    pub k: Values,
    /// Values.
    pub v: Values,
    /// Sink logits, one per query head: the tensor `sinks`.
    pub sink_logits: Option<Vec<f32>>,
    /// ALiBi slopes, one per query head.
    pub alibi_slopes: Option<Vec<f32>>,
    /// Added to the scores, see [`Problem::bias_shape`].
    pub bias: Option<Values>,
    /// Visibility of each pair, a byte each, see [`Problem::mask_shape`].
    pub mask: Option<Vec<u8>>,
    /// Gradient of the outputs: the tensor `dout`.
    pub d_o: Option<Values>,
    /// Gradient of lse: the tensor `dlse`.
    pub d_lse: Option<Vec<f32>>,
}

impl Case {
    /// Reads a file.
    ///
    /// # Errors
    /// [`Error::Read`] and [`Error::Format`].
    pub fn read(path: impl AsRef<Path>) -> Result<Self, Error> {
        let path = path.as_ref();
        let format = |source| Error::Format { path: path.into(), source };
        let bytes = read_container(path).map_err(|source| Error::Read { path: path.into(), source })?;
        Case::parse(&bytes.map_err(|malformed| format(malformed.into()))?).map_err(format)
    }

    /// Reads the content of a file.
    ///
    /// # Errors
    /// [`FormatError`]. It never panics, whatever the bytes are.
    pub fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        let Container { strings, index, data } = Container::parse(bytes)?;
        let mut options = parse_options(&strings)?;
        let mut tensors = known(&index, data)?;

        let mut required = |name| tensors.remove(name).ok_or(FormatError::MissingTensor { name });
        let [q, k, v] = [required("q")?, required("k")?, required("v")?];
        let lengths = match options.layout {
            Layout::Thd => Some([required("cu_seqlens_q")?, required("cu_seqlens_k")?]),
            Layout::Bshd | Layout::Bhsd => None,
        };
        let [sinks, slopes, bias, mask, d_o, d_lse] =
            ["sinks", "alibi_slopes", "bias", "mask", "dout", "dlse"].map(|name| tensors.remove(name));
        // Of the known tensors only the lengths can be left, in a layout that does not use them.
        if let Some(name) = tensors.into_keys().next() {
            return Err(FormatError::WrongLayout { name, layout: options.layout });
        }

        // Element types are checked first: if the type is the mistake, the shapes say little.
        let operand = |tensor: &Raw<'_>| {
            tensor.check_same_dtype(&q)?;
            tensor.values()
        };
        let (q_values, k_values, v_values) = (operand(&q)?, operand(&k)?, operand(&v)?);
        let bias_values = bias.as_ref().map(|bias| bias.bias(&q)).transpose()?;
        let mask_values = mask.as_ref().map(Raw::mask).transpose()?;
        options.dtype = q_values.dtype();
        options.bias_dtype = bias_values.as_ref().map_or(DType::F32, Values::dtype);
        options.alibi = slopes.is_some();
        if sinks.is_some() {
            options.sink_logits = SinkLogits::PerHead;
        }
        let shape = problem_shape(options.layout, &q, &k, &v)?;
        let lengths = match lengths {
            Some([q, k]) => Some([q.lengths()?, k.lengths()?]),
            None => None,
        };
        let problem = |options| match &lengths {
            Some([q, k]) => {
                Problem::with_lengths(shape, options, Lengths::Cumulative { q, k }).map_err(in_words_of_file)
            }
            None => Problem::new(shape, options),
        };
        // A bias or a mask is broadcast to the scores of the longest sequence.
        let scores = problem(options)?.pairs_shape();
        options.bias = bias.map(|bias| bias.axes(scores)).transpose()?;
        options.mask = mask.map(|mask| mask.axes(scores)).transpose()?;
        let problem = problem(options)?;

        let floats = |tensor: Option<Raw<'_>>, shape: &[usize]| {
            let floats = |tensor: Raw<'_>| {
                tensor.check_shape(shape)?;
                tensor.floats()
            };
            tensor.map(floats).transpose()
        };
        let gradient = |tensor: Raw<'_>| {
            tensor.check_shape(in_file(options.layout, &problem.o_shape()))?;
            operand(&tensor)
        };
        let case = Case {
            q: q_values,
            k: k_values,
            v: v_values,
            sink_logits: floats(sinks, &[shape.heads])?,
            alibi_slopes: floats(slopes, &[shape.heads])?,
            bias: bias_values,
            mask: mask_values,
            d_o: d_o.map(gradient).transpose()?,
            d_lse: floats(d_lse, in_file(options.layout, &problem.lse_shape()))?,
            problem,
        };
        match (&case.d_o, &case.d_lse) {
            // The backward pass runs if there is dout. A gradient must not be dropped silently.
            (None, Some(_)) => Err(FormatError::MissingTensor { name: "dout" }),
            _ => Ok(case),
        }
    }

    /// The operands of the forward pass.
    ///
    /// # Errors
    /// [`WrongElementType`](crate::problem::error::Error::WrongElementType) where `T` is not the type of the file's operands.
    pub fn inputs<T: Element>(&self) -> crate::problem::error::Result<Inputs<'_, T>> {
        let bias = match &self.bias {
            Some(Values::F32(bias)) => Some(Bias::F32(bias)),
            bias => bias
                .as_ref()
                .map(|bias| Ok::<_, crate::problem::error::Error>(Bias::Operand(typed(bias)?)))
                .transpose()?,
        };
        Ok(Inputs::new(typed(&self.q)?, typed(&self.k)?, typed(&self.v)?)
            .sink_logits(self.sink_logits.as_deref())
            .alibi_slopes(self.alibi_slopes.as_deref())
            .bias(bias)
            .mask(self.mask.as_deref().map(MaskData::Bytes)))
    }

    /// The gradients that flow into the results; `None` where the file asks for the forward pass only.
    ///
    /// # Errors
    /// As [`inputs`](Self::inputs).
    pub fn upstream<T: Element>(&self) -> crate::problem::error::Result<Option<Upstream<'_, T>>> {
        let upstream = |d_o| Ok(Upstream { d_o: typed(d_o)?, d_lse: self.d_lse.as_deref() });
        self.d_o.as_ref().map(upstream).transpose()
    }
}

/// Gives cumulative lengths the names of their tensors in a file.
fn in_words_of_file(error: crate::problem::error::Error) -> crate::problem::error::Error {
    let crate::problem::error::Error::InvalidLengths { lengths, reason } = error else { return error };
    let [of_q, of_k] = CUMULATIVE;
    let names = [(of_q, "cu_seqlens_q"), (of_k, "cu_seqlens_k")];
    let lengths = names.iter().find(|(name, _)| *name == lengths).map_or(lengths, |(_, tensor)| tensor);
    crate::problem::error::Error::InvalidLengths { lengths, reason: reason.replace(of_q, "cu_seqlens_q") }
}

/// An operand in the type that the caller computes with.
fn typed<T: Element>(values: &Values) -> crate::problem::error::Result<&[T]> {
    values
        .as_slice()
        .ok_or(crate::problem::error::Error::WrongElementType { operands: values.dtype(), options: T::DTYPE })
}

/// A shape of the library in the form that files have: without a batch axis in thd.
pub(crate) fn in_file(layout: Layout, shape: &[usize]) -> &[usize] {
    match layout {
        Layout::Bshd | Layout::Bhsd => shape,
        Layout::Thd => &shape[1..],
    }
}
/// A tensor in the form that it has in the file.
struct Raw<'a> {
    name: &'static str,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: &'a [u8],
}

impl Raw<'_> {
    /// The elements of an operand.
    fn values(&self) -> Result<Values, FormatError> {
        Values::decode(self.dtype, self.bytes).ok_or_else(|| self.wrong_dtype("F32, F16 or BF16"))
    }

    /// The elements of a tensor that is f32 whatever the operands are.
    fn floats(&self) -> Result<Vec<f32>, FormatError> {
        match self.dtype {
            Dtype::F32 => Ok(decode(self.bytes, f32::from_le_bytes)),
            _ => Err(self.wrong_dtype("F32")),
        }
    }

    /// The elements of a tensor that may be f32 whatever the operands are.
    fn bias(&self, q: &Raw<'_>) -> Result<Values, FormatError> {
        match (self.dtype, q.dtype) {
            (Dtype::F32, _) => self.values(),
            (bias, q) if bias == q => self.values(),
            (_, Dtype::F16) => Err(self.wrong_dtype("F32, or F16 as q")),
            (_, Dtype::BF16) => Err(self.wrong_dtype("F32, or BF16 as q")),
            _ => Err(self.wrong_dtype("F32, as q")),
        }
    }

    /// The elements of a mask, which are a byte each in both types.
    fn mask(&self) -> Result<Vec<u8>, FormatError> {
        if ![Dtype::U8, Dtype::BOOL].contains(&self.dtype) {
            return Err(self.wrong_dtype("U8 or BOOL"));
        }
        match self.bytes.iter().position(|&byte| byte > 1) {
            Some(index) => Err(FormatError::MaskValue { index, value: self.bytes[index] }),
            None => Ok(self.bytes.to_vec()),
        }
    }

    /// Cumulative lengths. The problem checks whether they fit the tokens.
    fn lengths(&self) -> Result<Vec<u32>, FormatError> {
        let wide: Vec<i64> = match self.dtype {
            Dtype::I32 => decode(self.bytes, |bytes| i32::from_le_bytes(bytes).into()),
            Dtype::U32 => decode(self.bytes, |bytes| u32::from_le_bytes(bytes).into()),
            Dtype::I64 => decode(self.bytes, i64::from_le_bytes),
            _ => return Err(self.wrong_dtype("I32, U32 or I64")),
        };
        if self.shape.len() != 1 {
            return Err(self.wrong_rank(Layout::Thd, "[sequences + 1]"));
        }
        let length = |(n, length): (usize, i64)| {
            let reason = || format!("number {n} is {length}; it must be from 0 to {}", u32::MAX);
            let invalid = || crate::problem::error::Error::InvalidLengths { lengths: self.name, reason: reason() };
            u32::try_from(length).map_err(|_| invalid().into())
        };
        wide.into_iter().enumerate().map(length).collect()
    }

    /// The axes along which a bias or a mask is not broadcast.
    fn axes(&self, scores: [usize; 4]) -> Result<Axes, FormatError> {
        let fits = |(&actual, size): (&usize, usize)| actual == size || actual == 1;
        match *self.shape {
            [batch, heads, seq_q, seq_k] if seq_k == scores[3] && self.shape.iter().zip(scores).all(fits) => {
                Ok(Axes { batch: batch > 1, heads: heads > 1, seq_q: seq_q > 1 })
            }
            _ => Err(FormatError::Broadcast { name: self.name, actual: self.shape.clone(), scores }),
        }
    }

    fn check_same_dtype(&self, q: &Raw<'_>) -> Result<(), FormatError> {
        if self.dtype == q.dtype {
            return Ok(());
        }
        Err(FormatError::MixedElementTypes { name: self.name, actual: self.dtype, q: q.dtype })
    }

    fn check_shape(&self, expected: &[usize]) -> Result<(), FormatError> {
        if self.shape == expected {
            return Ok(());
        }
        Err(FormatError::Shape { name: self.name, actual: self.shape.clone(), expected: expected.to_vec() })
    }

    fn wrong_dtype(&self, expected: &'static str) -> FormatError {
        FormatError::ElementType { name: self.name, actual: self.dtype, expected }
    }

    fn wrong_rank(&self, layout: Layout, axes: &'static str) -> FormatError {
        FormatError::Rank { name: self.name, shape: self.shape.clone(), layout, axes }
    }
}

fn parse_options(metadata: &BTreeMap<String, String>) -> Result<Options, FormatError> {
    const COUNT: &str = "a whole number from 0 up";
    let mut options = Options::new();
    for (key, value) in metadata {
        let bad = |expected| FormatError::BadValue { key: key.clone(), value: value.clone(), expected };
        match key.as_str() {
            "format" => {}
            "layout" => {
                options.layout = match value.as_str() {
                    "bshd" => Layout::Bshd,
                    "bhsd" => Layout::Bhsd,
                    "thd" => Layout::Thd,
                    _ => return Err(bad("bshd, bhsd or thd")),
                }
            }
            "align" => {
                options.alignment = match value.as_str() {
                    "bottom-right" => Alignment::BottomRight,
                    "top-left" => Alignment::TopLeft,
                    _ => return Err(bad("bottom-right or top-left")),
                }
            }
            "causal" => options.causal = number(value).ok_or_else(|| bad("true or false"))?,
            "window_left" => options.window.left = Some(number(value).ok_or_else(|| bad(COUNT))?),
            "window_right" => options.window.right = Some(number(value).ok_or_else(|| bad(COUNT))?),
            "sink_tokens" => options.sink_tokens = number(value).ok_or_else(|| bad(COUNT))?,
            "q_offset" => options.query_offset = Some(number(value).ok_or_else(|| bad("a whole number"))?),
            "scale" => {
                let scale = number(value).filter(|scale: &f32| scale.is_finite());
                options.scale = Some(scale.ok_or_else(|| bad("a finite number"))?);
            }
            "softcap" => {
                let softcap = number(value).filter(|softcap: &f32| softcap.is_finite() && *softcap > 0.0);
                options.softcap = Some(softcap.ok_or_else(|| bad("a finite number greater than 0"))?);
            }
            _ => return Err(FormatError::UnknownKey { key: key.clone() }),
        }
    }
    // A key above sets each of these options, or a tensor does (sink logits, ALiBi, bias, mask and element types).
    let Options {
        causal: _,
        window: _,
        sink_tokens: _,
        sink_logits: _,
        scale: _,
        softcap: _,
        alibi: _,
        bias: _,
        bias_dtype: _,
        mask: _,
        mask_packing: _,
        alignment: _,
        query_offset: _,
        layout: _,
        dtype: _,
    } = options;
    Ok(options)
}

fn number<T: FromStr>(text: &str) -> Option<T> {
    text.parse().ok()
}

/// The tensors to compute with, by name.
fn known<'a>(index: &Metadata, data: &'a [u8]) -> Result<BTreeMap<&'static str, Raw<'a>>, FormatError> {
    // Tensors are in the order of their names, so that the first unknown one is always the same.
    let tensors: BTreeMap<String, _> = index.tensors().into_iter().collect();
    let computed = tensors.into_iter().filter(|(name, _)| !name.starts_with("expected."));
    let raw = |(name, info): (String, &TensorInfo)| {
        let known = TENSORS.into_iter().find(|known| *known == name);
        let name = known.ok_or(FormatError::UnknownTensor { name })?;
        let (start, end) = info.data_offsets;
        Ok((name, Raw { name, dtype: info.dtype, shape: info.shape.clone(), bytes: &data[start..end] }))
    };
    computed.map(raw).collect()
}

/// The sizes, if q, k and v agree about them.
fn problem_shape(layout: Layout, q: &Raw<'_>, k: &Raw<'_>, v: &Raw<'_>) -> Result<Shape, FormatError> {
    let sizes = |tensor: &Raw<'_>| match (layout, tensor.shape.as_slice()) {
        (Layout::Bshd, &[batch, seq, heads, width]) => Ok([batch, heads, seq, width]),
        (Layout::Bhsd, &[batch, heads, seq, width]) => Ok([batch, heads, seq, width]),
        (Layout::Thd, &[seq, heads, width]) => Ok([1, heads, seq, width]),
        (Layout::Bshd, _) => Err(tensor.wrong_rank(layout, "[batch, seq, heads, width]")),
        (Layout::Bhsd, _) => Err(tensor.wrong_rank(layout, "[batch, heads, seq, width]")),
        (Layout::Thd, _) => Err(tensor.wrong_rank(layout, "[tokens, heads, width]")),
    };
    let [batch, heads, seq_q, head_dim] = sizes(q)?;
    let [k_batch, kv_heads, seq_k, k_width] = sizes(k)?;
    let [v_batch, v_heads, v_seq, value_dim] = sizes(v)?;
    for (dimension, left_name, left, right_name, right) in [
        ("batch", "q", batch, "k", k_batch),
        ("batch", "q", batch, "v", v_batch),
        ("heads", "k", kv_heads, "v", v_heads),
        ("sequence length", "k", seq_k, "v", v_seq),
        ("width", "q", head_dim, "k", k_width),
    ] {
        if left != right {
            return Err(FormatError::Mismatch { dimension, left_name, left, right_name, right, layout });
        }
    }
    Ok(Shape { batch, heads, kv_heads, seq_q, seq_k, head_dim, value_dim })
}
