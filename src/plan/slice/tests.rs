//! Slices of passes: every workgroup does its work once, and reads within its bindings.

use std::collections::BTreeSet;

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

use super::*;
use crate::kernel::MicroKernel;
use crate::plan::operand::dense_views;
use crate::plan::{OptionalOperands, Plan, Preference};
use crate::problem::element::DType;
use crate::problem::varlen::Lengths;
use crate::problem::{Axes, Layout, Options, Shape, SinkLogits, Window as Visible};

/// Any shape, options and lengths.
fn random_problem(rng: &mut StdRng) -> Problem {
    let mut pick = |n: usize| rng.random_range(0..n);
    let kv_heads = 1 + pick(3);
    let mut shape = Shape {
        batch: 1 + pick(3),
        heads: kv_heads * (1 + pick(2)),
        kv_heads,
        seq_q: 1 + pick(300),
        seq_k: 1 + pick(300),
        head_dim: [4, 16, 33][pick(3)],
        value_dim: [4, 16, 33][pick(3)],
    };
    let axes = |n: usize| Axes { batch: n & 1 > 0, heads: n & 2 > 0, seq_q: n & 4 > 0 };
    let mut options = Options::new().causal(pick(2) > 0).dtype([DType::F32, DType::F16, DType::Bf16][pick(3)]);
    options = options.layout([Layout::Bshd, Layout::Bhsd][pick(2)]).alibi(pick(3) == 0);
    options.window = [Visible::FULL, Visible::keys(1 + pick(60)), Visible::new(pick(90), pick(90))][pick(3)];
    options.sink_tokens = [0, pick(80)][pick(2)];
    options.query_offset = (pick(3) == 0).then(|| pick(600) as i64 - 300);
    options.sink_logits = [SinkLogits::None, SinkLogits::PerHead][pick(2)];
    options.bias = (pick(3) == 0).then(|| axes(pick(8)));
    options.mask = (pick(3) == 0).then(|| axes(pick(8)));
    match pick(3) {
        0 => Problem::new(shape, options).unwrap(),
        1 => {
            let mut used = |most: usize| (0..shape.batch).map(|_| pick(most + 1) as u32).collect::<Vec<_>>();
            let (q, k) = (used(shape.seq_q), used(shape.seq_k));
            Problem::with_lengths(shape, options, Lengths::Used { q: Some(&q), k: Some(&k) }).unwrap()
        }
        _ => {
            let count = 1 + pick(5);
            let mut starts = |most: usize| {
                let mut starts: Vec<u32> = (1..count).map(|_| pick(most + 1) as u32).collect();
                starts.extend([0, most as u32]);
                starts.sort_unstable();
                starts
            };
            let (q, k) = (starts(shape.seq_q), starts(shape.seq_k));
            shape.batch = 1;
            let options = options.layout(Layout::Thd);
            Problem::with_lengths(shape, options, Lengths::Cumulative { q: &q, k: &k }).unwrap()
        }
    }
}

/// The work of the workgroups of a pass, one by one, numbered as in the shaders.
struct Simulation<'a> {
    pass: &'a Pass,
    problem: &'a Problem,
    views: &'a [OperandLayout],
    slices: &'a Slices,
    /// Sequence, head, tile (or block) and cell of the workgroups that have run.
    done: BTreeSet<[u64; 4]>,
}

impl Simulation<'_> {
    fn run(mut self) {
        for slice in &self.slices.list {
            let numbered = u64::from(slice.grid[0]) * u64::from(slice.grid[1]) * u64::from(self.pass.variant.batch);
            assert!(numbered >= u64::from(slice.workgroups));
            (0..u64::from(slice.workgroups)).for_each(|index| self.workgroup(slice, index));
        }
        assert_eq!(self.done.len() as u64, self.pass.workgroups, "{} of {}", self.pass, self.problem);
    }

    /// Checks that rows of an operand are within its binding.
    fn access(&self, slice: &Slice, binding: Binding, entry: u64, head: u64, rows: Range<u64>) {
        let Some(view) = self.views.iter().find(|view| view.binding == binding) else { return };
        let (_, window) = slice.binding_ranges.iter().find(|(b, _)| *b == binding).expect("it is bound");
        for row in [rows.start, rows.end.wrapping_sub(1)].into_iter().filter(|_| !rows.is_empty()) {
            let index = [entry, head, row];
            let at = view.offset + (0..3).map(|axis| view.strides[axis] * index[axis]).sum::<u64>();
            let bytes = at * view.element..(at + view.extents[3]) * view.element;
            assert!(
                window.start <= bytes.start && bytes.end <= window.start + window.len,
                "{binding:?} at {index:?}, {bytes:?} outside of {window:?}: {} of {}, {:?}",
                self.pass,
                self.problem,
                slice.part
            );
        }
    }

    fn workgroup(&mut self, slice: &Slice, index: u64) {
        let (problem, s) = (self.problem, self.problem.shape());
        let group = problem.heads_per_kv() as u64;
        let [tile_rows, columns] = self.pass.variant.tile().unwrap_or([1; 2]).map(u64::from);
        let (work, lengths) = (self.pass.variant.kernel.spec().work, self.pass.variant.lengths);
        let at = work.decode(lengths, slice.cells.into(), &slice.part.axes, index);
        let (mut number, mut tile) = (at.batch, at.tile);
        if self.pass.is_listed() {
            [number, tile] = self.slices.work[at.tile as usize].map(u64::from);
        }
        let done = [number, at.head, tile, at.cell];
        assert!(self.done.insert(done), "{done:?} twice");
        let (entry, head) = (at.batch, at.head);
        match work {
            Work::DecodedRows | Work::Listed => unreachable!("the kernels of caches are not sliced"),
            Work::Rows(side) => {
                let seq = if side == Side::Keys { s.seq_k } else { s.seq_q };
                let rows = tile * 32..(tile * 32 + 32).min(seq as u64);
                for (binding, _) in self.pass.variant.bindings() {
                    match binding {
                        Binding::SinkPartials => self.access(slice, binding, entry, head, tile..tile + 1),
                        Binding::RowStats => self.row_stats(slice, entry, head, rows.clone()),
                        binding if binding.has_states() => {
                            for state in 0..s.seq_k as u64 {
                                self.access(slice, binding, state * s.batch as u64 + entry, head, rows.clone());
                            }
                        }
                        // Every dispatch binds the whole operand.
                        Binding::SinkLogits | Binding::AlibiSlopes => {}
                        binding => self.access(slice, binding, entry, head, rows.clone()),
                    }
                }
            }
            Work::Heads => {
                for entry in 0..s.batch as u64 {
                    self.access(slice, Binding::RowStats, entry, head, 0..s.seq_q as u64);
                    self.access(slice, Binding::DSlopeRows, entry, head, 0..s.seq_q as u64);
                    self.access(slice, Binding::SinkPartials, entry, head, 0..s.seq_q.div_ceil(32) as u64);
                }
            }
            Work::MaskBlocks => {
                let [_, _, rows, _] = problem.options().mask.unwrap().of(problem.pairs_shape());
                let rows = tile * 32..(tile * 32 + 32).min(rows as u64);
                self.access(slice, Binding::Mask, entry, head, rows.clone());
                self.mask(slice, entry, head, rows);
            }
            Work::BiasTiles => {
                let axes = problem.options().bias.unwrap();
                let [_, _, pair_rows, _] = problem.pairs_shape().map(|n| n as u64);
                let (tile, row_tile) = if axes.seq_q { (at.cell, Some(at.tile)) } else { (at.tile, None) };
                let row_tiles = row_tile.map_or(0..pair_rows.div_ceil(tile_rows), |tile| tile..tile + 1);
                let written = row_tiles.start * tile_rows..(row_tiles.end * tile_rows).min(pair_rows);
                let written = if axes.seq_q { written } else { 0..1 };
                self.access(slice, Binding::DBias, number, head, written);
                for number in if axes.batch { number..number + 1 } else { 0..problem.sequence_count() as u64 } {
                    let sequence = problem.sequence(number as usize);
                    let band = sequence.band;
                    for head in if axes.heads { head..head + 1 } else { 0..s.heads as u64 } {
                        for row_tile in row_tiles.clone() {
                            let rows = row_tile * tile_rows..((row_tile + 1) * tile_rows).min(band.seq_q() as u64);
                            let range = rows.start as usize..rows.end as usize;
                            let seen = |tile| band.key_tiles(&range, columns as usize).iter().any(|t| t == tile);
                            if range.is_empty() || !seen(tile as usize) {
                                continue;
                            }
                            let keys = tile * columns..((tile + 1) * columns).min(band.seq_k() as u64);
                            self.queries(slice, number, &sequence, head, rows);
                            self.keys(slice, &sequence, head / group, keys);
                        }
                    }
                }
            }
            Work::PortableTile(Side::Keys) => {
                let kv_head = head;
                let sequence = problem.sequence(number as usize);
                let keys = tile * tile_rows..((tile + 1) * tile_rows).min(sequence.k_rows as u64);
                self.keys(slice, &sequence, kv_head, keys.clone());
                let seen = keys.start as usize..(keys.end as usize).min(sequence.band.seq_k());
                let visited = match seen.is_empty() {
                    true => 0..0,
                    false => sequence.band.query_tiles(&seen, columns as usize),
                };
                let visited: Vec<u64> = visited.map(|tile| tile as u64).collect();
                for head in kv_head * group..(kv_head + 1) * group {
                    for &tile in &visited {
                        let queries = tile * columns..((tile + 1) * columns).min(sequence.band.seq_q() as u64);
                        self.queries(slice, number, &sequence, head, queries);
                    }
                    for rows in self.fetched(&visited, None, sequence.band.seq_q()) {
                        let start = if sequence.q_rows == 0 { 0 } else { sequence.q_start as u64 };
                        let rows = rows.start + start..rows.end + start;
                        for binding in [Binding::Q, Binding::DO, Binding::RowStats] {
                            self.access(slice, binding, sequence.entry as u64, head, rows.clone());
                        }
                    }
                }
            }
            Work::PortableTile(Side::Queries) => {
                let (kv_head, head) = (head, head * group + at.cell);
                let sequence = problem.sequence(number as usize);
                let rows = tile * tile_rows..((tile + 1) * tile_rows).min(sequence.q_rows as u64);
                self.queries(slice, number, &sequence, head, rows.clone());
                let used = rows.start as usize..(rows.end as usize).min(sequence.band.seq_q());
                let (visited, next) = match used.is_empty() {
                    true => (Vec::new(), None),
                    false => {
                        let found = sequence.band.key_tiles(&used, columns as usize);
                        let first = if found.sink.is_empty() { found.window.start } else { 0 } as u64;
                        (found.iter().map(|tile| tile as u64).collect(), Some([first, found.window.start as u64]))
                    }
                };
                for &tile in &visited {
                    let keys = tile * columns..((tile + 1) * columns).min(sequence.band.seq_k() as u64);
                    self.keys(slice, &sequence, kv_head, keys);
                }
                for keys in self.fetched(&visited, next, sequence.band.seq_k()) {
                    self.keys(slice, &sequence, kv_head, keys);
                }
            }
        }
    }

    /// Columns that a kernel fetches ahead: the first tile, and after each tile the next one. Beyond the end it fetches the last column
    /// again.
    fn fetched(&self, visited: &[u64], first: Option<[u64; 2]>, columns: usize) -> Vec<Range<u64>> {
        if !self.pass.variant.properties().prefetches_tiles {
            return Vec::new();
        }
        let [_, width] = self.pass.variant.tile().unwrap().map(u64::from);
        let mut tiles = vec![first.map_or(visited.first().copied().unwrap_or(0), |[first, _]| first)];
        for (n, tile) in visited.iter().enumerate() {
            // The kernel goes from the last tile of the sink tokens to the first tile of the window. The sink tokens may have none.
            let next = visited.get(n + 1).copied().unwrap_or(tile + 1);
            tiles.extend([next, first.map_or(next, |[_, window]| if window > *tile { window } else { next })]);
        }
        let last = columns.max(1) as u64 - 1;
        tiles.into_iter().map(|tile| (tile * width).min(last)..((tile + 1) * width - 1).min(last) + 1).collect()
    }

    fn row_stats(&self, slice: &Slice, entry: u64, head: u64, rows: Range<u64>) {
        self.access(slice, Binding::RowStats, entry, head, rows);
        if self.problem.options().alibi {
            let slope = self.problem.shape().seq_q as u64;
            self.access(slice, Binding::RowStats, entry, head, slope..slope + 1);
        }
    }

    fn mask(&self, slice: &Slice, number: u64, head: u64, rows: Range<u64>) {
        let Some(view) = self.views.iter().find(|view| view.binding == Binding::MaskBits) else { return };
        self.access(slice, Binding::MaskBits, number, head, rows);
        // The last class of the head, and the words that a tile may read beyond the last key.
        let (_, window) = slice.binding_ranges.iter().find(|(b, _)| *b == Binding::MaskBits).unwrap();
        let last = view.strides[0] * number + view.strides[1] * head + view.extents[2] * view.extents[3] + view.tail;
        assert!(4 * last <= window.start + window.len, "{last} words beyond {window:?}");
    }

    /// Checks the operands with rows of queries, whose rows are counted in their sequence.
    fn queries(&self, slice: &Slice, number: u64, sequence: &Sequence, head: u64, rows: Range<u64>) {
        let entry = sequence.entry as u64;
        let all = shifted(&rows, sequence.q_start, sequence.q_rows);
        use Binding::{DLse, DO, DQ, DSlopeRows, Lse, O, OLo, Q, RowMax};
        for binding in [Q, DQ, DO, O, OLo, Lse, DLse, DSlopeRows, RowMax] {
            self.access(slice, binding, entry, head, all.clone());
        }
        if self.views.iter().any(|view| view.binding == Binding::RowStats) {
            self.row_stats(slice, entry, head, all);
        }
        let seen = rows.start..rows.end.min(sequence.band.seq_q() as u64);
        self.access(slice, Binding::Bias, number, head, seen.clone());
        if !seen.is_empty() {
            self.mask(slice, number, head, seen);
        }
    }

    fn keys(&self, slice: &Slice, sequence: &Sequence, kv_head: u64, keys: Range<u64>) {
        let keys = shifted(&keys, sequence.k_start, sequence.k_rows);
        for binding in [Binding::K, Binding::V, Binding::DK, Binding::DV] {
            self.access(slice, binding, sequence.entry as u64, kv_head, keys.clone());
        }
    }
}

/// Slices cover every workgroup exactly once, and bind everything that it reads and writes.
#[test]
fn slices_are_whole_and_bind_what_they_access() {
    let rng = &mut StdRng::seed_from_u64(5);
    let samples = Capabilities::samples();
    let (mut refused, mut cut, mut prefetching) = (0, 0, 0);
    for _ in 0..600 {
        let problem = random_problem(rng);
        let sample = &samples[rng.random_range(0..samples.len())];
        let capabilities = Capabilities {
            binding_bytes: 1 << rng.random_range(11..20),
            grid_dimension: [65535, 40][rng.random_range(0..2)],
            storage_buffers: 16,
            ..sample.clone()
        };
        let budget = [Duration::MAX, DISPATCH_BUDGET, Duration::from_micros(100), Duration::ZERO];
        let budget = budget[rng.random_range(0..4)];
        let vec4 = [problem.shape().head_dim, problem.shape().value_dim].iter().all(|width| width % 4 == 0);
        let optional =
            OptionalOperands { o_lo: false, row_max: rng.random_bool(0.5), ..OptionalOperands::for_training(&problem) };
        let micro_kernel = [MicroKernel::Portable, MicroKernel::Cooperative][rng.random_range(0..2)];
        let preference = Preference { micro_kernel, ..Preference::default() };
        let plans = [
            Plan::forward_with(&problem, OptionalOperands { scalar: !vec4, ..optional }, &capabilities, &preference),
            Plan::backward_with(&problem, OptionalOperands { scalar: !vec4, ..optional }, &capabilities, &preference),
        ];
        let merging = problem.merging(1 + problem.shape().seq_q % 5, problem.options().dtype, true).unwrap();
        let rest = OptionalOperands { o_lo: problem.options().dtype.has_rounding_error(), ..optional };
        let merge = Plan::merging(&merging, OptionalOperands { scalar: !vec4, ..rest }, &capabilities).unwrap();
        let plans = plans.into_iter().flatten().map(|plan| (&problem, plan));
        for (problem, plan) in plans.chain([(&merging, merge)]) {
            for pass in &plan.passes {
                let views = dense_views(problem, &plan.passes, pass);
                let slices = match pass.slices(problem, &views, &capabilities, budget) {
                    Ok(slices) => slices,
                    Err(Error::BindingTooLarge { bytes, limit, .. }) => {
                        assert!(bytes > limit);
                        refused += 1;
                        continue;
                    }
                    Err(error) => panic!("{problem}: {error}"),
                };
                for (binding, window) in slices.list.iter().flat_map(|slice| &slice.binding_ranges) {
                    assert!(window.len <= capabilities.binding_bytes && window.len % 4 == 0, "{binding:?}");
                    assert!(window.start.is_multiple_of(u64::from(capabilities.offset_alignment)));
                }
                cut += usize::from(slices.list.len() > 1);
                prefetching += usize::from(pass.variant.properties().prefetches_tiles && slices.list.len() > 1);
                let done = BTreeSet::new();
                Simulation { pass, problem, views: &views, slices: &slices, done }.run();
            }
        }
    }
    // Refused, cut and prefetching passes must all be common.
    assert!(refused > 100 && cut > 300 && prefetching > 50, "{refused} refused, {cut} cut, {prefetching} prefetching");
}

/// Masks with one row for all queries, in bindings that do not hold the masks of all heads.
#[test]
fn masks_of_keys_in_pieces() {
    let sample = Capabilities { binding_bytes: 1 << 13, ..Capabilities::samples()[0].clone() };
    for axes in [Axes::KEYS.heads(), Axes::KEYS.heads().seq_q()] {
        let shape = Shape { batch: 1, heads: 64, kv_heads: 2, seq_q: 100, seq_k: 300, head_dim: 4, value_dim: 4 };
        let problem = Problem::new(shape, Options::new().layout(Layout::Bhsd).mask(axes)).unwrap();
        let optional = OptionalOperands::for_training(&problem);
        let plan = Plan::forward_with(&problem, optional, &sample, &Preference::default()).unwrap();
        for pass in &plan.passes {
            let views = dense_views(&problem, &plan.passes, pass);
            let Ok(slices) = pass.slices(&problem, &views, &sample, Duration::ZERO) else { continue };
            assert!(slices.list.len() > 1);
            Simulation { pass, problem: &problem, views: &views, slices: &slices, done: BTreeSet::new() }.run();
        }
    }
}

#[test]
fn the_most_that_fits() {
    for end in 1..40 {
        for limit in 0..45 {
            assert_eq!(most(end, |n| n <= limit), limit.clamp(1, end), "{limit} of {end}");
        }
    }
}
