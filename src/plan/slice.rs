//! From a pass to dispatches: the part of the work that each dispatch does, and the part of each operand that it binds. Pure functions of
//! numbers.
//!
//! A pass is one dispatch if its operands fit bindings and its time fits the budget. Otherwise it is cut along the batch, then along heads,
//! then along tiles. Workgroups do the same work as in one dispatch, so results keep their bits.

use std::ops::Range;
use std::time::Duration;

use crate::device::capabilities::Capabilities;
use crate::kernel::spec::{Body, Grid, Side, Work};
use crate::kernel::{Binding, DELTA_ROWS, MASK_BLOCK_ROWS, SEQUENCE_WORDS};
use crate::plan::operand::{BindingRange, OperandLayout};
use crate::plan::pass::{Pass, fold, grid, work_list};
use crate::problem::Problem;
use crate::problem::error::{Error, Result};
use crate::problem::varlen::Sequence;

/// Estimated time for which a dispatch may hold the GPU, unless the caller says otherwise. Browsers and desktop systems reset a GPU that
/// does not answer for some two seconds.
pub(crate) const DISPATCH_BUDGET: Duration = Duration::from_millis(250);

/// The part of a pass that a dispatch does. The axes are those of the pass: sequences, key heads (query heads if there is no group to keep
/// together) and tiles of rows. If sequences differ in length, the last axis has places in the list of tiles.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) axes: [Range<u64>; 3],
}

/// One dispatch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Slice {
    pub(crate) part: Part,
    pub(crate) workgroups: u32,
    /// Workgroups of each sequence, head and tile.
    pub(crate) cells: u32,
    pub(crate) grid: [u32; 2],
    pub(crate) binding_ranges: Vec<(Binding, BindingRange)>,
}

/// The dispatches of a pass.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Slices {
    pub(crate) list: Vec<Slice>,
    /// If sequences differ in length: sequence and tile of each place in the list. The places of a slice are neighbours.
    pub(crate) work: Vec<[u32; 2]>,
}

impl Pass {
    /// The dispatches of this pass. Operands lie as `views` say, and a dispatch should take no longer than `budget`.
    pub(crate) fn slices(
        &self,
        problem: &Problem,
        views: &[OperandLayout],
        capabilities: &Capabilities,
        budget: Duration,
    ) -> Result<Slices> {
        let mut slicer = Slicer::new(self, problem, views, capabilities, budget)?;
        let mut parts = Vec::new();
        slicer.cut(Part { axes: slicer.axes.map(|n| 0..n) }, &mut parts)?;
        let mut list = Vec::with_capacity(parts.len());
        for part in parts {
            let accesses = slicer.accesses(&part);
            let binding_ranges =
                slicer.views.iter().map(|view| Ok((view.binding, slicer.binding_range(view, &accesses)?)));
            let mut binding_ranges = binding_ranges.collect::<Result<Vec<_>>>()?;
            binding_ranges.extend(&slicer.whole);
            if self.variant.packed {
                join(&mut binding_ranges, [Binding::DK, Binding::DV], capabilities)?;
            }
            let (workgroups, grid) = slicer.fold(&part)?;
            let [.., places] = &part.axes;
            if self.is_listed() {
                // The longest tiles come first. The sort is stable, so neighbours stay neighbours.
                slicer.work[places.start as usize..places.end as usize]
                    .sort_by_key(|(visited, _)| std::cmp::Reverse(*visited));
            }
            let cells = slicer.cells as u32;
            list.push(Slice { part, workgroups, cells, grid, binding_ranges });
        }
        Ok(Slices { list, work: slicer.work.into_iter().map(|(_, work)| work).collect() })
    }

    /// Whether the tiles of the pass come from a list.
    fn is_listed(&self) -> bool {
        self.variant.kernel.spec().work.is_listed(self.variant.lengths)
    }
}

/// Gives two operands in one buffer a common window, which covers the binding_ranges of both.
fn join(
    binding_ranges: &mut [(Binding, BindingRange)],
    operands: [Binding; 2],
    capabilities: &Capabilities,
) -> Result<()> {
    let own: Vec<&mut BindingRange> =
        binding_ranges.iter_mut().filter(|(b, _)| operands.contains(b)).map(|(_, window)| window).collect();
    let start = own.iter().map(|window| window.start).min().unwrap_or(0);
    let end = own.iter().map(|window| window.start + window.len).max().unwrap_or(0);
    let (bytes, limit) = (end - start, capabilities.binding_bytes);
    if bytes > limit {
        return Err(Error::BindingTooLarge { operand: operands[0].name(), bytes, limit });
    }
    own.into_iter().for_each(|window| *window = BindingRange { start, len: bytes });
    Ok(())
}

/// Rows and keys that some workgroups of a part read and write, in all heads of the part.
#[derive(Debug, Clone)]
struct Access {
    /// Range along the batch axis of q, k, v and o, and the numbers of the sequences.
    batch: Range<u64>,
    numbers: Range<u64>,
    /// Ranges along the sequence axes of q and of k.
    queries: Range<u64>,
    keys: Range<u64>,
    /// The queries, counted in their sequence.
    rows: Range<u64>,
    heads: Range<u64>,
    kv_heads: Range<u64>,
}

/// The reason why a part is too large.
enum Misfit {
    Time,
    Limit(Error),
}

struct Slicer<'a> {
    pass: &'a Pass,
    problem: &'a Problem,
    capabilities: &'a Capabilities,
    axes: [u64; 3],
    /// Workgroups of a cell: of one sequence, head and tile.
    cells: u64,
    /// Operands that do not fit a binding as a whole, and the binding_ranges of operands that do.
    views: Vec<OperandLayout>,
    whole: Vec<(Binding, BindingRange)>,
    /// The list of tiles, if tiles come from one: the number of column tiles that each tile visits, its sequence and its tile.
    work: Vec<(usize, [u32; 2])>,
    /// Floating-point operations of all tiles before each tile, for one head of one sequence. Empty if time does not count.
    work_before: Vec<f64>,
    most_work: f64,
}

impl<'a> Slicer<'a> {
    fn new(
        pass: &'a Pass,
        problem: &'a Problem,
        views: &[OperandLayout],
        capabilities: &'a Capabilities,
        budget: Duration,
    ) -> Result<Self> {
        let work = if pass.is_listed() { work_list(pass, problem) } else { Vec::new() };
        let Grid { axes, cells } = grid(&pass.variant, problem);
        let (mut large, mut whole) = (Vec::new(), Vec::new());
        for view in views {
            match view.binding_range(view.whole(), capabilities) {
                Ok(window) => whole.push((view.binding, window)),
                Err(_) => large.push(*view),
            }
        }
        if pass.variant.lengths {
            let words = problem.sequence_count() * SEQUENCE_WORDS as usize + 2 * work.len();
            let table = OperandLayout::run(Binding::Sequences, words, 4);
            table.binding_range(table.whole(), capabilities)?;
        }
        let most_work =
            budget.as_secs_f64() * capabilities.flops(pass.variant.micro_kernel.properties().needs_matrices);
        let mut slicer = Slicer {
            pass,
            problem,
            capabilities,
            axes,
            cells,
            views: large,
            whole,
            work,
            work_before: Vec::new(),
            most_work,
        };
        if budget < Duration::MAX {
            let mut sum = 0.0;
            slicer.work_before.push(0.0);
            for flops in slicer.tile_flops() {
                sum += flops;
                slicer.work_before.push(sum);
            }
        }
        Ok(slicer)
    }

    fn cut(&self, part: Part, parts: &mut Vec<Part>) -> Result<()> {
        let misfit = match self.check(&part) {
            Ok(()) => {
                parts.push(part);
                return Ok(());
            }
            Err(misfit) => misfit,
        };
        let len = |axis: usize| part.axes[axis].end - part.axes[axis].start;
        let with = |axis: usize, range: Range<u64>| {
            let mut part = part.clone();
            part.axes[axis] = range;
            part
        };
        let first = |axis: usize| part.axes[axis].start..part.axes[axis].start + 1;
        let axis = match [0, 1, 2].map(|axis| len(axis) > 1) {
            [true, ..] => 0,
            // Cutting along heads does not help if a single head needs as large a window, because heads are interleaved in memory.
            [_, true, true] if self.check(&with(1, first(1))).is_err() && self.check(&with(2, first(2))).is_ok() => 2,
            [_, true, _] => 1,
            [.., true] => 2,
            _ => {
                return match misfit {
                    // A dispatch does at least one tile of a head.
                    Misfit::Time => {
                        parts.push(part);
                        Ok(())
                    }
                    Misfit::Limit(error) => Err(error),
                };
            }
        };
        let all = part.axes[axis].clone();
        let mut start = all.start;
        while start < all.end {
            let fits = |len: u64| self.check(&with(axis, start..start + len)).is_ok();
            let most = most(all.end - start, fits);
            self.cut(with(axis, start..start + most), parts)?;
            start += most;
        }
        Ok(())
    }

    fn check(&self, part: &Part) -> Result<(), Misfit> {
        self.fold(part).map_err(Misfit::Limit)?;
        if !self.views.is_empty() {
            let accesses = self.accesses(part);
            for view in &self.views {
                self.binding_range(view, &accesses).map_err(Misfit::Limit)?;
            }
        }
        if !self.work_before.is_empty() {
            let [entries, heads, tiles] = &part.axes;
            let len = |range: &Range<u64>| (range.end - range.start) as f64;
            let tiles = self.work_before[tiles.end as usize] - self.work_before[tiles.start as usize];
            if tiles * len(entries) * len(heads) > self.most_work {
                return Err(Misfit::Time);
            }
        }
        Ok(())
    }

    /// Tiles that the dispatch of a part numbers, and its grid of workgroups. A workgroup looks at several tiles if there is little to do.
    fn fold(&self, part: &Part) -> Result<(u32, [u32; 2])> {
        let (tiles, batch) = (self.workgroups(part), u128::from(self.pass.variant.batch));
        let (_, grid) = fold(tiles.div_ceil(batch), self.capabilities.grid_dimension)?;
        let most = u64::from(u32::MAX);
        let tiles = u32::try_from(tiles).map_err(|_| Error::TooManyWorkgroups { workgroups: tiles, most })?;
        Ok((tiles, grid))
    }

    fn workgroups(&self, part: &Part) -> u128 {
        let cells = part.axes.iter().fold(1, |n, range| n * u128::from(range.end - range.start));
        u128::from(self.cells) * cells
    }

    /// The window of an operand that a dispatch binds. It is not empty even if the dispatch needs nothing of the operand.
    fn binding_range(&self, view: &OperandLayout, accesses: &[Access]) -> Result<BindingRange> {
        let mut span: Option<[u64; 2]> = None;
        let s = self.problem.shape();
        for access in accesses {
            let states = access.batch.start..access.batch.end + (s.seq_k as u64 - 1) * s.batch as u64;
            let heads = match view.binding {
                Binding::K | Binding::V | Binding::DK | Binding::DV | Binding::KeyScales => &access.kv_heads,
                _ => &access.heads,
            };
            let (batch, rows) = match view.binding {
                Binding::K | Binding::V | Binding::DK | Binding::DV | Binding::KeyScales => {
                    (&access.batch, access.keys.clone())
                }
                // The window reaches to the last row of the head, which has the slope. In the mask's bits, the classes follow the last row.
                Binding::RowStats if self.problem.options().alibi => {
                    (&access.batch, access.queries.start..view.extents[2])
                }
                binding if binding.has_states() => (&states, access.queries.clone()),
                // One row of the mask may be for all queries.
                Binding::MaskBits => (&access.numbers, access.rows.start.min(view.extents[2] - 1)..view.extents[2]),
                Binding::Mask | Binding::Bias | Binding::DBias => (&access.numbers, access.rows.clone()),
                Binding::SinkPartials => {
                    let tile = u64::from(DELTA_ROWS);
                    (&access.batch, access.queries.start / tile..access.queries.end.div_ceil(tile))
                }
                _ => (&access.batch, access.queries.clone()),
            };
            if batch.is_empty() || heads.is_empty() || rows.is_empty() {
                continue;
            }
            let [first, end] = view.span([batch, heads, &rows]);
            span = Some(span.map_or([first, end], |[a, b]| [a.min(first), b.max(end)]));
        }
        let span = span.unwrap_or([view.offset, view.offset + view.extents[3]]);
        view.binding_range(span, self.capabilities)
    }

    /// Accesses of the workgroups of a part.
    fn accesses(&self, part: &Part) -> Vec<Access> {
        let (problem, s) = (self.problem, self.problem.shape());
        let [entries, heads, tiles] = part.axes.clone();
        let group = problem.heads_per_kv() as u64;
        let all = |n: usize| 0..n as u64;
        let groups = heads.start * group..heads.end * group;
        let spans = |rows: u32, seq: usize| {
            let of = |n: u64| n.saturating_mul(rows.into()).min(seq as u64);
            of(tiles.start)..of(tiles.end)
        };
        let access = |queries: Range<u64>, keys: Range<u64>| Access {
            batch: entries.clone(),
            numbers: entries.clone(),
            rows: queries.clone(),
            queries,
            keys,
            heads: heads.clone(),
            kv_heads: heads.clone(),
        };
        match self.pass.variant.kernel.spec().work {
            Work::Rows(Side::Queries) => vec![access(spans(DELTA_ROWS, s.seq_q), 0..0)],
            Work::Rows(Side::Keys) => vec![access(0..0, spans(DELTA_ROWS, s.seq_k))],
            // A kernel of caches is always one dispatch.
            Work::DecodedRows | Work::Listed => Vec::new(),
            Work::Heads => vec![Access { batch: all(s.batch), ..access(all(s.seq_q), 0..0) }],
            Work::MaskBlocks => {
                let [_, _, rows, _] = problem.options().mask.unwrap_or_default().of(problem.pairs_shape());
                vec![access(spans(MASK_BLOCK_ROWS, rows), 0..0)]
            }
            Work::BiasTiles => {
                let axes = problem.options().bias.unwrap_or_default();
                let heads = if axes.heads { heads } else { all(s.heads) };
                let kv_heads = heads.start / group..heads.end.div_ceil(group);
                let numbers = if axes.batch { entries } else { all(problem.sequence_count()) };
                let of = |sequence: &Sequence, batch: Range<u64>, numbers: Range<u64>| {
                    let [mut rows, keys] = self.visited(sequence, &tiles);
                    let queries = shifted(&rows, sequence.q_start, sequence.q_rows);
                    if axes.seq_q {
                        // The kernel writes the gradient for as many rows as the longest sequence has.
                        rows = self.tile_range(&tiles, problem.longest()[0]);
                    }
                    let keys = shifted(&keys, sequence.k_start, sequence.k_rows);
                    Access { batch, numbers, queries, keys, rows, heads: heads.clone(), kv_heads: kv_heads.clone() }
                };
                if !problem.has_lengths() {
                    return vec![of(&problem.sequence(0), numbers.clone(), numbers)];
                }
                let access = |number: u64| {
                    let sequence = problem.sequence(number as usize);
                    let entry = sequence.entry as u64;
                    of(&sequence, entry..entry + 1, number..number + 1)
                };
                numbers.map(access).collect()
            }
            Work::PortableTile(_) => {
                let of = |sequence: &Sequence, tiles: &Range<u64>| {
                    let [rows, keys] = self.visited(sequence, tiles);
                    let queries = shifted(&rows, sequence.q_start, sequence.q_rows);
                    let keys = shifted(&keys, sequence.k_start, sequence.k_rows);
                    Access { rows, heads: groups.clone(), ..access(queries, keys) }
                };
                if !problem.has_lengths() {
                    return vec![of(&problem.sequence(0), &tiles)];
                }
                let places = &self.work[tiles.start as usize..tiles.end as usize];
                let access = |(_, [number, tile]): &(usize, [u32; 2])| {
                    let sequence = problem.sequence(*number as usize);
                    let [number, tile, entry] = [u64::from(*number), u64::from(*tile), sequence.entry as u64];
                    Access { batch: entry..entry + 1, numbers: number..number + 1, ..of(&sequence, &(tile..tile + 1)) }
                };
                places.iter().map(access).collect()
            }
        }
    }

    fn tile(&self) -> [u64; 2] {
        self.pass.variant.tile().unwrap_or([1; 2]).map(u64::from)
    }

    /// Rows of tiles on the kernel's own side, up to `most`.
    fn tile_range(&self, tiles: &Range<u64>, most: usize) -> Range<u64> {
        let [rows, _] = self.tile();
        let of = |n: u64| n.saturating_mul(rows).min(most as u64);
        of(tiles.start)..of(tiles.end)
    }

    /// Queries and keys of a sequence that tiles of a kernel reach, counted from the start of the sequence.
    fn visited(&self, sequence: &Sequence, tiles: &Range<u64>) -> [Range<u64>; 2] {
        let band = sequence.band;
        let [tile_rows, columns] = self.tile();
        // Tiles cover all rows that a sequence has room for. Only those within its length count.
        let used = |range: &Range<u64>, most: usize| range.start as usize..(range.end as usize).min(most);
        let visited = |tiles: Range<usize>, size: u64, most: usize| {
            let end = (tiles.end as u64 * size).min(most as u64);
            (tiles.start as u64 * size).min(end)..end
        };
        let prefetches = self.pass.variant.properties().prefetches_tiles;
        // The kernel also fetches the tile after the last one, and one tile if it visits none. Beyond the end it fetches the last column
        // again.
        let fetched = |tiles: Range<usize>, most: usize| {
            let all = visited(tiles.start..tiles.end + 1, columns, most.max(1));
            all.start.min(most.max(1) as u64 - 1)..all.end
        };
        match self.pass.variant.kernel.spec().work {
            Work::PortableTile(Side::Keys) => {
                let keys = self.tile_range(tiles, sequence.k_rows);
                let used_keys = used(&keys, band.seq_k());
                let seen = |keys: &Range<usize>| band.query_tiles(keys, columns as usize);
                let mut queries = if used_keys.is_empty() { 0..0 } else { seen(&used_keys) };
                if !prefetches {
                    return [visited(queries, columns, band.seq_q()), keys];
                }
                // A tile of keys that no query sees fetches the first tile of queries. These keys are at either end of a sequence.
                let last = (keys.end.saturating_sub(1) / tile_rows * tile_rows) as usize..keys.end as usize;
                let last = used(&(last.start as u64..last.end as u64), band.seq_k());
                if queries.is_empty() {
                    queries = 0..0;
                } else if last.is_empty() || seen(&last).is_empty() {
                    queries.start = 0;
                }
                [fetched(queries, band.seq_q()), keys]
            }
            // The bias has one row for all queries, so its tiles are tiles of columns.
            Work::BiasTiles if !self.problem.options().bias.unwrap_or_default().seq_q => {
                let of = |n: u64| n.saturating_mul(columns).min(band.seq_k() as u64);
                let keys = of(tiles.start)..of(tiles.end);
                let used_keys = used(&keys, band.seq_k());
                let queries =
                    if used_keys.is_empty() { 0..0 } else { band.query_tiles(&used_keys, tile_rows as usize) };
                [visited(queries, tile_rows, band.seq_q()), keys]
            }
            _ => {
                let rows = self.tile_range(tiles, sequence.q_rows);
                let used_rows = used(&rows, band.seq_q());
                let mut keys = 0..0;
                if !used_rows.is_empty() {
                    let found = band.key_tiles(&used_rows, columns as usize);
                    let start = if found.sink.is_empty() { found.window.start } else { 0 };
                    keys = start..found.window.end.max(found.sink.end);
                }
                if !prefetches {
                    return [rows, visited(keys, columns, band.seq_k())];
                }
                // Rows beyond the end of a padded sequence, and rows that see nothing, fetch the first tile.
                if used_rows.len() < (rows.end - rows.start) as usize {
                    keys.start = 0;
                }
                [rows, fetched(keys, band.seq_k())]
            }
        }
    }

    /// Floating-point operations of each tile, for one head of one sequence: two for each multiply-add of the visited tiles, hidden pairs
    /// included.
    fn tile_flops(&self) -> Vec<f64> {
        let (problem, s) = (self.problem, self.problem.shape());
        let (kernel, [.., tiles]) = (self.pass.variant.kernel.spec(), self.axes);
        let tiled = match &kernel.body {
            Body::Tiled(tiled) => tiled,
            Body::Cached(_) => return vec![0.0; tiles as usize],
            Body::Plain(plain) => return vec![(plain.flops)(problem) * self.cells as f64; tiles as usize],
        };
        let [rows, columns] = self.tile();
        let pair_flops = tiled.pair_flops([s.head_dim, s.value_dim].map(|width| width as u32));
        let flops = (rows * columns) as f64 * pair_flops * problem.heads_per_kv() as f64;
        if self.pass.is_listed() {
            return self.work.iter().map(|(visited, _)| *visited as f64 * flops).collect();
        }
        let of_sequence = |sequence: &Sequence, tile: u64| {
            let range = self.tile_range(&(tile..tile + 1), usize::MAX);
            let band = sequence.band;
            let visited = match kernel.work.rows_are_keys() {
                true => band
                    .query_tiles(&(range.start as usize..(range.end as usize).min(band.seq_k())), columns as usize)
                    .len(),
                false if range.start < band.seq_q() as u64 => band
                    .key_tiles(&(range.start as usize..(range.end as usize).min(band.seq_q())), columns as usize)
                    .count(),
                false => 0,
            };
            visited as f64 * flops
        };
        if kernel.work != Work::BiasTiles {
            return (0..tiles).map(|tile| of_sequence(&problem.sequence(0), tile)).collect();
        }
        // One workgroup visits all pairs that share the bias.
        let axes = problem.options().bias.unwrap_or_default();
        let heads = if axes.heads { 1 } else { s.heads } as f64 / problem.heads_per_kv() as f64;
        let sequences: Vec<_> = problem.distinct_sequences().collect();
        let times = match (axes.batch, problem.has_lengths()) {
            (true, _) => 1.0 / sequences.len() as f64,
            (false, true) => 1.0,
            (false, false) => s.batch as f64,
        };
        let row_tiles = problem.longest()[0].div_ceil(rows as usize) as u64;
        let flops = |tile| sequences.iter().map(|sequence| of_sequence(sequence, tile)).sum::<f64>() * heads * times;
        if axes.seq_q {
            return (0..row_tiles).map(flops).collect();
        }
        let all: f64 = (0..row_tiles).map(flops).sum();
        vec![all / tiles as f64; tiles as usize]
    }
}

/// A range of a sequence among the rows of all sequences. In a sequence without rows it begins where there is something to read.
fn shifted(range: &Range<u64>, start: usize, room: usize) -> Range<u64> {
    let start = if room == 0 { 0 } else { start as u64 };
    range.start + start..range.end + start
}

/// The largest number up to `end` that fits, and at least 1. Every number below one that fits must fit, too.
fn most(end: u64, fits: impl Fn(u64) -> bool) -> u64 {
    let mut low = 1;
    // The search doubles first, because slices are small compared with the whole.
    while low < end && fits((2 * low).min(end)) {
        low = (2 * low).min(end);
    }
    let mut high = (2 * low).min(end + 1).max(low + 1);
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if fits(middle) { low = middle } else { high = middle }
    }
    low
}

#[cfg(test)]
mod tests;
