//! From a variant to a compiled pipeline. Each variant is compiled once.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use crate::device::Device;
#[cfg(not(target_family = "wasm"))]
use crate::device::capabilities::Capabilities;
use crate::exec::pipeline_cache::PipelineCache;
use crate::kernel::params::ParamsLayout;
use crate::kernel::template::DUMP_VARIABLE;
use crate::kernel::{Binding, Variant};
#[cfg(not(target_family = "wasm"))]
use crate::plan::Pass;
use crate::plan::Plan;
#[cfg(not(target_family = "wasm"))]
use crate::problem::error::Error;
use crate::problem::error::Result;

/// A compiled kernel, and the layout of its bindings.
#[derive(Debug)]
pub(crate) struct Pipeline {
    pub(crate) pipeline: wgpu::ComputePipeline,
    pub(crate) layout: wgpu::BindGroupLayout,
    pub(crate) params: ParamsLayout,
}

/// The pipelines of one device.
#[derive(Debug, Default)]
pub(crate) struct Pipelines {
    compiled: Mutex<HashMap<Variant, Arc<Pipeline>>>,
    cache: Option<PipelineCache>,
}

impl Pipelines {
    /// Pipelines that are looked up in a file before they are compiled.
    pub(crate) async fn with_cache(device: &Device, path: &Path) -> Result<Self> {
        Ok(Pipelines { cache: Some(PipelineCache::open(device, path).await?), ..Pipelines::default() })
    }

    /// Writes the file, if there is one, and returns its number of bytes.
    pub(crate) fn save_cache(&self) -> Result<Option<usize>> {
        self.cache.as_ref().map(PipelineCache::save).transpose()
    }

    /// The pipelines of a plan's passes. Natively, missing ones are compiled in parallel.
    pub(crate) async fn get_all(&self, device: &Device, plan: &Plan) -> Result<Vec<Arc<Pipeline>>> {
        #[cfg(not(target_family = "wasm"))]
        {
            use rayon::prelude::*;
            let missing = plan.passes.iter().filter(|pass| self.find(&pass.variant).is_none());
            let missing: Vec<_> = missing.collect();
            if missing.len() > 1 {
                // wgpu answers at once here, so no thread of the pool waits.
                let compile = |pass: &&Pass| pollster::block_on(self.get(device, &pass.variant)).map(|_| ());
                missing.par_iter().try_for_each(compile)?;
            }
        }
        let mut pipelines = Vec::with_capacity(plan.passes.len());
        for pass in &plan.passes {
            pipelines.push(self.get(device, &pass.variant).await?);
        }
        Ok(pipelines)
    }

    pub(crate) async fn get(&self, device: &Device, variant: &Variant) -> Result<Arc<Pipeline>> {
        if let Some(pipeline) = self.find(variant) {
            return Ok(pipeline);
        }
        // The kernel is compiled outside the lock. Two threads may compile the same one, and the first result stays.
        let pipeline = Arc::new(compile(device, variant, self.cache.as_ref()).await?);
        let mut compiled = self.compiled.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(compiled.entry(*variant).or_insert(pipeline).clone())
    }

    fn find(&self, variant: &Variant) -> Option<Arc<Pipeline>> {
        // A thread that panicked elsewhere leaves the map whole.
        self.compiled.lock().unwrap_or_else(PoisonError::into_inner).get(variant).cloned()
    }
}

/// Whether workgroup memory has to be zeroed although nothing reads the zeros. Metal's compiler moves the load of a flag before the barrier
/// in front of it, unless the memory was zeroed: wgpu's issue 4500. Kernels that repair others load such flags.
fn needs_zeroed_memory(backend: wgpu::Backend, text: &str) -> bool {
    backend == wgpu::Backend::Metal && text.contains("workgroupUniformLoad")
}

async fn compile(device: &Device, variant: &Variant, cache: Option<&PipelineCache>) -> Result<Pipeline> {
    let (name, text) = (variant.name(), variant.wgsl()?);
    if let Some(folder) = std::env::var_os(DUMP_VARIABLE) {
        // A dump is for reading. A failure to write it must not stop the computation.
        if let Err(error) = std::fs::write(std::path::Path::new(&folder).join(format!("{name}.wgsl")), &text) {
            log::warn!("{DUMP_VARIABLE}: {}: {error}", folder.display());
        }
    }
    let entries: Vec<wgpu::BindGroupLayoutEntry> = variant
        .bindings()
        .into_iter()
        .map(|(binding, written)| wgpu::BindGroupLayoutEntry {
            binding: binding.slot(),
            visibility: wgpu::ShaderStages::COMPUTE,
            ty: wgpu::BindingType::Buffer {
                ty: match binding {
                    Binding::Params => wgpu::BufferBindingType::Uniform,
                    _ => wgpu::BufferBindingType::Storage { read_only: !written },
                },
                has_dynamic_offset: false,
                min_binding_size: None,
            },
            count: None,
        })
        .collect();
    let params = ParamsLayout::of(&text)?;
    let words = rewritten(device, variant)?;
    let zeroed = needs_zeroed_memory(device.wgpu().adapter_info().backend, &text);
    device
        .scoped_async("compiling a kernel", || {
            let gpu = device.wgpu();
            let label = Some(name.as_str());
            let module = match words {
                Some(words) => passed_module(gpu, label, &words, variant.threads()),
                None => {
                    let source = wgpu::ShaderSource::Wgsl(text.into());
                    shader_module(gpu, wgpu::ShaderModuleDescriptor { label, source })
                }
            };
            let layout = gpu.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label, entries: &entries });
            let pipeline_layout = gpu.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
                label,
                bind_group_layouts: &[Some(&layout)],
                ..Default::default()
            });
            let pipeline = gpu.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
                label,
                layout: Some(&pipeline_layout),
                module: &module,
                entry_point: Some("main"),
                compilation_options: wgpu::PipelineCompilationOptions {
                    // Kernels write workgroup memory before they read it. The only exception is the padding of the rows of an n_step, whose
                    // sums are never stored.
                    zero_initialize_workgroup_memory: zeroed,
                    ..Default::default()
                },
                cache: cache.map(PipelineCache::wgpu),
            });
            Pipeline { pipeline, layout, params }
        })
        .await
}

/// The SPIR-V of a variant that says more than WGSL can; of all others wgpu makes it.
#[cfg(not(target_family = "wasm"))]
fn rewritten(device: &Device, variant: &Variant) -> Result<Option<Vec<u32>>> {
    if !variant.needs_spirv() {
        return Ok(None);
    }
    let Capabilities { spirv, name, .. } = device.capabilities();
    let Some(version) = spirv else {
        // A plan for another device: one for this device has no such variant.
        let message = format!("{} goes to the driver as SPIR-V, which {name} does not take", variant.name());
        return Err(Error::Gpu { during: "compiling a kernel", message });
    };
    variant.spirv(*version).map(Some)
}

/// Browsers take WGSL alone, and plans for them have no variant that says more.
#[cfg(target_family = "wasm")]
fn rewritten(_: &Device, _: &Variant) -> Result<Option<Vec<u32>>> {
    Ok(None)
}

/// Hands SPIR-V of this crate to the driver as it is.
fn passed_module(gpu: &wgpu::Device, label: Option<&str>, words: &[u32], threads: u32) -> wgpu::ShaderModule {
    let entry = [wgpu::PassthroughShaderEntryPoint { name: "main".into(), workgroup_size: (threads, 1, 1) }];
    let descriptor = wgpu::ShaderModuleDescriptorPassthrough {
        label,
        entry_points: (&entry[..]).into(),
        spirv: Some(words.into()),
        ..Default::default()
    };
    // SAFETY: wgpu looks at nothing here. Beside what `shader_module` lists, these hold; each names what enforces it.
    // - The words are valid SPIR-V: naga has validated the module that it wrote them from. Calls of markers become instructions on their
    //   arguments, of the same types, and operands of loops are changed. `Variant::spirv`, `elements::rewrite`, `set_loop_controls`;
    //   tests/gpu/loops.rs has spirv-val look at them.
    // - The driver takes this version of SPIR-V, and what else the module asks for. `adapter::spirv`; `adapter::cooperative` for kernels
    //   with matrices.
    // - The module binds what the layout has, as the layout has it, under the numbers that wgpu gives the slots. `Variant::bindings`,
    //   from which both are made; `bindings_stay_where_they_are` of tests/host/shaders.rs.
    // - The uniform buffer is as long as the structure of the parameters. `ParamsLayout::of`.
    // - Workgroups have as many threads and as much memory as the device offers. `check_limits`; `keeps_the_planners_promises` of
    //   tests/host/shaders.rs holds the text to these numbers.
    // - The feature checked-shaders has no such module. `adapter::spirv`.
    unsafe { gpu.create_shader_module_passthrough(descriptor) }
}

/// Compiles without run-time bounds checks, which cost 10 % (benches/results/), unless the feature
/// `checked-shaders` asks for them.
fn shader_module(gpu: &wgpu::Device, descriptor: wgpu::ShaderModuleDescriptor<'_>) -> wgpu::ShaderModule {
    if cfg!(feature = "checked-shaders") {
        return gpu.create_shader_module(descriptor);
    }
    // SAFETY: the text is this crate's own. It keeps these invariants; each names what enforces it.
    // - Operands of the caller: an index stays within the extents and strides that lie in the buffer. `BoundOperand::new`.
    // - Slices: a dispatch indexes within the binding_ranges that it binds, in whole words. `Pass::slices`; the simulation in
    //   src/plan/slice/tests.rs goes through it, workgroup by workgroup.
    // - Wrapping: an index counts from the start of its window and may wrap on the way there. A window has fewer than 2^32 elements.
    //   `OperandLayout::window`.
    // - The table of sequences and the slots of reported tiles are as long as the problem makes them. `sequence_table`,
    //   `fallback_slots`.
    // - A bias is read at positions that are clamped to the sequence. shaders/bias.wgsl.
    // - The words of a mask are read up to a tile beyond the end of a row, for which there is room. `mask_bits` of
    //   src/plan/operand.rs; `Pass::new` refuses larger tiles.
    // - Workgroup memory: an index stays below a length that comes from the same constants. `PortableTile::arrays`,
    //   `CooperativeTile::workgroup_bytes`, the templates.
    // - Loops end: each counts up to a bound that its body does not change, clears a bit of a number in each turn, or runs until a
    //   limit has followed what exceeds it, once. The templates.
    // - Caches: rows lie below the lengths and in the pages of the block table. `BlockTable`; the templates clamp what a tile has beyond the
    //   end of a sequence.
    // - Gathered and scattered rows are runs of such rows, and are recorded for a book with the same lengths and, where gradients
    //   are written, the same pages. `Batch`, `KvCache::check_lengths`, `PreparedBackward::encode`.
    unsafe { gpu.create_shader_module_trusted(descriptor, wgpu::ShaderRuntimeChecks::unchecked()) }
}

#[cfg(test)]
mod tests {
    use super::needs_zeroed_memory;
    use wgpu::Backend;

    #[test]
    fn flags_on_metal_lie_in_zeroed_memory() {
        let (flag, none) = ("if (workgroupUniformLoad(&flags[0]).x == 0.0) { return; }", "workgroupBarrier();");
        assert!(needs_zeroed_memory(Backend::Metal, flag));
        assert!(!needs_zeroed_memory(Backend::Metal, none) && !needs_zeroed_memory(Backend::Vulkan, flag));
    }
}
