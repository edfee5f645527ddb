//! Decisions: which kernel, which tiles, how many workgroups. Pure functions of numbers.

mod loop_limit;
pub(crate) mod operand;
pub(crate) mod pass;
mod search;
pub(crate) mod slice;
mod table;
pub mod tuning;

use std::time::Duration;

use crate::device::capabilities::{Capabilities, CooperativeMatrices, DeviceClass};
use crate::kernel::tile::Tiling;
use crate::kernel::tile::cooperative::Fragments;
use crate::kernel::tile::portable::Tiles;
use crate::kernel::{Binding, DELTA_LANES, DELTA_ROWS, Kernel, MicroKernel, Variant};
use crate::plan::loop_limit::{check_loop_iterations, loop_iterations};
use crate::plan::operand::{dense_views, mask_blocks};
use crate::plan::pass::tile_count;
pub use crate::plan::pass::{Pass, TilesOrigin};
use crate::plan::slice::DISPATCH_BUDGET;
use crate::plan::tuning::{Tuning, TuningKey};
use crate::problem::element::DType;
use crate::problem::error::{Error, Result};
use crate::problem::{Layout, MaskPacking, Problem, SinkLogits};

/// A micro-kernel, and tiles that go before the built-in table.
#[derive(Debug, Clone, Copy, Default)]
pub struct Preference<'a> {
    /// The caller's choice: an error where there is none for the problem.
    pub micro_kernel: MicroKernel,
    /// The caller's own, for measuring candidates: an error where they do not fit. Under [`MicroKernel::Auto`] the first
    /// one of a kernel decides on its micro-kernel, too.
    pub tiles: &'a [(Kernel, Tiling)],
    /// Measured ones, passed over where they do not fit. Under [`MicroKernel::Auto`] they decide on the micro-kernel, too.
    pub tuning: Option<&'a Tuning>,
}

/// Which operands are there that a call may go without.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct OptionalOperands {
    /// A gradient flows into lse.
    pub d_lse: bool,
    /// The forward pass writes, the backward pass reads what rounding took from o; in half precision only.
    pub o_rest: bool,
    /// The gradient by the ALiBi slopes is wanted, where there are any.
    pub d_alibi_slopes: bool,
    /// The gradient by the bias is wanted, where there is one.
    pub d_bias: bool,
    /// The backward pass finds the mask's bits, which the forward pass has left.
    pub mask_bits: bool,
    /// The gradients by k and v lie in one buffer.
    pub packed: bool,
}

/// How a problem will be computed on a device: passes that run one after the other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// The passes in their order.
    pub passes: Vec<Pass>,
}

impl Plan {
    /// Plans the forward pass without o_rest; `vec4` says whether the operands can be read four neighbours at a time.
    ///
    /// # Errors
    /// [`Error::NoKernel`].
    pub fn forward(problem: &Problem, vec4: bool, capabilities: &Capabilities) -> Result<Self> {
        Plan::forward_with(problem, vec4, OptionalOperands::default(), capabilities, &Preference::default())
    }

    /// As [`forward`](Self::forward), with operands that are optional, a micro-kernel of the caller's choice and tiles to
    /// prefer.
    ///
    /// # Errors
    /// As [`forward`](Self::forward); [`Error::NoKernel`], too, where there is no such micro-kernel for the problem;
    /// [`Error::UnexpectedOperand`] for o_rest in f32.
    pub fn forward_with(
        problem: &Problem,
        vec4: bool,
        optional: OptionalOperands,
        capabilities: &Capabilities,
        preference: &Preference<'_>,
    ) -> Result<Self> {
        optional.check(problem)?;
        let passes = Passes { problem, vec4, optional, capabilities, preference };
        let tiled = passes.of(Kernel::Forward)?;
        let mut all = passes.mask()?;
        all.extend(passes.token_scales(&tiled)?);
        all.extend(tiled);
        Ok(Plan { passes: all })
    }

    /// Plans the backward pass without o_rest: delta, the sink logits' gradient (where there is one), d_q, then d_k and
    /// d_v. `d_lse` says whether a gradient flows into lse.
    ///
    /// # Errors
    /// [`Error::NoKernel`].
    pub fn backward(problem: &Problem, vec4: bool, d_lse: bool, capabilities: &Capabilities) -> Result<Self> {
        let optional = OptionalOperands { d_lse, ..OptionalOperands::default() };
        Plan::backward_with(problem, vec4, optional, capabilities, &Preference::default())
    }

    /// As [`backward`](Self::backward), with operands that are optional, a micro-kernel of the caller's choice and tiles to
    /// prefer.
    ///
    /// # Errors
    /// As [`forward_with`](Self::forward_with).
    pub fn backward_with(
        problem: &Problem,
        vec4: bool,
        optional: OptionalOperands,
        capabilities: &Capabilities,
        preference: &Preference<'_>,
    ) -> Result<Self> {
        optional.check(problem)?;
        let all = Passes { problem, vec4, optional, capabilities, preference };
        let (shape, options) = (problem.shape(), problem.options());
        let row_tiles = shape.batch * shape.heads * shape.seq_q.div_ceil(DELTA_ROWS as usize);
        // o that has been rounded is too coarse for delta.
        let delta = if options.dtype == DType::F32 || optional.o_rest {
            vec![Pass::plain(Kernel::Delta, problem, vec4, optional, row_tiles as u128, capabilities)?]
        } else {
            all.of(Kernel::ExactDelta)?
        };
        let gradients = [all.of(Kernel::DQ)?, all.of(Kernel::DKv)?].concat();
        let mut passes = if optional.mask_bits { Vec::new() } else { all.mask()? };
        passes.extend(all.token_scales(delta.iter().chain(&gradients))?);
        passes.extend(delta);
        if options.sink_logits == SinkLogits::PerHead {
            let heads = shape.heads as u128;
            passes.push(Pass::plain(Kernel::DSinkLogits, problem, vec4, optional, heads, capabilities)?);
        }
        passes.extend(gradients);
        if options.alibi && optional.d_alibi_slopes {
            let heads = shape.heads as u128;
            passes.push(Pass::plain(Kernel::DAlibiSlopes, problem, vec4, optional, heads, capabilities)?);
        }
        if options.bias.is_some() && optional.d_bias {
            passes.push(all.tiled(Kernel::DBias, MicroKernel::Portable, None)?);
        }
        Ok(Plan { passes })
    }

    /// Plans a merge of `states` partial states of the problem, without o_rest unless `optional` says so; `vec4` as in
    /// [`forward`](Self::forward). The last merge applies the sink logits.
    ///
    /// # Errors
    /// [`Error::ZeroDimension`] for no states; as [`forward_with`](Self::forward_with).
    pub fn merge(
        problem: &Problem,
        states: usize,
        is_last: bool,
        vec4: bool,
        optional: OptionalOperands,
        capabilities: &Capabilities,
    ) -> Result<Self> {
        Plan::merging(&problem.merging(states, problem.options().dtype, is_last)?, vec4, optional, capabilities)
    }

    /// Plans a merge, of a problem whose keys are the states.
    pub(crate) fn merging(
        problem: &Problem,
        vec4: bool,
        optional: OptionalOperands,
        capabilities: &Capabilities,
    ) -> Result<Self> {
        optional.check(problem)?;
        let shape = problem.shape();
        let row_tiles = (shape.batch * shape.heads) as u128 * shape.seq_q.div_ceil(DELTA_ROWS as usize) as u128;
        Ok(Plan { passes: vec![Pass::plain(Kernel::Merge, problem, vec4, optional, row_tiles, capabilities)?] })
    }
}

impl Plan {
    /// Dispatches of each pass where the caller's operands are densely packed, as [`Prepared`](crate::Prepared) would have
    /// them with a [budget](crate::Attention::with_dispatch_budget) for the time; `None` is the default one.
    ///
    /// # Errors
    /// [`Error::BindingTooLarge`] and [`Error::IndexOverflow`] where the smallest piece of the work needs more of an operand
    /// than can be bound, [`Error::TooManyWorkgroups`] where it has more workgroups than a dispatch.
    pub fn dispatches(
        &self,
        problem: &Problem,
        capabilities: &Capabilities,
        budget: Option<Duration>,
    ) -> Result<Vec<usize>> {
        let of = |pass: &Pass| {
            let views = dense_views(problem, &self.passes, pass);
            let pieces = pass.pieces(problem, &views, capabilities, budget.unwrap_or(DISPATCH_BUDGET))?;
            Ok(pieces.list.len())
        };
        self.passes.iter().map(of).collect()
    }
}

impl OptionalOperands {
    /// What a call on host slices passes, but for d_lse.
    pub(crate) fn of_host(problem: &Problem) -> Self {
        OptionalOperands {
            d_lse: false,
            o_rest: problem.options().dtype != DType::F32,
            d_alibi_slopes: true,
            d_bias: true,
            mask_bits: false,
            packed: false,
        }
    }

    fn check(self, problem: &Problem) -> Result<()> {
        if self.o_rest { problem.check_rest() } else { Ok(()) }
    }
}

/// Starting a workgroup takes as long as looking at some reports. On a device with a limit to loop iterations it is one.
const REPAIR_BATCH: u32 = 8;

/// Widest head of the cooperative kernels. Their loops over features are unrolled, and in lanes' registers there is no room for
/// more.
const COOPERATIVE_WIDTH: usize = 256;

/// What the passes of a plan have in common.
struct Passes<'a> {
    problem: &'a Problem,
    vec4: bool,
    optional: OptionalOperands,
    capabilities: &'a Capabilities,
    preference: &'a Preference<'a>,
}

impl Passes<'_> {
    /// The passes of a kernel that has tiles: one of the portable micro-kernel, or one of the cooperative one, one that runs it
    /// again where columns are not finite, and a portable one that computes rows that see such a column.
    fn of(&self, kernel: Kernel) -> Result<Vec<Pass>> {
        let own = self.own(kernel).next();
        // Measured tiles that do not fit are passed over.
        let fitting = || self.measured(kernel).filter(|tiling| self.of_tiling(kernel, *tiling, None).is_ok());
        let cooperative = || self.tiled(kernel, MicroKernel::Cooperative, None);
        let pass = match (self.preference.micro_kernel, own.or_else(fitting)) {
            (MicroKernel::Cooperative, _) | (MicroKernel::Auto, Some(Tiling::Cooperative { .. })) => {
                Some(cooperative()?)
            }
            // Elsewhere not before the kernels have been checked and measured there: `tune` does.
            (MicroKernel::Auto, None) if self.capabilities.class == DeviceClass::Nvidia => cooperative().ok(),
            _ => None,
        };
        let Some(pass) = pass else { return Ok(vec![self.tiled(kernel, MicroKernel::Portable, None)?]) };
        let variant = Variant { sanitize: true, batch: self.batch(), ..pass.variant };
        let again = pass
            .variant
            .mixes_columns()
            .then(|| Pass::new(self.problem, variant, pass.workgroups.into(), self.capabilities));
        let again = again.transpose()?.map(|again| Pass { tiles_origin: pass.tiles_origin, ..again });
        let repairs = pass.variant.tile().map(|[rows, _]| rows);
        let portable = self.tiled(kernel, MicroKernel::Portable, repairs)?;
        Ok([Some(pass), again, Some(portable)].into_iter().flatten().collect())
    }

    /// Tiles that a workgroup looks at in turn, where hardly any is to be computed again.
    fn batch(&self) -> u32 {
        if self.capabilities.loop_iterations.is_some() { 1 } else { REPAIR_BATCH }
    }

    /// What packs the boolean mask, where there is one.
    fn mask(&self) -> Result<Vec<Pass>> {
        let Passes { problem, vec4, optional, capabilities, .. } = *self;
        let Some(axes) = problem.options().mask else { return Ok(Vec::new()) };
        let [batch, heads, rows, keys] = axes.of(problem.pairs_shape());
        let [_, block_rows, groups] = mask_blocks(rows, keys);
        let workgroups = (batch * heads) as u128 * block_rows as u128 * groups as u128;
        Ok(vec![Pass::plain(Kernel::MaskBits, problem, vec4, optional, workgroups, capabilities)?])
    }

    /// What finds the token scales that passes ask for.
    fn token_scales<'p>(&self, passes: impl IntoIterator<Item = &'p Pass>) -> Result<Vec<Pass>> {
        let Passes { problem, vec4, optional, capabilities, .. } = *self;
        let s = problem.shape();
        let asked: Vec<Binding> = passes.into_iter().filter_map(|pass| pass.variant.column_scales()).collect();
        let kernels = [
            (Binding::KeyScales, Kernel::KeyScales, s.kv_heads, s.seq_k),
            (Binding::QueryScales, Kernel::QueryScales, s.heads, s.seq_q),
        ];
        let of = |(_, kernel, heads, rows): (Binding, Kernel, usize, usize)| {
            let workgroups = (s.batch * heads) as u128 * rows.div_ceil(DELTA_ROWS as usize) as u128;
            Pass::plain(kernel, problem, vec4, optional, workgroups, capabilities)
        };
        kernels.into_iter().filter(|(binding, ..)| asked.contains(binding)).map(of).collect()
    }

    /// The caller's tiles for a kernel.
    fn own(&self, kernel: Kernel) -> impl Iterator<Item = Tiling> {
        self.preference.tiles.iter().filter(move |(k, _)| *k == kernel).map(|(_, tiling)| *tiling)
    }

    fn measured(&self, kernel: Kernel) -> Option<Tiling> {
        self.preference.tuning?.get(&TuningKey::of(kernel, self.problem)?)
    }

    /// A pass of a kernel that has tiles: with the caller's, with measured ones that fit, or with the first of the
    /// built-in table that fit.
    fn tiled(&self, kernel: Kernel, micro_kernel: MicroKernel, repairs: Option<u32>) -> Result<Pass> {
        let Passes { problem, capabilities, .. } = *self;
        let none = |reason: String| Error::NoKernel { problem: problem.to_string(), reason };
        let is_meant = |tiling: &Tiling| tiling.micro_kernel() == micro_kernel;
        if let Some(tiling) = self.own(kernel).find(is_meant) {
            return self.of_tiling(kernel, tiling, repairs);
        }
        // What the repairs run with, the caller need not say.
        if let Some(tiling) = self.own(kernel).next().filter(|_| repairs.is_none()) {
            let kernel = kernel.name();
            return Err(none(format!("{kernel} was asked for as {micro_kernel} and with the tiles \"{tiling}\"")));
        }
        let built_in = match micro_kernel {
            MicroKernel::Cooperative => {
                let matrices = self.matrices(kernel)?;
                let fragments = table::cooperative(kernel, problem, matrices, capabilities.class);
                fragments.map(|fragments| fragments.tiling()).collect()
            }
            _ => {
                let tiles = table::portable(kernel, problem, capabilities.class);
                // There is hardly ever anything to repair: with little workgroup memory many find that out at a time.
                let slim = |tiles: &Tiles| Tiles { chunk: tiles.chunk.min(4), slab: tiles.slab.min(8), ..*tiles };
                let slim: Vec<Tiles> = tiles.iter().filter(|_| repairs.is_some()).map(slim).collect();
                slim.into_iter().chain(tiles).map(Tiling::Portable).collect::<Vec<_>>()
            }
        };
        let measured = self.measured(kernel).filter(is_meant).map(|tiling| (tiling, TilesOrigin::Tuning));
        let built_in = built_in.into_iter().map(|tiling| (tiling, TilesOrigin::BuiltIn));
        let mut reason = String::from("no candidate tiles");
        for (tiling, tiles_origin) in measured.into_iter().chain(built_in) {
            match self.of_tiling(kernel, tiling, repairs) {
                Err(Error::NoKernel { reason: why, .. }) => reason = why,
                pass => return pass.map(|pass| Pass { tiles_origin, ..pass }),
            }
        }
        Err(none(reason))
    }

    /// The cooperative matrices that a kernel can use, or why there is no cooperative kernel.
    fn matrices(&self, kernel: Kernel) -> Result<CooperativeMatrices> {
        let Passes { problem, capabilities, .. } = *self;
        let shape = problem.shape();
        let none = |reason: String| Error::NoKernel { problem: problem.to_string(), reason };
        if kernel == Kernel::DBias {
            return Err(none("the gradient by the bias has a portable kernel only".into()));
        }
        if problem.options().dtype == DType::F32 {
            return Err(none(
                "cooperative matrices multiply halves; f32 operands need the portable micro-kernel".into(),
            ));
        }
        let Some(matrices) = capabilities.cooperative else {
            return Err(none(format!("{} has no cooperative matrices of f16 with sums in f32", capabilities.name)));
        };
        if !matrices.is_sound() {
            let CooperativeMatrices { side, lanes, .. } = matrices;
            return Err(none(format!("there are no cooperative matrices of side {side} with subgroups of {lanes}")));
        }
        let width = shape.head_dim.max(shape.value_dim);
        if width > COOPERATIVE_WIDTH {
            let reason = format!("cooperative kernels take widths up to {COOPERATIVE_WIDTH}, not {width}");
            return Err(none(reason));
        }
        Ok(matrices)
    }

    /// The pass of a kernel with given tiles.
    fn of_tiling(&self, kernel: Kernel, tiling: Tiling, repairs: Option<u32>) -> Result<Pass> {
        let Passes { problem, vec4, optional, capabilities, .. } = *self;
        let none = |reason: String| Error::NoKernel { problem: problem.to_string(), reason };
        if !kernel.has_tiles() {
            return Err(none(format!("{kernel:?} has no tiles")));
        }
        let [d, e] = [problem.shape().head_dim, problem.shape().value_dim].map(|width| width as u32);
        // Not the short form of the tiles: it multiplies numbers that have just failed the check.
        let unfit = |reason: String| none(format!("{tiling:?}: {reason}"));
        let (matrices, iterations) = match tiling {
            Tiling::Portable(tiles) => {
                tiles.check().map_err(unfit)?;
                (None, tiles.loop_iterations(kernel, d, e))
            }
            Tiling::Cooperative { subgroups, rows, columns, stages } => {
                let matrices = self.matrices(kernel)?;
                let fragments = Fragments { matrices, subgroups, rows, columns, stages };
                fragments.check().map_err(unfit)?;
                (Some(matrices), fragments.loop_iterations(kernel, d, e))
            }
        };
        let variant = variant(kernel, problem, vec4, optional);
        let micro_kernel = tiling.micro_kernel();
        let batch = if repairs.is_some() { self.batch() } else { 1 };
        let variant = Variant { micro_kernel, tiling: Some(tiling), matrices, repairs, batch, ..variant };
        let tile = variant.tile().unwrap_or([1; 2]);
        check_loop_iterations(kernel, problem, capabilities, |most| {
            loop_iterations(kernel, problem, tile, iterations, most)
        })?;
        Pass::new(problem, variant, tile_count(kernel, problem, tile), capabilities)
    }
}

fn variant(kernel: Kernel, problem: &Problem, vec4: bool, optional: OptionalOperands) -> Variant {
    let (shape, options) = (problem.shape(), problem.options());
    // What a kernel does not look at is not part of its variant, so that fewer are compiled.
    let [uses_q, uses_v] = match kernel {
        Kernel::DSinkLogits | Kernel::DAlibiSlopes | Kernel::MaskBits => [false, false],
        Kernel::Delta | Kernel::Merge => [false, true],
        _ => [true, true],
    };
    let is_tiled = kernel.has_tiles();
    // Which rows of a padded batch count.
    let reads_used = kernel == Kernel::Merge && options.sink_logits != SinkLogits::None;
    Variant {
        kernel,
        micro_kernel: MicroKernel::Portable,
        dtype: match kernel {
            // Of words and of f32 alone.
            Kernel::MaskBits | Kernel::DAlibiSlopes => DType::F32,
            _ => options.dtype,
        },
        head_dim: if uses_q { shape.head_dim as u32 } else { 0 },
        value_dim: if uses_v { shape.value_dim as u32 } else { 0 },
        vec4: vec4 && uses_v,
        // The gradients by q, k and v see the sink through lse and delta alone.
        sink_logits: match kernel {
            Kernel::ExactDelta
            | Kernel::DQ
            | Kernel::DKv
            | Kernel::DBias
            | Kernel::DAlibiSlopes
            | Kernel::MaskBits
            | Kernel::KeyScales
            | Kernel::QueryScales => SinkLogits::None,
            // A logit of zero has no gradient.
            Kernel::Delta if options.sink_logits == SinkLogits::OffByOne => SinkLogits::None,
            _ => options.sink_logits,
        },
        softcap: is_tiled && options.softcap.is_some(),
        // The delta kernels hand the slopes on.
        alibi: options.alibi && (is_tiled || kernel == Kernel::Delta),
        bias: options.bias.map(|_| options.bias_dtype).filter(|_| is_tiled),
        mask: is_tiled && options.mask.is_some(),
        mask_packing: if kernel == Kernel::MaskBits { options.mask_packing } else { MaskPacking::Bytes },
        axes: options.bias.filter(|_| kernel == Kernel::DBias),
        packed: optional.packed && kernel == Kernel::DKv,
        moments: kernel == Kernel::DQ && options.alibi && optional.d_alibi_slopes,
        lengths: problem.has_lengths() && (is_tiled || (reads_used && options.layout != Layout::Thd)),
        // Enters with delta.
        d_lse: optional.d_lse && matches!(kernel, Kernel::Delta | Kernel::ExactDelta),
        o_rest: optional.o_rest
            && matches!(kernel, Kernel::Forward | Kernel::Delta | Kernel::DSinkLogits | Kernel::Merge),
        tiling: None,
        matrices: None,
        repairs: None,
        sanitize: false,
        batch: 1,
    }
}

impl Pass {
    /// A pass of a kernel that has no tiles.
    fn plain(
        kernel: Kernel,
        problem: &Problem,
        vec4: bool,
        optional: OptionalOperands,
        workgroups: u128,
        capabilities: &Capabilities,
    ) -> Result<Self> {
        let shape = problem.shape();
        let variant = variant(kernel, problem, vec4, optional);
        check_loop_iterations(kernel, problem, capabilities, |_| match kernel {
            Kernel::Delta => {
                let lanes = shape.value_dim.div_ceil(4).div_ceil(DELTA_LANES as usize);
                (lanes * (1 + DELTA_LANES as usize)) as u64 + 8
            }
            Kernel::Merge => (2 + shape.value_dim.div_ceil(4 * DELTA_LANES as usize)) as u64 * (shape.seq_k as u64 + 1),
            // Steps of up to 32 keys, or queries, twice.
            Kernel::MaskBits => 4 * (1 + 2 * 32),
            Kernel::KeyScales | Kernel::QueryScales => {
                2 * shape.head_dim.max(shape.value_dim).div_ceil(4 * DELTA_LANES as usize) as u64 + 8
            }
            _ => {
                let sums_rows = variant.sums_delta() || kernel == Kernel::DAlibiSlopes;
                let tile = if sums_rows { 1 } else { DELTA_ROWS as usize };
                (shape.batch as u64 * shape.seq_q.div_ceil(tile) as u64).div_ceil(u64::from(variant.threads())) + 8
            }
        })?;
        Pass::new(problem, variant, workgroups, capabilities)
    }

    /// The pass of a kernel with given tiles, for measuring candidates; no gradient flows into lse. A cooperative kernel's
    /// is the one that comes before the repairs.
    ///
    /// # Errors
    /// [`Error::NoKernel`] where the tiles do not fit the device or do not fit together.
    pub fn with_tiles(
        kernel: Kernel,
        problem: &Problem,
        vec4: bool,
        capabilities: &Capabilities,
        tiles: impl Into<Tiling>,
    ) -> Result<Self> {
        let preference = &Preference::default();
        Passes { problem, vec4, optional: OptionalOperands::default(), capabilities, preference }.of_tiling(
            kernel,
            tiles.into(),
            None,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::capabilities::Multiprocessor;
    use crate::plan::pass::fold;

    /// llvmpipe would give wrong results without a word.
    #[test]
    fn a_driver_that_ends_loops_is_refused_long_sequences() {
        let samples = Capabilities::samples();
        let find = |name| samples.iter().find(|c: &&Capabilities| c.name.contains(name)).unwrap();
        let (software, hardware) = (find("llvmpipe"), find("H200"));
        let problem = |seq, options| {
            let shape =
                crate::Shape { batch: 1, heads: 2, kv_heads: 1, seq_q: seq, seq_k: seq, head_dim: 64, value_dim: 64 };
            Problem::new(shape, options).unwrap()
        };
        let causal = crate::Options::new().causal(true);
        let long = problem(300_000, causal);
        for error in [Plan::forward(&long, true, software), Plan::backward(&long, true, false, software)] {
            assert!(error.unwrap_err().to_string().contains("65535"));
        }
        Plan::forward(&long, true, hardware).unwrap();
        Plan::backward(&long, true, false, hardware).unwrap();
        // The tiles that are visited count, not the length.
        let window = problem(300_000, causal.window(crate::Window::keys(128)));
        Plan::forward(&window, true, software).unwrap();
        Plan::backward(&window, true, false, software).unwrap();
        Plan::forward(&problem(8192, causal), true, software).unwrap();

        // In half precision without o_rest the sinks' gradient goes by rows, of which a thread gets one in 256.
        let narrow = |dtype| {
            let batch = 1 << 20;
            let shape = crate::Shape { batch, heads: 1, kv_heads: 1, seq_q: 32, seq_k: 1, head_dim: 1, value_dim: 1 };
            Problem::new(shape, crate::Options::new().sink_logits(SinkLogits::PerHead).dtype(dtype)).unwrap()
        };
        Plan::backward(&narrow(DType::F32), false, false, software).unwrap();
        Plan::backward(&narrow(DType::F16), false, false, hardware).unwrap();
        let error = Plan::backward(&narrow(DType::F16), false, false, software).unwrap_err().to_string();
        assert!(error.contains("DSinkLogits needs 131080 or more"), "{error}");
        // The slopes' gradient goes by rows in every type.
        let options = narrow(DType::F32).options().sink_logits(SinkLogits::None).alibi(true);
        let alibi = Problem::new(*narrow(DType::F32).shape(), options).unwrap();
        let optional = OptionalOperands { d_alibi_slopes: true, ..OptionalOperands::default() };
        let plan = Plan::backward_with(&alibi, false, optional, software, &Preference::default());
        assert!(plan.unwrap_err().to_string().contains("DAlibiSlopes needs 131080 or more"));
    }

    /// What was measured on an H200: two workgroups of at most 24 KiB at a time.
    #[test]
    fn memory_and_registers_bound_resident_workgroups() {
        let samples = Capabilities::samples();
        let shape =
            crate::Shape { batch: 1, heads: 8, kv_heads: 8, seq_q: 999, seq_k: 999, head_dim: 64, value_dim: 64 };
        let problem = Problem::new(shape, crate::Options::new()).unwrap();
        let tiles = crate::Tiles { threads_r: 16, threads_c: 8, rows: 4, quads: 1, chunk: 8, slab: 16 };
        let pass = Pass::with_tiles(Kernel::Forward, &problem, true, &samples[0], tiles).unwrap();
        let variant = pass.variant;
        assert_eq!((variant.workgroup_bytes(), variant.registers(), variant.threads()), (15888, Some(112), 128));
        let resident = |workgroup_bytes, registers| {
            let multiprocessor = Some(Multiprocessor { workgroup_bytes, registers });
            pass.resident_workgroups(&Capabilities { multiprocessor, ..samples[0].clone() })
        };
        assert_eq!(pass.resident_workgroups(&samples[0]), Some(3));
        assert_eq!(resident(2 * 15888, 65536), Some(2));
        assert_eq!(resident(2 * 15888 - 1, 65536), Some(1));
        assert_eq!(resident(1 << 20, 65536), Some(4), "each takes 112 * 128 registers");
        assert_eq!(resident(1 << 20, 100), Some(1), "the driver spills");
        assert_eq!(pass.resident_workgroups(samples.last().unwrap()), None);
    }

    #[test]
    fn folding_covers_every_workgroup() {
        for most in [1, 2, 7, 65535] {
            for n in [1u128, 2, 6, 7, 8, 49, 50, 65535, 65536, 131_071, 4_000_000_000] {
                match fold(n, most) {
                    Ok((total, [x, y])) => {
                        assert_eq!(u128::from(total), n);
                        assert!(x <= most && y <= most && u128::from(x) * u128::from(y) >= n);
                        assert!(u64::from(x) * u64::from(y) <= u64::from(u32::MAX), "the index must not wrap");
                    }
                    Err(_) => assert!(n > u128::from(most) * u128::from(most), "{n} in {most}"),
                }
            }
        }
    }
}
