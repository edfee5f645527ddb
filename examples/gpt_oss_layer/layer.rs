//! An attention layer: projections on the CPU, attention through the crate.

use std::error::Error;

use rayon::prelude::*;
use sink_attention::cache::{CacheConfig, CacheKind, Rotary, RotaryPositions, RotaryStyle};
use sink_attention::{Attention, Inputs, Options, Problem, Shape, SinkLogits, Window};

use crate::config::{Config, LayerType};
use crate::decoder::{Decoder, Setup};
use crate::rotary;
use crate::weights::Weights;

/// Tokens that are recorded before the GPU starts.
const CHUNK: usize = 16;

/// y = W x + b, W is `[out, in]`.
struct Linear {
    inputs: usize,
    weight: Vec<f32>,
    bias: Vec<f32>,
}

impl Linear {
    fn load(weights: &mut Weights, name: &str, [outputs, inputs]: [usize; 2], bias: bool) -> Result<Self, String> {
        let weight = weights.tensor(&format!("{name}.weight"), &[outputs, inputs])?;
        let bias = if bias { weights.tensor(&format!("{name}.bias"), &[outputs])? } else { vec![0.0; outputs] };
        Ok(Linear { inputs, weight, bias })
    }

    /// Rows of `[tokens, in]` to `[tokens, out]`.
    fn apply(&self, x: &[f32]) -> Vec<f32> {
        let (tokens, outputs) = (x.len() / self.inputs, self.bias.len());
        // Each row of the weights is read once, for all tokens.
        let mut by_output = vec![0.0; outputs * tokens];
        let rows = self.weight.par_chunks_exact(self.inputs).zip(&self.bias);
        by_output.par_chunks_exact_mut(tokens.max(1)).zip(rows).for_each(|(y, (row, bias))| {
            for (y, x) in y.iter_mut().zip(x.chunks_exact(self.inputs)) {
                *y = dot(row, x) + bias;
            }
        });
        (0..tokens * outputs).map(|n| by_output[n % outputs * tokens + n / outputs]).collect()
    }
}

/// Eight sums side by side, so that they are computed in vectors.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<8>(), b.as_chunks::<8>());
    let mut sums = [0.0; 8];
    for (a, b) in a.iter().zip(b) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += a * b;
        }
    }
    sums.iter().sum::<f32>() + a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum::<f32>()
}

pub struct Layer<'a> {
    config: &'a Config,
    kind: LayerType,
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    sinks: Vec<f32>,
}

/// Outputs of the layer, `[tokens, hidden]`.
pub struct Outputs {
    /// Of all tokens in one forward pass.
    pub prefill: Vec<f32>,
    /// Of the tokens after the prompt, one by one through the cache.
    pub decode: Vec<f32>,
}

impl<'a> Layer<'a> {
    pub fn load(weights: &mut Weights, config: &'a Config, number: usize) -> Result<Self, String> {
        let &Config { hidden, heads, kv_heads, head_dim, biases, .. } = config;
        let name = |part: &str| format!("model.layers.{number}.self_attn.{part}");
        let (q, kv) = (heads * head_dim, kv_heads * head_dim);
        Ok(Layer {
            config,
            kind: config.layers[number],
            q: Linear::load(weights, &name("q_proj"), [q, hidden], biases)?,
            k: Linear::load(weights, &name("k_proj"), [kv, hidden], biases)?,
            v: Linear::load(weights, &name("v_proj"), [kv, hidden], biases)?,
            o: Linear::load(weights, &name("o_proj"), [hidden, q], biases)?,
            sinks: weights.tensor(&name("sinks"), &[heads])?,
        })
    }

    /// What keeps the keys and values: a ring of the window, or room for all tokens.
    pub fn cache(&self, tokens: usize) -> CacheConfig {
        let &Config { kv_heads, head_dim, .. } = self.config;
        let kind = match self.kind {
            LayerType::Sliding { window } => CacheKind::Rolling { sink_tokens: 0, window, queries: 1 },
            LayerType::Full => CacheKind::Contiguous { capacity: tokens },
        };
        let positions = RotaryPositions::Absolute;
        let rotary = Rotary { dim: head_dim as u32, style: RotaryStyle::HalfSplit, positions };
        CacheConfig::new(kind, 1, kv_heads, head_dim).rotary(rotary)
    }

    /// All tokens at once, then those after the prompt again, one by one.
    pub fn run(
        &self,
        attention: &Attention,
        x: &[f32],
        prompt: usize,
        cos_sin: &[f32],
    ) -> Result<Outputs, Box<dyn Error>> {
        let &Config { hidden, heads, kv_heads, head_dim, .. } = self.config;
        let tokens = x.len() / hidden;
        let (q, k, v) = (self.q.apply(x), self.k.apply(x), self.v.apply(x));

        let options = Options::new().causal(true).sink_logits(SinkLogits::PerHead);
        let options = match self.kind {
            LayerType::Sliding { window } => options.window(Window::keys(window)),
            LayerType::Full => options,
        };
        let shape = Shape { batch: 1, heads, kv_heads, seq_q: tokens, seq_k: tokens, head_dim, value_dim: head_dim };
        let problem = Problem::new(shape, options)?;
        // On the host, so that what the cache rotates is held against another rotation.
        let (mut turned_q, mut turned_k) = (q.clone(), k.clone());
        rotary::rotate(&mut turned_q, heads, head_dim, cos_sin);
        rotary::rotate(&mut turned_k, kv_heads, head_dim, cos_sin);
        let inputs = Inputs::new(&turned_q, &turned_k, &v).sink_logits(&self.sinks[..]);
        let prefill = self.o.apply(&attention.forward(&problem, &inputs)?.o);

        let setup = Setup {
            config: self.cache(tokens),
            heads,
            sink_logits: &self.sinks,
            cos_sin,
            chunk: CHUNK.min(tokens - prompt),
        };
        let mut decoder = Decoder::new(attention, setup)?;
        let (q_row, kv_row) = (heads * head_dim, kv_heads * head_dim);
        let ([k_prompt, k], [v_prompt, v]) = (cut(&k, prompt * kv_row), cut(&v, prompt * kv_row));
        decoder.append(k_prompt, v_prompt)?;
        let steps = decoder.steps(&q[prompt * q_row..], k, v)?;
        Ok(Outputs { prefill, decode: self.o.apply(&steps.o) })
    }
}

fn cut(x: &[f32], at: usize) -> [&[f32]; 2] {
    let (before, after) = x.split_at(at);
    [before, after]
}
