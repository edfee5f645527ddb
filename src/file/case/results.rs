//! Results in a file, under the names of the format.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensorError};

use super::error::{Error, FormatError};
use crate::file;
use crate::file::values::Values;
use crate::problem::Layout;
use crate::problem::element::Element;

/// A named result.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    /// Its name in the file.
    pub name: &'static str,
    /// Its shape, slowest axis first.
    pub shape: Vec<usize>,
    /// Its elements.
    pub values: Values,
}

impl Tensor {
    pub(crate) fn new<T: Element>(name: &'static str, shape: &[usize], values: Vec<T>) -> Self {
        Tensor { name, shape: shape.into(), values: Values::new(values) }
    }
}

/// Refuses an output path that [`write()`] should not replace or cannot write: the input itself, or anything but a regular file. A caller
/// can check the path before a long computation.
///
/// # Errors
/// [`Error::OutputIsInput`], [`Error::NotAFile`], and [`Error::Write`] if the file cannot be written, as far as this shows before it is
/// written.
pub fn check_output(input: &Path, output: &Path) -> Result<(), Error> {
    // Canonical paths resolve `./x`, links and, where the system ignores it, the case of letters.
    if let (Ok(from), Ok(to)) = (fs::canonicalize(input), fs::canonicalize(output))
        && from == to
    {
        return Err(Error::OutputIsInput { path: output.into() });
    }
    // The metadata follow a symbolic link, because its target would be written.
    if fs::metadata(output).is_ok_and(|found| !found.is_file()) {
        return Err(Error::NotAFile { path: output.into() });
    }
    file::check_writable(output).map_err(|source| Error::Write { path: output.into(), source })
}

/// Writes results: all of the file, or nothing, like [`file::replace`].
///
/// # Errors
/// [`Error::Write`], and [`Error::Format`] if a shape does not fit its elements.
pub fn write(path: impl AsRef<Path>, layout: Layout, tensors: &[Tensor]) -> Result<(), Error> {
    let path = path.as_ref();
    let bytes = serialize(layout, tensors).map_err(|source| Error::Format { path: path.into(), source })?;
    file::replace(path, &bytes).map_err(|source| Error::Write { path: path.into(), source })
}

/// The content of a result file: the tensors, with the layout as metadata.
fn serialize(layout: Layout, tensors: &[Tensor]) -> Result<Vec<u8>, FormatError> {
    let encoded: Vec<(Dtype, Vec<u8>)> = tensors.iter().map(|tensor| encode(&tensor.values)).collect();
    let views: Vec<(&str, TensorView<'_>)> = tensors
        .iter()
        .zip(&encoded)
        .map(|(tensor, (dtype, bytes))| Ok((tensor.name, TensorView::new(*dtype, tensor.shape.clone(), bytes)?)))
        .collect::<Result<_, SafeTensorError>>()?;
    let metadata = HashMap::from([("layout".to_string(), layout.to_string())]);
    Ok(safetensors::serialize(views, Some(metadata))?)
}
fn encode(values: &Values) -> (Dtype, Vec<u8>) {
    match values {
        Values::F32(values) => (Dtype::F32, values.iter().flat_map(|x| x.to_le_bytes()).collect()),
        Values::F16(values) => (Dtype::F16, values.iter().flat_map(|x| x.to_le_bytes()).collect()),
        Values::Bf16(values) => (Dtype::BF16, values.iter().flat_map(|x| x.to_le_bytes()).collect()),
    }
}
