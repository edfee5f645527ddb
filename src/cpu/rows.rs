//! A densely packed host operand as rows of its last axis.

use crate::problem::varlen::Sequence;
use crate::problem::{Layout, Problem};

/// A side of the score matrix.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Side {
    Queries,
    Keys,
}

impl Side {
    pub(super) fn other(self) -> Self {
        match self {
            Side::Queries => Side::Keys,
            Side::Keys => Side::Queries,
        }
    }
}

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

    /// The rows of one head from a position on. There are none at the end of the data, where an empty sequence may begin.
    #[inline]
    pub(super) fn head(&self, b: usize, h: usize, start: usize) -> Head<'a> {
        let [batch, head, seq] = self.strides;
        let data = self.data.get(b * batch + h * head + start * seq..).unwrap_or_default();
        Head { data, stride: seq, width: self.width }
    }

    #[inline]
    pub(super) fn row(&self, b: usize, h: usize, i: usize) -> &'a [f32] {
        self.head(b, h, i).row(0)
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

    /// The rows of `range`. Each slice has at least the width of a row.
    #[inline(always)]
    pub(super) fn rows(&self, range: std::ops::Range<usize>) -> impl Iterator<Item = &'a [f32]> + use<'a> {
        self.data[range.start * self.stride..].chunks(self.stride).take(range.len())
    }

    pub(super) fn width(&self) -> usize {
        self.width
    }

    /// Whether the rows of `range` hold neither NaN nor infinity.
    pub(super) fn is_finite(&self, range: std::ops::Range<usize>) -> bool {
        // The largest exponent, compared as an integer: without branches, so that it vectorises.
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
    let place = rows(layout, heads, seq);
    data.chunks_exact_mut(width).enumerate().map(move |(n, row)| (place(n), row))
}

/// Batch, head and position of a row, by its number in the order of memory.
pub(super) fn rows(layout: Layout, heads: usize, seq: usize) -> impl Fn(usize) -> [usize; 3] {
    move |n| {
        let (b, n) = (n / (heads * seq), n % (heads * seq));
        match layout {
            Layout::Bshd | Layout::Thd => [b, n % heads, n / heads],
            Layout::Bhsd => [b, n / seq, n % seq],
        }
    }
}

/// The sequence of a row of an operand, and the row's place in that sequence.
pub(super) struct Places {
    /// Sequence and place of each token, where sequences follow each other without a batch axis.
    tokens: Option<Vec<[usize; 2]>>,
}

impl Places {
    pub(super) fn new(problem: &Problem, side: Side) -> Self {
        let place = |(number, sequence): (usize, Sequence)| {
            let rows = match side {
                Side::Queries => sequence.q_rows,
                Side::Keys => sequence.k_rows,
            };
            (0..rows).map(move |i| [number, i])
        };
        let is_thd = problem.options().layout == Layout::Thd;
        Places { tokens: is_thd.then(|| problem.sequences().enumerate().flat_map(place).collect()) }
    }

    /// Sequence and place of position i of batch entry b.
    pub(super) fn find(&self, b: usize, i: usize) -> [usize; 2] {
        self.tokens.as_ref().map_or([b, i], |tokens| tokens[i])
    }
}
