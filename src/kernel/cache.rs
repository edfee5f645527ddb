//! Declarations that the kernels of caches share.

use std::collections::BTreeMap;

use minijinja::{Value, context};

use crate::device::capabilities::CooperativeMatrices;
use crate::kernel::binding::Binding;
use crate::kernel::tile::decode::DecodeTiles;
use crate::problem::SinkLogits;
use crate::problem::cache::{CacheConfig, Rotary, RotaryPositions, RotaryStyle};
use crate::problem::row_format::{Addressing, RowFormat};

/// The options that the pipeline of a kernel of caches fixes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct CacheOptions {
    pub(crate) addressing: Addressing,
    pub(crate) format: RowFormat,
    pub(crate) head_dim: u32,
    pub(crate) value_dim: u32,
    /// The caller's operands are read and written four neighbours at a time.
    pub(crate) vec4: bool,
    pub(crate) rotary: Option<Rotary>,
    /// A list chooses the sequences.
    pub(crate) indexed: bool,
    /// Appending: queries are rotated in place.
    pub(crate) rotates_q: bool,
    /// Appending: the new rows go behind the gathered ones, and not into the cache.
    pub(crate) gathered: bool,
    /// Decoding: several queries of a sequence.
    pub(crate) several: bool,
    /// Decoding: a mask among the new tokens.
    pub(crate) tree: bool,
    pub(crate) softcap: bool,
    pub(crate) alibi: bool,
    pub(crate) sink_logits: SinkLogits,
    /// Decoding and combining: the largest score of each row is a result.
    pub(crate) row_max: bool,
    /// Decoding: the share of a workgroup.
    pub(crate) tiles: Option<DecodeTiles>,
    /// Decoding and combining: keys of a tile.
    pub(crate) tile: u32,
    pub(crate) matrices: Option<CooperativeMatrices>,
}

impl CacheOptions {
    /// Options of a kernel that moves rows of a cache.
    pub(crate) fn new(config: &CacheConfig, vec4: bool) -> Self {
        CacheOptions {
            addressing: config.addressing(),
            format: config.format(),
            head_dim: config.head_dim as u32,
            value_dim: config.value_dim as u32,
            vec4,
            rotary: None,
            indexed: false,
            rotates_q: false,
            gathered: false,
            several: false,
            tree: false,
            softcap: false,
            alibi: false,
            sink_logits: SinkLogits::None,
            row_max: false,
            tiles: None,
            tile: 0,
            matrices: None,
        }
    }

    /// Whether keys are rotated as they are read.
    pub(crate) fn is_relative(&self) -> bool {
        self.rotary.is_some_and(|rotary| rotary.positions == RotaryPositions::CacheRelative)
    }

    pub(crate) fn is_quantised(&self) -> bool {
        self.format.quantisation.is_some()
    }

    /// The format of gathered rows, which have the cache's element type and are not quantised.
    pub(crate) fn gathered_format(&self) -> RowFormat {
        RowFormat { quantisation: None, ..self.format }
    }

    /// Numbers in a vector of 16 bytes, counted in quads.
    pub(crate) fn vector_quads(&self) -> u32 {
        self.format.elements() / 4
    }

    /// Vectors of 16 bytes that hold the numbers of a row of keys, and of a row of values.
    pub(crate) fn data_vectors(&self) -> [u32; 2] {
        [self.head_dim, self.value_dim].map(|width| self.format.vectors(width as usize))
    }

    /// Threads of the append kernel that share a row.
    pub(crate) fn append_lanes(&self) -> u32 {
        let padded = self.format.vectors(self.head_dim.max(self.value_dim) as usize) * self.vector_quads();
        padded.max(2).next_power_of_two()
    }

    /// The part of a kernel's name that depends on its options.
    pub(crate) fn name(&self, kernel: &str) -> String {
        let tiles = self.tiles.map_or(String::new(), |tiles| format!("_{}", tiles.name()));
        let tile = if self.tiles.is_none() && self.tile > 0 { format!("_{}", self.tile) } else { String::new() };
        let addressing = format!("{:?}", self.addressing).to_lowercase();
        let RowFormat { dtype, quantisation } = self.format;
        let quantised = quantisation.map_or(String::new(), |kind| format!("_{kind:?}").to_lowercase());
        let rotary = self.rotary.map_or(String::new(), |Rotary { dim, style, positions }| {
            format!("_rotary{dim}_{style:?}_{positions:?}").to_lowercase()
        });
        let sinks = match self.sink_logits {
            SinkLogits::None => "",
            SinkLogits::OffByOne => "_offbyone",
            SinkLogits::PerHead => "_sinks",
        };
        let flags: String = [
            ("_q", self.rotates_q),
            ("_gathered", self.gathered),
            ("_several", self.several),
            ("_tree", self.tree),
            ("_softcap", self.softcap),
            ("_alibi", self.alibi),
            ("_scalar", !self.vec4),
            ("_indexed", self.indexed),
            ("_row_max", self.row_max),
        ]
        .into_iter()
        .filter_map(|(part, is_there)| is_there.then_some(part))
        .collect();
        let [d, e] = [self.head_dim, self.value_dim];
        format!("cache_{kernel}{tiles}{tile}_{addressing}_{dtype}{quantised}_d{d}_e{e}{rotary}{sinks}{flags}")
    }

    /// The type of a buffer that belongs to the cache. A kernel reads rows as vectors of 16 bytes, and writes them as its threads share them.
    pub(crate) fn buffer_type(&self, binding: Binding, access: Access) -> Option<&'static str> {
        let half = self.format.dtype.is_half();
        Some(match binding {
            Binding::CachedKeys | Binding::CachedValues => match (self.is_quantised(), half, access) {
                (false, _, Access::Rows) => "array<vec4<u32>>",
                (true, _, Access::Rows | Access::Quads) => "array<u32>",
                (false, false, _) => "array<vec4<f32>>",
                (_, _, Access::Vectors) => "array<vec4<u32>>",
                (false, true, Access::Quads) => "array<vec2<u32>>",
                // Rows of the element type, written behind the gathered rows.
                (_, true, Access::GatheredQuads) => "array<vec2<u32>>",
                (_, false, Access::GatheredQuads) => "array<vec4<f32>>",
            },
            Binding::GatheredKeys | Binding::GatheredValues => "array<vec4<u32>>",
            Binding::CacheState | Binding::Tokens | Binding::Entries | Binding::TreeMask => "array<u32>",
            Binding::Partials => "array<vec4<f32>>",
            _ => return None,
        })
    }

    /// The values that every template of a kernel of caches may read.
    pub(crate) fn context(&self, has_rotary: bool) -> Value {
        let [d, e] = [self.head_dim, self.value_dim];
        let quads = |width: u32| width.div_ceil(4);
        let written = if self.gathered { self.gathered_format() } else { self.format };
        let padded = [d, e].map(|width| written.vectors(width as usize) * written.elements() / 4);
        context! {
            quantised => self.is_quantised(),
            gathered => self.gathered,
            operand_quads => BTreeMap::from([("q", quads(d)), ("k", quads(d)), ("v", quads(e)), ("o", quads(e))]),
            padded_quads => named(padded),
            row_vectors => named([d, e].map(|width| self.format.row_vectors(width as usize))),
            rotary => self.rotary.filter(|_| has_rotary).map(|Rotary { dim, style, .. }| context! {
                dim,
                half_split => style == RotaryStyle::HalfSplit,
                relative => self.is_relative(),
            }),
            rolling => self.addressing == Addressing::Rolling,
            paged => self.addressing == Addressing::Paged,
            indexed => self.indexed,
            tile => self.tile,
        }
    }
}

/// How a kernel reads or writes the rows of a cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    /// A thread reads vectors of 16 bytes.
    Vectors,
    /// A thread writes four numbers.
    Quads,
    /// A thread writes four numbers of the element type, whatever the cache's format is.
    GatheredQuads,
    /// A thread copies rows without changing them.
    Rows,
}

/// A number for keys and one for values, by name.
pub(crate) fn named([k, v]: [u32; 2]) -> BTreeMap<&'static str, u32> {
    BTreeMap::from([("k", k), ("v", v)])
}
