//! What is kept of the past.

use std::ops::Range;

use sink_attention::cache::{CacheConfig, CacheKind, Rotary, RotaryPositions, RotaryStyle};

use crate::model::{HEAD_DIM, KV_HEADS, KV_ROW, ROTARY_DIM};

/// What a cache gives up, and when.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Policy {
    /// The first tokens and the last ones are kept.
    Sinks,
    /// The last ones are.
    Window,
    /// All are, until the cache is full.
    Full,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// Last tokens that a query sees, its own included.
    pub window: usize,
    /// First tokens that [`Policy::Sinks`] keeps.
    pub sink_tokens: usize,
    /// Tokens of the cache of [`Policy::Full`].
    pub capacity: usize,
}

impl Policy {
    pub const ALL: [Policy; 3] = [Policy::Sinks, Policy::Window, Policy::Full];

    pub fn name(self) -> &'static str {
        match self {
            Policy::Sinks => "sinks",
            Policy::Window => "window",
            Policy::Full => "full",
        }
    }

    /// The cache. Rolling ones count positions by their places in it, as StreamingLLM does: those never grow beyond it,
    /// however long the stream, and neither does the table of cosines and sines.
    pub fn config(self, settings: &Settings) -> CacheConfig {
        let &Settings { window, sink_tokens, capacity } = settings;
        let (kind, positions) = match self {
            Policy::Sinks => (CacheKind::Rolling { sink_tokens, window, queries: 1 }, RotaryPositions::CacheRelative),
            Policy::Window => {
                (CacheKind::Rolling { sink_tokens: 0, window, queries: 1 }, RotaryPositions::CacheRelative)
            }
            Policy::Full => (CacheKind::Contiguous { capacity }, RotaryPositions::Absolute),
        };
        let rotary = Rotary { dim: ROTARY_DIM as u32, style: RotaryStyle::HalfSplit, positions };
        CacheConfig::new(kind, 1, KV_HEADS, HEAD_DIM).rotary(rotary)
    }

    /// Tokens that the cache holds at most, which are as many positions.
    pub fn most_keys(self, settings: &Settings) -> usize {
        match self {
            Policy::Sinks => settings.sink_tokens + settings.window,
            Policy::Window => settings.window,
            Policy::Full => settings.capacity,
        }
    }

    /// The tokens before which it ends.
    pub fn end(self, settings: &Settings) -> usize {
        if self == Policy::Full { settings.capacity } else { usize::MAX }
    }

    /// What the query of a token sees: first tokens, then last ones.
    pub fn visible(self, settings: &Settings, token: usize) -> [Range<usize>; 2] {
        let kept = match self {
            Policy::Sinks => settings.sink_tokens,
            Policy::Window => 0,
            Policy::Full => return [0..0, 0..token + 1],
        };
        let first = (token + 1).saturating_sub(settings.window);
        [0..kept.min(first), first..token + 1]
    }
}

/// Bytes of so many tokens' keys and values.
pub fn bytes(tokens: usize) -> u64 {
    (2 * tokens * KV_ROW * size_of::<f32>()) as u64
}
