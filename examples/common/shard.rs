//! A safetensors file that is read tensor by tensor.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use safetensors::tensor::{Metadata, TensorInfo};

/// The longest header that safetensors writes.
const MOST_HEADER: u64 = 100_000_000;

/// A file, of which only the header has been read.
pub struct Shard {
    pub path: PathBuf,
    file: File,
    pub index: Metadata,
    /// Where the tensors begin.
    data: u64,
}

impl Shard {
    pub fn open(path: &Path) -> Result<Self, String> {
        let open = || -> Result<Self, String> {
            let (mut file, len) = sink_attention::file::open(path).map_err(|error| error.to_string())?;
            let mut length = [0; 8];
            file.read_exact(&mut length)
                .map_err(|_| format!("no safetensors file: {len} bytes, the length of the header alone takes 8"))?;
            let header = u64::from_le_bytes(length);
            let rest = len.saturating_sub(8);
            if header > MOST_HEADER || header > rest {
                return Err(format!(
                    "no safetensors file, or truncated: the header claims {header} bytes, {rest} follow its length"
                ));
            }
            let mut bytes = vec![0; header as usize];
            file.read_exact(&mut bytes).map_err(|error| error.to_string())?;
            let index: Metadata =
                serde_json::from_slice(&bytes).map_err(|error| format!("malformed header: {error}"))?;
            let (expected, actual) = (index.data_len() as u64, len - 8 - header);
            if expected != actual {
                return Err(format!(
                    "truncated or overlong: the tensors take {expected} bytes, {actual} follow the header"
                ));
            }
            Ok(Shard { path: path.into(), file, index, data: 8 + header })
        };
        open().map_err(|error| format!("{}: {error}", path.display()))
    }

    /// A tensor's bytes.
    pub fn bytes(&mut self, name: &str) -> Result<(TensorInfo, Vec<u8>), String> {
        let failed = |reason: String| format!("{}: tensor {name}{reason}", self.path.display());
        let info = self.index.info(name).ok_or_else(|| failed(" is missing".into()))?.clone();
        let (start, end) = info.data_offsets;
        let mut bytes = vec![0; end - start];
        self.file
            .seek(SeekFrom::Start(self.data + start as u64))
            .and_then(|_| self.file.read_exact(&mut bytes))
            .map_err(|error| failed(format!(": {error}")))?;
        Ok((info, bytes))
    }
}
