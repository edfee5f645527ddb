//! The keys and values of the sink tokens and of the last tokens of the stream.

use crate::model::KV_ROW;
use crate::stream::Settings;

/// `[sink tokens | last tokens]`, one row of all key heads to a token: `bshd` with a batch of one.
pub struct Cache {
    sink_tokens: usize,
    window: usize,
    k: Vec<f32>,
    v: Vec<f32>,
}

impl Cache {
    pub fn new(settings: &Settings) -> Self {
        // Room for a chunk on top of what is held, so that the buffers never grow.
        let capacity = (settings.most_keys() + settings.chunk) * KV_ROW;
        Cache {
            sink_tokens: settings.sink_tokens,
            window: settings.window,
            k: Vec::with_capacity(capacity),
            v: Vec::with_capacity(capacity),
        }
    }

    /// Appends a token's values, and room for its key, which it returns.
    pub fn append(&mut self, v: &[f32]) -> &mut [f32] {
        self.v.extend_from_slice(v);
        let start = self.k.len();
        self.k.resize(start + KV_ROW, 0.0);
        &mut self.k[start..]
    }

    /// Keeps the sink tokens and the last `window` tokens.
    ///
    /// A query sees its own key and the `window - 1` before it, so what goes here is seen by no later query: the
    /// results are those of the full, masked sequence. Nor does the gap between sink tokens and window matter: the keys
    /// were rotated at their positions in the stream, and the mask counts back from the query, where nothing is missing.
    pub fn evict(&mut self) {
        let gone = self.sink_tokens..self.len().saturating_sub(self.window);
        if !gone.is_empty() {
            self.k.drain(gone.start * KV_ROW..gone.end * KV_ROW);
            self.v.drain(gone.start * KV_ROW..gone.end * KV_ROW);
        }
    }

    /// Tokens held.
    pub fn len(&self) -> usize {
        self.k.len() / KV_ROW
    }

    pub fn k(&self) -> &[f32] {
        &self.k
    }

    pub fn v(&self) -> &[f32] {
        &self.v
    }
}

/// Bytes of this many tokens' keys and values.
pub fn bytes(tokens: usize) -> u64 {
    (2 * tokens * KV_ROW * size_of::<f32>()) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_first_and_the_last() {
        let mut cache = Cache::new(&Settings { window: 3, sink_tokens: 2, chunk: 4 });
        let room = cache.k.as_ptr();
        for chunk in 0..5 {
            for t in 4 * chunk..4 * chunk + 4 {
                cache.append(&[t as f32; KV_ROW]).fill(t as f32);
            }
            cache.evict();
        }
        let tokens: Vec<f32> = cache.k().iter().step_by(KV_ROW).copied().collect();
        assert_eq!(tokens, [0.0, 1.0, 17.0, 18.0, 19.0]);
        assert_eq!(cache.k(), cache.v());
        assert_eq!(cache.k.as_ptr(), room, "the buffer has grown");
    }
}
