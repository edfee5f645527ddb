//! Sizes, and problems: sizes with options, checked.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use crate::problem::element::DType;
use crate::problem::error::{Error, Result};
use crate::problem::mask::{Band, shard_options};
use crate::problem::options::{Alignment, Layout, MaskPacking, Options, SinkLogits, Window};
use crate::problem::sizes::Shape;
use crate::problem::varlen::{self, Lengths, Sequence};

/// Longest sequence, so that sums of positions fit 32-bit integers in shaders.
pub(crate) const MAX_SEQ: usize = 1 << 29;
/// Widest head, of q and k as of v.
pub(crate) const MAX_WIDTH: usize = 512;

/// A validated shape with its options.
///
/// ```
/// use sink_attention::{Error, Options, Problem, Shape};
///
/// let shape = Shape { batch: 2, heads: 8, kv_heads: 2, seq_q: 1, seq_k: 100, head_dim: 64, value_dim: 32 };
/// let problem = Problem::new(shape, Options::new())?;
/// assert_eq!(problem.k_shape(), [2, 100, 2, 64]); // [batch, seq, heads, width]
/// assert_eq!((problem.o_shape(), problem.lse_shape()), ([2, 1, 8, 32], [2, 8, 1]));
/// assert_eq!(problem.scale(), 0.125); // 1 / sqrt(64)
///
/// let error = Problem::new(Shape { heads: 7, ..shape }, Options::new()).unwrap_err();
/// assert!(matches!(error, Error::HeadsNotMultiple { .. })); // 7 query heads cannot share 2 key heads
/// # Ok::<(), sink_attention::Error>(())
/// ```
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
        let sequences = Some(varlen::sequences(&shape, &options, lengths)?);
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

    /// Most keys that a query sees.
    pub(crate) fn most_visible(&self) -> usize {
        self.distinct_sequences().map(|sequence| sequence.band.most_visible()).max().unwrap_or(0)
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
    pub fn heads_per_kv(&self) -> usize {
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
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let o = &self.options;
        write!(f, "{} {}", self.shape, o.layout)?;
        if o.dtype != DType::default() {
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
    let expected = shape.iter().fold(1usize, |product, axis| product.saturating_mul(*axis));
    if actual == expected {
        return Ok(());
    }
    Err(Error::OperandLength { operand, expected, actual, shape: shape.to_vec() })
}
