//! Streams in safetensors files.
//!
//! The tensors `k.sinks`, `v.sinks`, `k.window` and `v.window` are as long as the stream can keep, filled up with
//! zeros, and the metadata key `stream` holds everything else: so the size of a file is constant, too. A stream has
//! exactly one file, checksum included, and what is not that file, byte by byte, is no stream.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use safetensors::tensor::{Metadata, TensorView};
use safetensors::{Dtype, SafeTensorError};

use super::{Kept, Stream, StreamShape, cut, join};
use crate::element::{DType, Element};
use crate::error::{Error, Result};
use crate::pipeline::cache::checksum;
use crate::problem::{Options, SinkLogits};

/// Version of the format.
const VERSION: u32 = 1;
const KEY: &str = "stream";

fn damaged(reason: String) -> Error {
    Error::StreamDamaged { reason }
}

impl<T: Element> Stream<T> {
    /// The content of a safetensors file, with which a stream goes on elsewhere: with the same bits where the device,
    /// the driver and the version of this crate are the same. All streams of the same shape and options have files of
    /// the same length. Metadata `stream` holds the options and the position; `k.sinks`, `v.sinks`, `k.window`,
    /// `v.window` are keys and values in the options' layout, `[B, tokens, G, width]` in `bshd`, oldest first, then
    /// zeros.
    ///
    /// # Errors
    /// [`Error::StreamDamaged`] where safetensors refuses to write it, as it does for nothing of a size that fits
    /// memory.
    pub fn to_safetensors(&self) -> Result<Vec<u8>> {
        let failed = |error: SafeTensorError| damaged(error.to_string());
        let StreamShape { batch, kv_heads, .. } = self.shape;
        let contents = self.parts().map(|part| {
            let padding = vec![T::default(); batch * kv_heads * (part.room - part.tokens) * part.width];
            let whole = join(self.outer(), part.kept, &padding);
            let shape = self.options.layout.shape(batch, kv_heads, part.room, part.width);
            (part.name, shape.to_vec(), bytemuck::cast_slice::<T, u8>(&whole).to_vec())
        });
        // As many digits as there can be, for files of one length.
        let pairs = self.properties().map(|(key, value)| format!("{key}={value}"));
        let description = format!("{} position={:020}", pairs.join(" "), self.position);
        let sums = contents.iter().map(|(_, _, bytes)| format!(" {:016x}", checksum(bytes))).collect::<String>();
        let description = format!("{description} checksum={:016x}", checksum((description.clone() + &sums).as_bytes()));
        let dtype = match T::DTYPE {
            DType::F32 => Dtype::F32,
            DType::F16 => Dtype::F16,
            DType::Bf16 => Dtype::BF16,
        };
        let view = |(name, shape, bytes)| Ok((name, TensorView::new(dtype, shape, bytes)?));
        let views = contents.iter().map(|(name, shape, bytes)| view((*name, shape.clone(), &bytes[..])));
        let views = views.collect::<Result<Vec<_>, _>>().map_err(failed)?;
        safetensors::serialize(views, Some(HashMap::from([(KEY.into(), description)]))).map_err(failed)
    }

    /// The stream that a file holds, of this shape with these options.
    ///
    /// # Errors
    /// Those of [`new`](Self::new); [`Error::StreamDamaged`] for what is not exactly a file of
    /// [`to_safetensors`](Self::to_safetensors), down to the last bit; [`Error::StreamMismatch`] for one of a stream of
    /// another shape, element type or other options.
    pub fn from_safetensors(bytes: &[u8], shape: StreamShape, options: Options) -> Result<Self> {
        let mut stream = Stream::new(shape, options)?;
        let Some((&length, rest)) = bytes.split_first_chunk() else {
            return Err(damaged(format!("{} bytes, the length of the header alone takes 8", bytes.len())));
        };
        let length = u64::from_le_bytes(length);
        let Some((header, data)) = usize::try_from(length).ok().and_then(|length| rest.split_at_checked(length)) else {
            return Err(damaged(format!("the header claims {length} bytes, {} follow its length", rest.len())));
        };
        // Not SafeTensors::deserialize, in which offsets near 2^64 overflow (0.8.0).
        let index: Metadata =
            serde_json::from_slice(header).map_err(|error| damaged(format!("the header: {error}")))?;
        if index.data_len() != data.len() {
            return Err(damaged(format!("the tensors take {} bytes, {} are there", index.data_len(), data.len())));
        }
        let description = index.metadata().as_ref().and_then(|metadata| metadata.get(KEY));
        let description = description.ok_or_else(|| damaged(format!("the metadata have no key {KEY:?}")))?;
        let saved: HashMap<&str, &str> = description.split(' ').filter_map(|pair| pair.split_once('=')).collect();
        let value = |key: &str| saved.get(key).copied().ok_or_else(|| damaged(format!("the metadata have no {key}")));
        for (property, wanted) in stream.properties() {
            let saved = value(property)?;
            if saved != wanted {
                return Err(Error::StreamMismatch { property, saved: saved.into(), wanted });
            }
        }
        let position = value("position")?;
        stream.position = position.parse().map_err(|_| damaged(format!("the position is {position:?}")))?;
        let position = usize::try_from(stream.position).unwrap_or(usize::MAX);
        let sinks = position.min(stream.options.sink_tokens);
        let recent = (position - sinks).min(stream.left());
        let mut parts = Vec::new();
        for part in stream.parts() {
            let needed = stream.shape.batch * stream.shape.kv_heads * part.room * part.width * size_of::<T>();
            let info = index.info(part.name).ok_or_else(|| damaged(format!("tensor {} is missing", part.name)))?;
            let bytes = &data[info.data_offsets.0..info.data_offsets.1];
            if bytes.len() != needed {
                return Err(damaged(format!("tensor {} has {} bytes, not {needed}", part.name, bytes.len())));
            }
            let whole: Vec<T> = bytemuck::pod_collect_to_vec(bytes);
            let tokens = if part.name.ends_with("sinks") { sinks } else { recent };
            parts.push(cut(stream.outer(), &whole, part.room, 0..tokens));
        }
        let [k_sinks, v_sinks, k_window, v_window] =
            <[Vec<T>; 4]>::try_from(parts).map_err(|_| damaged("there are not four tensors".into()))?;
        stream.sinks = Kept { tokens: sinks, k: k_sinks, v: v_sinks };
        stream.recent = Kept { tokens: recent, k: k_window, v: v_window };
        if stream.to_safetensors()? != bytes {
            return Err(damaged(
                "its bytes, by their checksum or in other ways, are not those that were written".into(),
            ));
        }
        Ok(stream)
    }

    /// Writes a file of [`to_safetensors`](Self::to_safetensors), whole, or leaves the one that is there.
    ///
    /// # Errors
    /// [`Error::StreamFile`].
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let bytes = self.to_safetensors()?;
        // Beside the file, so that the rename stays within a file system; of this process, so that none shares it.
        let mut beside = path.as_os_str().to_owned();
        beside.push(format!(".{}", std::process::id()));
        fs::write(&beside, bytes).and_then(|()| fs::rename(&beside, path)).map_err(|error| {
            // Whatever was written is of no use.
            let _ = fs::remove_file(&beside);
            Error::StreamFile { path: path.into(), reason: error.to_string() }
        })
    }

    /// The stream of a file, of this shape with these options.
    ///
    /// # Errors
    /// [`Error::StreamFile`] where it cannot be read or is damaged; [`Error::StreamMismatch`] and those of
    /// [`new`](Self::new).
    pub fn load(path: impl AsRef<Path>, shape: StreamShape, options: Options) -> Result<Self> {
        let path = path.as_ref();
        let failed = |reason: String| Error::StreamFile { path: path.into(), reason };
        let bytes = fs::read(path).map_err(|error| failed(error.to_string()))?;
        Stream::from_safetensors(&bytes, shape, options).map_err(|error| match error {
            Error::StreamDamaged { reason } => failed(reason),
            error => error,
        })
    }

    fn parts(&self) -> [Part<'_, T>; 4] {
        let (d, e) = (self.shape.head_dim, self.shape.value_dim);
        let (first, last) = (self.options.sink_tokens, self.left());
        [
            Part { name: "k.sinks", room: first, width: d, kept: &self.sinks.k, tokens: self.sinks.tokens },
            Part { name: "v.sinks", room: first, width: e, kept: &self.sinks.v, tokens: self.sinks.tokens },
            Part { name: "k.window", room: last, width: d, kept: &self.recent.k, tokens: self.recent.tokens },
            Part { name: "v.window", room: last, width: e, kept: &self.recent.v, tokens: self.recent.tokens },
        ]
    }

    /// What two streams must have in common for one to go on where the other ended.
    fn properties(&self) -> [(&'static str, String); 15] {
        let (shape, options) = (&self.shape, &self.options);
        let sink_logits = match options.sink_logits {
            SinkLogits::None => "none",
            SinkLogits::OffByOne => "off-by-one",
            SinkLogits::PerHead => "per-head",
        };
        let scale = options.scale.unwrap_or(1.0 / (shape.head_dim as f32).sqrt());
        [
            ("version", VERSION.to_string()),
            ("dtype", T::DTYPE.to_string()),
            ("layout", options.layout.to_string()),
            ("batch", shape.batch.to_string()),
            ("heads", shape.heads.to_string()),
            ("kv_heads", shape.kv_heads.to_string()),
            ("head_dim", shape.head_dim.to_string()),
            ("value_dim", shape.value_dim.to_string()),
            ("window_left", self.left().to_string()),
            ("window_right", "0".into()),
            ("sink_tokens", options.sink_tokens.to_string()),
            ("sink_logits", sink_logits.into()),
            ("scale", scale.to_string()),
            ("softcap", options.softcap.map_or("none".into(), |softcap| softcap.to_string())),
            ("alibi", options.alibi.to_string()),
        ]
    }
}

/// A tensor of the file.
struct Part<'a, T> {
    name: &'static str,
    /// Tokens there is room for, and those there are.
    room: usize,
    tokens: usize,
    width: usize,
    kept: &'a [T],
}
