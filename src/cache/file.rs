//! Caches in safetensors files: one format for those on the GPU and on the CPU.
//!
//! Only tokens that are there are saved, block by block (a block is a sequence, or a page) and in the order of its rows,
//! so that what was forgotten is in no file.

use std::path::Path;

use half::f16;
use safetensors::Dtype;

use super::block_table::BlockTable;
use super::cpu;
use super::gpu::KvCache;
use super::host::{HostCache, On};
use crate::device::buffer::download;
use crate::file::saved::{self, Reader, Tensor};
use crate::problem::cache::{CacheConfig, CacheKind, RotaryPositions, RotaryStyle};
use crate::problem::element::Element;
use crate::problem::error::Result;
use crate::problem::row_format::BLOCK;
use crate::problem::row_format::Quantisation;

/// Version of the format.
const VERSION: u32 = 1;
/// The key of the metadata.
const CACHE: &str = "cache";

/// The properties that two caches must share if one is to take the other's contents.
fn properties(config: &CacheConfig) -> Vec<(&'static str, String)> {
    let mut properties = vec![("version", VERSION.to_string())];
    let mut add = |name, value: &dyn ToString| properties.push((name, value.to_string()));
    match config.kind {
        CacheKind::Contiguous { capacity } => {
            add("kind", &"contiguous");
            add("capacity", &capacity);
        }
        CacheKind::Paged { page_size, pages, sequence_pages } => {
            add("kind", &"paged");
            add("page_size", &page_size);
            add("pages", &pages);
            add("sequence_pages", &sequence_pages);
        }
        CacheKind::Rolling { sink_tokens, window, queries } => {
            add("kind", &"rolling");
            add("sink_tokens", &sink_tokens);
            add("window", &window);
            add("queries", &queries);
        }
    }
    add("sequences", &config.sequences);
    add("kv_heads", &config.kv_heads);
    add("head_dim", &config.head_dim);
    add("value_dim", &config.value_dim);
    add("dtype", &config.dtype);
    let rotary = config.rotary.map_or("none".into(), |rotary| {
        let style = match rotary.style {
            RotaryStyle::HalfSplit => "half-split",
            RotaryStyle::Interleaved => "interleaved",
        };
        let positions = match rotary.positions {
            RotaryPositions::Absolute => "absolute",
            RotaryPositions::CacheRelative => "cache-relative",
        };
        format!("{}:{style}:{positions}", rotary.dim)
    });
    add("rotary", &rotary);
    let quantisation = match config.quantisation {
        Some(Quantisation::Q8_0) => "q8_0",
        None => "none",
    };
    add("quantisation", &quantisation);
    properties
}

/// Keys or values: the format of a row in the buffers of the GPU, and in the file.
struct Rows {
    names: [&'static str; 2],
    width: usize,
    /// Bytes of a row in a buffer.
    stride: usize,
    /// Bytes of its numbers.
    bytes: usize,
    /// Where its scales begin in a buffer, and their bytes.
    scales: Option<[usize; 2]>,
}

impl Rows {
    fn of(config: &CacheConfig) -> [Rows; 2] {
        let format = config.format();
        let names = [["keys", "key_scales"], ["values", "value_scales"]];
        let of = |names, width: usize| {
            let scales = config.quantisation.map(|_| [16 * format.vectors(width) as usize, 2 * width.div_ceil(BLOCK)]);
            let bytes = width * if scales.is_some() { 1 } else { config.dtype.bytes() };
            Rows { names, width, stride: 16 * format.row_vectors(width) as usize, bytes, scales }
        };
        [of(names[0], config.head_dim), of(names[1], config.value_dim)]
    }

    /// Tensors of the file: name, element type, elements of a row, and the place of their bytes in a row of a buffer.
    fn tensors(&self, config: &CacheConfig) -> Vec<(&'static str, Dtype, usize, [usize; 2])> {
        let dtype = if self.scales.is_some() { Dtype::I8 } else { saved::dtype(config.dtype) };
        let numbers = (self.names[0], dtype, self.width, [0, self.bytes]);
        let scales = self.scales.map(|[at, bytes]| (self.names[1], Dtype::F16, bytes / 2, [at, bytes]));
        [Some(numbers), scales].into_iter().flatten().collect()
    }
}

/// Rows of each block in which a sequence has a token.
fn held(config: &CacheConfig, block_table: &BlockTable) -> Vec<usize> {
    let rows = config.kind.rows();
    match config.kind {
        CacheKind::Contiguous { .. } => block_table.lengths().to_vec(),
        CacheKind::Rolling { .. } => block_table.written().iter().map(|written| *written.min(&rows)).collect(),
        CacheKind::Paged { page_size, .. } => {
            let mut held = vec![0; config.blocks()];
            for (sequence, length) in block_table.lengths().iter().enumerate() {
                for (number, &page) in block_table.table(sequence).iter().enumerate() {
                    let tokens = length.saturating_sub(number * page_size).min(page_size);
                    if let Some(held) = held.get_mut(page as usize) {
                        *held = tokens.max(*held);
                    }
                }
            }
            held
        }
    }
}

/// First rows of the held rows, in the file's order.
fn held_rows<'a>(config: &'a CacheConfig, held: &'a [usize]) -> impl Iterator<Item = usize> + 'a {
    let (heads, rows) = (config.kv_heads, config.kind.rows());
    let of_block = move |(block, held): (usize, &usize)| {
        (0..*held).flat_map(move |row| (0..heads).map(move |head| (block * heads + head) * rows + row))
    };
    held.iter().enumerate().flat_map(of_block)
}

fn words(numbers: impl IntoIterator<Item = usize>) -> (usize, Vec<u8>) {
    let bytes: Vec<u8> = numbers.into_iter().flat_map(|n| (n as u32).to_le_bytes()).collect();
    (bytes.len() / 4, bytes)
}

/// A file with keys and values in the format of the GPU's buffers.
fn serialize(config: &CacheConfig, block_table: &BlockTable, images: [&[u8]; 2]) -> Result<Vec<u8>> {
    let mut tensors = Vec::new();
    let mut list = |name, (len, bytes)| tensors.push(Tensor { name, dtype: Dtype::U32, shape: vec![len], bytes });
    list("lengths", words(block_table.lengths().iter().copied()));
    match config.kind {
        CacheKind::Contiguous { .. } => {}
        CacheKind::Rolling { .. } => list("written", words(block_table.written().iter().copied())),
        CacheKind::Paged { .. } => {
            let tables = (0..config.sequences).map(|sequence| block_table.table(sequence));
            list("page_counts", words(tables.clone().map(<[u32]>::len)));
            list("pages", words(tables.flatten().map(|page| *page as usize)));
        }
    }
    let held = held(config, block_table);
    let tokens: usize = held.iter().sum();
    for (rows, image) in Rows::of(config).iter().zip(images) {
        for (name, dtype, width, [at, len]) in rows.tensors(config) {
            let mut bytes = Vec::with_capacity(tokens * config.kv_heads * len);
            for row in held_rows(config, &held) {
                bytes.extend_from_slice(&image[row * rows.stride + at..][..len]);
            }
            tensors.push(Tensor { name, dtype, shape: vec![tokens, config.kv_heads, width], bytes });
        }
    }
    saved::serialize(CACHE, &properties(config), &tensors)
}

/// The lengths and pages of a file, and keys and values in the format of the GPU's buffers.
fn deserialize(config: &CacheConfig, file: &[u8]) -> Result<(BlockTable, [Vec<u8>; 2])> {
    let damaged = |reason| saved::damaged(CACHE, reason);
    let reader = Reader::new(CACHE, file)?;
    reader.expect(properties(config))?;
    let list = |name, len: usize| -> Result<Vec<u32>> {
        let bytes = reader.tensor(name, len.saturating_mul(4))?;
        Ok(bytes.as_chunks().0.iter().map(|word| u32::from_le_bytes(*word)).collect())
    };
    let numbers = |name| Ok(list(name, config.sequences)?.into_iter().map(|n| n as usize).collect::<Vec<_>>());
    let lengths = numbers("lengths")?;
    let written = if matches!(config.kind, CacheKind::Rolling { .. }) { numbers("written")? } else { lengths.clone() };
    let mut tables = Vec::new();
    if matches!(config.kind, CacheKind::Paged { .. }) {
        let counts = numbers("page_counts")?;
        let pages = list("pages", counts.iter().fold(0, |sum: usize, n| sum.saturating_add(*n)))?;
        let mut rest = &pages[..];
        for count in counts {
            let (table, behind) = rest.split_at(count);
            tables.push(table.to_vec());
            rest = behind;
        }
    }
    let block_table = BlockTable::restored(config, lengths, written, tables).map_err(damaged)?;
    let held = held(config, &block_table);
    let tokens: usize = held.iter().sum();
    let mut images = config.bytes().map(|bytes| vec![0; bytes as usize]);
    for (rows, image) in Rows::of(config).iter().zip(&mut images) {
        for (name, _, _, [at, len]) in rows.tensors(config) {
            let bytes = reader.tensor(name, tokens * config.kv_heads * len)?;
            for (row, bytes) in held_rows(config, &held).zip(bytes.chunks_exact(len)) {
                image[row * rows.stride + at..][..len].copy_from_slice(bytes);
            }
        }
    }
    let [keys, values] = &images;
    saved::same(CACHE, file, &serialize(config, &block_table, [keys, values])?)?;
    Ok((block_table, images))
}

impl KvCache {
    /// The content of a safetensors file, from which a cache of the same config [takes it](Self::restore), be it on the GPU
    /// or on the CPU, and decodes the same bits as this one would there. Read back from the GPU, as what has been submitted
    /// leaves it: a step that has changed the cache and is open is an error.
    ///
    /// The metadata key `cache` holds the config (the table of a rotary embedding is not part of it). `lengths`, U32
    /// `[sequences]`, are those of [`lengths`](Self::lengths); `keys` and `values`, `[tokens, G, width]`, are what is held
    /// of each sequence in the order of its rows, quantised ones in I8 with `key_scales` and `value_scales`, F16
    /// `[tokens, G, blocks of 32]`. Of a rolling cache, `written` is the most tokens that a sequence has had. Of a paged
    /// one, `page_counts` are pages of each sequence, `pages` are their numbers, and keys and values lie page by page, in
    /// the order of these numbers, shared ones once.
    ///
    /// # Errors
    /// [`Error::CacheBusy`](crate::Error::CacheBusy); [`Error::OutOfMemory`](crate::Error::OutOfMemory),
    /// [`Error::DeviceLost`](crate::Error::DeviceLost) and [`Error::Gpu`](crate::Error::Gpu) for what the driver reports.
    #[cfg(not(target_family = "wasm"))]
    pub fn to_safetensors(&self) -> Result<Vec<u8>> {
        pollster::block_on(self.to_safetensors_async())
    }

    /// As [`to_safetensors`](Self::to_safetensors), for browsers and async hosts.
    ///
    /// # Errors
    /// As [`to_safetensors`](Self::to_safetensors).
    pub async fn to_safetensors_async(&self) -> Result<Vec<u8>> {
        self.check_written()?;
        let mapped = download(&self.device, [&self.keys, &self.values], |_| ()).await?;
        let mut images = Vec::with_capacity(2);
        for (mapped, bytes) in mapped.iter().zip(self.config.bytes()) {
            images.push(mapped.read::<u8>(bytes as usize).await?);
        }
        serialize(&self.config, self.block_table(), [&images[0], &images[1]])
    }

    /// Becomes the cache that was saved, whatever it holds now; what was prepared for it remains so. For what is submitted
    /// after this call. A step that has touched the cache and is open is an error.
    ///
    /// # Errors
    /// [`Error::SavedDamaged`](crate::Error::SavedDamaged) for what is not exactly a file of
    /// [`to_safetensors`](Self::to_safetensors), down to the last bit, and
    /// [`Error::SavedMismatch`](crate::Error::SavedMismatch) for one of a cache of another config;
    /// [`Error::CacheBusy`](crate::Error::CacheBusy): nothing has changed then. [`Error::OutOfMemory`](crate::Error::OutOfMemory), [`Error::DeviceLost`](crate::Error::DeviceLost) and
    /// [`Error::Gpu`](crate::Error::Gpu) for what the driver reports, with which the cache may be of no use.
    #[cfg(not(target_family = "wasm"))]
    pub fn restore(&mut self, file: &[u8]) -> Result<()> {
        pollster::block_on(self.restore_async(file))
    }

    /// As [`restore`](Self::restore), for browsers and async hosts.
    ///
    /// # Errors
    /// As [`restore`](Self::restore).
    pub async fn restore_async(&mut self, file: &[u8]) -> Result<()> {
        self.check_free()?;
        let (block_table, [keys, values]) = deserialize(&self.config, file)?;
        // The state has two lists of lengths, and then the table of each sequence.
        let lengths = block_table.lengths().iter().map(|length| *length as u32);
        let mut state: Vec<u32> = lengths.clone().chain(lengths).collect();
        for sequence in 0..self.config.sequences {
            let table = block_table.table(sequence);
            state.extend_from_slice(table);
            state.extend(std::iter::repeat_n(0, super::gpu::table_row(&self.config) - table.len()));
        }
        let queue = self.device.queue();
        let write = || {
            queue.write_buffer(&self.keys, 0, &keys);
            queue.write_buffer(&self.values, 0, &values);
            queue.write_buffer(&self.state, 0, bytemuck::cast_slice(&state));
        };
        self.device.scoped_async("restoring a cache", write).await?;
        self.replace_book(block_table);
        Ok(())
    }

    /// Writes a file of [`to_safetensors`](Self::to_safetensors), whole, or leaves the one that is there.
    ///
    /// # Errors
    /// [`Error::SavedFile`](crate::Error::SavedFile), and those of [`to_safetensors`](Self::to_safetensors).
    #[cfg(not(target_family = "wasm"))]
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        saved::save(CACHE, path.as_ref(), &self.to_safetensors()?)
    }

    /// [Becomes](Self::restore) the cache of a file.
    ///
    /// # Errors
    /// [`Error::SavedFile`](crate::Error::SavedFile) where it cannot be read or is damaged; else those of
    /// [`restore`](Self::restore).
    #[cfg(not(target_family = "wasm"))]
    pub fn load(&mut self, path: impl AsRef<Path>) -> Result<()> {
        saved::load(CACHE, path.as_ref(), |file| self.restore(file))
    }
}

impl<T: Element> cpu::KvCache<T> {
    /// As [`KvCache::to_safetensors`](crate::cache::KvCache::to_safetensors): one format for both.
    ///
    /// # Errors
    /// [`Error::SavedDamaged`](crate::Error::SavedDamaged) where safetensors refuses to write it, as it does for nothing of
    /// a size that fits memory.
    pub fn to_safetensors(&self) -> Result<Vec<u8>> {
        let [keys, values] = Rows::of(&self.config);
        let images = [pack(&self.keys, &self.scales[0], &keys), pack(&self.values, &self.scales[1], &values)];
        serialize(&self.config, &self.block_table, [&images[0], &images[1]])
    }

    /// As [`KvCache::restore`](crate::cache::KvCache::restore).
    ///
    /// # Errors
    /// [`Error::SavedDamaged`](crate::Error::SavedDamaged), [`Error::SavedMismatch`](crate::Error::SavedMismatch): nothing
    /// has changed then.
    pub fn restore(&mut self, file: &[u8]) -> Result<()> {
        let (block_table, images) = deserialize(&self.config, file)?;
        let [keys, values] = Rows::of(&self.config);
        (self.keys, self.scales[0]) = unpack(&images[0], &keys);
        (self.values, self.scales[1]) = unpack(&images[1], &values);
        self.block_table = block_table;
        Ok(())
    }

    /// As [`KvCache::save`](crate::cache::KvCache::save).
    ///
    /// # Errors
    /// [`Error::SavedFile`](crate::Error::SavedFile).
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        saved::save(CACHE, path.as_ref(), &self.to_safetensors()?)
    }

    /// As [`KvCache::load`](crate::cache::KvCache::load).
    ///
    /// # Errors
    /// [`Error::SavedFile`](crate::Error::SavedFile) where it cannot be read or is damaged; else those of
    /// [`restore`](Self::restore).
    pub fn load(&mut self, path: impl AsRef<Path>) -> Result<()> {
        saved::load(CACHE, path.as_ref(), |file| self.restore(file))
    }
}

/// Rows in the format of the GPU's buffers. Quantised rows become whole numbers again, exactly, by their scales.
fn pack<T: Element>(data: &[T], scales: &[f16], rows: &Rows) -> Vec<u8> {
    let mut image = vec![0; data.len() / rows.width * rows.stride];
    let blocks = rows.width.div_ceil(BLOCK);
    for (n, (image, row)) in image.chunks_exact_mut(rows.stride).zip(data.chunks_exact(rows.width)).enumerate() {
        let Some([at, len]) = rows.scales else {
            image[..rows.bytes].copy_from_slice(bytemuck::cast_slice(row));
            continue;
        };
        let scales = &scales[n * blocks..][..blocks];
        for (i, x) in row.iter().enumerate() {
            let scale = scales[i / BLOCK].to_f32();
            // Numbers of a block whose scale is 0 or NaN have no effect.
            let number = if scale > 0.0 { (x.to_f32() / scale).round_ties_even().clamp(-127.0, 127.0) } else { 0.0 };
            image[i] = (number as i8).cast_unsigned();
        }
        image[at..at + len].copy_from_slice(bytemuck::cast_slice(scales));
    }
    image
}

fn unpack<T: Element>(image: &[u8], rows: &Rows) -> (Vec<T>, Vec<f16>) {
    let (mut data, mut all_scales) = (Vec::new(), Vec::new());
    for image in image.chunks_exact(rows.stride) {
        let Some([at, len]) = rows.scales else {
            data.extend(bytemuck::pod_collect_to_vec::<u8, T>(&image[..rows.bytes]));
            continue;
        };
        let scales: Vec<f16> = bytemuck::pod_collect_to_vec(&image[at..at + len]);
        let numbers = image[..rows.bytes].iter().enumerate();
        data.extend(numbers.map(|(i, n)| cpu::of_block::<T>(f32::from(n.cast_signed()), scales[i / BLOCK])));
        all_scales.extend(scales);
    }
    (data, all_scales)
}

impl<T: Element> HostCache<T> {
    /// The cache as a safetensors file, which [`restore`](Self::restore) of either device reads.
    ///
    /// # Errors
    /// As [`KvCache::to_safetensors`].
    #[cfg(not(target_family = "wasm"))]
    pub fn to_safetensors(&self) -> Result<Vec<u8>> {
        pollster::block_on(self.to_safetensors_async())
    }

    /// As [`to_safetensors`](Self::to_safetensors), for browsers and async hosts.
    ///
    /// # Errors
    /// As [`to_safetensors`](Self::to_safetensors).
    pub async fn to_safetensors_async(&self) -> Result<Vec<u8>> {
        match &self.on {
            On::Cpu(cache) => cache.to_safetensors(),
            On::Gpu(cache) => cache.to_safetensors_async().await,
        }
    }

    /// Replaces the contents of the cache by those of a file of [`to_safetensors`](Self::to_safetensors).
    ///
    /// # Errors
    /// As [`KvCache::restore`].
    #[cfg(not(target_family = "wasm"))]
    pub fn restore(&mut self, file: &[u8]) -> Result<()> {
        pollster::block_on(self.restore_async(file))
    }

    /// As [`restore`](Self::restore), for browsers and async hosts.
    ///
    /// # Errors
    /// As [`restore`](Self::restore).
    pub async fn restore_async(&mut self, file: &[u8]) -> Result<()> {
        match &mut self.on {
            On::Cpu(cache) => cache.restore(file),
            On::Gpu(cache) => cache.restore_async(file).await,
        }
    }
}
