//! The one error type of the crate.

use std::path::PathBuf;

use crate::problem::element::BufferType;
use crate::problem::element::DType;
use crate::problem::options::MaskPacking;

/// Result of every fallible call in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error. Most are found before anything is dispatched.
///
/// Every message carries the numbers that a caller needs to mend the call.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A dimension of the problem is zero.
    #[error("{dimension} is 0; every dimension must be at least 1")]
    ZeroDimension {
        /// Name of the dimension, as in [`Shape`](crate::Shape).
        dimension: &'static str,
    },
    /// A dimension is larger than this version handles.
    #[error("{dimension} is {value}, the most is {most}")]
    DimensionTooLarge {
        /// Name of the dimension, as in [`Shape`](crate::Shape).
        dimension: &'static str,
        /// The value that was given.
        value: u64,
        /// The largest value allowed.
        most: u64,
    },
    /// Query heads must be a whole multiple of key/value heads.
    #[error("heads ({heads}) must be a multiple of kv_heads ({kv_heads})")]
    HeadsNotMultiple {
        /// Query heads H.
        heads: usize,
        /// Key/value heads G.
        kv_heads: usize,
    },
    /// An option has a value that means nothing.
    #[error("option {option}: {reason}")]
    InvalidOption {
        /// Name of the option.
        option: &'static str,
        /// The reason, with the value.
        reason: String,
    },
    /// The element type of the host's slices is not that of the options.
    #[error("the operands are {operands}, the options say {options}: see Options::dtype")]
    WrongElementType {
        /// Element type of the slices.
        operands: DType,
        /// Element type that the options name.
        options: DType,
    },
    /// The bias is not of the element type that the options name.
    #[error("the bias is {bias}, the options say {options}: see Options::bias_dtype")]
    BiasElementType {
        /// Element type of the bias.
        bias: DType,
        /// Element type that the options name.
        options: DType,
    },
    /// The mask does not lie in memory as the options say.
    #[error("the mask is of {mask:?}, the options say {options:?}: see Options::mask_packing")]
    MaskPacking {
        /// How it lies in memory.
        mask: MaskPacking,
        /// The packing that the options name.
        options: MaskPacking,
    },
    /// The lengths of a batch's sequences do not fit it.
    #[error("{lengths}: {reason}")]
    InvalidLengths {
        /// Which lengths.
        lengths: &'static str,
        /// The reason, with the numbers.
        reason: String,
    },
    /// Not a range of the problem's keys.
    #[error("keys {start}..{end} are no range of the problem's {seq_k} keys")]
    InvalidShard {
        /// First key.
        start: usize,
        /// The key behind the last one.
        end: usize,
        /// Keys there are.
        seq_k: usize,
    },
    /// A slice does not hold the number of elements its shape calls for.
    #[error("{operand} has {actual} element{}, its shape {shape:?} needs {expected}", plural(.actual))]
    OperandLength {
        /// Name of the operand.
        operand: &'static str,
        /// Elements the shape calls for.
        expected: usize,
        /// Elements given.
        actual: usize,
        /// The operand's shape in the problem's layout.
        shape: Vec<usize>,
    },
    /// A tensor of a file is not of the shape that is called for.
    #[error("tensor {name} has shape {actual:?}, {expected:?} is needed")]
    TensorShape {
        /// Its name.
        name: String,
        /// Its shape.
        actual: Vec<usize>,
        /// The shape called for.
        expected: Vec<usize>,
    },
    /// A tensor of a file has an element type that no operand has.
    #[error("tensor {name} has element type {actual}; known: BF16, F16, F32")]
    TensorType {
        /// Its name.
        name: String,
        /// Its element type, as the file names it.
        actual: String,
    },
    /// The options call for an operand that was not given.
    #[error("the options ask for {operand}, but none was given")]
    MissingOperand {
        /// Name of the operand.
        operand: &'static str,
    },
    /// An operand was given that the options do not use.
    #[error("{operand} was given, but the options do not use it: {hint}")]
    UnexpectedOperand {
        /// Name of the operand.
        operand: &'static str,
        /// Which option would use it.
        hint: &'static str,
    },
    /// An element's index does not fit the integers that count: the 32 bits of shaders for what one dispatch binds at least, the
    /// 64 bits of bytes for the whole.
    #[error("{operand} reaches element {last_element}, the most that can be counted to is {most}")]
    IndexOverflow {
        /// Name of the operand.
        operand: &'static str,
        /// Highest element index the operand's shape and strides reach.
        last_element: u128,
        /// Highest index that fits.
        most: u64,
    },
    /// The smallest piece of the work, one tile of rows of one key head, needs more of an operand than the device binds.
    #[error(
        "the smallest piece of the work needs a binding of {operand} of {bytes} bytes, the device offers {limit} \
         (max_storage_buffer_binding_size); request the adapter's limits, put heads before the sequence (bhsd), or let a \
         window bound what a query sees"
    )]
    BindingTooLarge {
        /// Name of the operand.
        operand: &'static str,
        /// Bytes that the smallest piece needs.
        bytes: u64,
        /// Bytes the device binds at most.
        limit: u64,
    },
    /// An operand needs a larger buffer than the device creates.
    #[error("{operand} needs a buffer of {bytes} bytes, the device creates at most {limit} (max_buffer_size)")]
    BufferTooLarge {
        /// Name of the operand.
        operand: &'static str,
        /// Bytes needed.
        bytes: u64,
        /// Bytes the device allocates at most.
        limit: u64,
    },
    /// A buffer of the caller's is too small for the view of it.
    #[error("buffer of {operand} has {actual} bytes, offset, shape and strides reach byte {needed}")]
    BufferTooSmall {
        /// Name of the operand.
        operand: &'static str,
        /// Bytes the view reaches.
        needed: u64,
        /// Bytes the buffer has.
        actual: u64,
    },
    /// A [`DeviceBuffer`](crate::device::DeviceBuffer) is of another element type than the operand, or the host's slice.
    #[error("{operand} lies in a buffer of {actual}, {needed} is needed")]
    BufferType {
        /// Name of the operand.
        operand: &'static str,
        /// Element type needed.
        needed: BufferType,
        /// Element type of the buffer.
        actual: BufferType,
    },
    /// Elements of a [`DeviceBuffer`](crate::device::DeviceBuffer) that cannot be read or written.
    #[error("elements {start} to {end} of {operand}, a buffer of {len} elements: {reason}")]
    BufferRange {
        /// Name of the operand.
        operand: &'static str,
        /// The first element.
        start: usize,
        /// The element behind the last one.
        end: usize,
        /// Elements of the buffer.
        len: usize,
        /// The reason.
        reason: &'static str,
    },
    /// A buffer of the caller's was created without a usage that is needed.
    #[cfg(feature = "gpu")]
    #[error("buffer of {operand} lacks usage {needed:?}, it has {actual:?}")]
    BufferUsage {
        /// Name of the operand.
        operand: &'static str,
        /// Usages needed.
        needed: wgpu::BufferUsages,
        /// Usages the buffer has.
        actual: wgpu::BufferUsages,
    },
    /// A result, or a cache, would be written where another operand lies.
    #[error("{output} shares its buffer with {other}; what is written needs a buffer of its own")]
    Aliasing {
        /// The result, or an operand that lies in the cache.
        output: &'static str,
        /// The other operand, or the cache's keys or values.
        other: &'static str,
    },
    /// Strides let two elements of a result fall on one place.
    #[error("strides {strides:?} of {operand} let elements overlap; a result needs distinct places")]
    OverlappingStrides {
        /// Name of the operand.
        operand: &'static str,
        /// Its strides for batch, head and sequence, in elements.
        strides: [u64; 3],
    },
    /// A sequence of a cache has no room for more tokens.
    #[error("sequence {sequence} of the cache has {length} tokens and room for {capacity}; {added} more do not fit")]
    CacheFull {
        /// The sequence.
        sequence: usize,
        /// Tokens it has.
        length: usize,
        /// Tokens that were to be added.
        added: usize,
        /// Tokens it has room for.
        capacity: usize,
    },
    /// A paged cache has no more free pages.
    #[error("the cache needs {needed} pages more, {free} of its {pages} are free")]
    PagesExhausted {
        /// Pages needed.
        needed: usize,
        /// Pages that no sequence holds.
        free: usize,
        /// Pages of the cache.
        pages: usize,
    },
    /// A paged cache needs pages that can only be taken outside of a compute pass.
    #[error(
        "sequence {sequence} of the cache has {length} tokens and pages of its own for {reserved} more; {added} in a compute \
         pass need KvCache::reserve before it"
    )]
    PagesNotReserved {
        /// The sequence.
        sequence: usize,
        /// Tokens it has.
        length: usize,
        /// Tokens that were to be added.
        added: usize,
        /// Tokens that its pages have room for.
        reserved: usize,
    },
    /// A block table names a page that the cache does not have.
    #[error("page {page} is out of range, the cache has {pages} pages")]
    PageOutOfRange {
        /// The page.
        page: u32,
        /// Pages of the cache.
        pages: usize,
    },
    /// The cache has no sequence of this number.
    #[error("sequence {sequence} is out of range, the cache has {sequences} sequences")]
    SequenceOutOfRange {
        /// The sequence.
        sequence: usize,
        /// Sequences of the cache.
        sequences: usize,
    },
    /// A length does not fit a sequence of a cache.
    #[error("sequence {sequence} of the cache cannot have the length {length}, the most is {most}")]
    CacheLength {
        /// The sequence.
        sequence: usize,
        /// The length that was asked for.
        length: usize,
        /// The longest it can have.
        most: usize,
    },
    /// A rolling cache has given up tokens that would have to come back, for a shorter length or for the first of several
    /// queries, which counts as a length that ends with it.
    #[error("sequence {sequence} of the rolling cache cannot go back to {length} tokens, the least is {least}, or 0")]
    CacheEvicted {
        /// The sequence.
        sequence: usize,
        /// The length that was asked for.
        length: usize,
        /// The shortest length for which the window is whole.
        least: usize,
    },
    /// Operands and cache differ in their element type.
    #[error("the operands are {operands}, the cache holds {cache}")]
    CacheElementType {
        /// Element type of the operands.
        operands: DType,
        /// Element type of the cache.
        cache: DType,
    },
    /// Keys, values or block tables of a cache do not fit one binding.
    #[error(
        "the cache's {operand} take {bytes} bytes, the device binds {limit} at most; use fewer sequences, tokens or pages"
    )]
    CacheTooLarge {
        /// The operand that does not fit.
        operand: &'static str,
        /// Bytes needed.
        bytes: u64,
        /// Bytes the device binds, and a buffer holds, at most.
        limit: u64,
    },
    /// The table of the rotary embedding ends before a position that is needed.
    #[error(
        "sequence {sequence} needs the rotary embedding of position {position}, the table has {positions} positions"
    )]
    RotaryPosition {
        /// The sequence.
        sequence: usize,
        /// The position.
        position: usize,
        /// Rows of the table.
        positions: usize,
    },
    /// A sequence is not as it was when an operation was prepared.
    #[error("sequence {sequence} of the cache has changed since the operation was prepared: {reason}")]
    CacheChanged {
        /// The sequence.
        sequence: usize,
        /// Its state then and now.
        reason: String,
    },
    /// An operation was prepared for another cache.
    #[error("the operation was prepared for another cache")]
    OtherCache,
    /// Another [`Step`](crate::cache::Step) has touched the cache, and has not come to its end.
    #[error("the cache is in use by {step}, {reason}")]
    CacheBusy {
        /// The other step, by its number and its label.
        step: String,
        /// How it stands, and what to do.
        reason: &'static str,
    },
    /// A [`Step`](crate::cache::Step) is of another device than a cache.
    #[error("{step} and the cache are of different devices")]
    OtherDevice {
        /// The step, by its number and its label.
        step: String,
    },
    /// Queries of a cache with a rotary embedding have not been rotated with their tokens, or not all heads of them.
    #[error(
        "decoding takes the rotated queries of the last {queries} tokens of sequence {sequence} with {heads} heads; appends \
         have rotated those of {rotated_tokens} tokens with {rotated_heads} heads: give AppendBuffers::q, or set \
         Decode::q_rotated where the caller has rotated them"
    )]
    QueriesNotRotated {
        /// The sequence.
        sequence: usize,
        /// Queries of it that are decoded.
        queries: usize,
        /// Their heads.
        heads: usize,
        /// Last tokens of the sequence whose queries were rotated, with one number of heads.
        rotated_tokens: usize,
        /// That number.
        rotated_heads: usize,
    },
    /// No kernel fits the device's limits.
    #[error("no kernel for {problem} fits the device: {reason}")]
    NoKernel {
        /// The problem in short.
        problem: String,
        /// Which limit stands in the way, with its numbers.
        reason: String,
    },
    /// The smallest piece of the work, one tile of rows of a key head with its query heads, has more workgroups than a folded
    /// dispatch can number.
    #[error("the smallest piece of the work needs {workgroups} workgroups, a dispatch numbers at most {most}")]
    TooManyWorkgroups {
        /// Workgroups needed.
        workgroups: u128,
        /// Workgroups a dispatch can number on this device.
        most: u64,
    },
    /// No GPU adapter was found at all.
    #[error("no GPU adapter found; use the CPU path, or install a (software) Vulkan driver")]
    NoAdapter,
    /// The adapter that was asked for is not there.
    #[error("no adapter matches {wanted:?}; available: {}", list(.available))]
    AdapterNotFound {
        /// Name, part of a name or index that was asked for.
        wanted: String,
        /// The adapters there are.
        available: Vec<String>,
    },
    /// The driver did not give a device.
    #[error("adapter {adapter:?} gives no device: {reason}")]
    DeviceRequest {
        /// Name of the adapter.
        adapter: String,
        /// The message of wgpu.
        reason: String,
    },
    /// This call needs a GPU, and the operator runs on the CPU.
    #[error("{call} needs a GPU, this operator runs on the CPU")]
    NeedsGpu {
        /// The call.
        call: &'static str,
    },
    /// A file of measured tiles cannot be read.
    #[error("tuning file {}: {reason}", .path.display())]
    TuningFile {
        /// The file.
        path: PathBuf,
        /// The reason, with the line where there is one.
        reason: String,
    },
    /// The file of a saved cache cannot be read or written, or is damaged.
    #[error("{what} {}: {reason}", .path.display())]
    SavedFile {
        /// The kind of the file: a cache.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The reason.
        reason: String,
    },
    /// A file is no saved cache, or not exactly one.
    #[error("not a saved {what}, or damaged: {reason}")]
    SavedDamaged {
        /// The kind of file that was expected: a cache.
        what: &'static str,
        /// The reason.
        reason: String,
    },
    /// A saved cache is not of the shape, or has not the options, that it is to go on with.
    #[error("the saved {what} has {property} {saved}, wanted is {wanted}")]
    SavedMismatch {
        /// The kind of the file: a cache.
        what: &'static str,
        /// The property that differs.
        property: &'static str,
        /// Its value in the file.
        saved: String,
        /// Its value in the cache that was to be restored.
        wanted: String,
    },
    /// Measured tiles are of another device.
    #[error(
        "the tuning was measured on {measured:?}, this device is {actual:?}: measure it with `sink-attention tune`"
    )]
    TuningDevice {
        /// Device that was measured.
        measured: String,
        /// Device that computes.
        actual: String,
    },
    /// The persistent pipeline cache cannot be used.
    #[error("pipeline cache {}: {reason}", .path.display())]
    PipelineCache {
        /// Its file.
        path: PathBuf,
        /// The reason.
        reason: String,
    },
    /// The GPU ran out of memory; the message names the buffer and its bytes where this crate created it. The device may still serve
    /// smaller problems; where it was lost with its memory, the next call says so.
    #[error("the GPU ran out of memory: {0}")]
    OutOfMemory(String),
    /// The device is gone: its driver was reset or removed, or the host application destroyed it. Its buffers and
    /// [`Prepared`](crate::Prepared) passes are of no use any more; open a new [`Device`](crate::Device), or another
    /// [`Attention`](crate::Attention), and upload again.
    #[error("the GPU device was lost while {during}; open a new one")]
    DeviceLost {
        /// The work that was under way.
        during: &'static str,
    },
    /// The GPU, its driver or wgpu reported an error.
    #[error("the GPU reported an error while {during}: {message}")]
    Gpu {
        /// The work that was under way.
        during: &'static str,
        /// The message of wgpu.
        message: String,
    },
}

fn plural(n: &usize) -> &'static str {
    if *n == 1 { "" } else { "s" }
}

fn list(names: &[String]) -> String {
    if names.is_empty() { "none".into() } else { names.join(", ") }
}
