//! Decisions: which kernel, which tiles, how many workgroups. Pure functions of numbers.

use std::fmt;

use crate::capabilities::Capabilities;
use crate::element::DType;
use crate::error::{Error, Result};
use crate::fragments::{self, Fragments};
use crate::problem::{Problem, SinkLogits};
use crate::shader::{DELTA_LANES, DELTA_ROWS, Kernel, MicroKernel, Variant};
use crate::tiles::{Tiles, candidates};
use crate::tuning::{Tuning, TuningKey};

/// One kernel of a problem on a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pass {
    /// The kernel.
    pub variant: Variant,
    /// Workgroups in all.
    pub workgroups: u32,
    /// The same, folded into two dimensions.
    pub grid: [u32; 2],
    /// Where the tiles come from, for the kernels that have tiles.
    pub tiles_origin: TilesOrigin,
}

/// Where the tiles of a [`Pass`] come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TilesOrigin {
    /// The table that the crate brings along.
    BuiltIn,
    /// A [`Tuning`].
    Tuning,
    /// The caller.
    Caller,
}

impl fmt::Display for TilesOrigin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            TilesOrigin::BuiltIn => "built-in table",
            TilesOrigin::Tuning => "tuning",
            TilesOrigin::Caller => "caller",
        })
    }
}

/// A micro-kernel, and tiles that go before the built-in table.
#[derive(Debug, Clone, Copy, Default)]
pub struct Preference<'a> {
    /// The caller's choice: an error where there is none for the problem.
    pub micro_kernel: MicroKernel,
    /// The caller's own, for measuring candidates: an error where they do not fit.
    pub tiles: &'a [(Kernel, Tiles)],
    /// The same for cooperative kernels.
    pub fragments: &'a [(Kernel, Fragments)],
    /// Measured ones, passed over where they do not fit.
    pub tuning: Option<&'a Tuning>,
}

/// Which operands are there that a call may go without.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct OptionalOperands {
    /// A gradient flows into lse.
    pub d_lse: bool,
    /// The forward pass writes, the backward pass reads what rounding took from o; in half precision only.
    pub o_rest: bool,
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
    /// [`Error::NoKernel`] and [`Error::TooManyWorkgroups`].
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
        Ok(Plan { passes: passes.of(Kernel::Forward)? })
    }

    /// Plans the backward pass without o_rest: delta, the sink logits' gradient (where there is one), d_q, then d_k and
    /// d_v. `d_lse` says whether a gradient flows into lse.
    ///
    /// # Errors
    /// [`Error::NoKernel`] and [`Error::TooManyWorkgroups`].
    pub fn backward(problem: &Problem, vec4: bool, d_lse: bool, capabilities: &Capabilities) -> Result<Self> {
        let optional = OptionalOperands { d_lse, o_rest: false };
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
        let mut passes = if options.dtype == DType::F32 || optional.o_rest {
            vec![Pass::plain(Kernel::Delta, problem, vec4, optional, row_tiles as u128, capabilities)?]
        } else {
            all.of(Kernel::ExactDelta)?
        };
        if options.sink_logits == SinkLogits::PerHead {
            let heads = shape.heads as u128;
            passes.push(Pass::plain(Kernel::DSinkLogits, problem, vec4, optional, heads, capabilities)?);
        }
        passes.extend(all.of(Kernel::DQ)?);
        passes.extend(all.of(Kernel::DKv)?);
        Ok(Plan { passes })
    }
}

impl OptionalOperands {
    /// What a call on host slices passes, but for d_lse.
    pub(crate) fn of_host(problem: &Problem) -> Self {
        OptionalOperands { d_lse: false, o_rest: problem.options().dtype != DType::F32 }
    }

    fn check(self, problem: &Problem) -> Result<()> {
        if self.o_rest { problem.check_rest() } else { Ok(()) }
    }
}

/// Widest head for which fragments stay in registers.
const COOPERATIVE_WIDTH: usize = 128;

/// What the passes of a plan have in common.
struct Passes<'a> {
    problem: &'a Problem,
    vec4: bool,
    optional: OptionalOperands,
    capabilities: &'a Capabilities,
    preference: &'a Preference<'a>,
}

impl Passes<'_> {
    /// The passes of a kernel that has tiles: one of the portable micro-kernel, or one of the cooperative one and one that
    /// computes again what that cannot.
    fn of(&self, kernel: Kernel) -> Result<Vec<Pass>> {
        let Passes { problem, vec4, optional, capabilities, preference } = *self;
        let portable = |repairs| Pass::tiled(kernel, problem, vec4, optional, capabilities, preference, repairs);
        let cooperative = match preference.micro_kernel {
            MicroKernel::Portable => None,
            MicroKernel::Cooperative => Some(self.cooperative(kernel)?),
            MicroKernel::Auto if preference.tiles.iter().any(|(k, _)| *k == kernel) => None,
            MicroKernel::Auto => self.cooperative(kernel).ok(),
        };
        let Some(pass) = cooperative else { return Ok(vec![portable(None)?]) };
        let repairs = pass.variant.fragments.map(|fragments| fragments.tile_rows());
        Ok(vec![pass, portable(repairs)?])
    }

    /// The cooperative pass of a kernel: the first candidate that fits.
    fn cooperative(&self, kernel: Kernel) -> Result<Pass> {
        let Passes { problem, vec4, optional, capabilities, preference } = *self;
        let shape = problem.shape();
        let none = |reason: String| Error::NoKernel { problem: problem.to_string(), reason };
        if problem.options().dtype == DType::F32 {
            return Err(none(
                "cooperative matrices multiply halves; f32 operands need the portable micro-kernel".into(),
            ));
        }
        let Some(matrices) = capabilities.cooperative else {
            return Err(none(format!("{} has no cooperative matrices of f16 with sums in f32", capabilities.name)));
        };
        if kernel != Kernel::Forward {
            return Err(none("not yet".into()));
        }
        let width = shape.head_dim.max(shape.value_dim);
        if width > COOPERATIVE_WIDTH {
            let reason = format!("cooperative kernels take widths up to {COOPERATIVE_WIDTH}, not {width}");
            return Err(none(reason));
        }
        if let Some((_, fragments)) = preference.fragments.iter().find(|(k, _)| *k == kernel) {
            return Pass::of_fragments(kernel, problem, vec4, optional, capabilities, *fragments);
        }
        let mut reason = String::from("no candidate fragments");
        for fragments in fragments::candidates(kernel, problem, matrices, capabilities.class) {
            match Pass::of_fragments(kernel, problem, vec4, optional, capabilities, fragments) {
                Err(Error::NoKernel { reason: why, .. }) => reason = why,
                pass => return pass,
            }
        }
        Err(none(reason))
    }
}

fn variant(kernel: Kernel, problem: &Problem, vec4: bool, optional: OptionalOperands) -> Variant {
    let (shape, options) = (problem.shape(), problem.options());
    // What a kernel does not look at is not part of its variant, so that fewer are compiled.
    let [uses_q, uses_v] = match kernel {
        Kernel::DSinkLogits => [false, false],
        Kernel::Delta => [false, true],
        _ => [true, true],
    };
    Variant {
        kernel,
        micro_kernel: MicroKernel::Portable,
        dtype: options.dtype,
        head_dim: if uses_q { shape.head_dim as u32 } else { 0 },
        value_dim: if uses_v { shape.value_dim as u32 } else { 0 },
        vec4: vec4 && uses_v,
        // The gradients by q, k and v see the sink through lse and delta alone.
        sink_logits: match kernel {
            Kernel::ExactDelta | Kernel::DQ | Kernel::DKv => SinkLogits::None,
            // A logit of zero has no gradient.
            Kernel::Delta if options.sink_logits == SinkLogits::OffByOne => SinkLogits::None,
            _ => options.sink_logits,
        },
        // Enters with delta.
        d_lse: optional.d_lse && matches!(kernel, Kernel::Delta | Kernel::ExactDelta),
        o_rest: optional.o_rest && matches!(kernel, Kernel::Forward | Kernel::Delta | Kernel::DSinkLogits),
        tiles: None,
        fragments: None,
        repairs: None,
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
            _ => {
                let tile = if variant.sums_delta() { 1 } else { DELTA_ROWS as usize };
                (shape.batch as u64 * shape.seq_q.div_ceil(tile) as u64).div_ceil(u64::from(variant.threads())) + 8
            }
        })?;
        Pass::new(problem, variant, workgroups, capabilities)
    }

    /// A pass of a kernel that has tiles: with the caller's, with measured ones that fit, or with the first of the
    /// built-in table that fit.
    fn tiled(
        kernel: Kernel,
        problem: &Problem,
        vec4: bool,
        optional: OptionalOperands,
        capabilities: &Capabilities,
        preference: &Preference<'_>,
        repairs: Option<u32>,
    ) -> Result<Self> {
        if let Some((_, tiles)) = preference.tiles.iter().find(|(k, _)| *k == kernel) {
            return Pass::of_tiles(kernel, problem, vec4, optional, capabilities, *tiles, repairs);
        }
        let key = TuningKey::of(kernel, MicroKernel::Portable, problem);
        let measured = preference.tuning.zip(key).and_then(|(tuning, key)| tuning.get(&key));
        let measured = measured.map(|tiles| (tiles, TilesOrigin::Tuning));
        let built_in = candidates(kernel, problem, capabilities.class);
        let built_in = built_in.into_iter().map(|tiles| (tiles, TilesOrigin::BuiltIn));
        let mut reason = String::from("no candidate tiles");
        for (tiles, tiles_origin) in measured.into_iter().chain(built_in) {
            match Pass::of_tiles(kernel, problem, vec4, optional, capabilities, tiles, repairs) {
                Err(Error::NoKernel { reason: why, .. }) => reason = why,
                pass => return pass.map(|pass| Pass { tiles_origin, ..pass }),
            }
        }
        Err(Error::NoKernel { problem: problem.to_string(), reason })
    }

    /// The pass of a kernel with given tiles, for measuring candidates; without optional operands.
    ///
    /// # Errors
    /// [`Error::NoKernel`] where the tiles do not fit the device or do not fit together,
    /// [`Error::TooManyWorkgroups`].
    pub fn with_tiles(
        kernel: Kernel,
        problem: &Problem,
        vec4: bool,
        capabilities: &Capabilities,
        tiles: Tiles,
    ) -> Result<Self> {
        Pass::of_tiles(kernel, problem, vec4, OptionalOperands::default(), capabilities, tiles, None)
    }

    fn of_tiles(
        kernel: Kernel,
        problem: &Problem,
        vec4: bool,
        optional: OptionalOperands,
        capabilities: &Capabilities,
        tiles: Tiles,
        repairs: Option<u32>,
    ) -> Result<Self> {
        if !kernel.has_tiles() {
            let reason = format!("{kernel:?} has no tiles");
            return Err(Error::NoKernel { problem: problem.to_string(), reason });
        }
        if let Err(reason) = tiles.check() {
            // Not the short form of the tiles: it multiplies numbers that have just failed the check.
            return Err(Error::NoKernel { problem: problem.to_string(), reason: format!("{tiles:?}: {reason}") });
        }
        let shape = problem.shape();
        let tile = [tiles.tile_rows(), tiles.tile_columns()];
        let iterations = tiles.loop_iterations(kernel, shape.head_dim as u32, shape.value_dim as u32);
        check_loop_iterations(kernel, problem, capabilities, |most| {
            loop_iterations(kernel, problem, tile, iterations, most)
        })?;
        let variant = Variant { tiles: Some(tiles), repairs, ..variant(kernel, problem, vec4, optional) };
        Pass::new(problem, variant, row_tiles(kernel, problem, tiles.tile_rows()), capabilities)
    }

    /// The cooperative pass of a kernel with given fragments.
    fn of_fragments(
        kernel: Kernel,
        problem: &Problem,
        vec4: bool,
        optional: OptionalOperands,
        capabilities: &Capabilities,
        fragments: Fragments,
    ) -> Result<Self> {
        if let Err(reason) = fragments.check() {
            return Err(Error::NoKernel { problem: problem.to_string(), reason: format!("{fragments:?}: {reason}") });
        }
        let shape = problem.shape();
        let tile = [fragments.tile_rows(), fragments.tile_columns()];
        let iterations = fragments.loop_iterations(kernel, shape.head_dim as u32, shape.value_dim as u32);
        check_loop_iterations(kernel, problem, capabilities, |most| {
            loop_iterations(kernel, problem, tile, iterations, most)
        })?;
        let variant = Variant {
            micro_kernel: MicroKernel::Cooperative,
            fragments: Some(fragments),
            ..variant(kernel, problem, vec4, optional)
        };
        Pass::new(problem, variant, row_tiles(kernel, problem, fragments.tile_rows()), capabilities)
    }

    fn new(problem: &Problem, variant: Variant, workgroups: u128, capabilities: &Capabilities) -> Result<Self> {
        let needs = [
            ("bytes of workgroup memory", variant.workgroup_bytes(), capabilities.workgroup_bytes),
            ("threads in a workgroup", variant.threads(), capabilities.workgroup_threads),
            ("storage buffers", variant.storage_buffers(), capabilities.storage_buffers),
        ];
        for (what, needed, offered) in needs {
            if needed > offered {
                let reason = format!("{} needs {needed} {what}, the device offers {offered}", variant.name());
                return Err(Error::NoKernel { problem: problem.to_string(), reason });
            }
        }
        let (workgroups, grid) = fold(workgroups, capabilities.grid_dimension)?;
        Ok(Pass { variant, workgroups, grid, tiles_origin: TilesOrigin::Caller })
    }
}

/// Tiles of rows of all heads.
fn row_tiles(kernel: Kernel, problem: &Problem, rows: u32) -> u128 {
    let shape = problem.shape();
    let (seq, heads) = match kernel {
        Kernel::DKv => (shape.seq_k, shape.kv_heads),
        _ => (shape.seq_q, shape.heads),
    };
    seq.div_ceil(rows as usize) as u128 * (shape.batch * heads) as u128
}

/// Refuses what the driver would end before it is done; `needed` gets the most that it allows.
fn check_loop_iterations(
    kernel: Kernel,
    problem: &Problem,
    capabilities: &Capabilities,
    needed: impl FnOnce(u64) -> u64,
) -> Result<()> {
    let Some(most) = capabilities.loop_iterations else { return Ok(()) };
    let needed = needed(most);
    if needed <= most {
        return Ok(());
    }
    let reason = format!(
        "{} ends loops in silence after {most} iterations, {kernel:?} needs {needed} or more; \
         the CPU path has no such limit",
        capabilities.name
    );
    Err(Error::NoKernel { problem: problem.to_string(), reason })
}

/// Loop iterations of the longest workgroup, at most, given those of an open and of a masked tile; exact only up to `most`.
fn loop_iterations(kernel: Kernel, problem: &Problem, tile: [u32; 2], iterations: [u64; 2], most: u64) -> u64 {
    let (shape, mask) = (problem.shape(), problem.mask());
    let [rows, columns] = tile.map(|n| n as usize);
    let [open, masked] = iterations;
    let of_tile = |is_open| if is_open { open } else { masked };
    let visited = |range: &std::ops::Range<usize>| match kernel {
        Kernel::DKv => mask.query_tiles(range, columns).len(),
        _ => mask.key_tiles(range, columns).count(),
    };
    let rows_are_keys = kernel == Kernel::DKv;
    let [seq, heads] = if rows_are_keys { [shape.seq_k, problem.group()] } else { [shape.seq_q, 1] };
    let ranges = (0..seq).step_by(rows).map(|start| start..(start + rows).min(seq));
    // Too many even if nothing is masked: the exact count of a long sequence would take long, too.
    let longest = ranges.clone().map(|range| visited(&range)).max().unwrap_or(0) as u64;
    let least = heads as u64 * (1 + longest * open);
    if least > most {
        return least;
    }
    let workgroups = ranges.map(|range| {
        if rows_are_keys {
            let column = |tile| tile * columns..(tile + 1) * columns;
            let is_open = |tile| column(tile).end <= shape.seq_q && mask.all_visible(&column(tile), &range);
            mask.query_tiles(&range, columns).map(|tile| of_tile(is_open(tile))).sum::<u64>()
        } else {
            let (visited, full) = (mask.key_tiles(&range, columns).count(), mask.full_tiles(&range, columns));
            full as u64 * of_tile(true) + (visited - full) as u64 * of_tile(false)
        }
    });
    heads as u64 * (1 + workgroups.max().unwrap_or(0))
}

/// Folds a row of workgroups into two dimensions of at most `most` each.
fn fold(workgroups: u128, most: u32) -> Result<(u32, [u32; 2])> {
    // WebGPU's own limit; with it no index wraps.
    let most = most.min(65535);
    let total = u64::from(most) * u64::from(most);
    if workgroups > u128::from(total) {
        return Err(Error::TooManyWorkgroups { workgroups, most: total });
    }
    let workgroups = workgroups as u32;
    let y = workgroups.div_ceil(most);
    Ok((workgroups, [workgroups.div_ceil(y), y]))
}

impl fmt::Display for Pass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let v = &self.variant;
        write!(f, "{:?}, {} {}", v.kernel, v.micro_kernel, v.dtype)?;
        if v.value_dim > 0 {
            write!(f, ", {} loads", if v.vec4 { "vec4" } else { "scalar" })?;
        }
        if let Some(fragments) = &v.fragments {
            let registers = fragments.registers(v.kernel, v.head_dim, v.value_dim);
            write!(f, ", tiles {fragments}, ~{registers} registers")?;
        }
        if let Some(rows) = v.repairs {
            write!(f, ", repairs tiles of {rows} rows")?;
        }
        if let Some(tiles) = &v.tiles {
            let registers = tiles.registers(v.kernel, v.head_dim, v.value_dim);
            write!(f, ", tiles {tiles}, ~{registers} registers")?;
        }
        let [x, y] = self.grid;
        write!(f, ", {} B workgroup memory, {} workgroups as {x}x{y}", v.workgroup_bytes(), self.workgroups)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
