//! Asks a device whose subgroups have several sizes which of them kernels on matrices get.
//!
//! wgpu cannot ask for a size (its issue 10049), and drivers say nowhere which one they take. The kernel of `subgroups.wgsl` is of the same
//! kind as those on matrices, so it gets the same size. Mesa's RADV, for one, goes by the workgroup and by nothing else that differs among
//! kernels here: 32 lanes for up to 32 threads, otherwise 64, or what `RADV_PERFTEST=cswave32` says (`radv_shader_choose_subgroup_size`).
//! A wrong answer costs time and no result: kernels look at the size before they multiply (`entry.wgsl`).

use std::collections::HashMap;
use std::sync::{Mutex, OnceLock, PoisonError};

use crate::device::capabilities::{Capabilities, CooperativeMatrices};

/// The names of adapter and driver, and the side of a fragment.
type Key = (String, String, String, u32);

/// Threads of the workgroups that are tried: those of most tiles.
const THREADS: [u32; 3] = [64, 128, 256];

impl CooperativeMatrices {
    /// These matrices of a device with the size of subgroups that its kernels on them get. Where the device runs a kernel and the kernel tells
    /// nothing, because the driver does not compute (Mesa's shims of GPUs that are not there), they stay as they are. The first call of a process
    /// for a driver runs small kernels.
    ///
    /// # Errors
    /// The reason, in words, why kernels on matrices do not run here.
    pub fn probe(
        self,
        device: &wgpu::Device,
        queue: &wgpu::Queue,
        capabilities: &Capabilities,
    ) -> Result<CooperativeMatrices, String> {
        static FOUND: OnceLock<Mutex<HashMap<Key, Vec<u32>>>> = OnceLock::new();
        let info = device.adapter_info();
        let key = (info.name, info.driver, info.driver_info, self.side);
        let mut found = FOUND.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = found.get(&key) {
            return matrices_of(self, known);
        }
        let fitting = THREADS.into_iter().filter(|threads| *threads <= capabilities.workgroup_threads);
        let sizes = fitting.map(|threads| run(device, queue, self.side, threads)).collect::<Result<Vec<_>, _>>()?;
        let answer = matrices_of(self, &sizes);
        found.insert(key, sizes);
        answer
    }
}

/// The matrices for the size that most workgroups have got, the larger one of two.
fn matrices_of(matrices: CooperativeMatrices, sizes: &[u32]) -> Result<CooperativeMatrices, String> {
    let told = || sizes.iter().copied().filter(|size| *size > 0);
    let count = |size: u32| told().filter(|other| *other == size).count();
    let Some(lanes) = told().max_by_key(|size| (count(*size), *size)) else { return Ok(matrices) };
    let CooperativeMatrices { side, .. } = matrices;
    if ![1, 2, 4].iter().any(|n| n * side == lanes) {
        return Err(format!("kernels get subgroups of {lanes}, which cannot share fragments of {side}x{side}"));
    }
    Ok(CooperativeMatrices { lanes, ..matrices })
}

/// The kernel's text for a side, in workgroups of so many threads.
fn text(side: u32, threads: u32) -> String {
    let [pitch, quads] = [side / 4, side * side / 4];
    [
        ("THREADS", threads.to_string()),
        ("SIDExSIDE", format!("{side}x{side}")),
        ("PITCH", format!("{pitch}u")),
        ("QUADS", format!("{quads}u")),
    ]
    .iter()
    .fold(include_str!("subgroups.wgsl").to_owned(), |text, (name, value)| text.replace(name, value))
}

/// The size of subgroups in a workgroup of so many threads, and 0 where the driver does not compute.
fn run(device: &wgpu::Device, queue: &wgpu::Queue, side: u32, threads: u32) -> Result<u32, String> {
    let label = Some("sink-attention asks for the size of subgroups");
    let scopes = [wgpu::ErrorFilter::OutOfMemory, wgpu::ErrorFilter::Internal, wgpu::ErrorFilter::Validation]
        .map(|filter| device.push_error_scope(filter));
    let source = wgpu::ShaderSource::Wgsl(text(side, threads).into());
    let module = device.create_shader_module(wgpu::ShaderModuleDescriptor { label, source });
    let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
        label,
        layout: None,
        module: &module,
        entry_point: Some("main"),
        compilation_options: wgpu::PipelineCompilationOptions::default(),
        cache: None,
    });
    let buffer =
        |usage| device.create_buffer(&wgpu::BufferDescriptor { label, size: 4, usage, mapped_at_creation: false });
    let found = buffer(wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC);
    let read = buffer(wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::MAP_READ);
    let entries = [wgpu::BindGroupEntry { binding: 0, resource: found.as_entire_binding() }];
    let layout = pipeline.get_bind_group_layout(0);
    let group = device.create_bind_group(&wgpu::BindGroupDescriptor { label, layout: &layout, entries: &entries });
    let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor { label });
    {
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor { label, timestamp_writes: None });
        pass.set_pipeline(&pipeline);
        pass.set_bind_group(0, &group, &[]);
        pass.dispatch_workgroups(1, 1, 1);
    }
    encoder.copy_buffer_to_buffer(&found, 0, &read, 0, 4);
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
    bytes.first_chunk().map(|bytes| u32::from_le_bytes(*bytes)).ok_or_else(|| "the kernel found too little".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_is_right_for_every_side() {
        for side in [8, 16] {
            let text = text(side, 64);
            let module =
                naga::front::wgsl::parse_str(&text).unwrap_or_else(|error| panic!("{}", error.emit_to_string(&text)));
            let flags = naga::valid::ValidationFlags::all();
            naga::valid::Validator::new(flags, naga::valid::Capabilities::all()).validate(&module).unwrap();
        }
    }

    #[test]
    fn the_size_that_most_kernels_get() {
        let guess =
            CooperativeMatrices { side: 16, lanes: 64, guarded: true, in_step: false, elements: None, bf16: None };
        for (sizes, lanes) in [
            (&[32, 32, 32][..], 32),
            (&[32, 64, 64], 64),
            (&[32, 32, 64], 32),
            (&[32, 64], 64),
            (&[0, 0, 0], 64),
            (&[0, 32, 0], 32),
            (&[], 64),
        ] {
            assert_eq!(matrices_of(guess, sizes), Ok(guess.lanes(lanes)), "{sizes:?}");
        }
        assert!(matrices_of(guess, &[8; 3]).unwrap_err().contains("subgroups of 8"));
    }
}
