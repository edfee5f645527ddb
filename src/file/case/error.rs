//! Errors in conformance files.

use std::path::PathBuf;

use safetensors::{Dtype, SafeTensorError};

use crate::file::Malformed;
use crate::problem::Layout;

/// Metadata keys of the format, for messages.
const KEYS: &str = "layout, causal, align, window_left, window_right, sink_tokens, scale, softcap, q_offset";
/// Tensors of the format, except those named `expected.*`.
pub(super) const TENSORS: [&str; 11] =
    ["q", "k", "v", "sinks", "bias", "mask", "alibi_slopes", "cu_seqlens_q", "cu_seqlens_k", "dout", "dlse"];

/// An error with a file.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file could not be read.
    #[error("cannot read {}: {source}", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// The file was read, but its content is wrong.
    #[error("{}: {source}", .path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// The mistake in its content.
        source: FormatError,
    },
    /// The file could not be written; nothing was left behind.
    #[error("cannot write {}: {source}", .path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// Results would replace the file they are computed from.
    #[error("cannot write {}: it is the input file", .path.display())]
    OutputIsInput {
        /// The file.
        path: PathBuf,
    },
    /// Results would replace a folder or a device.
    #[error("cannot write {}: it exists and is not a regular file", .path.display())]
    NotAFile {
        /// The folder or device.
        path: PathBuf,
    },
}

/// An error in the content of a conformance file.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    /// The file is too short for the length of the header, which is the first thing in it.
    #[error("not a safetensors file: {actual} bytes, the length of the header alone takes 8")]
    TooShort {
        /// Bytes in the file.
        actual: u64,
    },
    /// The header does not fit into the file.
    #[error("not a safetensors file, or truncated: the header claims {header} bytes, {actual} follow its length")]
    HeaderLength {
        /// Bytes that the header claims.
        header: u64,
        /// Bytes that there are.
        actual: u64,
    },
    /// The header is longer than any header that safetensors reads.
    #[error("not a safetensors file: the header claims {header} bytes, the most is 100000000")]
    HeaderTooLong {
        /// Bytes that the header claims.
        header: u64,
    },
    /// The header is not the JSON that it should be, or names something twice.
    #[error("malformed header: {0}")]
    Header(#[from] serde_json::Error),
    /// The file is shorter or longer than the header says.
    #[error("truncated or overlong: the tensors take {expected} bytes, {actual} follow the header")]
    DataLength {
        /// Bytes that the tensors take.
        expected: u64,
        /// Bytes that there are.
        actual: u64,
    },
    /// A metadata key that the format does not know.
    #[error("unknown metadata key {key:?}; known: {KEYS}")]
    UnknownKey {
        /// The key.
        key: String,
    },
    /// A metadata value that means nothing.
    #[error("metadata {key} is {value:?}; it must be {expected}")]
    BadValue {
        /// The key.
        key: String,
        /// Its value.
        value: String,
        /// The values that the key accepts.
        expected: &'static str,
    },
    /// A tensor that the format does not know.
    #[error("unknown tensor {name:?}; known: {}, expected.*", TENSORS.join(", "))]
    UnknownTensor {
        /// Its name.
        name: String,
    },
    /// A tensor that every file must have.
    #[error("tensor {name} is missing")]
    MissingTensor {
        /// Its name.
        name: &'static str,
    },
    /// A tensor of the wrong element type.
    #[error("tensor {name} has element type {actual}; it must be {expected}")]
    ElementType {
        /// Its name.
        name: &'static str,
        /// Its element type.
        actual: Dtype,
        /// The element type that it must have.
        expected: &'static str,
    },
    /// An operand whose element type is not that of q.
    #[error("tensor {name} has element type {actual}, q has {q}; they must be the same")]
    MixedElementTypes {
        /// The operand.
        name: &'static str,
        /// Its element type.
        actual: Dtype,
        /// The element type of q.
        q: Dtype,
    },
    /// A tensor of one layout in a file of another.
    #[error("tensor {name} goes with layout thd, the file's is {layout}")]
    WrongLayout {
        /// Its name.
        name: &'static str,
        /// The file's layout.
        layout: Layout,
    },
    /// A tensor with the wrong number of axes.
    #[error("tensor {name} has shape {shape:?}; in layout {layout} its axes must be {axes}")]
    Rank {
        /// Its name.
        name: &'static str,
        /// Its shape.
        shape: Vec<usize>,
        /// The file's layout.
        layout: Layout,
        /// The axes it must have.
        axes: &'static str,
    },
    /// Two of q, k and v disagree about a dimension.
    #[error("{dimension} differs: {left} of {left_name}, {right} of {right_name} (in layout {layout})")]
    Mismatch {
        /// The dimension.
        dimension: &'static str,
        /// One tensor.
        left_name: &'static str,
        /// Its size.
        left: usize,
        /// The other tensor.
        right_name: &'static str,
        /// Its size.
        right: usize,
        /// The file's layout.
        layout: Layout,
    },
    /// A tensor whose shape does not follow from q, k and v.
    #[error("tensor {name} has shape {actual:?}; q, k and v call for {expected:?}")]
    Shape {
        /// Its name.
        name: &'static str,
        /// Its shape.
        actual: Vec<usize>,
        /// The shape that it must have.
        expected: Vec<usize>,
    },
    /// A bias or a mask whose shape does not broadcast to that of the scores.
    #[error("tensor {name} has shape {actual:?}; it must be {scores:?}, where each axis but the last may be 1")]
    Broadcast {
        /// Its name.
        name: &'static str,
        /// Its shape.
        actual: Vec<usize>,
        /// `[B, H, M, N]`.
        scores: [usize; 4],
    },
    /// An element of a mask that is neither true nor false.
    #[error("tensor mask has {value} at element {index}; it must be 0 or 1")]
    MaskValue {
        /// Which element.
        index: usize,
        /// The value of the element.
        value: u8,
    },
    /// The file is well formed, but the problem in it is invalid.
    #[error(transparent)]
    Problem(#[from] crate::problem::error::Error),
    /// The safetensors format cannot hold the results.
    #[error("{0}")]
    Serialize(#[from] SafeTensorError),
}

impl From<Malformed> for FormatError {
    fn from(malformed: Malformed) -> Self {
        match malformed {
            Malformed::TooShort { actual } => FormatError::TooShort { actual },
            Malformed::HeaderLength { header, actual } => FormatError::HeaderLength { header, actual },
            Malformed::HeaderTooLong { header } => FormatError::HeaderTooLong { header },
            Malformed::Header(error) => FormatError::Header(error),
            Malformed::DataLength { expected, actual } => FormatError::DataLength { expected, actual },
        }
    }
}
