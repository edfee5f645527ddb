//! Streams in safetensors files.
//!
//! The tensors `k.sinks`, `v.sinks`, `k.window` and `v.window` are as long as the stream can keep, filled up with
//! zeros, and the metadata key `stream` holds everything else: so the size of a file is constant, too. A stream has
//! exactly one file, checksum included, and what is not that file, byte by byte, is no stream.

use std::path::Path;

use super::{Kept, Stream, StreamShape, cut, join};
use crate::file::saved::{self, Reader, Tensor};
use crate::problem::element::Element;
use crate::problem::error::Result;
use crate::problem::{Options, SinkLogits};

/// Version of the format.
const VERSION: u32 = 1;
/// The key of the metadata.
const STREAM: &str = "stream";

impl<T: Element> Stream<T> {
    /// The content of a safetensors file, with which a stream goes on elsewhere: with the same bits where the device,
    /// the driver and the version of this crate are the same. All streams of the same shape and options have files of
    /// the same length. Metadata `stream` holds the options and the position; `k.sinks`, `v.sinks`, `k.window`,
    /// `v.window` are keys and values in the options' layout, `[B, tokens, G, width]` in `bshd`, oldest first, then
    /// zeros.
    ///
    /// # Errors
    /// [`Error::SavedDamaged`](crate::Error::SavedDamaged) where safetensors refuses to write it, as it does for nothing of a size that fits
    /// memory.
    pub fn to_safetensors(&self) -> Result<Vec<u8>> {
        let StreamShape { batch, kv_heads, .. } = self.shape;
        let tensors = self.parts().map(|part| {
            let padding = vec![T::default(); batch * kv_heads * (part.room - part.tokens) * part.width];
            let whole = join(self.outer(), part.kept, &padding);
            let shape = self.options.layout.shape(batch, kv_heads, part.room, part.width).to_vec();
            let bytes = bytemuck::cast_slice::<T, u8>(&whole).to_vec();
            Tensor { name: part.name, dtype: saved::dtype(T::DTYPE), shape, bytes }
        });
        let mut properties = self.properties().to_vec();
        // As many digits as there can be, for files of one length.
        properties.push(("position", format!("{:020}", self.position)));
        saved::serialize(STREAM, &properties, &tensors)
    }

    /// The stream that a file holds, of this shape with these options.
    ///
    /// # Errors
    /// Those of [`new`](Self::new); [`Error::SavedDamaged`](crate::Error::SavedDamaged) for what is not exactly a file of
    /// [`to_safetensors`](Self::to_safetensors), down to the last bit; [`Error::SavedMismatch`](crate::Error::SavedMismatch) for one of a stream of
    /// another shape, element type or other options.
    pub fn from_safetensors(bytes: &[u8], shape: StreamShape, options: Options) -> Result<Self> {
        let mut stream = Stream::new(shape, options)?;
        let file = Reader::new(STREAM, bytes)?;
        file.expect(stream.properties().to_vec())?;
        let damaged = |reason| saved::damaged(STREAM, reason);
        let position = file.value("position")?;
        stream.position = position.parse().map_err(|_| damaged(format!("the position is {position:?}")))?;
        let position = usize::try_from(stream.position).unwrap_or(usize::MAX);
        let sinks = position.min(stream.options.sink_tokens);
        let recent = (position - sinks).min(stream.left());
        let mut parts = Vec::new();
        for part in stream.parts() {
            let needed = stream.shape.batch * stream.shape.kv_heads * part.room * part.width * size_of::<T>();
            let bytes = file.tensor(part.name, needed)?;
            let whole: Vec<T> = bytemuck::pod_collect_to_vec(bytes);
            let tokens = if part.name.ends_with("sinks") { sinks } else { recent };
            parts.push(cut(stream.outer(), &whole, part.room, 0..tokens));
        }
        let [k_sinks, v_sinks, k_window, v_window] =
            <[Vec<T>; 4]>::try_from(parts).map_err(|_| damaged("there are not four tensors".into()))?;
        stream.sinks = Kept { tokens: sinks, k: k_sinks, v: v_sinks };
        stream.recent = Kept { tokens: recent, k: k_window, v: v_window };
        saved::same(STREAM, bytes, &stream.to_safetensors()?)?;
        Ok(stream)
    }

    /// Writes a file of [`to_safetensors`](Self::to_safetensors), whole, or leaves the one that is there.
    ///
    /// # Errors
    /// [`Error::SavedFile`](crate::Error::SavedFile).
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        saved::save(STREAM, path.as_ref(), &self.to_safetensors()?)
    }

    /// The stream of a file, of this shape with these options.
    ///
    /// # Errors
    /// [`Error::SavedFile`](crate::Error::SavedFile) where it cannot be read or is damaged; [`Error::SavedMismatch`](crate::Error::SavedMismatch) and those of
    /// [`new`](Self::new).
    pub fn load(path: impl AsRef<Path>, shape: StreamShape, options: Options) -> Result<Self> {
        saved::load(STREAM, path.as_ref(), |bytes| Stream::from_safetensors(bytes, shape, options))
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
        let shape = &self.shape;
        // A stream has no bias, no mask and no offset, and one way to say its window.
        let Options {
            causal: _,
            window: _,
            sink_tokens,
            sink_logits,
            scale,
            softcap,
            alibi,
            bias: _,
            bias_dtype: _,
            mask: _,
            mask_packing: _,
            alignment: _,
            query_offset: _,
            layout,
            dtype: _,
        } = self.options;
        let sink_logits = match sink_logits {
            SinkLogits::None => "none",
            SinkLogits::OffByOne => "off-by-one",
            SinkLogits::PerHead => "per-head",
        };
        let scale = scale.unwrap_or(1.0 / (shape.head_dim as f32).sqrt());
        [
            ("version", VERSION.to_string()),
            ("dtype", T::DTYPE.to_string()),
            ("layout", layout.to_string()),
            ("batch", shape.batch.to_string()),
            ("heads", shape.heads.to_string()),
            ("kv_heads", shape.kv_heads.to_string()),
            ("head_dim", shape.head_dim.to_string()),
            ("value_dim", shape.value_dim.to_string()),
            ("window_left", self.left().to_string()),
            ("window_right", "0".into()),
            ("sink_tokens", sink_tokens.to_string()),
            ("sink_logits", sink_logits.into()),
            ("scale", scale.to_string()),
            ("softcap", softcap.map_or("none".into(), |softcap| softcap.to_string())),
            ("alibi", alibi.to_string()),
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
