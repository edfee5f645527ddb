//! A stream in a file, from which it goes on: the caches, as the library saves them, and what is known of the results.

use std::collections::HashMap;
use std::error::Error;
use std::path::Path;

use safetensors::Dtype;
use safetensors::tensor::TensorView;
use sink_attention::file;

use crate::check::Errors;
use crate::series::{Measures, Series, Stretch};
use crate::shard::Shard;
use crate::stream::{Lane, Record, Stream};

/// The key of the metadata.
const KEY: &str = "streaming";
/// 2: with a checksum over all tensors.
const VERSION: u32 = 2;
/// The key of the checksum.
const CHECKSUM: &str = "checksum";

/// The checksum of nothing.
const EMPTY: u64 = 0xcbf2_9ce4_8422_2325;

/// FNV-1a in 64 bits, gone on from a checksum: against accidents.
fn fnv_1a(sum: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(sum, |sum, byte| (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

/// A checksum over the description and all tensors with their names and lengths, in the order in which they are listed.
pub struct Checksum(u64);

impl Checksum {
    pub fn new(description: &str) -> Self {
        Checksum(fnv_1a(EMPTY, description.as_bytes()))
    }

    pub fn tensor(&mut self, name: &str, bytes: &[u8]) {
        for part in [name.as_bytes(), &(bytes.len() as u64).to_le_bytes(), bytes] {
            self.0 = fnv_1a(self.0, part);
        }
    }

    pub fn text(&self) -> String {
        format!("{:016x}", self.0)
    }
}

fn cache_name(lane: &Lane<'_>) -> String {
    format!("{}.cache", lane.policy.name())
}

impl Stream<'_> {
    /// What must be the same for the stream to go on.
    fn description(&self) -> String {
        let settings = &self.scene.settings;
        let text = fnv_1a(EMPTY, self.scene.text.bytes);
        let policies: Vec<&str> = self.lanes.iter().map(|lane| lane.policy.name()).collect();
        format!(
            "version {VERSION}, policies {}, window {}, sink tokens {}, capacity {}, text {} bytes {:016x}",
            policies.join(" and "),
            settings.window,
            settings.sink_tokens,
            settings.capacity,
            self.scene.text.bytes.len(),
            text,
        )
    }

    /// Writes the file whole, or leaves the one that is there: whoever is killed leaves a whole file.
    pub fn save(&self, path: &Path) -> Result<(), Box<dyn Error>> {
        let mut parts = vec![("position".to_string(), vec![self.position as u64])];
        let mut caches = Vec::new();
        for lane in &self.lanes {
            parts.push((lane.policy.name().into(), lane.record.to_words()));
            caches.push((cache_name(lane), lane.decoder.to_safetensors()?));
        }
        let words = parts.iter().map(|(name, words)| {
            let bytes = bytemuck::cast_slice::<u64, u8>(words);
            Ok((name, TensorView::new(Dtype::U64, vec![words.len()], bytes)?))
        });
        let caches =
            caches.iter().map(|(name, bytes)| Ok((name, TensorView::new(Dtype::U8, vec![bytes.len()], bytes)?)));
        let views = words.chain(caches).collect::<Result<Vec<_>, safetensors::SafeTensorError>>()?;
        let description = self.description();
        let mut sum = Checksum::new(&description);
        for (name, view) in &views {
            sum.tensor(name, view.data());
        }
        let metadata = HashMap::from([(KEY.to_string(), description), (CHECKSUM.to_string(), sum.text())]);
        let file = safetensors::serialize(views, Some(metadata))?;
        file::replace(path, &file).map_err(|error| format!("cannot write {}: {error}", path.display()).into())
    }

    /// Goes on where the file was saved.
    pub fn load(&mut self, path: &Path) -> Result<(), Box<dyn Error>> {
        let failed = |reason: &str| format!("{}: {reason}", path.display());
        let mut file = Shard::open(path)?;
        let saved = file.index.metadata().as_ref().and_then(|metadata| metadata.get(KEY)).cloned();
        let saved = saved.ok_or_else(|| failed("not the state of a stream"))?;
        let wanted = self.description();
        if saved != wanted {
            return Err(failed(&format!("of another stream: it has {saved}; wanted is {wanted}")).into());
        }
        // Before anything of this stream is replaced.
        let mut names = vec!["position".to_string()];
        names.extend(self.lanes.iter().map(|lane| lane.policy.name().to_string()));
        names.extend(self.lanes.iter().map(|lane| cache_name(lane)));
        let mut sum = Checksum::new(&wanted);
        for name in &names {
            sum.tensor(name, &file.bytes(name)?.1);
        }
        let saved = file.index.metadata().as_ref().and_then(|metadata| metadata.get(CHECKSUM));
        if saved != Some(&sum.text()) {
            return Err(failed("damaged: its bytes are not those of its checksum").into());
        }
        let mut words = |name: &str| -> Result<Vec<u64>, String> {
            let (_, bytes) = file.bytes(name)?;
            Ok(bytes.as_chunks().0.iter().map(|word| u64::from_le_bytes(*word)).collect())
        };
        let position = words("position")?.first().map_or(0, |position| *position as usize);
        if position > self.scene.text.tokens {
            let tokens = self.scene.text.tokens;
            return Err(failed(&format!("{position} tokens were streamed already, --tokens asks for {tokens}")).into());
        }
        for lane in &mut self.lanes {
            let name = lane.policy.name();
            let tokens = position.min(lane.policy.end(&self.scene.settings));
            let record = Record::from_words(&words(name)?).filter(|record| record.series.covers(tokens));
            lane.record = record.ok_or_else(|| failed(&format!("tensor {name} is no record of {tokens} tokens")))?;
        }
        for lane in &mut self.lanes {
            let (_, cache) = file.bytes(&cache_name(lane))?;
            lane.decoder.restore(&cache).map_err(|error| failed(&error.to_string()))?;
            let (actual, tokens) = (lane.decoder.tokens(), position.min(lane.policy.end(&self.scene.settings)));
            if actual != tokens {
                let name = lane.policy.name();
                return Err(failed(&format!("the cache of policy {name} has {actual} tokens, not {tokens}")).into());
            }
        }
        self.position = position;
        Ok(())
    }
}

impl Record {
    fn to_words(&self) -> Vec<u64> {
        let Record { series, checksum, errors, checked } = self;
        let mut words = vec![*checksum, errors.o.to_bits(), errors.lse.to_bits(), *checked as u64];
        for Stretch { start, tokens, measures } in &series.stretches {
            words.extend([*start as u64, *tokens as u64]);
            words.extend(measures.to_array().map(f64::to_bits));
        }
        words
    }

    fn from_words(words: &[u64]) -> Option<Self> {
        let (&[checksum, o, lse, checked], rest) = words.split_first_chunk()?;
        let (stretches, []) = rest.as_chunks::<{ 2 + Measures::COUNT }>() else { return None };
        let stretch = |[start, tokens, measures @ ..]: &[u64; 2 + Measures::COUNT]| Stretch {
            start: *start as usize,
            tokens: *tokens as usize,
            measures: Measures::from_array(measures.map(f64::from_bits)),
        };
        let series = Series { stretches: stretches.iter().map(stretch).collect() };
        let errors = Errors { o: f64::from_bits(o), lse: f64::from_bits(lse) };
        Some(Record { series, checksum, errors, checked: checked as usize })
    }
}
