//! The kernels of caches as variants, and their texts.

use std::collections::BTreeMap;

use minijinja::{Value, context};

use super::config::{Rotary, RotaryPositions, RotaryStyle};
use super::format::Addressing;
use super::format::RowFormat;
use super::plan::{DecodeTiles, cooperative_bytes, strip_row};
use crate::device::capabilities::CooperativeMatrices;
use crate::kernel::{Compose, render};
use crate::problem::SinkLogits;
use crate::problem::element::DType;
use crate::problem::error::{Error, Result};

/// Threads of a workgroup of the append kernel, and of those that move rows: as many as the widest row has quads.
pub(crate) const ROW_THREADS: u32 = 128;

/// Threads of a workgroup of the combine kernel.
const COMBINE_THREADS: u32 = 256;

/// What a kernel does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum CacheKernel {
    /// New keys and values into the cache, q rotated where it lies; or behind what was gathered from the cache.
    Append { rotates_q: bool, gathered: bool },
    /// Queries against splits of the keys.
    Decode { tiles: DecodeTiles, matrices: Option<CooperativeMatrices>, several: bool, softcap: bool },
    /// The splits of a row together.
    Combine { tile: u32, sink_logits: SinkLogits },
    /// Keys and values of some sequences one after the other.
    Gather,
    /// Gradients by these into the cache's layout.
    Scatter,
}

/// What a pipeline fixes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct CacheVariant {
    pub(crate) kernel: CacheKernel,
    pub(crate) addressing: Addressing,
    pub(crate) format: RowFormat,
    pub(crate) head_dim: u32,
    pub(crate) value_dim: u32,
    /// The caller's operands are read and written four neighbours at a time.
    pub(crate) vec4: bool,
    pub(crate) rotary: Option<Rotary>,
    /// Sequences are told by a list.
    pub(crate) indexed: bool,
}

/// Everything the kernels of caches may bind; slots are never renumbered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum CacheBinding {
    Params = 0,
    Q = 1,
    K = 2,
    V = 3,
    O = 4,
    Lse = 5,
    SinkLogits = 6,
    Keys = 7,
    Values = 8,
    State = 9,
    Tokens = 10,
    Entries = 11,
    CosSin = 12,
    Partials = 13,
    GatheredKeys = 14,
    GatheredValues = 15,
}

impl CacheBinding {
    pub(crate) fn slot(self) -> u32 {
        self as u32
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            CacheBinding::Params => "params",
            CacheBinding::Q => "q",
            CacheBinding::K => "k",
            CacheBinding::V => "v",
            CacheBinding::O => "o",
            CacheBinding::Lse => "lse",
            CacheBinding::SinkLogits => "sink_logits",
            CacheBinding::Keys => "keys",
            CacheBinding::Values => "values",
            CacheBinding::State => "state",
            CacheBinding::Tokens => "tokens",
            CacheBinding::Entries => "entries",
            CacheBinding::CosSin => "cos_sin",
            CacheBinding::Partials => "partials",
            CacheBinding::GatheredKeys => "gathered_keys",
            CacheBinding::GatheredValues => "gathered_values",
        }
    }
}

impl CacheVariant {
    fn is_relative(&self) -> bool {
        self.rotary.is_some_and(|rotary| rotary.positions == RotaryPositions::CacheRelative)
    }

    /// What it binds, each with whether it is written.
    pub(crate) fn bindings(&self) -> Vec<(CacheBinding, bool)> {
        use CacheBinding::{
            CosSin, Entries, GatheredKeys, GatheredValues, K, Keys, Lse, O, Params, Partials, Q, SinkLogits as Sinks,
            State, Tokens, V, Values,
        };
        let all: &[(CacheBinding, bool)] = match self.kernel {
            CacheKernel::Append { .. } => &[
                (Params, false),
                (Q, true),
                (K, false),
                (V, false),
                (Keys, true),
                (Values, true),
                (State, true),
                (Tokens, false),
                (CosSin, false),
            ],
            CacheKernel::Decode { .. } => &[
                (Params, false),
                (Q, false),
                (Keys, false),
                (Values, false),
                (State, false),
                (Entries, false),
                (CosSin, false),
                (Partials, true),
            ],
            CacheKernel::Combine { .. } => &[
                (Params, false),
                (O, true),
                (Lse, true),
                (Sinks, false),
                (State, false),
                (Entries, false),
                (Partials, false),
            ],
            CacheKernel::Gather => &[
                (Params, false),
                (Keys, false),
                (Values, false),
                (State, false),
                (Tokens, false),
                (GatheredKeys, true),
                (GatheredValues, true),
            ],
            CacheKernel::Scatter => &[
                (Params, false),
                (Keys, true),
                (Values, true),
                (Tokens, false),
                (GatheredKeys, false),
                (GatheredValues, false),
            ],
        };
        let present = |binding: CacheBinding| match (self.kernel, binding) {
            (CacheKernel::Append { rotates_q, .. }, Q) => rotates_q,
            (CacheKernel::Append { rotates_q, .. }, CosSin) => {
                rotates_q || self.rotary.is_some() && !self.is_relative()
            }
            (CacheKernel::Decode { .. }, CosSin) => self.is_relative(),
            (CacheKernel::Combine { sink_logits, .. }, Sinks) => sink_logits == SinkLogits::PerHead,
            (CacheKernel::Gather, State) => self.addressing == Addressing::Paged,
            (_, Entries) => self.indexed,
            _ => true,
        };
        all.iter().copied().filter(|(binding, _)| present(*binding)).collect()
    }

    /// Name for labels and dumps.
    pub(crate) fn name(&self) -> String {
        let kernel = match self.kernel {
            CacheKernel::Append { rotates_q, gathered } => {
                let [q, gathered] = [(rotates_q, "_q"), (gathered, "_gathered")].map(|(is, x)| if is { x } else { "" });
                format!("append{q}{gathered}")
            }
            CacheKernel::Decode { tiles, several, softcap, .. } => {
                let several = if several { "_several" } else { "" };
                let softcap = if softcap { "_softcap" } else { "" };
                let tiles = match tiles {
                    DecodeTiles::Portable { threads, lanes, rows, steps, exchanged } => {
                        format!("{threads}x{lanes}_r{rows}_s{steps}x{exchanged}")
                    }
                    DecodeTiles::Cooperative { rows, columns, ahead } => {
                        format!("cooperative_r{rows}_c{columns}_a{ahead}")
                    }
                };
                format!("decode_{tiles}{several}{softcap}")
            }
            CacheKernel::Combine { tile, sink_logits } => format!("combine_{tile}_{sink_logits:?}").to_lowercase(),
            CacheKernel::Gather => "gather".into(),
            CacheKernel::Scatter => "scatter".into(),
        };
        let addressing = format!("{:?}", self.addressing).to_lowercase();
        let rotary = self.rotary.map_or(String::new(), |Rotary { dim, style, positions }| {
            format!("_rotary{dim}_{style:?}_{positions:?}").to_lowercase()
        });
        let scalar = if self.vec4 { "" } else { "_scalar" };
        let indexed = if self.indexed { "_indexed" } else { "" };
        let CacheVariant { format: RowFormat { dtype, quantisation }, head_dim, value_dim, .. } = self;
        let quantised = quantisation.map_or(String::new(), |kind| format!("_{kind:?}").to_lowercase());
        format!("cache_{kernel}_{addressing}_{dtype}{quantised}_d{head_dim}_e{value_dim}{scalar}{rotary}{indexed}")
    }

    /// Vectors of 16 bytes of keys and of values that a thread of the decode kernel holds of a row, and numbers in 4 of these.
    fn lane_vectors(&self, lanes: u32) -> [u32; 2] {
        [self.head_dim, self.value_dim].map(|width| self.format.vectors(width as usize).div_ceil(lanes))
    }

    /// Vectors of four f32 of workgroup memory from row to row, from slot to slot, and in all; and rows that are merged at a time.
    fn exchange(&self, threads: u32, lanes: u32, rows: u32, exchanged: u32) -> [u32; 4] {
        let quarter = lanes / 4;
        // Odd, so that the rows of a slot lie in different banks; slots as far apart as a row is long.
        let row_pitch = quarter | 1;
        let mut slot_pitch = rows * row_pitch;
        while slot_pitch % 8 != quarter % 8 {
            slot_pitch += 1;
        }
        let quads = self.lane_vectors(lanes)[1] * self.vector_quads();
        let merged = quads * threads;
        let len = (exchanged * (threads / lanes) * slot_pitch).max(merged);
        [row_pitch, slot_pitch, len, (len / merged).min(rows)]
    }

    /// Threads of the append kernel that share a row.
    pub(crate) fn append_lanes(&self) -> u32 {
        let padded = self.format.vectors(self.head_dim.max(self.value_dim) as usize) * self.vector_quads();
        padded.max(2).next_power_of_two()
    }

    /// Keys of a tile of the decode kernel.
    pub(crate) fn tile(&self) -> u32 {
        match self.kernel {
            CacheKernel::Decode { tiles, matrices, .. } => tiles.keys(matrices),
            _ => 0,
        }
    }

    /// Threads of a workgroup of the decode kernel.
    pub(crate) fn threads(&self) -> u32 {
        match self.kernel {
            CacheKernel::Decode { tiles: DecodeTiles::Portable { threads, .. }, .. } => threads,
            CacheKernel::Decode { matrices: Some(matrices), .. } => matrices.lanes,
            _ => ROW_THREADS,
        }
    }

    fn vector_quads(&self) -> u32 {
        self.format.elements() / 4
    }

    /// Bytes of workgroup memory.
    pub(crate) fn workgroup_bytes(&self) -> u32 {
        match self.kernel {
            CacheKernel::Append { .. } | CacheKernel::Gather | CacheKernel::Scatter => 0,
            CacheKernel::Decode { tiles: DecodeTiles::Portable { threads, lanes, rows, exchanged, .. }, .. } => {
                let [_, _, len, _] = self.exchange(threads, lanes, rows, exchanged);
                let weights = [0, 8, 16, 0, 16 + 4][exchanged as usize];
                16 * len + threads / lanes * rows * (weights + 8)
            }
            CacheKernel::Decode { tiles: DecodeTiles::Cooperative { .. }, matrices, .. } => {
                let side = matrices.map_or(16, |matrices| matrices.side);
                cooperative_bytes([self.head_dim, self.value_dim].map(|width| width as usize), self.tile(), side)
            }
            CacheKernel::Combine { .. } => {
                let splits = COMBINE_THREADS / self.value_dim.div_ceil(4).next_power_of_two();
                COMBINE_THREADS * (4 + 16) + 4 * splits
            }
        }
    }

    /// The WGSL text.
    pub(crate) fn wgsl(&self) -> Result<String> {
        let bindings = self.bindings();
        let dtype = self.format.dtype;
        let half = dtype != DType::F32;
        let quantised = self.format.quantisation.is_some();
        let rotates_q = matches!(self.kernel, CacheKernel::Append { rotates_q: true, .. });
        let gathered = matches!(self.kernel, CacheKernel::Append { gathered: true, .. });
        let is_decode = matches!(self.kernel, CacheKernel::Decode { .. });
        let moves = matches!(self.kernel, CacheKernel::Gather | CacheKernel::Scatter);
        // What is gathered is of the element type.
        let gathered_format = RowFormat { quantisation: None, ..self.format };
        let written_format = if gathered { gathered_format } else { self.format };
        let [d, e] = [self.head_dim, self.value_dim];
        let operand = |name: &str, width: u32, atomic: bool| -> Value {
            context! { name, buffer => name, width, atomic }
        };
        let (loads, stores) = match self.kernel {
            CacheKernel::Append { .. } => {
                let q = rotates_q.then(|| operand("q", d, half && !self.vec4));
                let loads: Vec<Value> =
                    q.clone().into_iter().chain([operand("k", d, false), operand("v", e, false)]).collect();
                (loads, q.into_iter().collect::<Vec<_>>())
            }
            CacheKernel::Decode { .. } => (vec![operand("q", d, false)], vec![]),
            CacheKernel::Combine { .. } => (vec![], vec![operand("o", e, false)]),
            CacheKernel::Gather | CacheKernel::Scatter => (vec![], vec![]),
        };
        let quads = |width: u32| width.div_ceil(4);
        let rotary = self.rotary.filter(|_| bindings.iter().any(|(b, _)| *b == CacheBinding::CosSin));
        let context = context! {
            bindings => bindings.iter().map(|(b, written)| context! {
                name => b.name(),
                slot => b.slot(),
                space => match (b, written) {
                    (CacheBinding::Params, _) => "uniform",
                    (_, true) => "storage, read_write",
                    (_, false) => "storage, read",
                },
                type => match b {
                    CacheBinding::Params => "Params",
                    CacheBinding::Q | CacheBinding::K | CacheBinding::V | CacheBinding::O => match (self.vec4, half) {
                        (true, true) => "array<vec2<u32>>",
                        (true, false) => "array<vec4<f32>>",
                        (false, true) if *written => "array<atomic<u32>>",
                        (false, true) => "array<u32>",
                        (false, false) => "array<f32>",
                    },
                    CacheBinding::Keys | CacheBinding::Values if moves && !quantised => "array<vec4<u32>>",
                    CacheBinding::Keys | CacheBinding::Values => match (quantised && !gathered, half, is_decode) {
                        (false, false, _) => "array<vec4<f32>>",
                        (_, _, true) => "array<vec4<u32>>",
                        (false, true, false) => "array<vec2<u32>>",
                        (true, _, false) => "array<u32>",
                    },
                    CacheBinding::GatheredKeys | CacheBinding::GatheredValues => "array<vec4<u32>>",
                    CacheBinding::State | CacheBinding::Tokens | CacheBinding::Entries => "array<u32>",
                    CacheBinding::Partials => "array<vec4<f32>>",
                    CacheBinding::Lse | CacheBinding::SinkLogits | CacheBinding::CosSin => "array<f32>",
                },
            }).collect::<Vec<_>>(),
            loads, stores,
            xyzw => ["x", "y", "z", "w"],
            dtype => dtype.to_string(),
            quantised,
            kernel => if matches!(self.kernel, CacheKernel::Append { .. }) { "append" } else { "decode" },
            gathered,
            vec4 => self.vec4,
            o_rest => false,
            order => Vec::<Value>::new(),
            cooperative => false,
            operand_quads => BTreeMap::from([("q", quads(d)), ("k", quads(d)), ("v", quads(e)), ("o", quads(e))]),
            padded_quads => BTreeMap::from([("k", d), ("v", e)].map(|(name, width)| {
                (name, written_format.vectors(width as usize) * written_format.elements() / 4)
            })),
            row_vectors => BTreeMap::from([("k", d), ("v", e)].map(|(name, width)| (name, self.format.row_vectors(width as usize)))),
            rotary => rotary.map(|Rotary { dim, style, .. }| context! {
                dim,
                half_split => style == RotaryStyle::HalfSplit,
                relative => self.is_relative(),
            }),
            rolling => self.addressing == Addressing::Rolling,
            paged => self.addressing == Addressing::Paged,
            indexed => self.indexed,
        };
        let named = |[k, v]: [u32; 2]| BTreeMap::from([("k", k), ("v", v)]);
        match self.kernel {
            CacheKernel::Gather | CacheKernel::Scatter => {
                let of = |format: RowFormat| [d, e].map(|width| format.vectors(width as usize));
                let context = context! {
                    batch => 1,
                    threads => ROW_THREADS,
                    gathered_vectors => named(of(gathered_format)),
                    data_quads => named(of(self.format).map(|n| n * self.vector_quads())),
                    ..context
                };
                let is_gather = self.kernel == CacheKernel::Gather;
                render(if is_gather { "cache/gather.wgsl" } else { "cache/scatter.wgsl" }, context)
            }
            CacheKernel::Append { .. } => {
                let lanes = self.append_lanes();
                render("cache/append.wgsl", context! { rotates_q, threads => ROW_THREADS, lanes, ..context })
            }
            CacheKernel::Decode {
                tiles: DecodeTiles::Cooperative { rows, columns, ahead }, matrices, softcap, ..
            } => {
                let Some(CooperativeMatrices { side, lanes, in_step }) = matrices else {
                    return Err(Error::NoKernel {
                        problem: self.name(),
                        reason: "the device has no cooperative matrices".into(),
                    });
                };
                let tile = self.tile();
                let vectors = [d, e].map(|width| self.format.vectors(width as usize));
                let context = context! {
                    rows, columns, ahead, softcap, side, lanes, in_step, tile,
                    relative => false,
                    strip_row => strip_row(tile),
                    pitches => named([d, e].map(|width| width / 4 + 2)),
                    data_vectors => named(vectors),
                    tile_vectors => named(vectors.map(|n| n * tile / lanes)),
                    features => named([d, e].map(|width| width / side)),
                    lane_quads => tile / 4 / (lanes / rows),
                    ..context
                };
                render("cache/decode_cooperative.wgsl", context)
            }
            CacheKernel::Decode {
                tiles: DecodeTiles::Portable { threads, lanes, rows, steps, exchanged },
                several,
                softcap,
                ..
            } => {
                let lane_vectors = self.lane_vectors(lanes);
                let [row_pitch, slot_pitch, exchange_len, merged_rows] = self.exchange(threads, lanes, rows, exchanged);
                let context = context! {
                    threads, lanes, rows, steps, exchanged, row_pitch, slot_pitch, exchange_len, merged_rows, softcap,
                    slots => threads / lanes,
                    tile => self.tile(),
                    queries => if several { "several" } else { "one" },
                    relative => self.is_relative(),
                    vector_quads => self.vector_quads(),
                    lane_vectors => named(lane_vectors),
                    lane_quads => named(lane_vectors.map(|n| n * self.vector_quads())),
                    data_vectors => named([d, e].map(|width| self.format.vectors(width as usize))),
                    ..context
                };
                render("cache/decode.wgsl", context)
            }
            CacheKernel::Combine { tile, sink_logits } => {
                let sinks = match sink_logits {
                    SinkLogits::None => "none",
                    SinkLogits::OffByOne => "off_by_one",
                    SinkLogits::PerHead => "per_head",
                };
                let lanes = quads(e).next_power_of_two();
                render(
                    "cache/combine.wgsl",
                    context! {
                        threads => COMBINE_THREADS, lanes, tile, sinks, ahead => 8,
                        score_size => "params.scale_size",
                        ..context
                    },
                )
            }
        }
    }
}

impl Compose for CacheVariant {
    fn name(&self) -> String {
        CacheVariant::name(self)
    }

    fn slots(&self) -> Vec<(u32, bool, bool)> {
        self.bindings().into_iter().map(|(b, written)| (b.slot(), b == CacheBinding::Params, written)).collect()
    }

    fn wgsl(&self) -> Result<String> {
        CacheVariant::wgsl(self)
    }
}

#[cfg(test)]
#[path = "../../tests/common/tint.rs"]
mod tint;

#[cfg(test)]
mod tests {
    use naga::AddressSpace;
    use naga::back::{hlsl, msl, spv};
    use naga::valid::{Capabilities as Wgsl, ShaderStages, SubgroupOperationSet, ValidationFlags, Validator};
    use rayon::prelude::*;

    use super::*;
    use crate::cache::{CacheConfig, CacheKind, DecodeTiling, Quantisation};
    use crate::device::capabilities::Capabilities;

    const KINDS: [CacheKind; 3] = [
        CacheKind::Contiguous { capacity: 1000 },
        CacheKind::Paged { page_size: 16, pages: 64, sequence_pages: 64 },
        CacheKind::Rolling { sink_tokens: 4, window: 128, queries: 16 },
    ];

    /// What the planner makes of widths, types, kinds and groups on any device, with every option somewhere.
    fn variants() -> Vec<(CacheVariant, Capabilities)> {
        let mut found = Vec::new();
        let widths = [[1, 1], [5, 33], [64, 64], [80, 16], [128, 128], [192, 128], [256, 256], [512, 1], [512, 512]];
        let mut turn = 0;
        for [head_dim, value_dim] in widths {
            for dtype in [DType::F32, DType::F16, DType::Bf16] {
                for kind in KINDS {
                    for (rows, quantisation) in
                        [(1usize, None), (3, None), (8, None), (128, None), (4, Some(Quantisation::Q8_0))]
                    {
                        turn += 1;
                        let devices = Capabilities::samples();
                        let device = devices[turn % devices.len()].clone();
                        let style = [RotaryStyle::HalfSplit, RotaryStyle::Interleaved][turn % 2];
                        let positions = match kind {
                            CacheKind::Rolling { .. } if turn % 4 > 1 && quantisation.is_none() => {
                                RotaryPositions::CacheRelative
                            }
                            _ => RotaryPositions::Absolute,
                        };
                        let dim = head_dim as u32 / 16 * 16;
                        let rotary = (dim > 0 && !turn.is_multiple_of(3)).then_some(Rotary { dim, style, positions });
                        let config = CacheConfig::new(kind, 2, 2, head_dim)
                            .value_dim(value_dim)
                            .dtype(dtype)
                            .rotary(rotary)
                            .quantisation(quantisation);
                        let several = rows > 8;
                        let cooperative = DecodeTiling::cooperative(&config, rows, 4, several, &device).ok();
                        let tiling = cooperative.filter(|_| !turn.is_multiple_of(3));
                        let tiling = tiling.unwrap_or_else(|| DecodeTiling::portable(&config, rows, 4, &device));
                        let matrices = device.cooperative;
                        let sink_logits = [SinkLogits::None, SinkLogits::OffByOne, SinkLogits::PerHead][turn % 3];
                        let softcap = turn.is_multiple_of(5);
                        let decode = CacheKernel::Decode { tiles: tiling.tiles, matrices, several, softcap };
                        let combine = CacheKernel::Combine { tile: tiling.tiles.keys(matrices), sink_logits };
                        let rotates_q = rotary.is_some() && !turn.is_multiple_of(5);
                        let append = CacheKernel::Append { rotates_q, gathered: false };
                        // Neither keys that are rotated as they are read nor quantised ones are gathered or have gradients.
                        let behind = CacheKernel::Append { rotates_q: false, gathered: true };
                        let gathers = (!config.is_relative()).then_some([behind, CacheKernel::Gather]);
                        let scatters = quantisation.is_none().then_some(CacheKernel::Scatter);
                        let moves = gathers.into_iter().flatten().chain(scatters);
                        for kernel in [decode, combine, append].into_iter().chain(moves) {
                            let variant = CacheVariant {
                                kernel,
                                addressing: config.addressing(),
                                format: config.format(),
                                head_dim: head_dim as u32,
                                value_dim: value_dim as u32,
                                vec4: [head_dim, value_dim].iter().all(|n| n.is_multiple_of(4)) && turn % 7 > 0,
                                rotary: match kernel {
                                    CacheKernel::Decode { .. } => rotary.filter(|_| config.is_relative()),
                                    CacheKernel::Append { .. } => rotary,
                                    _ => None,
                                },
                                indexed: turn.is_multiple_of(2)
                                    && matches!(kernel, CacheKernel::Decode { .. } | CacheKernel::Combine { .. }),
                            };
                            if let CacheKernel::Decode { .. } = kernel {
                                tiling.check(&config, &variant, &device).unwrap();
                            }
                            found.push((variant, device.clone()));
                        }
                    }
                }
            }
        }
        found
    }

    #[test]
    fn every_variant_validates_translates_and_fits() {
        variants().into_par_iter().for_each(|(variant, device)| {
            let name = variant.name();
            let text = variant.wgsl().unwrap();
            assert_eq!(super::tint::mixed_operators(&text), [""; 0], "{name}");
            let module = naga::front::wgsl::parse_str(&text)
                .unwrap_or_else(|error| panic!("{name}: {}\n{text}", error.emit_to_string(&text)));
            let is_cooperative =
                matches!(variant.kernel, CacheKernel::Decode { tiles: DecodeTiles::Cooperative { .. }, .. });
            let matrices = Wgsl::COOPERATIVE_MATRIX | Wgsl::SHADER_FLOAT16 | Wgsl::SUBGROUP | Wgsl::SUBGROUP_BARRIER;
            let needed = if is_cooperative { matrices } else { Wgsl::empty() };
            let mut validator = Validator::new(ValidationFlags::all(), Wgsl::SHADER_FLOAT16_IN_FLOAT32 | needed);
            if is_cooperative {
                validator.subgroup_stages(ShaderStages::COMPUTE).subgroup_operations(SubgroupOperationSet::all());
            } else {
                validator.subgroup_stages(ShaderStages::empty()).subgroup_operations(SubgroupOperationSet::empty());
            }
            let info = validator.validate(&module).unwrap_or_else(|error| panic!("{name}: {error:?}"));

            let spv = spv::Options { lang_version: (1, 3), ..Default::default() };
            spv::write_vec(&module, &info, &spv, None).unwrap_or_else(|error| panic!("{name}: {error}"));
            let msl = msl::Options { lang_version: (2, 4), ..Default::default() };
            msl::write_string(&module, &info, &msl, &msl::PipelineOptions::default())
                .unwrap_or_else(|error| panic!("{name}: {error}"));
            // DX12 has no cooperative matrices.
            if !is_cooperative {
                let options = hlsl::Options {
                    shader_model: hlsl::ShaderModel::V6_0,
                    special_constants_binding: Some(hlsl::BindTarget { register: 0, space: 1, ..Default::default() }),
                    ..Default::default()
                };
                hlsl::Writer::new(&mut String::new(), &options, &hlsl::PipelineOptions::default())
                    .write(&module, &info, None)
                    .unwrap_or_else(|error| panic!("{name}: {error}"));
            }

            let mut layouter = naga::proc::Layouter::default();
            layouter.update(module.to_ctx()).unwrap();
            let variables = || module.global_variables.iter();
            let memory: u32 = variables()
                .filter(|(_, variable)| variable.space == AddressSpace::WorkGroup)
                .map(|(_, variable)| layouter[variable.ty].size)
                .sum();
            assert_eq!(memory, variant.workgroup_bytes(), "{name}");
            assert!(memory <= device.workgroup_bytes, "{name}: {memory} bytes of workgroup memory");
            let storage = variables().filter(|(_, v)| matches!(v.space, AddressSpace::Storage { .. })).count();
            assert!(storage <= 8, "{name}: {storage} storage buffers");
            let bound = variables().filter(|(_, variable)| variable.binding.is_some()).count();
            assert_eq!(bound, variant.bindings().len(), "{name}");
        });
    }
}
