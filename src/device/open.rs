//! Finding a device, and what to ask of it.

use std::cell::RefCell;
use std::fmt;
#[cfg(not(target_family = "wasm"))]
use std::sync::OnceLock;

use crate::device::adapter::{device_descriptor, is_software};
use crate::device::bfloat16;
use crate::device::capabilities::{Capabilities, CooperativeMatrices, Rounding};
#[cfg(not(target_family = "wasm"))]
use crate::device::elements::ElementLayout;
#[cfg(not(target_family = "wasm"))]
use crate::device::markers::Operands;
#[cfg(not(target_family = "wasm"))]
use crate::device::probe;
use crate::problem::error::{Error, Result};

/// Environment variable that names the device of [`DeviceChoice::from_env`].
pub const ADAPTER_VARIABLE: &str = "SINK_ATTENTION_ADAPTER";

/// Where to compute.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum DeviceChoice {
    /// The best GPU, or the CPU path where there is none: a software adapter (Mesa's llvmpipe, SwiftShader in browsers) is no
    /// GPU here, for it is 10 to 25 times slower than the CPU path.
    #[default]
    Auto,
    /// The best GPU adapter, a software one where there is no other; an error where there is none. For calls that need a
    /// GPU device: those on buffers, and caches on the GPU.
    Gpu,
    /// The GPU adapter with this index in [`adapters`], or the best one whose name contains this text,
    /// whatever their case.
    Adapter(String),
    /// The CPU path.
    Cpu,
}

impl DeviceChoice {
    /// The choice that `SINK_ATTENTION_ADAPTER` names: an index or a part of a name, `cpu` for the CPU path, `gpu` for
    /// [`DeviceChoice::Gpu`]; [`DeviceChoice::Auto`] where it is unset or empty.
    pub fn from_env() -> Self {
        match std::env::var(ADAPTER_VARIABLE) {
            Ok(name) if name.eq_ignore_ascii_case("cpu") => DeviceChoice::Cpu,
            Ok(name) if name.eq_ignore_ascii_case("gpu") => DeviceChoice::Gpu,
            Ok(name) if !name.is_empty() => DeviceChoice::Adapter(name),
            _ => DeviceChoice::Auto,
        }
    }

    /// Selects one of the [`adapters`], which are given by their infos in the same order, and gives the reason.
    ///
    /// # Errors
    /// [`Error::NoAdapter`], [`Error::AdapterNotFound`].
    pub fn select(&self, adapters: &[wgpu::AdapterInfo]) -> Result<Selection> {
        let asked = |adapter| Ok(Selection { adapter, reason: DeviceReason::Asked });
        match self {
            DeviceChoice::Cpu => asked(None),
            DeviceChoice::Auto => Ok(match (adapters.iter().position(|info| !is_software(info)), adapters.first()) {
                (Some(index), _) => Selection { adapter: Some(index), reason: DeviceReason::BestGpu },
                (None, Some(info)) => Selection { adapter: None, reason: DeviceReason::OnlySoftware(describe(info)) },
                (None, None) => Selection { adapter: None, reason: DeviceReason::NoAdapter },
            }),
            DeviceChoice::Gpu if adapters.is_empty() => Err(Error::NoAdapter),
            DeviceChoice::Gpu => asked(Some(0)),
            DeviceChoice::Adapter(wanted) => {
                let names: Vec<String> = adapters.iter().map(describe).collect();
                let by_index = wanted.parse().ok().filter(|&index: &usize| index < names.len());
                let needle = wanted.to_lowercase();
                let index = by_index.or_else(|| names.iter().position(|n| n.to_lowercase().contains(&needle)));
                let index = index.ok_or(Error::AdapterNotFound { wanted: wanted.clone(), available: names })?;
                asked(Some(index))
            }
        }
    }
}

/// The adapter that a [`DeviceChoice`] selects.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Selection {
    /// Index of the adapter; `None` is the CPU path.
    pub adapter: Option<usize>,
    /// Why it is this one.
    pub reason: DeviceReason,
}

/// Why an operator computes where it does, see [`Attention::device_reason`](crate::Attention::device_reason).
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum DeviceReason {
    /// The caller, or the environment variable, asked for this device.
    Asked,
    /// [`DeviceChoice::Auto`] found this GPU.
    BestGpu,
    /// [`DeviceChoice::Auto`] found no adapter, so that the CPU path computes.
    NoAdapter,
    /// [`DeviceChoice::Auto`] found software adapters alone, of which this is the best. They are slower than the CPU path,
    /// which computes.
    OnlySoftware(String),
}

impl fmt::Display for DeviceReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeviceReason::Asked => write!(f, "as asked for"),
            DeviceReason::BestGpu => write!(f, "the best GPU there is"),
            DeviceReason::NoAdapter => write!(f, "no GPU was found"),
            DeviceReason::OnlySoftware(name) => write!(
                f,
                "no GPU was found; {name} is slower than this, and is taken where a GPU is asked for \
                 ({ADAPTER_VARIABLE}=gpu)"
            ),
        }
    }
}

/// One instance for all devices that this crate opens: wgpu tells buffers of other devices apart within an instance only.
#[cfg(not(target_family = "wasm"))]
fn instance() -> wgpu::Instance {
    static INSTANCE: OnceLock<wgpu::Instance> = OnceLock::new();
    INSTANCE.get_or_init(|| wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle())).clone()
}

/// Browsers have one anyway, which no thread may hand to another.
#[cfg(target_family = "wasm")]
fn instance() -> wgpu::Instance {
    wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle())
}

/// As [`adapters_async`], blocking.
#[cfg(not(target_family = "wasm"))]
pub fn adapters() -> Vec<wgpu::Adapter> {
    pollster::block_on(adapters_async())
}

/// All adapters that can compute, the best first: discrete, integrated, virtual, then software. They are of one
/// [`wgpu::Instance`], the same in every call.
pub async fn adapters_async() -> Vec<wgpu::Adapter> {
    let instance = instance();
    let mut adapters = instance.enumerate_adapters(wgpu::Backends::all()).await;
    if adapters.is_empty() {
        // Browsers do not enumerate; they hand out one adapter on request.
        adapters.extend(instance.request_adapter(&wgpu::RequestAdapterOptions::default()).await);
    }
    adapters.retain(|a| a.get_downlevel_capabilities().flags.contains(wgpu::DownlevelFlags::COMPUTE_SHADERS));
    adapters.sort_by_key(|adapter| {
        let info = adapter.get_info();
        let kind = match info.device_type {
            _ if is_software(&info) => 4,
            wgpu::DeviceType::DiscreteGpu => 0,
            wgpu::DeviceType::IntegratedGpu => 1,
            wgpu::DeviceType::VirtualGpu => 2,
            wgpu::DeviceType::Other => 3,
            wgpu::DeviceType::Cpu => 4,
        };
        // One GPU can appear under several backends.
        let backend = match info.backend {
            wgpu::Backend::Vulkan | wgpu::Backend::Metal => 0,
            _ => 1,
        };
        (kind, backend)
    });
    adapters
}

/// Name, kind and backend of an adapter, for people.
pub fn describe(info: &wgpu::AdapterInfo) -> String {
    let software = if is_software(info) { "software, " } else { "" };
    // Browsers may keep the name to themselves.
    let name = if info.name.is_empty() { "an adapter without a name" } else { &info.name };
    format!("{name} ({software}{})", info.backend)
}

thread_local! {
    /// Labels and bytes of the buffers that a scope has created: wgpu does not say for how many bytes there was no memory.
    static CREATED: RefCell<Vec<(&'static str, u64)>> = const { RefCell::new(Vec::new()) };
}

/// Tells the scope on this thread of a buffer that is to be created in it.
pub(crate) fn note_buffer(label: &'static str, bytes: u64) {
    CREATED.with_borrow_mut(|created| created.push((label, bytes)));
}

/// A wgpu device with its queue and its capabilities.
///
/// ```
/// use sink_attention::device::{adapters, device_descriptor};
/// use sink_attention::{Attention, Device};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// // The host application opens a device, and shares it.
/// let Some(adapter) = adapters().into_iter().next() else { return Ok(()) };
/// let (device, queue) = pollster::block_on(adapter.request_device(&device_descriptor(&adapter)))?;
/// let device = Device::from_wgpu_on(&adapter, device, queue);
///
/// let numbers = device.upload("numbers", &[1.0f32, 2.0, 3.0, 4.0])?;
/// let [middle, all] = device.download([(&numbers, 1..3), (&numbers, 0..4)])?; // one submission
/// assert_eq!((middle, all), (vec![2.0f32, 3.0], vec![1.0, 2.0, 3.0, 4.0]));
///
/// assert!(Attention::on(device).is_gpu());
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct Device {
    device: wgpu::Device,
    queue: wgpu::Queue,
    capabilities: Capabilities,
}

/// Adds the layout of fragments' elements, which only the device itself tells, and where subgroups have several sizes the one that kernels get.
/// `has_bf16` says that the device was opened with bf16 on matrices, which are probed, too.
#[cfg(not(target_family = "wasm"))]
fn with_elements(
    mut capabilities: Capabilities,
    device: &wgpu::Device,
    queue: &wgpu::Queue,
    has_bf16: bool,
) -> Capabilities {
    if let Some(matrices) = capabilities.cooperative.filter(|matrices| matrices.guarded) {
        let found = matrices.probe(device, queue, &capabilities);
        if let Err(reason) = &found {
            log::warn!("{}: no cooperative matrices: {reason}", capabilities.name);
        }
        capabilities.cooperative = found.ok();
    }
    let layout = ElementLayout::probe(device, queue, &capabilities);
    let bf16 = has_bf16.then(|| probe_bf16(&capabilities, device, queue));
    if let Some(matrices) = &mut capabilities.cooperative {
        match layout {
            Ok(layout) => matrices.elements = Some(layout),
            Err(reason) => log::info!("{}: elements of fragments: {reason}", capabilities.name),
        }
        match bf16 {
            Some(Ok(rounding)) => matrices.bf16 = Some(rounding),
            Some(Err(reason)) => log::info!("{}: bf16 on matrices: {reason}", capabilities.name),
            None => {}
        }
    }
    capabilities
}

/// How a device that was opened with bf16 on matrices makes bf16 of f32, if it has their elements where it has those of f16, and multiplies
/// them.
#[cfg(not(target_family = "wasm"))]
fn probe_bf16(
    capabilities: &Capabilities,
    device: &wgpu::Device,
    queue: &wgpu::Queue,
) -> std::result::Result<Rounding, String> {
    let (f16, _) = probe::ask(device, queue, capabilities, Operands::F16)?;
    let (bf16, rounding) = probe::ask(device, queue, capabilities, Operands::Bf16)?;
    if f16 == bf16 { Ok(rounding) } else { Err(format!("lanes have {bf16} and not {f16}, as in f16")) }
}

impl CooperativeMatrices {
    /// How a device of this adapter that [`Device::open`] opens makes bf16 of f32, if it multiplies bf16 as itself. One is opened, and runs a
    /// small kernel, unless the driver says that it does not.
    ///
    /// # Errors
    /// The reason, in words, where it does not.
    #[cfg(not(target_family = "wasm"))]
    pub fn bf16_of_adapter(adapter: &wgpu::Adapter) -> std::result::Result<Rounding, String> {
        bfloat16::offered(adapter, CooperativeMatrices::of_adapter(adapter)?)?;
        let (device, queue) = bfloat16::open(adapter, &device_descriptor(adapter))?;
        probe_bf16(&Capabilities::of(&device, Some(adapter)), &device, &queue)
    }
}

impl Device {
    /// Wraps a device of the host application; see [`device_descriptor`] for what to request.
    pub fn from_wgpu(device: wgpu::Device, queue: wgpu::Queue) -> Self {
        let capabilities = Capabilities::of(&device, None);
        Device { device, queue, capabilities }
    }

    /// As [`from_wgpu`](Self::from_wgpu) with the adapter that the device is of. Only the adapter knows whether there are cooperative
    /// matrices (tensor cores).
    pub fn from_wgpu_on(adapter: &wgpu::Adapter, device: wgpu::Device, queue: wgpu::Queue) -> Self {
        Device::wrap(adapter, device, queue, false)
    }

    /// As [`from_wgpu_on`](Self::from_wgpu_on) with a device that was opened, through wgpu-hal, with bf16 on cooperative matrices, which wgpu
    /// does not enable. [`open_with`](Self::open_with) opens such a device, safely.
    ///
    /// # Safety
    /// The device was created with the extension `VK_KHR_shader_bfloat16` and its features `shaderBFloat16Type` and
    /// `shaderBFloat16CooperativeMatrix`. Nothing tells a device that was not, and what its driver does with kernels that multiply bf16 is
    /// undefined.
    pub unsafe fn from_wgpu_with_bf16(adapter: &wgpu::Adapter, device: wgpu::Device, queue: wgpu::Queue) -> Self {
        let offered =
            CooperativeMatrices::of_adapter(adapter).and_then(|matrices| bfloat16::offered(adapter, matrices));
        Device::wrap(adapter, device, queue, offered.is_ok())
    }

    fn wrap(adapter: &wgpu::Adapter, device: wgpu::Device, queue: wgpu::Queue, has_bf16: bool) -> Self {
        let capabilities = Capabilities::of(&device, Some(adapter));
        #[cfg(not(target_family = "wasm"))]
        let capabilities = with_elements(capabilities, &device, &queue, has_bf16);
        #[cfg(target_family = "wasm")]
        let _ = has_bf16;
        Device { device, queue, capabilities }
    }

    /// With other cooperative matrices than the device has, so that a test can build kernels for subgroups of a size that none gets.
    #[cfg(feature = "testing")]
    #[must_use]
    pub fn with_matrices(mut self, matrices: Option<CooperativeMatrices>) -> Self {
        self.capabilities.cooperative = matrices;
        self
    }

    /// Opens an adapter by its [`device_descriptor`], and with bf16 on cooperative matrices where its driver has them (Vulkan).
    ///
    /// # Errors
    /// [`Error::DeviceRequest`].
    #[cfg(not(target_family = "wasm"))]
    pub fn open(adapter: &wgpu::Adapter) -> Result<Self> {
        pollster::block_on(Device::open_async(adapter))
    }

    /// As [`open`](Self::open), for browsers and async hosts.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub async fn open_async(adapter: &wgpu::Adapter) -> Result<Self> {
        Device::open_with_async(adapter, &device_descriptor(adapter)).await
    }

    /// As [`open`](Self::open) by a descriptor of the host application, which asks for more features or other limits than
    /// [`device_descriptor`] does. A host that wants a device with bf16 on cooperative matrices opens it here and takes
    /// [`wgpu`](Self::wgpu) and [`queue`](Self::queue) from it, because wgpu does not enable the extension that they need.
    ///
    /// # Errors
    /// [`Error::DeviceRequest`].
    #[cfg(not(target_family = "wasm"))]
    pub fn open_with(adapter: &wgpu::Adapter, descriptor: &wgpu::DeviceDescriptor<'_>) -> Result<Self> {
        pollster::block_on(Device::open_with_async(adapter, descriptor))
    }

    /// As [`open_with`](Self::open_with), for browsers and async hosts.
    ///
    /// # Errors
    /// As [`open_with`](Self::open_with).
    pub async fn open_with_async(adapter: &wgpu::Adapter, descriptor: &wgpu::DeviceDescriptor<'_>) -> Result<Self> {
        let opened = CooperativeMatrices::of_adapter(adapter)
            .and_then(|matrices| bfloat16::offered(adapter, matrices))
            .and_then(|()| bfloat16::open(adapter, descriptor));
        match opened {
            Ok((device, queue)) => return Ok(Device::wrap(adapter, device, queue, true)),
            Err(reason) => log::info!("{}: bf16 on matrices: {reason}", adapter.get_info().name),
        }
        let (device, queue) = adapter
            .request_device(descriptor)
            .await
            .map_err(|e| Error::DeviceRequest { adapter: adapter.get_info().name, reason: e.to_string() })?;
        Ok(Device::wrap(adapter, device, queue, false))
    }

    /// Opens the device that a choice selects, and gives the reason; `None` is the CPU path.
    ///
    /// # Errors
    /// [`Error::NoAdapter`], [`Error::AdapterNotFound`], [`Error::DeviceRequest`].
    #[cfg(not(target_family = "wasm"))]
    pub fn choose(choice: &DeviceChoice) -> Result<(Option<Self>, DeviceReason)> {
        pollster::block_on(Device::choose_async(choice))
    }

    /// As [`choose`](Self::choose), for browsers and async hosts.
    ///
    /// # Errors
    /// As [`choose`](Self::choose).
    pub async fn choose_async(choice: &DeviceChoice) -> Result<(Option<Self>, DeviceReason)> {
        if *choice == DeviceChoice::Cpu {
            return Ok((None, DeviceReason::Asked));
        }
        let adapters = adapters_async().await;
        let infos: Vec<wgpu::AdapterInfo> = adapters.iter().map(wgpu::Adapter::get_info).collect();
        let Selection { adapter, reason } = choice.select(&infos)?;
        match adapter {
            Some(index) => Ok((Some(Device::open_async(&adapters[index]).await?), reason)),
            None => Ok((None, reason)),
        }
    }

    /// The wgpu device.
    pub fn wgpu(&self) -> &wgpu::Device {
        &self.device
    }

    /// Its queue.
    pub fn queue(&self) -> &wgpu::Queue {
        &self.queue
    }

    /// The limits and features that plans depend on.
    pub fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    /// Runs `work` and turns wgpu's reports of it into an error, where by default wgpu would panic. `during` goes into
    /// the message.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], [`Error::DeviceLost`], [`Error::Gpu`].
    #[cfg(not(target_family = "wasm"))]
    pub fn scoped<T>(&self, during: &'static str, work: impl FnOnce() -> T) -> Result<T> {
        pollster::block_on(self.scoped_async(during, work))
    }

    /// As [`scoped`](Self::scoped), for browsers and async hosts.
    ///
    /// # Errors
    /// As [`scoped`](Self::scoped).
    pub async fn scoped_async<T>(&self, during: &'static str, work: impl FnOnce() -> T) -> Result<T> {
        let memory = self.device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
        let internal = self.device.push_error_scope(wgpu::ErrorFilter::Internal);
        let validation = self.device.push_error_scope(wgpu::ErrorFilter::Validation);
        CREATED.take();
        let result = work();
        let created = CREATED.take();
        // All scopes are closed before the first await: they belong to this thread.
        let errors = [validation.pop(), internal.pop()];
        let memory = memory.pop();
        let lost = self.is_lost();
        // Memory first: what was not allocated is invalid, which is reported too, and its lack may have cost the device.
        if let Some(error) = memory.await {
            // The source names the call and the buffer.
            let source = std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string);
            let named = created.iter().find(|(label, _)| source.contains(&format!("'{label}'")));
            let size = named.map_or(String::new(), |(label, bytes)| format!(" ({label} takes {bytes} bytes)"));
            return Err(Error::OutOfMemory(format!("{during}: {source}{size}")));
        }
        // Of a lost device wgpu reports nothing, or what follows from it.
        if lost.await {
            return Err(Error::DeviceLost { during });
        }
        for error in errors {
            if let Some(error) = error.await {
                return Err(Error::Gpu { during, message: error.to_string() });
            }
        }
        Ok(result)
    }

    /// Whether the device is lost; its one callback for that belongs to the host application. A mistake is reported on
    /// every other device, and on a lost one nothing is.
    fn is_lost(&self) -> impl Future<Output = bool> + use<> {
        let validation = self.device.push_error_scope(wgpu::ErrorFilter::Validation);
        let usage = wgpu::BufferUsages::empty();
        let label = Some("sink-attention asks whether the device is there: this error is expected");
        drop(self.device.create_buffer(&wgpu::BufferDescriptor { label, size: 4, usage, mapped_at_creation: false }));
        // Closed before the first await, as all scopes.
        let reported = validation.pop();
        async move { reported.await.is_none() }
    }

    /// The error of a failed call that reports by its result instead of an error scope.
    pub(crate) async fn failure(&self, during: &'static str, message: String) -> Error {
        if self.is_lost().await { Error::DeviceLost { during } } else { Error::Gpu { during, message } }
    }

    /// Waits for the queue.
    #[cfg(not(target_family = "wasm"))]
    pub(crate) fn wait(&self) -> Result<(), String> {
        // wgpu panics where the driver has lost the device meanwhile.
        let poll = || self.device.poll(wgpu::PollType::wait_indefinitely());
        match std::panic::catch_unwind(std::panic::AssertUnwindSafe(poll)) {
            Ok(polled) => polled.map(|_| ()).map_err(|error| error.to_string()),
            Err(_) => Err("the driver gave up".into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(name: &str, device_type: wgpu::DeviceType) -> wgpu::AdapterInfo {
        wgpu::AdapterInfo { name: name.into(), ..wgpu::AdapterInfo::new(device_type, wgpu::Backend::Vulkan) }
    }

    #[test]
    fn auto_takes_no_software_adapter() {
        let llvmpipe = info("llvmpipe (LLVM 15.0.6, 256 bits)", wgpu::DeviceType::Cpu);
        // As a browser may describe it.
        let swiftshader = info("Google SwiftShader", wgpu::DeviceType::Other);
        let gpu = info("Some GPU", wgpu::DeviceType::IntegratedGpu);
        let select = |choice: &DeviceChoice, adapters: &[wgpu::AdapterInfo]| {
            let Selection { adapter, reason } = choice.select(adapters).unwrap();
            (adapter, reason)
        };
        let software = |name: &str| DeviceReason::OnlySoftware(name.into());
        for (adapters, expected) in [
            (vec![], (None, DeviceReason::NoAdapter)),
            (vec![llvmpipe.clone()], (None, software("llvmpipe (LLVM 15.0.6, 256 bits) (software, vulkan)"))),
            (vec![swiftshader.clone()], (None, software("Google SwiftShader (software, vulkan)"))),
            (vec![gpu.clone(), llvmpipe.clone()], (Some(0), DeviceReason::BestGpu)),
            // Whatever the order is.
            (vec![swiftshader.clone(), gpu.clone()], (Some(1), DeviceReason::BestGpu)),
        ] {
            assert_eq!(select(&DeviceChoice::Auto, &adapters), expected, "{adapters:?}");
            assert_eq!(select(&DeviceChoice::Cpu, &adapters), (None, DeviceReason::Asked));
        }

        for choice in [DeviceChoice::Gpu, DeviceChoice::Adapter("LLVMpipe".into()), DeviceChoice::Adapter("0".into())] {
            assert_eq!(select(&choice, std::slice::from_ref(&llvmpipe)), (Some(0), DeviceReason::Asked), "{choice:?}");
            assert!(matches!(
                (choice.select(&[]), &choice),
                (Err(Error::NoAdapter), DeviceChoice::Gpu)
                    | (Err(Error::AdapterNotFound { .. }), DeviceChoice::Adapter(_))
            ));
        }
    }

    #[test]
    fn a_reason_tells_how_to_get_the_software_adapter() {
        let text = DeviceReason::OnlySoftware("llvmpipe (software, vulkan)".into()).to_string();
        assert!(text.contains("llvmpipe (software, vulkan)") && text.contains("SINK_ATTENTION_ADAPTER=gpu"), "{text}");
    }
}
