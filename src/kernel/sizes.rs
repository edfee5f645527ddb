//! Sizes that host and shaders agree on.

/// Rows of a workgroup of the delta kernel, the threads that load one row together, and the feature quads that each loads at a time.
pub(crate) const DELTA_ROWS: u32 = 32;
pub(crate) const DELTA_LANES: u32 = 8;
pub(crate) const DELTA_STEPS: u32 = 4;
/// Threads of a workgroup of a kernel that moves rows of a cache. The widest row has as many quads.
pub(crate) const ROW_THREADS: u32 = 128;
/// Rows of a block of a boolean mask, and its words of 32 keys. A block has one class.
pub(crate) const MASK_BLOCK_ROWS: u32 = 32;
pub(crate) const MASK_BLOCK_WORDS: u32 = 2;
/// Blocks whose classes share a word.
pub(crate) const MASK_GROUP: u32 = 16;
/// Words of a row that are packed at a time.
pub(crate) const MASK_STEP_WORDS: u32 = 8;
/// Words that kernels may read behind the last row of a mask's bits, and the rows or columns of a tile that these words stand for.
pub(crate) const MASK_READ_BEYOND: u64 = 512;
pub(crate) const MASK_TILE: u64 = 32 * MASK_READ_BEYOND;
/// Words of a sequence in the table that kernels read.
pub(crate) const SEQUENCE_WORDS: u32 = 11;

/// Words of a report of a tile: one says whether the tile has rows to compute again, and the others have a bit for each row.
pub(crate) fn report_words(rows: u32) -> u32 {
    1 + rows.div_ceil(32)
}
