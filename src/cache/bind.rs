//! What the kernels of caches bind: parameters, operands of the caller's, the cache's own buffers.

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};

use super::config::{CacheConfig, CacheKind};
use super::gpu::{KvCache, table_row};
use super::shader::{CacheBinding, CacheVariant};
use crate::device::buffer::TensorView;
use crate::exec::pipeline::Pipeline;
use crate::exec::placed::{Placed, check_element_type};
use crate::exec::prepared::{Operand, params_of, upload_params};
use crate::kernel::Binding;
use crate::plan::operand::{View, Window};
use crate::problem::error::{Error, Result};
use crate::problem::{Layout, Options};

/// What changes between calls; `Params` in shaders/cache/params.wgsl.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(super) struct Params {
    pub(super) q: Operand,
    pub(super) k: Operand,
    pub(super) v: Operand,
    pub(super) o: Operand,
    pub(super) heads: u32,
    pub(super) kv_heads: u32,
    pub(super) queries: u32,
    pub(super) workgroups: u32,
    pub(super) sequences: u32,
    pub(super) current: u32,
    pub(super) next: u32,
    pub(super) table: u32,
    pub(super) table_row: u32,
    pub(super) block_rows: u32,
    pub(super) block_shift: u32,
    pub(super) kept_rows: u32,
    pub(super) ring_rows: u32,
    pub(super) gathered_rows: u32,
    pub(super) tokens: u32,
    pub(super) left: i32,
    pub(super) right: i32,
    pub(super) sink_tokens: u32,
    pub(super) groups: u32,
    pub(super) row_tiles: u32,
    pub(super) splits: u32,
    pub(super) most_splits: u32,
    pub(super) long_tiles: u32,
    pub(super) least_tiles: u32,
    pub(super) lse_offset: u32,
    pub(super) sink_offset: u32,
    pub(super) scale: f32,
    pub(super) softcap: f32,
    pub(super) scale_size: f32,
    pub(super) negative_infinity: f32,
}

impl Params {
    pub(super) fn new(config: &CacheConfig) -> Self {
        let rows = config.kind.rows();
        let [kept, ring] = match config.kind {
            CacheKind::Rolling { sink_tokens, .. } => [sink_tokens, rows - sink_tokens],
            _ => [0, 0],
        };
        Params {
            kv_heads: config.kv_heads as u32,
            sequences: config.sequences as u32,
            table: 2 * config.sequences as u32,
            table_row: table_row(config) as u32,
            block_rows: rows as u32,
            block_shift: rows.trailing_zeros(),
            kept_rows: kept as u32,
            ring_rows: ring as u32,
            scale_size: 1.0,
            negative_infinity: f32::NEG_INFINITY,
            ..Params::zeroed()
        }
    }

    /// Of kernels between a cache and what is gathered from it.
    pub(super) fn moving(config: &CacheConfig, workgroups: u32, gathered_rows: usize) -> Self {
        Params { workgroups, gathered_rows: gathered_rows as u32, ..Params::new(config) }
    }

    /// For either list of lengths.
    pub(super) fn of_lists(&self) -> [Params; 2] {
        [0, 1].map(|current| {
            let [current, next] = [current, 1 - current].map(|list| list * self.sequences);
            Params { current, next, ..*self }
        })
    }
}

/// A kernel with what it binds, for either list of lengths.
#[derive(Debug, Clone)]
pub(super) struct Bound {
    pub(super) pipeline: Arc<Pipeline>,
    pub(super) groups: [wgpu::BindGroup; 2],
}

impl Bound {
    /// Operands that are not given are the cache's.
    pub(super) async fn new(
        cache: &KvCache,
        variant: &CacheVariant,
        params: &Params,
        operands: &[(CacheBinding, wgpu::BindingResource<'_>)],
    ) -> Result<Self> {
        let device = &cache.device;
        let pipeline = cache.pipelines.get(device, variant).await?;
        let bind = || {
            let label = Some("sink-attention cache");
            let buffer = upload_params(device, params.of_lists());
            [0, 1].map(|list| {
                let given =
                    |binding| operands.iter().find(|(b, _)| *b == binding).map(|(_, resource)| resource.clone());
                let find = |binding| match binding {
                    CacheBinding::Params => Some(params_of::<Params>(&buffer, list)),
                    _ if given(binding).is_some() => given(binding),
                    CacheBinding::Keys => Some(cache.keys.as_entire_binding()),
                    CacheBinding::Values => Some(cache.values.as_entire_binding()),
                    CacheBinding::State => Some(cache.state.as_entire_binding()),
                    _ => None,
                };
                let entries: Vec<_> = variant
                    .bindings()
                    .into_iter()
                    .filter_map(|(b, _)| Some(wgpu::BindGroupEntry { binding: b.slot(), resource: find(b)? }))
                    .collect();
                let layout = &pipeline.layout;
                device.wgpu().create_bind_group(&wgpu::BindGroupDescriptor { label, layout, entries: &entries })
            })
        };
        let groups = device.scoped("binding operands", bind).await?;
        Ok(Bound { pipeline, groups })
    }

    pub(super) fn dispatch(&self, pass: &mut wgpu::ComputePass<'_>, list: usize, [x, y, z]: [u32; 3]) {
        pass.set_pipeline(&self.pipeline.pipeline);
        pass.set_bind_group(0, &self.groups[list], &[]);
        pass.dispatch_workgroups(x, y, z);
    }
}

/// An operand of the caller's, checked, and what a kernel binds of it.
pub(super) struct Given<'a> {
    pub(super) placed: Placed<'a>,
    pub(super) window: Window,
    pub(super) buffer: &'a wgpu::Buffer,
}

impl<'a> Given<'a> {
    pub(super) fn new(
        cache: &KvCache,
        binding: Binding,
        view: &TensorView<'a>,
        extents: [usize; 4],
        layout: Layout,
        element: usize,
    ) -> Result<Self> {
        check_element_type(binding, view, cache.config.dtype, &Options::new())?;
        let placed = Placed::new(binding, view, extents, layout, element)?;
        let window = placed.view.window(placed.view.whole(), cache.device.capabilities())?;
        for (other, buffer) in [("the cache's keys", &cache.keys), ("the cache's values", &cache.values)] {
            if view.buffer == buffer {
                return Err(Error::Aliasing { output: binding.name(), other });
            }
        }
        Ok(Given { placed, window, buffer: view.buffer })
    }

    pub(super) fn view(&self) -> &View {
        &self.placed.view
    }

    /// Counted in vectors of so many elements.
    pub(super) fn operand(&self, width: u64) -> Operand {
        Operand::new(self.view(), self.window, width)
    }

    pub(super) fn resource(&self) -> wgpu::BindingResource<'a> {
        self.placed.binding(self.window)
    }
}

/// A result needs distinct places in a buffer that no other operand uses.
pub(super) fn check_result(result: &Given<'_>, others: &[Option<&Given<'_>>]) -> Result<()> {
    let output = result.view().binding.name();
    match others.iter().flatten().find(|other| other.buffer == result.buffer) {
        Some(other) => Err(Error::Aliasing { output, other: other.view().binding.name() }),
        None => result.placed.check_distinct(),
    }
}
