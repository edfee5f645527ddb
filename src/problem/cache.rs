//! The configuration of a cache: where its rows lie, how keys are rotated, and its sizes.

use crate::problem::element::DType;
use crate::problem::error::{Error, Result};
use crate::problem::row_format::{Addressing, Bounds, Quantisation, RowFormat, UNBOUNDED};
use crate::problem::{Alignment, MAX_WIDTH, Options, Window};

/// Where the keys and values of a cache lie, and when it gives them up.
///
/// ```
/// use sink_attention::cache::{CacheConfig, CacheKind};
/// use sink_attention::DType;
///
/// // 16 sequences of up to 4096 tokens, 8 heads of 64 in f16: bytes of the keys.
/// let bytes = |kind| CacheConfig::new(kind, 16, 8, 64).dtype(DType::F16).bytes()[0];
/// let row = 8 * 64 * 2;
/// assert_eq!(bytes(CacheKind::Contiguous { capacity: 4096 }), 16 * 4096 * row);
/// // Pages for half as many tokens do where sequences are shorter, or share what they begin with.
/// assert_eq!(bytes(CacheKind::Paged { page_size: 16, pages: 2048, sequence_pages: 256 }), 2048 * 16 * row);
/// // A window with its sink tokens does for sequences without end.
/// assert_eq!(bytes(CacheKind::Rolling { sink_tokens: 4, window: 1020, queries: 1 }), 16 * 1024 * row);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CacheKind {
    /// Each sequence has rows of its own, `[sequences, G, capacity, width]`.
    Contiguous {
        /// Tokens of a sequence at most.
        capacity: usize,
    },
    /// Sequences take pages as they grow, `[pages, G, page_size, width]`; [`KvCache::fork`](crate::cache::KvCache::fork) lets them share what they have in
    /// common.
    Paged {
        /// Tokens of a page, a power of two from 16 up.
        page_size: usize,
        /// Pages of all sequences.
        pages: usize,
        /// Pages of one sequence at most.
        sequence_pages: usize,
    },
    /// The first tokens of each sequence and a window of the last ones (StreamingLLM), `[sequences, G, rows, width]` with the
    /// window as a ring: a new token takes the place of the oldest, nothing is moved.
    Rolling {
        /// First tokens that are kept for ever.
        sink_tokens: usize,
        /// Last tokens that a query sees, its own included.
        window: usize,
        /// Queries of a decoding step at most. The ring has `window + queries - 1` rows, so that the first of them finds its
        /// window whole, and as many tokens as `queries - 1` can be taken back by [`KvCache::truncate`](crate::cache::KvCache::truncate).
        queries: usize,
    },
}

impl CacheKind {
    /// Rows of a block: of a page, or of a sequence.
    pub(crate) fn rows(&self) -> usize {
        match *self {
            CacheKind::Contiguous { capacity } => capacity,
            CacheKind::Paged { page_size, .. } => page_size,
            // Before they are checked the numbers may be any.
            CacheKind::Rolling { sink_tokens, window, queries } => {
                sink_tokens.saturating_add(window).saturating_add(queries).saturating_sub(1)
            }
        }
    }
}

/// Which features of a head are rotated together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RotaryStyle {
    /// i and i + dim / 2 (GPT-NeoX, Llama and GPT-OSS in Hugging Face's layout).
    HalfSplit,
    /// 2 i and 2 i + 1 (GPT-J, Llama in Meta's layout).
    Interleaved,
}

/// Which position a token is rotated by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RotaryPositions {
    /// Its place in the sequence, when it is appended.
    Absolute,
    /// Its place in the cache, whenever it is read (StreamingLLM): a rolling cache keeps keys unrotated, and positions never grow
    /// beyond it. One query at a time: of several tokens that are appended together the query of the last one can be decoded,
    /// see [`AppendBuffers::q`](crate::cache::AppendBuffers::q).
    CacheRelative,
}

/// Rotary position embedding of q and k: x_i cos - y_i sin, y_i cos + x_i sin for each pair (x_i, y_i) of features. Angles come as
/// a table of the caller's, so that any scheme of frequencies (YaRN and others) works.
///
/// ```
/// use sink_attention::cache::{CacheConfig, CacheKind, Rotary, RotaryPositions, RotaryStyle};
/// use sink_attention::cpu::KvCache;
///
/// // The first two of three features turn.
/// let rotary = Rotary { dim: 2, style: RotaryStyle::HalfSplit, positions: RotaryPositions::Absolute };
/// let config = CacheConfig::new(CacheKind::Contiguous { capacity: 2 }, 1, 1, 3).rotary(rotary);
/// let mut cache = KvCache::new(&config)?;
/// let cos_sin = [1.0, 0.0, 0.0, 1.0]; // position 0 does not turn, position 1 turns by a right angle
/// let mut q = [1.0f32, 0.0, 5.0, 1.0, 0.0, 5.0]; // of two tokens
/// cache.append(&[2], &[0.0; 6], &[0.0; 6], Some(&mut q), Some(&cos_sin))?;
/// assert_eq!(q, [1.0, 0.0, 5.0, 0.0, 1.0, 5.0]);
/// # Ok::<(), sink_attention::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Rotary {
    /// Features that are rotated, the first ones of a head; even, at most D.
    pub dim: u32,
    /// Which of them are paired.
    pub style: RotaryStyle,
    /// How positions are counted.
    pub positions: RotaryPositions,
}

/// A cache: its kind and its sizes.
///
/// ```
/// use sink_attention::cache::{CacheConfig, CacheKind};
/// use sink_attention::DType;
///
/// // 8 sequences, 4 key/value heads, keys and values 64 wide.
/// let kind = CacheKind::Rolling { sink_tokens: 4, window: 1024, queries: 1 };
/// let config = CacheConfig::new(kind, 8, 4, 64).dtype(DType::F16);
/// config.check()?;
/// # Ok::<(), sink_attention::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct CacheConfig {
    /// Where keys and values lie.
    pub kind: CacheKind,
    /// Sequences it has room for.
    pub sequences: usize,
    /// G, key/value heads.
    pub kv_heads: usize,
    /// D, width of keys, 1 to 512.
    pub head_dim: usize,
    /// E, width of values, 1 to 512.
    pub value_dim: usize,
    /// Element type of keys and values, and of the tokens and queries that come to them.
    pub dtype: DType,
    /// Rotary embedding of k as it is appended or read, and of q.
    pub rotary: Option<Rotary>,
    /// Keys and values are held in fewer bits than `dtype` has.
    pub quantisation: Option<Quantisation>,
}

/// Most rows of all blocks, so that shaders count vectors in 32 bits.
const MOST_ROWS: u64 = 1 << 31;

impl CacheConfig {
    /// A cache of f32 with values as wide as keys, without a rotary embedding.
    pub fn new(kind: CacheKind, sequences: usize, kv_heads: usize, head_dim: usize) -> Self {
        CacheConfig {
            kind,
            sequences,
            kv_heads,
            head_dim,
            value_dim: head_dim,
            dtype: DType::F32,
            rotary: None,
            quantisation: None,
        }
    }

    /// Sets [`CacheConfig::kind`].
    pub fn kind(self, kind: CacheKind) -> Self {
        CacheConfig { kind, ..self }
    }

    /// Sets [`CacheConfig::sequences`].
    pub fn sequences(self, sequences: usize) -> Self {
        CacheConfig { sequences, ..self }
    }

    /// Sets [`CacheConfig::kv_heads`].
    pub fn kv_heads(self, kv_heads: usize) -> Self {
        CacheConfig { kv_heads, ..self }
    }

    /// Sets [`CacheConfig::head_dim`] alone.
    pub fn head_dim(self, head_dim: usize) -> Self {
        CacheConfig { head_dim, ..self }
    }

    /// Sets [`CacheConfig::value_dim`].
    pub fn value_dim(self, value_dim: usize) -> Self {
        CacheConfig { value_dim, ..self }
    }

    /// Sets [`CacheConfig::dtype`].
    pub fn dtype(self, dtype: DType) -> Self {
        CacheConfig { dtype, ..self }
    }

    /// Sets [`CacheConfig::rotary`].
    pub fn rotary(self, rotary: impl Into<Option<Rotary>>) -> Self {
        CacheConfig { rotary: rotary.into(), ..self }
    }

    /// Sets [`CacheConfig::quantisation`].
    pub fn quantisation(self, quantisation: impl Into<Option<Quantisation>>) -> Self {
        CacheConfig { quantisation: quantisation.into(), ..self }
    }

    /// Keys that a sequence can have at a time.
    pub(crate) fn most_keys(&self) -> usize {
        match self.kind {
            CacheKind::Paged { page_size, sequence_pages, .. } => page_size * sequence_pages,
            kind => kind.rows(),
        }
    }

    /// Blocks of rows.
    pub(crate) fn blocks(&self) -> usize {
        match self.kind {
            CacheKind::Paged { pages, .. } => pages,
            _ => self.sequences,
        }
    }

    pub(crate) fn format(&self) -> RowFormat {
        RowFormat { dtype: self.dtype, quantisation: self.quantisation }
    }

    /// Vectors of 16 bytes of a row of keys and of one of values.
    pub(crate) fn row_vectors(&self) -> [u32; 2] {
        [self.head_dim, self.value_dim].map(|width| self.format().row_vectors(width))
    }

    pub(crate) fn addressing(&self) -> Addressing {
        match self.kind {
            CacheKind::Contiguous { .. } => Addressing::Contiguous,
            CacheKind::Paged { .. } => Addressing::Paged,
            CacheKind::Rolling { .. } => Addressing::Rolling,
        }
    }

    /// Whether keys are rotated as they are read.
    pub(crate) fn is_relative(&self) -> bool {
        self.rotary.is_some_and(|rotary| rotary.positions == RotaryPositions::CacheRelative)
    }

    /// Bytes of the keys and of the values; of numbers that [`check`](Self::check) refuses, any.
    pub fn bytes(&self) -> [u64; 2] {
        self.row_vectors().map(|vectors| {
            let factors = [self.blocks(), self.kv_heads, self.kind.rows(), 16].map(|n| n as u64);
            factors.into_iter().fold(vectors.into(), u64::saturating_mul)
        })
    }

    /// Checks the numbers.
    ///
    /// # Errors
    /// [`Error::ZeroDimension`], [`Error::DimensionTooLarge`], [`Error::InvalidOption`].
    pub fn check(&self) -> Result<()> {
        let most = 1 << 29;
        let of_kind = match self.kind {
            CacheKind::Contiguous { capacity } => vec![("capacity", capacity, most)],
            CacheKind::Paged { page_size, pages, sequence_pages } => {
                if page_size < 16 || !page_size.is_power_of_two() {
                    let reason = format!("{page_size}; it must be a power of two from 16 up");
                    return Err(Error::InvalidOption { option: "page_size", reason });
                }
                let pages_most = most / page_size.min(most);
                vec![
                    ("page_size", page_size, most),
                    ("pages", pages, u32::MAX as usize >> 1),
                    ("sequence_pages", sequence_pages, pages_most),
                ]
            }
            CacheKind::Rolling { sink_tokens, window, queries } => {
                if sink_tokens > most {
                    let (value, most) = (sink_tokens as u64, most as u64);
                    return Err(Error::DimensionTooLarge { dimension: "sink_tokens", value, most });
                }
                vec![("window", window, most), ("queries", queries, MOST_QUERIES)]
            }
        };
        let sizes = [
            ("sequences", self.sequences, 1 << 20),
            ("kv_heads", self.kv_heads, 65535),
            ("head_dim", self.head_dim, MAX_WIDTH),
            ("value_dim", self.value_dim, MAX_WIDTH),
        ];
        for (dimension, value, most) in of_kind.into_iter().chain(sizes) {
            if value == 0 {
                return Err(Error::ZeroDimension { dimension });
            }
            if value > most {
                return Err(Error::DimensionTooLarge { dimension, value: value as u64, most: most as u64 });
            }
        }
        let rows = self.blocks() as u128 * self.kv_heads as u128 * self.kind.rows() as u128;
        let vectors = self.row_vectors().into_iter().max().unwrap_or(1);
        // Halves are written in quads of 8 bytes, quantised numbers in quads of 4.
        let quads = if self.quantisation.is_some() { 4 } else { 2 };
        if rows * u128::from(quads * vectors) > u128::from(MOST_ROWS) {
            let (operand, last_element) = ("cache", rows * u128::from(quads * vectors) - 1);
            return Err(Error::IndexOverflow { operand, last_element, most: MOST_ROWS - 1 });
        }
        self.check_rotary()
    }

    fn check_rotary(&self) -> Result<()> {
        let Some(Rotary { dim, style, positions }) = self.rotary else { return Ok(()) };
        let invalid = |reason: String| Err(Error::InvalidOption { option: "rotary", reason });
        if dim == 0 || dim % 2 == 1 || dim as usize > self.head_dim {
            return invalid(format!("{dim} features of {}; it must be an even number from 2 to D", self.head_dim));
        }
        if positions == RotaryPositions::CacheRelative {
            match self.kind {
                CacheKind::Rolling { queries: 1, .. } => {}
                CacheKind::Rolling { queries, .. } => {
                    return invalid(format!("cache-relative positions take one query at a time, not {queries}"));
                }
                kind => {
                    return invalid(format!("cache-relative positions are those of a rolling cache, not of {kind:?}"));
                }
            }
            if self.quantisation.is_some() {
                return invalid("quantised keys are rotated as they are appended, by absolute positions".into());
            }
            let pairs = self.format().elements();
            if style == RotaryStyle::HalfSplit && !(dim / 2).is_multiple_of(pairs) {
                let reason = format!(
                    "{dim} features; halves that are rotated as they are read hold a multiple of {pairs} in {}",
                    self.dtype
                );
                return invalid(reason);
            }
        }
        Ok(())
    }

    /// Checks that a token's key may move to another place of its sequence.
    pub(crate) fn check_keep(&self, numbers: &[usize]) -> Result<()> {
        let moved = numbers.iter().enumerate().find(|(to, from)| to != *from);
        match moved.filter(|_| self.rotary.is_some() && !self.is_relative()) {
            Some((to, from)) => {
                let reason = format!(
                    "keys are rotated by their places as they are appended, so token {from} cannot become token {to}"
                );
                Err(Error::InvalidOption { option: "rotary", reason })
            }
            None => Ok(()),
        }
    }

    /// The bounds of the keys that queries of a decoding step see.
    pub(crate) fn bounds(&self, queries: usize, options: &Options) -> Result<Bounds> {
        let reason = "decoding from a cache does not take it; Decode::tree_mask is a mask among new tokens";
        check_absent(&options.alibi(false), reason)?;
        if let CacheKind::Rolling { queries: most, .. } = self.kind
            && queries > most
        {
            let reason = format!("{queries}; the rolling cache was made for {most} at most");
            return Err(Error::InvalidOption { option: "queries", reason });
        }
        // `check_absent` refuses bias and mask; the plan and the parameters of a step take the others.
        let Options {
            causal,
            window,
            sink_tokens,
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
        } = self.seen(options)?;
        let right = if causal { Some(0) } else { window.right };
        let bound = |bound: Option<usize>| bound.map_or(UNBOUNDED, |bound| bound.min(UNBOUNDED as usize) as i32);
        let sink_tokens = sink_tokens.min(UNBOUNDED as usize) as u32;
        Ok(Bounds { left: bound(window.left), right: bound(right), sink_tokens })
    }

    /// Options of queries of the last tokens, with the window and the sink tokens that a rolling cache implies.
    pub(crate) fn seen(&self, options: &Options) -> Result<Options> {
        let invalid = |option, reason: String| Err(Error::InvalidOption { option, reason });
        if options.query_offset.is_some() || options.alignment != Alignment::BottomRight {
            return invalid("alignment", "queries of a cache are those of its last tokens, bottom-right".into());
        }
        let CacheKind::Rolling { sink_tokens, window, .. } = self.kind else { return Ok(*options) };
        match options.window.left {
            None => {
                let window = Window { left: Some(window - 1), ..options.window };
                Ok(Options { window, sink_tokens, ..*options })
            }
            Some(left) if left > window - 1 => {
                invalid("window", format!("{left} keys to the left; the rolling cache keeps {}", window - 1))
            }
            Some(_) if options.sink_tokens > sink_tokens => {
                invalid("sink_tokens", format!("{}; the rolling cache keeps {sink_tokens}", options.sink_tokens))
            }
            Some(_) => Ok(*options),
        }
    }
}

/// Refuses what counts keys by places that a cache does not tell.
pub(crate) fn check_absent(options: &Options, reason: &str) -> Result<()> {
    // A new option is refused here, or every cache honours it.
    let Options {
        causal: _,
        window: _,
        sink_tokens: _,
        sink_logits: _,
        scale: _,
        softcap: _,
        alibi,
        bias,
        bias_dtype: _,
        mask,
        mask_packing: _,
        alignment: _,
        query_offset: _,
        layout: _,
        dtype: _,
    } = *options;
    let given = [("alibi", alibi), ("bias", bias.is_some()), ("mask", mask.is_some())];
    match given.into_iter().find(|(_, given)| *given) {
        Some((option, _)) => Err(Error::InvalidOption { option, reason: reason.into() }),
        None => Ok(()),
    }
}

/// Queries of a decoding step at most.
pub(crate) const MOST_QUERIES: usize = 16;
