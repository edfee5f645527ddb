//! Decisions of a decoding step: the micro-kernel, the tiles, the splits of the keys.

use crate::device::capabilities::Capabilities;
use crate::kernel::cache::CacheOptions;
use crate::kernel::tile::decode::DecodeTiles;
use crate::kernel::{Binding, DECODE_PASS, MicroKernel, Precision, Variant};
use crate::plan::Plan;
use crate::plan::pass::{Pass, TilesOrigin, check_limits, fold};
use crate::plan::select::{self, Gain};
use crate::plan::splits::{DecodeTiling, Split, splits};
use crate::problem::cache::{CacheConfig, CacheKind, MOST_QUERIES};
use crate::problem::error::{Error, Result};
use crate::problem::row_format::Bounds;
use crate::problem::tree::TreeMask;
use crate::problem::{Options, Problem, Shape, check_length};

/// The computation of a decoding step.
///
/// ```
/// use sink_attention::Options;
/// use sink_attention::cache::{CacheConfig, CacheKind, Decode, DecodeOperands};
/// use sink_attention::cpu::KvCache;
///
/// let mut cache = KvCache::new(&CacheConfig::new(CacheKind::Contiguous { capacity: 8 }, 2, 1, 1))?;
/// cache.append(&[0, 3], &[1.0f32; 3], &[1.0, 2.0, 6.0], None, None)?;
/// // The queries of the last two tokens of the second sequence, as speculative decoding checks them.
/// let decode = Decode::new(1, Options::new().causal(true)).queries(2).sequences([1]);
/// let output = cache.decode(&decode, &[0.0; 2], &DecodeOperands::default())?;
/// assert_eq!(output.o, [1.5, 3.0]); // scores of zero: means of the values so far
/// # Ok::<(), sink_attention::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Decode {
    /// H, query heads.
    pub heads: usize,
    /// M, queries of each sequence, 1 to 16: those of its last tokens, which have been appended.
    pub queries: usize,
    /// The sequences, a batch in this order; `None` is all of the cache.
    pub sequences: Option<Vec<usize>>,
    /// Window, sink tokens, sink logits, scale, softcap and ALiBi as in a forward pass. Several queries see each other's keys unless
    /// they are causal. `layout` and `dtype` are those of q and o, `dtype` the cache's. A rolling cache implies its window and sink
    /// tokens. Positions count from the start of a sequence, also in a rolling cache; where keys are rotated as they are read, by
    /// other positions, ALiBi is an error.
    pub options: Options,
    /// A mask among the M new tokens; an operand goes with it. It is an error in a cache with a rotary embedding, whose appends rotate
    /// tokens by their places: the caller rotates the tokens of a tree, by their [positions](TreeMask).
    pub tree_mask: Option<TreeMask>,
    /// How the kernel divides its work; `None` leaves that to the planner.
    pub tiling: Option<DecodeTiling>,
    /// The caller has rotated q. Otherwise, if the cache has a rotary embedding, the appends must have rotated the queries of the last
    /// tokens, of as many heads ([`AppendBuffers::q`](crate::cache::AppendBuffers::q)). If they have not, decoding is an error.
    pub q_rotated: bool,
}

setters! {
    impl[] Decode[]
    plain {
        heads: usize,
        queries: usize,
        options: Options,
        q_rotated: bool,
    }
    optional {
        tree_mask: TreeMask,
        tiling: DecodeTiling,
    }
}

impl Decode {
    /// One query of each sequence.
    pub fn new(heads: usize, options: Options) -> Self {
        Decode { heads, queries: 1, sequences: None, options, tree_mask: None, tiling: None, q_rotated: false }
    }

    /// Sets [`Decode::sequences`].
    pub fn sequences(self, sequences: impl Into<Vec<usize>>) -> Self {
        Decode { sequences: Some(sequences.into()), ..self }
    }

    /// The heads whose queries appends must have rotated, if any.
    pub(crate) fn rotated_heads(&self, config: &CacheConfig) -> Option<usize> {
        config.rotary.filter(|_| !self.q_rotated).map(|_| self.heads)
    }

    /// The sequences of the batch, after a check.
    pub(crate) fn entries(&self, config: &CacheConfig) -> Result<Vec<usize>> {
        let Some(entries) = &self.sequences else { return Ok((0..config.sequences).collect()) };
        match entries.iter().find(|sequence| **sequence >= config.sequences) {
            Some(&sequence) => Err(Error::SequenceOutOfRange { sequence, sequences: config.sequences }),
            None => Ok(entries.clone()),
        }
    }

    /// Whether each row has keys of its own that it does not see.
    pub(crate) fn several(&self) -> bool {
        self.queries > 1 || self.tree_mask.is_some()
    }

    /// Checks that the positions of tokens are those of the options.
    fn check_positions(&self, config: &CacheConfig) -> Result<()> {
        let invalid = |option, reason: &str| Err(Error::InvalidOption { option, reason: reason.into() });
        if self.options.alibi && config.is_relative() {
            let reason = "this cache rotates keys by their places as they are read, and ALiBi counts from the start of a sequence";
            return invalid("alibi", reason);
        }
        if self.tree_mask.is_some() && config.rotary.is_some() {
            let reason = "appends to this cache rotate new tokens by their places, not by their depths in a tree: rotate q and k \
                          beforehand, and leave CacheConfig::rotary out";
            return invalid("tree_mask", reason);
        }
        Ok(())
    }

    /// Checks that the words of a tree mask are there if they are wanted, `[M]` or `[B, M]`.
    pub(crate) fn check_tree_mask(&self, sequences: usize, words: Option<usize>) -> Result<()> {
        let operand = "tree_mask";
        match (self.tree_mask, words) {
            (Some(mask), Some(words)) => check_length(operand, words, &mask.shape(sequences, self.queries)),
            (Some(_), None) => Err(Error::MissingOperand { operand }),
            (None, Some(_)) => Err(Error::UnexpectedOperand { operand, hint: "set Decode::tree_mask" }),
            (None, None) => Ok(()),
        }
    }

    /// The step as a forward pass over as many keys as there can be, which checks options and sizes.
    pub(crate) fn problem(&self, config: &CacheConfig) -> Result<(Problem, Bounds)> {
        if self.options.dtype != config.dtype {
            return Err(Error::CacheElementType { operands: self.options.dtype, cache: config.dtype });
        }
        if self.queries > MOST_QUERIES {
            let (value, most) = (self.queries as u64, MOST_QUERIES as u64);
            return Err(Error::DimensionTooLarge { dimension: "queries", value, most });
        }
        let bounds = config.bounds(self.queries, &self.options)?;
        self.check_positions(config)?;
        let shape = Shape {
            batch: self.sequences.as_ref().map_or(config.sequences, Vec::len),
            heads: self.heads,
            kv_heads: config.kv_heads,
            seq_q: self.queries,
            seq_k: config.most_keys(),
            head_dim: config.head_dim,
            value_dim: config.value_dim,
        };
        Ok((Problem::new(shape, self.options)?, bounds))
    }
}

/// The operands of a decoding step in host memory that go with options.
///
/// ```
/// use sink_attention::Options;
/// use sink_attention::cache::{CacheConfig, CacheKind, Decode, DecodeOperands};
/// use sink_attention::cpu::KvCache;
///
/// let mut cache = KvCache::new(&CacheConfig::new(CacheKind::Contiguous { capacity: 8 }, 1, 1, 1))?;
/// cache.append(&[2], &[0.0f32; 2], &[9.0, 5.0], None, None)?;
/// // A key one token back weighs a third of the query's own.
/// let slopes = [3f32.ln()];
/// let operands = DecodeOperands::default().alibi_slopes(&slopes[..]);
/// let output = cache.decode(&Decode::new(1, Options::new().alibi(true)), &[0.0], &operands)?;
/// assert!((output.o[0] - 6.0).abs() < 1e-5); // (9 / 3 + 5) / (1 / 3 + 1)
/// # Ok::<(), sink_attention::Error>(())
/// ```
#[derive(Debug, Clone, Copy, Default)]
#[non_exhaustive]
pub struct DecodeOperands<'a> {
    /// One logit per query head, where the options say [`SinkLogits::PerHead`](crate::SinkLogits::PerHead).
    pub sink_logits: Option<&'a [f32]>,
    /// One slope per query head, where the options say [`Options::alibi`].
    pub alibi_slopes: Option<&'a [f32]>,
    /// The words of [`Decode::tree_mask`], `[M]` or `[B, M]`.
    pub tree_mask: Option<&'a [u32]>,
    /// The table of [`AppendBuffers::cos_sin`](crate::cache::AppendBuffers::cos_sin), where keys are rotated as they are read.
    pub cos_sin: Option<&'a [f32]>,
}

setters! {
    impl['a] DecodeOperands['a]
    optional {
        sink_logits: &'a [f32],
        alibi_slopes: &'a [f32],
        tree_mask: &'a [u32],
        cos_sin: &'a [f32],
    }
}

/// The way a decoding step will be computed on a device.
#[derive(Debug, Clone)]
pub(crate) struct DecodePlan {
    /// The step as a forward pass over as many keys as there can be.
    pub(crate) problem: Problem,
    pub(crate) bounds: Bounds,
    pub(crate) tiling: DecodeTiling,
    pub(crate) split: Split,
    /// Keys of a tile.
    pub(crate) tile: u32,
    /// Tiles of the rows of a group.
    pub(crate) row_tiles: u32,
    /// Key heads of all sequences, folded into two dimensions of a grid.
    pub(crate) groups: [u32; 2],
    pub(crate) passes: Vec<Pass>,
}

impl DecodePlan {
    /// Plans a step. `vec4` says of an operand whether its rows can be read four neighbours at a time. `row_max` says whether the largest
    /// score of each row is a result.
    pub(crate) fn new(
        config: &CacheConfig,
        decode: &Decode,
        micro_kernel: MicroKernel,
        vec4: impl Fn(Binding) -> bool,
        row_max: bool,
        capabilities: &Capabilities,
    ) -> Result<Self> {
        let (problem, bounds) = decode.problem(config)?;
        let (s, options) = (problem.shape(), problem.options());
        let rows = problem.heads_per_kv() * s.seq_q;
        let group_count = s.batch * config.kv_heads;
        let tiling = match decode.tiling {
            Some(tiling) => tiling,
            None => choose(config, decode, &problem, micro_kernel, capabilities)?,
        };
        // The tiles are checked before anything is computed from their numbers.
        tiling.check(config, decode.several(), capabilities)?;
        let matrices = capabilities.cooperative;
        let tile = tiling.tiles.keys(matrices);
        let all = CacheOptions {
            rotary: config.rotary.filter(|_| config.is_relative()),
            indexed: decode.sequences.is_some(),
            several: decode.several(),
            tree: decode.tree_mask.is_some(),
            softcap: options.softcap.is_some(),
            alibi: options.alibi,
            sink_logits: options.sink_logits,
            row_max,
            tiles: Some(tiling.tiles),
            tile,
            matrices,
            ..CacheOptions::new(config, true)
        };
        let variants: Vec<Variant> = DECODE_PASS
            .iter()
            .map(|kernel| {
                let (reads, writes) = (kernel.spec().reads, kernel.spec().writes);
                let vec4 = reads.iter().chain(writes).all(|binding| !binding.has_width() || vec4(*binding));
                Variant::of_cache(*kernel, CacheOptions { vec4, ..all })
            })
            .collect();
        for variant in &variants {
            let unfit = |reason| Error::NoKernel { problem: format!("decoding with {tiling}"), reason };
            check_limits(variant, capabilities).map_err(unfit)?;
        }

        let row_tiles = rows.div_ceil(tiling.tiles.rows() as usize);
        let total_rows = s.batch as u128 * s.heads as u128 * s.seq_q as u128;
        let row_bytes = 16 * partial_vectors(&problem) as u128 * total_rows;
        let fitting = u128::from(capabilities.binding_bytes.min(capabilities.buffer_bytes)) / row_bytes;
        let by_grid = u128::from(capabilities.grid_dimension.min(65535));
        if row_tiles as u128 > by_grid {
            return Err(Error::TooManyWorkgroups { workgroups: row_tiles as u128, most: by_grid as u64 });
        }
        let fitting = fitting.min(by_grid / row_tiles as u128) as u32;
        if fitting == 0 {
            let (operand, bytes) = ("partial results", row_bytes.min(u64::MAX.into()) as u64);
            return Err(Error::BindingTooLarge { operand, bytes, limit: capabilities.binding_bytes });
        }
        let split = tiling.split(config, tile, capabilities, fitting);
        let (_, groups) = fold(group_count as u128, capabilities.grid_dimension)?;
        let (_, rows_grid) = fold(total_rows, capabilities.grid_dimension)?;
        let longest = splits(s.seq_k, s.seq_q, &bounds, tile, &split) * row_tiles as u32;
        let tiles_origin = if decode.tiling.is_some() { TilesOrigin::Caller } else { TilesOrigin::BuiltIn };
        let pass = |variant: Variant| {
            let (workgroups, grid) = match variant.decode_tiles() {
                Some(_) => (u64::from(longest) * group_count as u64, [longest, groups[0], groups[1]]),
                None => (total_rows as u64, [rows_grid[0], rows_grid[1], 1]),
            };
            Pass { variant, workgroups, grid, tiles_origin }
        };
        let passes = variants.into_iter().map(pass).collect();
        Ok(DecodePlan { problem, bounds, tiling, split, tile, row_tiles: row_tiles as u32, groups, passes })
    }

    /// Splits of the keys of a sequence that holds `keys` keys.
    pub(crate) fn splits(&self, keys: usize) -> u32 {
        splits(keys, self.problem.shape().seq_q, &self.bounds, self.tile, &self.split)
    }

    /// Vectors of four f32 that the splits leave for all rows.
    pub(crate) fn partials(&self) -> usize {
        let s = self.problem.shape();
        partial_vectors(&self.problem) * s.batch * s.heads * s.seq_q * self.split.most as usize
    }
}

impl Plan {
    /// Plans a decoding step of a cache whose sequences are full, with densely packed operands and without row_max.
    ///
    /// # Errors
    /// Those of [`KvCache::prepare_decode`](crate::cache::KvCache::prepare_decode) that do not depend on buffers.
    pub fn decode(
        config: &CacheConfig,
        decode: &Decode,
        capabilities: &Capabilities,
        micro_kernel: MicroKernel,
    ) -> Result<Self> {
        config.check()?;
        decode.entries(config)?;
        let widths = [config.head_dim, config.value_dim].map(|width| width as u32);
        let vec4 = |binding: Binding| binding.width(widths).is_none_or(|width| width.is_multiple_of(4));
        let plan = DecodePlan::new(config, decode, micro_kernel, vec4, false, capabilities)?;
        Ok(Plan { passes: plan.passes })
    }
}

/// Vectors of four f32 that a split leaves for a row: its part of o, its maximum and its sum.
fn partial_vectors(problem: &Problem) -> usize {
    problem.shape().value_dim.div_ceil(4) + 1
}

/// The built-in tiles.
fn choose(
    config: &CacheConfig,
    decode: &Decode,
    problem: &Problem,
    micro_kernel: MicroKernel,
    capabilities: &Capabilities,
) -> Result<DecodeTiling> {
    let s = problem.shape();
    let rows = problem.heads_per_kv() * s.seq_q;
    let groups = s.batch * config.kv_heads;
    let cooperative = || DecodeTiling::cooperative(config, rows, groups, decode.several(), capabilities);
    let portable = || DecodeTiling::portable(config, rows, groups, capabilities);
    let fragments = || match capabilities.spirv {
        Some(_) => DecodeTiling::fragments(config, rows, groups, capabilities),
        None => Err("the device takes kernels as WGSL alone, which has no arithmetic on elements".into()),
    };
    // A wide row that one head reads alone is faster without matrices than with scores in workgroup memory, and has not been measured with scores
    // in registers (H200, benches/results/2026-11-20-h200-decode.md).
    let is_slow = rows == 1 && s.head_dim.max(s.value_dim) > 64;
    let mut lacks = None;
    for wanted in select::micro_kernels(micro_kernel, Precision::Full, None, Gain::Elements, capabilities) {
        let found = match wanted {
            MicroKernel::Auto | MicroKernel::Portable => Ok(portable()),
            _ if micro_kernel == MicroKernel::Auto && is_slow => continue,
            MicroKernel::Cooperative => cooperative(),
            // Where decoding has no kernel on elements, it has one on matrices.
            MicroKernel::Fragments if micro_kernel == MicroKernel::Fragments => {
                fragments().or_else(|reason| cooperative().map_err(|_| reason))
            }
            MicroKernel::Fragments => fragments(),
        };
        match found {
            Ok(tiling) => return Ok(tiling),
            Err(reason) => lacks = Some(reason),
        }
    }
    let reason = lacks.unwrap_or_default();
    Err(Error::NoKernel { problem: "decoding on cooperative matrices".into(), reason })
}

impl DecodeTiling {
    /// Checks that the tiles fit a cache.
    fn check(&self, config: &CacheConfig, several: bool, capabilities: &Capabilities) -> Result<()> {
        let unfit = |reason: String| Err(Error::NoKernel { problem: format!("decoding with {self}"), reason });
        let (matrices, splits) = (capabilities.cooperative, self.splits);
        let (threads, lanes, rows, steps, exchanged) = match self.tiles {
            DecodeTiles::Portable { threads, lanes, rows, steps, exchanged } => {
                (threads, lanes, rows, steps, exchanged)
            }
            DecodeTiles::Cooperative { .. } | DecodeTiles::Fragments { .. } => {
                if matches!(self.tiles, DecodeTiles::Fragments { .. }) && capabilities.spirv.is_none() {
                    return unfit("the device takes kernels as WGSL alone, which has no arithmetic on elements".into());
                }
                return match self.tiles.lacks(config, several, matrices) {
                    Some(reason) => unfit(reason),
                    None if splits == 0 => unfit("splits are at least 1".into()),
                    None => self.check_page(config, capabilities),
                };
            }
        };
        if ![4, 8, 16, 32].contains(&lanes) || !(lanes..=1024).contains(&threads) || !threads.is_power_of_two() {
            return unfit(format!(
                "{lanes} of {threads} threads a key: lanes are 4, 8, 16 or 32, threads a power of two"
            ));
        }
        if !(1..=16).contains(&rows) || ![1, 2, 4].contains(&exchanged) || !(1..=8).contains(&steps) || splits == 0 {
            return unfit("rows go to 16, steps to 8, exchanged keys are 1, 2 or 4, splits at least 1".into());
        }
        if steps % exchanged != 0 || !steps.is_power_of_two() {
            return unfit(format!("steps, {steps}, must be a power of two and a multiple of {exchanged}"));
        }
        self.check_page(config, capabilities)
    }

    /// Checks that a tile fits a page.
    fn check_page(&self, config: &CacheConfig, capabilities: &Capabilities) -> Result<()> {
        let tile = self.tiles.keys(capabilities.cooperative);
        match config.kind {
            CacheKind::Paged { page_size, .. } if tile as usize > page_size => {
                let reason = format!("a tile of {tile} keys does not fit a page of {page_size}");
                Err(Error::NoKernel { problem: format!("decoding with {self}"), reason })
            }
            _ => Ok(()),
        }
    }
}
