//! Keys and values out of a cache, one after the other, and gradients by them back into its layout.

use super::batch::{CopyRun, PrefillBatch, ScatterSum};
use super::bind::{Bound, params};
use super::gpu::GivenBuffer;
use super::gpu::KvCache;
use crate::device::buffer::{TensorView, allocate, upload};
use crate::exec::bound_operand::resource;
use crate::kernel::cache::CacheOptions;
use crate::kernel::params::Params;
use crate::kernel::{Binding, Kernel, Variant};
use crate::plan::operand::BindingRange;
use crate::plan::pass::fold;
use crate::problem::cache::CacheConfig;
use crate::problem::error::{Error, Result};
use crate::problem::row_format::Addressing;
use crate::problem::row_format::RowFormat;

/// A kernel with its grid.
pub(super) type Dispatch = (Bound, [u32; 2]);

/// Records a dispatch, if there is one, for the present lengths.
pub(super) fn record(dispatch: &Option<Dispatch>, pass: &mut wgpu::ComputePass<'_>, cache: &KvCache) {
    if let Some((bound, [x, y])) = dispatch {
        bound.dispatch(pass, cache.book().current, [*x, *y, 1]);
    }
}

pub(super) fn given<'a>(name: &'static str, view: impl Into<Option<TensorView<'a>>>) -> GivenBuffer<'a> {
    (name, view.into().map(|view| view.buffer))
}

/// Keys and values of all sequences of a batch, `[G, rows, width]` each, of the cache's element type. Rows are padded to 16
/// bytes.
#[derive(Debug, Clone)]
pub(super) struct Gathered {
    pub(super) rows: usize,
    row_bytes: [u64; 2],
    element: u64,
    parts: [(wgpu::Buffer, BindingRange); 2],
}

impl Gathered {
    /// Bytes of the keys and of the values, which fit a binding each.
    fn bytes(cache: &KvCache, batch: &PrefillBatch) -> Result<[u64; 2]> {
        let bytes = row_bytes(&cache.config).map(|row| row * (cache.config.kv_heads * batch.rows) as u64);
        let limit = cache.device.capabilities().binding_bytes;
        match ["gathered keys", "gathered values"].into_iter().zip(bytes).find(|(_, bytes)| *bytes > limit) {
            Some((operand, bytes)) => Err(Error::CacheTooLarge { operand, bytes, limit }),
            None => Ok(bytes),
        }
    }

    /// The binding_ranges of keys and values, if both are in one buffer.
    fn binding_ranges(cache: &KvCache, batch: &PrefillBatch) -> Result<[BindingRange; 2]> {
        let [keys, values] = Gathered::bytes(cache, batch)?;
        let alignment = u64::from(cache.device.capabilities().offset_alignment).max(256);
        let start = keys.next_multiple_of(alignment);
        Ok([BindingRange { start: 0, len: keys }, BindingRange { start, len: values }])
    }

    /// Bytes of a buffer that holds keys and values.
    pub(super) fn scratch_bytes(cache: &KvCache, batch: &PrefillBatch) -> Result<u64> {
        Gathered::binding_ranges(cache, batch).map(|[_, values]| values.start + values.len)
    }

    /// Uses a buffer that is large enough.
    pub(super) fn within(cache: &KvCache, batch: &PrefillBatch, buffer: &wgpu::Buffer) -> Result<Self> {
        let parts = Gathered::binding_ranges(cache, batch)?.map(|part| (buffer.clone(), part));
        Ok(Gathered::new(cache, batch, parts))
    }

    /// Allocates buffers of its own.
    pub(super) async fn allocate(cache: &KvCache, batch: &PrefillBatch) -> Result<Self> {
        let [keys, values] = Gathered::bytes(cache, batch)?;
        let of = |operand, len: u64| -> Result<_> {
            let usage = wgpu::BufferUsages::STORAGE;
            Ok((allocate::<u8>(&cache.device, operand, len as usize, usage)?, BindingRange { start: 0, len }))
        };
        let create = || -> Result<_> { Ok([of("gathered keys", keys)?, of("gathered values", values)?]) };
        let parts = cache.device.scoped_async("allocating scratch", create).await??;
        Ok(Gathered::new(cache, batch, parts))
    }

    fn new(cache: &KvCache, batch: &PrefillBatch, parts: [(wgpu::Buffer, BindingRange); 2]) -> Self {
        let element = cache.config.dtype.bytes() as u64;
        Gathered { rows: batch.rows, row_bytes: row_bytes(&cache.config), element, parts }
    }

    /// The gathered keys and values as operands of the ordinary passes.
    pub(super) fn views(&self) -> [TensorView<'_>; 2] {
        [0, 1].map(|n| {
            let (buffer, window) = &self.parts[n];
            let row = self.row_bytes[n] / self.element;
            TensorView::new(buffer).offset(window.start / self.element).strides([0, self.rows as u64 * row, row])
        })
    }

    pub(super) fn bind(&self, bindings: [Binding; 2]) -> [(Binding, wgpu::BindingResource<'_>); 2] {
        [0, 1].map(|n| (bindings[n], resource(&self.parts[n].0, self.parts[n].1)))
    }

    /// The dispatch that copies runs of rows out of the cache to here. `None` if there are no runs.
    pub(super) async fn gather(&self, cache: &KvCache, runs: &[CopyRun]) -> Result<Option<Dispatch>> {
        let config = &cache.config;
        let paged = config.addressing() == Addressing::Paged;
        let list = runs.iter().flat_map(|run| {
            let block = if paged { cache.table_at(run.sequence) + run.number } else { run.sequence };
            [block, run.row, run.to, run.rows].map(|n| n as u32)
        });
        self.moving(cache, Kernel::GATHER, runs.len(), list.collect(), Vec::new()).await
    }

    /// The dispatch that sums gradients from here into buffers of the cache's layout.
    pub(super) async fn scatter(
        &self,
        cache: &KvCache,
        sums: &[ScatterSum],
        into: [&wgpu::Buffer; 2],
    ) -> Result<Option<Dispatch>> {
        let mut list = Vec::new();
        let mut terms = Vec::new();
        for sum in sums {
            let first = 5 * sums.len() + terms.len();
            terms.extend(sum.terms.iter().map(|term| *term as u32));
            let end = first + sum.terms.len();
            list.extend([sum.block, sum.row, sum.rows, first, end].map(|n| n as u32));
        }
        list.extend(terms);
        let [keys, values] = cache.config.bytes().map(|len| BindingRange { start: 0, len });
        let into =
            vec![(Binding::CachedKeys, resource(into[0], keys)), (Binding::CachedValues, resource(into[1], values))];
        self.moving(cache, Kernel::SCATTER, sums.len(), list, into).await
    }

    async fn moving(
        &self,
        cache: &KvCache,
        kernel: Kernel,
        runs: usize,
        list: Vec<u32>,
        mut operands: Vec<(Binding, wgpu::BindingResource<'_>)>,
    ) -> Result<Option<Dispatch>> {
        if runs == 0 {
            return Ok(None);
        }
        let (config, device) = (&cache.config, &cache.device);
        let variant = Variant::of_cache(kernel, CacheOptions::new(config, true));
        let workgroups = runs as u128 * config.kv_heads as u128;
        let (workgroups, grid) = fold(workgroups, device.capabilities().grid_dimension)?;
        let params = Params { workgroups, gathered_rows: self.rows as u32, ..params(config) };
        let list = device.scoped_async("uploading a list of rows", || upload(device, "rows", &list)).await??;
        operands.push((Binding::Tokens, list.as_entire_binding()));
        operands.extend(self.bind([Binding::GatheredKeys, Binding::GatheredValues]));
        Ok(Some((Bound::new(cache, &variant, &params, &operands).await?, grid)))
    }
}

/// Where the ordinary passes find keys and values.
pub(super) enum Source<'a> {
    /// In the cache.
    Cache([TensorView<'a>; 2]),
    Gathered(Gathered),
}

impl Source<'_> {
    pub(super) fn views(&self) -> [TensorView<'_>; 2] {
        match self {
            Source::Cache(views) => *views,
            Source::Gathered(gathered) => gathered.views(),
        }
    }
}

/// Bytes of a row of keys and of one of values, of the element type.
fn row_bytes(config: &CacheConfig) -> [u64; 2] {
    let format = RowFormat { dtype: config.dtype, quantisation: None };
    [config.head_dim, config.value_dim].map(|width| 16 * u64::from(format.row_vectors(width)))
}
