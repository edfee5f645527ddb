//! What a device offers, as plain numbers, so that plans can be made and tested without one.

use std::fmt;

/// Kinds of devices that want different tiles.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DeviceClass {
    /// NVIDIA.
    Nvidia,
    /// AMD.
    Amd,
    /// Intel.
    Intel,
    /// Apple.
    Apple,
    /// A driver that computes on the CPU.
    Software,
    /// Anything else, and browsers that do not say.
    Other,
}

impl fmt::Display for DeviceClass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DeviceClass::Nvidia => "NVIDIA",
            DeviceClass::Amd => "AMD",
            DeviceClass::Intel => "Intel",
            DeviceClass::Apple => "Apple",
            DeviceClass::Software => "software",
            DeviceClass::Other => "other",
        })
    }
}

/// LP_MAX_TGSI_LOOP_ITERATIONS of Mesa's llvmpipe.
const LLVMPIPE_LOOP_ITERATIONS: u64 = 65535;

/// Cooperative matrices of a device: square fragments of f16 that are multiplied and summed in f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct CooperativeMatrices {
    /// Rows and columns of a fragment, 8 or 16.
    pub side: u32,
    /// Lanes of a subgroup, which holds a fragment together; the same for every kernel.
    pub lanes: u32,
    /// The lanes of a subgroup run in step, and a barrier of theirs would be one of the workgroup: so it is with llvmpipe.
    pub in_step: bool,
}

impl CooperativeMatrices {
    /// What a device of this adapter offers when it is opened with [`device_descriptor`]; opens nothing.
    ///
    /// # Errors
    /// The reason, in words, where kernels cannot use cooperative matrices on it.
    pub fn of_adapter(adapter: &wgpu::Adapter) -> Result<Self, String> {
        let features = device_descriptor(adapter).required_features;
        cooperative(&adapter.get_info(), features, &adapter.cooperative_matrix_properties())
    }

    /// The numbers are not 0, so that work can be divided by them.
    pub(crate) fn is_sound(&self) -> bool {
        self.side > 0 && self.lanes > 0
    }
}

impl fmt::Display for CooperativeMatrices {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let CooperativeMatrices { side, lanes, .. } = self;
        write!(f, "{side}x{side} of f16 with sums in f32, subgroups of {lanes}")
    }
}

/// What the workgroups that run on one multiprocessor at a time share.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Multiprocessor {
    /// Multiprocessors of the device. No interface tells; this is the number of an H100 or H200.
    pub count: u32,
    /// Bytes of workgroup memory.
    pub workgroup_bytes: u32,
    /// 32-bit registers.
    pub registers: u32,
}

impl Multiprocessor {
    /// Of NVIDIA's through Vulkan; measured on an H200, where two workgroups of at most 24 KiB run at a time, and never
    /// more than 48 KiB of them, although CUDA may use 227 KiB.
    const NVIDIA_VULKAN: Multiprocessor = Multiprocessor { count: 132, workgroup_bytes: 48 << 10, registers: 65536 };

    fn of(class: DeviceClass, backend: wgpu::Backend) -> Option<Self> {
        match (class, backend) {
            (DeviceClass::Nvidia, wgpu::Backend::Vulkan) => Some(Multiprocessor::NVIDIA_VULKAN),
            _ => None,
        }
    }
}

/// The limits of a device that plans depend on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Capabilities {
    /// Name for people.
    pub name: String,
    /// What the tuning table goes by.
    pub class: DeviceClass,
    /// Bytes of workgroup memory.
    pub workgroup_bytes: u32,
    /// Threads in a workgroup.
    pub workgroup_threads: u32,
    /// Workgroups in one dimension of a dispatch.
    pub grid_dimension: u32,
    /// Storage buffers a kernel may bind.
    pub storage_buffers: u32,
    /// Bytes of one storage binding.
    pub binding_bytes: u64,
    /// Bytes of one buffer.
    pub buffer_bytes: u64,
    /// Alignment of a storage binding's offset, in bytes.
    pub offset_alignment: u32,
    /// GPU timestamps can be taken.
    pub timestamps: bool,
    /// Cooperative matrices, where they can be used.
    pub cooperative: Option<CooperativeMatrices>,
    /// What bounds the workgroups that run at a time, where that is known.
    pub multiprocessor: Option<Multiprocessor>,
    /// Iterations of all loops of a thread taken together, after which the driver ends loops without a word, where it does.
    pub loop_iterations: Option<u64>,
}

impl Capabilities {
    /// Reads what a device was created with. Only its adapter knows of cooperative matrices: without it there are none.
    pub fn of(device: &wgpu::Device, adapter: Option<&wgpu::Adapter>) -> Self {
        let (info, features) = (device.adapter_info(), device.features());
        let matrices =
            |adapter: &wgpu::Adapter| cooperative(&info, features, &adapter.cooperative_matrix_properties()).ok();
        let cooperative = adapter.and_then(matrices);
        Capabilities { cooperative, ..Capabilities::new(&info, &device.limits(), features) }
    }

    /// What a device of this adapter offers when it is opened with [`device_descriptor`]; opens nothing.
    pub fn of_adapter(adapter: &wgpu::Adapter) -> Self {
        let descriptor = device_descriptor(adapter);
        let cooperative = CooperativeMatrices::of_adapter(adapter).ok();
        let capabilities =
            Capabilities::new(&adapter.get_info(), &descriptor.required_limits, descriptor.required_features);
        Capabilities { cooperative, ..capabilities }
    }

    pub(crate) fn new(info: &wgpu::AdapterInfo, limits: &wgpu::Limits, features: wgpu::Features) -> Self {
        Capabilities {
            name: info.name.clone(),
            class: class(info),
            workgroup_bytes: limits.max_compute_workgroup_storage_size,
            workgroup_threads: limits.max_compute_invocations_per_workgroup.min(limits.max_compute_workgroup_size_x),
            grid_dimension: limits.max_compute_workgroups_per_dimension,
            storage_buffers: limits.max_storage_buffers_per_shader_stage,
            binding_bytes: limits.max_storage_buffer_binding_size,
            buffer_bytes: limits.max_buffer_size,
            offset_alignment: limits.min_storage_buffer_offset_alignment,
            timestamps: features.contains(wgpu::Features::TIMESTAMP_QUERY),
            cooperative: None,
            multiprocessor: Multiprocessor::of(class(info), info.backend),
            loop_iterations: is_llvmpipe(info).then_some(LLVMPIPE_LOOP_ITERATIONS),
        }
    }

    /// Floating-point operations that the slowest device like this one worth the name does in a second, with cooperative
    /// matrices or without, by which the time of a dispatch is estimated. Low on purpose: a dispatch whose time is estimated too
    /// short may lose the device. Not lower than that: where it is estimated too long, the work is cut in vain, into dispatches that
    /// do not fill a fast device (on an H200, eight of 64 workgroups each took five times as long as one of 512).
    pub(crate) fn flops(&self, with_matrices: bool) -> f64 {
        match (self.class, with_matrices) {
            (DeviceClass::Nvidia, true) => 1e13,
            (DeviceClass::Nvidia, _) if self.cooperative.is_some() => 5e12,
            (DeviceClass::Amd, true) => 4e12,
            (DeviceClass::Nvidia | DeviceClass::Amd, _) => 1e12,
            (DeviceClass::Apple, _) => 5e11,
            (DeviceClass::Intel, _) => 1e11,
            (DeviceClass::Other, _) => 5e10,
            (DeviceClass::Software, _) => 2e9,
        }
    }

    /// Twice as many small workgroups as run at a time on the largest devices like this one.
    pub(crate) fn small_workgroups(&self) -> u64 {
        match self.class {
            DeviceClass::Nvidia => 2640,
            DeviceClass::Software => 8,
            _ => 1024,
        }
    }

    /// The least that every WebGPU implementation offers.
    pub fn webgpu_defaults() -> Self {
        Capabilities {
            name: "WebGPU defaults".into(),
            class: DeviceClass::Other,
            workgroup_bytes: 16 << 10,
            workgroup_threads: 256,
            grid_dimension: 65535,
            storage_buffers: 8,
            binding_bytes: 128 << 20,
            buffer_bytes: 256 << 20,
            offset_alignment: 256,
            timestamps: false,
            cooperative: None,
            multiprocessor: None,
            loop_iterations: None,
        }
    }

    /// Named devices as they report themselves, for tests and for `plan` without the device at hand.
    pub fn samples() -> Vec<Self> {
        let defaults = Capabilities::webgpu_defaults();
        let sample =
            |name: &str, class, workgroup_kib: u32, workgroup_threads, binding_bytes, offset_alignment| Capabilities {
                name: name.into(),
                class,
                workgroup_bytes: workgroup_kib << 10,
                workgroup_threads,
                binding_bytes,
                buffer_bytes: binding_bytes,
                offset_alignment,
                storage_buffers: 16,
                timestamps: true,
                ..defaults.clone()
            };
        let all_but_four = (2u64 << 30) - 4;
        let mut samples = vec![
            sample("NVIDIA H200", DeviceClass::Nvidia, 48, 1024, all_but_four, 16),
            sample("AMD Radeon RX 7900 XTX (RADV)", DeviceClass::Amd, 64, 1024, all_but_four, 16),
            sample("Intel Arc A770", DeviceClass::Intel, 64, 1024, all_but_four, 64),
            sample("Apple M2", DeviceClass::Apple, 32, 1024, all_but_four, 32),
            sample("llvmpipe", DeviceClass::Software, 32, 1024, 128 << 20, 16),
        ];
        for sample in &mut samples {
            sample.cooperative = match sample.class {
                DeviceClass::Nvidia => Some(CooperativeMatrices { side: 16, lanes: 32, in_step: false }),
                DeviceClass::Apple => Some(CooperativeMatrices { side: 8, lanes: 32, in_step: false }),
                // Mesa's from version 26 on.
                DeviceClass::Software => Some(CooperativeMatrices { side: 8, lanes: 8, in_step: true }),
                // Subgroups of more than one size.
                _ => None,
            };
            sample.multiprocessor = Multiprocessor::of(sample.class, wgpu::Backend::Vulkan);
            sample.loop_iterations = (sample.name == "llvmpipe").then_some(LLVMPIPE_LOOP_ITERATIONS);
        }
        samples.push(defaults);
        samples
    }
}

/// Whether an adapter computes on the CPU. Drivers say so, and browsers of their fallback adapter; a browser that was started
/// with such a driver as its only one may not, but for the driver's name.
pub fn is_software(info: &wgpu::AdapterInfo) -> bool {
    const NAMES: [&str; 5] = ["swiftshader", "llvmpipe", "lavapipe", "softpipe", "basic render"];
    let named = |text: &str| NAMES.iter().any(|name| text.to_lowercase().contains(name));
    info.device_type == wgpu::DeviceType::Cpu
        || [&info.name, &info.driver, &info.driver_info].into_iter().any(|t| named(t))
}

/// What a host application should request of its adapter for this crate's kernels to run at their best:
/// all the workgroup memory, threads and buffer sizes there are, and timestamps and pipeline caches where they exist.
///
/// Every WebGPU adapter will do. With smaller limits the kernels still run, with smaller tiles.
pub fn device_descriptor(adapter: &wgpu::Adapter) -> wgpu::DeviceDescriptor<'static> {
    let offered = adapter.limits();
    let required_limits = wgpu::Limits {
        max_compute_workgroup_storage_size: offered.max_compute_workgroup_storage_size,
        max_compute_invocations_per_workgroup: offered.max_compute_invocations_per_workgroup,
        max_compute_workgroup_size_x: offered.max_compute_workgroup_size_x,
        max_storage_buffer_binding_size: offered.max_storage_buffer_binding_size,
        max_storage_buffers_per_shader_stage: offered.max_storage_buffers_per_shader_stage.min(16),
        max_buffer_size: offered.max_buffer_size,
        min_storage_buffer_offset_alignment: offered.min_storage_buffer_offset_alignment,
        ..wgpu::Limits::defaults().or_worse_values_from(&offered)
    };
    wgpu::DeviceDescriptor {
        label: Some("sink-attention"),
        required_features: adapter.features()
            & (wgpu::Features::TIMESTAMP_QUERY | wgpu::Features::PIPELINE_CACHE | cooperative_features()),
        required_limits,
        // SAFETY: experimental features may be unsound; cooperative matrices are the only one asked for, and are used by this
        // crate's own kernels alone, which keep to what their operations require.
        experimental_features: unsafe { wgpu::ExperimentalFeatures::enabled() },
        ..Default::default()
    }
}

/// Features that the cooperative kernels need.
pub(crate) fn cooperative_features() -> wgpu::Features {
    wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX
        | wgpu::Features::SHADER_F16
        | wgpu::Features::SUBGROUP
        | wgpu::Features::SUBGROUP_BARRIER
}

/// The largest fragments of f16 with sums in f32, where subgroups have one size only: a kernel cannot ask for one. The
/// reason where there are none.
fn cooperative(
    info: &wgpu::AdapterInfo,
    features: wgpu::Features,
    offered: &[wgpu::CooperativeMatrixProperties],
) -> Result<CooperativeMatrices, String> {
    use wgpu::CooperativeScalarType::{F16, F32};
    let missing = cooperative_features() - features;
    if !missing.is_empty() {
        let names: Vec<&str> = missing.iter_names().map(|(name, _)| name).collect();
        return Err(format!("the driver or wgpu lacks {}", names.join(", ")));
    }
    let [least, lanes] = [info.subgroup_min_size, info.subgroup_max_size];
    if least != lanes {
        return Err(format!("subgroups have {least} to {lanes} lanes, and a kernel cannot ask for one size"));
    }
    let is_usable = |p: &&wgpu::CooperativeMatrixProperties| {
        let side = p.m_size;
        // A row of a fragment is shared by 1 to 4 lanes.
        let fits = [8, 16].contains(&side) && [1, 2, 4].iter().any(|n| n * side == lanes);
        fits && [p.n_size, p.k_size] == [side; 2] && (p.ab_type, p.cr_type) == (F16, F32)
    };
    let side = offered.iter().filter(is_usable).map(|p| p.m_size).max();
    let in_step = is_llvmpipe(info);
    side.map(|side| CooperativeMatrices { side, lanes, in_step }).ok_or_else(|| {
        let name = |p: &wgpu::CooperativeMatrixProperties| {
            format!("{}x{}x{} of {:?} in {:?}", p.m_size, p.n_size, p.k_size, p.ab_type, p.cr_type)
        };
        let offered: Vec<String> = offered.iter().map(name).collect();
        let offered = if offered.is_empty() { "none".into() } else { offered.join(", ") };
        format!("of f16 with sums in f32, 8x8x8 or 16x16x16 by 1 to 4 lanes a row are needed; for {lanes} lanes there are {offered}")
    })
}

fn is_llvmpipe(info: &wgpu::AdapterInfo) -> bool {
    info.name.starts_with("llvmpipe")
}

fn class(info: &wgpu::AdapterInfo) -> DeviceClass {
    const PCI_VENDORS: [(u32, DeviceClass); 4] = [
        (0x10de, DeviceClass::Nvidia),
        (0x1002, DeviceClass::Amd),
        (0x8086, DeviceClass::Intel),
        (0x106b, DeviceClass::Apple),
    ];
    if is_software(info) {
        return DeviceClass::Software;
    }
    let by_vendor = PCI_VENDORS.iter().find(|(vendor, _)| *vendor == info.vendor).map(|(_, class)| *class);
    // Metal reports no PCI vendor.
    by_vendor.unwrap_or(if info.name.starts_with("Apple") { DeviceClass::Apple } else { DeviceClass::Other })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matrices_or_the_reason() {
        use wgpu::CooperativeScalarType::{F16, F32};
        let mut info = wgpu::AdapterInfo::new(wgpu::DeviceType::DiscreteGpu, wgpu::Backend::Vulkan);
        (info.subgroup_min_size, info.subgroup_max_size) = (32, 32);
        let of = |size: u32, sums| wgpu::CooperativeMatrixProperties {
            m_size: size,
            n_size: size,
            k_size: size,
            ab_type: F16,
            cr_type: sums,
            saturating_accumulation: false,
        };
        let all = cooperative_features();
        let matrices = |side| Ok(CooperativeMatrices { side, lanes: 32, in_step: false });
        assert_eq!(cooperative(&info, all, &[of(8, F32), of(16, F32), of(16, F16)]), matrices(16));
        assert_eq!(cooperative(&info, all, &[of(8, F32), of(16, F16), of(32, F32)]), matrices(8));
        let told = |info: &_, features, offered: &[_], message: &str| {
            let reason = cooperative(info, features, offered).unwrap_err();
            assert!(reason.contains(message), "no {message:?} in {reason}");
        };
        told(&info, all, &[], "32 lanes there are none");
        told(&info, all, &[of(16, F16)], "16x16x16 of F16 in F16");
        told(&info, all - wgpu::Features::SHADER_F16, &[of(16, F32)], "lacks SHADER_F16");
        info.subgroup_max_size = 64;
        told(&info, all, &[of(16, F32)], "32 to 64 lanes");
    }
}
