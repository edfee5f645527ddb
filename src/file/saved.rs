//! Streams and caches in safetensors files. A key of the metadata describes the tensors and holds a checksum of everything.
//!
//! The format is canonical: each state has exactly one file. A reader builds the state that the file describes, saves it again, and rejects
//! the file unless every byte is the same.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::path::Path;

use safetensors::tensor::{Metadata, TensorView};
use safetensors::{Dtype, SafeTensorError};

use crate::file::{Container, checksum, read_container, replace};
use crate::problem::element::DType;
use crate::problem::error::{Error, Result};

/// A tensor to be written.
pub(crate) struct Tensor {
    pub(crate) name: &'static str,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: Vec<u8>,
}

/// The format's name of an element type.
pub(crate) fn dtype(dtype: DType) -> Dtype {
    match dtype {
        DType::F32 => Dtype::F32,
        DType::F16 => Dtype::F16,
        DType::Bf16 => Dtype::BF16,
    }
}

pub(crate) fn damaged(what: &'static str, reason: String) -> Error {
    Error::SavedDamaged { what, reason }
}

/// The bytes of a file. Values of properties contain no spaces.
pub(crate) fn serialize(
    what: &'static str,
    properties: &[(&'static str, String)],
    tensors: &[Tensor],
) -> Result<Vec<u8>> {
    let failed = |error: SafeTensorError| damaged(what, error.to_string());
    let pairs: Vec<String> = properties.iter().map(|(key, value)| format!("{key}={value}")).collect();
    let description = pairs.join(" ");
    let sums: String = tensors.iter().map(|tensor| format!(" {:016x}", checksum(&tensor.bytes))).collect();
    let description = format!("{description} checksum={:016x}", checksum((description.clone() + &sums).as_bytes()));
    let views = tensors.iter().map(|t| Ok((t.name, TensorView::new(t.dtype, t.shape.clone(), &t.bytes)?)));
    let views = views.collect::<Result<Vec<_>, _>>().map_err(failed)?;
    safetensors::serialize(views, Some(HashMap::from([(what.into(), description)]))).map_err(failed)
}

/// A file that is being read.
pub(crate) struct Reader<'a> {
    what: &'static str,
    strings: BTreeMap<String, String>,
    index: Metadata,
    data: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(crate) fn new(what: &'static str, bytes: &'a [u8]) -> Result<Self> {
        let Container { strings, index, data } =
            Container::parse(bytes).map_err(|malformed| damaged(what, malformed.to_string()))?;
        Ok(Reader { what, strings, index, data })
    }

    fn damaged(&self, reason: String) -> Error {
        damaged(self.what, reason)
    }

    /// A property.
    pub(crate) fn value(&self, property: &str) -> Result<&str> {
        let description = self.strings.get(self.what);
        let description =
            description.ok_or_else(|| self.damaged(format!("the metadata have no key {:?}", self.what)))?;
        let mut pairs = description.split(' ').filter_map(|pair| pair.split_once('='));
        let found = pairs.find(|(key, _)| *key == property);
        found.map(|(_, value)| value).ok_or_else(|| self.damaged(format!("the metadata have no {property}")))
    }

    /// Checks that properties have the wanted values.
    pub(crate) fn expect(&self, wanted: Vec<(&'static str, String)>) -> Result<()> {
        for (property, wanted) in wanted {
            let saved = self.value(property)?;
            if saved != wanted {
                return Err(Error::SavedMismatch { what: self.what, property, saved: saved.into(), wanted });
            }
        }
        Ok(())
    }

    /// The bytes of a tensor, which must have `needed` bytes.
    pub(crate) fn tensor(&self, name: &str, needed: usize) -> Result<&'a [u8]> {
        let info = self.index.info(name).ok_or_else(|| self.damaged(format!("tensor {name} is missing")))?;
        // The offsets are within the data: the header has been checked.
        let bytes = self.data.get(info.data_offsets.0..info.data_offsets.1).unwrap_or_default();
        if bytes.len() != needed {
            return Err(self.damaged(format!("tensor {name} has {} bytes, not {needed}", bytes.len())));
        }
        Ok(bytes)
    }
}

/// Checks that the bytes read are exactly those that would be written.
pub(crate) fn same(what: &'static str, read: &[u8], written: &[u8]) -> Result<()> {
    if read == written {
        return Ok(());
    }
    Err(damaged(what, "its bytes, by their checksum or in other ways, are not those that were written".into()))
}

/// Writes a file whole, or leaves the file that is there.
pub(crate) fn save(what: &'static str, path: &Path, bytes: &[u8]) -> Result<()> {
    let failed =
        |error: io::Error| Error::SavedFile { what, path: path.into(), reason: format!("cannot write: {error}") };
    if cfg!(all(target_family = "wasm", target_os = "unknown")) {
        // The system's own error would not name a way out.
        let reason = "there are no files here; to_safetensors gives the bytes".into();
        return Err(Error::SavedFile { what, path: path.into(), reason });
    }
    replace(path, bytes).map_err(failed)
}

/// Reads a file. An error for a damaged file names the file.
pub(crate) fn load<R>(what: &'static str, path: &Path, read: impl FnOnce(&[u8]) -> Result<R>) -> Result<R> {
    let failed = |reason: String| Error::SavedFile { what, path: path.into(), reason };
    let bytes = read_container(path).map_err(|error| failed(format!("cannot read: {error}")))?;
    read(&bytes.map_err(|malformed| failed(malformed.to_string()))?).map_err(|error| match error {
        Error::SavedDamaged { reason, .. } => failed(reason),
        error => error,
    })
}
