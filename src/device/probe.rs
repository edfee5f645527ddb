//! Asks a device where it keeps the elements of a fragment, and how it makes operands of f32.

use std::collections::HashMap;
use std::sync::{Mutex, OnceLock, PoisonError};

use half::{bf16, f16};
use wgpu::util::DeviceExt as _;

use crate::device::adapter::device_descriptor;
use crate::device::capabilities::{Capabilities, CooperativeMatrices, Rounding, SpirvVersion};
use crate::device::elements::ElementLayout;
use crate::device::markers::Operands;
use crate::device::spirv::Translation;

/// The names of adapter and driver, side and lanes of a fragment, and the numbers that are multiplied.
type Key = (String, String, String, [u32; 2], Operands);

impl ElementLayout {
    /// The layout of the elements of a device's cooperative matrices. The first call of a process for a driver runs a small kernel.
    ///
    /// # Errors
    /// The reason, in words, where kernels cannot compute with elements on this device.
    pub fn probe(device: &wgpu::Device, queue: &wgpu::Queue, capabilities: &Capabilities) -> Result<Self, String> {
        ask(device, queue, capabilities, Operands::F16).map(|(layout, _)| layout)
    }

    /// The layout of the elements of a device of this adapter that [`device_descriptor`] asks for. A device is opened and runs a small
    /// kernel, unless the adapter says that kernels could not use the answer.
    ///
    /// # Errors
    /// As [`probe`](Self::probe), and why no device could be opened.
    pub fn of_adapter(adapter: &wgpu::Adapter) -> Result<Self, String> {
        let capabilities = Capabilities::of_adapter(adapter);
        needs(&capabilities)?;
        let opened = pollster::block_on(adapter.request_device(&device_descriptor(adapter)));
        let (device, queue) = opened.map_err(|error| error.to_string())?;
        let cooperative = match capabilities.cooperative {
            Some(matrices) if matrices.guarded => Some(matrices.probe(&device, &queue, &capabilities)?),
            matrices => matrices,
        };
        Self::probe(&device, &queue, &Capabilities { cooperative, ..capabilities })
    }
}

/// The layout of matrices that multiply these numbers, and the rounding of f32 to them. The device must have the matrices.
///
/// # Errors
/// As [`ElementLayout::probe`].
pub(crate) fn ask(
    device: &wgpu::Device,
    queue: &wgpu::Queue,
    capabilities: &Capabilities,
    operands: Operands,
) -> Result<(ElementLayout, Rounding), String> {
    static FOUND: OnceLock<Mutex<HashMap<Key, (ElementLayout, Rounding)>>> = OnceLock::new();
    let (matrices, version) = needs(capabilities)?;
    let CooperativeMatrices { side, lanes, .. } = matrices;
    let info = device.adapter_info();
    let key = (info.name, info.driver, info.driver_info, [side, lanes], operands);
    let mut found = FOUND.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(known) = found.get(&key) {
        return Ok(*known);
    }
    // A failure is not kept: memory that lacks now may be there for the next device.
    let told = run(device, queue, matrices, version, operands)?;
    let answer = (layout_of(side, lanes, &told)?, rounding_of(side, operands, &told)?);
    found.insert(key, answer);
    Ok(answer)
}

/// What a device must have to be asked, or the reason why no kernel could use the answer.
fn needs(capabilities: &Capabilities) -> Result<(CooperativeMatrices, SpirvVersion), String> {
    let matrices = capabilities.cooperative.ok_or("there are no cooperative matrices")?;
    let version =
        capabilities.spirv.ok_or("the device takes kernels as WGSL alone, which has no arithmetic on elements")?;
    Ok((matrices, version))
}

/// The kernel's text for a side and a number of lanes. A matrix of bf16 takes its components in f32.
fn text(side: u32, lanes: u32, operands: Operands) -> String {
    let components = side * side / lanes;
    let list = |of: &dyn Fn(u32) -> String| (0..components).map(of).collect::<Vec<_>>().join(", ");
    let tell: String = (0..components).map(|i| format!("found[at + {i}u] = component_c(numbers, {i}u);\n  ")).collect();
    let taken = match operands {
        Operands::F16 => "f16",
        Operands::Bf16 => "f32",
    };
    let text = include_str!("probe.wgsl");
    [
        ("OPERANDS", list(&|i| format!("x{i}: {taken}"))),
        ("SINGLES", list(&|i| format!("x{i}: f32"))),
        ("BACK", list(&|i| format!("component_c(numbers, {i}u)"))),
        ("OPERAND", list(&|i| format!("{taken}(component_c(numbers, {i}u))"))),
        ("SAMPLE", list(&|i| format!("{taken}(component_c(samples, {i}u))"))),
        ("TELL", tell),
        ("COMPONENTS", format!("{components}u")),
        ("LANES", lanes.to_string()),
        ("AREA: u32 = SIDE * SIDE", format!("AREA: u32 = {}u", side * side)),
        ("matSIDExSIDE", format!("mat{side}x{side}")),
        (", SIDE)", format!(", {side}u)")),
    ]
    .iter()
    .fold(text.to_owned(), |text, (name, value)| text.replace(name, value))
}

/// The elements of a fragment that lanes can share.
fn area(side: u32, lanes: u32) -> Result<u32, String> {
    let area = side.checked_mul(side).filter(|area| lanes > 0 && area.is_multiple_of(lanes) && *area <= 256);
    area.ok_or_else(|| format!("{lanes} lanes do not share {side}x{side} elements evenly"))
}

/// The kernel's words for a side and a number of lanes.
pub(crate) fn spirv(side: u32, lanes: u32, operands: Operands, version: SpirvVersion) -> Result<Vec<u32>, String> {
    area(side, lanes)?;
    let translation = Translation { slots: &[0, 1, 2], needs_matrices: true, markers: Some(operands) };
    translation.of(&text(side, lanes, operands), version)
}

/// The n-th number whose rounding is asked for: ties and numbers next to them and to what a type holds, of either sign.
fn sample(n: u32, operands: Operands) -> f32 {
    // The bits of f32 that the type has not.
    let cut = match operands {
        Operands::F16 => 13,
        Operands::Bf16 => 16,
    };
    let half = 1 << (cut - 1);
    let rest = [half, 1, half - 1, half + 1, 2 * half - 1][n as usize % 5];
    let [sign, exponent] = [n / 10 % 2, 127 - 10 + n * 7 % 21];
    let mantissa = ((n * 37) << cut) & 0x7f_ffff;
    f32::from_bits(sign << 31 | exponent << 23 | mantissa | rest)
}

/// The unit of the numbers of elements. All of them are subnormal halves, which probabilities and lower halves may be: a device that takes
/// them for zero has no fragments.
const SMALL: f32 = 1.0 / (1 << 24) as f32;

/// What the kernel finds: the element of each component of each lane, the fragment from its components, and from its products,
/// and the samples as operands.
fn run(
    device: &wgpu::Device,
    queue: &wgpu::Queue,
    matrices: CooperativeMatrices,
    version: SpirvVersion,
    operands: Operands,
) -> Result<Vec<f32>, String> {
    let CooperativeMatrices { side, lanes, .. } = matrices;
    let area = area(side, lanes)?;
    let words = spirv(side, lanes, operands, version)?;
    let label = Some("sink-attention probes the elements of fragments");
    let scopes = [wgpu::ErrorFilter::OutOfMemory, wgpu::ErrorFilter::Internal, wgpu::ErrorFilter::Validation]
        .map(|filter| device.push_error_scope(filter));

    let numbers: Vec<f32> = (0..area).map(|n| n as f32 * SMALL).chain((0..area).map(|n| sample(n, operands))).collect();
    let one = match operands {
        Operands::F16 => f16::ONE.to_bits(),
        Operands::Bf16 => bf16::ONE.to_bits(),
    };
    let identity: Vec<u16> = (0..area).map(|n| if n / side == n % side { one } else { 0 }).collect();
    let input = |contents: &[u8]| {
        device.create_buffer_init(&wgpu::util::BufferInitDescriptor {
            label,
            contents,
            usage: wgpu::BufferUsages::STORAGE,
        })
    };
    let inputs = [input(bytemuck::cast_slice(&numbers)), input(bytemuck::cast_slice(&identity))];
    let size = u64::from(5 * area * 4);
    let output =
        |usage| device.create_buffer(&wgpu::BufferDescriptor { label, size, usage, mapped_at_creation: false });
    let found = output(wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC);
    let read = output(wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::MAP_READ);

    let entry = [wgpu::PassthroughShaderEntryPoint { name: "main".into(), workgroup_size: (lanes, 1, 1) }];
    let descriptor = wgpu::ShaderModuleDescriptorPassthrough {
        label,
        entry_points: (&entry[..]).into(),
        spirv: Some((&words[..]).into()),
        ..Default::default()
    };
    // SAFETY: wgpu looks at nothing here. naga has validated the module that the words are written from, and `markers::rewrite` puts
    // instructions in place of calls of the same types. The capabilities say that the device takes the version and has the matrices. The
    // module binds two buffers of `area` numbers and one of five times as many, as the layout below has them, and a lane writes its own
    // components.
    let module = unsafe { device.create_shader_module_passthrough(descriptor) };
    let entries = [true, true, false].map(|read_only| wgpu::BindingType::Buffer {
        ty: wgpu::BufferBindingType::Storage { read_only },
        has_dynamic_offset: false,
        min_binding_size: None,
    });
    let entries: Vec<_> = (0..)
        .zip(entries)
        .map(|(binding, ty)| wgpu::BindGroupLayoutEntry {
            binding,
            visibility: wgpu::ShaderStages::COMPUTE,
            ty,
            count: None,
        })
        .collect();
    let layout = device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label, entries: &entries });
    let pipeline_layout = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
        label,
        bind_group_layouts: &[Some(&layout)],
        ..Default::default()
    });
    let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
        label,
        layout: Some(&pipeline_layout),
        module: &module,
        entry_point: Some("main"),
        compilation_options: wgpu::PipelineCompilationOptions::default(),
        cache: None,
    });
    let bound: Vec<_> = (0..)
        .zip(inputs.iter().chain([&found]))
        .map(|(binding, buffer)| wgpu::BindGroupEntry { binding, resource: buffer.as_entire_binding() })
        .collect();
    let group = device.create_bind_group(&wgpu::BindGroupDescriptor { label, layout: &layout, entries: &bound });
    let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor { label });
    {
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor { label, timestamp_writes: None });
        pass.set_pipeline(&pipeline);
        pass.set_bind_group(0, &group, &[]);
        pass.dispatch_workgroups(1, 1, 1);
    }
    encoder.copy_buffer_to_buffer(&found, 0, &read, 0, size);
    queue.submit([encoder.finish()]);
    let (sender, mapped) = std::sync::mpsc::channel();
    read.map_async(wgpu::MapMode::Read, .., move |result| drop(sender.send(result)));
    // wgpu panics where the driver has lost the device meanwhile.
    let poll = || device.poll(wgpu::PollType::wait_indefinitely());
    let polled = std::panic::catch_unwind(std::panic::AssertUnwindSafe(poll));
    for scope in scopes.into_iter().rev() {
        if let Some(error) = pollster::block_on(scope.pop()) {
            return Err(error.to_string());
        }
    }
    polled.map_err(|_| "the driver gave up")?.map_err(|error| error.to_string())?;
    mapped.try_recv().map_err(|error| error.to_string())?.map_err(|error| error.to_string())?;
    let bytes = read.get_mapped_range(..).map_err(|error| error.to_string())?;
    let mut found: Vec<f32> = bytemuck::pod_collect_to_vec(&bytes);
    found.iter_mut().take(4 * area as usize).for_each(|x| *x /= SMALL);
    Ok(found)
}

/// The layout by what the kernel has found.
fn layout_of(side: u32, lanes: u32, found: &[f32]) -> Result<ElementLayout, String> {
    let area = (side * side) as usize;
    let too_little = "the kernel found too little";
    let (elements, copies) = found.split_at_checked(area).ok_or(too_little)?;
    let (copies, right) = copies.split_at_checked(2 * area).ok_or(too_little)?;
    let (right, _) = right.split_at_checked(area).ok_or(too_little)?;
    for (copy, what) in
        copies.chunks(area).zip(["components do not make a fragment", "small results do not become operands"])
    {
        if !copy.iter().copied().eq((0..area).map(|n| n as f32)) {
            return Err(format!("{what}: it has the elements {copy:?}"));
        }
    }
    let is_element = |x: &&f32| x.fract() != 0.0 || !(0.0..area as f32).contains(*x);
    if let Some(x) = elements.iter().find(is_element) {
        return Err(format!("a component is the element {x}, of {area}"));
    }
    let elements: Vec<u32> = elements.iter().map(|x| *x as u32).collect();
    // A right operand of another layout is no obstacle to kernels that load it as a fragment.
    let right: Vec<u32> = right.iter().map(|x| *x as u32).collect();
    Ok(ElementLayout::new(side, lanes, &elements)?.with_right(side, &right))
}

/// The rounding by what the kernel has found.
fn rounding_of(side: u32, operands: Operands, found: &[f32]) -> Result<Rounding, String> {
    let area = side * side;
    let rounded = found.get(4 * area as usize..).filter(|rounded| rounded.len() == area as usize);
    let rounded = rounded.ok_or("the kernel found too little")?;
    let nearest = |x: f32| match operands {
        Operands::F16 => f16::from_f32(x).to_f32(),
        Operands::Bf16 => bf16::from_f32(x).to_f32(),
    };
    // Samples are normal numbers of both types.
    let towards_zero = |x: f32| match operands {
        Operands::F16 => f32::from_bits(x.to_bits() >> 13 << 13),
        Operands::Bf16 => f32::from_bits(x.to_bits() >> 16 << 16),
    };
    let is = |rounds: &dyn Fn(f32) -> f32| (0..area).zip(rounded).all(|(n, x)| rounds(sample(n, operands)) == *x);
    Ok(match (is(&nearest), is(&towards_zero)) {
        (true, _) => Rounding::Nearest,
        (_, true) => Rounding::TowardsZero,
        _ => Rounding::Other,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_is_right_for_every_size() {
        let version = SpirvVersion { major: 1, minor: 6 };
        for (side, lanes) in [(16, 32), (8, 8), (8, 32), (16, 64)] {
            for operands in [Operands::F16, Operands::Bf16] {
                let words = spirv(side, lanes, operands, version);
                assert!(words.is_ok(), "{}\n{}", text(side, lanes, operands), words.unwrap_err());
            }
        }
        assert!(spirv(16, 24, Operands::F16, version).unwrap_err().contains("evenly"));
    }

    #[test]
    fn what_a_driver_finds_is_checked() {
        let place = |lane, component| {
            let [row, column] = ElementLayout::NVIDIA.place(lane, component);
            (row * 16 + column) as f32
        };
        let elements = (0..32).flat_map(|lane| (0..8).map(move |i| place(lane, i)));
        let copy = || (0..256).map(|n| n as f32);
        let transpose = (0..256).map(|n| (n % 16 * 16 + n / 16) as f32);
        let found: Vec<f32> = elements.chain(copy()).chain(copy()).chain(transpose).collect();
        assert_eq!(layout_of(16, 32, &found), Ok(ElementLayout::NVIDIA));
        for (at, value, message) in [
            (5, 0.5, "the element 0.5, of 256"),
            (5, 256.0, "the element 256"),
            (5, f32::NAN, "the element NaN"),
            (300, 0.0, "do not make a fragment"),
            (600, 0.0, "small results do not become operands"),
        ] {
            let mut found = found.clone();
            found[at] = value;
            let reason = layout_of(16, 32, &found).unwrap_err();
            assert!(reason.contains(message), "{reason}");
        }
        assert!(layout_of(16, 32, &found[..9]).unwrap_err().contains("too little"));
    }

    #[test]
    fn the_rounding_of_a_driver_is_found() {
        for (side, operands) in [(8, Operands::F16), (8, Operands::Bf16), (16, Operands::F16), (16, Operands::Bf16)] {
            let area = side * side;
            let cut = if operands == Operands::F16 { 13 } else { 16 };
            let with = |carry: &dyn Fn(u32) -> u32| {
                let rounded = |n| {
                    let bits = sample(n, operands).to_bits();
                    f32::from_bits((bits + carry(bits)) >> cut << cut)
                };
                let found: Vec<f32> = vec![0.0; 4 * area as usize].into_iter().chain((0..area).map(rounded)).collect();
                rounding_of(side, operands, &found).unwrap()
            };
            let half = 1 << (cut - 1);
            assert_eq!(with(&|bits| half - 1 + (bits >> cut & 1)), Rounding::Nearest);
            assert_eq!(with(&|_| 0), Rounding::TowardsZero);
            assert_eq!(with(&|_| half), Rounding::Other, "ties away from zero");
            assert_eq!(with(&|_| half - 1), Rounding::Other, "ties towards zero");
            assert_eq!(with(&|_| 2 * half - 1), Rounding::Other, "away from zero");
            assert_eq!(with(&|bits| if bits >> 31 == 1 { 2 * half - 1 } else { 0 }), Rounding::Other, "down");
            assert!(rounding_of(side, operands, &[0.0; 3]).is_err());
        }
    }
}
