//! Tile shapes of the portable kernels, with their costs.

use std::fmt;
use std::str::FromStr;

use crate::kernel::Kernel;
use crate::kernel::loops::LoopHints;
use crate::kernel::spec::Tiled;

/// How a workgroup divides a tile of the score matrix among its threads.
///
/// A tile has rows (queries, or keys in the d_k/d_v kernel) that stay, and columns (keys, or queries)
/// that pass by. Threads form a grid of `threads_r` by `threads_c`; each holds `rows` rows by
/// 4 * `quads` columns of the scores, and its share of the features of those rows' accumulators.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PortableTile {
    /// Threads along the rows, a multiple of 2.
    pub threads_r: u32,
    /// Threads along the columns, a multiple of 4. They also run along the features of the accumulators.
    pub threads_c: u32,
    /// Rows a thread holds.
    pub rows: u32,
    /// Groups of four columns a thread holds.
    pub quads: u32,
    /// Features of both sides staged at once for a product, divided by four.
    pub k_step: u32,
    /// Columns staged at once for an accumulation, a divisor of the tile's columns.
    pub n_step: u32,
    /// Hints for the kernel's loops, for the driver.
    pub loops: LoopHints,
}

impl PortableTile {
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
        let product = (rows + columns) * (self.k_step + 1);
        let widths = kernel.tiled().map_or([0; 2], |tiled| tiled.accumulator_widths(head_dim, value_dim));
        let n_step_row =
            self.threads_c * widths.map(|width| self.accumulator_quads(width)).into_iter().fold(0, u32::max);
        let accumulation = rows * (columns / 4 + 1) + self.n_step * n_step_row;
        let has = |property: fn(&Tiled) -> bool| kernel.tiled().is_some_and(property);
        let partials = if has(|tiled| tiled.sums_rows) { rows * self.threads_c } else { 0 };
        // A kernel of a bias gradient sums rows here.
        let sums = if has(|tiled| tiled.sums_pairs) { self.threads() * self.quads } else { 0 };
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
        let scores = kernel.tiled().map_or(0, Tiled::score_tiles) * self.rows * self.quads * 4;
        let widths = kernel.tiled().map_or([0; 2], |tiled| tiled.accumulator_widths(head_dim, value_dim));
        let accumulators: u32 = widths.iter().map(|&width| self.rows * self.accumulator_quads(width) * 4).sum();
        scores + accumulators + 6 * self.rows + 40
    }

    /// Feature quads in one iteration of a product's inner loop.
    pub(crate) fn unroll(&self) -> u32 {
        if self.k_step.is_multiple_of(2) { 2 } else { 1 }
    }

    /// Loop iterations of a thread for one tile of columns: if the tile is wholly visible, and at most if it is masked. The loops are those
    /// of shaders/portable/blocks.wgsl.
    pub(crate) fn loop_iterations(&self, tiled: &Tiled, head_dim: u32, value_dim: u32) -> [u64; 2] {
        let product = |width: u32| width.div_ceil(4).div_ceil(self.k_step) * (1 + self.k_step / self.unroll());
        // Four columns are summed at once, or one by one if hidden values are not finite.
        [self.n_step / 4, self.n_step].map(|n_step| {
            let accumulation = self.tile_columns() / self.n_step * (1 + n_step);
            let products = tiled.products.iter().map(|width| product(width.of([head_dim, value_dim]))).sum::<u32>();
            let tile = products + tiled.accumulators.len() as u32 * accumulation;
            u64::from(1 + tile)
        })
    }

    /// Checks that the numbers fit together. An error says why they do not.
    pub(crate) fn check(&self) -> Result<(), String> {
        // Far above anything useful, and low enough that no product of these numbers overflows.
        let numbers = [
            ("threads_r", self.threads_r, 1024),
            ("threads_c", self.threads_c, 1024),
            ("rows", self.rows, 64),
            ("quads", self.quads, 64),
            ("k_step", self.k_step, 64),
            ("n_step", self.n_step, 1024),
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
        if !self.tile_columns().is_multiple_of(self.n_step) || !self.n_step.is_multiple_of(4) {
            return Err(format!(
                "n_step ({}) must be a multiple of 4 that divides {}",
                self.n_step,
                self.tile_columns()
            ));
        }
        Ok(())
    }
}

impl fmt::Display for PortableTile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}x{} ({}x{} threads of {}x{}), k_step {}, n_step {}",
            self.tile_rows(),
            self.tile_columns(),
            self.threads_r,
            self.threads_c,
            self.rows,
            self.quads * 4,
            self.k_step * 4,
            self.n_step,
        )?;
        self.loops.write_after(f)
    }
}

/// Parses the text that [`Display`](fmt::Display) writes.
impl FromStr for PortableTile {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let failed = |reason: String| format!("tiles {text:?}: {reason}");
        let form = "want a form like \"64x32 (16x8 threads of 4x4), k_step 32, n_step 16\"";
        let (shape, loops) = LoopHints::split_from(text).map_err(|reason| format!("tiles {reason}"))?;
        let words = shape.split(|c: char| !c.is_ascii_digit()).filter(|word| !word.is_empty());
        let numbers: Result<Vec<u32>, _> =
            words.map(|word| word.parse::<u32>().map_err(|e| format!("{word}: {e}"))).collect();
        let [_, _, threads_r, threads_c, rows, columns, k_step, n_step] = numbers.map_err(failed)?[..] else {
            return Err(failed(form.into()));
        };
        let tiles = PortableTile {
            threads_r,
            threads_c,
            rows,
            quads: columns / 4,
            k_step: k_step / 4,
            n_step,
            loops: LoopHints::NONE,
        };
        tiles.check().map_err(failed)?;
        // The text states the tile's size twice, and counts of vectors as multiples of four.
        if tiles.to_string() == shape {
            Ok(PortableTile { loops, ..tiles })
        } else {
            Err(failed(format!("{form}; these numbers give \"{tiles}\"")))
        }
    }
}
