//! Operands: the place of their elements, and the bytes of a buffer that a dispatch binds. Pure functions of numbers.

use std::ops::Range;

use crate::device::capabilities::Capabilities;
use crate::kernel::spec::mask_blocks;
use crate::kernel::{Binding, DELTA_ROWS, MASK_READ_BEYOND};
use crate::plan::pass::{Pass, fallback_slots};
use crate::problem::error::{Error, Result};
use crate::problem::{Layout, Problem};

/// Bindings are whole words of this many bytes.
pub(crate) const WORD: u64 = 4;

/// Most elements of a window: shaders count in u32, and loops step beyond the end once.
const MOST_ELEMENTS: u64 = (1 << 32) - (1 << 16);

/// The place of an operand's elements in its buffer, counted in elements. The width axis is contiguous.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct OperandLayout {
    pub(crate) binding: Binding,
    pub(crate) offset: u64,
    /// Strides of batch, head and sequence.
    pub(crate) strides: [u64; 3],
    /// Extents along batch, head, sequence and width.
    pub(crate) extents: [u64; 4],
    /// Elements of a head behind its last row.
    pub(crate) tail: u64,
    /// Bytes of an element.
    pub(crate) element: u64,
}

/// The bytes of a buffer that a dispatch binds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BindingRange {
    pub(crate) start: u64,
    pub(crate) len: u64,
}

impl OperandLayout {
    /// An operand that is packed without gaps.
    pub(crate) fn dense(binding: Binding, extents: [usize; 4], layout: Layout, element: usize) -> Self {
        let [_, heads, seq, width] = extents;
        let strides = layout.strides(heads, seq, width);
        OperandLayout::new(binding, 0, strides, extents, element)
    }

    /// A size-1 axis is never stepped over, so its stride is set to 0 and ignored by every check.
    pub(crate) fn new(
        binding: Binding,
        offset: u64,
        mut strides: [u64; 3],
        extents: [usize; 4],
        element: usize,
    ) -> Self {
        for (stride, &extent) in strides.iter_mut().zip(&extents) {
            *stride = if extent == 1 { 0 } else { *stride };
        }
        OperandLayout { binding, offset, strides, extents: extents.map(|n| n as u64), tail: 0, element: element as u64 }
    }

    /// A run of elements that every dispatch binds as a whole.
    pub(crate) fn run(binding: Binding, elements: usize, element: usize) -> Self {
        OperandLayout::new(binding, 0, [0; 3], [1, 1, 1, elements], element)
    }

    /// Index of the last element.
    pub(crate) fn last_element(&self) -> u128 {
        let axes = (0..3).map(|axis| u128::from(self.strides[axis]) * u128::from(self.extents[axis] - 1));
        axes.sum::<u128>() + u128::from(self.offset) + u128::from(self.extents[3] + self.tail) - 1
    }

    /// Whether two results in one buffer have no element in common, as far as their strides and extents show it. Some axes are outer ones,
    /// along which both have the same strides. The two are apart if, within one step along the outer axes, one lies behind the other.
    pub(crate) fn is_apart_from(&self, other: &OperandLayout) -> bool {
        let extent_of = |view: &OperandLayout, along: &dyn Fn(usize) -> bool| {
            (0..3).filter(|axis| along(*axis)).map(|axis| view.strides[axis] * (view.extents[axis] - 1)).sum::<u64>()
        };
        (0..8u32).any(|set| {
            let is_outer = |axis: usize| set >> axis & 1 == 1;
            let mut outer: Vec<[u64; 2]> = (0..3)
                .filter(|axis| is_outer(*axis))
                .map(|axis| {
                    // The stride of a size-1 axis is 0, so that of the other result counts.
                    let strides = [self.strides[axis], other.strides[axis]].into_iter().max().unwrap_or(0);
                    [strides, self.extents[axis].max(other.extents[axis])]
                })
                .collect();
            let same = |axis: usize| {
                self.strides[axis] == other.strides[axis] || self.extents[axis] == 1 || other.extents[axis] == 1
            };
            let [own, its] = [self, other]
                .map(|view| [view.offset, view.offset + extent_of(view, &|axis| !is_outer(axis)) + view.extents[3]]);
            let apart = own[1] <= its[0] || its[1] <= own[0];
            outer.sort_unstable();
            // Each step along an outer axis must be at least as long as the elements within it.
            let mut span = own[1].max(its[1]) - own[0].min(its[0]);
            let nests = outer.iter().filter(|[_, extent]| *extent > 1).all(|[stride, extent]| {
                let fits = *stride >= span;
                span = span.saturating_add(stride.saturating_mul(extent - 1));
                fits
            });
            apart && nests && (0..3).filter(|axis| is_outer(*axis)).all(same)
        })
    }

    /// Whether rows can be read four neighbours at a time. Windows start at multiples of 16 bytes.
    pub(crate) fn vec4(&self) -> bool {
        self.reads_together(4)
    }

    /// As [`vec4`](Self::vec4), eight neighbours at a time. In half precision they are 16 bytes.
    pub(crate) fn vec8(&self) -> bool {
        self.reads_together(8)
    }

    fn reads_together(&self, neighbours: u64) -> bool {
        [self.offset, self.extents[3]].iter().chain(&self.strides).all(|n| n.is_multiple_of(neighbours))
    }

    /// First element within ranges of batch, heads and rows, and the element behind the last one.
    pub(crate) fn span(&self, ranges: [&Range<u64>; 3]) -> [u64; 2] {
        let corner = |index: fn(&Range<u64>) -> u64| {
            // A range along an axis that the operand does not have adds nothing, because its stride is 0.
            (0..3).map(|axis| self.strides[axis] * index(ranges[axis]).min(self.extents[axis] - 1)).sum::<u64>()
        };
        let [first, last] = [corner(|range| range.start), corner(|range| range.end - 1)];
        [self.offset + first, self.offset + last + self.extents[3] + self.tail]
    }

    /// The span of the whole operand.
    pub(crate) fn whole(&self) -> [u64; 2] {
        [self.offset, (self.last_element() + 1) as u64]
    }

    /// The window from one element to another. It is an error if the window is larger than the device allows.
    pub(crate) fn binding_range(&self, [first, end]: [u64; 2], capabilities: &Capabilities) -> Result<BindingRange> {
        let operand = self.binding.name();
        // Windows start at a multiple of the bytes that are loaded at once.
        let alignment = u64::from(capabilities.offset_alignment).max(16);
        let start = first * self.element / alignment * alignment;
        let bytes = (end * self.element).next_multiple_of(WORD) - start;
        let limit = capabilities.binding_bytes;
        if bytes > limit {
            return Err(Error::BindingTooLarge { operand, bytes, limit });
        }
        if bytes / self.element > MOST_ELEMENTS {
            let last_element = u128::from(bytes / self.element - 1);
            return Err(Error::IndexOverflow { operand, last_element, most: MOST_ELEMENTS - 1 });
        }
        Ok(BindingRange { start, len: bytes })
    }
}

/// Bytes of a mask in bits, with the classes of its blocks.
pub(crate) fn mask_scratch_bytes(problem: &Problem) -> u64 {
    (mask_bits(problem).last_element() as u64 + 1) * 4
}

/// The layout of a buffer of the crate's own, in which kernels leave data for each other. `None` for other operands.
pub(crate) fn scratch_view(binding: Binding, problem: &Problem, passes: &[Pass]) -> Option<OperandLayout> {
    let s = problem.shape();
    // Heads come first, so that the rows of a head, over the whole batch, are contiguous for sums.
    let rows = |seq: usize, element| {
        let strides = [seq, s.batch * seq, 1].map(|n| n as u64);
        OperandLayout::new(binding, 0, strides, [s.batch, s.heads, seq, 1], element)
    };
    let scales = |heads: usize, seq: usize| {
        OperandLayout::new(binding, 0, [heads * seq, seq, 1].map(|n| n as u64), [s.batch, heads, seq, 1], 8)
    };
    Some(match binding {
        // lse and delta. If matrices multiply, also the numbers that bring the row's weights within the range of f16.
        Binding::RowStats => {
            let bytes = if problem.options().dtype.multiplies_on_matrices() { 16 } else { 8 };
            rows(s.seq_q + usize::from(problem.options().alibi), bytes)
        }
        Binding::DSlopeRows => rows(s.seq_q, 4),
        Binding::SinkPartials => rows(s.seq_q.div_ceil(DELTA_ROWS as usize), 4),
        Binding::MaskBits => mask_bits(problem),
        Binding::Fallback => {
            let words = |pass: &Pass| {
                let words = pass.variant.report_words()? as usize;
                Some(fallback_slots(pass, problem).saturating_mul(words))
            };
            OperandLayout::run(binding, passes.iter().filter_map(words).max().unwrap_or(1), 4)
        }
        Binding::KeyScales => scales(s.kv_heads, s.seq_k),
        Binding::QueryScales => scales(s.heads, s.seq_q),
        _ => return None,
    })
}

/// The boolean mask's bits by rows of queries. Behind those of each head are the bits by rows of keys, and the classes of its blocks.
fn mask_bits(problem: &Problem) -> OperandLayout {
    let axes = problem.options().mask.unwrap_or_default();
    let [batch, heads, rows, keys] = axes.of(problem.pairs_shape());
    let [words, block_rows, groups] = mask_blocks(rows, keys);
    // If one row is for all queries, its bits are also those of the keys.
    let key_words = if rows > 1 { keys * block_rows } else { 0 };
    let tail = key_words + block_rows * groups;
    let head = rows * words + tail;
    let strides = [heads * head, head, words].map(|n| n as u64);
    let view = OperandLayout::new(Binding::MaskBits, 0, strides, [batch, heads, rows, words], 4);
    // A tile may read beyond the last key or query. The band hides these pairs.
    OperandLayout { tail: tail as u64 + MASK_READ_BEYOND, ..view }
}

/// The operands of a pass, if the caller's operands are densely packed.
pub(crate) fn dense_views(problem: &Problem, passes: &[Pass], pass: &Pass) -> Vec<OperandLayout> {
    let bindings = pass.variant.bindings().into_iter().map(|(binding, _)| binding);
    let own = bindings.filter(|binding| ![Binding::Params, Binding::Sequences].contains(binding));
    own.map(|binding| {
        scratch_view(binding, problem, passes).unwrap_or_else(|| {
            let (extents, layout, element) = binding.extents(problem);
            OperandLayout::dense(binding, extents, layout, element)
        })
    })
    .collect()
}
