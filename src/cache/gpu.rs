//! A cache on the GPU.

use std::sync::{Arc, Mutex, PoisonError};

use super::batch::{Chunk, PrefillBatch, check_counts};
use super::block_table::{BlockTable, Changes, Move};
use super::step::{Step, Ticket};
use crate::attention::Attention;
use crate::device::Device;
use crate::device::buffer::{TensorView, allocate};
use crate::exec::pipeline::Pipelines;
use crate::problem::cache::{CacheConfig, CacheKind};
use crate::problem::error::{Error, Result};

impl Attention {
    /// An empty step, into which appends to caches, decoding and prefills are recorded.
    ///
    /// # Errors
    /// [`Error::NeedsGpu`].
    pub fn step(&self) -> Result<Step> {
        self.gpu("step").map(|(device, _)| Step::new(device))
    }

    /// An empty cache of keys and values on the GPU; on the CPU there is [`cpu::KvCache`](crate::cpu::KvCache).
    ///
    /// # Errors
    /// [`Error::NeedsGpu`] on the CPU; those of [`CacheConfig::check`]; [`Error::CacheTooLarge`] where it does not fit bindings of
    /// the device; [`Error::OutOfMemory`], [`Error::DeviceLost`] and [`Error::Gpu`] for what the driver reports.
    #[cfg(not(target_family = "wasm"))]
    pub fn create_cache(&self, config: &CacheConfig) -> Result<KvCache> {
        pollster::block_on(self.create_cache_async(config))
    }

    /// As [`create_cache`](Self::create_cache), for browsers and async hosts.
    ///
    /// # Errors
    /// As [`create_cache`](Self::create_cache).
    pub async fn create_cache_async(&self, config: &CacheConfig) -> Result<KvCache> {
        let (device, pipelines) = self.gpu("create_cache")?;
        KvCache::new(self, device, pipelines, config).await
    }
}

/// Keys and values of a number of sequences in GPU buffers, with their lengths, which kernels count up and read there: a decoding
/// step waits for nothing.
///
/// All that changes or reads it is recorded into a [`Step`], and holds for what is recorded after it there. [`lengths`](Self::lengths),
/// [`pages`](Self::pages) and [`free_pages`](Self::free_pages) count all that has been recorded so far, also in a step that
/// is open. Where that step is dropped or its submission fails, they are again as they were before it. Only one open step can
/// touch a cache: every call that would use another one is [`Error::CacheBusy`], and names the first.
///
/// ```
/// use sink_attention::cache::{AppendBuffers, CacheConfig, CacheKind};
/// use sink_attention::{Attention, DType, DeviceChoice, Error};
///
/// # fn main() -> Result<(), Error> {
/// # let attention = match Attention::open(&DeviceChoice::Gpu) { Err(Error::NoAdapter) => return Ok(()), opened => opened? };
/// let Some(device) = attention.device() else { return Ok(()) };
/// let kind = CacheKind::Paged { page_size: 16, pages: 8, sequence_pages: 4 };
/// let mut cache = attention.create_cache(&CacheConfig::new(kind, 2, 1, 4))?;
/// let [k, v] = [device.zeros("k", DType::F32, &[20, 1, 4])?, device.zeros("v", DType::F32, &[20, 1, 4])?];
/// let mut step = attention.step()?;
/// let append = cache.prepare_append(&[20, 0], &AppendBuffers::new(&k, &v))?; // 20 tokens take two pages
/// append.encode(&mut cache, &mut step)?;
/// cache.fork(&mut step, 0, 1)?; // the second sequence shares them
/// step.submit()?;
/// assert_eq!(cache.lengths(), [20, 20]);
/// assert_eq!(cache.pages(0), cache.pages(1));
/// assert_eq!(cache.free_pages(), 6);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct KvCache {
    /// The operator that made the cache.
    pub(super) attention: Attention,
    pub(super) device: Device,
    pub(super) pipelines: Arc<Pipelines>,
    pub(super) config: CacheConfig,
    /// The cache's state after everything that has been recorded so far.
    pub(super) book: Book,
    /// The state before the last step that wrote.
    before: Option<Before>,
    /// The last step that touched the cache. It is behind a lock, because steps may read a cache that other threads look at.
    holder: Mutex<Option<Arc<Ticket>>>,
    pub(super) keys: wgpu::Buffer,
    pub(super) values: wgpu::Buffer,
    /// Lengths, twice, then block tables. Appending reads one list of lengths and writes the other.
    pub(super) state: wgpu::Buffer,
    /// A buffer through which blocks are copied.
    between: wgpu::Buffer,
}

/// A buffer of the caller's, if there is one, with the name of its operand.
pub(super) type GivenBuffer<'a> = (&'static str, Option<&'a wgpu::Buffer>);

/// The host's knowledge of the buffers.
#[derive(Debug, Clone)]
pub(super) struct Book {
    pub(super) block_table: BlockTable,
    /// The list of lengths that holds now.
    pub(super) current: usize,
}

#[derive(Debug)]
struct Before {
    step: Arc<Ticket>,
    book: Book,
}

/// Words of a sequence's block table.
pub(super) fn table_row(config: &CacheConfig) -> usize {
    match config.kind {
        CacheKind::Paged { sequence_pages, .. } => sequence_pages,
        _ => 0,
    }
}

impl KvCache {
    pub(crate) async fn new(
        attention: &Attention,
        device: &Device,
        pipelines: &Arc<Pipelines>,
        config: &CacheConfig,
    ) -> Result<Self> {
        config.check()?;
        let capabilities = device.capabilities();
        let state_bytes = 4 * (2 * config.sequences + config.sequences * table_row(config)) as u64;
        let [key_bytes, value_bytes] = config.bytes();
        let sizes = [("keys", key_bytes), ("values", value_bytes), ("block tables", state_bytes)];
        for (operand, bytes) in sizes {
            let limit = capabilities.binding_bytes.min(capabilities.buffer_bytes);
            if bytes > limit {
                return Err(Error::CacheTooLarge { operand, bytes, limit });
            }
        }
        let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST;
        let create = || -> Result<_> {
            let of = |(operand, bytes): (&'static str, u64)| allocate::<u8>(device, operand, bytes as usize, usage);
            let [key_block, value_block] = block_bytes(config);
            let between = ("copied blocks", key_block.max(value_block).min(COPIED_BYTES));
            Ok([of(sizes[0])?, of(sizes[1])?, of(sizes[2])?, of(between)?])
        };
        let [keys, values, state, between] = device.scoped_async("allocating a cache", create).await??;
        Ok(KvCache {
            attention: attention.clone(),
            device: device.clone(),
            pipelines: pipelines.clone(),
            config: *config,
            book: Book { block_table: BlockTable::new(config), current: 0 },
            before: None,
            holder: Mutex::new(None),
            keys,
            values,
            state,
            between,
        })
    }

    /// Its kind and sizes.
    pub fn config(&self) -> &CacheConfig {
        &self.config
    }

    /// The state that holds now. A step that never ran has no part in it.
    pub(super) fn book(&self) -> &Book {
        match &self.before {
            Some(before) if before.step.is_dropped() => &before.book,
            _ => &self.book,
        }
    }

    pub(super) fn block_table(&self) -> &BlockTable {
        &self.book().block_table
    }

    /// Lets a step read, unless another step that has touched the cache is open.
    pub(super) fn read_in(&self, step: &Arc<Ticket>) -> Result<()> {
        if step.device != *self.device.wgpu() {
            return Err(Error::OtherDevice { step: step.to_string() });
        }
        // No code that holds the lock can panic, and one word is never half written.
        let mut holder = self.holder.lock().unwrap_or_else(PoisonError::into_inner);
        match &*holder {
            Some(other) if Arc::ptr_eq(other, step) => return Ok(()),
            Some(other) => other.check_ended()?,
            None => {}
        }
        *holder = Some(step.clone());
        Ok(())
    }

    /// Lets a step write, under the same condition. Returns the book that the step changes, and keeps the state from before the step.
    pub(super) fn write_in(&mut self, step: &Arc<Ticket>) -> Result<&mut Book> {
        self.read_in(step)?;
        match self.before.take() {
            Some(before) if Arc::ptr_eq(&before.step, step) => self.before = Some(before),
            last => {
                if let Some(Before { step, book }) = last
                    && step.is_dropped()
                {
                    self.book = book;
                }
                self.before = Some(Before { step: step.clone(), book: self.book.clone() });
            }
        }
        Ok(&mut self.book)
    }

    /// Whether the buffers hold what the book says: no step that wrote is open.
    #[cfg(feature = "safetensors")]
    pub(super) fn check_written(&self) -> Result<()> {
        self.before.as_ref().map_or(Ok(()), |before| before.step.check_ended())
    }

    /// Whether everything may be replaced: no step is open that was recorded for what is there.
    #[cfg(feature = "safetensors")]
    pub(super) fn check_free(&self) -> Result<()> {
        let holder = self.holder.lock().unwrap_or_else(PoisonError::into_inner);
        holder.as_ref().map_or(Ok(()), |step| step.check_closed())
    }

    /// Everything has been replaced.
    #[cfg(feature = "safetensors")]
    pub(super) fn replace_book(&mut self, block_table: BlockTable) {
        self.book = Book { block_table, current: 0 };
        self.before = None;
        *self.holder.get_mut().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Tokens of each sequence, as far as recorded: all that were appended, also those that a ring has given up.
    pub fn lengths(&self) -> &[usize] {
        self.block_table().lengths()
    }

    /// Pages of a sequence in the order of its tokens; none where the cache is not paged.
    pub fn pages(&self, sequence: usize) -> &[u32] {
        self.block_table().table(sequence)
    }

    /// Pages that no sequence holds.
    pub fn free_pages(&self) -> usize {
        self.block_table().free_pages()
    }

    /// The keys, `[blocks, G, rows, D]`, rows padded to 16 bytes: a block is a sequence, or a page. Passes that read them belong
    /// into [`Step::encoder`]; elsewhere they see what has been submitted.
    pub fn keys(&self) -> &wgpu::Buffer {
        &self.keys
    }

    /// The values, `[blocks, G, rows, E]`, as the keys.
    pub fn values(&self) -> &wgpu::Buffer {
        &self.values
    }

    /// Keys and values of a contiguous cache as operands of a forward pass: with strides, for a problem of the cache's sequences
    /// and capacity, and lengths by [`Lengths::Used`](crate::Lengths::Used); `None` of other
    /// kinds, and where they are quantised.
    pub fn views(&self) -> Option<[TensorView<'_>; 2]> {
        self.rows_of(0, [&self.keys, &self.values])
    }

    /// The rows of a contiguous cache from a sequence on, in buffers of its layout.
    pub(super) fn rows_of<'a>(&self, sequence: usize, buffers: [&'a wgpu::Buffer; 2]) -> Option<[TensorView<'a>; 2]> {
        let (CacheKind::Contiguous { capacity }, None) = (self.config.kind, self.config.quantisation) else {
            return None;
        };
        let vectors = self.config.row_vectors();
        Some([0, 1].map(|n| {
            let row = u64::from(vectors[n]) * 16 / self.config.dtype.bytes() as u64;
            let (head, heads) = (row * capacity as u64, self.config.kv_heads as u64);
            let strides = [head * heads, head, row];
            TensorView::new(buffers[n]).offset(sequence as u64 * strides[0]).strides(strides)
        }))
    }

    /// Keys and values of a batch without a copy, in buffers of the cache's layout, if the ordinary passes can read them there: in a batch
    /// of one sequence.
    pub(super) fn in_place<'a>(
        &self,
        batch: &PrefillBatch,
        buffers: [&'a wgpu::Buffer; 2],
    ) -> Option<[TensorView<'a>; 2]> {
        match batch.entries[..] {
            [entry] => self.rows_of(entry.sequence, buffers),
            _ => None,
        }
    }

    /// Checks that a result is neither in the cache nor in a buffer of another operand.
    pub(super) fn check_apart<'a>(
        &self,
        (output, buffer): GivenBuffer<'_>,
        others: impl IntoIterator<Item = GivenBuffer<'a>>,
    ) -> Result<()> {
        let is_same = |other: &GivenBuffer<'_>| buffer.is_some() && other.1 == buffer;
        let cache = [("the cache's keys", Some(&self.keys)), ("the cache's values", Some(&self.values))];
        match others.into_iter().find(is_same).or(cache.into_iter().find(is_same)) {
            Some((other, _)) => Err(Error::Aliasing { output, other }),
            None => Ok(()),
        }
    }

    /// Checks that the sequences of a batch have the lengths that it was made for.
    pub(super) fn check_lengths<'a>(&self, entries: impl IntoIterator<Item = &'a Chunk>) -> Result<()> {
        for &Chunk { sequence, length, .. } in entries {
            let actual = self.block_table().lengths()[sequence];
            if actual != length {
                return Err(Error::CacheChanged {
                    sequence,
                    reason: format!("it had {length} tokens, it has {actual}"),
                });
            }
        }
        Ok(())
    }

    /// Makes room for so many tokens more of each sequence: takes pages, and copies those that would be written and are shared.
    /// Appending does so by itself, but where it is recorded into a compute pass. Nothing to do where the cache is not paged.
    ///
    /// # Errors
    /// [`Error::OperandLength`] unless there is a number for each sequence; [`Error::CacheFull`], [`Error::PagesExhausted`]:
    /// nothing has changed then;
    /// [`Error::CacheBusy`], [`Error::OtherDevice`].
    pub fn reserve(&mut self, step: &mut Step, tokens: &[usize]) -> Result<()> {
        check_counts(&self.config, tokens.len())?;
        let changes = self.write_in(step.ticket())?.block_table.reserve(tokens)?;
        self.record(step.encoder(), &changes);
        Ok(())
    }

    /// Forgets the tokens of a sequence from `length` on; with 0 it is empty, and its pages are free.
    ///
    /// # Errors
    /// [`Error::SequenceOutOfRange`]; [`Error::CacheLength`] where it is shorter; [`Error::CacheEvicted`] where a rolling cache
    /// has given up what would have to come back; [`Error::CacheBusy`], [`Error::OtherDevice`].
    pub fn truncate(&mut self, step: &mut Step, sequence: usize, length: usize) -> Result<()> {
        self.write_in(step.ticket())?.block_table.truncate(sequence, length)?;
        self.record_length(step.encoder(), sequence);
        Ok(())
    }

    /// Of the tokens from `first` on, keeps some, and forgets the others: the path of a tree of new tokens that was accepted. `numbers`
    /// count from `first`, and ascend. The kept tokens move together, and are the last ones of the sequence then. Shared pages are copied
    /// before they change.
    ///
    /// ```
    /// use sink_attention::cache::{AppendBuffers, CacheConfig, CacheKind};
    /// use sink_attention::{Attention, DeviceChoice, Error};
    ///
    /// # fn main() -> Result<(), Error> {
    /// # let attention = match Attention::open(&DeviceChoice::Gpu) { Err(Error::NoAdapter) => return Ok(()), opened => opened? };
    /// let Some(device) = attention.device() else { return Ok(()) };
    /// let mut cache = attention.create_cache(&CacheConfig::new(CacheKind::Contiguous { capacity: 8 }, 1, 1, 1))?;
    /// let rows = device.upload("k and v", &[0.5, 1.5, 2.5, 3.5, 4.5])?;
    /// let append = cache.prepare_append(&[5], &AppendBuffers::new(&rows, &rows))?;
    /// let mut step = attention.step()?;
    /// append.encode(&mut cache, &mut step)?;
    /// cache.keep(&mut step, 0, 1, &[1, 3])?; // of the tokens 1 to 4 the second and the fourth: 0.5, 2.5, 4.5
    /// step.submit()?;
    /// assert_eq!(cache.lengths(), [3]);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::SequenceOutOfRange`]; [`Error::CacheLength`] where the sequence is shorter than `first`; [`Error::InvalidOption`] for
    /// numbers that do not ascend or that it does not have, and where a key that was rotated by its place would move;
    /// [`Error::CacheEvicted`] where a rolling cache has given up what would move or come back; [`Error::PagesExhausted`]: nothing has
    /// changed then; [`Error::CacheBusy`], [`Error::OtherDevice`].
    pub fn keep(&mut self, step: &mut Step, sequence: usize, first: usize, numbers: &[usize]) -> Result<()> {
        self.config.check_keep(numbers)?;
        let (changes, moves) = self.write_in(step.ticket())?.block_table.keep(sequence, first, numbers)?;
        self.record(step.encoder(), &changes);
        self.move_rows(step.encoder(), &moves);
        self.record_length(step.encoder(), sequence);
        Ok(())
    }

    /// Makes sequence `to` a copy of `from`. In a paged cache they share pages until one of them writes to a shared one.
    ///
    /// # Errors
    /// [`Error::SequenceOutOfRange`], [`Error::CacheBusy`], [`Error::OtherDevice`].
    pub fn fork(&mut self, step: &mut Step, from: usize, to: usize) -> Result<()> {
        self.write_in(step.ticket())?.block_table.fork(from, to)?;
        let encoder = step.encoder();
        if from == to {
            return Ok(());
        }
        match self.config.kind {
            CacheKind::Paged { .. } => self.record_table(encoder, to),
            _ => self.copy_blocks(encoder, &[[from as u32, to as u32]]),
        }
        self.record_length(encoder, to);
        Ok(())
    }

    /// Gives a sequence of a paged cache pages of the caller's choice, which others may hold, too, and which hold `length`
    /// tokens of it.
    ///
    /// # Errors
    /// [`Error::SequenceOutOfRange`], [`Error::PageOutOfRange`]; [`Error::CacheLength`] where the pages do not hold so many, or
    /// are more than a sequence has; [`Error::InvalidOption`] where the cache is not paged; [`Error::CacheBusy`],
    /// [`Error::OtherDevice`].
    pub fn assign(&mut self, step: &mut Step, sequence: usize, pages: &[u32], length: usize) -> Result<()> {
        self.write_in(step.ticket())?.block_table.assign(sequence, pages, length)?;
        let encoder = step.encoder();
        self.record_table(encoder, sequence);
        self.record_length(encoder, sequence);
        Ok(())
    }

    pub(super) fn record(&self, encoder: &mut wgpu::CommandEncoder, changes: &Changes) {
        self.copy_blocks(encoder, &changes.copies);
        let follows = |a: &(usize, usize, u32), b: &(usize, usize, u32)| a.0 == b.0 && a.1 + 1 == b.1;
        for run in changes.tables.chunk_by(follows) {
            let pages: Vec<u32> = run.iter().map(|(_, _, page)| *page).collect();
            if let Some(&(sequence, number, _)) = run.first() {
                self.write_state(encoder, self.table_at(sequence) + number, &pages);
            }
        }
    }

    pub(super) fn table_at(&self, sequence: usize) -> usize {
        2 * self.config.sequences + sequence * table_row(&self.config)
    }

    fn record_length(&self, encoder: &mut wgpu::CommandEncoder, sequence: usize) {
        let length = self.block_table().lengths()[sequence] as u32;
        self.write_state(encoder, self.book().current * self.config.sequences + sequence, &[length]);
    }

    fn record_table(&self, encoder: &mut wgpu::CommandEncoder, sequence: usize) {
        self.write_state(encoder, self.table_at(sequence), self.block_table().table(sequence));
    }

    /// Writes words of the state. The queue alone would write before the recorded commands run.
    fn write_state(&self, encoder: &mut wgpu::CommandEncoder, word: usize, words: &[u32]) {
        if words.is_empty() {
            return;
        }
        let staged = self.device.wgpu().create_buffer(&wgpu::BufferDescriptor {
            label: Some("sink-attention cache state"),
            size: 4 * words.len() as u64,
            usage: wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        });
        // The buffer is fresh, so the write may happen at any time before the copy.
        self.device.queue().write_buffer(&staged, 0, bytemuck::cast_slice(words));
        encoder.copy_buffer_to_buffer(&staged, 0, &self.state, 4 * word as u64, staged.size());
    }

    /// Moves rows of all heads, one after the other, through the buffer through which blocks are copied.
    fn move_rows(&self, encoder: &mut wgpu::CommandEncoder, moves: &[Move]) {
        let (heads, rows) = (self.config.kv_heads as u64, self.config.kind.rows() as u64);
        for (buffer, vectors) in [&self.keys, &self.values].into_iter().zip(self.config.row_vectors()) {
            let bytes = 16 * u64::from(vectors);
            for (places, head) in moves.iter().flat_map(|places| (0..heads).map(move |head| (places, head))) {
                let [from, to] = places.map(|[block, row]| ((block as u64 * heads + head) * rows + row as u64) * bytes);
                encoder.copy_buffer_to_buffer(buffer, from, &self.between, 0, bytes);
                encoder.copy_buffer_to_buffer(&self.between, 0, buffer, to, bytes);
            }
        }
    }

    /// Copies blocks in pieces through a buffer of their own, because wgpu does not copy within one buffer.
    fn copy_blocks(&self, encoder: &mut wgpu::CommandEncoder, blocks: &[[u32; 2]]) {
        for &[from, to] in blocks {
            for (buffer, bytes) in [&self.keys, &self.values].into_iter().zip(block_bytes(&self.config)) {
                let [from, to] = [from, to].map(|block| u64::from(block) * bytes);
                let piece = self.between.size();
                for start in (0..bytes).step_by(piece as usize) {
                    let len = piece.min(bytes - start);
                    encoder.copy_buffer_to_buffer(buffer, from + start, &self.between, 0, len);
                    encoder.copy_buffer_to_buffer(&self.between, 0, buffer, to + start, len);
                }
            }
        }
    }
}

/// Bytes of a block of keys and of one of values.
fn block_bytes(config: &CacheConfig) -> [u64; 2] {
    let rows = (config.kv_heads * config.kind.rows()) as u64;
    config.row_vectors().map(|vectors| rows * 16 * u64::from(vectors))
}

/// Blocks are copied in pieces of this many bytes.
const COPIED_BYTES: u64 = 4 << 20;
