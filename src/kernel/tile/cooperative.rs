//! Tile shapes of the cooperative kernels, with their costs.

use std::fmt;

use crate::device::capabilities::CooperativeMatrices;
use crate::kernel::Kernel;
use crate::kernel::loops::LoopHints;
use crate::kernel::spec::{Tiled, Width};
use crate::kernel::tile::Tiling;
use crate::problem::element::DType;

/// How a workgroup divides a tile of the score matrix among its subgroups, in square fragments.
///
/// A tile has rows (queries, or keys in the d_k/d_v kernel) that stay, and columns (keys, or queries) that pass by. Every subgroup has
/// `rows` rows of fragments of its own, each `columns` fragments wide.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct CooperativeTile {
    /// Rows and columns of a fragment, and lanes of a subgroup.
    pub(crate) matrices: CooperativeMatrices,
    /// Subgroups of a workgroup.
    pub(crate) subgroups: u32,
    /// Rows of fragments of a subgroup.
    pub(crate) rows: u32,
    /// Columns of fragments of a tile.
    pub(crate) columns: u32,
    /// Tiles of columns in workgroup memory.
    pub(crate) stages: u32,
    /// Hints for the kernel's loops, for the driver.
    pub(crate) loops: LoopHints,
}

impl CooperativeTile {
    /// A tile shape on a device, and `None` for a portable one.
    pub(crate) fn new(tiling: Tiling, matrices: CooperativeMatrices) -> Option<Self> {
        match tiling {
            Tiling::Portable(_) => None,
            Tiling::Cooperative { subgroups, rows, columns, stages, loops } => {
                Some(CooperativeTile { matrices, subgroups, rows, columns, stages, loops })
            }
        }
    }

    pub(crate) fn tiling(&self) -> Tiling {
        let CooperativeTile { subgroups, rows, columns, stages, loops, .. } = *self;
        Tiling::Cooperative { subgroups, rows, columns, stages, loops }
    }

    /// Rows of a tile.
    pub(crate) fn tile_rows(&self) -> u32 {
        self.matrices.side * self.rows * self.subgroups
    }

    /// Columns of a tile.
    pub(crate) fn tile_columns(&self) -> u32 {
        self.matrices.side * self.columns
    }

    /// Threads of a workgroup.
    pub(crate) fn threads(&self) -> u32 {
        self.matrices.lanes * self.subgroups
    }

    /// Fragments across the features of an operand.
    pub(crate) fn across(&self, width: u32) -> u32 {
        width.div_ceil(self.matrices.side)
    }

    /// Vectors of four halves in a staged row of an operand. A row has two vectors more than its features, so that neighbouring rows start
    /// in different banks. The number is even, because fragment loads need multiples of 16 bytes.
    pub(crate) fn staged_row(&self, width: u32) -> u32 {
        self.across(width) * self.matrices.side / 4 + 2
    }

    /// Vectors of four floats in a row of scores, or of a fragment of an accumulator, in workgroup memory.
    pub(crate) fn score_row(&self) -> u32 {
        self.tile_columns() / 4 + 2
    }

    /// Vectors of four halves in a row of the P tile.
    pub(crate) fn p_row(&self) -> u32 {
        self.tile_columns() / 4 + 2
    }

    /// Bytes of workgroup memory, for the arrays of shaders/cooperative/fragments.wgsl.
    pub(crate) fn workgroup_bytes(&self, kernel: Kernel, dtype: DType, head_dim: u32, value_dim: u32) -> u32 {
        let staged = self.stages * self.tile_columns() * (self.staged_row(head_dim) + self.staged_row(value_dim)) * 8;
        let score_rows = self.subgroups * self.matrices.side * self.score_row() * 16;
        let p_tile = self.tile_rows() * self.p_row() * 8;
        let column_stats = self.stats_per_column(kernel, dtype) * self.stages * self.tile_columns() * 4;
        staged + score_rows + p_tile + column_stats
    }

    /// Numbers that are staged with each column: the shifts by lse and delta of a query, and the inverse token scales.
    pub(crate) fn stats_per_column(&self, kernel: Kernel, dtype: DType) -> u32 {
        let row_stats = if kernel.spec().work.rows_are_keys() { 2 } else { 0 };
        let scales = match (dtype.needs_token_scales(), kernel.tiled().is_some_and(|tiled| tiled.softmax)) {
            (true, true) => 3,
            (true, false) => 2,
            (false, _) => 0,
        };
        row_stats + scales
    }

    /// 32-bit registers that a lane's share of the fragments takes, roughly.
    pub(crate) fn registers(&self, kernel: Kernel, head_dim: u32, value_dim: u32) -> u32 {
        let CooperativeMatrices { side, lanes, .. } = self.matrices;
        let (halves, floats) = (side * side / 2 / lanes, side * side / lanes);
        let across = |widths: &[Width]| widths.iter().map(|width| self.across(width.of([head_dim, value_dim]))).sum();
        let [operands, accumulators]: [u32; 2] =
            kernel.tiled().map_or([0; 2], |tiled| [across(tiled.products), across(tiled.accumulators)]);
        self.rows * (operands * halves + (accumulators + 2 * self.columns) * floats) + 40
    }

    /// Loop iterations of a thread for an open and a masked tile, at most: every tile may rescale.
    pub(crate) fn loop_iterations(&self, tiled: &Tiled, head_dim: u32, value_dim: u32) -> [u64; 2] {
        let quads = (self.matrices.side / 4).div_ceil(self.matrices.lanes / self.matrices.side);
        let widths = tiled.accumulators.iter().map(|width| width.of([head_dim, value_dim]));
        let fragments = widths.map(|width| self.across(width)).sum::<u32>();
        let rescale = 2 + self.rows * fragments * (1 + quads);
        // The work before and after the tiles, divided by the number of tiles, is less than this.
        let once = self.rows * (self.across(head_dim) + self.across(value_dim)) * (1 + quads);
        [u64::from(1 + rescale + once); 2]
    }

    /// Checks that the numbers fit together. An error says why they do not.
    pub(crate) fn check(&self) -> Result<(), String> {
        let CooperativeMatrices { side, lanes, .. } = self.matrices;
        if ![8, 16].contains(&side) || ![1, 2, 4].iter().any(|n| n * side == lanes) {
            return Err(format!("{lanes} lanes cannot share fragments of {side}x{side}"));
        }
        for (what, value, most) in [
            ("subgroups", self.subgroups, 32),
            ("rows", self.rows, 4),
            ("columns", self.columns, 8),
            ("stages", self.stages, 2),
        ] {
            if value == 0 || value > most {
                return Err(format!("{what} must be 1 to {most}, not {value}"));
            }
        }
        if !(self.tile_columns() / 4).is_multiple_of(lanes / side) {
            return Err(format!("{} columns cannot be shared by {} lanes a row", self.tile_columns(), lanes / side));
        }
        Ok(())
    }
}

impl fmt::Display for CooperativeTile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let CooperativeMatrices { side, lanes, .. } = self.matrices;
        let [rows, columns] = [self.tile_rows(), self.tile_columns()];
        write!(
            f,
            "{rows}x{columns} ({} subgroups of {lanes}, {}x{} fragments of {side}x{side}, {} in workgroup memory)",
            self.subgroups, self.rows, self.columns, self.stages
        )?;
        self.loops.write_after(f)
    }
}
