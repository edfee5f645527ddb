//! Tile shapes of the portable kernels, what they cost, and the tuning table.

use std::fmt;
use std::str::FromStr;

use crate::capabilities::{Capabilities, DeviceClass};
use crate::plan::Pass;
use crate::problem::Problem;
use crate::shader::Kernel;
use crate::tuning::MaskClass;

/// How a workgroup divides a tile of the score matrix among its threads.
///
/// A tile has rows (queries, or keys in the d_k/d_v kernel) that stay, and columns (keys, or queries)
/// that pass by. Threads form a grid of `threads_r` by `threads_c`; each holds `rows` rows by
/// 4 * `quads` columns of the scores, and its share of the features of those rows' accumulators.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Tiles {
    /// Threads along the rows, a multiple of 2.
    pub threads_r: u32,
    /// Threads along the columns, a multiple of 4; also along the features of the accumulators.
    pub threads_c: u32,
    /// Rows a thread holds.
    pub rows: u32,
    /// Groups of four columns a thread holds.
    pub quads: u32,
    /// Features of both sides staged at once for a product, divided by four.
    pub chunk: u32,
    /// Columns staged at once for an accumulation; divides the tile's columns.
    pub slab: u32,
}

impl Tiles {
    /// Rows of a tile.
    pub fn tile_rows(&self) -> u32 {
        self.threads_r * self.rows
    }

    /// Columns of a tile.
    pub fn tile_columns(&self) -> u32 {
        self.threads_c * self.quads * 4
    }

    /// Threads of a workgroup.
    pub fn threads(&self) -> u32 {
        self.threads_r * self.threads_c
    }

    /// Groups of four features of an accumulator that a thread holds.
    fn accumulator_quads(&self, width: u32) -> u32 {
        width.div_ceil(4).div_ceil(self.threads_c.max(1))
    }

    /// Vectors of four in `memory` and numbers in `partials`, the workgroup arrays of shaders/portable/blocks.wgsl.
    pub(crate) fn arrays(&self, kernel: Kernel, head_dim: u32, value_dim: u32) -> [u32; 2] {
        let [rows, columns] = [self.tile_rows(), self.tile_columns()];
        let product = (rows + columns) * (self.chunk + 1);
        let widths = kernel.accumulator_widths(head_dim, value_dim);
        let slab_row = self.threads_c * widths.map(|width| self.accumulator_quads(width)).into_iter().fold(0, u32::max);
        let accumulation = rows * (columns / 4 + 1) + self.slab * slab_row;
        let partials = if matches!(kernel, Kernel::Forward | Kernel::ExactDelta) { rows * self.threads_c } else { 0 };
        // Where the rows of a bias are summed.
        let sums = if kernel == Kernel::DBias { self.threads() * self.quads } else { 0 };
        [product.max(accumulation).max(sums), partials]
    }

    /// Bytes of workgroup memory.
    pub fn workgroup_bytes(&self, kernel: Kernel, head_dim: u32, value_dim: u32) -> u32 {
        // The flag `poisoned` takes a slot of its own.
        let [memory, partials] = self.arrays(kernel, head_dim, value_dim);
        16 * (memory + partials.div_ceil(4) + 1)
    }

    /// 32-bit registers that the accumulators and the operands in flight take, roughly.
    pub fn registers(&self, kernel: Kernel, head_dim: u32, value_dim: u32) -> u32 {
        let scores = kernel.score_tiles() * self.rows * self.quads * 4;
        let widths = kernel.accumulator_widths(head_dim, value_dim);
        let accumulators: u32 = widths.iter().map(|&width| self.rows * self.accumulator_quads(width) * 4).sum();
        scores + accumulators + 6 * self.rows + 40
    }

    /// Feature quads in one iteration of a product's inner loop.
    pub(crate) fn unroll(&self) -> u32 {
        if self.chunk.is_multiple_of(2) { 2 } else { 1 }
    }

    /// Loop iterations of a thread for one tile of columns that is wholly visible, and at most for one that is masked:
    /// the loops of shaders/portable/blocks.wgsl.
    pub(crate) fn loop_iterations(&self, kernel: Kernel, head_dim: u32, value_dim: u32) -> [u64; 2] {
        let product = |width: u32| width.div_ceil(4).div_ceil(self.chunk) * (1 + self.chunk / self.unroll());
        // Column by column where values that are hidden and not finite stand in the way, else four at once.
        [self.slab / 4, self.slab].map(|slab| {
            let accumulation = self.tile_columns() / self.slab * (1 + slab);
            let tile = match kernel {
                Kernel::Forward => product(head_dim) + accumulation,
                Kernel::ExactDelta | Kernel::DBias => product(head_dim) + product(value_dim),
                Kernel::DQ => product(head_dim) + product(value_dim) + accumulation,
                _ => product(head_dim) + product(value_dim) + 2 * accumulation,
            };
            u64::from(1 + tile)
        })
    }

    /// Whether the numbers fit together; the reason where they do not.
    pub(crate) fn check(&self) -> Result<(), String> {
        // Far above anything useful, and low enough that no product of these numbers overflows.
        let numbers = [
            ("threads_r", self.threads_r, 1024),
            ("threads_c", self.threads_c, 1024),
            ("rows", self.rows, 64),
            ("quads", self.quads, 64),
            ("chunk", self.chunk, 64),
            ("slab", self.slab, 1024),
        ];
        if let Some((name, number, most)) = numbers.into_iter().find(|&(_, n, most)| n == 0 || n > most) {
            return Err(format!("{name} ({number}) must lie between 1 and {most}"));
        }
        if self.threads() > 1024 {
            return Err(format!("{} threads, the most is 1024", self.threads()));
        }
        if !self.threads_c.is_multiple_of(4) || !self.threads_r.is_multiple_of(2) {
            return Err(format!(
                "threads must be a multiple of 2 by one of 4, not {}x{}",
                self.threads_r, self.threads_c
            ));
        }
        if !self.tile_columns().is_multiple_of(self.slab) || !self.slab.is_multiple_of(4) {
            return Err(format!("slab ({}) must be a multiple of 4 that divides {}", self.slab, self.tile_columns()));
        }
        Ok(())
    }
}

impl fmt::Display for Tiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}x{} ({}x{} threads of {}x{}), chunk {}, slab {}",
            self.tile_rows(),
            self.tile_columns(),
            self.threads_r,
            self.threads_c,
            self.rows,
            self.quads * 4,
            self.chunk * 4,
            self.slab,
        )
    }
}

/// From what [`Display`](fmt::Display) writes.
impl FromStr for Tiles {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let failed = |reason: String| format!("tiles {text:?}: {reason}");
        let form = "want a form like \"64x32 (16x8 threads of 4x4), chunk 32, slab 16\"";
        let words = text.split(|c: char| !c.is_ascii_digit()).filter(|word| !word.is_empty());
        let numbers: Result<Vec<u32>, _> =
            words.map(|word| word.parse::<u32>().map_err(|e| format!("{word}: {e}"))).collect();
        let [_, _, threads_r, threads_c, rows, columns, chunk, slab] = numbers.map_err(failed)?[..] else {
            return Err(failed(form.into()));
        };
        let tiles = Tiles { threads_r, threads_c, rows, quads: columns / 4, chunk: chunk / 4, slab };
        tiles.check().map_err(failed)?;
        // The size of the tile is told twice, and multiples of four are told whole.
        if tiles.to_string() == text {
            Ok(tiles)
        } else {
            Err(failed(format!("{form}; these numbers give \"{tiles}\"")))
        }
    }
}

/// A row of the tuning table: tiles, and the problems they are good for.
struct Candidate {
    tiles: Tiles,
    /// Widest accumulators, all of a row taken together, that stay in registers.
    width: u32,
    /// Fewest rows that fill a tile well enough.
    seq: usize,
}

const fn candidate(threads: [u32; 2], thread: [u32; 2], chunk: u32, slab: u32, width: u32, seq: usize) -> Candidate {
    let [threads_r, threads_c] = threads;
    let [rows, quads] = thread;
    Candidate { tiles: Tiles { threads_r, threads_c, rows, quads, chunk, slab }, width, seq }
}

/// Measured on an NVIDIA H200, see benches/results/; each row falls back to the next where it does not fit.
const FORWARD: [Candidate; 9] = [
    candidate([16, 8], [4, 1], 8, 16, 64, 33),
    candidate([32, 8], [4, 2], 8, 16, 128, 65),
    candidate([16, 8], [4, 1], 8, 16, 128, 33),
    candidate([8, 8], [4, 1], 8, 16, 128, 1),
    candidate([16, 16], [4, 1], 8, 16, 256, 33),
    candidate([4, 16], [4, 1], 4, 8, 256, 1),
    LESS,
    WIDE,
    LEAST,
];

const D_Q: [Candidate; 9] = [
    candidate([16, 8], [8, 1], 8, 16, 64, 65),
    candidate([16, 16], [8, 1], 8, 16, 128, 65),
    candidate([16, 8], [4, 1], 8, 16, 128, 33),
    candidate([8, 8], [4, 1], 8, 16, 128, 1),
    candidate([16, 16], [4, 1], 8, 16, 256, 33),
    candidate([4, 16], [4, 1], 4, 8, 256, 1),
    LESS,
    WIDE,
    LEAST,
];

const D_KV: [Candidate; 9] = [
    candidate([16, 16], [4, 2], 8, 16, 256, 33),
    candidate([8, 16], [4, 1], 8, 16, 256, 1),
    candidate([8, 16], [4, 1], 8, 8, 256, 1),
    candidate([16, 16], [4, 1], 8, 16, 512, 33),
    candidate([4, 16], [4, 1], 4, 8, 512, 1),
    // For narrow windows.
    candidate([8, 8], [4, 1], 8, 16, 128, 1),
    LESS,
    WIDE,
    LEAST,
];

/// A software driver runs the threads of a workgroup one after the other, a vector at a time.
const SOFTWARE: [Candidate; 5] =
    [candidate([8, 8], [4, 1], 4, 16, 256, 1), candidate([4, 16], [4, 1], 4, 8, 512, 1), LESS, WIDE, LEAST];

/// For the widest heads.
const WIDE: Candidate = candidate([8, 16], [2, 1], 4, 4, u32::MAX, 1);
/// Fits 16 KiB of workgroup memory and 64 threads for widths to 256 ...
const LESS: Candidate = candidate([8, 8], [2, 1], 4, 8, 256, 1);
/// ... and for every width.
const LEAST: Candidate = candidate([8, 8], [2, 1], 4, 4, u32::MAX, 1);

/// Tiles to try for a kernel, the best first; one of them fits every WebGPU device.
pub(crate) fn candidates(kernel: Kernel, problem: &Problem, class: DeviceClass) -> Vec<Tiles> {
    let shape = problem.shape();
    let width: u32 = kernel.accumulator_widths(shape.head_dim as u32, shape.value_dim as u32).iter().sum();
    let [seq_q, seq_k] = problem.longest();
    let seq = if kernel == Kernel::DKv { seq_k } else { seq_q };
    let table: &[Candidate] = match (class, kernel) {
        (DeviceClass::Software, _) => &SOFTWARE,
        (_, Kernel::DQ | Kernel::ExactDelta | Kernel::DBias) => &D_Q,
        (_, Kernel::DKv) => &D_KV,
        _ => &FORWARD,
    };
    let fitting = table.iter().filter(|c| width <= c.width && seq >= c.seq);
    let mut candidates: Vec<Tiles> = fitting.map(|c| c.tiles).collect();
    if MaskClass::of(problem) == Some(MaskClass::Window) {
        let band = problem.reach() as u32;
        candidates.sort_by(|a, b| a.window_cost(band).total_cmp(&b.window_cost(band)));
    }
    candidates
}

/// Registers a thread, by [`Tiles::registers`], above which tiles are not worth a measurement: the most that GPUs have
/// is 256, and the estimate leaves out addresses.
const MOST_REGISTERS: u32 = 232;

impl Tiles {
    /// Tiles worth measuring for a kernel of a problem on a device: the built-in table, its first choice first, then
    /// neighbours of what it holds, the nearest first. All fit the device's limits; those of the kernels without tiles
    /// are none.
    pub(crate) fn candidates(kernel: Kernel, problem: &Problem, vec4: bool, capabilities: &Capabilities) -> Vec<Tiles> {
        if !kernel.has_tiles() {
            return Vec::new();
        }
        let shape = problem.shape();
        let fits = |tiles: &Tiles| Pass::with_tiles(kernel, problem, vec4, capabilities, *tiles).is_ok();
        let mut found: Vec<Tiles> = Vec::new();
        for tiles in candidates(kernel, problem, capabilities.class) {
            if !found.contains(&tiles) && fits(&tiles) {
                found.push(tiles);
            }
        }
        let built_in = found.len();
        // Two steps away from the first choice, one from the others.
        let mut index = 0;
        while index < built_in || (index < found.len() && index < 3 * built_in) {
            for tiles in found[index].neighbours() {
                if !found.contains(&tiles)
                    && tiles.threads() >= 32
                    && fits(&tiles)
                    && tiles.registers(kernel, shape.head_dim as u32, shape.value_dim as u32) <= MOST_REGISTERS
                {
                    found.push(tiles);
                }
            }
            index += 1;
        }
        found
    }

    /// Each number doubled and halved; such as do not fit together among them.
    fn neighbours(self) -> impl Iterator<Item = Tiles> {
        const NUMBERS: [fn(&mut Tiles) -> &mut u32; 6] = [
            |t| &mut t.rows,
            |t| &mut t.threads_r,
            |t| &mut t.quads,
            |t| &mut t.threads_c,
            |t| &mut t.chunk,
            |t| &mut t.slab,
        ];
        NUMBERS.into_iter().flat_map(move |number| {
            [true, false].map(|double| {
                let mut tiles = self;
                let number = number(&mut tiles);
                *number = if double { *number * 2 } else { *number / 2 };
                tiles
            })
        })
    }

    /// What a visible key costs under a band of keys: the area of the tiles visited, by that of the band, times what an
    /// element of a tile takes.
    fn window_cost(&self, band: u32) -> f32 {
        let [rows, columns, band] = [self.tile_rows(), self.tile_columns(), band.max(1)].map(|n| n as f32);
        let [thread_rows, thread_columns] = [self.rows, 4 * self.quads].map(|n| n as f32);
        // Of the inner loops, which are bound by reads from workgroup memory; thread tiles above 4x4 gain nothing.
        let inner = (2.0 / thread_rows + 2.0 / thread_columns).max(1.0);
        // Of reads from global memory, a seventh of the time at 64x32 (both in benches/results/).
        let global = 3.5 / rows + 3.5 / columns;
        (band + rows + columns) / band * (inner + global)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::problem::{Options, Shape, SinkLogits, Window};

    fn problem(seq: usize, width: usize, options: Options) -> Problem {
        let shape =
            Shape { batch: 1, heads: 8, kv_heads: 2, seq_q: seq, seq_k: seq, head_dim: width, value_dim: width };
        Problem::new(shape, options.sink_logits(SinkLogits::PerHead)).unwrap()
    }

    const KERNELS: [Kernel; 3] = [Kernel::Forward, Kernel::DQ, Kernel::DKv];

    #[test]
    fn candidates_fit_and_differ() {
        let causal = Options::new().causal(true);
        for device in Capabilities::samples() {
            for kernel in KERNELS {
                for (seq, width, options) in [
                    (8192, 64, causal),
                    (8192, 128, causal),
                    (8192, 64, causal.window(Window::keys(128))),
                    (300, 80, causal),
                    (1, 256, causal),
                ] {
                    let problem = problem(seq, width, options);
                    let found = Tiles::candidates(kernel, &problem, true, &device);
                    let plan = crate::Plan::forward(&problem, true, &device).unwrap();
                    assert!(kernel != Kernel::Forward || plan.passes[0].variant.tiling == Some(found[0].into()));
                    assert!(found.len() > 5, "{}: {kernel:?} {problem}: {found:?}", device.name);
                    for (index, tiles) in found.iter().enumerate() {
                        Pass::with_tiles(kernel, &problem, true, &device, *tiles).unwrap();
                        assert!(!found[..index].contains(tiles));
                        assert_eq!(tiles.to_string().parse(), Ok(*tiles));
                    }
                }
                assert_eq!(Tiles::candidates(Kernel::Delta, &problem(9, 4, causal), true, &device), []);
            }
        }
    }

    /// Wide tiles visit much that a narrow window hides.
    #[test]
    fn narrow_windows_have_smaller_tiles() {
        let causal = Options::new().causal(true);
        let h200 = &Capabilities::samples()[0];
        for (kernel, window, smaller) in [(Kernel::DKv, 128, true), (Kernel::DQ, 128, true), (Kernel::DKv, 2048, false)]
        {
            let first = |options| candidates(kernel, &problem(8192, 64, options), h200.class)[0];
            let area = |tiles: Tiles| tiles.tile_rows() * tiles.tile_columns();
            let (long, narrow) = (first(causal), first(causal.window(Window::keys(window))));
            assert_eq!(area(narrow) < area(long), smaller, "{kernel:?} {window}: {narrow} and {long}");
        }
    }
}
