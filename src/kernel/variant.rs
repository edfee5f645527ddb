//! Variants: a kernel with the options that its pipeline fixes, and its text.

use std::collections::BTreeMap;

use minijinja::{Value, context};

use crate::device::capabilities::{CooperativeMatrices, Rounding};
use crate::kernel::binding::Binding;
use crate::kernel::cache::CacheOptions;
use crate::kernel::micro_kernel::{MicroKernel, Properties};
use crate::kernel::names::Kernel;
use crate::kernel::sizes::{
    DELTA_LANES, DELTA_ROWS, DELTA_STEPS, MASK_BLOCK_ROWS, MASK_BLOCK_WORDS, MASK_GROUP, MASK_STEP_WORDS,
    SEQUENCE_WORDS, report_words,
};
use crate::kernel::spec::{Body, Cached, Digit, OptionalOperands, OwnOptions, Plain};
use crate::kernel::template::render;
use crate::kernel::tile::Tiling;
use crate::kernel::tile::cooperative::CooperativeTile;
use crate::kernel::tile::decode::DecodeTiles;
use crate::kernel::tile::portable::PortableTile;
use crate::problem::element::DType;
use crate::problem::error::Result;
use crate::problem::{Axes, MaskPacking, Options, Problem, SinkLogits};

/// The options that a pipeline fixes. Two problems with the same variant share a pipeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Variant {
    /// The kernel.
    pub kernel: Kernel,
    /// How matrix products are formed, if there are any.
    pub micro_kernel: MicroKernel,
    /// Element type of q, k, v, o and their gradients in memory.
    pub dtype: DType,
    /// D.
    pub head_dim: u32,
    /// E.
    pub value_dim: u32,
    /// Operands are read and written four neighbours at a time.
    pub vec4: bool,
    /// Where the sink logits come from.
    pub sink_logits: SinkLogits,
    /// Scores are capped.
    pub softcap: bool,
    /// ALiBi is subtracted from scores.
    pub alibi: bool,
    /// Each row keeps the sum that the gradient of the ALiBi slopes needs.
    pub slope_rows: bool,
    /// Element type of the bias that is added to scores.
    pub bias: Option<DType>,
    /// The bias is read four neighbours at a time.
    pub bias_vec4: bool,
    /// Rows of the operands whose tiles are staged are read eight neighbours at a time, not four.
    pub vec8: bool,
    /// A boolean mask hides pairs.
    pub mask: bool,
    /// Packing of the caller's mask, for the kernel that reads it.
    pub mask_packing: MaskPacking,
    /// The axes along which the bias is not broadcast, for the kernel of its gradient.
    pub axes: Option<Axes>,
    /// Sequences differ in length.
    pub lengths: bool,
    /// A gradient flows into lse.
    pub d_lse: bool,
    /// d_k and d_v lie in one buffer, which is bound once.
    pub packed: bool,
    /// o is bound with its rounding error, in half precision.
    pub o_lo: bool,
    /// The largest score of each row is a result.
    pub row_max: bool,
    /// The tile shape, for the kernels that have tiles.
    pub tiling: Option<Tiling>,
    /// The device's cooperative matrices, for a cooperative kernel.
    pub matrices: Option<CooperativeMatrices>,
    /// The kernel computes only rows that a cooperative kernel has reported. The number is the rows of that kernel's tiles.
    pub fallback: Option<u32>,
    /// A cooperative kernel's second run, of the tiles that its first run has reported. Columns that are not finite are replaced by zeros,
    /// so that they reach no row that does not see them.
    pub sanitize: bool,
    /// Tiles that a workgroup looks at, one after the other, in a pass that computes rows again. Most tiles have no such row.
    pub batch: u32,
    /// The options that a kernel of caches fixes.
    pub(crate) cache: Option<CacheOptions>,
}

impl Variant {
    fn tiles(&self) -> Option<PortableTile> {
        match self.tiling? {
            Tiling::Portable(tiles) => Some(tiles),
            Tiling::Cooperative { .. } | Tiling::Fragments { .. } => None,
        }
    }

    pub(crate) fn fragments(&self) -> Option<CooperativeTile> {
        CooperativeTile::new(self.tiling?, self.matrices?)
    }

    /// The properties of the micro-kernel, for a kernel with tiles. No other kernel has any of these properties: decoding has its own
    /// tiles.
    pub(crate) fn properties(&self) -> Properties {
        self.tiling.map_or(MicroKernel::Portable, |tiling| tiling.micro_kernel()).properties()
    }

    /// Rows and columns of a tile.
    pub fn tile(&self) -> Option<[u32; 2]> {
        let portable = self.tiles().map(|tiles| [tiles.tile_rows(), tiles.tile_columns()]);
        portable.or_else(|| self.fragments().map(|fragments| [fragments.tile_rows(), fragments.tile_columns()]))
    }

    /// 32-bit registers that a thread's share of a tile takes, roughly.
    pub fn registers(&self) -> Option<u32> {
        let (d, e) = (self.head_dim, self.value_dim);
        let portable = self.tiles().map(|tiles| tiles.registers(self.kernel, d, e));
        portable.or_else(|| self.fragments().map(|fragments| fragments.registers(self.kernel, self.dtype, d, e)))
    }

    /// A kernel's variant for a problem, before tiles are chosen. Options of operands that the kernel does not bind are left out, so that
    /// problems which differ only in those share a pipeline. `vec4` says whether the operands can be read four neighbours at a time.
    pub(crate) fn new(kernel: Kernel, problem: &Problem, vec4: bool, optional: OptionalOperands) -> Self {
        let (shape, spec) = (problem.shape(), kernel.spec());
        // Parameters carry the scale and the visibility rule (as the bands of sequences), and operands carry their own layout.
        let Options {
            causal: _,
            window: _,
            sink_tokens: _,
            sink_logits,
            scale: _,
            softcap,
            alibi,
            bias,
            bias_dtype,
            mask,
            mask_packing,
            alignment: _,
            query_offset: _,
            layout: _,
            dtype,
        } = *problem.options();
        let reads = |binding: Binding| spec.reads.contains(&binding);
        let writes = |binding: Binding| spec.writes.contains(&binding);
        let binds = |binding: Binding| reads(binding) || writes(binding);
        let is_tiled = kernel.tiled().is_some();
        let all = || spec.reads.iter().chain(spec.writes);
        // Widths of 1 and 2 distinguish D and E.
        let has_width = |width: u32| all().any(|binding| binding.width([1, 2]) == Some(width));
        let [uses_q, uses_v] = [1, 2].map(has_width);
        let mut own = OwnOptions {
            // Row statistics have more terms in half precision.
            dtype: if uses_q || uses_v || binds(Binding::RowStats) { dtype } else { DType::F32 },
            sink_logits: if reads(Binding::SinkLogits) { sink_logits } else { SinkLogits::None },
            lengths: problem.has_lengths() && reads(Binding::Sequences),
            o_lo: optional.o_lo && binds(Binding::OLo),
        };
        (spec.adjust)(&mut own, problem, optional);
        let OwnOptions { dtype, sink_logits, lengths, o_lo } = own;
        Variant {
            kernel,
            micro_kernel: MicroKernel::Portable,
            dtype,
            head_dim: if uses_q { shape.head_dim as u32 } else { 0 },
            value_dim: if uses_v { shape.value_dim as u32 } else { 0 },
            vec4: vec4 && uses_v,
            sink_logits,
            softcap: is_tiled && softcap.is_some(),
            alibi: alibi && (is_tiled || reads(Binding::AlibiSlopes)),
            slope_rows: alibi && optional.d_alibi_slopes && writes(Binding::DSlopeRows),
            bias: bias.map(|_| bias_dtype).filter(|_| reads(Binding::Bias)),
            bias_vec4: false,
            vec8: false,
            mask: mask.is_some() && reads(Binding::MaskBits),
            mask_packing: if reads(Binding::Mask) { mask_packing } else { MaskPacking::Bytes },
            axes: bias.filter(|_| writes(Binding::DBias)),
            lengths,
            d_lse: optional.d_lse && reads(Binding::DLse),
            packed: optional.packed && writes(Binding::DV),
            o_lo,
            row_max: optional.row_max && writes(Binding::RowMax),
            tiling: None,
            matrices: None,
            fallback: None,
            sanitize: false,
            batch: 1,
            cache: None,
        }
    }

    /// The variant of a kernel of caches.
    pub(crate) fn of_cache(kernel: Kernel, options: CacheOptions) -> Self {
        let options = kernel.cached().map_or(options, |cached| (cached.depends)(options));
        Variant {
            kernel,
            micro_kernel: options.tiles.map_or(MicroKernel::Portable, |tiles| tiles.micro_kernel()),
            dtype: options.format.dtype,
            head_dim: options.head_dim,
            value_dim: options.value_dim,
            vec4: options.vec4,
            sink_logits: options.sink_logits,
            softcap: options.softcap,
            alibi: options.alibi,
            slope_rows: false,
            bias: None,
            bias_vec4: false,
            vec8: false,
            mask: false,
            mask_packing: MaskPacking::Bytes,
            axes: None,
            lengths: false,
            d_lse: false,
            packed: false,
            o_lo: false,
            row_max: options.row_max,
            tiling: None,
            matrices: None,
            fallback: None,
            sanitize: false,
            batch: 1,
            cache: Some(options),
        }
    }

    /// The share of a workgroup, for a kernel that decodes.
    pub fn decode_tiles(&self) -> Option<DecodeTiles> {
        self.cache?.tiles
    }

    /// The description of a kernel of caches, and the options that its pipeline fixes.
    fn cached(&self) -> Option<(&'static Cached, &CacheOptions)> {
        self.kernel.cached().zip(self.cache.as_ref())
    }

    /// The options that the kernel may depend on in another way than its operands imply.
    pub(crate) fn own_options(&self) -> OwnOptions {
        let Variant { dtype, sink_logits, lengths, o_lo, .. } = *self;
        OwnOptions { dtype, sink_logits, lengths, o_lo }
    }

    /// The operands that this variant binds, and whether it writes them.
    pub(crate) fn bindings(&self) -> Vec<(Binding, bool)> {
        let spec = self.kernel.spec();
        let present = |(binding, written): &(Binding, bool)| {
            let by_options = match binding {
                Binding::SinkLogits | Binding::SinkPartials => self.sink_logits == SinkLogits::PerHead,
                Binding::DLse => self.d_lse,
                Binding::AlibiSlopes => self.alibi,
                Binding::DSlopeRows => self.slope_rows || !written,
                Binding::Bias => self.bias.is_some(),
                Binding::MaskBits => self.mask || *written,
                Binding::Sequences => self.lengths,
                Binding::OLo | Binding::StatesLo => self.o_lo,
                Binding::RowMax | Binding::StatesRowMax => self.row_max,
                // d_v is in the buffer of d_k.
                Binding::DV => !self.packed,
                _ => true,
            };
            let by_cache = || self.cached().is_none_or(|(cached, options)| (cached.binds)(options, *binding));
            by_options && (spec.binds)(&self.own_options(), *binding) && by_cache()
        };
        let all = spec.reads.iter().map(|b| (*b, false)).chain(spec.writes.iter().map(|b| (*b, true)));
        let reports = self.properties().reports_rows;
        let fallback = (reports || self.fallback.is_some()).then_some((Binding::Fallback, reports));
        let scales = self.column_scales().map(|binding| (binding, false));
        all.filter(present).chain(scales).chain(fallback).collect()
    }

    /// Whether rows of its tiles are keys.
    pub(crate) fn rows_are_keys(&self) -> bool {
        self.kernel.spec().work.rows_are_keys()
    }

    /// Accumulators of sums in f16 whose rows have units that the kernel finds itself, in a first walk over the tiles.
    fn units(&self) -> &'static [&'static str] {
        match self.kernel.tiled() {
            Some(tiled) if self.properties().multiplies_halves && !self.multiplies_bf16() => (tiled.units)(self.dtype),
            _ => &[],
        }
    }

    /// Neighbours of an operand's row that are read at a time.
    pub(crate) fn neighbours(&self, binding: Binding) -> u64 {
        match binding {
            _ if self.vec8 && self.staged().contains(&binding) => 8,
            _ if self.vec4 && binding.has_width() => 4,
            _ => 1,
        }
    }

    /// The operands whose tiles are staged in workgroup memory, where matrices multiply: those of the columns.
    fn staged(&self) -> [Binding; 2] {
        if self.rows_are_keys() { [Binding::Q, Binding::DO] } else { [Binding::K, Binding::V] }
    }

    /// Whether fragments of bf16 are multiplied as they lie in memory. Else they are converted to f16.
    pub fn multiplies_bf16(&self) -> bool {
        self.fragments().is_some_and(|fragments| fragments.multiplies_bf16(self.dtype))
    }

    /// Whether P and dS are larger by what the driver's conversion to bf16 cuts off on average. The gradient of ALiBi's slopes multiplies what
    /// is left of their errors by distances: there the average is not enough.
    fn lifts_p(&self) -> bool {
        self.bf16_rounding() == Some(Rounding::TowardsZero) && !self.alibi
    }

    /// Whether the kernel itself rounds P and dS to nearest before the driver's conversion to bf16.
    fn rounds_p(&self) -> bool {
        self.bf16_rounding().is_some_and(|rounding| rounding != Rounding::Nearest) && !self.lifts_p()
    }

    /// How the driver makes bf16 of f32, where that is multiplied as itself.
    fn bf16_rounding(&self) -> Option<Rounding> {
        self.matrices.filter(|_| self.multiplies_bf16())?.bf16
    }

    /// Whether the row statistics hold the unit of d_q, because matrices may multiply the row's weights.
    fn stats_have_units(&self) -> bool {
        self.dtype.multiplies_on_matrices()
    }

    /// Whether scores are formed in full before the exponential, as with ALiBi, bias or token scales. Softcap is applied on the way to it.
    fn formed(&self) -> bool {
        self.alibi || self.bias.is_some() || (self.softmax() && self.column_scales().is_some())
    }

    /// Whether the kernel keeps an online softmax.
    fn softmax(&self) -> bool {
        self.kernel.tiled().is_some_and(|tiled| tiled.softmax)
    }

    /// Whether full tiles have a loop of their own. A mask says of each tile whether it hides pairs.
    fn peels(&self) -> bool {
        self.properties().peels_full_tiles && !self.mask
    }

    /// Whether the bits of a mask for a row of a tile are words in registers. A span of tiles of one class, whose words are loaded together,
    /// is of 64 keys, or of 32 queries.
    fn has_mask_words(&self, columns: u32) -> bool {
        let in_chunk = |tile: CooperativeTile| tile.column_fragments() * tile.matrices.side <= 32;
        let has_two = columns == 64 && !self.rows_are_keys() && self.properties().needs_elements;
        32u32.is_multiple_of(columns) || (has_two && self.fragments().is_some_and(in_chunk))
    }

    /// Whether the exponential takes in the bias, so that no score is formed. A bias in f16 is far from the ends of f32, so that no sum
    /// becomes infinite where the bias is not.
    fn joins_bias(&self) -> bool {
        let alone = !self.softcap && !self.alibi && self.column_scales().is_none();
        alone && self.bias == Some(DType::F16) && self.properties().needs_elements
    }

    /// Whether the loop over full tiles, or with a mask that over all tiles, forms P with the maxima so far, and is left where they are too
    /// small. That pays where a lane has many elements of O: in a second row of fragments on NVIDIA
    /// (benches/results/2026-11-30-h200-forward.md). The powers of values that token scales add to scores need the maxima of every tile.
    fn is_optimistic(&self, tile: &CooperativeTile) -> bool {
        let rows = tile.matrices.elements.map_or(0, |layout| tile.rows as usize * layout.rows().len());
        rows > 2 && self.properties().needs_elements && self.softmax() && self.column_scales().is_none()
    }

    /// The token scales of the columns that the kernel multiplies in f16, if the element type has more range than f16.
    pub(crate) fn column_scales(&self) -> Option<Binding> {
        let needs = self.properties().multiplies_halves && self.dtype.needs_token_scales() && !self.multiplies_bf16();
        needs.then_some(if self.rows_are_keys() { Binding::QueryScales } else { Binding::KeyScales })
    }

    /// Whether a hidden column that is not finite spoils rows that do not see it: a product with zero weights sums it, and those rows are
    /// only reported.
    pub(crate) fn mixes_columns(&self) -> bool {
        self.properties().reports_rows && self.kernel.tiled().is_some_and(|tiled| !tiled.accumulators.is_empty())
    }

    /// Rows of a tile that the kernel reports.
    fn reported_rows(&self) -> Option<u32> {
        self.tile().filter(|_| self.properties().reports_rows).map(|[rows, _]| rows)
    }

    /// The lanes that the kernel is built for, where it has to look whether its subgroups have as many.
    fn guarded_lanes(&self) -> Option<u32> {
        self.matrices
            .filter(|matrices| matrices.guarded && self.properties().needs_matrices)
            .map(|matrices| matrices.lanes)
    }

    /// Words of the kernel's report of a tile.
    pub(crate) fn report_words(&self) -> Option<u32> {
        self.reported_rows().map(report_words)
    }

    /// Storage buffers that this variant binds.
    pub(crate) fn storage_buffers(&self) -> u32 {
        self.bindings().iter().filter(|(b, _)| *b != Binding::Params).count() as u32
    }

    /// Threads of a workgroup.
    pub fn threads(&self) -> u32 {
        match (self.fragments(), self.tiles()) {
            (Some(fragments), _) => fragments.threads(),
            (_, Some(tiles)) => tiles.threads(),
            _ => match self.cached() {
                Some((cached, options)) => (cached.threads)(options),
                None => self.plain().map_or(0, |plain| plain.threads),
            },
        }
    }

    /// Bytes of workgroup memory.
    pub fn workgroup_bytes(&self) -> u32 {
        let (d, e) = (self.head_dim, self.value_dim);
        match (self.fragments(), self.tiles()) {
            (Some(fragments), _) => fragments.workgroup_bytes(self.kernel, self.dtype, d, e),
            (_, Some(tiles)) => tiles.workgroup_bytes(self.kernel, d, e) + 16 * self.slope_rows_len().div_ceil(4),
            _ => match self.cached() {
                Some((cached, options)) => (cached.workgroup_bytes)(options),
                None => self.plain().map_or(0, |plain| plain.workgroup_bytes),
            },
        }
    }

    fn plain(&self) -> Option<&'static Plain> {
        match &self.kernel.spec().body {
            Body::Plain(plain) => Some(plain),
            Body::Tiled(_) | Body::Cached(_) => None,
        }
    }

    /// Numbers that a kernel keeps for the ALiBi slopes' gradient, in addition to its tiles.
    fn slope_rows_len(&self) -> u32 {
        let tiles = self.tiles().filter(|_| self.slope_rows);
        tiles.map_or(0, |tiles| tiles.tile_rows() * tiles.threads_c)
    }

    /// Name for labels and dumps.
    pub fn name(&self) -> String {
        use std::fmt::Write as _;
        if let Some(options) = &self.cache {
            return options.name(self.kernel.name());
        }
        let mut name = format!("{}_{}_{}", self.kernel.name(), self.micro_kernel, self.dtype);
        for (letter, width) in [('d', self.head_dim), ('e', self.value_dim)] {
            if width > 0 {
                name.push_str(&format!("_{letter}{width}"));
            }
        }
        // Writing into a String cannot fail.
        let _ = self.tiles().map_or(Ok(()), |t| {
            let [rows, columns] = [t.tile_rows(), t.tile_columns()];
            write!(name, "_{rows}x{columns}_t{}x{}_c{}_s{}", t.threads_r, t.threads_c, t.k_step * 4, t.n_step)
        });
        if let Some(f) = self.fragments() {
            let [rows, columns] = [f.tile_rows(), f.tile_columns()];
            let _ = write!(name, "_{rows}x{columns}_s{}r{}n{}f{}", f.subgroups, f.rows, f.stages, f.matrices.side);
            let _ = f.chunk.map_or(Ok(()), |chunk| write!(name, "c{chunk}"));
        }
        let _ = self.fallback.map_or(Ok(()), |rows| write!(name, "_fallback{rows}"));
        name.push_str(if self.vec4 || self.value_dim == 0 { "" } else { "_scalar" });
        name.push_str(match self.sink_logits {
            SinkLogits::None => "",
            SinkLogits::OffByOne => "_offbyone",
            SinkLogits::PerHead => "_sinks",
        });
        for (part, there) in [
            ("_softcap", self.softcap),
            ("_alibi", self.alibi),
            ("_d_slope_rows", self.slope_rows),
            ("_mask", self.mask),
            ("_bits", self.mask_packing == MaskPacking::Bits),
            ("_lengths", self.lengths),
            ("_packed", self.packed),
            ("_vec8", self.vec8),
            ("_native", self.multiplies_bf16()),
            ("_lifted", self.lifts_p()),
            ("_rounded", self.rounds_p()),
            ("_sanitize", self.sanitize),
            ("_one_by_one", self.batch == 1 && (self.sanitize || self.fallback.is_some())),
        ] {
            name.push_str(if there { part } else { "" });
        }
        let _ = self.guarded_lanes().map_or(Ok(()), |lanes| write!(name, "_lanes{lanes}"));
        let vec4 = if self.bias_vec4 { "_vec4" } else { "" };
        let _ = self.bias.map_or(Ok(()), |dtype| write!(name, "_bias_{dtype}{vec4}"));
        let _ = self.axes.map_or(Ok(()), |Axes { batch, heads, seq_q }| {
            write!(name, "_own{}{}{}", u8::from(batch), u8::from(heads), u8::from(seq_q))
        });
        name.push_str(&self.tiling.map_or(String::new(), |tiling| tiling.loops().suffix()));
        name.push_str(if self.d_lse { "_dlse" } else { "" });
        name.push_str(if self.o_lo { "_lo" } else { "" });
        name.push_str(if self.row_max { "_row_max" } else { "" });
        name
    }

    /// The WGSL text of this variant.
    ///
    /// # Errors
    /// [`Error::Gpu`](crate::Error::Gpu) if the template does not render, which would be a mistake of this crate.
    pub fn wgsl(&self) -> Result<String> {
        let bindings = self.bindings();
        let half = self.dtype.is_half();
        let quads = |width: u32| width.div_ceil(4);
        // Operands that are read and written, each with the binding that holds it.
        let mut named: Vec<_> = bindings.iter().map(|&(b, written)| (b, b, written)).collect();
        if self.packed {
            named.push((Binding::DV, Binding::DK, true));
        }
        let operands = |written: bool| -> Vec<Value> {
            let of = |&&(b, _, w): &&(Binding, Binding, bool)| {
                w == written && b.width([self.head_dim, self.value_dim]).is_some()
            };
            let value = |&(b, buffer, _): &(Binding, Binding, bool)| {
                let width = b.width([self.head_dim, self.value_dim]);
                context! { name => b.name(), buffer => buffer.name(), width, eight => self.neighbours(b) == 8 }
            };
            named.iter().filter(of).map(value).collect()
        };
        let widths = || named.iter().filter_map(|(b, ..)| Some((b.name(), b.width([self.head_dim, self.value_dim])?)));
        let operand_quads: BTreeMap<&str, u32> = widths().map(|(name, width)| (name, quads(width))).collect();
        let properties = self.properties();
        let rows_are_keys = self.rows_are_keys();
        let multiplies_bf16 = self.multiplies_bf16();
        let formed = self.formed();
        let work = self.kernel.spec().work;
        let classes = if properties.masks_by_spans { "seq, &classes, class_base" } else { "seq, class_base" };
        let fallback_rows = self.fallback.or_else(|| self.reported_rows());
        let mut context = context! {
            fallback_tile => self.fallback,
            bindings => bindings.iter().map(|(b, written)| context! {
                name => b.name(),
                slot => b.slot(),
                space => match (b, written) {
                    (Binding::Params, _) => "uniform",
                    (_, true) => "storage, read_write",
                    (_, false) => "storage, read",
                },
                type => match (b, b.width([self.head_dim, self.value_dim]), self.vec4) {
                    (Binding::Params, ..) => "Params",
                    (Binding::RowStats, ..) if self.stats_have_units() => "array<vec4<f32>>",
                    (Binding::RowStats | Binding::KeyScales | Binding::QueryScales, ..) => "array<vec2<f32>>",
                    (Binding::Fallback | Binding::Mask | Binding::MaskBits | Binding::Sequences, ..) => "array<u32>",
                    (Binding::Bias, ..) => match (self.bias.is_some_and(DType::is_half), self.bias_vec4) {
                        (true, true) => "array<vec2<u32>>",
                        (true, false) => "array<u32>",
                        (false, true) => "array<vec4<f32>>",
                        (false, false) => "array<f32>",
                    },
                    (_, None, _) => {
                        let of_cache = |(cached, options): (&Cached, &CacheOptions)| {
                            options.buffer_type(*b, (cached.access)(options))
                        };
                        self.cached().and_then(of_cache).unwrap_or("array<f32>")
                    }
                    (b, Some(_), _) if self.neighbours(*b) == 8 => "array<vec4<u32>>",
                    (_, Some(_), vec4) if properties.multiplies_halves && self.dtype.is_matrix_operand() && !written => {
                        if vec4 { "array<vec2<u32>>" } else { "array<f16>" }
                    }
                    (_, Some(_), true) => if half { "array<vec2<u32>>" } else { "array<vec4<f32>>" },
                    (_, Some(_), false) if half && *written => "array<atomic<u32>>",
                    (_, Some(_), false) => if half { "array<u32>" } else { "array<f32>" },
                },
            }).collect::<Vec<_>>(),
            loads => operands(false),
            stores => operands(true),
            operand_quads => operand_quads.clone(),
            xyzw => ["x", "y", "z", "w"],
            dtype => self.dtype.to_string(),
            is_half => half,
            is_matrix_operand => self.dtype.is_matrix_operand(),
            stats_have_units => self.stats_have_units(),
            vec4 => self.vec4,
            d_lse => self.d_lse,
            o_lo => self.o_lo,
            has_row_max => self.row_max,
            sinks => match self.sink_logits {
                SinkLogits::None => "none",
                SinkLogits::OffByOne => "off_by_one",
                SinkLogits::PerHead => "per_head",
            },
            rows_are_keys,
            kernel => self.kernel.name(),
            names => bindings.iter().map(|(b, _)| b.name()).collect::<Vec<_>>(),
            softcap => self.softcap,
            alibi => self.alibi,
            slope_rows => self.slope_rows,
            bias => self.bias.map(|dtype| dtype.to_string()),
            bias_vec4 => self.bias_vec4,
            joins_bias => self.joins_bias(),
            mask => self.mask,
            packed => self.mask_packing == MaskPacking::Bits,
            axes => self.axes.map(|Axes { batch, heads, seq_q }| context! { batch, heads, seq_q }),
            // `modified`: scores are more than products times the scale. `hides`: pairs are hidden one by one.
            modified => self.softcap || self.alibi || self.bias.is_some(),
            hides => self.mask || self.bias.is_some(),
            formed,
            multiplies_bf16,
            lifts_p => self.lifts_p(),
            rounds_p => self.rounds_p(),
            // Products of bf16 go to the ends of f32 where they are scores but for the scale.
            wide_products => multiplies_bf16 && !formed && !self.softcap,
            // The power of two that P has in d_kv.
            p_exponent => if multiplies_bf16 { 0 } else { 15 },
            has_query_unit => self.units().is_empty() && !multiplies_bf16,
            lengths => self.lengths,
            class_arguments => classes,
            // ALiBi raises scores towards the diagonal. Tiles are visited from the diagonal back, so that the maximum hardly grows.
            mirrored => properties.rescales_rarely && self.softmax() && self.alibi,
            softmax => self.softmax(),
            // A mask's words are kept in registers.
            mask_words => self.mask && properties.masks_by_spans && self.tile().is_some_and(|[_, columns]| self.has_mask_words(columns)),
            peels => self.peels(),
            chunks => 1,
            phased => false,
            optimistic => false,
            elements => None::<Value>,
            // The columns of a quad, from its first one on.
            quad_steps => [0, 1, 2, 3],
            following => match (rows_are_keys, self.mask && !properties.masks_by_spans) {
                (false, false) => "next_tile(tiles, tile)".into(),
                (true, false) => "tile + 1u".into(),
                (false, true) => format!("visible_tile({classes}, tiles, row0, row_end, next_tile(tiles, tile))"),
                (true, true) => format!("visible_tile({classes}, tiles, row0, row_end, tile + 1u)"),
            },
            sequence_words => SEQUENCE_WORDS,
            mask_block_rows => MASK_BLOCK_ROWS,
            mask_block_words => MASK_BLOCK_WORDS,
            mask_group => MASK_GROUP,
            mask_step_words => MASK_STEP_WORDS,
            fallback_rows,
            report_words => fallback_rows.map(report_words),
            // The factor of the softmax's maximum. In bf16 token scales have already turned products into scores.
            score_size => if self.column_scales().is_some() { "1.0" } else { "params.scale_size" },
            column_scales => self.column_scales().map(Binding::name),
            sanitize => self.sanitize,
            guarded_lanes => self.guarded_lanes(),
            units => self.units().to_vec(),
            // Each number is two halves, `hi` and `lo`.
            splits => properties.multiplies_halves && self.dtype.is_split_on_matrices(),
            batch => self.batch,
            lanes => DELTA_LANES,
            steps => DELTA_STEPS,
            delta_rows => DELTA_ROWS,
            threads => self.threads(),
            order => work.order(self.lengths).iter().map(digit).collect::<Vec<_>>(),
            is_listed => work.is_listed(self.lengths),
            ..properties.context()
        };
        if let Some(t) = self.tiles() {
            let accumulator_quads: BTreeMap<&str, u32> =
                operand_quads.iter().map(|(name, quads)| (*name, quads.div_ceil(t.threads_c))).collect();
            let [memory_len, partials_len] = t.arrays(self.kernel, self.head_dim, self.value_dim);
            let partials_len = partials_len + self.slope_rows_len();
            context = context! {
                micro_kernel => self.micro_kernel.to_string(),
                tile_rows => t.tile_rows(),
                tile_columns => t.tile_columns(),
                threads_r => t.threads_r,
                threads_c => t.threads_c,
                rows => t.rows,
                quads => t.quads,
                k_step => t.k_step,
                unroll => t.unroll(),
                n_step => t.n_step,
                accumulator_quads, memory_len, partials_len,
                ..context
            };
        }
        if let Some(f) = self.fragments() {
            let side = f.matrices.side;
            let fragments: BTreeMap<&str, u32> = widths().map(|(name, width)| (name, f.across(width))).collect();
            let staged = self.staged().map(Binding::name);
            let staged_rows: BTreeMap<&str, u32> = widths().map(|(name, width)| (name, f.staged_row(width))).collect();
            let staged_quads: BTreeMap<&str, u32> = fragments.iter().map(|(name, n)| (*name, n * side / 4)).collect();
            let shares = |parts: u32| (f.tile_columns() * parts).div_ceil(f.threads());
            // Parts of a row that threads load: quads, or eight neighbours.
            let parts = |quads: &BTreeMap<&'static str, u32>| -> BTreeMap<&str, u32> {
                quads.iter().map(|(name, n)| (*name, if self.vec8 { n / 2 } else { *n })).collect()
            };
            let (share_parts, operand_parts) = (parts(&staged_quads), parts(&operand_quads));
            let staged_shares: BTreeMap<&str, u32> = share_parts.iter().map(|(name, n)| (*name, shares(*n))).collect();
            let parts_of = share_parts.clone();
            context = context! {
                micro_kernel => self.micro_kernel.to_string(),
                side,
                lanes => f.matrices.lanes,
                in_step => f.matrices.in_step,
                subgroups => f.subgroups,
                row_fragments => f.rows,
                column_fragments => f.column_fragments(),
                chunks => f.columns / f.column_fragments(),
                phased => f.chunk.is_some() && self.softmax(),
                optimistic => self.is_optimistic(&f),
                p_tile => f.p_tile(self.dtype, self.head_dim),
                p_array => if f.p_tile(self.dtype, self.head_dim) == 0 { format!("{}_stage", staged[0]) } else { "p_tile".into() },
                stages => f.stages,
                registers => f.registers(self.kernel, self.dtype, self.head_dim, self.value_dim),
                tile_rows => f.tile_rows(),
                tile_columns => f.tile_columns(),
                fragment_quads => (side / 4).div_ceil(f.matrices.lanes / side),
                score_row => f.score_row(self.dtype),
                p_row => f.p_row(),
                column_shares => f.tile_columns().div_ceil(f.threads()),
                stats_per_column => f.stats_per_column(self.kernel, self.dtype),
                stages_scales => f.stages_scales(self.kernel, self.dtype),
                signed => if rows_are_keys { "k" } else { "q" },
                staged => staged.to_vec(),
                fragments, staged_rows, staged_quads, staged_shares, share_parts, operand_parts,
                loads_eight => self.vec8,
                ..context
            };
            // The column that comes to a thread's first row of the stage, where rows are shared by a power of two.
            let shared_rows = |parts: u32| {
                (f.threads() % parts == 0).then_some(f.threads() / parts).filter(|rows| rows.is_power_of_two())
            };
            let share_column = |name: &str, parts: u32| {
                let (layout, rows) = f.matrices.elements.zip(shared_rows(parts))?;
                Some(layout.column_at_expression(side, &format!("{name}_row"), Some(rows)))
            };
            let share_columns: BTreeMap<&str, Option<String>> =
                parts_of.iter().map(|(name, parts)| (*name, share_column(name, *parts))).collect();
            context = context! { reorders => self.bias_vec4, share_columns, ..context };
            context = context! { ..f.lane_context(self.bias_vec4), ..context };
        }
        if let Some((cached, options)) = self.cached() {
            let own = (cached.context)(options);
            context = context! { ..own, ..context };
        }
        render(self.kernel.name(), self.kernel.spec().template, context)
    }
}

/// The expressions from which shaders/work.wgsl decodes a digit of a workgroup's index.
fn digit(digit: &Digit) -> Value {
    match digit {
        Digit::Cell => context! { name => "cell", first => "", count => "params.slice_cells" },
        Digit::Head => context! { name => "head", first => "params.slice_head + ", count => "params.slice_heads" },
        Digit::Batch => {
            context! { name => "batch", first => "params.slice_batch + ", count => "params.slice_batches" }
        }
        Digit::Tile => context! { name => "tile", first => "params.slice_tile + ", count => "params.slice_tiles" },
        Digit::TileFromLast => {
            let first = "params.slice_tile + params.slice_tiles - 1u - ";
            context! { name => "tile", first, count => "params.slice_tiles" }
        }
    }
}
