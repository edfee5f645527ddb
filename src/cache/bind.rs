//! The bindings of kernels of caches: parameters, operands of the caller, and the cache's own buffers.

use std::sync::Arc;

use super::gpu::{KvCache, table_row};
use crate::device::buffer::TensorView;
use crate::exec::bind::bind_groups;
use crate::exec::bound_operand::{BoundOperand, check_element_type};
use crate::exec::pipeline::Pipeline;
use crate::kernel::params::{Operand, Params};
use crate::kernel::{Binding, Variant};
use crate::plan::operand::{BindingRange, OperandLayout};
use crate::problem::cache::{CacheConfig, CacheKind};
use crate::problem::error::{Error, Result};
use crate::problem::{Layout, Options};

/// The parameters that follow from a cache's configuration.
pub(super) fn params(config: &CacheConfig) -> Params {
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
        sink_rows: kept as u32,
        window_rows: ring as u32,
        scale_size: 1.0,
        negative_infinity: f32::NEG_INFINITY,
        ..Params::default()
    }
}

/// The parameters for either list of lengths.
fn of_lists(params: &Params) -> [Params; 2] {
    [0, 1].map(|current| {
        let [current, next] = [current, 1 - current].map(|list| list * params.sequences);
        Params { current, next, ..*params }
    })
}

/// A kernel with what it binds, for either list of lengths.
#[derive(Debug, Clone)]
pub(super) struct Bound {
    pub(super) pipeline: Arc<Pipeline>,
    pub(super) groups: Vec<wgpu::BindGroup>,
}

impl Bound {
    /// Binds a kernel. Operands that are not in `operands` are the cache's own.
    pub(super) async fn new(
        cache: &KvCache,
        variant: &Variant,
        params: &Params,
        operands: &[(Binding, wgpu::BindingResource<'_>)],
    ) -> Result<Self> {
        let device = &cache.device;
        let pipeline = cache.pipelines.get(device, variant).await?;
        let find = |_, binding| match operands.iter().find(|(b, _)| *b == binding) {
            Some((_, resource)) => Some(resource.clone()),
            None => match binding {
                Binding::CachedKeys => Some(cache.keys.as_entire_binding()),
                Binding::CachedValues => Some(cache.values.as_entire_binding()),
                Binding::CacheState => Some(cache.state.as_entire_binding()),
                _ => None,
            },
        };
        let bind = || bind_groups(device, &pipeline, variant, of_lists(params), find);
        let groups = device.scoped_async("binding operands", bind).await?;
        Ok(Bound { pipeline, groups })
    }

    pub(super) fn dispatch(&self, pass: &mut wgpu::ComputePass<'_>, list: usize, [x, y, z]: [u32; 3]) {
        pass.set_pipeline(&self.pipeline.pipeline);
        pass.set_bind_group(0, &self.groups[list], &[]);
        pass.dispatch_workgroups(x, y, z);
    }
}

/// An operand of the caller's, after a check, and the range of it that a kernel binds.
pub(super) struct Given<'a> {
    pub(super) placed: BoundOperand<'a>,
    pub(super) range: BindingRange,
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
        let placed = BoundOperand::new(binding, view, extents, layout, element)?;
        let range = placed.view.binding_range(placed.view.whole(), cache.device.capabilities())?;
        for (other, buffer) in [("the cache's keys", &cache.keys), ("the cache's values", &cache.values)] {
            if view.buffer == buffer {
                return Err(Error::Aliasing { output: binding.name(), other });
            }
        }
        Ok(Given { placed, range, buffer: view.buffer })
    }

    pub(super) fn view(&self) -> &OperandLayout {
        &self.placed.view
    }

    /// The place of the operand, counted in vectors of `width` elements.
    pub(super) fn operand(&self, width: u64) -> Operand {
        Operand::new(self.view(), self.range, width)
    }

    pub(super) fn resource(&self) -> wgpu::BindingResource<'a> {
        self.placed.binding(self.range)
    }
}

/// Checks that a result has distinct places, in a buffer that no other operand uses.
pub(super) fn check_result(result: &Given<'_>, others: &[Option<&Given<'_>>]) -> Result<()> {
    let output = result.view().binding.name();
    match others.iter().flatten().find(|other| other.buffer == result.buffer) {
        Some(other) => Err(Error::Aliasing { output, other: other.view().binding.name() }),
        None => result.placed.check_distinct(),
    }
}
