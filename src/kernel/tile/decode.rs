//! The share of a workgroup of the decode kernel.

use std::fmt;

use crate::device::capabilities::CooperativeMatrices;
use crate::kernel::micro_kernel::MicroKernel;
use crate::problem::cache::{CacheConfig, CacheKind};

/// The share of a workgroup of the decode kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DecodeTiles {
    /// Plain WGSL.
    Portable {
        /// Threads of a workgroup.
        threads: u32,
        /// Threads that share a key, a power of two from 4 to 32.
        lanes: u32,
        /// Rows (queries of the query heads of a group) of a workgroup.
        rows: u32,
        /// Keys that a thread loads at a time.
        steps: u32,
        /// Keys between two barriers, a divisor of `steps` and at most 4.
        exchanged: u32,
    },
    /// Cooperative matrices of f16: one query of the query heads of a group.
    Cooperative {
        /// Query heads of a workgroup, which is one subgroup: 8 or 16, at most the side of a fragment.
        rows: u32,
        /// Fragments of keys of a tile: 1, 2 or 4.
        columns: u32,
        /// Tiles that a lane loads at a time: 1 to 4.
        ahead: u32,
    },
}

/// Wider rows of fragments would not stay in registers.
const MOST_COOPERATIVE_WIDTH: usize = 128;

impl DecodeTiles {
    /// Rows of a workgroup.
    pub(crate) fn rows(&self) -> u32 {
        match *self {
            DecodeTiles::Portable { rows, .. } | DecodeTiles::Cooperative { rows, .. } => rows,
        }
    }

    /// Keys of a tile, with the fragments of the device.
    pub(crate) fn keys(&self, matrices: Option<CooperativeMatrices>) -> u32 {
        match *self {
            DecodeTiles::Portable { threads, lanes, steps, .. } => threads / lanes * steps,
            DecodeTiles::Cooperative { columns, .. } => columns * matrices.map_or(16, |matrices| matrices.side),
        }
    }

    /// The part of a kernel's name that depends on its tiles.
    pub(crate) fn name(&self) -> String {
        match self {
            DecodeTiles::Portable { threads, lanes, rows, steps, exchanged } => {
                format!("{threads}x{lanes}_r{rows}_s{steps}x{exchanged}")
            }
            DecodeTiles::Cooperative { rows, columns, ahead } => format!("cooperative_r{rows}_c{columns}_a{ahead}"),
        }
    }

    /// The micro-kernel of the tiles.
    pub(crate) fn micro_kernel(&self) -> MicroKernel {
        match self {
            DecodeTiles::Portable { .. } => MicroKernel::Portable,
            DecodeTiles::Cooperative { .. } => MicroKernel::Cooperative,
        }
    }

    /// The reason why the cooperative kernel cannot serve a cache, if it cannot.
    pub(crate) fn lacks(
        &self,
        config: &CacheConfig,
        several: bool,
        matrices: Option<CooperativeMatrices>,
    ) -> Option<String> {
        let Some(CooperativeMatrices { side, lanes, .. }) = matrices else {
            return Some("the device has no cooperative matrices".into());
        };
        let &DecodeTiles::Cooperative { rows, columns, ahead } = self else { return None };
        if ![8, 16].contains(&rows) || rows > side || ![1, 2, 4].contains(&columns) || !(1..=4).contains(&ahead) {
            return Some(format!(
                "rows are 8 or 16 and at most {side}, columns 1, 2 or 4, tiles ahead 1 to 4, not {rows}, {columns}, {ahead}"
            ));
        }
        let (keys, block) = (columns * side, config.kind.rows());
        let widths = [config.head_dim, config.value_dim];
        if several {
            return Some("it takes one query at a time".into());
        }
        if !config.dtype.is_matrix_operand() || config.quantisation.is_some() {
            return Some("it reads f16".into());
        }
        if widths.iter().any(|width| !width.is_multiple_of(16) || *width > MOST_COOPERATIVE_WIDTH) {
            let [d, e] = widths;
            return Some(format!("widths are multiples of 16 up to {MOST_COOPERATIVE_WIDTH}, not {d} and {e}"));
        }
        let shared = |width: usize| (width as u32 / 8 * keys).is_multiple_of(lanes);
        if lanes < rows || !(keys / 4).is_multiple_of(lanes / rows) || !widths.into_iter().all(shared) {
            let [d, e] = widths;
            return Some(format!("{lanes} lanes cannot share {rows} rows of {keys} keys of widths {d} and {e}"));
        }
        match config.kind {
            CacheKind::Rolling { .. } => Some("a ring's tiles are not rows that follow each other".into()),
            CacheKind::Contiguous { .. } if block < keys as usize => {
                Some(format!("a tile of {keys} keys is more than the cache's capacity, {block}"))
            }
            _ => None,
        }
    }
}

impl fmt::Display for DecodeTiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DecodeTiles::Portable { threads, lanes, rows, steps, exchanged } => {
                write!(f, "{threads}x{lanes} rows {rows}, steps {steps} by {exchanged}")
            }
            DecodeTiles::Cooperative { rows, columns, ahead } => {
                write!(f, "cooperative rows {rows}, columns {columns}, ahead {ahead}")
            }
        }
    }
}

/// Vectors of 16 bytes that a thread of the portable kernel holds: of a row of keys, and of a row of values.
pub(crate) fn lane_vectors(data_vectors: [u32; 2], lanes: u32) -> [u32; 2] {
    data_vectors.map(|vectors| vectors.div_ceil(lanes))
}

/// Distances in workgroup memory, in vectors of four f32: from row to row, from slot to slot, and the whole length. The last number is how
/// many rows are merged at a time. A thread holds `value_quads` quads of a row of values.
pub(crate) fn exchange(threads: u32, lanes: u32, rows: u32, exchanged: u32, value_quads: u32) -> [u32; 4] {
    let quarter = lanes / 4;
    // The row pitch is odd, so that the rows of a slot are in different banks. Slots are apart by the length of a row, modulo 8.
    let row_pitch = quarter | 1;
    let mut slot_pitch = rows * row_pitch;
    while slot_pitch % 8 != quarter % 8 {
        slot_pitch += 1;
    }
    let merged = value_quads * threads;
    let len = (exchanged * (threads / lanes) * slot_pitch).max(merged);
    [row_pitch, slot_pitch, len, (len / merged).min(rows)]
}

/// Bytes of workgroup memory of the cooperative kernel: staged keys and values, a tile of scores, and the P tile. Staged rows are padded by
/// two vectors of four halves, so that neighbours start in different banks.
pub(crate) fn cooperative_bytes(widths: [u32; 2], tile: u32, side: u32) -> u32 {
    let staged: u32 = widths.map(|width| 8 * (width / 4 + 2)).iter().sum();
    tile * staged + side * tile_row(tile) * (16 + 8)
}

/// Vectors of four from row to row of the score tile and of the P tile.
pub(crate) fn tile_row(tile: u32) -> u32 {
    tile.max(16) / 4 + 2
}
