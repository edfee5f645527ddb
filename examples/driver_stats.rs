//! What a Vulkan driver makes of the kernels: registers, spills, workgroup memory, size of the code.
//!
//! ```sh
//! cargo run --release --example driver_stats -- [--dtype f16] [--precision full] [--with OPTION] [--tiles KERNEL=TILES]... [--lanes LANES] [--out FOLDER]
//! cargo run --release --example driver_stats -- --decode "fragments 4x1 rows 8, columns 1, ahead 2, splits 33" [--decode ...]
//! cargo run --release --example driver_stats -- --list standard|sweep|every
//! ```
//!
//! Plans the forward and the backward pass of GPT-OSS's and Llama's heads (causal, N=8192) for the device, compiles every kernel with
//! `VK_KHR_pipeline_executable_properties`, and prints the driver's own statistics. OPTION is softcap, alibi, bias or mask. `--lanes N` builds the kernels on
//! matrices for subgroups of N lanes, and asks the driver for that size. With `--out`, the WGSL, the SPIR-V and the
//! driver's pipeline cache are written there. `--tiles` is that of `sink-attention bench`. The cache holds the machine code: NVIDIA's is a zstd frame after 100 bytes or so, in it
//! code of the length at byte 0x4c begins 8 bytes after the offset at byte 0x50, and `nvdisasm -b SM90` reads it.
//!
//! `--list standard` prints a line for each kernel of the standard problems, in the form of tests/compilers.txt (tests/compilers.sh compares them). `--list sweep` does the same for
//! many portable tiles of other widths, with a cost. `--list every` compiles the kernels of every option and type. They plan for what the adapter tells, and run nothing, as drivers
//! of tests/vendor-compilers.sh compute nothing.

#[path = "driver_stats/list.rs"]
mod list;

use std::error::Error;
use std::ffi::{CStr, c_void};
use std::path::{Path, PathBuf};

use ash::{khr, vk};
use sink_attention::cache::{CacheConfig, CacheKind, Decode, DecodeTiling};
use sink_attention::device::{adapters, describe};
use sink_attention::plan::{
    Capabilities, Kernel, MicroKernel, OptionalOperands, Plan, Precision, Preference, SpirvVersion, Variant,
};
use sink_attention::{Attention, Axes, DType, DeviceChoice, Options, Problem, Shape, SinkLogits};

/// B=1, N=8192: query heads, key heads, width.
const SHAPES: [[usize; 3]; 2] = [[64, 8, 64], [32, 8, 128]];

fn main() -> Result<(), Box<dyn Error>> {
    let mut dtype = DType::F16;
    let mut precision = Precision::Full;
    let mut out: Option<PathBuf> = None;
    let mut tiles = Vec::new();
    let mut lanes = None;
    let mut decodes: Vec<DecodeTiling> = Vec::new();
    let mut listed: Option<list::List> = None;
    let mut options = Options::new().causal(true).sink_logits(SinkLogits::PerHead);
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let value = arguments.next().ok_or_else(|| format!("{argument} needs a value"))?;
        match argument.as_str() {
            "--dtype" => {
                let known = [DType::F32, DType::F16, DType::Bf16].into_iter().find(|d| d.to_string() == value);
                dtype = known.ok_or_else(|| format!("no element type {value}"))?;
            }
            "--precision" => {
                let known = Precision::ALL.into_iter().find(|precision| precision.to_string() == value);
                precision = known.ok_or_else(|| format!("no precision {value}"))?;
            }
            "--tiles" => {
                let (name, tiling) = value.split_once('=').ok_or("--tiles wants KERNEL=TILES")?;
                let kernel = Kernel::TILED.into_iter().find(|kernel| kernel.name() == name);
                tiles.push((kernel.ok_or_else(|| format!("no kernel {name} with tiles"))?, tiling.parse()?));
            }
            "--decode" => decodes.push(value.parse()?),
            "--with" => {
                let pairs = Axes::KEYS.seq_q();
                options = match value.as_str() {
                    "softcap" => options.softcap(30.0),
                    "alibi" => options.alibi(true),
                    "bias" => options.bias(pairs).bias_dtype(dtype),
                    "mask" => options.mask(pairs),
                    _ => return Err(format!("no option {value}").into()),
                };
            }
            "--lanes" => lanes = Some(value.parse()?),
            "--out" => out = Some(value.into()),
            "--list" => listed = Some(value.parse()?),
            _ => return Err(format!("unknown argument {argument}").into()),
        }
    }
    // What a driver compiles, be it a software one.
    let choice = match DeviceChoice::from_env() {
        DeviceChoice::Auto => DeviceChoice::Gpu,
        choice => choice,
    };
    if let Some(listed) = listed {
        let adapters = adapters();
        let infos: Vec<_> = adapters.iter().map(|adapter| adapter.get_info()).collect();
        let index = choice.select(&infos)?.adapter.ok_or("no GPU adapter")?;
        println!("{}", describe(&infos[index]));
        return listed.print(&Capabilities::of_adapter(&adapters[index]), &Driver::new(false, None)?);
    }
    let attention = Attention::open(&choice)?;
    let device = attention.device().ok_or("no GPU adapter")?;
    println!("{}", attention.device_name());
    let mut capabilities = device.capabilities().clone();
    if let Some(lanes) = lanes {
        capabilities.cooperative = capabilities.cooperative.map(|matrices| matrices.lanes(lanes));
    }
    let capabilities = &capabilities;
    let needs_bf16 = capabilities.cooperative.is_some_and(|matrices| matrices.bf16.is_some());
    let driver = Driver::new(needs_bf16, lanes)?;
    for ([heads, kv_heads, width], tiling) in
        SHAPES.iter().flat_map(|shape| decodes.iter().map(move |tiling| (*shape, *tiling)))
    {
        let config = CacheConfig::new(CacheKind::Contiguous { capacity: 131_072 }, 1, kv_heads, width).dtype(dtype);
        let decode = Decode::new(heads, options.dtype(dtype)).tiling(tiling);
        for pass in Plan::decode(&config, &decode, capabilities, MicroKernel::Auto)?.passes {
            println!("{:80} {}", pass.variant.name(), driver.statistics(&pass.variant, out.as_deref())?);
        }
    }
    for [heads, kv_heads, width] in SHAPES.into_iter().filter(|_| decodes.is_empty()) {
        let preference = Preference::default().precision(precision).tiles(&tiles);
        for variant in variants([heads, kv_heads, width], options.dtype(dtype), capabilities, &preference)? {
            println!("{:80} {}", variant.name(), driver.statistics(&variant, out.as_deref())?);
        }
    }
    Ok(())
}

/// The kernels of both passes of a training step.
fn variants(
    [heads, kv_heads, width]: [usize; 3],
    options: Options,
    capabilities: &Capabilities,
    preference: &Preference<'_>,
) -> Result<Vec<Variant>, Box<dyn Error>> {
    let (batch, seq) = (1, 8192);
    let shape = Shape { batch, heads, kv_heads, seq_q: seq, seq_k: seq, head_dim: width, value_dim: width };
    let problem = Problem::new(shape, options)?;
    let optional = OptionalOperands::default().o_lo(options.dtype.has_rounding_error());
    let plans = [
        Plan::forward_with(&problem, optional, capabilities, preference)?,
        Plan::backward_with(&problem, optional, capabilities, preference)?,
    ];
    Ok(plans.into_iter().flat_map(|plan| plan.passes).map(|pass| pass.variant).collect())
}

/// VK_KHR_shader_bfloat16, which ash does not know yet.
const BFLOAT16: &CStr = c"VK_KHR_shader_bfloat16";

/// VkPhysicalDeviceShaderBfloat16FeaturesKHR: the type, its dot product and its matrices.
#[repr(C)]
struct Bfloat16Features {
    s_type: vk::StructureType,
    p_next: *mut c_void,
    features: [vk::Bool32; 3],
}

// SAFETY: the structure begins with type and next structure, and extends this one.
unsafe impl vk::ExtendsDeviceCreateInfo for Bfloat16Features {}

/// A Vulkan device of its own, as wgpu's does not ask for statistics.
struct Driver {
    _entry: ash::Entry,
    _instance: ash::Instance,
    device: ash::Device,
    executables: khr::pipeline_executable_properties::Device,
    /// The size of subgroups to ask for, for kernels on matrices.
    lanes: Option<u32>,
}

impl Driver {
    /// With bf16 on cooperative matrices where kernels ask for them.
    fn new(needs_bf16: bool, lanes: Option<u32>) -> Result<Self, Box<dyn Error>> {
        // SAFETY: plain use of Vulkan; every structure lives as long as the call that reads it, and what is created here is
        // never destroyed before the process ends.
        unsafe {
            let entry = ash::Entry::load()?;
            let application = vk::ApplicationInfo::default().api_version(vk::API_VERSION_1_3);
            let instance =
                entry.create_instance(&vk::InstanceCreateInfo::default().application_info(&application), None)?;
            let kind = |device: &vk::PhysicalDevice| instance.get_physical_device_properties(*device).device_type;
            let devices = instance.enumerate_physical_devices()?;
            let physical = devices
                .into_iter()
                .min_by_key(|device| kind(device) != vk::PhysicalDeviceType::DISCRETE_GPU)
                .ok_or("no Vulkan device")?;
            let offered = instance.enumerate_device_extension_properties(physical)?;
            let has = |name: &CStr| offered.iter().any(|e| e.extension_name_as_c_str() == Ok(name));
            if !has(khr::pipeline_executable_properties::NAME) {
                return Err("the driver has no VK_KHR_pipeline_executable_properties".into());
            }
            let mut extensions = vec![khr::pipeline_executable_properties::NAME.as_ptr()];
            if has(khr::cooperative_matrix::NAME) {
                extensions.push(khr::cooperative_matrix::NAME.as_ptr());
            }
            if needs_bf16 {
                extensions.push(BFLOAT16.as_ptr());
            }
            let mut bfloat16 = Bfloat16Features {
                s_type: vk::StructureType::from_raw(1_000_141_000),
                p_next: std::ptr::null_mut(),
                features: [vk::TRUE, vk::FALSE, vk::TRUE],
            };
            let queue = [vk::DeviceQueueCreateInfo::default().queue_family_index(0).queue_priorities(&[1.0])];
            let mut executable =
                vk::PhysicalDevicePipelineExecutablePropertiesFeaturesKHR::default().pipeline_executable_info(true);
            let mut cooperative = vk::PhysicalDeviceCooperativeMatrixFeaturesKHR::default()
                .cooperative_matrix(has(khr::cooperative_matrix::NAME));
            let mut vulkan_1_1 = vk::PhysicalDeviceVulkan11Features::default().storage_buffer16_bit_access(true);
            let mut vulkan_1_2 = vk::PhysicalDeviceVulkan12Features::default()
                .shader_float16(true)
                .vulkan_memory_model(true)
                .vulkan_memory_model_device_scope(true);
            let mut sizes =
                vk::PhysicalDeviceSubgroupSizeControlFeatures::default().subgroup_size_control(lanes.is_some());
            let mut info = vk::DeviceCreateInfo::default()
                .queue_create_infos(&queue)
                .enabled_extension_names(&extensions)
                .push_next(&mut executable)
                .push_next(&mut vulkan_1_1)
                .push_next(&mut sizes)
                .push_next(&mut vulkan_1_2);
            if has(khr::cooperative_matrix::NAME) {
                info = info.push_next(&mut cooperative);
            }
            if needs_bf16 {
                info = info.push_next(&mut bfloat16);
            }
            let device = instance.create_device(physical, &info, None)?;
            let executables = khr::pipeline_executable_properties::Device::new(&instance, &device);
            Ok(Driver { _entry: entry, _instance: instance, device, executables, lanes })
        }
    }

    /// The driver's statistics as text.
    fn statistics(&self, variant: &Variant, out: Option<&Path>) -> Result<String, Box<dyn Error>> {
        let shown = self.measure(variant, out)?.into_iter().map(|(name, value)| format!("{name} {value}"));
        Ok(shown.collect::<Vec<_>>().join(", "))
    }

    /// The driver's statistics, by name.
    fn measure(&self, variant: &Variant, out: Option<&Path>) -> Result<Vec<(String, String)>, Box<dyn Error>> {
        let text = variant.wgsl()?;
        let module = naga::front::wgsl::parse_str(&text).map_err(|e| e.emit_to_string(&text))?;
        let spirv = variant.spirv(SpirvVersion { major: 1, minor: 6 })?;
        let mut bindings: Vec<_> =
            module.global_variables.iter().filter_map(|(_, v)| Some((v.binding?.binding, v.space))).collect();
        bindings.sort_by_key(|(slot, _)| *slot);
        let bindings: Vec<_> = (0..)
            .zip(&bindings)
            .map(|(number, (_, space))| {
                let uniform = matches!(space, naga::AddressSpace::Uniform);
                vk::DescriptorSetLayoutBinding::default()
                    .binding(number)
                    .descriptor_count(1)
                    .stage_flags(vk::ShaderStageFlags::COMPUTE)
                    .descriptor_type(if uniform {
                        vk::DescriptorType::UNIFORM_BUFFER
                    } else {
                        vk::DescriptorType::STORAGE_BUFFER
                    })
            })
            .collect();
        // SAFETY: as in `new`.
        let (lanes, statistics, cache) = unsafe {
            let device = &self.device;
            let shader = device.create_shader_module(&vk::ShaderModuleCreateInfo::default().code(&spirv), None)?;
            let set = device.create_descriptor_set_layout(
                &vk::DescriptorSetLayoutCreateInfo::default().bindings(&bindings),
                None,
            )?;
            let layout =
                device.create_pipeline_layout(&vk::PipelineLayoutCreateInfo::default().set_layouts(&[set]), None)?;
            let asked = self.lanes.filter(|_| variant.matrices.is_some());
            let mut size = vk::PipelineShaderStageRequiredSubgroupSizeCreateInfo::default()
                .required_subgroup_size(asked.unwrap_or_default());
            let stage = vk::PipelineShaderStageCreateInfo::default()
                .stage(vk::ShaderStageFlags::COMPUTE)
                .module(shader)
                .name(c"main");
            let stage = if asked.is_some() { stage.push_next(&mut size) } else { stage };
            let info = vk::ComputePipelineCreateInfo::default()
                .flags(vk::PipelineCreateFlags::CAPTURE_STATISTICS_KHR)
                .stage(stage)
                .layout(layout);
            let cache = device.create_pipeline_cache(&vk::PipelineCacheCreateInfo::default(), None)?;
            let pipelines = device.create_compute_pipelines(cache, &[info], None).map_err(|(_, e)| e)?;
            let pipeline = *pipelines.first().ok_or("no pipeline")?;
            let executable = vk::PipelineExecutableInfoKHR::default().pipeline(pipeline);
            let properties = vk::PipelineInfoKHR::default().pipeline(pipeline);
            let properties = self.executables.get_pipeline_executable_properties(&properties)?;
            let statistics = self.executables.get_pipeline_executable_statistics(&executable)?;
            (properties.first().map_or(0, |p| p.subgroup_size), statistics, device.get_pipeline_cache_data(cache)?)
        };
        if let Some(out) = out {
            let write = |ending: &str, bytes: &[u8]| std::fs::write(out.join(variant.name() + ending), bytes);
            write(".wgsl", text.as_bytes())?;
            write(".spv", bytemuck::cast_slice(&spirv))?;
            write(".cache", &cache)?;
        }
        let shown = statistics.iter().map(|statistic| {
            let name = statistic.name_as_c_str().unwrap_or_default().to_string_lossy().into_owned();
            // SAFETY: `format` says which field is there.
            let value = unsafe {
                match statistic.format {
                    vk::PipelineExecutableStatisticFormatKHR::FLOAT64 => statistic.value.f64.to_string(),
                    vk::PipelineExecutableStatisticFormatKHR::INT64 => statistic.value.i64.to_string(),
                    vk::PipelineExecutableStatisticFormatKHR::BOOL32 => (statistic.value.b32 != 0).to_string(),
                    _ => statistic.value.u64.to_string(),
                }
            };
            (name, value)
        });
        Ok(std::iter::once(("Lanes".to_string(), lanes.to_string())).chain(shown).collect())
    }
}
