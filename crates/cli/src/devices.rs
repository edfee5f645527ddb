//! `sink-attention devices`: the devices that there are to compute on.

use std::error::Error;
use std::fmt;

use clap::Args;
use serde::Serialize;
use sink_attention::device::{ADAPTER_VARIABLE, adapters, describe, is_software};
use sink_attention::plan::{Capabilities, CooperativeMatrices, ElementLayout, Plan, SpirvVersion};
use sink_attention::wgpu::{self, Adapter};
use sink_attention::{Device, DeviceChoice, Options, Problem, Shape};

use crate::shared::{bytes, print_summary, with_elements};

/// List the devices there are, what they offer, and which kernels they would run
///
/// Adapters come in the order of preference. The number in front of an adapter, or a part of its name, is what
/// --adapter and the environment variable SINK_ATTENTION_ADAPTER take. Nothing is computed. A device with cooperative
/// matrices is opened, because it alone can say where it keeps their elements.
#[derive(Debug, Args)]
pub struct Devices {
    /// Print the list as a JSON object
    #[arg(long)]
    json: bool,
}

impl Devices {
    /// Lists the devices. It is no error if there are none.
    pub fn execute(self) -> Result<(), Box<dyn Error>> {
        let adapters = adapters();
        let list = List {
            default: DefaultDevice::new(&adapters),
            adapters: adapters.iter().enumerate().map(|(index, adapter)| Entry::new(index, adapter)).collect(),
            cpu_threads: rayon::current_num_threads(),
        };
        print_summary(&list, self.json)
    }
}

/// All devices that can compute.
#[derive(Debug, Serialize)]
struct List {
    adapters: Vec<Entry>,
    cpu_threads: usize,
    default: DefaultDevice,
}

/// An adapter. The limits are those of a device opened with `sink_attention::device::device_descriptor`.
#[derive(Debug, Serialize)]
struct Entry {
    index: usize,
    name: String,
    kind: &'static str,
    class: String,
    backend: String,
    driver: String,
    driver_info: String,
    workgroup_bytes: u32,
    workgroup_threads: u32,
    storage_buffers: u32,
    binding_bytes: u64,
    buffer_bytes: u64,
    offset_alignment: u32,
    timestamps: bool,
    subgroup_sizes: [u32; 2],
    /// Side of the fragments, and lanes of a subgroup. Absent if there are no cooperative matrices.
    cooperative_matrices: Option<[u32; 2]>,
    #[serde(skip)]
    matrices: Option<CooperativeMatrices>,
    /// The reason why there are none.
    cooperative_error: Option<String>,
    /// The layout of the elements of fragments in registers, with which kernels compute. Absent where they cannot.
    elements: Option<String>,
    /// Why they cannot.
    elements_error: Option<String>,
    /// Matrices multiply bf16 as itself.
    bf16: bool,
    /// How the driver makes bf16 of f32 then.
    bf16_rounding: Option<String>,
    /// Why they do not, so that kernels convert bf16 to f16.
    bf16_error: Option<String>,
    /// The newest SPIR-V that the driver takes; absent where kernels reach it as WGSL only.
    spirv: Option<String>,
    /// Why they do.
    spirv_error: Option<String>,
    kernels: Vec<Kernel>,
    #[serde(skip)]
    description: String,
}

impl Entry {
    fn new(index: usize, adapter: &Adapter) -> Self {
        let info = adapter.get_info();
        let cooperative = CooperativeMatrices::of_adapter(adapter).and_then(|matrices| sized(matrices, adapter));
        let elements = ElementLayout::of_adapter(adapter);
        let bf16 = CooperativeMatrices::bf16_of_adapter(adapter);
        let capabilities = Capabilities::of_adapter(adapter).cooperative(cooperative.as_ref().ok().copied());
        let capabilities = with_elements(capabilities, elements.clone().ok(), bf16.clone().ok());
        let spirv = SpirvVersion::of_adapter(adapter);
        Entry {
            index,
            description: describe(&info),
            kind: match info.device_type {
                _ if is_software(&info) => "software",
                wgpu::DeviceType::DiscreteGpu => "discrete GPU",
                wgpu::DeviceType::IntegratedGpu => "integrated GPU",
                wgpu::DeviceType::VirtualGpu => "virtual GPU",
                wgpu::DeviceType::Cpu => "software",
                wgpu::DeviceType::Other => "other",
            },
            class: capabilities.class.to_string(),
            backend: info.backend.to_string(),
            workgroup_bytes: capabilities.workgroup_bytes,
            workgroup_threads: capabilities.workgroup_threads,
            storage_buffers: capabilities.storage_buffers,
            binding_bytes: capabilities.binding_bytes,
            buffer_bytes: capabilities.buffer_bytes,
            offset_alignment: capabilities.offset_alignment,
            timestamps: capabilities.timestamps,
            subgroup_sizes: [info.subgroup_min_size, info.subgroup_max_size],
            matrices: cooperative.as_ref().ok().copied(),
            cooperative_matrices: cooperative.as_ref().ok().map(|matrices| [matrices.side, matrices.lanes]),
            cooperative_error: cooperative.err(),
            elements: elements.as_ref().ok().map(ToString::to_string),
            elements_error: elements.err(),
            bf16: bf16.is_ok(),
            bf16_rounding: bf16.as_ref().ok().map(ToString::to_string),
            bf16_error: bf16.err(),
            spirv: spirv.as_ref().ok().map(ToString::to_string),
            spirv_error: spirv.err(),
            kernels: [64, 128].map(|head_dim| Kernel::new(head_dim, &capabilities)).into(),
            name: info.name,
            driver: info.driver,
            driver_info: info.driver_info,
        }
    }
}

/// What the list says of the adapter of this name, for a report.
pub fn describe_adapter(name: &str) -> Option<serde_json::Value> {
    let adapters = adapters();
    let (index, adapter) = adapters.iter().enumerate().find(|(_, adapter)| adapter.get_info().name == name)?;
    serde_json::to_value(Entry::new(index, adapter)).ok()
}

/// The matrices with the size of subgroups that kernels get, where the driver chooses among several.
fn sized(matrices: CooperativeMatrices, adapter: &Adapter) -> Result<CooperativeMatrices, String> {
    if !matrices.guarded {
        return Ok(matrices);
    }
    let device = Device::open(adapter).map_err(|error| error.to_string())?;
    matrices.probe(device.wgpu(), device.queue(), device.capabilities())
}

/// The kernels that a device would run for a width that is common in models.
#[derive(Debug, Serialize)]
struct Kernel {
    head_dim: usize,
    /// Absent if no kernel fits.
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    /// The plan in short, or the reason why there is none.
    plan: String,
}

impl Kernel {
    fn new(head_dim: usize, capabilities: &Capabilities) -> Self {
        let shape = Shape { batch: 1, heads: 32, kv_heads: 8, seq_q: 8192, seq_k: 8192, head_dim, value_dim: head_dim };
        let problem = Problem::new(shape, Options::new().causal(true));
        let plan = problem.and_then(|problem| {
            let mut plan = Plan::forward(&problem, capabilities)?;
            plan.passes.extend(Plan::backward(&problem, capabilities)?.passes);
            Ok(plan)
        });
        match plan {
            Ok(plan) => {
                let names: Vec<String> = plan.passes.iter().map(|pass| pass.variant.name()).collect();
                let passes: Vec<String> = plan.passes.iter().map(ToString::to_string).collect();
                Kernel { head_dim, name: Some(names.join(" ")), plan: passes.join("; ") }
            }
            Err(error) => Kernel { head_dim, name: None, plan: error.to_string() },
        }
    }
}

/// The device that computes if nothing else is asked for.
#[derive(Debug, Serialize)]
struct DefaultDevice {
    /// The adapter's index. None is the CPU, or an error.
    adapter: Option<usize>,
    /// The value of the environment variable, if it is set.
    variable: Option<String>,
    /// The reason for this device, if there is one.
    reason: Option<String>,
    /// The reason why the default is not available.
    error: Option<String>,
}

impl DefaultDevice {
    fn new(adapters: &[Adapter]) -> Self {
        let choice = DeviceChoice::from_env();
        let infos: Vec<wgpu::AdapterInfo> = adapters.iter().map(Adapter::get_info).collect();
        let found = choice.select(&infos);
        DefaultDevice {
            variable: (choice != DeviceChoice::Auto).then(|| std::env::var(ADAPTER_VARIABLE).unwrap_or_default()),
            error: found.as_ref().err().map(ToString::to_string),
            reason: found.as_ref().ok().map(|selection| selection.reason.to_string()),
            adapter: found.ok().and_then(|selection| selection.adapter),
        }
    }
}

impl fmt::Display for List {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for entry in &self.adapters {
            let default = if self.default.adapter == Some(entry.index) { "  <- default" } else { "" };
            writeln!(f, "{}: {}{default}\n{entry}", entry.index, entry.description)?;
        }
        if self.adapters.is_empty() {
            writeln!(f, "No GPU adapter found: computations run on the CPU.")?;
            writeln!(f, "To use a GPU, install its driver (Vulkan on Linux; Vulkan or DirectX 12 on Windows;")?;
            writeln!(f, "Metal is part of macOS). On Linux, vulkaninfo should list the GPU; Mesa's llvmpipe")?;
            writeln!(f, "(package mesa-vulkan-drivers) is an adapter without a GPU.\n")?;
        }
        writeln!(f, "cpu: {} threads; with --backend cpu, or where there is no GPU\n", self.cpu_threads)?;
        write!(f, "{}", self.default)
    }
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [least, most] = self.subgroup_sizes;
        let subgroups = if least == most { least.to_string() } else { format!("{least} to {most}") };
        let driver = format!("{} {}", self.driver, self.driver_info);
        writeln!(f, "   kind        {}, tuned as {}", self.kind, self.class)?;
        writeln!(f, "   driver      {}", if driver.trim().is_empty() { "does not say" } else { driver.trim() })?;
        writeln!(
            f,
            "   workgroup   {} memory, {} threads, subgroups of {subgroups}",
            bytes(self.workgroup_bytes.into()),
            self.workgroup_threads
        )?;
        writeln!(
            f,
            "   buffers     {}, bindings {}, {} a kernel, aligned to {}",
            bytes(self.buffer_bytes),
            bytes(self.binding_bytes),
            self.storage_buffers,
            bytes(self.offset_alignment.into())
        )?;
        writeln!(f, "   timestamps  {}", if self.timestamps { "yes" } else { "no" })?;
        match (self.matrices, &self.cooperative_error) {
            (Some(matrices), _) => writeln!(f, "   matrices    {matrices}")?,
            (None, reason) => writeln!(f, "   matrices    none: {}", reason.as_deref().unwrap_or_default())?,
        }
        match (&self.elements, &self.elements_error) {
            (Some(layout), _) => writeln!(f, "   elements    {layout}")?,
            (None, reason) => writeln!(f, "   elements    none: {}", reason.as_deref().unwrap_or_default())?,
        }
        match (&self.bf16_rounding, &self.bf16_error) {
            (Some(rounding), _) => writeln!(f, "   bf16        on matrices as itself; f32 is {rounding}")?,
            (None, reason) => {
                let reason = reason.as_deref().unwrap_or_default();
                writeln!(f, "   bf16        converted to f16 for matrices: {reason}")?;
            }
        }
        match (&self.spirv, &self.spirv_error) {
            (Some(version), _) => writeln!(f, "   SPIR-V      {version}: tiles may have hints for loops")?,
            (None, reason) => {
                let reason = reason.as_deref().unwrap_or_default();
                writeln!(f, "   SPIR-V      no, so that tiles have no hints for loops: {reason}")?;
            }
        }
        writeln!(f, "   kernels     for 32 heads, 8192 queries and keys, causal:")?;
        for Kernel { head_dim, plan, .. } in &self.kernels {
            writeln!(f, "     D=E={head_dim}")?;
            plan.split("; ").try_for_each(|pass| writeln!(f, "       {pass}"))?;
        }
        Ok(())
    }
}

impl fmt::Display for DefaultDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.error, self.adapter) {
            (Some(error), _) => write!(f, "default: none, {error}")?,
            (None, Some(index)) => write!(f, "default: adapter {index}")?,
            (None, None) => write!(f, "default: cpu")?,
        }
        match (&self.variable, &self.reason) {
            (Some(value), _) => write!(f, " ({ADAPTER_VARIABLE}={value})"),
            (None, Some(reason)) => write!(f, " ({ADAPTER_VARIABLE} is not set): {reason}"),
            (None, None) => write!(f, " ({ADAPTER_VARIABLE} is not set)"),
        }
    }
}
