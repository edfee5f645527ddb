//! The limits and features of an adapter or a device of wgpu, and those to request of it.

use crate::device::capabilities::{
    Capabilities, CooperativeMatrices, DeviceClass, LLVMPIPE_LOOP_ITERATIONS, Multiprocessor, SpirvVersion,
};

impl CooperativeMatrices {
    /// The cooperative matrices of a device of this adapter that [`device_descriptor`] asks for. Nothing is opened.
    ///
    /// # Errors
    /// The reason, in words, where kernels cannot use cooperative matrices on it.
    pub fn of_adapter(adapter: &wgpu::Adapter) -> Result<Self, String> {
        let features = device_descriptor(adapter).required_features;
        cooperative(&adapter.get_info(), features, &adapter.cooperative_matrix_properties())
    }
}

impl SpirvVersion {
    /// The newest SPIR-V that a device of this adapter takes which [`device_descriptor`] asks for. Nothing is opened.
    ///
    /// # Errors
    /// The reason, in words, where kernels reach it as WGSL only.
    pub fn of_adapter(adapter: &wgpu::Adapter) -> Result<Self, String> {
        let features = device_descriptor(adapter).required_features;
        spirv(&adapter.get_info(), features, VulkanNumbers::of_adapter(adapter).version)
    }
}

/// The bounds of the workgroups that run at a time, if they are known, with the number of multiprocessors that the driver tells.
fn multiprocessor(class: DeviceClass, backend: wgpu::Backend, count: Option<u32>) -> Option<Multiprocessor> {
    let known = match (class, backend) {
        (DeviceClass::Nvidia, wgpu::Backend::Vulkan) => Multiprocessor::NVIDIA_VULKAN,
        _ => return None,
    };
    Some(Multiprocessor { count: count.unwrap_or(known.count), ..known })
}

impl Capabilities {
    /// Reads what a device was created with. Only its adapter knows of cooperative matrices: without it there are none.
    pub fn of(device: &wgpu::Device, adapter: Option<&wgpu::Adapter>) -> Self {
        let (info, features) = (device.adapter_info(), device.features());
        let matrices =
            |adapter: &wgpu::Adapter| cooperative(&info, features, &adapter.cooperative_matrix_properties()).ok();
        let cooperative = adapter.and_then(matrices);
        let VulkanNumbers { version, multiprocessors } = VulkanNumbers::of_device(device);
        let spirv = spirv(&info, features, version).ok();
        Capabilities { cooperative, spirv, ..Capabilities::new(&info, &device.limits(), features, multiprocessors) }
    }

    /// The capabilities of a device of this adapter that [`device_descriptor`] asks for. Nothing is opened.
    pub fn of_adapter(adapter: &wgpu::Adapter) -> Self {
        let descriptor = device_descriptor(adapter);
        let cooperative = CooperativeMatrices::of_adapter(adapter).ok();
        let VulkanNumbers { version, multiprocessors } = VulkanNumbers::of_adapter(adapter);
        let (info, features) = (adapter.get_info(), descriptor.required_features);
        let spirv = spirv(&info, features, version).ok();
        let capabilities = Capabilities::new(&info, &descriptor.required_limits, features, multiprocessors);
        Capabilities { cooperative, spirv, ..capabilities }
    }

    pub(crate) fn new(
        info: &wgpu::AdapterInfo,
        limits: &wgpu::Limits,
        features: wgpu::Features,
        multiprocessors: Option<u32>,
    ) -> Self {
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
            spirv: None,
            multiprocessor: multiprocessor(class(info), info.backend, multiprocessors),
            loop_iterations: is_llvmpipe(info).then_some(LLVMPIPE_LOOP_ITERATIONS),
        }
    }
}

/// Whether an adapter computes on the CPU. Drivers report it, and browsers report it of their fallback adapter. A browser
/// whose only driver is a software one may not; then the driver's name decides.
pub fn is_software(info: &wgpu::AdapterInfo) -> bool {
    const NAMES: [&str; 5] = ["swiftshader", "llvmpipe", "lavapipe", "softpipe", "basic render"];
    let named = |text: &str| NAMES.iter().any(|name| text.to_lowercase().contains(name));
    info.device_type == wgpu::DeviceType::Cpu
        || [&info.name, &info.driver, &info.driver_info].into_iter().any(|t| named(t))
}

/// The device that a host application should request of its adapter for this crate's kernels to run at their best:
/// all the workgroup memory, threads and buffer sizes there are, and timestamps, pipeline caches and, on Vulkan, shaders in SPIR-V
/// where they exist.
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
            & (wgpu::Features::TIMESTAMP_QUERY
                | wgpu::Features::PIPELINE_CACHE
                | passthrough(adapter.get_info().backend)
                | cooperative_features()),
        required_limits,
        // SAFETY: experimental features may be unsound; cooperative matrices are the only one asked for, and are used by this
        // crate's own kernels alone, which keep to what their operations require.
        experimental_features: unsafe { wgpu::ExperimentalFeatures::enabled() },
        ..Default::default()
    }
}

/// The feature that hands kernels to the driver as SPIR-V, where that is what the driver takes and nobody asks for wgpu's checks.
fn passthrough(backend: wgpu::Backend) -> wgpu::Features {
    match backend {
        wgpu::Backend::Vulkan if cfg!(not(feature = "checked-shaders")) => wgpu::Features::PASSTHROUGH_SHADERS,
        _ => wgpu::Features::empty(),
    }
}

/// The newest SPIR-V that a driver takes, or the reason why kernels reach it as WGSL only. `vulkan` is the version of Vulkan, in its own
/// encoding.
fn spirv(info: &wgpu::AdapterInfo, features: wgpu::Features, vulkan: Option<u32>) -> Result<SpirvVersion, String> {
    if cfg!(feature = "checked-shaders") {
        return Err("the feature checked-shaders leaves the checks to wgpu, which makes none of SPIR-V".into());
    }
    if info.backend != wgpu::Backend::Vulkan {
        return Err(format!("the backend is {}, and only Vulkan takes SPIR-V", info.backend));
    }
    if !features.contains(wgpu::Features::PASSTHROUGH_SHADERS) {
        return Err("the driver, wgpu or who opened the device leaves out PASSTHROUGH_SHADERS".into());
    }
    let version = vulkan.ok_or("wgpu does not tell the version of Vulkan")?;
    // Major and minor number stand above the 12 bits of the patch. The appendix "Vulkan Environment for SPIR-V" lists the version that each takes.
    let minor = match ((version >> 22) & 0x7f, (version >> 12) & 0x3ff) {
        (1, 0) => 0,
        (1, 1) => 3,
        (1, 2) => 5,
        _ => 6,
    };
    Ok(SpirvVersion { major: 1, minor })
}

/// What a driver of Vulkan tells of a device, and wgpu does not.
#[derive(Debug, Clone, Copy, Default)]
struct VulkanNumbers {
    /// The version of Vulkan that it implements, in Vulkan's own encoding.
    version: Option<u32>,
    /// Multiprocessors, by an extension that NVIDIA's driver has.
    multiprocessors: Option<u32>,
}

#[cfg(any(windows, target_os = "linux", target_os = "android", target_os = "freebsd"))]
impl VulkanNumbers {
    fn of_device(device: &wgpu::Device) -> Self {
        // SAFETY: the guard lives to the end of the function, and nothing is done with the device but to read its numbers.
        let device = unsafe { device.as_hal::<wgpu::hal::api::Vulkan>() };
        device.map_or(VulkanNumbers::default(), |device| {
            Self::read(device.shared_instance(), device.raw_physical_device())
        })
    }

    fn of_adapter(adapter: &wgpu::Adapter) -> Self {
        // SAFETY: the guard lives to the end of the function, and nothing is done with the adapter but to read its numbers.
        let adapter = unsafe { adapter.as_hal::<wgpu::hal::api::Vulkan>() };
        adapter.map_or(VulkanNumbers::default(), |adapter| {
            Self::read(adapter.shared_instance(), adapter.raw_physical_device())
        })
    }

    fn read(shared: &wgpu::hal::vulkan::InstanceShared, device: ash::vk::PhysicalDevice) -> Self {
        use ash::{nv, vk};
        let instance = shared.raw_instance();
        // SAFETY: the physical device is one of this instance, which the caller's device or adapter keeps alive.
        let version = unsafe { instance.get_physical_device_properties(device) }.api_version;
        // SAFETY: as above.
        let extensions = unsafe { instance.enumerate_device_extension_properties(device) }.unwrap_or_default();
        let has_builtins = extensions.iter().any(|e| e.extension_name_as_c_str() == Ok(nv::shader_sm_builtins::NAME));
        let mut builtins = vk::PhysicalDeviceShaderSMBuiltinsPropertiesNV::default();
        // The call is of Vulkan 1.1, of the instance and of the device.
        if has_builtins && shared.instance_api_version().min(version) >= vk::API_VERSION_1_1 {
            let mut properties = vk::PhysicalDeviceProperties2::default().push_next(&mut builtins);
            // SAFETY: as above; the driver has the extension whose structure is chained.
            unsafe { instance.get_physical_device_properties2(device, &mut properties) };
        }
        let multiprocessors = Some(builtins.shader_sm_count).filter(|count| *count > 0);
        VulkanNumbers { version: Some(version), multiprocessors }
    }
}

/// wgpu has no Vulkan here.
#[cfg(not(any(windows, target_os = "linux", target_os = "android", target_os = "freebsd")))]
impl VulkanNumbers {
    fn of_device(_: &wgpu::Device) -> Self {
        VulkanNumbers::default()
    }

    fn of_adapter(_: &wgpu::Adapter) -> Self {
        VulkanNumbers::default()
    }
}

/// Features that the cooperative kernels need.
pub(crate) fn cooperative_features() -> wgpu::Features {
    wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX
        | wgpu::Features::SHADER_F16
        | wgpu::Features::SUBGROUP
        | wgpu::Features::SUBGROUP_BARRIER
}

/// The largest fragments of f16 with sums in f32. A kernel cannot ask for a size of subgroups (wgpu's issue 10049). Where there are several, the
/// largest that shares a fragment is a first guess, which the device itself corrects (`subgroups`) and each kernel checks. The reason where
/// there are no fragments.
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
    let [least, most] = [info.subgroup_min_size, info.subgroup_max_size];
    let guarded = least != most;
    let is_usable = |p: &&wgpu::CooperativeMatrixProperties| {
        [8, 16].contains(&p.m_size) && [p.n_size, p.k_size] == [p.m_size; 2] && (p.ab_type, p.cr_type) == (F16, F32)
    };
    // Of a side, the largest size of subgroups whose lanes share a row of a fragment by 1 to 4.
    let shared = |side: u32| {
        let lanes = [4, 2, 1].into_iter().map(|n| n * side).find(|lanes| (least..=most).contains(lanes))?;
        Some((side, lanes))
    };
    let found = offered.iter().filter(is_usable).filter_map(|p| shared(p.m_size)).max();
    let in_step = is_llvmpipe(info);
    let matrices = |(side, lanes)| CooperativeMatrices { side, lanes, guarded, in_step, elements: None, bf16: None };
    found.map(matrices).ok_or_else(|| {
        let name = |p: &wgpu::CooperativeMatrixProperties| {
            format!("{}x{}x{} of {:?} in {:?}", p.m_size, p.n_size, p.k_size, p.ab_type, p.cr_type)
        };
        let offered: Vec<String> = offered.iter().map(name).collect();
        let offered = if offered.is_empty() { "none".into() } else { offered.join(", ") };
        let lanes = if guarded { format!("{least} to {most}") } else { most.to_string() };
        // Intel's driver has 8x16x16.
        let rest = if class(info) == DeviceClass::Intel { "; wgpu loads square ones alone (its PR 10414)" } else { "" };
        format!("of f16 with sums in f32, 8x8x8 or 16x16x16 by 1 to 4 lanes a row are needed; for {lanes} lanes there are {offered}{rest}")
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
    fn spirv_or_the_reason() {
        let info = |backend| wgpu::AdapterInfo::new(wgpu::DeviceType::DiscreteGpu, backend);
        let (vulkan, metal) = (info(wgpu::Backend::Vulkan), info(wgpu::Backend::Metal));
        let all = wgpu::Features::all();
        let of = |info: &wgpu::AdapterInfo, features, version: Option<u32>| spirv(info, features, version);
        let minors = [
            (1 << 22, 0),
            (1 << 22 | 1 << 12 | 7, 3),
            (1 << 22 | 2 << 12, 5),
            (1 << 22 | 3 << 12 | 300, 6),
            (1 << 22 | 4 << 12, 6),
        ];
        for (version, minor) in minors {
            let found = of(&vulkan, all, Some(version));
            if cfg!(feature = "checked-shaders") {
                assert!(found.unwrap_err().contains("checked-shaders"));
            } else {
                assert_eq!(found, Ok(SpirvVersion { major: 1, minor }));
            }
        }
        if cfg!(not(feature = "checked-shaders")) {
            for (found, message) in [
                (of(&metal, all, None), "the backend is metal"),
                (of(&vulkan, all - wgpu::Features::PASSTHROUGH_SHADERS, Some(1 << 22)), "PASSTHROUGH_SHADERS"),
                (of(&vulkan, all, None), "version of Vulkan"),
            ] {
                let reason = found.unwrap_err();
                assert!(reason.contains(message), "no {message:?} in {reason}");
            }
        }
    }

    #[test]
    fn multiprocessors_by_the_driver() {
        let count = |class, backend, count| multiprocessor(class, backend, count).map(|known| known.count);
        assert_eq!(count(DeviceClass::Nvidia, wgpu::Backend::Vulkan, Some(46)), Some(46));
        assert_eq!(count(DeviceClass::Nvidia, wgpu::Backend::Vulkan, None), Some(132));
        assert_eq!(count(DeviceClass::Nvidia, wgpu::Backend::Dx12, Some(46)), None);
        assert_eq!(count(DeviceClass::Amd, wgpu::Backend::Vulkan, Some(46)), None);
    }

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
        let (lanes, in_step) = (32, false);
        let matrices =
            |side| Ok(CooperativeMatrices { side, lanes, guarded: false, in_step, elements: None, bf16: None });
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
        let several = |side, lanes| matrices(side).map(|matrices| matrices.lanes(lanes).guarded(true));
        assert_eq!(cooperative(&info, all, &[of(16, F32)]), several(16, 64));
        assert_eq!(cooperative(&info, all, &[of(8, F32)]), several(8, 32));
        info.vendor = 0x8086;
        (info.subgroup_min_size, info.subgroup_max_size) = (8, 32);
        assert_eq!(cooperative(&info, all, &[of(16, F32)]), several(16, 32));
        let wide = wgpu::CooperativeMatrixProperties { m_size: 8, ..of(16, F32) };
        told(&info, all, &[wide], "for 8 to 32 lanes there are 8x16x16 of F16 in F32; wgpu loads square ones alone");
    }
}
