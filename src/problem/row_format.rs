//! How a cache's rows lie: addresses, element types, blocks of quantised numbers; and the bounds of what a query sees of them.

use crate::problem::element::DType;

/// Where the rows of a sequence lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Addressing {
    Contiguous,
    Paged,
    Rolling,
}

/// A form of keys and values that takes less memory. They are quantised as they are appended (keys after their rotation), and are
/// f32 again as they are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Quantisation {
    /// Blocks of 32 neighbouring features with a scale in f16, and 8 bits for each feature: the largest size in the block is 127
    /// (llama.cpp's `q8_0`). A number is off by at most 1/254 of the largest one in its block, and by what rounding the scale
    /// to f16 makes of it, 1/2048 of the number. The scale reaches to sizes of 8.3e6; a block with a larger number, an infinity
    /// or a NaN is NaN. Rows are padded to whole blocks, and their scales to 16 bytes.
    Q8_0,
}

/// Elements of a quantised block, which share a scale.
pub(crate) const BLOCK: usize = 32;

/// How the numbers of a row lie, in vectors of 16 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct RowFormat {
    pub(crate) dtype: DType,
    pub(crate) quantisation: Option<Quantisation>,
}

impl RowFormat {
    /// Elements of a vector.
    pub(crate) fn elements(self) -> u32 {
        match self.quantisation {
            Some(Quantisation::Q8_0) => 16,
            None => 16 / self.dtype.bytes() as u32,
        }
    }

    /// Vectors of elements.
    pub(crate) fn vectors(self, width: usize) -> u32 {
        match self.quantisation {
            Some(Quantisation::Q8_0) => 2 * width.div_ceil(BLOCK) as u32,
            None => width.div_ceil(self.elements() as usize) as u32,
        }
    }

    /// The same with the scales behind them, two bytes for each block.
    pub(crate) fn row_vectors(self, width: usize) -> u32 {
        let scales = match self.quantisation {
            Some(Quantisation::Q8_0) => width.div_ceil(BLOCK).div_ceil(8) as u32,
            None => 0,
        };
        self.vectors(width) + scales
    }
}

/// How far queries see, in numbers that shaders count with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Bounds {
    pub(crate) left: i32,
    pub(crate) right: i32,
    pub(crate) sink_tokens: u32,
}

/// Farther than any position.
pub(crate) const UNBOUNDED: i32 = 1 << 30;
