//! The operands of kernels. Bindings, extents, element types and checks all follow from one table.

use crate::problem::element::{BufferType, DType};
use crate::problem::{Layout, MaskPacking, Options, Problem};

/// A width of operands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Width {
    /// D, of queries and keys.
    HeadDim,
    /// E, of values and outputs.
    ValueDim,
}

impl Width {
    pub(crate) fn of(self, [head_dim, value_dim]: [u32; 2]) -> u32 {
        match self {
            Width::HeadDim => head_dim,
            Width::ValueDim => value_dim,
        }
    }
}

/// The axes of an operand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Axes {
    /// `[batch, heads, seq_q, width]` in the options' layout.
    Queries(Width),
    /// `[batch, kv_heads, seq_k, width]` in the options' layout.
    Keys(Width),
    /// `[states * batch, heads, seq_q, E]` in the options' layout. The key axis of a merge's problem counts the states.
    States,
    /// `[states * batch, heads, seq_q]`.
    StateRows,
    /// `[batch, heads, seq_q]`.
    Rows,
    /// `[heads]`.
    Heads,
    /// [`Problem::bias_shape`].
    Bias,
    /// [`Problem::mask_shape`].
    Mask,
    /// A buffer of the crate's own, or of a cache.
    Own,
}

/// The element type of an operand's buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ElementOf {
    /// The element type of the problem.
    Problem,
    /// i16: the rounding error of numbers of the problem's element type.
    Rounding,
    /// f32.
    F32,
    /// The element type of the bias.
    Bias,
    /// Bytes, or words of 32 bits.
    Mask,
    /// Words of a caller's bits.
    Bits,
    /// Words that only kernels read.
    Words,
}

/// A line of the table of operands.
struct Row {
    name: &'static str,
    axes: Axes,
    element: ElementOf,
}

macro_rules! operands {
    ($($binding:ident = $slot:literal: $name:literal, $axes:expr, $element:ident;)*) => {
        /// Everything that a kernel may bind. The slot is the discriminant, and slots are never renumbered.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub(crate) enum Binding { $($binding = $slot,)* }

        impl Binding {
            fn row(self) -> Row {
                use Axes::*;
                use Width::*;
                match self {
                    $(Binding::$binding => Row { name: $name, axes: $axes, element: ElementOf::$element },)*
                }
            }
        }
    };
}

operands! {
    Params = 0: "params", Own, Words;
    Q = 1: "q", Queries(HeadDim), Problem;
    K = 2: "k", Keys(HeadDim), Problem;
    V = 3: "v", Keys(ValueDim), Problem;
    O = 4: "o", Queries(ValueDim), Problem;
    Lse = 5: "lse", Rows, F32;
    SinkLogits = 6: "sink_logits", Heads, F32;
    DO = 7: "d_o", Queries(ValueDim), Problem;
    DLse = 8: "d_lse", Rows, F32;
    DQ = 9: "d_q", Queries(HeadDim), Problem;
    DK = 10: "d_k", Keys(HeadDim), Problem;
    DV = 11: "d_v", Keys(ValueDim), Problem;
    DSinkLogits = 12: "d_sink_logits", Heads, F32;
    RowStats = 13: "row_stats", Own, Words;
    SinkPartials = 14: "sink_partials", Own, Words;
    Fallback = 15: "fallback", Own, Words;
    KeyScales = 16: "key_scales", Own, Words;
    QueryScales = 17: "query_scales", Own, Words;
    OLo = 18: "o_lo", Queries(ValueDim), Rounding;
    Bias = 19: "bias", Bias, Bias;
    Mask = 20: "mask", Mask, Mask;
    MaskBits = 21: "mask_bits", Own, Words;
    AlibiSlopes = 22: "alibi_slopes", Heads, F32;
    DSlopeRows = 23: "d_slope_rows", Own, Words;
    DBias = 24: "d_bias", Bias, F32;
    DAlibiSlopes = 25: "d_alibi_slopes", Heads, F32;
    Sequences = 26: "sequences", Own, Words;
    States = 27: "states", States, Problem;
    StatesLo = 28: "states_lo", States, Rounding;
    StatesLse = 29: "states_lse", StateRows, F32;
    CachedKeys = 30: "keys", Own, Words;
    CachedValues = 31: "values", Own, Words;
    CacheState = 32: "state", Own, Words;
    Tokens = 33: "tokens", Own, Words;
    Entries = 34: "entries", Own, Words;
    CosSin = 35: "cos_sin", Own, F32;
    Partials = 36: "partials", Own, Words;
    GatheredKeys = 37: "gathered_keys", Own, Words;
    GatheredValues = 38: "gathered_values", Own, Words;
    RowMax = 39: "row_max", Rows, F32;
    StatesRowMax = 40: "states_row_max", StateRows, F32;
    TreeMask = 41: "tree_mask", Own, Bits;
}

impl Binding {
    pub(crate) fn slot(self) -> u32 {
        self as u32
    }

    /// Name in shaders and errors.
    pub(crate) fn name(self) -> &'static str {
        self.row().name
    }

    /// Whether rows are as wide as those of q or v, and are read in vectors.
    pub(crate) fn has_width(self) -> bool {
        matches!(self.row().axes, Axes::Queries(_) | Axes::Keys(_) | Axes::States)
    }

    /// Whether the operand has rows of all states of a merge.
    pub(crate) fn has_states(self) -> bool {
        matches!(self.row().axes, Axes::States | Axes::StateRows)
    }

    /// Whether rows may have gaps between them.
    pub(crate) fn is_strided(self) -> bool {
        self.has_width() || matches!(self, Binding::Bias | Binding::Mask)
    }

    /// The width of rows, if they are read or written in vectors.
    pub(crate) fn width(self, widths: [u32; 2]) -> Option<u32> {
        match self.row().axes {
            Axes::Queries(width) | Axes::Keys(width) => Some(width.of(widths)),
            Axes::States => Some(Width::ValueDim.of(widths)),
            _ => None,
        }
    }

    /// The element type of the buffer. It follows from the options; `dtype` is that of operands with the problem's element type.
    pub(crate) fn element_type(self, dtype: DType, options: &Options) -> BufferType {
        match self.row().element {
            ElementOf::Problem => dtype.into(),
            ElementOf::Rounding => BufferType::I16,
            ElementOf::Bias => options.bias_dtype.into(),
            ElementOf::Mask => match options.mask_packing {
                MaskPacking::Bytes => BufferType::U8,
                MaskPacking::Bits => BufferType::U32,
            },
            ElementOf::Bits => BufferType::U32,
            ElementOf::F32 | ElementOf::Words => BufferType::F32,
        }
    }

    /// Extents of a caller's operand along batch, heads, sequence and width, its layout, and the bytes of an element.
    pub(crate) fn extents(self, problem: &Problem) -> ([usize; 4], Layout, usize) {
        let (s, options) = (problem.shape(), problem.options());
        let row = self.row();
        let element = match row.element {
            ElementOf::Problem | ElementOf::Rounding => options.dtype.bytes(),
            ElementOf::Bias => options.bias_dtype.bytes(),
            ElementOf::Mask if options.mask_packing == MaskPacking::Bytes => 1,
            _ => 4,
        };
        let width = |width: Width| width.of([s.head_dim, s.value_dim].map(|n| n as u32)) as usize;
        let states = s.seq_k * s.batch;
        let (extents, layout) = match row.axes {
            Axes::Queries(of) => ([s.batch, s.heads, s.seq_q, width(of)], options.layout),
            Axes::Keys(of) => ([s.batch, s.kv_heads, s.seq_k, width(of)], options.layout),
            Axes::States => ([states, s.heads, s.seq_q, s.value_dim], options.layout),
            Axes::StateRows => ([states, s.heads, s.seq_q, 1], Layout::Bhsd),
            Axes::Heads => ([1, 1, 1, s.heads], Layout::Bhsd),
            Axes::Bias => (problem.bias_shape().unwrap_or([1; 4]), Layout::Bhsd),
            Axes::Mask => (problem.mask_shape().unwrap_or([1; 4]), Layout::Bhsd),
            Axes::Rows | Axes::Own => ([s.batch, s.heads, s.seq_q, 1], Layout::Bhsd),
        };
        (extents, layout, element)
    }
}
