//! What is to be computed: shapes, options, and their validation.

use std::fmt;

use crate::element::{DType, Element};
use crate::error::{Error, Result};
use crate::mask::Mask;

/// Longest sequence, so that sums of positions fit 32-bit integers in shaders.
pub(crate) const MAX_SEQ: usize = 1 << 29;
/// Widest head, of q and k as of v.
pub(crate) const MAX_WIDTH: usize = 256;

/// Order of the axes of q, k, v and o. `lse` is `[batch, heads, seq_q]` in both.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Layout {
    /// `[batch, seq, heads, width]`.
    #[default]
    Bshd,
    /// `[batch, heads, seq, width]`.
    Bhsd,
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Layout::Bshd => "bshd",
            Layout::Bhsd => "bhsd",
        })
    }
}

impl Layout {
    /// Shape of an operand in this order.
    pub fn shape(self, batch: usize, heads: usize, seq: usize, width: usize) -> [usize; 4] {
        match self {
            Layout::Bshd => [batch, seq, heads, width],
            Layout::Bhsd => [batch, heads, seq, width],
        }
    }

    /// Strides for batch, head and sequence, in elements, of a densely packed operand.
    pub fn strides(self, heads: usize, seq: usize, width: usize) -> [u64; 3] {
        let [heads, seq, width] = [heads as u64, seq as u64, width as u64];
        match self {
            Layout::Bshd => [seq * heads * width, width, heads * width],
            Layout::Bhsd => [heads * seq * width, seq * width, width],
        }
    }
}

/// Where query 0 stands among the keys, when M and N differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Alignment {
    /// The last query stands at the last key: offset = N - M (FlashAttention 2.1 and later).
    #[default]
    BottomRight,
    /// The first query stands at the first key: offset = 0.
    TopLeft,
}

/// A band of keys around each query's position, both bounds inclusive; `None` is unbounded.
///
/// The same numbers as FlashAttention's `window_size=(left, right)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Window {
    /// Keys visible before the query's position.
    pub left: Option<usize>,
    /// Keys visible after the query's position.
    pub right: Option<usize>,
}

impl Window {
    /// No bound on either side.
    pub const FULL: Window = Window { left: None, right: None };

    /// A bound on the left only: `left` keys before the query, and all after it.
    pub fn left(left: usize) -> Self {
        Window { left: Some(left), right: None }
    }

    /// A bound on the right only: all keys before the query, and `right` after it.
    pub fn right(right: usize) -> Self {
        Window { left: None, right: Some(right) }
    }

    /// A window from `left` keys before the query to `right` keys after it.
    pub fn new(left: usize, right: usize) -> Self {
        Window { left: Some(left), right: Some(right) }
    }

    /// The query's own key and the `keys - 1` before it, as Hugging Face, gpt-oss and llama.cpp
    /// count a sliding window: left = keys - 1, right = 0. `keys(0)` is treated as `keys(1)`.
    pub fn keys(keys: usize) -> Self {
        Window::new(keys.saturating_sub(1), 0)
    }
}

/// Learned numbers in the softmax's denominator only (GPT-OSS `sinks`), in natural-log units.
///
/// Not to be confused with sink *tokens*, see [`Options::sink_tokens`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum SinkLogits {
    /// The ordinary softmax.
    #[default]
    None,
    /// A logit of zero for every head: softmax "off by one", exp(s) / (1 + sum exp(s)).
    OffByOne,
    /// One logit per query head, given as the operand `sink_logits` of shape `[heads]`.
    PerHead,
}

/// The sizes of a problem.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shape {
    /// B, sequences in the batch.
    pub batch: usize,
    /// H, query heads.
    pub heads: usize,
    /// G, key/value heads; H is a multiple of G, query head h reads key head h / (H / G).
    pub kv_heads: usize,
    /// M, queries in each sequence.
    pub seq_q: usize,
    /// N, keys in each sequence.
    pub seq_k: usize,
    /// D, width of q and k, 1 to 256.
    pub head_dim: usize,
    /// E, width of v and o, 1 to 256.
    pub value_dim: usize,
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "B={} H={} G={} M={} N={} D={} E={}",
            self.batch, self.heads, self.kv_heads, self.seq_q, self.seq_k, self.head_dim, self.value_dim
        )
    }
}

/// Which keys are visible and how scores become probabilities.
///
/// ```
/// use sink_attention::{Options, SinkLogits, Window};
/// // A sliding-window layer of GPT-OSS.
/// let options = Options::new().window(Window::keys(128)).sink_logits(SinkLogits::PerHead);
/// assert_eq!(options.window.left, Some(127));
/// ```
#[non_exhaustive]
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Options {
    /// No key after the query's position; with a window, its right bound becomes 0.
    pub causal: bool,
    /// The band of visible keys around the query's position.
    pub window: Window,
    /// The first keys that stay visible whatever the window's *left* bound (StreamingLLM).
    pub sink_tokens: usize,
    /// Learned logits in the denominator.
    pub sink_logits: SinkLogits,
    /// Factor on q.k; `None` is 1 / sqrt(D).
    pub scale: Option<f32>,
    /// Where query 0 stands, unless `query_offset` says so.
    pub alignment: Alignment,
    /// Position of query 0 among the keys, for streams and caches.
    pub query_offset: Option<i64>,
    /// Order of the axes of q, k, v and o.
    pub layout: Layout,
    /// Element type of q, k, v, o and their gradients; all else is f32.
    pub dtype: DType,
}

impl Options {
    /// Full attention, no sinks, `bshd`, f32.
    pub fn new() -> Self {
        Options::default()
    }

    /// Sets [`Options::causal`].
    pub fn causal(self, causal: bool) -> Self {
        Options { causal, ..self }
    }

    /// Sets [`Options::window`].
    pub fn window(self, window: Window) -> Self {
        Options { window, ..self }
    }

    /// Sets [`Options::sink_tokens`].
    pub fn sink_tokens(self, sink_tokens: usize) -> Self {
        Options { sink_tokens, ..self }
    }

    /// Sets [`Options::sink_logits`].
    pub fn sink_logits(self, sink_logits: SinkLogits) -> Self {
        Options { sink_logits, ..self }
    }

    /// Sets [`Options::scale`].
    pub fn scale(self, scale: f32) -> Self {
        Options { scale: Some(scale), ..self }
    }

    /// Sets [`Options::alignment`].
    pub fn alignment(self, alignment: Alignment) -> Self {
        Options { alignment, ..self }
    }

    /// Sets [`Options::query_offset`].
    pub fn query_offset(self, offset: i64) -> Self {
        Options { query_offset: Some(offset), ..self }
    }

    /// Sets [`Options::layout`].
    pub fn layout(self, layout: Layout) -> Self {
        Options { layout, ..self }
    }

    /// Sets [`Options::dtype`].
    ///
    /// ```
    /// use sink_attention::half::f16;
    /// use sink_attention::{Attention, DType, Inputs, Options, Problem, Shape};
    ///
    /// let shape = Shape { batch: 1, heads: 1, kv_heads: 1, seq_q: 1, seq_k: 2, head_dim: 2, value_dim: 2 };
    /// let problem = Problem::new(shape, Options::new().dtype(DType::F16))?;
    /// let (q, k, v) = ([f16::ZERO; 2], [f16::ONE; 4], [1.0, 2.0, 3.0, 4.0].map(f16::from_f32));
    /// let output = Attention::cpu().forward(&problem, &Inputs { q: &q, k: &k, v: &v, sink_logits: None })?;
    /// assert_eq!(output.o, [2.0, 3.0].map(f16::from_f32)); // f16, as the operands
    /// assert_eq!(output.lse, [2f32.ln()]); // f32 in every case
    /// # Ok::<(), sink_attention::Error>(())
    /// ```
    pub fn dtype(self, dtype: DType) -> Self {
        Options { dtype, ..self }
    }
}

/// A validated shape with its options.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Problem {
    shape: Shape,
    options: Options,
    scale: f32,
    mask: Mask,
}

impl Problem {
    /// Checks the shape and the options.
    ///
    /// # Errors
    /// [`Error::ZeroDimension`], [`Error::DimensionTooLarge`], [`Error::HeadsNotMultiple`] and
    /// [`Error::InvalidOption`], each with its numbers.
    pub fn new(shape: Shape, options: Options) -> Result<Self> {
        let Shape { batch, heads, kv_heads, seq_q, seq_k, head_dim, value_dim } = shape;
        let dimensions = [
            ("batch", batch, u32::MAX as usize),
            ("heads", heads, u32::MAX as usize),
            ("kv_heads", kv_heads, u32::MAX as usize),
            ("seq_q", seq_q, MAX_SEQ),
            ("seq_k", seq_k, MAX_SEQ),
            ("head_dim", head_dim, MAX_WIDTH),
            ("value_dim", value_dim, MAX_WIDTH),
        ];
        for (dimension, value, most) in dimensions {
            if value == 0 {
                return Err(Error::ZeroDimension { dimension });
            }
            if value > most {
                return Err(Error::DimensionTooLarge { dimension, value: value as u64, most: most as u64 });
            }
        }
        if heads % kv_heads != 0 {
            return Err(Error::HeadsNotMultiple { heads, kv_heads });
        }
        // The sizes of all operands must be countable before anything else is computed from them.
        for (operand, factors) in [
            ("q", [batch, heads, seq_q, head_dim]),
            ("k", [batch, kv_heads, seq_k, head_dim]),
            ("v", [batch, kv_heads, seq_k, value_dim]),
            ("o", [batch, heads, seq_q, value_dim]),
        ] {
            let elements = factors.iter().try_fold(1u128, |n, &f| n.checked_mul(f as u128));
            if elements.is_none_or(|n| n > (usize::MAX / 8) as u128) {
                return Err(Error::IndexOverflow {
                    operand,
                    last_element: elements.unwrap_or(u128::MAX),
                    most: (usize::MAX / 8) as u64,
                });
            }
        }
        let scale = options.scale.unwrap_or(1.0 / (head_dim as f32).sqrt());
        if !scale.is_finite() {
            return Err(Error::InvalidOption { option: "scale", reason: format!("{scale} is not finite") });
        }
        Ok(Problem { shape, options, scale, mask: Mask::new(&shape, &options) })
    }

    /// The sizes.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// The options as given.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// The factor on q.k.
    pub fn scale(&self) -> f32 {
        self.scale
    }

    /// Which keys each query sees.
    pub fn mask(&self) -> &Mask {
        &self.mask
    }

    /// Query heads that share one key/value head, H / G.
    pub fn group(&self) -> usize {
        self.shape.heads / self.shape.kv_heads
    }

    /// Shape of q in the problem's layout.
    pub fn q_shape(&self) -> [usize; 4] {
        let s = &self.shape;
        self.options.layout.shape(s.batch, s.heads, s.seq_q, s.head_dim)
    }

    /// Shape of k in the problem's layout.
    pub fn k_shape(&self) -> [usize; 4] {
        let s = &self.shape;
        self.options.layout.shape(s.batch, s.kv_heads, s.seq_k, s.head_dim)
    }

    /// Shape of v in the problem's layout.
    pub fn v_shape(&self) -> [usize; 4] {
        let s = &self.shape;
        self.options.layout.shape(s.batch, s.kv_heads, s.seq_k, s.value_dim)
    }

    /// Shape of o in the problem's layout.
    pub fn o_shape(&self) -> [usize; 4] {
        let s = &self.shape;
        self.options.layout.shape(s.batch, s.heads, s.seq_q, s.value_dim)
    }

    /// Shape of lse, `[batch, heads, seq_q]` in every layout.
    pub fn lse_shape(&self) -> [usize; 3] {
        [self.shape.batch, self.shape.heads, self.shape.seq_q]
    }

    /// Floating-point operations of the forward pass by the field's convention: two for each
    /// multiply-add of both matrix products, over the visible pairs only.
    pub fn forward_flops(&self) -> f64 {
        let s = &self.shape;
        let pairs = self.mask.visible_pairs() as f64 * (s.batch * s.heads) as f64;
        2.0 * pairs * (s.head_dim + s.value_dim) as f64
    }

    /// Floating-point operations of the backward pass by the field's convention, 2.5 times the forward's:
    /// five matrix products, although the scores are formed in both the d_q and the d_k/d_v kernel, which
    /// makes seven.
    pub fn backward_flops(&self) -> f64 {
        2.5 * self.forward_flops()
    }

    /// Checks host operands against the element type and the shapes.
    ///
    /// # Errors
    /// [`Error::WrongElementType`], [`Error::OperandLength`], [`Error::MissingOperand`], [`Error::UnexpectedOperand`].
    pub fn check_inputs<T: Element>(&self, inputs: &Inputs<'_, T>) -> Result<()> {
        if T::DTYPE != self.options.dtype {
            return Err(Error::WrongElementType { operands: T::DTYPE, options: self.options.dtype });
        }
        for (operand, slice, shape) in
            [("q", inputs.q, self.q_shape()), ("k", inputs.k, self.k_shape()), ("v", inputs.v, self.v_shape())]
        {
            check_length(operand, slice.len(), &shape)?;
        }
        match (self.options.sink_logits, inputs.sink_logits) {
            (SinkLogits::PerHead, None) => Err(Error::MissingOperand { operand: "sink_logits" }),
            (SinkLogits::PerHead, Some(slice)) => check_length("sink_logits", slice.len(), &[self.shape.heads]),
            (_, Some(_)) => Err(Error::UnexpectedOperand {
                operand: "sink_logits",
                hint: "set Options::sink_logits to SinkLogits::PerHead",
            }),
            (_, None) => Ok(()),
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let o = &self.options;
        write!(f, "{} {}", self.shape, o.layout)?;
        if o.dtype != DType::F32 {
            write!(f, " {}", o.dtype)?;
        }
        if o.causal {
            write!(f, " causal")?;
        }
        if o.window != Window::FULL {
            let bound = |b: Option<usize>| b.map_or("-".into(), |b| b.to_string());
            write!(f, " window=({},{})", bound(o.window.left), bound(o.window.right))?;
        }
        if o.sink_tokens > 0 {
            write!(f, " sink_tokens={}", o.sink_tokens)?;
        }
        match o.sink_logits {
            SinkLogits::None => {}
            SinkLogits::OffByOne => write!(f, " off-by-one")?,
            SinkLogits::PerHead => write!(f, " sink_logits")?,
        }
        if let Some(scale) = o.scale {
            write!(f, " scale={scale}")?;
        }
        if let Some(offset) = o.query_offset {
            write!(f, " query_offset={offset}")?;
        } else if o.alignment == Alignment::TopLeft {
            write!(f, " top-left")?;
        }
        Ok(())
    }
}

impl Problem {
    /// Checks what a forward pass saved, and the gradients that flow into its results.
    ///
    /// # Errors
    /// [`Error::OperandLength`]; [`Error::UnexpectedOperand`] for o_rest in f32.
    pub fn check_upstream<T, S, U>(&self, saved: &Output<T, S>, upstream: &Upstream<'_, U>) -> Result<()> {
        check_length("o", saved.o.len(), &self.o_shape())?;
        if let Some(o_rest) = &saved.o_rest {
            self.check_rest()?;
            check_length("o_rest", o_rest.len(), &self.o_shape())?;
        }
        check_length("lse", saved.lse.len(), &self.lse_shape())?;
        check_length("d_o", upstream.d_o.len(), &self.o_shape())?;
        upstream.d_lse.map_or(Ok(()), |d_lse| check_length("d_lse", d_lse.len(), &self.lse_shape()))
    }

    /// Whether rounding takes anything from o.
    pub(crate) fn check_rest(&self) -> Result<()> {
        match self.options.dtype {
            DType::F32 => Err(Error::UnexpectedOperand {
                operand: "o_rest",
                hint: "in f32 nothing is rounded off o; set Options::dtype to DType::F16 or DType::Bf16, or leave it out",
            }),
            DType::F16 | DType::Bf16 => Ok(()),
        }
    }
}

fn check_length(operand: &'static str, actual: usize, shape: &[usize]) -> Result<()> {
    let expected = shape.iter().product();
    if actual == expected {
        return Ok(());
    }
    Err(Error::OperandLength { operand, expected, actual, shape: shape.to_vec() })
}

/// Operands of a forward pass on the host, densely packed in the problem's layout; `T` is an [`Element`].
#[derive(Debug, Clone, Copy)]
pub struct Inputs<'a, T = f32> {
    /// Queries, see [`Problem::q_shape`].
    pub q: &'a [T],
    /// Keys, see [`Problem::k_shape`].
    pub k: &'a [T],
    /// Values, see [`Problem::v_shape`].
    pub v: &'a [T],
    /// One logit per query head, where the options say [`SinkLogits::PerHead`].
    pub sink_logits: Option<&'a [f32]>,
}

/// Results of a forward pass on the host: `T` is the operands' type, `S` that of the softmax's state.
#[derive(Debug, Clone, PartialEq)]
pub struct Output<T = f32, S = f32> {
    /// Attention outputs, see [`Problem::o_shape`].
    pub o: Vec<T>,
    /// What rounding took from o, [`Element::rest`] of each element before it was rounded; `None` in f32. With it the
    /// backward pass has o in f32; without it (`None` in half precision, too) that computes what it needs anew.
    pub o_rest: Option<Vec<i16>>,
    /// Log of the softmax's denominator, the sink logit included, natural log, see [`Problem::lse_shape`].
    pub lse: Vec<S>,
}

/// Gradients that flow into a forward pass's results, on the host.
#[derive(Debug, Clone, Copy)]
pub struct Upstream<'a, T = f32> {
    /// Gradient of the loss by o, see [`Problem::o_shape`].
    pub d_o: &'a [T],
    /// Gradient of the loss by lse, see [`Problem::lse_shape`]; `None` is zero. Ignored where lse is -inf.
    pub d_lse: Option<&'a [f32]>,
}

/// Gradients of a forward pass's operands, on the host; `T` and `S` as in [`Output`].
#[derive(Debug, Clone, PartialEq)]
pub struct Gradients<T = f32, S = f32> {
    /// Gradient by q, see [`Problem::q_shape`].
    pub d_q: Vec<T>,
    /// Gradient by k, see [`Problem::k_shape`]; summed over the query heads of the group.
    pub d_k: Vec<T>,
    /// Gradient by v, see [`Problem::v_shape`]; summed over the query heads of the group.
    pub d_v: Vec<T>,
    /// Gradient by the sink logits, `[heads]`, where the options say [`SinkLogits::PerHead`].
    pub d_sink_logits: Option<Vec<S>>,
}
