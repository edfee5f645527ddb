//! `KernelSpec`, the description of one kernel. The plan, the host's grid, the bindings and the shader's text follow from it.

#[cfg(test)]
use std::ops::Range;

use minijinja::Value;

use crate::kernel::binding::Binding;
pub(crate) use crate::kernel::binding::Width;
use crate::kernel::cache::{Access, CacheOptions};
use crate::kernel::micro_kernel::MicroKernel;
use crate::kernel::sizes::{DELTA_ROWS, MASK_BLOCK_ROWS, MASK_BLOCK_WORDS, MASK_GROUP};
use crate::problem::element::DType;
use crate::problem::error::Result;
use crate::problem::varlen::Sequence;
use crate::problem::{Problem, SinkLogits};

/// The optional operands that a call has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub struct OptionalOperands {
    /// A gradient flows into lse.
    pub d_lse: bool,
    /// The rounding error of o, in half precision only. The forward pass writes it, and the backward pass reads it.
    pub o_lo: bool,
    /// The gradient by the ALiBi slopes is wanted, if there are any.
    pub d_alibi_slopes: bool,
    /// The gradient by the bias is wanted, if there is one.
    pub d_bias: bool,
    /// The backward pass finds the bits of the mask that the forward pass has left.
    pub mask_bits: bool,
    /// The gradients by k and v lie in one buffer.
    pub packed: bool,
    /// Rows of the operands, or of a bias, cannot be read four neighbours at a time, because an offset or a stride is no multiple of 4. A width,
    /// or a number of keys, that is no multiple of 4 need not be stated here.
    pub scalar: bool,
    /// Rows of q, k, v or d_o cannot be read eight neighbours at a time, because an offset or a stride is no multiple of 8. `scalar` implies it, and
    /// a width that is no multiple of 8 need not be stated here.
    pub quads: bool,
    /// The forward pass, or a merge, writes the largest score of each row.
    pub row_max: bool,
}

setters! {
    impl[] OptionalOperands[]
    plain {
        d_lse: bool,
        o_lo: bool,
        d_alibi_slopes: bool,
        d_bias: bool,
        mask_bits: bool,
        packed: bool,
        scalar: bool,
        quads: bool,
        row_max: bool,
    }
}

impl OptionalOperands {
    /// The optional operands of a training step without a gradient into lse: o_lo in half precision, and every gradient.
    pub fn for_training(problem: &Problem) -> Self {
        OptionalOperands {
            d_lse: false,
            o_lo: problem.options().dtype.has_rounding_error(),
            d_alibi_slopes: true,
            d_bias: true,
            mask_bits: false,
            packed: false,
            scalar: false,
            quads: false,
            row_max: false,
        }
    }

    pub(crate) fn check(self, problem: &Problem) -> Result<()> {
        if self.o_lo { problem.check_o_lo() } else { Ok(()) }
    }
}

/// One kernel. A new kernel is one more value of this struct, and its entry shader.
#[derive(Debug)]
pub(crate) struct KernelSpec {
    /// The short name that files and tables use. No two kernels share one.
    pub(crate) name: &'static str,
    /// The text of its entry shader.
    pub(crate) template: &'static str,
    /// Whether a pass of the kernel is part of a forward, backward or merging plan.
    pub(crate) wanted: fn(&Problem, OptionalOperands) -> Wanted,
    /// Operands that the kernel may read. The options decide which of them a variant binds, see
    /// [`Variant::bindings`](crate::plan::Variant). A pipeline depends on the options of these operands, and on no others.
    pub(crate) reads: &'static [Binding],
    /// Operands that the kernel may write.
    pub(crate) writes: &'static [Binding],
    /// Whether a variant binds one of these operands, if the options alone do not decide that.
    pub(crate) binds: fn(&OwnOptions, Binding) -> bool,
    /// Changes options that the kernel depends on in another way than its operands imply.
    pub(crate) adjust: fn(&mut OwnOptions, &Problem, OptionalOperands),
    /// How its workgroups share the work.
    pub(crate) work: Work,
    /// The computation of a workgroup, with its cost.
    pub(crate) body: Body,
}

/// Options that a kernel may depend on in another way than its operands imply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct OwnOptions {
    pub(crate) dtype: DType,
    pub(crate) sink_logits: SinkLogits,
    pub(crate) lengths: bool,
    pub(crate) o_lo: bool,
}

/// When a kernel runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wanted {
    Never,
    Always,
    /// The kernel runs if another kernel of the plan reads its results.
    WhereRead,
}

impl From<bool> for Wanted {
    fn from(is_wanted: bool) -> Self {
        if is_wanted { Wanted::Always } else { Wanted::Never }
    }
}

/// The computation of a workgroup, with its cost.
#[derive(Debug)]
pub(crate) enum Body {
    /// Sums along rows, and similar computations.
    Plain(Plain),
    /// Products of tiles.
    Tiled(Tiled),
    /// Rows of a cache.
    Cached(Cached),
}

/// A kernel that reads or writes a cache. Its pipeline depends on [`CacheOptions`]. It is one dispatch, whatever the dispatch budget is.
#[derive(Debug)]
pub(crate) struct Cached {
    /// Threads of a workgroup.
    pub(crate) threads: fn(&CacheOptions) -> u32,
    /// Bytes of workgroup memory.
    pub(crate) workgroup_bytes: fn(&CacheOptions) -> u32,
    /// How the kernel reads or writes the rows of the cache.
    pub(crate) access: fn(&CacheOptions) -> Access,
    /// Leaves out options that its pipeline does not depend on.
    pub(crate) depends: fn(CacheOptions) -> CacheOptions,
    /// Whether the kernel binds one of its operands.
    pub(crate) binds: fn(&CacheOptions, Binding) -> bool,
    /// The values that its template reads in addition to those that every template may read.
    pub(crate) context: fn(&CacheOptions) -> Value,
}

/// A kernel without tiles.
#[derive(Debug)]
pub(crate) struct Plain {
    /// Threads of a workgroup.
    pub(crate) threads: u32,
    /// Bytes of workgroup memory.
    pub(crate) workgroup_bytes: u32,
    /// Floating-point operations of a workgroup, or as many as take the same time: these kernels are bound by the memory that they read.
    pub(crate) flops: fn(&Problem) -> f64,
    /// Loop iterations of a thread, at most.
    pub(crate) loop_iterations: fn(&Problem, &OwnOptions) -> u64,
}

/// A kernel whose workgroups hold a tile of rows against tiles of columns.
#[derive(Debug)]
pub(crate) struct Tiled {
    /// Widths of the products that a pair needs: q and k for its score, and d_o and v for the gradient by its probability.
    pub(crate) products: &'static [Width],
    /// Widths of the accumulators that a row of a tile keeps in registers.
    pub(crate) accumulators: &'static [Width],
    /// Whether the kernel keeps row_max and row_sum of an online softmax.
    pub(crate) softmax: bool,
    /// Whether the kernel sums along rows, among the threads that share one.
    pub(crate) sums_rows: bool,
    /// Whether the kernel sums tiles of pairs, in a tile of its own.
    pub(crate) sums_pairs: bool,
    /// The micro-kernels that the kernel is written for.
    pub(crate) micro_kernels: &'static [MicroKernel],
    /// Accumulators whose rows have units that a kernel that multiplies f16 finds itself, in a first walk over the tiles.
    pub(crate) units: fn(DType) -> &'static [&'static str],
}

impl Tiled {
    /// Widths of the accumulators, and 0 for a missing one.
    pub(crate) fn accumulator_widths(&self, head_dim: u32, value_dim: u32) -> [u32; 2] {
        [0, 1].map(|n| self.accumulators.get(n).map_or(0, |width| width.of([head_dim, value_dim])))
    }

    /// Tiles of scores that a thread holds at once.
    pub(crate) fn score_tiles(&self) -> u32 {
        self.products.len() as u32 + u32::from(self.sums_pairs)
    }

    /// Floating-point operations of a pair of a query and a key: two for each multiply-add.
    pub(crate) fn pair_flops(&self, widths: [u32; 2]) -> f64 {
        let all = self.products.iter().chain(self.accumulators);
        2.0 * all.map(|width| f64::from(width.of(widths))).sum::<f64>()
    }
}

/// Rows of queries, or of keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Queries,
    Keys,
}

/// How the workgroups of a kernel share the work. The host's grid, and the shader's decoding of a workgroup's index (shaders/work.wgsl),
/// both follow from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Work {
    /// Some rows of a head of an entry of the batch.
    Rows(Side),
    /// A head, with the whole batch and all rows.
    Heads,
    /// A group of blocks of the boolean mask.
    MaskBlocks,
    /// A tile of rows of a head, against all tiles of the other side that it meets. A tile of keys belongs to a key head, and the query
    /// heads of its group come in turn.
    PortableTile(Side),
    /// A tile of the bias. All pairs that share it come in turn.
    BiasTiles,
    /// A row of a result of decoding.
    DecodedRows,
    /// Work that the host lists or counts for each call: tokens, runs of rows, splits of the keys of a cache. It is one dispatch.
    Listed,
}

/// A digit of a workgroup's index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Digit {
    /// Workgroups of one head and tile.
    Cell,
    /// Heads, or key heads if a group is kept together.
    Head,
    /// Entries of the batch, or numbers of sequences.
    Batch,
    /// Tiles of rows, or places in the list of tiles.
    Tile,
    /// Tiles of rows, the last one first.
    TileFromLast,
}

/// The work of a pass: entries of the batch, heads and tiles, and the workgroups of each of these cells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Grid {
    pub(crate) axes: [u64; 3],
    pub(crate) cells: u64,
}

/// The place of a workgroup in the work. Twin of `WorkIndex` in shaders/work.wgsl.
#[cfg(test)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct WorkIndex {
    pub(crate) batch: u64,
    pub(crate) head: u64,
    pub(crate) tile: u64,
    pub(crate) cell: u64,
}

impl Work {
    /// Whether rows are keys.
    pub(crate) fn rows_are_keys(self) -> bool {
        matches!(self, Work::Rows(Side::Keys) | Work::PortableTile(Side::Keys))
    }

    /// Whether tiles come from a list if sequences differ in length.
    pub(crate) fn is_listed(self, lengths: bool) -> bool {
        lengths && matches!(self, Work::PortableTile(_))
    }

    /// The digits of a workgroup's index, the fastest first.
    pub(crate) fn order(self, lengths: bool) -> &'static [Digit] {
        use Digit::{Batch, Cell, Head, Tile, TileFromLast};
        match self {
            Work::Rows(_) | Work::DecodedRows => &[Tile, Head, Batch],
            Work::Heads => &[Head],
            Work::Listed => &[],
            Work::MaskBlocks | Work::BiasTiles => &[Cell, Tile, Head, Batch],
            // The first key tile of every head comes first, because under a causal mask the most queries see it.
            Work::PortableTile(Side::Keys) => &[Head, Batch, Tile],
            // The list has its own order.
            Work::PortableTile(Side::Queries) if lengths => &[Cell, Head, Batch, Tile],
            // The query heads of a group are neighbours, because they share keys and values. The last query tile of every head comes first,
            // because under a causal mask it is the longest.
            Work::PortableTile(Side::Queries) => &[Cell, Head, Batch, TileFromLast],
        }
    }

    /// The place of a workgroup in a part of the work: the ranges of batch, heads and tiles.
    #[cfg(test)]
    pub(crate) fn decode(self, lengths: bool, cells: u64, axes: &[Range<u64>; 3], index: u64) -> WorkIndex {
        let [batch, heads, tiles] = axes;
        let len = |range: &Range<u64>| range.end - range.start;
        let mut at = WorkIndex { batch: batch.start, head: heads.start, tile: tiles.start, cell: 0 };
        let mut rest = index;
        let mut digit = |count: u64| {
            let digit = rest % count;
            rest /= count;
            digit
        };
        for place in self.order(lengths) {
            match place {
                Digit::Cell => at.cell = digit(cells),
                Digit::Head => at.head = heads.start + digit(len(heads)),
                Digit::Batch => at.batch = batch.start + digit(len(batch)),
                Digit::Tile => at.tile = tiles.start + digit(len(tiles)),
                Digit::TileFromLast => at.tile = tiles.end - 1 - digit(len(tiles)),
            }
        }
        assert_eq!(rest, 0, "{index} of {axes:?}");
        at
    }

    /// The work of a pass with tiles of some rows and columns.
    pub(crate) fn grid(self, problem: &Problem, [rows, columns]: [u32; 2], lengths: bool) -> Grid {
        let s = problem.shape();
        let [rows, columns] = [rows, columns].map(|n| n as usize);
        let listed = || problem.sequences().map(|sequence| self.row_tiles(&sequence, rows)).sum();
        let delta_tiles = |seq: usize| seq.div_ceil(DELTA_ROWS as usize);
        let (axes, cells) = match self {
            Work::Rows(Side::Queries) => ([s.batch, s.heads, delta_tiles(s.seq_q)], 1),
            Work::Rows(Side::Keys) => ([s.batch, s.kv_heads, delta_tiles(s.seq_k)], 1),
            Work::Heads => ([1, s.heads, 1], 1),
            Work::DecodedRows => ([s.batch, s.heads, s.seq_q], 1),
            // A problem does not say how much listed work there is.
            Work::Listed => ([0; 3], 0),
            Work::MaskBlocks => {
                let [batch, heads, rows, keys] = problem.options().mask.unwrap_or_default().of(problem.pairs_shape());
                let [_, block_rows, groups] = mask_blocks(rows, keys);
                ([batch, heads, block_rows], groups)
            }
            Work::BiasTiles => {
                let axes = problem.options().bias.unwrap_or_default();
                let [batch, heads, bias_rows, keys] = axes.of(problem.pairs_shape());
                let column_tiles = keys.div_ceil(columns);
                match axes.seq_q {
                    true => ([batch, heads, bias_rows.div_ceil(rows)], column_tiles),
                    false => ([batch, heads, column_tiles], 1),
                }
            }
            Work::PortableTile(side) => {
                let (seq, cells) = match side {
                    Side::Queries => (s.seq_q, problem.heads_per_kv()),
                    Side::Keys => (s.seq_k, 1),
                };
                let axes = match lengths {
                    true => [1, s.kv_heads, listed()],
                    false => [s.batch, s.kv_heads, seq.div_ceil(rows)],
                };
                (axes, cells)
            }
        };
        Grid { axes: axes.map(|n| n as u64), cells: cells as u64 }
    }

    /// Tiles of `rows` rows of a head of a sequence.
    pub(crate) fn row_tiles(self, sequence: &Sequence, rows: usize) -> usize {
        let length = if self.rows_are_keys() { sequence.k_rows } else { sequence.q_rows };
        length.div_ceil(rows)
    }
}

impl Grid {
    /// Workgroups in all.
    pub(crate) fn workgroups(&self) -> u128 {
        self.axes.iter().fold(u128::from(self.cells), |n, axis| n * u128::from(*axis))
    }
}

/// Words of a row of the mask's bits, rows of blocks of the mask, and groups of blocks in a row of blocks.
pub(crate) fn mask_blocks(rows: usize, keys: usize) -> [usize; 3] {
    let words = keys.div_ceil(32);
    [words, rows.div_ceil(MASK_BLOCK_ROWS as usize), words.div_ceil((MASK_GROUP * MASK_BLOCK_WORDS) as usize)]
}

/// [`KernelSpec::binds`] of a kernel that binds all operands that the options imply.
pub(crate) fn binds_all(_: &OwnOptions, _: Binding) -> bool {
    true
}

/// [`KernelSpec::adjust`] of a kernel whose operands imply everything that its pipeline depends on.
pub(crate) fn adjusts_nothing(_: &mut OwnOptions, _: &Problem, _: OptionalOperands) {}

/// [`KernelSpec::wanted`] of a kernel that is part of every plan that lists it.
pub(crate) fn always(_: &Problem, _: OptionalOperands) -> Wanted {
    Wanted::Always
}
