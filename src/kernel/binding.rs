//! What kernels bind.

/// Everything a kernel may bind. The slot is the discriminant; slots are never renumbered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Binding {
    Params = 0,
    Q = 1,
    K = 2,
    V = 3,
    O = 4,
    Lse = 5,
    SinkLogits = 6,
    DO = 7,
    DLse = 8,
    DQ = 9,
    DK = 10,
    DV = 11,
    DSinkLogits = 12,
    RowStats = 13,
    SinkPartials = 14,
    Fallback = 15,
    KeyScales = 16,
    QueryScales = 17,
    OLo = 18,
    Bias = 19,
    Mask = 20,
    MaskBits = 21,
    AlibiSlopes = 22,
    AlibiMoments = 23,
    DBias = 24,
    DAlibiSlopes = 25,
    Sequences = 26,
    States = 27,
    StatesLo = 28,
    StatesLse = 29,
}

impl Binding {
    pub(crate) fn slot(self) -> u32 {
        self as u32
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Binding::Params => "params",
            Binding::Q => "q",
            Binding::K => "k",
            Binding::V => "v",
            Binding::O => "o",
            Binding::Lse => "lse",
            Binding::SinkLogits => "sink_logits",
            Binding::DO => "d_o",
            Binding::DLse => "d_lse",
            Binding::DQ => "d_q",
            Binding::DK => "d_k",
            Binding::DV => "d_v",
            Binding::DSinkLogits => "d_sink_logits",
            Binding::RowStats => "row_stats",
            Binding::SinkPartials => "sink_partials",
            Binding::Fallback => "fallback",
            Binding::KeyScales => "key_scales",
            Binding::QueryScales => "query_scales",
            Binding::OLo => "o_lo",
            Binding::Bias => "bias",
            Binding::Mask => "mask",
            Binding::MaskBits => "mask_bits",
            Binding::AlibiSlopes => "alibi_slopes",
            Binding::AlibiMoments => "alibi_moments",
            Binding::DBias => "d_bias",
            Binding::DAlibiSlopes => "d_alibi_slopes",
            Binding::Sequences => "sequences",
            Binding::States => "states",
            Binding::StatesLo => "states_lo",
            Binding::StatesLse => "states_lse",
        }
    }

    /// Whether it is of the problem's element type, its rows as wide as those of q or v.
    pub(crate) fn has_width(self) -> bool {
        use Binding::{DK, DO, DQ, DV, K, O, OLo, Q, States, StatesLo, V};
        matches!(self, Q | K | V | O | OLo | DO | DQ | DK | DV | States | StatesLo)
    }

    /// Whether its rows may have gaps between them.
    pub(crate) fn is_strided(self) -> bool {
        self.has_width() || matches!(self, Binding::Bias | Binding::Mask)
    }

    /// Width of an operand of the problem's element type, whose rows are read or written in vectors.
    pub(crate) fn width(self, [head_dim, value_dim]: [u32; 2]) -> Option<u32> {
        match self {
            Binding::Q | Binding::K | Binding::DQ | Binding::DK => Some(head_dim),
            Binding::V | Binding::O | Binding::OLo | Binding::DO | Binding::DV => Some(value_dim),
            Binding::States | Binding::StatesLo => Some(value_dim),
            _ => None,
        }
    }
}
