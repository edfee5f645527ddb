//! Options: what is computed, apart from sizes.

use std::fmt;

use crate::problem::element::DType;

/// Order of the axes of q, k, v and o. `lse` is `[batch, heads, seq_q]` in each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Layout {
    /// `[batch, seq, heads, width]`.
    #[default]
    Bshd,
    /// `[batch, heads, seq, width]`.
    Bhsd,
    /// `[tokens, heads, width]`: the sequences of a batch one after the other, whatever their lengths, see
    /// [`Problem::with_lengths`](crate::Problem::with_lengths). `seq_q` and `seq_k` of the shape are the tokens of all sequences, and its batch is 1. Shapes
    /// and strides are those of `[1, tokens, heads, width]`.
    Thd,
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Layout::Bshd => "bshd",
            Layout::Bhsd => "bhsd",
            Layout::Thd => "thd",
        })
    }
}

impl Layout {
    /// Shape of an operand in this order.
    pub fn shape(self, batch: usize, heads: usize, seq: usize, width: usize) -> [usize; 4] {
        match self {
            Layout::Bshd | Layout::Thd => [batch, seq, heads, width],
            Layout::Bhsd => [batch, heads, seq, width],
        }
    }

    /// Strides for batch, head and sequence, in elements, of a densely packed operand.
    pub fn strides(self, heads: usize, seq: usize, width: usize) -> [u64; 3] {
        let [heads, seq, width] = [heads as u64, seq as u64, width as u64];
        match self {
            Layout::Bshd | Layout::Thd => [seq * heads * width, width, heads * width],
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
///
/// ```
/// use sink_attention::{Options, Problem, Shape, Window};
///
/// assert_eq!(Window::keys(3), Window { left: Some(2), right: Some(0) });
/// let shape = Shape { batch: 1, heads: 1, kv_heads: 1, seq_q: 8, seq_k: 8, head_dim: 1, value_dim: 1 };
/// let problem = Problem::new(shape, Options::new().window(Window::keys(3)).sink_tokens(1))?;
/// for sequence in problem.sequences() {
///     // Query 6 sees the sink token, its own key and the two keys before it.
///     assert_eq!(sequence.band.visible_keys(6), [0..1, 4..7]);
/// }
/// # Ok::<(), sink_attention::Error>(())
/// ```
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

/// The axes that a bias or a mask has of its own; along the others, one serves all. The keys' axis is always its own.
///
/// ```
/// use sink_attention::Axes;
/// // A padding mask, [B, 1, 1, N].
/// assert_eq!(Axes::KEYS.batch(), Axes { batch: true, heads: false, seq_q: false });
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Axes {
    /// One for each sequence of the batch.
    pub batch: bool,
    /// One for each query head.
    pub heads: bool,
    /// One for each query.
    pub seq_q: bool,
}

impl Axes {
    /// `[B, H, M, N]`.
    pub const ALL: Axes = Axes { batch: true, heads: true, seq_q: true };
    /// `[1, 1, 1, N]`.
    pub const KEYS: Axes = Axes { batch: false, heads: false, seq_q: false };

    /// With one for each sequence of the batch.
    pub fn batch(self) -> Self {
        Axes { batch: true, ..self }
    }

    /// With one for each query head.
    pub fn heads(self) -> Self {
        Axes { heads: true, ..self }
    }

    /// With one for each query.
    pub fn seq_q(self) -> Self {
        Axes { seq_q: true, ..self }
    }

    /// The shape of all axes, with 1 where an axis is not its own.
    pub(crate) fn of(self, [batch, heads, seq_q, seq_k]: [usize; 4]) -> [usize; 4] {
        let own = |own: bool, size: usize| if own { size } else { 1 };
        [own(self.batch, batch), own(self.heads, heads), own(self.seq_q, seq_q), seq_k]
    }
}

/// How a boolean mask lies in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum MaskPacking {
    /// A byte for each pair; anything but 0 lets the query see the key.
    #[default]
    Bytes,
    /// A bit for each pair: rows of `ceil(N / 32)` words, key j is bit j % 32 of word j / 32, see
    /// [`MaskData::pack`](crate::MaskData::pack).
    Bits,
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
    /// Scores s become softcap * tanh(s / softcap), before ALiBi and bias; greater than 0.
    pub softcap: Option<f32>,
    /// slope * |p - j| is subtracted from the score of a query at position p and key j (ALiBi), with a slope for each query head
    /// given as the operand `alibi_slopes` of shape `[heads]`.
    pub alibi: bool,
    /// A bias is added to the scores, given as the operand `bias` of shape `[B or 1, H or 1, M or 1, N]`: these are the axes that
    /// it has of its own. -infinity hides the key.
    pub bias: Option<Axes>,
    /// Element type of the bias: f32, or [`dtype`](Self::dtype). Its gradient is f32.
    pub bias_dtype: DType,
    /// A boolean mask, given as the operand `mask` of shape `[B or 1, H or 1, M or 1, N]`, hides more keys than window
    /// and causality do: these are the axes that it has of its own.
    pub mask: Option<Axes>,
    /// How the mask lies in memory.
    pub mask_packing: MaskPacking,
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

    /// Sets [`Options::softcap`].
    pub fn softcap(self, softcap: f32) -> Self {
        Options { softcap: Some(softcap), ..self }
    }

    /// Sets [`Options::alibi`].
    pub fn alibi(self, alibi: bool) -> Self {
        Options { alibi, ..self }
    }

    /// Sets [`Options::bias`].
    pub fn bias(self, axes: Axes) -> Self {
        Options { bias: Some(axes), ..self }
    }

    /// Sets [`Options::bias_dtype`].
    pub fn bias_dtype(self, dtype: DType) -> Self {
        Options { bias_dtype: dtype, ..self }
    }

    /// Sets [`Options::mask`].
    pub fn mask(self, axes: Axes) -> Self {
        Options { mask: Some(axes), ..self }
    }

    /// Sets [`Options::mask_packing`].
    pub fn mask_packing(self, packing: MaskPacking) -> Self {
        Options { mask_packing: packing, ..self }
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
    /// let output = Attention::cpu().forward(&problem, &Inputs::new(&q, &k, &v))?;
    /// assert_eq!(output.o, [2.0, 3.0].map(f16::from_f32)); // f16, as the operands
    /// assert_eq!(output.lse, [2f32.ln()]); // f32 in every case
    /// # Ok::<(), sink_attention::Error>(())
    /// ```
    pub fn dtype(self, dtype: DType) -> Self {
        Options { dtype, ..self }
    }
}
