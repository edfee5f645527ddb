//! What is to be computed: shapes, options, and their validation.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use crate::element::{DType, Element};
use crate::error::{Error, Result};
use crate::mask::{Band, shard_options};
use crate::sequences::{self, Lengths, Sequence};

/// Longest sequence, so that sums of positions fit 32-bit integers in shaders.
pub(crate) const MAX_SEQ: usize = 1 << 29;
/// Widest head, of q and k as of v.
pub(crate) const MAX_WIDTH: usize = 512;

/// Order of the axes of q, k, v and o. `lse` is `[batch, heads, seq_q]` in each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Layout {
    /// `[batch, seq, heads, width]`.
    #[default]
    Bshd,
    /// `[batch, heads, seq, width]`.
    Bhsd,
    /// `[tokens, heads, width]`: the sequences of a batch one after the other, whatever their lengths, see
    /// [`Problem::with_lengths`]. `seq_q` and `seq_k` of the shape are the tokens of all sequences, and its batch is 1: that is
    /// how shapes and strides are told, `[1, tokens, heads, width]`.
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
    /// [`pack_mask`](crate::pack_mask).
    Bits,
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
    /// D, width of q and k, 1 to 512.
    pub head_dim: usize,
    /// E, width of v and o, 1 to 512.
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
    /// A boolean mask, given as the operand `mask` of shape `[B or 1, H or 1, M or 1, N]`, hides keys beside those that window
    /// and causality hide: these are the axes that it has of its own.
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

/// A validated shape with its options.
#[derive(Debug, Clone, PartialEq)]
pub struct Problem {
    shape: Shape,
    options: Options,
    scale: f32,
    band: Band,
    /// Where lengths differ.
    sequences: Option<Arc<[Sequence]>>,
}

impl Problem {
    /// Checks the shape and the options.
    ///
    /// # Errors
    /// [`Error::ZeroDimension`], [`Error::DimensionTooLarge`], [`Error::HeadsNotMultiple`] and
    /// [`Error::InvalidOption`], each with its numbers.
    pub fn new(shape: Shape, options: Options) -> Result<Self> {
        if options.layout == Layout::Thd {
            let reason = "thd needs the lengths of its sequences: Problem::with_lengths".into();
            return Err(Error::InvalidOption { option: "layout", reason });
        }
        Problem::checked(shape, options)?.check_pairs()
    }

    /// Checks a batch of sequences of different lengths. Queries and keys meet within their sequence only; positions, windows,
    /// sink tokens and alignment count from its start.
    ///
    /// ```
    /// use sink_attention::{Lengths, Layout, Options, Problem, Shape};
    /// // Three sequences of 2, 0 and 3 tokens.
    /// let shape = Shape { batch: 1, heads: 2, kv_heads: 1, seq_q: 5, seq_k: 5, head_dim: 8, value_dim: 8 };
    /// let lengths = Lengths::Cumulative { q: &[0, 2, 2, 5], k: &[0, 2, 2, 5] };
    /// let problem = Problem::with_lengths(shape, Options::new().causal(true).layout(Layout::Thd), lengths)?;
    /// assert_eq!(problem.sequence_count(), 3);
    /// # Ok::<(), sink_attention::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`new`](Self::new); [`Error::InvalidLengths`].
    pub fn with_lengths(shape: Shape, options: Options, lengths: Lengths<'_>) -> Result<Self> {
        let problem = Problem::checked(shape, options)?;
        let sequences = Some(sequences::sequences(&shape, &options, lengths)?);
        Problem { sequences, ..problem }.check_pairs()
    }

    fn checked(shape: Shape, options: Options) -> Result<Self> {
        let Shape { batch, heads, kv_heads, seq_q, seq_k, head_dim, value_dim } = shape;
        let dimensions = [
            ("batch", batch, u32::MAX as usize),
            ("heads", heads, u32::MAX as usize),
            ("kv_heads", kv_heads, u32::MAX as usize),
            // Keys first: where only their number is given, that of queries follows from it.
            ("seq_k", seq_k, MAX_SEQ),
            ("seq_q", seq_q, MAX_SEQ),
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
            check_countable(operand, factors)?;
        }
        let scale = options.scale.unwrap_or(1.0 / (head_dim as f32).sqrt());
        if !scale.is_finite() {
            return Err(Error::InvalidOption { option: "scale", reason: format!("{scale} is not finite") });
        }
        // Devices may take a subnormal number for 0.
        if let Some(softcap) = options.softcap.filter(|softcap| !(softcap.is_normal() && *softcap > 0.0)) {
            let reason = format!("{softcap}; it must be finite and at least {:e}", f32::MIN_POSITIVE);
            return Err(Error::InvalidOption { option: "softcap", reason });
        }
        if options.bias.is_some() && ![DType::F32, options.dtype].contains(&options.bias_dtype) {
            let (bias, dtype) = (options.bias_dtype, options.dtype);
            let reason = format!("{bias}; it must be f32 or that of the operands, {dtype}");
            return Err(Error::InvalidOption { option: "bias_dtype", reason });
        }
        let band = Band::new(seq_q, seq_k, &options);
        check_distances(&options, &band)?;
        Ok(Problem { shape, options, scale, band, sequences: None })
    }

    /// Bias and mask must be countable, too; their shapes follow from the lengths.
    fn check_pairs(self) -> Result<Self> {
        for (operand, shape) in [("bias", self.bias_shape()), ("mask", self.mask_shape())] {
            shape.map_or(Ok(()), |shape| check_countable(operand, shape))?;
        }
        Ok(self)
    }

    /// The problem of some of the keys: `keys` counts along the sequence axis of k and v, of which it takes these rows. Its
    /// queries see what they see of them in the whole: positions, windows, sink tokens and lengths are the whole's. So are all
    /// options, but for the [`query_offset`](Options::query_offset) and the [`sink_tokens`](Options::sink_tokens) of a
    /// problem without lengths, which count from the first of these keys. A bias and a mask are those of the shard's keys.
    ///
    /// In [`Layout::Thd`] the rows may begin and end within sequences; those that have none of them are empty. The columns of a
    /// bias or a mask then begin at another key in each sequence, so that it needs a batch axis of its own.
    ///
    /// ```
    /// use sink_attention::{Options, Problem, Shape, Window};
    /// let shape = Shape { batch: 1, heads: 1, kv_heads: 1, seq_q: 100, seq_k: 100, head_dim: 8, value_dim: 8 };
    /// let whole = Problem::new(shape, Options::new().window(Window::keys(20)).sink_tokens(4))?;
    /// let shard = whole.shard(60..100)?;
    /// assert_eq!((shard.shape().seq_k, shard.options().query_offset), (40, Some(-60)));
    /// # Ok::<(), sink_attention::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::InvalidShard`]; [`Error::ZeroDimension`] for no keys, of which there is nothing to compute: their partial state
    /// is [`PartialState::empty`](crate::PartialState::empty). [`Error::InvalidOption`] where the shifted offset is too far away
    /// for ALiBi, and in [`Layout::Thd`] for a bias or a mask that sequences share.
    pub fn shard(&self, keys: Range<usize>) -> Result<Problem> {
        self.check_shard(&keys)?;
        if keys.is_empty() {
            return Err(Error::ZeroDimension { dimension: "seq_k" });
        }
        for (option, axes) in [("bias", self.options.bias), ("mask", self.options.mask)] {
            if self.options.layout == Layout::Thd && axes.is_some_and(|axes| !axes.batch) {
                let reason =
                    "a shard of thd needs one for each sequence (Axes::batch): they begin at different keys".into();
                return Err(Error::InvalidOption { option, reason });
            }
        }
        let sequences =
            self.sequences.as_ref().map(|all| all.iter().map(|one| one.shard(&keys, &self.options)).collect());
        let band = self.band.shard(keys.start, keys.len(), &self.options);
        let options = match sequences {
            Some(_) => self.options,
            None => shard_options(&self.options, self.band.offset(), keys.start),
        };
        check_distances(&self.options, &band)?;
        let shape = Shape { seq_k: keys.len(), ..self.shape };
        Problem { shape, options, scale: self.scale, band, sequences }.check_pairs()
    }

    /// Whether a range is one of the keys.
    pub(crate) fn check_shard(&self, keys: &Range<usize>) -> Result<()> {
        let (Range { start, end }, seq_k) = (keys.clone(), self.shape.seq_k);
        if start <= end && end <= seq_k { Ok(()) } else { Err(Error::InvalidShard { start, end, seq_k }) }
    }

    /// The same without sink logits, as partial states are computed.
    pub fn without_sink_logits(self) -> Problem {
        let options = self.options.sink_logits(SinkLogits::None);
        Problem { options, ..self }
    }

    /// A merge of partial states of this problem, as a problem whose keys are the states: with the sink logits where it is
    /// the last one.
    pub(crate) fn merging(&self, states: usize, dtype: DType, is_last: bool) -> Result<Problem> {
        if states == 0 {
            return Err(Error::ZeroDimension { dimension: "states" });
        }
        let Options { sink_logits, layout, .. } = self.options;
        let options = Options::new().layout(layout).dtype(dtype);
        let options = if is_last { options.sink_logits(sink_logits) } else { options };
        let shape = Shape { seq_k: states, ..self.shape };
        let rows = shape.batch * shape.heads * shape.seq_q;
        check_countable("states", [states, rows, shape.value_dim, 1])?;
        Ok(Problem { sequences: self.sequences.clone(), ..Problem::checked(shape, options)? })
    }

    /// The same queries beside one key that none of them sees.
    pub(crate) fn with_hidden_key(&self) -> Result<Problem> {
        let Options { sink_logits, layout, dtype, .. } = self.options;
        let options = Options::new().sink_logits(sink_logits).layout(layout).dtype(dtype);
        Problem::checked(Shape { seq_k: 1, ..self.shape }, options.causal(true).query_offset(i64::MIN))
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

    /// Sequences of the batch.
    pub fn sequence_count(&self) -> usize {
        self.sequences.as_ref().map_or(self.shape.batch, |sequences| sequences.len())
    }

    /// Whether sequences may differ in length.
    pub fn has_lengths(&self) -> bool {
        self.sequences.is_some()
    }

    /// A sequence of the batch.
    pub(crate) fn sequence(&self, index: usize) -> Sequence {
        match &self.sequences {
            Some(sequences) => sequences[index],
            None => Sequence::whole(&self.shape, index, self.band),
        }
    }

    /// The sequences of the batch: where each lies, and which keys its queries see.
    pub fn sequences(&self) -> impl ExactSizeIterator<Item = Sequence> + Clone {
        (0..self.sequence_count()).map(|index| self.sequence(index))
    }

    /// The sequences that differ; all others are as one of these.
    pub(crate) fn distinct_sequences(&self) -> impl Iterator<Item = Sequence> {
        let count = if self.has_lengths() { self.sequence_count() } else { 1 };
        (0..count).map(|index| self.sequence(index))
    }

    /// Longest sequence, in queries and keys.
    pub(crate) fn longest(&self) -> [usize; 2] {
        let longest = |of: fn(Sequence) -> usize| self.distinct_sequences().map(of).max().unwrap_or(0);
        [longest(|s| s.q_rows), longest(|s| s.k_rows)]
    }

    /// Keys in reach of a query, at most.
    pub(crate) fn reach(&self) -> usize {
        self.distinct_sequences().map(|sequence| sequence.band.reach()).max().unwrap_or(0)
    }

    /// Whether scores are more than products times the scale.
    pub(crate) fn modifies_scores(&self) -> bool {
        let o = &self.options;
        o.softcap.is_some() || o.alibi || o.bias.is_some()
    }

    /// Shape of the bias, `[B or 1, H or 1, M or 1, N]`; B counts sequences, M and N are those of the longest one.
    pub fn bias_shape(&self) -> Option<[usize; 4]> {
        self.options.bias.map(|axes| axes.of(self.pairs_shape()))
    }

    /// Shape of the mask in bytes, `[B or 1, H or 1, M or 1, N]`; in [bits](MaskPacking::Bits) the last axis is that of words.
    pub fn mask_shape(&self) -> Option<[usize; 4]> {
        let mut shape = self.options.mask?.of(self.pairs_shape());
        if self.options.mask_packing == MaskPacking::Bits {
            shape[3] = shape[3].div_ceil(32);
        }
        Some(shape)
    }

    /// `[B, H, M, N]`, of a bias or a mask without broadcasting.
    pub(crate) fn pairs_shape(&self) -> [usize; 4] {
        let [seq_q, seq_k] = self.longest();
        [self.sequence_count(), self.shape.heads, seq_q, seq_k]
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
    /// multiply-add of both matrix products, over the pairs only that window and causality leave visible.
    pub fn forward_flops(&self) -> f64 {
        let s = &self.shape;
        let pairs: f64 = self.distinct_sequences().map(|sequence| sequence.band.visible_pairs() as f64).sum();
        let times = if self.has_lengths() { s.heads } else { s.batch * s.heads };
        2.0 * pairs * times as f64 * (s.head_dim + s.value_dim) as f64
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
    /// [`Error::WrongElementType`], [`Error::OperandLength`], [`Error::MissingOperand`], [`Error::UnexpectedOperand`],
    /// [`Error::BiasElementType`], [`Error::MaskPacking`].
    pub fn check_inputs<T: Element>(&self, inputs: &Inputs<'_, T>) -> Result<()> {
        if T::DTYPE != self.options.dtype {
            return Err(Error::WrongElementType { operands: T::DTYPE, options: self.options.dtype });
        }
        for (operand, slice, shape) in
            [("q", inputs.q, self.q_shape()), ("k", inputs.k, self.k_shape()), ("v", inputs.v, self.v_shape())]
        {
            check_length(operand, slice.len(), &shape)?;
        }
        let heads = [self.shape.heads];
        self.check_sink_logits(inputs.sink_logits)?;
        let per_head = self.options.alibi.then_some(&heads[..]);
        check_optional("alibi_slopes", inputs.alibi_slopes.map(<[f32]>::len), per_head, "set Options::alibi")?;
        let (bias, mask) = (self.bias_shape(), self.mask_shape());
        let shape = bias.as_ref().map(<[usize; 4]>::as_slice);
        check_optional("bias", inputs.bias.map(|bias| bias.len()), shape, "set Options::bias")?;
        if let Some(bias) = inputs.bias.filter(|bias| bias.dtype() != self.options.bias_dtype) {
            return Err(Error::BiasElementType { bias: bias.dtype(), options: self.options.bias_dtype });
        }
        let shape = mask.as_ref().map(<[usize; 4]>::as_slice);
        check_optional("mask", inputs.mask.map(|mask| mask.len()), shape, "set Options::mask")?;
        match inputs.mask.filter(|mask| mask.packing() != self.options.mask_packing) {
            Some(mask) => Err(Error::MaskPacking { mask: mask.packing(), options: self.options.mask_packing }),
            None => Ok(()),
        }
    }
}

impl Problem {
    /// One sink logit per head, where the options ask for them.
    pub(crate) fn check_sink_logits(&self, sink_logits: Option<&[f32]>) -> Result<()> {
        let heads = [self.shape.heads];
        let per_head = (self.options.sink_logits == SinkLogits::PerHead).then_some(&heads[..]);
        let hint = "set Options::sink_logits to SinkLogits::PerHead";
        check_optional("sink_logits", sink_logits.map(<[f32]>::len), per_head, hint)
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
        if let Some(softcap) = o.softcap {
            write!(f, " softcap={softcap}")?;
        }
        if o.alibi {
            write!(f, " alibi")?;
        }
        for (name, shape) in [("bias", self.bias_shape()), ("mask", self.mask_shape())] {
            if let Some([b, h, m, n]) = shape {
                write!(f, " {name}={b}x{h}x{m}x{n}")?;
            }
        }
        if let Some(sequences) = &self.sequences {
            write!(f, " lengths of {}", sequences.len())?;
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

/// Distances are counted in 32 bits.
fn check_distances(options: &Options, band: &Band) -> Result<()> {
    let (offset, most) = (band.offset(), 2 * MAX_SEQ as i64);
    if !options.alibi || (-most..=most).contains(&offset) {
        return Ok(());
    }
    let reason = format!("{offset}; with ALiBi it must lie within {most} of 0");
    Err(Error::InvalidOption { option: "query_offset", reason })
}

/// Elements must be countable before anything is computed from their number.
fn check_countable(operand: &'static str, factors: [usize; 4]) -> Result<()> {
    let most = (usize::MAX / 8) as u64;
    let elements = factors.iter().try_fold(1u128, |n, &f| n.checked_mul(f as u128));
    if elements.is_none_or(|n| n > u128::from(most)) {
        return Err(Error::IndexOverflow { operand, last_element: elements.unwrap_or(u128::MAX), most });
    }
    Ok(())
}

pub(crate) fn check_length(operand: &'static str, actual: usize, shape: &[usize]) -> Result<()> {
    let expected = shape.iter().product();
    if actual == expected {
        return Ok(());
    }
    Err(Error::OperandLength { operand, expected, actual, shape: shape.to_vec() })
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

/// A bias on the host: f32, or of the operands' element type, see [`Options::bias_dtype`].
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

/// A boolean mask on the host, see [`Options::mask_packing`].
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
}

/// A mask of bytes, whose rows have `keys` of them, in [bits](MaskPacking::Bits). A last row that is shorter is packed as it is.
pub fn pack_mask(mask: &[u8], keys: usize) -> Vec<u32> {
    mask.chunks(keys.max(1)).flat_map(|row| row.chunks(32).map(mask_word)).collect()
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
    /// One slope per query head, where the options say [`Options::alibi`].
    pub alibi_slopes: Option<&'a [f32]>,
    /// Added to the scores, see [`Problem::bias_shape`].
    pub bias: Option<Bias<'a, T>>,
    /// Which keys may be seen, see [`Problem::mask_shape`].
    pub mask: Option<MaskData<'a>>,
}

impl<'a, T> Inputs<'a, T> {
    /// q, k and v, and no operand that goes with an option.
    pub fn new(q: &'a [T], k: &'a [T], v: &'a [T]) -> Self {
        Inputs { q, k, v, sink_logits: None, alibi_slopes: None, bias: None, mask: None }
    }

    /// With sink logits.
    pub fn sink_logits(self, sink_logits: impl Into<Option<&'a [f32]>>) -> Self {
        Inputs { sink_logits: sink_logits.into(), ..self }
    }

    /// With slopes.
    pub fn alibi_slopes(self, alibi_slopes: impl Into<Option<&'a [f32]>>) -> Self {
        Inputs { alibi_slopes: alibi_slopes.into(), ..self }
    }

    /// With a bias.
    pub fn bias(self, bias: impl Into<Option<Bias<'a, T>>>) -> Self {
        Inputs { bias: bias.into(), ..self }
    }

    /// With a mask.
    pub fn mask(self, mask: impl Into<Option<MaskData<'a>>>) -> Self {
        Inputs { mask: mask.into(), ..self }
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
    /// Gradient by the ALiBi slopes, `[heads]`, where the options say [`Options::alibi`].
    pub d_alibi_slopes: Option<Vec<S>>,
    /// Gradient by the bias, see [`Problem::bias_shape`], where there is one: summed over the axes that it does not have of its
    /// own.
    pub d_bias: Option<Vec<S>>,
}
