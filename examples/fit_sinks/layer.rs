//! The layer that teaches and learns: projections on the host, attention by the crate, and the gradients of both.

use rand::RngExt;
use rand::rngs::StdRng;
use sink_attention::{Attention, Inputs, Output, Problem, Result, Upstream};

use crate::matrix;

/// What a layer knows; also a gradient, or whatever else has a number for each of these numbers.
#[derive(Debug, Clone, PartialEq)]
pub struct Weights {
    /// `[embedding, heads * width]`: x times this is q in the layout `bshd`.
    pub w_q: Vec<f32>,
    /// `[embedding, kv_heads * width]`
    pub w_k: Vec<f32>,
    /// `[embedding, kv_heads * width]`
    pub w_v: Vec<f32>,
    /// `[heads]`
    pub sink_logits: Vec<f32>,
}

impl Weights {
    pub fn zeros(problem: &Problem, embedding: usize) -> Self {
        let shape = problem.shape();
        Weights {
            w_q: vec![0.0; embedding * shape.heads * shape.head_dim],
            w_k: vec![0.0; embedding * shape.kv_heads * shape.head_dim],
            w_v: vec![0.0; embedding * shape.kv_heads * shape.value_dim],
            sink_logits: vec![0.0; shape.heads],
        }
    }

    /// Random projections that keep the variance of what they project; sink logits of zero.
    pub fn random(problem: &Problem, embedding: usize, rng: &mut StdRng) -> Self {
        let mut weights = Weights::zeros(problem, embedding);
        let bound = (3.0 / embedding as f32).sqrt();
        for w in [&mut weights.w_q, &mut weights.w_k, &mut weights.w_v] {
            w.fill_with(|| rng.random_range(-bound..bound));
        }
        weights
    }

    pub fn tensors(&self) -> [&[f32]; 4] {
        [&self.w_q, &self.w_k, &self.w_v, &self.sink_logits]
    }

    pub fn tensors_mut(&mut self) -> [&mut [f32]; 4] {
        [&mut self.w_q, &mut self.w_k, &mut self.w_v, &mut self.sink_logits]
    }
}

/// Attention over projected embeddings.
pub struct Layer<'a> {
    pub attention: &'a Attention,
    pub problem: Problem,
    /// Width of an embedding.
    pub embedding: usize,
}

/// A forward pass, with what its backward pass needs.
pub struct Pass {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    pub output: Output,
}

impl Layer<'_> {
    /// Attention among the embeddings `x`, `[batch, sequence, embedding]`.
    pub fn forward(&self, weights: &Weights, x: &[f32]) -> Result<Pass> {
        let [q, k, v] = [&weights.w_q, &weights.w_k, &weights.w_v].map(|w| matrix::product(x, w, self.embedding));
        let inputs = Inputs::new(&q, &k, &v).sink_logits(&weights.sink_logits[..]);
        let output = self.attention.forward(&self.problem, &inputs)?;
        Ok(Pass { q, k, v, output })
    }

    /// The gradient by the weights.
    pub fn backward(&self, weights: &Weights, x: &[f32], pass: &Pass, upstream: &Upstream<'_>) -> Result<Weights> {
        let inputs = Inputs::new(&pass.q, &pass.k, &pass.v).sink_logits(&weights.sink_logits[..]);
        let gradients = self.attention.backward(&self.problem, &inputs, &pass.output, upstream)?;
        let [w_q, w_k, w_v] = [&gradients.d_q, &gradients.d_k, &gradients.d_v]
            .map(|d_y| matrix::transposed_product(x, d_y, self.embedding));
        let sink_logits = gradients.d_sink_logits.expect("the problem has sink logits");
        Ok(Weights { w_q, w_k, w_v, sink_logits })
    }
}
