//! The stream: chunk after chunk of tokens through attention over the cache.

use std::time::Instant;

use sink_attention::{Attention, Inputs, Options, Problem, Result, Shape, SinkLogits, Window};

use crate::cache::Cache;
use crate::check::Row;
use crate::model::{HEAD_DIM, HEADS, KV_HEADS, KV_ROW, Model, Q_ROW, Rotary, dot};
use crate::picture::{Point, Shares};

/// The share of the sink tokens is computed on the host, for every 32nd row of a chunk, from its first.
const SHARE_STEP: usize = 32;

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Settings {
    /// Keys in the window, the query's own included.
    pub window: usize,
    pub sink_tokens: usize,
    /// Tokens to a call.
    pub chunk: usize,
}

impl Settings {
    /// What the cache holds between chunks.
    pub fn most_keys(&self) -> usize {
        self.sink_tokens + self.window
    }

    /// The mask and the softmax, the same for the cache as for the full sequence.
    pub fn options(&self) -> Options {
        Options::new()
            .causal(true)
            .window(Window::keys(self.window))
            .sink_tokens(self.sink_tokens)
            .sink_logits(SinkLogits::PerHead)
    }
}

/// What is streamed: a text, repeated if there are more tokens than bytes.
pub struct Text<'a> {
    pub bytes: &'a [u8],
    pub tokens: usize,
}

impl Text<'_> {
    pub fn byte(&self, t: usize) -> u8 {
        self.bytes[t % self.bytes.len()]
    }
}

/// What is known after a chunk.
pub struct Chunk {
    pub point: Point,
    pub keys_held: usize,
}

/// Streams the text and returns the results of `rows`, which must be sorted.
pub fn run(
    attention: &Attention,
    model: &Model,
    text: &Text,
    settings: &Settings,
    rows: &[usize],
    mut on_chunk: impl FnMut(Chunk),
) -> Result<Vec<Row>> {
    let rotary = Rotary::new();
    let mut cache = Cache::new(settings);
    let mut q = vec![0.0; settings.chunk * Q_ROW];
    let mut kept = Vec::with_capacity(rows.len());
    for start in (0..text.tokens).step_by(settings.chunk) {
        let began = Instant::now();
        let end = text.tokens.min(start + settings.chunk);
        let q = &mut q[..(end - start) * Q_ROW];
        for (t, q) in (start..end).zip(q.chunks_exact_mut(Q_ROW)) {
            let (byte, rotation) = (text.byte(t), rotary.at(t));
            model.write_q(byte, &rotation, q);
            model.write_k(byte, &rotation, cache.append(model.v(byte)));
        }

        // Aligned bottom-right, the default: the last query stands at the last key.
        let shape = Shape {
            batch: 1,
            heads: HEADS,
            kv_heads: KV_HEADS,
            seq_q: end - start,
            seq_k: cache.len(),
            head_dim: HEAD_DIM,
            value_dim: HEAD_DIM,
        };
        let problem = Problem::new(shape, settings.options())?;
        let inputs = Inputs::new(q, cache.k(), cache.v()).sink_logits(&model.sink_logits[..]);
        let output = attention.forward(&problem, &inputs)?;
        let seconds = began.elapsed().as_secs_f64();

        let wanted = rows.iter().skip(kept.len()).take_while(|&&t| t < end);
        kept.extend(wanted.map(|&t| Row {
            position: t,
            o: output.o[(t - start) * Q_ROW..][..Q_ROW].to_vec(),
            lse: output.lse.iter().skip(t - start).step_by(end - start).copied().collect(),
        }));
        let shares = Shares {
            logit: logit_share(&model.sink_logits, &output.lse),
            sink_tokens: sink_token_share(&problem, &inputs, &output.lse, start),
        };
        cache.evict();
        on_chunk(Chunk { point: Point { tokens: start..end, seconds, shares }, keys_held: cache.len() });
    }
    Ok(kept)
}

/// The mean of exp(sink_logit - lse) over all rows and heads: the probability that goes to no value.
fn logit_share(sink_logits: &[f32], lse: &[f32]) -> f64 {
    let rows = lse.len() / HEADS;
    let heads = sink_logits.iter().zip(lse.chunks_exact(rows));
    let sum: f64 = heads.flat_map(|(&sink, lse)| lse.iter().map(move |lse| f64::from(sink - lse).exp())).sum();
    sum / lse.len() as f64
}

/// The mean over some rows, and all heads, of the probability that goes to the sink tokens.
fn sink_token_share(problem: &Problem, inputs: &Inputs<'_>, lse: &[f32], start: usize) -> f64 {
    let (rows, group) = (problem.shape().seq_q, problem.group());
    let (mut sum, mut terms) = (0.0, 0);
    for i in (0..rows).step_by(SHARE_STEP) {
        // The cache's first keys are the stream's first tokens; the first rows do not see all of them yet.
        let sink_tokens = problem.options().sink_tokens.min(start + i + 1);
        for h in 0..HEADS {
            let q = &inputs.q[i * Q_ROW + h * HEAD_DIM..][..HEAD_DIM];
            let keys = inputs.k.chunks_exact(KV_ROW).take(sink_tokens);
            let scores = keys.map(|k| f64::from(problem.scale()) * dot(q, &k[h / group * HEAD_DIM..][..HEAD_DIM]));
            let lse = f64::from(lse[h * rows + i]);
            sum += scores.map(|s| (s - lse).exp()).sum::<f64>();
            terms += 1;
        }
    }
    sum / f64::from(terms)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{self, TOLERANCE};

    const TEXT: Text = Text { bytes: b"It is not down on any map; true places never are. ", tokens: 200 };

    fn stream(settings: &Settings, mut on_chunk: impl FnMut(Chunk)) -> (Model, Vec<Row>) {
        let (model, rows) = (Model::new(3), (0..TEXT.tokens).collect::<Vec<_>>());
        let kept = run(&Attention::cpu(), &model, &TEXT, settings, &rows, &mut on_chunk).unwrap();
        assert_eq!(kept.len(), TEXT.tokens);
        (model, kept)
    }

    #[test]
    fn any_chunks_give_the_full_masked_sequence() {
        for chunk in [1, 7, 64, 1000] {
            for (window, sink_tokens) in [(16, 4), (1, 0), (3, 9), (1000, 4)] {
                let settings = Settings { window, sink_tokens, chunk };
                let mut next = 0;
                let (model, kept) = stream(&settings, |chunk| {
                    assert_eq!(chunk.point.tokens.start, next);
                    next = chunk.point.tokens.end;
                    assert_eq!(chunk.keys_held, next.min(settings.most_keys()));
                });
                assert_eq!(next, TEXT.tokens);
                let errors = check::against_reference(&kept, &model, &TEXT, &settings).unwrap();
                assert!(errors.within(TOLERANCE), "{settings:?}: {errors:?}");
            }
        }
    }

    #[test]
    fn shares_of_the_probability_sum_to_one() {
        // Where every key is a sink token, the rest is the sink logit's; a chunk of one row leaves none out.
        stream(&Settings { window: 1, sink_tokens: 1000, chunk: 1 }, |chunk| {
            let Shares { logit, sink_tokens } = chunk.point.shares;
            assert!(logit > 0.0 && sink_tokens > 0.0);
            approx::assert_abs_diff_eq!(logit + sink_tokens, 1.0, epsilon = 1e-5);
        });
    }

    #[test]
    fn the_check_sees_a_key_too_few() {
        let settings = Settings { window: 16, sink_tokens: 4, chunk: 7 };
        for wrong in [Settings { window: 15, ..settings }, Settings { sink_tokens: 3, ..settings }] {
            let (model, kept) = stream(&wrong, |_| {});
            let errors = check::against_reference(&kept, &model, &TEXT, &settings).unwrap();
            assert!(!errors.within(TOLERANCE), "{wrong:?}: {errors:?}");
        }
    }
}
