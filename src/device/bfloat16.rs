//! bf16 as operand of cooperative matrices: `VK_KHR_shader_bfloat16`, an extension of Vulkan that wgpu does not enable.
//!
//! ash knows neither its structure nor its component type yet: the numbers are those of the registry of Vulkan, and of version 1 of the
//! extension.

#[cfg(any(windows, target_os = "linux", target_os = "android", target_os = "freebsd"))]
pub(crate) use self::vulkan::{offered, open};

#[cfg(any(windows, target_os = "linux", target_os = "android", target_os = "freebsd"))]
mod vulkan {
    use std::ffi::{CStr, c_void};
    use std::marker::PhantomData;

    use ash::{khr, vk};
    use wgpu::hal::api::Vulkan;

    use crate::device::adapter::cooperative_features;
    use crate::device::capabilities::CooperativeMatrices;

    const EXTENSION: &CStr = c"VK_KHR_shader_bfloat16";
    /// VK_COMPONENT_TYPE_BFLOAT16_KHR.
    const BFLOAT16: vk::ComponentTypeKHR = vk::ComponentTypeKHR::from_raw(1_000_141_000);

    /// VkPhysicalDeviceShaderBfloat16FeaturesKHR.
    #[repr(C)]
    #[derive(Debug)]
    struct Features<'a> {
        s_type: vk::StructureType,
        p_next: *mut c_void,
        bfloat16_type: vk::Bool32,
        bfloat16_dot_product: vk::Bool32,
        bfloat16_cooperative_matrix: vk::Bool32,
        _marker: PhantomData<&'a ()>,
    }

    impl Features<'_> {
        fn new(wanted: bool) -> Self {
            let wanted = vk::Bool32::from(wanted);
            Features {
                s_type: vk::StructureType::from_raw(1_000_141_000),
                p_next: std::ptr::null_mut(),
                bfloat16_type: wanted,
                bfloat16_dot_product: vk::FALSE,
                bfloat16_cooperative_matrix: wanted,
                _marker: PhantomData,
            }
        }
    }

    // SAFETY: the structure begins with type and next structure, and its specification says that it extends both.
    unsafe impl vk::ExtendsPhysicalDeviceFeatures2 for Features<'_> {}
    // SAFETY: as above.
    unsafe impl vk::ExtendsDeviceCreateInfo for Features<'_> {}

    /// Whether an adapter multiplies bf16 on cooperative matrices like `matrices`, which it has for f16.
    ///
    /// # Errors
    /// The reason, in words, where it does not.
    pub(crate) fn offered(adapter: &wgpu::Adapter, matrices: CooperativeMatrices) -> Result<(), String> {
        // SAFETY: the guard lives to the end of the function, and nothing is done with the adapter but to read its numbers.
        let adapter = unsafe { adapter.as_hal::<Vulkan>() };
        let adapter = adapter.ok_or("the backend is not Vulkan, and only Vulkan has an extension for it")?;
        let (shared, device) = (adapter.shared_instance(), adapter.raw_physical_device());
        let instance = shared.raw_instance();
        // SAFETY: the physical device is one of this instance, which the adapter keeps alive.
        let extensions = unsafe { instance.enumerate_device_extension_properties(device) }.unwrap_or_default();
        if !extensions.iter().any(|e| e.extension_name_as_c_str() == Ok(EXTENSION)) {
            return Err(format!("the driver lacks {}", EXTENSION.to_string_lossy()));
        }
        // SAFETY: as above.
        let version = unsafe { instance.get_physical_device_properties(device) }.api_version;
        // The calls below are of Vulkan 1.1, of the instance and of the device.
        if shared.instance_api_version().min(version) < vk::API_VERSION_1_1 {
            return Err("the driver's Vulkan is older than 1.1".into());
        }
        let mut features = Features::new(false);
        let mut all = vk::PhysicalDeviceFeatures2::default().push_next(&mut features);
        // SAFETY: as above; the driver has the extension whose structure is chained.
        unsafe { instance.get_physical_device_features2(device, &mut all) };
        if [features.bfloat16_type, features.bfloat16_cooperative_matrix].contains(&vk::FALSE) {
            return Err("the driver has bf16, but not on cooperative matrices".into());
        }
        if !extensions.iter().any(|e| e.extension_name_as_c_str() == Ok(khr::cooperative_matrix::NAME)) {
            return Err("the driver has no cooperative matrices".into());
        }
        let listing = khr::cooperative_matrix::Instance::new(shared.entry(), instance);
        // SAFETY: as above; the driver has the extension that the call is of.
        let listed = unsafe { listing.get_physical_device_cooperative_matrix_properties(device) };
        let listed = listed.map_err(|error| format!("the driver does not list its cooperative matrices: {error}"))?;
        let f32 = vk::ComponentTypeKHR::FLOAT32;
        let of_bfloat16: Vec<&vk::CooperativeMatrixPropertiesKHR<'_>> = listed
            .iter()
            .filter(|p| [p.a_type, p.b_type, p.c_type, p.result_type] == [BFLOAT16, BFLOAT16, f32, f32])
            .filter(|p| p.scope == vk::ScopeKHR::SUBGROUP)
            .collect();
        if of_bfloat16.iter().any(|p| [p.m_size, p.n_size, p.k_size] == [matrices.side; 3]) {
            return Ok(());
        }
        let name = |p: &&vk::CooperativeMatrixPropertiesKHR<'_>| format!("{}x{}x{}", p.m_size, p.n_size, p.k_size);
        let sizes: Vec<String> = of_bfloat16.iter().map(name).collect();
        let sizes = if sizes.is_empty() { "none".into() } else { sizes.join(", ") };
        let side = matrices.side;
        Err(format!("of bf16 with sums in f32, {side}x{side}x{side} is needed as for f16; there are {sizes}"))
    }

    /// Opens an adapter as wgpu does, and enables the extension with its features. The adapter must have them ([`offered`]).
    ///
    /// # Errors
    /// The reason, in words, where the descriptor does not fit the adapter or the driver opens no device.
    pub(crate) fn open(
        adapter: &wgpu::Adapter,
        descriptor: &wgpu::DeviceDescriptor<'_>,
    ) -> Result<(wgpu::Device, wgpu::Queue), String> {
        let wgpu::DeviceDescriptor { required_features, required_limits, memory_hints, experimental_features, .. } =
            descriptor;
        // What wgpu checks before it opens a device.
        if !adapter.features().contains(*required_features) {
            return Err(format!("the adapter lacks {}", *required_features - adapter.features()));
        }
        if !required_features.contains(cooperative_features()) || !experimental_features.is_enabled() {
            return Err("the descriptor asks for no cooperative matrices".into());
        }
        if !required_limits.check_limits(&adapter.limits()) {
            return Err("the descriptor asks for larger limits than the adapter has".into());
        }
        let opened = {
            // SAFETY: the guard lives to the end of the block, and the adapter is used to open a device alone.
            let raw = unsafe { adapter.as_hal::<Vulkan>() }.ok_or("the backend is not Vulkan")?;
            let mut features = Features::new(true);
            let features = &mut features;
            // SAFETY: features and limits are those of the adapter, as checked above. The callback adds an extension and features that the
            // adapter has, as the caller has found, and removes nothing.
            unsafe {
                raw.open_with_callback(
                    *required_features,
                    required_limits,
                    memory_hints,
                    Some(Box::new(move |args| {
                        args.extensions.push(EXTENSION);
                        *args.create_info = args.create_info.push_next(features);
                    })),
                )
            }
        };
        let opened = opened.map_err(|error| error.to_string())?;
        // SAFETY: the device is of this adapter, and was opened with the features of the same descriptor.
        let device = unsafe { adapter.create_device_from_hal::<Vulkan>(opened, descriptor) };
        device.map_err(|error| error.to_string())
    }
}

/// wgpu has no Vulkan here.
#[cfg(not(any(windows, target_os = "linux", target_os = "android", target_os = "freebsd")))]
pub(crate) fn offered(_: &wgpu::Adapter, _: crate::device::CooperativeMatrices) -> Result<(), String> {
    Err("wgpu has no Vulkan here, and only Vulkan has an extension for it".into())
}

/// As [`offered`] says.
#[cfg(not(any(windows, target_os = "linux", target_os = "android", target_os = "freebsd")))]
pub(crate) fn open(_: &wgpu::Adapter, _: &wgpu::DeviceDescriptor<'_>) -> Result<(wgpu::Device, wgpu::Queue), String> {
    Err("wgpu has no Vulkan here".into())
}
