//! A densely packed host operand, seen as rows of its last axis.

use crate::problem::Layout;

/// Rows of `width` elements, addressed by batch, head and position in either layout.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    data: &'a [f32],
    strides: [usize; 3],
    width: usize,
}

impl<'a> Rows<'a> {
    pub(super) fn new(data: &'a [f32], layout: Layout, heads: usize, seq: usize, width: usize) -> Self {
        Rows { data, strides: layout.strides(heads, seq, width).map(|s| s as usize), width }
    }

    /// The rows of one head of one sequence.
    #[inline]
    pub(super) fn head(&self, b: usize, h: usize) -> Head<'a> {
        let [batch, head, seq] = self.strides;
        Head { data: &self.data[b * batch + h * head..], stride: seq, width: self.width }
    }

    #[inline]
    pub(super) fn row(&self, b: usize, h: usize, i: usize) -> &'a [f32] {
        self.head(b, h).row(i)
    }
}

/// The rows of one head of one sequence.
#[derive(Clone, Copy)]
pub(super) struct Head<'a> {
    data: &'a [f32],
    stride: usize,
    width: usize,
}

impl<'a> Head<'a> {
    #[inline(always)]
    pub(super) fn row(&self, i: usize) -> &'a [f32] {
        &self.data[i * self.stride..][..self.width]
    }

    /// Rows `range`, each at least as long as it is wide.
    #[inline(always)]
    pub(super) fn rows(&self, range: std::ops::Range<usize>) -> impl Iterator<Item = &'a [f32]> + use<'a> {
        self.data[range.start * self.stride..].chunks(self.stride).take(range.len())
    }

    pub(super) fn width(&self) -> usize {
        self.width
    }

    /// Whether the rows of `range` hold neither NaN nor infinity.
    pub(super) fn is_finite(&self, range: std::ops::Range<usize>) -> bool {
        // The largest exponent, as integers: branch-free, so that it vectorises.
        const INFINITY: u32 = f32::INFINITY.to_bits();
        range
            .into_iter()
            .all(|i| self.row(i).iter().fold(0, |most, x| most.max(x.to_bits() & (u32::MAX >> 1))) < INFINITY)
    }
}

/// Splits an output into its rows, each with its (batch, head, position), in the order of memory.
pub(super) fn rows_mut(
    data: &mut [f32],
    layout: Layout,
    heads: usize,
    seq: usize,
    width: usize,
) -> impl Iterator<Item = ([usize; 3], &mut [f32])> {
    data.chunks_exact_mut(width).enumerate().map(move |(n, row)| {
        let (b, n) = (n / (heads * seq), n % (heads * seq));
        let (h, i) = match layout {
            Layout::Bshd | Layout::Thd => (n % heads, n / heads),
            Layout::Bhsd => (n / seq, n % seq),
        };
        ([b, h, i], row)
    })
}
