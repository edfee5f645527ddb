//! The share of a workgroup of the decode kernel.

use std::fmt;

use crate::device::capabilities::CooperativeMatrices;
use crate::device::elements::Shares;
use crate::kernel::micro_kernel::MicroKernel;
use crate::problem::cache::{CacheConfig, CacheKind, RotaryPositions};
use crate::problem::element::DType;

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
    /// Cooperative matrices of f16 whose elements are computed with in registers: queries of the query heads of a group.
    Fragments {
        /// Subgroups that share the tiles of a split, a power of two.
        key_parts: u32,
        /// Subgroups that share the rows of a workgroup, a power of two.
        row_parts: u32,
        /// Rows of a subgroup: 8, or up to four times the side of a fragment.
        rows: u32,
        /// Fragments of keys of a tile: 1 or 2.
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
            DecodeTiles::Fragments { row_parts, rows, .. } => row_parts.saturating_mul(rows),
        }
    }

    /// Keys of a tile, with the fragments of the device.
    pub(crate) fn keys(&self, matrices: Option<CooperativeMatrices>) -> u32 {
        match *self {
            DecodeTiles::Portable { threads, lanes, steps, .. } => threads / lanes * steps,
            DecodeTiles::Cooperative { columns, .. } | DecodeTiles::Fragments { columns, .. } => {
                columns * matrices.map_or(16, |matrices| matrices.side)
            }
        }
    }

    /// The part of a kernel's name that depends on its tiles.
    pub(crate) fn name(&self) -> String {
        match self {
            DecodeTiles::Portable { threads, lanes, rows, steps, exchanged } => {
                format!("{threads}x{lanes}_r{rows}_s{steps}x{exchanged}")
            }
            DecodeTiles::Cooperative { rows, columns, ahead } => format!("cooperative_r{rows}_c{columns}_a{ahead}"),
            DecodeTiles::Fragments { key_parts, row_parts, rows, columns, ahead } => {
                format!("fragments_{key_parts}x{row_parts}_r{rows}_c{columns}_a{ahead}")
            }
        }
    }

    /// The micro-kernel of the tiles.
    pub(crate) fn micro_kernel(&self) -> MicroKernel {
        match self {
            DecodeTiles::Portable { .. } => MicroKernel::Portable,
            DecodeTiles::Cooperative { .. } => MicroKernel::Cooperative,
            DecodeTiles::Fragments { .. } => MicroKernel::Fragments,
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
        if self.micro_kernel().properties().needs_matrices && matrices.is_some_and(|matrices| matrices.guarded) {
            return Some("subgroups have several sizes, and no other kernel takes over where it gets another than it is built for".into());
        }
        let (rows, columns, ahead) = match *self {
            DecodeTiles::Portable { .. } => return None,
            DecodeTiles::Cooperative { rows, columns, ahead } => (rows, columns, ahead),
            DecodeTiles::Fragments { .. } => return self.fragments_lack(config, matrices?),
        };
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

    /// The reason why the kernel on fragments cannot serve a cache, if it cannot.
    fn fragments_lack(&self, config: &CacheConfig, matrices: CooperativeMatrices) -> Option<String> {
        let CooperativeMatrices { side, elements, .. } = matrices;
        let &DecodeTiles::Fragments { key_parts, row_parts, rows, columns, ahead } = self else { return None };
        let of_two = |n: u32| n.is_power_of_two() && n <= 16;
        let [fragments, rest] = [rows / side, rows % side];
        let has_rows = rows == 8 || (rest == 0 && (1..=4).contains(&fragments));
        if !of_two(key_parts) || !of_two(row_parts) || key_parts * row_parts > 16 || !has_rows {
            return Some(format!(
                "subgroups are powers of two and at most 16, rows 8 or one to four times {side}, not {key_parts}x{row_parts}, {rows}"
            ));
        }
        if ![1, 2].contains(&columns) || !(1..=4).contains(&ahead) {
            return Some(format!("columns are 1 or 2, tiles ahead 1 to 4, not {columns}, {ahead}"));
        }
        let Some(shares) = FragmentShares::new(matrices, [config.head_dim, config.value_dim]) else {
            let known = elements.map_or("no layout of elements", |_| "no layout of right operands");
            return Some(format!("the device has {known} that the kernel can use"));
        };
        if config.dtype != DType::F16 || config.quantisation.is_some() {
            return Some("it reads f16".into());
        }
        let [d, e] = [config.head_dim, config.value_dim];
        let most = MOST_COOPERATIVE_WIDTH;
        if shares.vectors.is_none() || d.max(e) > most {
            let [keys, values] = shares.steps;
            return Some(format!("widths are multiples of {keys} and {values} up to {most}, not {d} and {e}"));
        }
        if config.rotary.is_some_and(|rotary| rotary.positions == RotaryPositions::CacheRelative) {
            return Some("keys are rotated as they are read".into());
        }
        match config.kind {
            CacheKind::Contiguous { capacity } if capacity < (columns * side) as usize => {
                Some(format!("a tile of {} keys is more than the cache's capacity, {capacity}", columns * side))
            }
            _ => None,
        }
    }
}

/// How the lanes of a subgroup share keys and values, which they load as vectors of eight numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct FragmentShares {
    /// Of the rows and columns of right operands: those of K^T are features and keys, those of V are keys and features.
    pub(crate) rows: Shares,
    pub(crate) columns: Shares,
    /// Widths of keys and values that lanes can share are multiples of these.
    pub(crate) steps: [u32; 2],
    /// Vectors that a lane has of a key, and of a value, where it can share them.
    pub(crate) vectors: Option<[u32; 2]>,
}

impl FragmentShares {
    /// `None` where the device's layout is not known, or lanes have no quads of elements.
    pub(crate) fn new(matrices: CooperativeMatrices, widths: [usize; 2]) -> Option<Self> {
        let layout = matrices.elements.filter(|layout| layout.components().is_multiple_of(4))?;
        let [rows, columns] = [layout.right_shares(0)?, layout.right_shares(1)?];
        // Lanes whose parts differ have vectors of their own.
        let steps = [8 * rows.parts, 8 * columns.parts].map(|step| step.max(matrices.side));
        let [d, e] = widths.map(|width| width as u32);
        let fits = d > 0 && e > 0 && d.is_multiple_of(steps[0]) && e.is_multiple_of(steps[1]);
        let vectors = fits.then(|| [d / (8 * rows.parts), e / (8 * columns.parts)]);
        Some(FragmentShares { rows, columns, steps, vectors })
    }
}

/// Fragments of O that the subgroups of a workgroup exchange at a time: as many as take 16 KiB.
pub(crate) fn merged_fragments(subgroups: u32, fragments: u32, side: u32) -> u32 {
    (16384 / (4 * side * side * subgroups)).clamp(1, fragments.max(1))
}

/// Bytes of workgroup memory of the kernel on fragments.
pub(crate) fn fragments_bytes(key_parts: u32, row_parts: u32, rows: u32, value_dim: u32, side: u32) -> u32 {
    if key_parts == 1 {
        return 0;
    }
    let (subgroups, row_fragments) = (key_parts * row_parts, rows.div_ceil(side));
    let merged = merged_fragments(subgroups, row_fragments * value_dim / side, side);
    subgroups * (merged * side * side * 4 + row_fragments * side * 16)
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
            DecodeTiles::Fragments { key_parts, row_parts, rows, columns, ahead } => {
                write!(f, "fragments {key_parts}x{row_parts} rows {rows}, columns {columns}, ahead {ahead}")
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
