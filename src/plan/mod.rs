//! Decisions: the kernels, their tiles, and the number of workgroups. Pure functions of numbers, for a device that need not be present.

pub(crate) mod decode;
mod loop_limit;
pub(crate) mod operand;
pub(crate) mod pass;
mod search;
mod select;
pub(crate) mod slice;
pub(crate) mod splits;
mod table;
pub(crate) mod tuning;

use std::time::Duration;

pub use crate::device::capabilities::{
    Capabilities, CooperativeMatrices, DeviceClass, Multiprocessor, RegisterFile, Rounding, SpirvVersion,
};
pub use crate::device::elements::ElementLayout;
pub use crate::kernel::OptionalOperands;
pub use crate::kernel::loops::{LoopHint, LoopHints, LoopName};
use crate::kernel::spec::{Body, Plain, Tiled, Wanted};
#[cfg(feature = "gpu")]
pub use crate::kernel::template::DUMP_VARIABLE;
pub use crate::kernel::tile::Tiling;
use crate::kernel::tile::cooperative::CooperativeTile;
pub use crate::kernel::tile::portable::PortableTile;
use crate::kernel::{BACKWARD_PASS, Binding, FORWARD_PASS, MERGE_PASS};
pub use crate::kernel::{Kernel, MicroKernel, Precision, Variant};
use crate::plan::loop_limit::{check_loop_iterations, loop_iterations};
use crate::plan::operand::dense_views;
pub use crate::plan::pass::{Pass, TilesOrigin};
use crate::plan::select::Gain;
use crate::plan::slice::DISPATCH_BUDGET;
use crate::plan::tuning::{Tuning, TuningKey};
use crate::problem::Problem;
use crate::problem::element::DType;
use crate::problem::error::{Error, Result};
pub use crate::problem::mask::{Band, KeyTiles};
pub use crate::problem::varlen::Sequence;

/// A micro-kernel, and tiles to prefer to the built-in table.
#[derive(Debug, Clone, Copy, Default)]
#[non_exhaustive]
pub struct Preference<'a> {
    /// The caller's choice. It is an error if no kernel of it fits the problem.
    pub micro_kernel: MicroKernel,
    /// How products of f32 are formed. [`Precision::Split`] is an error with operands of another type, with another micro-kernel than
    /// [`MicroKernel::Fragments`] or [`MicroKernel::Auto`], and where the problem or the device has no kernel of that micro-kernel.
    pub precision: Precision,
    /// The caller's own tiles, for measuring candidates. It is an error if they do not fit. Under [`MicroKernel::Auto`] the first tiles of
    /// a kernel also decide on its micro-kernel.
    pub tiles: &'a [(Kernel, Tiling)],
    /// Measured tiles, which are ignored if they do not fit. Under [`MicroKernel::Auto`] they also decide on the micro-kernel.
    pub tuning: Option<&'a Tuning>,
}

setters! {
    impl['a] Preference['a]
    plain {
        micro_kernel: MicroKernel,
        precision: Precision,
        tiles: &'a [(Kernel, Tiling)],
    }
    optional {
        tuning: &'a Tuning,
    }
}

/// The way a problem will be computed on a device: passes that run one after the other.
///
/// ```
/// use sink_attention::plan::{Capabilities, Kernel, Plan};
/// use sink_attention::{Options, Problem, Shape};
///
/// let shape = Shape { batch: 1, heads: 4, kv_heads: 2, seq_q: 64, seq_k: 64, head_dim: 64, value_dim: 64 };
/// let problem = Problem::new(shape, Options::new())?;
/// let device = Capabilities::webgpu_defaults(); // no device is needed
/// let plan = Plan::backward(&problem, &device)?;
/// assert!(plan.passes.iter().map(|pass| pass.variant.kernel).eq([Kernel::DELTA, Kernel::D_Q, Kernel::D_KV]));
/// assert_eq!(plan.dispatches(&problem, &device, None)?, [1, 1, 1]);
/// # Ok::<(), sink_attention::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Plan {
    /// The passes in their order.
    pub passes: Vec<Pass>,
}

/// A plan of passes of the caller's choice, to [compile](crate::Attention::precompile) them.
impl FromIterator<Pass> for Plan {
    fn from_iter<I: IntoIterator<Item = Pass>>(passes: I) -> Self {
        Plan { passes: passes.into_iter().collect() }
    }
}

impl Plan {
    /// Plans the forward pass without o_lo, for densely packed operands.
    ///
    /// # Errors
    /// [`Error::NoKernel`].
    pub fn forward(problem: &Problem, capabilities: &Capabilities) -> Result<Self> {
        Plan::forward_with(problem, OptionalOperands::default(), capabilities, &Preference::default())
    }

    /// Like [`forward`](Self::forward), with optional operands, a micro-kernel of the caller's choice and tiles to prefer.
    ///
    /// # Errors
    /// Those of [`forward`](Self::forward). Also [`Error::NoKernel`] if the problem has no kernel of the micro-kernel, and
    /// [`Error::UnexpectedOperand`] for o_lo in f32.
    pub fn forward_with(
        problem: &Problem,
        optional: OptionalOperands,
        capabilities: &Capabilities,
        preference: &Preference<'_>,
    ) -> Result<Self> {
        // Only a backward pass can find the mask's bits ready.
        let optional = OptionalOperands { mask_bits: false, ..optional };
        Passes::new(FORWARD_PASS, problem, optional, capabilities, preference)?.plan()
    }

    /// Plans the backward pass without o_lo and without a gradient into lse, for densely packed operands: delta, the sink logits' gradient
    /// (if there is one), d_q, then d_k and d_v.
    ///
    /// # Errors
    /// [`Error::NoKernel`].
    pub fn backward(problem: &Problem, capabilities: &Capabilities) -> Result<Self> {
        Plan::backward_with(problem, OptionalOperands::default(), capabilities, &Preference::default())
    }

    /// Like [`backward`](Self::backward), with optional operands, a micro-kernel of the caller's choice and tiles to prefer.
    ///
    /// # Errors
    /// Those of [`forward_with`](Self::forward_with).
    pub fn backward_with(
        problem: &Problem,
        optional: OptionalOperands,
        capabilities: &Capabilities,
        preference: &Preference<'_>,
    ) -> Result<Self> {
        Passes::new(BACKWARD_PASS, problem, optional, capabilities, preference)?.plan()
    }

    /// Plans a merge of `states` partial states of the problem, without o_lo unless `optional` says otherwise. The last merge applies the
    /// sink logits.
    ///
    /// # Errors
    /// [`Error::ZeroDimension`] if there are no states, and those of [`forward_with`](Self::forward_with).
    pub fn merge(
        problem: &Problem,
        states: usize,
        is_last: bool,
        optional: OptionalOperands,
        capabilities: &Capabilities,
    ) -> Result<Self> {
        Plan::merging(&problem.merging(states, problem.options().dtype, is_last)?, optional, capabilities)
    }

    /// Plans a merge. `problem` is a merge, too: its keys are the states.
    pub(crate) fn merging(problem: &Problem, optional: OptionalOperands, capabilities: &Capabilities) -> Result<Self> {
        Passes::new(MERGE_PASS, problem, optional, capabilities, &Preference::default())?.plan()
    }
}

impl Plan {
    /// Dispatches of each pass if the caller's operands are densely packed (1 for a pass of a decoding step). [`Prepared`](crate::Prepared)
    /// has as many with the same [budget](crate::Attention::with_dispatch_budget) for the time. `None` is the default budget.
    ///
    /// # Errors
    /// [`Error::BindingTooLarge`] and [`Error::IndexOverflow`] if the smallest piece of the work needs more of an operand than can be
    /// bound, [`Error::TooManyWorkgroups`] if it has more workgroups than a dispatch can have.
    pub fn dispatches(
        &self,
        problem: &Problem,
        capabilities: &Capabilities,
        budget: Option<Duration>,
    ) -> Result<Vec<usize>> {
        let of = |pass: &Pass| {
            if pass.variant.kernel.cached().is_some() {
                return Ok(1);
            }
            let views = dense_views(problem, &self.passes, pass);
            let slices = pass.slices(problem, &views, capabilities, budget.unwrap_or(DISPATCH_BUDGET))?;
            Ok(slices.list.len())
        };
        self.passes.iter().map(of).collect()
    }
}

/// Tiles that a workgroup looks at: starting a workgroup takes as long as looking at some reports. A device with a limit on loop iterations
/// has one.
const REPAIR_BATCH: u32 = 8;

/// Widest head of the cooperative kernels. Their loops over features are unrolled, and the registers of a lane have no room for more.
const COOPERATIVE_WIDTH: usize = 256;

/// The inputs that all passes of a plan share.
struct Passes<'a> {
    kernels: &'a [Kernel],
    problem: &'a Problem,
    vec4: bool,
    optional: OptionalOperands,
    capabilities: &'a Capabilities,
    preference: &'a Preference<'a>,
}

impl<'a> Passes<'a> {
    /// The passes of a list of kernels. Rows are read four neighbours at a time if all operands of the kernels allow it.
    fn new(
        kernels: &'a [Kernel],
        problem: &'a Problem,
        optional: OptionalOperands,
        capabilities: &'a Capabilities,
        preference: &'a Preference<'a>,
    ) -> Result<Self> {
        optional.check(problem)?;
        select::check_precision(problem, preference.precision, preference.micro_kernel)?;
        let widths = [problem.shape().head_dim, problem.shape().value_dim].map(|width| width as u32);
        let operands = kernels.iter().flat_map(|kernel| kernel.spec().reads.iter().chain(kernel.spec().writes));
        let dense = operands.filter_map(|binding| binding.width(widths)).all(|width| width.is_multiple_of(4));
        Ok(Passes { kernels, problem, vec4: dense && !optional.scalar, optional, capabilities, preference })
    }

    /// The passes of those kernels that are wanted.
    fn plan(&self) -> Result<Plan> {
        let kernels = self.kernels;
        let wanted = |kernel: &Kernel| (kernel.spec().wanted)(self.problem, self.optional);
        let mut groups = Vec::with_capacity(kernels.len());
        for kernel in kernels {
            groups.push(if wanted(kernel) == Wanted::Always { self.of(*kernel)? } else { Vec::new() });
        }
        let read: Vec<Binding> =
            groups.iter().flatten().flat_map(|pass| pass.variant.bindings()).map(|(b, _)| b).collect();
        for (group, kernel) in groups.iter_mut().zip(kernels) {
            let is_read = || kernel.spec().writes.iter().any(|binding| read.contains(binding));
            if wanted(kernel) == Wanted::WhereRead && is_read() {
                *group = self.of(*kernel)?;
            }
        }
        Ok(Plan { passes: groups.concat() })
    }

    /// The passes of a kernel. If it has tiles, they are those of one micro-kernel. A pass that reports rows runs again if columns are not
    /// finite, and a portable pass computes rows that see such a column.
    fn of(&self, kernel: Kernel) -> Result<Vec<Pass>> {
        match &kernel.spec().body {
            Body::Plain(plain) => return Ok(vec![self.plain(kernel, plain)?]),
            Body::Tiled(Tiled { micro_kernels: [only], .. }) => return Ok(vec![self.tiled(kernel, *only, None)?]),
            Body::Tiled(_) => {}
            // A problem has no cache.
            Body::Cached(_) => return Ok(Vec::new()),
        }
        let own = self.own(kernel).next();
        let measured = self.measured(kernel)?;
        // Measured tiles that do not fit are ignored.
        let fitting = || measured.filter(|tiling| self.of_tiling(kernel, *tiling, None).is_ok());
        let given = own.or_else(fitting).map(|tiling| tiling.micro_kernel());
        let gain = Gain::of(self.problem, self.capabilities);
        let Preference { micro_kernel, precision, .. } = *self.preference;
        let wanted = select::micro_kernels(micro_kernel, precision, given, gain, self.capabilities);
        let [others @ .., last] = wanted else { return Ok(Vec::new()) };
        let pass = others.iter().find_map(|micro_kernel| self.tiled(kernel, *micro_kernel, None).ok());
        let pass = pass.map_or_else(|| self.tiled(kernel, *last, None), Ok)?;
        if !pass.variant.properties().reports_rows {
            return Ok(vec![pass]);
        }
        let variant = Variant { sanitize: true, batch: self.batch(), ..pass.variant };
        let again = pass.variant.mixes_columns().then(|| Pass::new(self.problem, variant, self.capabilities));
        let again = again.transpose()?.map(|again| Pass { tiles_origin: pass.tiles_origin, ..again });
        let fallback = pass.variant.tile().map(|[rows, _]| rows);
        let portable = self.tiled(kernel, MicroKernel::Portable, fallback)?;
        Ok([Some(pass), again, Some(portable)].into_iter().flatten().collect())
    }

    /// Tiles that a workgroup looks at in turn, in a pass that computes hardly any of them again.
    fn batch(&self) -> u32 {
        if self.capabilities.loop_iterations.is_some() { 1 } else { REPAIR_BATCH }
    }

    /// The caller's tiles for a kernel.
    fn own(&self, kernel: Kernel) -> impl Iterator<Item = Tiling> {
        self.preference.tiles.iter().filter(move |(k, _)| *k == kernel).map(|(_, tiling)| *tiling)
    }

    /// Measured tiles. Those with hints for loops are an error where the hints would not reach the driver: without them the tiles are others
    /// than were measured, and nobody would see it.
    fn measured(&self, kernel: Kernel) -> Result<Option<Tiling>> {
        let get = |tuning: &Tuning| tuning.get(&TuningKey::of(kernel, self.problem)?);
        let measured = self.preference.tuning.and_then(get);
        measured.map(|tiling| self.check_loops(kernel, tiling).map(|()| tiling)).transpose()
    }

    /// The pass of a kernel that has tiles. The tiles are the caller's, or measured ones that fit, or the first of the built-in table that
    /// fit.
    fn tiled(&self, kernel: Kernel, micro_kernel: MicroKernel, fallback: Option<u32>) -> Result<Pass> {
        let Passes { problem, capabilities, .. } = *self;
        let none = |reason: String| Error::NoKernel { problem: problem.to_string(), reason };
        let is_meant = |tiling: &Tiling| tiling.micro_kernel() == micro_kernel;
        if let Some(tiling) = self.own(kernel).find(is_meant) {
            return self.of_tiling(kernel, tiling, fallback);
        }
        // The caller does not choose tiles for the fallback.
        if let Some(tiling) = self.own(kernel).next().filter(|_| fallback.is_none()) {
            let kernel = kernel.name();
            return Err(none(format!("{kernel} was asked for as {micro_kernel} and with the tiles \"{tiling}\"")));
        }
        let built_in = match micro_kernel {
            MicroKernel::Cooperative | MicroKernel::Fragments => {
                let needs_elements = micro_kernel.properties().needs_elements;
                let matrices =
                    if needs_elements { self.matrices_with_elements(kernel)? } else { self.matrices(kernel)? };
                let tiles = table::on_matrices(kernel, problem, matrices, capabilities.class, micro_kernel);
                tiles.iter().map(CooperativeTile::tiling).collect()
            }
            MicroKernel::Portable | MicroKernel::Auto => {
                let tiles = table::portable(kernel, problem, capabilities);
                // Fallback tiles are rarely needed. Small tiles let many workgroups run at once, so that nothing to do costs little.
                let slim = |tiles: &PortableTile| PortableTile {
                    k_step: tiles.k_step.min(4),
                    n_step: tiles.n_step.min(8),
                    ..*tiles
                };
                let slim: Vec<PortableTile> = tiles.iter().filter(|_| fallback.is_some()).map(slim).collect();
                slim.into_iter().chain(tiles).map(Tiling::Portable).collect::<Vec<_>>()
            }
        };
        let measured = self.measured(kernel)?.filter(is_meant).map(|tiling| (tiling, TilesOrigin::Tuning));
        let built_in = built_in.into_iter().map(|tiling| (tiling, TilesOrigin::BuiltIn));
        let mut reason = String::from("no candidate tiles");
        for (tiling, tiles_origin) in measured.into_iter().chain(built_in) {
            match self.of_tiling(kernel, tiling, fallback) {
                Err(Error::NoKernel { reason: why, .. }) => reason = why,
                pass => return pass.map(|pass| Pass { tiles_origin, ..pass }),
            }
        }
        Err(none(reason))
    }

    /// The cooperative matrices that a kernel can use. An error says why there is no cooperative kernel.
    fn matrices(&self, kernel: Kernel) -> Result<CooperativeMatrices> {
        let Passes { problem, capabilities, .. } = *self;
        let shape = problem.shape();
        let none = |reason: String| Error::NoKernel { problem: problem.to_string(), reason };
        if !kernel.tiled().is_some_and(|tiled| tiled.micro_kernels.contains(&MicroKernel::Cooperative)) {
            return Err(none(format!("{} has a portable kernel only", kernel.name())));
        }
        if !problem.options().dtype.multiplies_on_matrices() && self.preference.precision == Precision::Full {
            return Err(none(
                "cooperative matrices multiply halves; f32 operands need the portable micro-kernel, or the precision split"
                    .into(),
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

    /// As [`matrices`](Self::matrices), where their elements can be computed with in registers.
    fn matrices_with_elements(&self, kernel: Kernel) -> Result<CooperativeMatrices> {
        let matrices = self.matrices(kernel)?;
        let lacks = |what: &str| {
            let reason = format!("{} {what}", self.capabilities.name);
            Err(Error::NoKernel { problem: self.problem.to_string(), reason })
        };
        if self.capabilities.spirv.is_none() {
            return lacks("takes kernels as WGSL alone, which has no arithmetic on the elements of fragments");
        }
        if matrices.elements.is_none() {
            return lacks("has no known layout of the elements of fragments");
        }
        Ok(matrices)
    }

    /// The pass of a kernel with given tiles.
    fn of_tiling(&self, kernel: Kernel, tiling: Tiling, fallback: Option<u32>) -> Result<Pass> {
        let Passes { problem, vec4, optional, capabilities, .. } = *self;
        let none = |reason: String| Error::NoKernel { problem: problem.to_string(), reason };
        let Some(tiled) = kernel.tiled() else {
            return Err(none(format!("{kernel:?} has no tiles")));
        };
        let [d, e] = [problem.shape().head_dim, problem.shape().value_dim].map(|width| width as u32);
        // The message has the debug form of the tiles, because their short form multiplies numbers that have just failed the check.
        let unfit = |reason: String| none(format!("{tiling:?}: {reason}"));
        let (matrices, iterations) = match tiling {
            Tiling::Portable(tiles) => {
                tiles.check().map_err(unfit)?;
                (None, tiles.loop_iterations(tiled, d, e))
            }
            Tiling::Cooperative { .. } | Tiling::Fragments { .. } => {
                let matrices = match tiling.micro_kernel() {
                    MicroKernel::Fragments => self.matrices_with_elements(kernel)?,
                    _ => self.matrices(kernel)?,
                };
                let tile = CooperativeTile::new(tiling, matrices).ok_or_else(|| unfit("no fragments".into()))?;
                let has_mask = problem.options().mask.is_some();
                tile.check().and_then(|()| tile.check_kernel(kernel, has_mask)).map_err(unfit)?;
                (Some(matrices), tile.loop_iterations(tiled, d, e))
            }
        };
        self.check_loops(kernel, tiling)?;
        let variant = Variant::new(kernel, problem, vec4, optional);
        let micro_kernel = tiling.micro_kernel();
        let batch = if fallback.is_some() { self.batch() } else { 1 };
        // Neighbours of a row of the bias are keys.
        let bias_keys = variant.bias.and(problem.bias_shape()).map(|[_, _, _, keys]| keys);
        let bias_vec4 = bias_keys.is_some_and(|keys| keys.is_multiple_of(4))
            && !optional.scalar
            && micro_kernel.properties().needs_elements
            && !kernel.spec().work.rows_are_keys();
        let variant = Variant { micro_kernel, tiling: Some(tiling), matrices, fallback, batch, bias_vec4, ..variant };
        // Halves that are copied as they are fill a load of 16 bytes. Forward gains 3 % at a width of 64 and loses 2 % at 128, d_q gains 1 %,
        // d_k/d_v nothing (benches/results/2026-12-01-h200-limits.md).
        let copies = variant.dtype == DType::F16 || variant.multiplies_bf16();
        let vec8 = variant.vec4
            && !optional.quads
            && copies
            && micro_kernel.properties().needs_elements
            && !kernel.spec().work.rows_are_keys()
            && [d, e].iter().all(|width| width.is_multiple_of(8) && *width <= 64);
        let variant = Variant { vec8, ..variant };
        let tile = variant.tile().unwrap_or([1; 2]);
        check_loop_iterations(kernel, problem, capabilities, |most| {
            loop_iterations(kernel, problem, tile, iterations, most)
        })?;
        Pass::new(problem, variant, capabilities)
    }

    /// Refuses hints that would not reach the driver.
    fn check_loops(&self, kernel: Kernel, tiling: Tiling) -> Result<()> {
        let checked = tiling.loops().check(kernel, tiling.micro_kernel(), self.capabilities);
        checked.map_err(|reason| Error::NoKernel { problem: self.problem.to_string(), reason })
    }

    /// The pass of a kernel that has no tiles.
    fn plain(&self, kernel: Kernel, plain: &Plain) -> Result<Pass> {
        let Passes { problem, vec4, optional, capabilities, .. } = *self;
        let variant = Variant::new(kernel, problem, vec4, optional);
        let needed = |_| (plain.loop_iterations)(problem, &variant.own_options());
        check_loop_iterations(kernel, problem, capabilities, needed)?;
        Pass::new(problem, variant, capabilities)
    }
}

impl Pass {
    /// The pass of a kernel with given tiles, for measuring candidates. No gradient flows into lse. The pass of a cooperative kernel is the
    /// one before the fallback.
    ///
    /// # Errors
    /// [`Error::NoKernel`] if the tiles do not fit the device or do not fit together.
    pub fn with_tiles(
        kernel: Kernel,
        problem: &Problem,
        capabilities: &Capabilities,
        tiles: impl Into<Tiling>,
    ) -> Result<Self> {
        let (optional, preference) = (OptionalOperands::default(), &Preference::default());
        Passes::new(&[kernel], problem, optional, capabilities, preference)?.of_tiling(kernel, tiles.into(), None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SinkLogits;
    use crate::device::capabilities::Multiprocessor;
    use crate::plan::pass::fold;
    use crate::problem::element::DType;

    /// llvmpipe would give wrong results silently.
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
        for error in [Plan::forward(&long, software), Plan::backward(&long, software)] {
            assert!(error.unwrap_err().to_string().contains("65535"));
        }
        Plan::forward(&long, hardware).unwrap();
        Plan::backward(&long, hardware).unwrap();
        // The iterations depend on the tiles that are visited, not on the length.
        let window = problem(300_000, causal.window(crate::Window::keys(128)));
        Plan::forward(&window, software).unwrap();
        Plan::backward(&window, software).unwrap();
        Plan::forward(&problem(8192, causal), software).unwrap();

        // In half precision without o_lo the sinks' gradient sums rows one by one, and a thread gets one row in 256.
        let narrow = |dtype| {
            let batch = 1 << 20;
            let shape = crate::Shape { batch, heads: 1, kv_heads: 1, seq_q: 32, seq_k: 1, head_dim: 1, value_dim: 1 };
            Problem::new(shape, crate::Options::new().sink_logits(SinkLogits::PerHead).dtype(dtype)).unwrap()
        };
        Plan::backward_with(
            &narrow(DType::F32),
            OptionalOperands { scalar: true, ..OptionalOperands::default() },
            software,
            &Preference::default(),
        )
        .unwrap();
        Plan::backward_with(
            &narrow(DType::F16),
            OptionalOperands { scalar: true, ..OptionalOperands::default() },
            hardware,
            &Preference::default(),
        )
        .unwrap();
        let error = Plan::backward_with(
            &narrow(DType::F16),
            OptionalOperands { scalar: true, ..OptionalOperands::default() },
            software,
            &Preference::default(),
        )
        .unwrap_err()
        .to_string();
        assert!(error.contains("DSinkLogits needs 131080 or more"), "{error}");
        // The slopes' gradient sums rows one by one in every type.
        let options = narrow(DType::F32).options().sink_logits(SinkLogits::None).alibi(true);
        let alibi = Problem::new(*narrow(DType::F32).shape(), options).unwrap();
        let optional = OptionalOperands { d_alibi_slopes: true, ..OptionalOperands::default() };
        let plan = Plan::backward_with(
            &alibi,
            OptionalOperands { scalar: true, ..optional },
            software,
            &Preference::default(),
        );
        assert!(plan.unwrap_err().to_string().contains("DAlibiSlopes needs 131080 or more"));
    }

    /// Measured on an H200: two workgroups of at most 24 KiB run at a time.
    #[test]
    fn memory_and_registers_bound_resident_workgroups() {
        let samples = Capabilities::samples();
        let shape =
            crate::Shape { batch: 1, heads: 8, kv_heads: 8, seq_q: 999, seq_k: 999, head_dim: 64, value_dim: 64 };
        let problem = Problem::new(shape, crate::Options::new()).unwrap();
        let tiles: Tiling = "portable 64x32 (16x8 threads of 4x4), k_step 32, n_step 16".parse().unwrap();
        let pass = Pass::with_tiles(Kernel::FORWARD, &problem, &samples[0], tiles).unwrap();
        let variant = pass.variant;
        assert_eq!((variant.workgroup_bytes(), variant.registers(), variant.threads()), (15888, Some(112), 128));
        let resident = |workgroup_bytes, registers| {
            let multiprocessor = Some(Multiprocessor { count: 1, workgroup_bytes, registers });
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

    /// A kernel that no other code knows. It shows what a new kernel needs.
    mod negated {
        use super::*;
        use crate::kernel::sizes::DELTA_LANES;
        use crate::kernel::spec::{KernelSpec, Side, Work, adjusts_nothing, always, binds_all};
        use crate::kernel::{Binding, DELTA_ROWS};

        pub(super) const NEGATED: Kernel = Kernel::new(&KernelSpec {
            name: "negated",
            template: r##"# include "params.wgsl"
# include "operands.wgsl"
# from "entry.wgsl" import main
# call main()
  let at = decode_work(index);
  let row = at.tile * {{ delta_rows }}u + thread / {{ lanes }}u;
  if (row >= params.seq_q) { return; }
  let o_base = operand_base(params.o, at.batch, at.head) + row * params.o.seq;
  let d_o_base = operand_base(params.d_o, at.batch, at.head) + row * params.d_o.seq;
  for (var quad = thread % {{ lanes }}u; quad < {{ operand_quads.o }}u; quad += {{ lanes }}u) {
    store_o(o_base, quad, -load_d_o(d_o_base, quad));
  }
# endcall
"##,
            wanted: always,
            reads: &[Binding::Params, Binding::DO],
            writes: &[Binding::O],
            binds: binds_all,
            adjust: adjusts_nothing,
            work: Work::Rows(Side::Queries),
            body: Body::Plain(Plain {
                threads: DELTA_ROWS * DELTA_LANES,
                workgroup_bytes: 0,
                flops: |problem| f64::from(DELTA_ROWS) * problem.shape().value_dim as f64,
                loop_iterations: |problem, _| problem.shape().value_dim.div_ceil(4 * DELTA_LANES as usize) as u64,
            }),
        });
    }

    #[test]
    fn a_kernel_is_one_description_and_one_shader() {
        let shape = crate::Shape { batch: 2, heads: 3, kv_heads: 1, seq_q: 70, seq_k: 9, head_dim: 8, value_dim: 8 };
        for dtype in [DType::F32, DType::F16, DType::Bf16] {
            let problem = Problem::new(shape, crate::Options::new().dtype(dtype)).unwrap();
            let (optional, preference) = (OptionalOperands::default(), &Preference::default());
            let capabilities = &Capabilities::samples()[0];
            let passes = Passes::new(&[negated::NEGATED], &problem, optional, capabilities, preference).unwrap();
            let plan = passes.plan().unwrap();
            let [pass] = plan.passes[..] else { panic!("{plan:?}") };
            assert_eq!((pass.workgroups, pass.variant.head_dim, pass.variant.value_dim), (2 * 3 * 3, 0, 8));
            assert!(pass.to_string().starts_with("Negated, portable"), "{pass}");
            assert_eq!(plan.dispatches(&problem, capabilities, None).unwrap(), [1]);
            // A budget of no time cuts the pass into single tiles of a head.
            let cut = plan.dispatches(&problem, capabilities, Some(std::time::Duration::ZERO)).unwrap();
            assert_eq!(cut, [2 * 3 * 3]);
            let module = naga::front::wgsl::parse_str(&pass.variant.wgsl().unwrap()).unwrap();
            let flags = naga::valid::ValidationFlags::all();
            naga::valid::Validator::new(flags, naga::valid::Capabilities::all()).validate(&module).unwrap();
        }
    }
}
