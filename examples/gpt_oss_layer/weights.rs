//! Tensors of safetensors files, read one by one: a shard of the 20B model need not fit the memory.

use std::collections::BTreeMap;
use std::error::Error;
use std::path::{Path, PathBuf};

use safetensors::tensor::TensorView;
use serde_json::Value;
use sink_attention::file;
use sink_attention::file::Values;

use crate::shard::Shard;

/// A tensor in f32, of this shape if one is called for.
fn numbers(shard: &mut Shard, name: &str, shape: Option<&[usize]>) -> Result<(Vec<f32>, Vec<usize>), String> {
    if let (Some(shape), Some(info)) = (shape, shard.index.info(name))
        && info.shape != shape
    {
        let path = shard.path.display();
        return Err(format!("{path}: tensor {name} has shape {:?}, config.json calls for {shape:?}", info.shape));
    }
    let (info, bytes) = shard.bytes(name)?;
    let failed = |error: &dyn Error| format!("{}: {error}", shard.path.display());
    let tensor = TensorView::new(info.dtype, info.shape.clone(), &bytes).map_err(|error| failed(&error))?;
    let values = Values::from_safetensors(name, &tensor, &info.shape).map_err(|error| failed(&error))?;
    Ok((values.into_f32(), info.shape))
}

/// The tensors of a folder: of `model.safetensors`, or of the shards in `model.safetensors.index.json`.
pub struct Weights {
    folder: PathBuf,
    /// Which file has a tensor; `None`: there is one file only.
    map: Option<BTreeMap<String, String>>,
    shards: BTreeMap<String, Shard>,
}

/// Bytes of an index, at most: those of the largest models have some megabytes.
const MOST_INDEX: u64 = 1 << 28;

impl Weights {
    pub fn open(folder: &Path) -> Result<Self, String> {
        let index = folder.join("model.safetensors.index.json");
        let map = if index.is_file() {
            let of = || -> Result<_, String> {
                let text = file::read(&index, MOST_INDEX).map_err(|error| error.to_string())?;
                let json: Value = serde_json::from_slice(&text).map_err(|error| error.to_string())?;
                let map = json.get("weight_map").and_then(Value::as_object).ok_or("weight_map is missing")?;
                map.iter()
                    .map(|(name, file)| match file.as_str() {
                        // A file of this folder, and of no other.
                        Some(file) if Path::new(file).file_name() == Some(file.as_ref()) => {
                            Ok((name.clone(), file.to_string()))
                        }
                        _ => Err(format!("weight_map has {file} for {name}; it must be a file's name")),
                    })
                    .collect::<Result<_, _>>()
            };
            Some(of().map_err(|error| format!("{}: {error}", index.display()))?)
        } else {
            None
        };
        Ok(Weights { folder: folder.into(), map, shards: BTreeMap::new() })
    }

    pub fn tensor(&mut self, name: &str, shape: &[usize]) -> Result<Vec<f32>, String> {
        let file = match &self.map {
            None => "model.safetensors",
            Some(map) => map.get(name).ok_or_else(|| {
                format!("{}: tensor {name} is missing", self.folder.join("model.safetensors.index.json").display())
            })?,
        };
        if !self.shards.contains_key(file) {
            self.shards.insert(file.into(), Shard::open(&self.folder.join(file))?);
        }
        let shard = self.shards.get_mut(file).ok_or("no shard")?;
        Ok(numbers(shard, name, Some(shape))?.0)
    }
}

/// The recorded inputs and outputs, if there are any.
pub struct Expected(Shard);

impl Expected {
    pub fn open(folder: &Path) -> Result<Option<Self>, String> {
        let path = folder.join("expected.safetensors");
        if !path.exists() {
            return Ok(None);
        }
        Ok(Some(Expected(Shard::open(&path)?)))
    }

    /// Whether there is such a tensor.
    pub fn has(&self, name: &str) -> bool {
        self.0.index.info(name).is_some()
    }

    /// `[1, tokens, width]`.
    pub fn rows(&mut self, name: &str, width: usize) -> Result<Vec<f32>, String> {
        let (numbers, shape) = numbers(&mut self.0, name, None)?;
        if shape.len() != 3 || shape[0] != 1 || shape[1] == 0 || shape[2] != width {
            let path = self.0.path.display();
            return Err(format!("{path}: tensor {name} has shape {shape:?}, it must be [1, tokens, {width}]"));
        }
        Ok(numbers)
    }
}
