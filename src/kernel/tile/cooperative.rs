//! Tile shapes of the cooperative kernels, with their costs.

use std::fmt;

use minijinja::{Value, context};

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
    /// Columns of fragments whose scores are in registers at a time, where rows of scores do not go through workgroup memory.
    pub(crate) chunk: Option<u32>,
    /// Hints for the kernel's loops, for the driver.
    pub(crate) loops: LoopHints,
}

impl CooperativeTile {
    /// A tile shape on a device, and `None` for a portable one.
    pub(crate) fn new(tiling: Tiling, matrices: CooperativeMatrices) -> Option<Self> {
        match tiling {
            Tiling::Portable(_) => None,
            Tiling::Cooperative { subgroups, rows, columns, stages, loops } => {
                Some(CooperativeTile { matrices, subgroups, rows, columns, stages, chunk: None, loops })
            }
            Tiling::Fragments { subgroups, rows, columns, chunk, loops } => {
                Some(CooperativeTile { matrices, subgroups, rows, columns, stages: 1, chunk: Some(chunk), loops })
            }
        }
    }

    pub(crate) fn tiling(&self) -> Tiling {
        let CooperativeTile { matrices: _, subgroups, rows, columns, stages, chunk, loops } = *self;
        match chunk {
            None => Tiling::Cooperative { subgroups, rows, columns, stages, loops },
            Some(chunk) => Tiling::Fragments { subgroups, rows, columns, chunk, loops },
        }
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

    /// Columns of fragments whose scores a lane computes with at a time.
    pub(crate) fn column_fragments(&self) -> u32 {
        self.chunk.unwrap_or(self.columns)
    }

    /// Vectors of four floats in a row of scores, or of a fragment of an accumulator, in workgroup memory. Split numbers leave less room, and
    /// one vector more than a fragment's row has is enough. A fragment's rows have a vector for each row of a subgroup's flags.
    pub(crate) fn score_row(&self, dtype: DType) -> u32 {
        let side = self.matrices.side;
        match self.chunk {
            Some(_) if dtype.is_split_on_matrices() => (side / 4 + 1).max(self.rows),
            Some(_) => side / 4 + 2,
            None => self.tile_columns() / 4 + 2,
        }
    }

    /// Vectors of four halves in a row of the P tile, or of the one fragment that operands are loaded by.
    pub(crate) fn p_row(&self) -> u32 {
        let columns = if self.chunk.is_some() { self.matrices.side } else { self.tile_columns() };
        columns / 4 + 2
    }

    /// Vectors of four halves of the P tile. Where scores stay in registers it only serves to load the rows' own operands, a fragment of each
    /// subgroup at a time, and there is none if the first staged operand, whose rows are `head_dim` wide, has the room.
    pub(crate) fn p_tile(&self, dtype: DType, head_dim: u32) -> u32 {
        if self.chunk.is_none() {
            return self.tile_rows() * self.p_row();
        }
        let loaded = self.subgroups * self.matrices.side * self.p_row();
        if dtype.matrix_parts() * self.tile_columns() * self.staged_row(head_dim) >= loaded { 0 } else { loaded }
    }

    /// Bytes of workgroup memory, for the arrays of shaders/cooperative/fragments.wgsl.
    pub(crate) fn workgroup_bytes(&self, kernel: Kernel, dtype: DType, head_dim: u32, value_dim: u32) -> u32 {
        let staged_rows = dtype.matrix_parts() * (self.staged_row(head_dim) + self.staged_row(value_dim));
        let staged = self.stages * self.tile_columns() * staged_rows * 8;
        let score_rows = self.subgroups * self.matrices.side * self.score_row(dtype) * 16;
        let p_tile = self.p_tile(dtype, head_dim) * 8;
        let column_stats = self.stats_per_column(kernel, dtype) * self.stages * self.tile_columns() * 4;
        staged + score_rows + p_tile + column_stats
    }

    /// Whether bf16 is multiplied as itself. Else it is converted to f16, with a scale for each token.
    pub(crate) fn multiplies_bf16(&self, dtype: DType) -> bool {
        dtype == DType::Bf16 && self.chunk.is_some() && self.matrices.bf16.is_some()
    }

    /// Numbers that are staged with each column: the shifts by lse and delta of a query, and the inverse token scales.
    pub(crate) fn stats_per_column(&self, kernel: Kernel, dtype: DType) -> u32 {
        let row_stats = if kernel.spec().work.rows_are_keys() { 2 } else { 0 };
        let staged_scales = if self.stages_scales(kernel, dtype) { 2 } else { 0 };
        let has_scales = dtype.needs_token_scales() && !self.multiplies_bf16(dtype);
        let scales = match (has_scales, kernel.tiled().is_some_and(|tiled| tiled.softmax)) {
            (true, true) => 3,
            (true, false) => 2,
            (false, _) => 0,
        };
        row_stats + scales + staged_scales
    }

    /// Whether the token scales of the next tile wait in workgroup memory, and not in the registers of all lanes, of which few are left in d_kv
    /// where a driver holds operands twice (RDNA3).
    pub(crate) fn stages_scales(&self, kernel: Kernel, dtype: DType) -> bool {
        let has_scales = dtype.needs_token_scales() && !self.multiplies_bf16(dtype);
        self.matrices.guarded && has_scales && kernel.spec().work.rows_are_keys() && self.stages == 1
    }

    /// 32-bit registers that a lane's share of the fragments takes, roughly.
    pub(crate) fn registers(&self, kernel: Kernel, dtype: DType, head_dim: u32, value_dim: u32) -> u32 {
        let CooperativeMatrices { side, lanes, .. } = self.matrices;
        let (halves, floats) = (side * side / 2 / lanes, side * side / lanes);
        let across = |widths: &[Width]| widths.iter().map(|width| self.across(width.of([head_dim, value_dim]))).sum();
        let [operands, accumulators]: [u32; 2] =
            kernel.tiled().map_or([0; 2], |tiled| [across(tiled.products), across(tiled.accumulators)]);
        let parts = dtype.matrix_parts();
        self.rows * (operands * parts * halves + (accumulators + 2 * parts * self.column_fragments()) * floats) + 40
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
        if let Some(chunk) = self.chunk {
            return self.check_chunk(chunk);
        }
        if !(self.tile_columns() / 4).is_multiple_of(lanes / side) {
            return Err(format!("{} columns cannot be shared by {} lanes a row", self.tile_columns(), lanes / side));
        }
        Ok(())
    }
}

impl CooperativeTile {
    fn check_chunk(&self, chunk: u32) -> Result<(), String> {
        let CooperativeMatrices { side, lanes, elements, .. } = self.matrices;
        let Some(elements) = elements else {
            return Err("the device has no layout of the elements of fragments".into());
        };
        if elements.components() * lanes != side * side {
            return Err(format!("{elements} are not those of fragments of {side}x{side} and subgroups of {lanes}"));
        }
        if chunk == 0 || !self.columns.is_multiple_of(chunk) {
            return Err(format!("{} columns of fragments have no chunks of {chunk}", self.columns));
        }
        let columns = elements.columns().len() as u32;
        if !(chunk * columns).is_multiple_of(4) {
            return Err(format!("{columns} elements of a row in each of {chunk} fragments are no quads"));
        }
        Ok(())
    }

    /// Checks that a tile is one chunk where the kernel takes no other, and that a word of a mask has the bits of a chunk's lanes.
    pub(crate) fn check_kernel(&self, kernel: Kernel, has_mask: bool) -> Result<(), String> {
        let Some(chunk) = self.chunk else { return Ok(()) };
        let is_one = !kernel.tiled().is_some_and(|tiled| tiled.softmax);
        if is_one && chunk != self.columns {
            return Err(format!("{} takes tiles of one chunk, not of {}", kernel.name(), self.columns / chunk));
        }
        // Their bits are taken from one word.
        let columns = self.matrices.elements.map_or(4, |elements| elements.columns().len() as u32);
        let span = self.matrices.side * 4 / columns;
        if has_mask && span > 32 {
            return Err(format!("four columns of a lane lie among {span}, and a word of a mask has 32"));
        }
        Ok(())
    }
}

impl CooperativeTile {
    /// Rows and columns of scores that a lane computes with, as quads, for the templates. Where columns are reordered, those of a quad are
    /// neighbours.
    pub(crate) fn lane_context(&self, reorders: bool) -> Value {
        let CooperativeMatrices { side, lanes, elements, .. } = self.matrices;
        let fragments = self.column_fragments();
        let Some(layout) = elements.filter(|_| self.chunk.is_some()) else {
            // A row of a fragment is shared by neighbouring lanes, a quad each.
            let sharing = lanes / side;
            let rows: Vec<u32> = (0..self.rows).collect();
            return context! {
                lane_rows => self.rows,
                rows_a_lane => 1,
                row_fragment => rows.clone(),
                row_offsets => rows.iter().map(|row| row * side).collect::<Vec<_>>(),
                row_lanes => [1u32, 2].into_iter().filter(|mask| *mask < sharing).collect::<Vec<_>>(),
                lane_quads => fragments * side / 4 / sharing,
                quad_offsets => (0..fragments * side / 4 / sharing).map(|n| 4 * n * sharing).collect::<Vec<_>>(),
            };
        };
        let (rows, columns) = (layout.rows(), layout.columns());
        // The columns of a lane's row of the chunk: the fragment, and the place among the lane's columns of it.
        let places: Vec<(u32, usize)> =
            (0..fragments).flat_map(|fragment| (0..columns.len()).map(move |place| (fragment, place))).collect();
        let column = |(fragment, place): (u32, usize)| fragment * side + columns[place];
        let quads: Vec<&[(u32, usize)]> = places.chunks(4).collect();
        let lane_rows = || (0..self.rows).flat_map(|fragment| rows.iter().map(move |row| (fragment, *row)));
        let quad_elements = |row: usize| {
            let component = |&(fragment, place): &(u32, usize)| (fragment, layout.component(row, place));
            quads.iter().map(|quad| quad.iter().map(component).collect::<Vec<_>>()).collect::<Vec<_>>()
        };
        // Of each component: the lane's row, the quad and the element of it.
        let element_quads = |fragment: u32| {
            let of = |component: u32| {
                let all =
                    (0..rows.len()).flat_map(|row| places.iter().enumerate().map(move |(n, place)| (row, n, *place)));
                let found = all
                    .clone()
                    .find(|(row, _, (of, place))| *of == fragment && layout.component(*row, *place) == component);
                found.map_or((0, 0, 0), |(row, n, _)| (row, n / 4, n % 4))
            };
            (0..layout.components()).map(of).collect::<Vec<_>>()
        };
        context! {
            lane_rows => lane_rows().count(),
            rows_a_lane => rows.len(),
            row_fragment => lane_rows().map(|(fragment, _)| fragment).collect::<Vec<_>>(),
            row_offsets => lane_rows().map(|(fragment, row)| fragment * side + row).collect::<Vec<_>>(),
            row_lanes => layout.row_lanes(),
            lane_quads => quads.len(),
            quad_offsets => quads.iter().map(|quad| column(quad[0])).collect::<Vec<_>>(),
            // Places in the stage of a quad's columns, from its first one on.
            place_steps => quads[0].iter().map(|place| column(*place) - column(quads[0][0])).collect::<Vec<_>>(),
            quad_steps => quads[0].iter().zip(0..).map(|(place, n)| if reorders { n } else { column(*place) - column(quads[0][0]) }).collect::<Vec<_>>(),
            columns_at => (0..self.tile_columns()).map(|place| layout.column_at(side, place)).collect::<Vec<_>>(),
            quad_elements => (0..rows.len()).map(quad_elements).collect::<Vec<_>>(),
            element_quads => (0..fragments).map(element_quads).collect::<Vec<_>>(),
            components => layout.components(),
            elements => context! {
                row => layout.expression(0),
                column => if reorders { layout.quad_expression() } else { layout.expression(1) },
                place => layout.expression(1),
                column_at => reorders.then(|| layout.column_at_expression(side, "place", None)),
            },
        }
    }
}

impl fmt::Display for CooperativeTile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let CooperativeMatrices { side, lanes, .. } = self.matrices;
        let [rows, columns] = [self.tile_rows(), self.tile_columns()];
        write!(
            f,
            "{rows}x{columns} ({} subgroups of {lanes}, {}x{} fragments of {side}x{side}, {})",
            self.subgroups,
            self.rows,
            self.columns,
            match self.chunk {
                None => format!("{} in workgroup memory", self.stages),
                Some(chunk) => format!("scores of {} columns in registers", chunk * side),
            }
        )?;
        self.loops.write_after(f)
    }
}
