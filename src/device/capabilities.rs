//! The limits and features of a device as plain numbers, so that plans can be made and tested without one.

use std::fmt;

use crate::device::elements::ElementLayout;

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

/// The registers of a class of devices, in 32 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct RegisterFile {
    /// Registers of a thread, at most. Compilers move others to memory.
    pub thread: u32,
    /// Registers that the subgroups of an execution unit (a multiprocessor's quarter, a SIMD, a core) share, as lanes times registers of a lane.
    pub unit: u32,
    /// Subgroups of an execution unit, at most, and the lanes of each.
    pub waves: [u32; 2],
}

impl RegisterFile {
    /// Subgroups of an execution unit whose threads have so many registers.
    pub fn waves(&self, registers: u32) -> u32 {
        let [most, lanes] = self.waves;
        (self.unit / (registers.clamp(1, self.thread) * lanes)).min(most)
    }
}

impl DeviceClass {
    /// The registers of the class, those of its smaller devices where they differ. `None` for the CPU.
    pub fn register_file(self) -> Option<RegisterFile> {
        let [thread, unit, most, lanes] = match self {
            // CUDA C++ Programming Guide, compute capabilities 7.5 to 9.0: 64 Ki registers and 32 to 64 warps in four quarters.
            DeviceClass::Nvidia => [255, 16 << 10, 8, 32],
            // AMD's RDNA 2 Instruction Set Architecture and RADV's ac_gpu_info: 1024 vectors of 32 lanes a SIMD, 256 to a wave.
            DeviceClass::Amd => [256, 1024 * 32, 16, 32],
            // Dougall Johnson's G13 reference (256 halves) and Honeykrisp: a core has 384 threads of 256 halves, 1024 of 104 and fewer.
            DeviceClass::Apple => [128, 384 * 128, 32, 32],
            // Intel's Xe documents: a thread has 128 registers of 32 bytes, which are 128 to a lane where the compiler takes 8 lanes.
            DeviceClass::Intel => [128, 8 * 128 * 8, 8, 8],
            // Adreno 7xx by Turnip: 48 vectors of four to a lane with two waves of 64 lanes in each half of a core. The least that is known is 128.
            DeviceClass::Other => [128, 2 * 64 * 192, 16, 64],
            DeviceClass::Software => return None,
        };
        Some(RegisterFile { thread, unit, waves: [most, lanes] })
    }

    /// Whether a thread has so few registers that it takes smaller tiles than NVIDIA's and AMD's GPUs.
    pub(crate) fn has_few_registers(self) -> bool {
        self.register_file().is_some_and(|file| file.thread < 255)
    }
}

/// LP_MAX_TGSI_LOOP_ITERATIONS of Mesa's llvmpipe.
pub(crate) const LLVMPIPE_LOOP_ITERATIONS: u64 = 65535;

/// Cooperative matrices of a device: square fragments of f16 that are multiplied and summed in f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct CooperativeMatrices {
    /// Rows and columns of a fragment, 8 or 16.
    pub side: u32,
    /// Lanes of a subgroup, which holds a fragment together.
    pub lanes: u32,
    /// Subgroups of the device have several sizes, and the driver chooses one for a kernel. `lanes` is the size that kernels are built for: a
    /// kernel looks at the size it has got before it multiplies, and leaves its rows to the portable kernel where it is another.
    pub guarded: bool,
    /// The lanes of a subgroup run in step, and a barrier of theirs would be one of the workgroup: so it is with llvmpipe.
    pub in_step: bool,
    /// Where the elements of a fragment are in registers, where kernels can compute with them there.
    pub elements: Option<ElementLayout>,
    /// How bf16 is made of f32, where matrices of the same size multiply bf16 with sums in f32 and have their elements in the same places.
    /// Elsewhere bf16 is converted to f16 with a scale for each token.
    pub bf16: Option<Rounding>,
}

/// How a driver makes bf16 of f32. SPIR-V leaves it open, and kernels that make operands of their own numbers have to know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Rounding {
    /// To nearest, ties to even.
    Nearest,
    /// Bits are cut off, as NVIDIA's driver does it.
    TowardsZero,
    /// In another way. Numbers of bf16 stay what they are.
    Other,
}

impl fmt::Display for Rounding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Rounding::Nearest => "rounded to nearest",
            Rounding::TowardsZero => "rounded towards zero",
            Rounding::Other => "rounded in a way of its own",
        })
    }
}

setters! {
    impl[] CooperativeMatrices[]
    plain {
        side: u32,
        lanes: u32,
        guarded: bool,
        in_step: bool,
    }
    optional {
        elements: ElementLayout,
        bf16: Rounding,
    }
}

impl CooperativeMatrices {
    /// The numbers are not 0, so that work can be divided by them.
    pub(crate) fn is_sound(&self) -> bool {
        self.side > 0 && self.lanes > 0
    }
}

impl fmt::Display for CooperativeMatrices {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let CooperativeMatrices { side, lanes, guarded, .. } = self;
        write!(f, "{side}x{side} of f16 with sums in f32, subgroups of {lanes}")?;
        f.write_str(if *guarded { " (a kernel that gets others leaves its rows to the portable one)" } else { "" })?;
        self.elements.map_or(Ok(()), |elements| write!(f, ", {elements}"))?;
        self.bf16.map_or(Ok(()), |rounding| write!(f, ", bf16 as itself, {rounding}"))
    }
}

/// A version of SPIR-V, the language of Vulkan's drivers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpirvVersion {
    /// The number before the point.
    pub major: u8,
    /// The number behind it.
    pub minor: u8,
}

impl fmt::Display for SpirvVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// The memory and registers that workgroups share while they run on one multiprocessor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Multiprocessor {
    /// Multiprocessors of the device, as NVIDIA's driver tells; where it does not, the number of an H100 or H200.
    pub count: u32,
    /// Bytes of workgroup memory.
    pub workgroup_bytes: u32,
    /// 32-bit registers.
    pub registers: u32,
}

setters! {
    impl[] Multiprocessor[]
    plain {
        count: u32,
        workgroup_bytes: u32,
        registers: u32,
    }
}

impl Multiprocessor {
    /// Of NVIDIA's through Vulkan; measured on an H200, where two workgroups of at most 24 KiB run at a time, and never
    /// more than 48 KiB of them, although CUDA may use 227 KiB.
    pub(crate) const NVIDIA_VULKAN: Multiprocessor =
        Multiprocessor { count: 132, workgroup_bytes: 48 << 10, registers: 65536 };
}

/// The limits of a device that plans depend on.
///
/// ```
/// use sink_attention::plan::{Capabilities, Plan};
/// use sink_attention::{Error, Options, Problem, Shape};
///
/// let shape = Shape { batch: 1, heads: 4, kv_heads: 4, seq_q: 64, seq_k: 64, head_dim: 64, value_dim: 64 };
/// let problem = Problem::new(shape, Options::new())?;
/// let least = Capabilities::webgpu_defaults();
/// assert!(Plan::forward(&problem, &least).is_ok());
/// let too_little = least.workgroup_bytes(256); // one row of q
/// assert!(matches!(Plan::forward(&problem, &too_little), Err(Error::NoKernel { .. })));
/// # Ok::<(), sink_attention::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Capabilities {
    /// Name for people.
    pub name: String,
    /// Kind of the device, by which the built-in table has tiles.
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
    /// The newest SPIR-V that the driver takes, where kernels can be handed to it in that language rather than in WGSL to wgpu. Tiles may
    /// have hints for loops there.
    pub spirv: Option<SpirvVersion>,
    /// Bounds on the workgroups that run at a time, where they are known.
    pub multiprocessor: Option<Multiprocessor>,
    /// Iterations of all loops of a thread taken together, after which the driver ends loops without a word, where it does.
    pub loop_iterations: Option<u64>,
}

setters! {
    impl[] Capabilities[]
    plain {
        class: DeviceClass,
        workgroup_bytes: u32,
        workgroup_threads: u32,
        grid_dimension: u32,
        storage_buffers: u32,
        binding_bytes: u64,
        buffer_bytes: u64,
        offset_alignment: u32,
        timestamps: bool,
    }
    into {
        name: String,
    }
    optional {
        cooperative: CooperativeMatrices,
        spirv: SpirvVersion,
        multiprocessor: Multiprocessor,
        loop_iterations: u64,
    }
}

/// Devices by a part of their names, with some 0.7 of the rate that the slower passes reached on them: without and with cooperative
/// matrices. Only the H200 was
/// measured. An H100 has its multiprocessors and less bandwidth, which these kernels do not use up.
const MEASURED: [(&str, [f64; 2]); 2] = [("H200", [1.2e13, 1.2e14]), ("H100", [1.2e13, 1.2e14])];

impl Capabilities {
    /// Floating-point operations in a second, with cooperative matrices or without, by which the time of a dispatch is estimated:
    /// those of [`MEASURED`] devices, else those of the slowest device of the class worth the name. The number is low on purpose: a
    /// dispatch whose time is estimated too short may lose the device. A number that is too low has its price, too: the work is cut
    /// into dispatches that do not fill a fast device. At a fifteenth of its rate an H200 lost half of the backward pass of 65,536
    /// keys (benches/results/2026-11-29-h200-long.md).
    pub(crate) fn flops(&self, with_matrices: bool) -> f64 {
        // A partition of a device (MIG) has a part of its rate.
        let whole = |name: &str| self.name.contains(name) && !self.name.contains("MIG");
        if let Some((_, flops)) = MEASURED.iter().find(|(name, _)| whole(name)) {
            return flops[usize::from(with_matrices)];
        }
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
            spirv: None,
            multiprocessor: None,
            loop_iterations: None,
        }
    }

    /// Devices that `plan` knows without having them at hand: the [`samples`](Self::samples), and those whose compilers tests/vendor-compilers.sh
    /// starts, with their short names.
    pub fn known() -> Vec<(Option<&'static str>, Self)> {
        let [nvidia, amd, _, apple, ..] = &Capabilities::samples()[..] else { return Vec::new() };
        let by_mesa = |device: &Self, name: &str| Capabilities {
            spirv: Some(SpirvVersion { major: 1, minor: 6 }),
            ..device.clone().name(name)
        };
        let without = |device: &Self| Capabilities { cooperative: None, ..device.clone() };
        let adreno = Capabilities {
            class: DeviceClass::Other,
            binding_bytes: 128 << 20,
            buffer_bytes: 1 << 30,
            offset_alignment: 64,
            workgroup_bytes: 32 << 10,
            ..without(apple)
        };
        // NVK has matrices of f16 whose elements have no layout that kernels can use.
        let nvk = Capabilities {
            cooperative: nvidia.cooperative.map(|matrices| matrices.elements(None).bf16(None)),
            multiprocessor: None,
            ..nvidia.clone()
        };
        let mesa = [
            ("rx7900xtx", by_mesa(amd, "AMD Radeon RX 7900 XTX (RADV NAVI31)")),
            ("rx9070xt", by_mesa(amd, "AMD Radeon RX 9070 XT (RADV GFX1201)")),
            ("rx6800", by_mesa(&without(amd), "AMD Radeon RX 6800 (RADV NAVI21)")),
            ("m1", by_mesa(&without(apple), "Apple M1 (Honeykrisp)")),
            ("adreno740", by_mesa(&adreno, "Adreno 740 (Turnip)")),
            ("adreno830", by_mesa(&adreno, "Adreno 830 (Turnip)")),
            ("turing", by_mesa(&nvk, "NVIDIA Turing (NVK)")),
            ("ampere", by_mesa(&nvk, "NVIDIA Ampere (NVK)")),
        ];
        let samples = Capabilities::samples().into_iter().map(|sample| (None, sample));
        samples.chain(mesa.map(|(short, device)| (Some(short), device))).collect()
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
                DeviceClass::Nvidia => Some(CooperativeMatrices {
                    side: 16,
                    lanes: 32,
                    guarded: false,
                    in_step: false,
                    elements: Some(ElementLayout::NVIDIA),
                    bf16: Some(Rounding::TowardsZero),
                }),
                DeviceClass::Apple => {
                    let (guarded, in_step) = (false, false);
                    Some(CooperativeMatrices { side: 8, lanes: 32, guarded, in_step, elements: None, bf16: None })
                }
                // Of 32 or 64 lanes: RADV takes 64 for workgroups of more than 32 threads.
                DeviceClass::Amd => Some(CooperativeMatrices {
                    side: 16,
                    lanes: 64,
                    guarded: true,
                    in_step: false,
                    elements: None,
                    bf16: None,
                }),
                // Mesa's from version 26 on.
                DeviceClass::Software => Some(CooperativeMatrices {
                    side: 8,
                    lanes: 8,
                    guarded: false,
                    in_step: true,
                    elements: Some(ElementLayout::LLVMPIPE),
                    bf16: None,
                }),
                // Intel's are 8x16x16, which WGSL cannot load.
                _ => None,
            };
            // By Vulkan 1.3.
            let by_vulkan = ["H200", "RADV", "llvmpipe"].iter().any(|name| sample.name.contains(name));
            sample.spirv = by_vulkan.then_some(SpirvVersion { major: 1, minor: 6 });
            sample.multiprocessor = (sample.class == DeviceClass::Nvidia).then_some(Multiprocessor::NVIDIA_VULKAN);
            sample.loop_iterations = (sample.name == "llvmpipe").then_some(LLVMPIPE_LOOP_ITERATIONS);
        }
        samples.push(defaults);
        samples
    }
}
