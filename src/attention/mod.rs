//! The operator.

#[cfg(feature = "safetensors")]
mod case;
pub mod partial;
mod upload;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

pub(crate) use self::upload::{HostBuffers, HostOperand, gradients_of, of_inputs, of_results};
use crate::cpu;
use crate::device::{Device, DeviceChoice, DeviceReason, describe};
use crate::exec::buffers::{BackwardBuffers, ForwardBuffers};
use crate::exec::pipeline::Pipelines;
use crate::exec::prepared::Prepared;
use crate::kernel::tile::Tiling;
use crate::kernel::{Binding, Kernel, MicroKernel, Precision};
use crate::plan::operand::mask_scratch_bytes;
use crate::plan::slice::DISPATCH_BUDGET;
use crate::plan::tuning::Tuning;
use crate::plan::{OptionalOperands, Plan, Preference};
use crate::problem::element::Element;
use crate::problem::error::{Error, Result};
use crate::problem::{Gradients, Inputs, Output, Problem, Upstream};

/// The attention operator on one device. Cheap to clone; clones share compiled kernels.
///
/// ```
/// use sink_attention::{Attention, Inputs, Options, Problem, Shape};
///
/// let attention = Attention::new()?; // Attention::cpu() always works
/// println!("{}", attention.device_description());
///
/// let shape = Shape { batch: 1, heads: 1, kv_heads: 1, seq_q: 3, seq_k: 3, head_dim: 1, value_dim: 1 };
/// let problem = Problem::new(shape, Options::new().causal(true))?;
/// let output = attention.forward(&problem, &Inputs::new(&[0.0f32; 3], &[1.0; 3], &[3.0, 5.0, 7.0]))?;
/// for (o, mean) in output.o.iter().zip([3.0, 4.0, 5.0]) {
///     assert!((o - mean).abs() < 1e-5); // scores of zero: means of the values so far
/// }
/// # Ok::<(), sink_attention::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Attention {
    backend: Backend,
    reason: DeviceReason,
    micro_kernel: MicroKernel,
    precision: Precision,
    dispatch_budget: Duration,
}

#[derive(Debug, Clone)]
enum Backend {
    Cpu,
    Gpu { device: Device, pipelines: Arc<Pipelines>, tuning: Option<Arc<Tuning>> },
}

impl Attention {
    /// The operator on the device that `SINK_ATTENTION_ADAPTER` names, else on the best GPU, else on the CPU: software
    /// adapters, which are slower than the CPU path, are taken only where they are asked for, see [`DeviceChoice`].
    /// [`device_description`](Self::device_description) says what was taken, and why.
    ///
    /// # Errors
    /// [`Error::AdapterNotFound`], [`Error::DeviceRequest`], [`Error::TuningFile`], [`Error::TuningDevice`].
    #[cfg(not(target_family = "wasm"))]
    pub fn new() -> Result<Self> {
        Attention::open(&DeviceChoice::from_env())
    }

    /// The operator on a chosen device; blocks until the device is there. On a GPU, the file that
    /// `SINK_ATTENTION_TUNING` names is loaded as by [`with_tuning`](Self::with_tuning).
    ///
    /// # Errors
    /// [`Error::NoAdapter`], [`Error::AdapterNotFound`], [`Error::DeviceRequest`], [`Error::TuningFile`],
    /// [`Error::TuningDevice`].
    #[cfg(not(target_family = "wasm"))]
    pub fn open(choice: &DeviceChoice) -> Result<Self> {
        pollster::block_on(Attention::open_async(choice))
    }

    /// As [`open`](Self::open), for browsers and async hosts.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub async fn open_async(choice: &DeviceChoice) -> Result<Self> {
        let attention = Attention::open_untuned_async(choice).await?;
        match if attention.is_gpu() { Tuning::from_env()? } else { None } {
            Some(tuning) => attention.with_tuning(tuning),
            None => Ok(attention),
        }
    }

    /// As [`open`](Self::open), but with the built-in table of tiles, whatever `SINK_ATTENTION_TUNING` names.
    ///
    /// # Errors
    /// [`Error::NoAdapter`], [`Error::AdapterNotFound`], [`Error::DeviceRequest`].
    #[cfg(not(target_family = "wasm"))]
    pub fn open_untuned(choice: &DeviceChoice) -> Result<Self> {
        pollster::block_on(Attention::open_untuned_async(choice))
    }

    /// As [`open_untuned`](Self::open_untuned), for browsers and async hosts.
    ///
    /// # Errors
    /// As [`open_untuned`](Self::open_untuned).
    pub async fn open_untuned_async(choice: &DeviceChoice) -> Result<Self> {
        let (device, reason) = Device::choose_async(choice).await?;
        Ok(Attention { reason, ..device.map_or_else(Attention::cpu, Attention::on) })
    }

    /// The operator on the CPU, which always works.
    pub fn cpu() -> Self {
        Attention::of(Backend::Cpu)
    }

    /// The operator on a device of the host application. Buffers must come from that device. One of another device is
    /// [`Error::Gpu`] where both are of one [`wgpu::Instance`]; across instances wgpu cannot distinguish them, and may panic.
    pub fn on(device: Device) -> Self {
        let backend = Backend::Gpu { device, pipelines: Arc::default(), tuning: None };
        Attention::of(backend)
    }

    /// With a micro-kernel of the caller's choice instead of the planner's. Where there is none for a problem on the
    /// device, passes fail with [`Error::NoKernel`]; on the CPU with [`Error::NeedsGpu`], unless it is
    /// [`MicroKernel::Auto`].
    pub fn with_micro_kernel(self, micro_kernel: MicroKernel) -> Self {
        Attention { micro_kernel, ..self }
    }

    /// With another precision of products of f32, on tensor cores with [`Precision::Split`]. Where a problem or the device has no kernel
    /// for that, passes fail with [`Error::NoKernel`], as they do for operands of f16 and bf16; on the CPU with [`Error::NeedsGpu`].
    /// It concerns the passes of whole problems and prefills: decoding steps are computed in full precision.
    pub fn with_precision(self, precision: Precision) -> Self {
        Attention { precision, ..self }
    }

    pub(crate) fn micro_kernel(&self) -> MicroKernel {
        self.micro_kernel
    }

    fn of(backend: Backend) -> Self {
        let reason = DeviceReason::Asked;
        let (micro_kernel, precision) = (MicroKernel::Auto, Precision::Full);
        Attention { backend, reason, micro_kernel, precision, dispatch_budget: DISPATCH_BUDGET }
    }

    /// How long a dispatch may hold the GPU, 250 ms unless set: a pass whose time is estimated longer is cut into several
    /// dispatches, with the same bits as results. Browsers and desktop systems reset a GPU that does not answer for some two
    /// seconds. The estimate divides floating-point operations by what the slowest devices of the device's class do, so most
    /// devices take much less. [`Duration::MAX`] never cuts for the time; with zero, each tile of rows of each key head has a
    /// dispatch of its own, the least there is. Nothing changes on the CPU.
    pub fn with_dispatch_budget(self, budget: Duration) -> Self {
        Attention { dispatch_budget: budget, ..self }
    }

    /// The CPU has no micro-kernels to choose from, and no tensor cores.
    pub(crate) fn check_cpu(&self) -> Result<()> {
        if self.precision == Precision::Split {
            return Err(Error::NeedsGpu { call: "the precision split" });
        }
        match self.micro_kernel {
            MicroKernel::Auto => Ok(()),
            MicroKernel::Portable => Err(Error::NeedsGpu { call: "the portable micro-kernel" }),
            MicroKernel::Cooperative => Err(Error::NeedsGpu { call: "the cooperative micro-kernel" }),
            MicroKernel::Fragments => Err(Error::NeedsGpu { call: "the micro-kernel on fragments" }),
        }
    }

    /// Prefers measured tiles to the built-in table wherever they fit, instead of those it may have preferred before.
    /// Results change by no more than the order of sums does.
    ///
    /// # Errors
    /// [`Error::TuningDevice`] if they were measured on another device, [`Error::NeedsGpu`] on the CPU.
    pub fn with_tuning(self, tuning: Tuning) -> Result<Self> {
        match self.backend {
            Backend::Cpu => Err(Error::NeedsGpu { call: "with_tuning" }),
            Backend::Gpu { device, pipelines, .. } => {
                tuning.check_device(&device.capabilities().name)?;
                let backend = Backend::Gpu { device, pipelines, tuning: Some(Arc::new(tuning)) };
                Ok(Attention { backend, ..self })
            }
        }
    }

    /// The measured tiles that are preferred.
    pub fn tuning(&self) -> Option<&Tuning> {
        match &self.backend {
            Backend::Cpu => None,
            Backend::Gpu { tuning, .. } => tuning.as_deref(),
        }
    }

    /// Keeps compiled kernels in a file from one process to the next. The file at `path` is loaded, and
    /// [`save_pipeline_cache`](Self::save_pipeline_cache) writes the kernels compiled from now on to it. Kernels that were compiled before
    /// this call are forgotten. A file that is absent, spoiled, or of another device or driver counts as empty.
    ///
    /// The file must be as safe from malicious changes as the program itself: it holds code for the GPU.
    ///
    /// # Errors
    /// [`Error::PipelineCache`] where the file cannot be read, or the device was opened without
    /// [`wgpu::Features::PIPELINE_CACHE`], which only Vulkan has (drivers of other backends keep caches of their own);
    /// [`Error::NeedsGpu`] on the CPU; [`Error::OutOfMemory`], [`Error::DeviceLost`] and [`Error::Gpu`] for what the driver
    /// reports.
    pub fn with_pipeline_cache(self, path: impl AsRef<Path>) -> Result<Self> {
        match self.backend {
            Backend::Cpu => Err(Error::NeedsGpu { call: "with_pipeline_cache" }),
            Backend::Gpu { device, tuning, .. } => {
                let pipelines = Arc::new(pollster::block_on(Pipelines::with_cache(&device, path.as_ref()))?);
                Ok(Attention { backend: Backend::Gpu { device, pipelines, tuning }, ..self })
            }
        }
    }

    /// Writes the file of [`with_pipeline_cache`](Self::with_pipeline_cache), which is replaced as a whole or not at
    /// all. Returns its number of bytes, or `None` without a pipeline cache.
    ///
    /// # Errors
    /// [`Error::PipelineCache`].
    pub fn save_pipeline_cache(&self) -> Result<Option<usize>> {
        match &self.backend {
            Backend::Cpu => Ok(None),
            Backend::Gpu { pipelines, .. } => pipelines.save_cache(),
        }
    }

    /// The plan of [`forward`](Self::forward), whose operands are densely packed. In half precision it computes o_lo, too.
    ///
    /// # Errors
    /// [`Error::NeedsGpu`] on the CPU; [`Error::NoKernel`].
    pub fn plan_forward(&self, problem: &Problem) -> Result<Plan> {
        let (device, preference) = self.planning("plan_forward", &[])?;
        let optional = OptionalOperands::for_training(problem);
        Plan::forward_with(problem, optional, device.capabilities(), &preference)
    }

    /// The plan of [`backward`](Self::backward) without d_lse. In half precision it reads o_lo.
    ///
    /// # Errors
    /// As [`plan_forward`](Self::plan_forward).
    pub fn plan_backward(&self, problem: &Problem) -> Result<Plan> {
        let (device, preference) = self.planning("plan_backward", &[])?;
        let optional = OptionalOperands::for_training(problem);
        Plan::backward_with(problem, optional, device.capabilities(), &preference)
    }

    /// Compiles a plan's kernels ahead of their first use, natively side by side: `attention.precompile(
    /// &attention.plan_forward(&problem)?)`. Kernels depend on widths, options and tiles, hardly on lengths.
    ///
    /// # Errors
    /// [`Error::NeedsGpu`] on the CPU; [`Error::OutOfMemory`], [`Error::DeviceLost`] and [`Error::Gpu`] for what the driver
    /// reports.
    #[cfg(not(target_family = "wasm"))]
    pub fn precompile(&self, plan: &Plan) -> Result<()> {
        pollster::block_on(self.precompile_async(plan))
    }

    /// As [`precompile`](Self::precompile), for browsers and async hosts.
    ///
    /// # Errors
    /// As [`precompile`](Self::precompile).
    pub async fn precompile_async(&self, plan: &Plan) -> Result<()> {
        match &self.backend {
            Backend::Cpu => Err(Error::NeedsGpu { call: "precompile" }),
            Backend::Gpu { device, pipelines, .. } => pipelines.get_all(device, plan).await.map(|_| ()),
        }
    }

    /// The device and its pipelines.
    pub(crate) fn gpu(&self, call: &'static str) -> Result<(&Device, &Arc<Pipelines>)> {
        match &self.backend {
            Backend::Cpu => Err(Error::NeedsGpu { call }),
            Backend::Gpu { device, pipelines, .. } => Ok((device, pipelines)),
        }
    }

    fn planning<'a>(
        &'a self,
        call: &'static str,
        tiles: &'a [(Kernel, Tiling)],
    ) -> Result<(&'a Device, Preference<'a>)> {
        let device = self.device().ok_or(Error::NeedsGpu { call })?;
        Ok((device, self.preference(tiles, self.tuning())))
    }

    fn preference<'a>(&self, tiles: &'a [(Kernel, Tiling)], tuning: Option<&'a Tuning>) -> Preference<'a> {
        Preference { micro_kernel: self.micro_kernel, precision: self.precision, tiles, tuning }
    }

    /// The name of the device, for people.
    pub fn device_name(&self) -> String {
        match &self.backend {
            Backend::Cpu => format!("CPU ({} threads)", rayon::current_num_threads()),
            Backend::Gpu { device, .. } => describe(&device.wgpu().adapter_info()),
        }
    }

    /// The reason why this device was taken.
    pub fn device_reason(&self) -> &DeviceReason {
        &self.reason
    }

    /// The name of the device and the reason why it was taken: for the first line that a program prints.
    pub fn device_description(&self) -> String {
        format!("{}: {}", self.device_name(), self.reason)
    }

    /// Whether a GPU adapter (hardware or software) computes.
    pub fn is_gpu(&self) -> bool {
        self.device().is_some()
    }

    /// The GPU device, unless the operator runs on the CPU.
    pub fn device(&self) -> Option<&Device> {
        match &self.backend {
            Backend::Cpu => None,
            Backend::Gpu { device, .. } => Some(device),
        }
    }

    /// Forward pass on host slices; blocks until the result is there.
    ///
    /// # Errors
    /// Those of [`Problem::check_inputs`] and, on a GPU, of [`prepare_forward`](Self::prepare_forward),
    /// [`Error::BufferTooLarge`].
    #[cfg(not(target_family = "wasm"))]
    pub fn forward<T: Element>(&self, problem: &Problem, inputs: &Inputs<'_, T>) -> Result<Output<T>> {
        pollster::block_on(self.forward_async(problem, inputs))
    }

    /// As [`forward`](Self::forward), for browsers and async hosts. On the CPU it computes before it returns.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub async fn forward_async<T: Element>(&self, problem: &Problem, inputs: &Inputs<'_, T>) -> Result<Output<T>> {
        Ok(self.forward_whole(problem, inputs, false).await?.0)
    }

    /// As [`forward`](Self::forward), and the largest score of each row, `[batch, heads, seq_q]` as lse lies
    /// ([`Problem::lse_shape`]), in natural-log units: for monitoring, and for clipping the projections of q and k (QK-clip).
    ///
    /// ```text
    /// row_max_i = max over visible j of s_ij
    /// s_ij = softcap(scale q_i.k_j) - slope |p - j| + bias_ij          as in the softmax, before the sink logit
    /// ```
    ///
    /// -infinity where a query sees nothing, NaN where a score that it sees is NaN, +infinity where one exceeds f32: as lse. It is the
    /// maximum of the scores as they are computed, and takes no bit of o and lse: within 1e-5 of the definition
    /// ([`cpu::reference::row_max`]), relative to max(1, |row_max|), for operands whose lse is.
    ///
    /// ```
    /// use sink_attention::{Attention, Inputs, Options, Problem, Shape};
    ///
    /// let shape = Shape { batch: 1, heads: 1, kv_heads: 1, seq_q: 2, seq_k: 2, head_dim: 1, value_dim: 1 };
    /// let problem = Problem::new(shape, Options::new().causal(true).scale(0.5))?;
    /// let inputs = Inputs::new(&[1.0, 2.0], &[-4.0, 3.0], &[0.0, 1.0]);
    /// let (_, row_max) = Attention::cpu().forward_with_row_max(&problem, &inputs)?;
    /// assert_eq!(row_max, [-2.0, 3.0]);
    /// # Ok::<(), sink_attention::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`forward`](Self::forward); [`Error::NoKernel`] where the kernel then binds more storage buffers than the device offers: with
    /// o_lo and one other option it binds 8, which every device has.
    #[cfg(not(target_family = "wasm"))]
    pub fn forward_with_row_max<T: Element>(
        &self,
        problem: &Problem,
        inputs: &Inputs<'_, T>,
    ) -> Result<(Output<T>, Vec<f32>)> {
        pollster::block_on(self.forward_with_row_max_async(problem, inputs))
    }

    /// As [`forward_with_row_max`](Self::forward_with_row_max), for browsers and async hosts.
    ///
    /// # Errors
    /// As [`forward_with_row_max`](Self::forward_with_row_max).
    pub async fn forward_with_row_max_async<T: Element>(
        &self,
        problem: &Problem,
        inputs: &Inputs<'_, T>,
    ) -> Result<(Output<T>, Vec<f32>)> {
        let (output, row_max) = self.forward_whole(problem, inputs, true).await?;
        Ok((output, row_max.unwrap_or_default()))
    }

    /// The results of a forward pass, and row_max where it is wanted.
    async fn forward_whole<T: Element>(
        &self,
        problem: &Problem,
        inputs: &Inputs<'_, T>,
        has_row_max: bool,
    ) -> Result<(Output<T>, Option<Vec<f32>>)> {
        let Backend::Gpu { device, .. } = &self.backend else {
            self.check_cpu()?;
            let (output, row_max) = cpu::forward_with_row_max(problem, inputs)?;
            return Ok((output, has_row_max.then_some(row_max)));
        };
        problem.check_inputs(inputs)?;
        let optional = [(Binding::OLo, T::DTYPE.has_rounding_error()), (Binding::RowMax, has_row_max)];
        let optional = optional.into_iter().filter(|(_, is_wanted)| *is_wanted).map(|(binding, _)| binding);
        let results = [Binding::O, Binding::Lse].into_iter().chain(optional);
        let create = || HostBuffers::new(device).upload(of_inputs(inputs))?.results(problem, results);
        let buffers = device.scoped_async("uploading operands", create).await??;
        let prepared = self.prepare_forward_async(problem, &buffers.forward()?).await?;
        let results = buffers.download(|encoder| prepared.encode(encoder)).await?;
        Ok((results.output().await?, results.optional(Binding::RowMax).await?))
    }

    /// Backward pass on host slices, from the results of the forward pass; blocks until the result is there.
    ///
    /// # Errors
    /// Those of [`Problem::check_inputs`] and [`Problem::check_upstream`] and, on a GPU, those of
    /// [`forward`](Self::forward).
    #[cfg(not(target_family = "wasm"))]
    pub fn backward<T: Element>(
        &self,
        problem: &Problem,
        inputs: &Inputs<'_, T>,
        saved: &Output<T>,
        upstream: &Upstream<'_, T>,
    ) -> Result<Gradients<T>> {
        pollster::block_on(self.backward_async(problem, inputs, saved, upstream))
    }

    /// As [`backward`](Self::backward), for browsers and async hosts. On the CPU it computes before it returns.
    ///
    /// # Errors
    /// As [`backward`](Self::backward).
    pub async fn backward_async<T: Element>(
        &self,
        problem: &Problem,
        inputs: &Inputs<'_, T>,
        saved: &Output<T>,
        upstream: &Upstream<'_, T>,
    ) -> Result<Gradients<T>> {
        problem.check_inputs(inputs)?;
        problem.check_upstream(saved, upstream)?;
        let Backend::Gpu { device, .. } = &self.backend else {
            self.check_cpu()?;
            return cpu::backward(problem, inputs, saved, upstream);
        };
        let create = || {
            let operands = of_inputs(inputs).into_iter().chain(of_results(saved, upstream));
            HostBuffers::new(device).upload(operands)?.results(problem, gradients_of(inputs))
        };
        let buffers = device.scoped_async("uploading operands", create).await??;
        let prepared = self.prepare_backward_async(problem, &buffers.backward()?).await?;
        buffers.download(|encoder| prepared.encode(encoder)).await?.gradients().await
    }

    /// Prepares a forward pass on buffers of the caller's.
    ///
    /// # Errors
    /// [`Error::NeedsGpu`] on the CPU; [`Error::BufferTooSmall`], [`Error::BufferUsage`],
    /// [`Error::BindingTooLarge`], [`Error::IndexOverflow`], [`Error::Aliasing`] and
    /// [`Error::OverlappingStrides`] for operands that cannot be bound, [`Error::MissingOperand`],
    /// [`Error::UnexpectedOperand`] and [`Error::InvalidOption`] for operands that do not fit the options;
    /// [`Error::NoKernel`] and [`Error::TooManyWorkgroups`] where the device's limits are too small for a piece of the work;
    /// [`Error::OutOfMemory`], [`Error::DeviceLost`] and [`Error::Gpu`] for what the driver reports.
    #[cfg(not(target_family = "wasm"))]
    pub fn prepare_forward(&self, problem: &Problem, buffers: &ForwardBuffers<'_>) -> Result<Prepared> {
        pollster::block_on(self.prepare_forward_async(problem, buffers))
    }

    /// As [`prepare_forward`](Self::prepare_forward), for browsers and async hosts.
    ///
    /// # Errors
    /// As [`prepare_forward`](Self::prepare_forward).
    pub async fn prepare_forward_async(&self, problem: &Problem, buffers: &ForwardBuffers<'_>) -> Result<Prepared> {
        self.prepare_forward_with_async(problem, buffers, &[]).await
    }

    /// As [`prepare_forward`](Self::prepare_forward) with tiles of the caller's choice, for measuring candidates; they count as
    /// [`Preference::tiles`] do.
    ///
    /// # Errors
    /// As [`prepare_forward`](Self::prepare_forward).
    #[cfg(not(target_family = "wasm"))]
    pub fn prepare_forward_with(
        &self,
        problem: &Problem,
        buffers: &ForwardBuffers<'_>,
        tiles: &[(Kernel, Tiling)],
    ) -> Result<Prepared> {
        pollster::block_on(self.prepare_forward_with_async(problem, buffers, tiles))
    }

    /// As [`prepare_forward_with`](Self::prepare_forward_with), for browsers and async hosts.
    ///
    /// # Errors
    /// As [`prepare_forward`](Self::prepare_forward).
    pub async fn prepare_forward_with_async(
        &self,
        problem: &Problem,
        buffers: &ForwardBuffers<'_>,
        tiles: &[(Kernel, Tiling)],
    ) -> Result<Prepared> {
        match &self.backend {
            Backend::Cpu => Err(Error::NeedsGpu { call: "prepare_forward" }),
            Backend::Gpu { device, pipelines, tuning } => {
                let preference = self.preference(tiles, tuning.as_deref());
                Prepared::forward(device, pipelines, problem, buffers, &preference, self.dispatch_budget).await
            }
        }
    }

    /// Bytes of [`ForwardBuffers::mask_scratch`]; `None` where the problem has no boolean mask.
    pub fn mask_scratch_bytes(problem: &Problem) -> Option<u64> {
        problem.options().mask.map(|_| mask_scratch_bytes(problem))
    }

    /// Prepares a backward pass on buffers of the caller's. Allocates the scratch that its kernels share:
    /// eight bytes for each query of each head; with sink logits, but for half precision without o_lo, four for each 32 queries
    /// or part of them; where the ALiBi slopes' gradient is wanted four for each query of each head; a mask's bits.
    ///
    /// # Errors
    /// As [`prepare_forward`](Self::prepare_forward).
    #[cfg(not(target_family = "wasm"))]
    pub fn prepare_backward(&self, problem: &Problem, buffers: &BackwardBuffers<'_>) -> Result<Prepared> {
        pollster::block_on(self.prepare_backward_async(problem, buffers))
    }

    /// As [`prepare_backward`](Self::prepare_backward), for browsers and async hosts.
    ///
    /// # Errors
    /// As [`prepare_backward`](Self::prepare_backward).
    pub async fn prepare_backward_async(&self, problem: &Problem, buffers: &BackwardBuffers<'_>) -> Result<Prepared> {
        self.prepare_backward_with_async(problem, buffers, &[]).await
    }

    /// As [`prepare_backward`](Self::prepare_backward) with tiles of the caller's choice, for measuring candidates; they count as
    /// [`Preference::tiles`] do.
    ///
    /// # Errors
    /// As [`prepare_backward`](Self::prepare_backward).
    #[cfg(not(target_family = "wasm"))]
    pub fn prepare_backward_with(
        &self,
        problem: &Problem,
        buffers: &BackwardBuffers<'_>,
        tiles: &[(Kernel, Tiling)],
    ) -> Result<Prepared> {
        pollster::block_on(self.prepare_backward_with_async(problem, buffers, tiles))
    }

    /// As [`prepare_backward_with`](Self::prepare_backward_with), for browsers and async hosts.
    ///
    /// # Errors
    /// As [`prepare_backward`](Self::prepare_backward).
    pub async fn prepare_backward_with_async(
        &self,
        problem: &Problem,
        buffers: &BackwardBuffers<'_>,
        tiles: &[(Kernel, Tiling)],
    ) -> Result<Prepared> {
        match &self.backend {
            Backend::Cpu => Err(Error::NeedsGpu { call: "prepare_backward" }),
            Backend::Gpu { device, pipelines, tuning } => {
                let preference = self.preference(tiles, tuning.as_deref());
                Prepared::backward(device, pipelines, problem, buffers, &preference, self.dispatch_budget).await
            }
        }
    }
}
