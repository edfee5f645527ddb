//! The stream: token after token is appended to the caches and decoded from them.

use std::error::Error;
use std::ops::Range;

use sink_attention::Attention;

use crate::check::{self, Errors};
use crate::decoder::{Decoder, Setup, Steps};
use crate::model::{HEAD_DIM, HEADS, KV_ROW, MARK, Model, Q_ROW, START, rotary_table};
use crate::policy::{Policy, Settings};
use crate::series::{Measures, Series};

/// Tokens that are recorded before the GPU starts. Results do not depend on it.
pub const CHUNK: usize = 128;

/// What is streamed: a start token and a text, repeated if there are more tokens than bytes.
#[derive(Debug, Clone, Copy)]
pub struct Text<'a> {
    pub bytes: &'a [u8],
    pub tokens: usize,
}

impl Text<'_> {
    pub fn token(&self, t: usize) -> usize {
        t.checked_sub(1).map_or(START, |t| self.bytes[t % self.bytes.len()].into())
    }
}

/// What is fixed for the whole stream.
pub struct Scene<'a> {
    pub model: &'a Model,
    pub text: Text<'a>,
    pub settings: Settings,
    /// Cosines and sines for all places in the largest cache.
    pub table: &'a [f32],
    /// Tokens whose results are held against the definition; sorted.
    pub rows: &'a [usize],
}

/// A table for these policies.
pub fn table(policies: &[Policy], settings: &Settings) -> Vec<f32> {
    rotary_table(policies.iter().map(|policy| policy.most_keys(settings)).max().unwrap_or(0))
}

/// One policy's cache, and what is known of its results.
pub struct Lane<'a> {
    pub policy: Policy,
    pub decoder: Decoder<'a>,
    pub record: Record,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Record {
    pub series: Series,
    /// Of the bits of all results, in the order of tokens.
    pub checksum: u64,
    pub errors: Errors,
    /// Tokens whose results have been held against the definition.
    pub checked: usize,
}

impl Default for Record {
    fn default() -> Self {
        Record { series: Series::default(), checksum: 0xcbf2_9ce4_8422_2325, errors: Errors::default(), checked: 0 }
    }
}

pub struct Stream<'a> {
    pub scene: Scene<'a>,
    pub lanes: Vec<Lane<'a>>,
    /// Tokens that have been streamed.
    pub position: usize,
}

impl<'a> Stream<'a> {
    pub fn new(attention: &Attention, scene: Scene<'a>, policies: &[Policy]) -> Result<Self, Box<dyn Error>> {
        let lane = |&policy: &Policy| -> Result<_, Box<dyn Error>> {
            let config = policy.config(&scene.settings);
            let sink_logits = &scene.model.sink_logits;
            let setup = Setup { config, heads: HEADS, sink_logits, cos_sin: scene.table, chunk: CHUNK };
            Ok(Lane { policy, decoder: Decoder::new(attention, setup)?, record: Record::default() })
        };
        let lanes = policies.iter().map(lane).collect::<Result<Vec<_>, _>>()?;
        Ok(Stream { scene, lanes, position: 0 })
    }

    /// Streams so many tokens more.
    pub fn advance(&mut self, tokens: usize) -> Result<(), Box<dyn Error>> {
        let Scene { model, text, settings, .. } = &self.scene;
        let range = self.position..self.position + tokens;
        let (mut q, mut k, mut v) = (vec![], vec![], vec![]);
        for t in range.clone() {
            let token = text.token(t);
            q.extend_from_slice(model.q(token));
            k.extend_from_slice(model.k(token));
            v.extend_from_slice(&model.v(token, t < settings.sink_tokens));
        }
        let mut results = Vec::new();
        for lane in &mut self.lanes {
            let here = tokens.min(lane.policy.end(settings).saturating_sub(range.start));
            results.push(lane.decoder.steps(&q[..here * Q_ROW], &k[..here * KV_ROW], &v[..here * KV_ROW])?);
        }
        let full = self.lanes.iter().position(|lane| lane.policy == Policy::Full).map(|n| results[n].clone());
        for (lane, steps) in self.lanes.iter_mut().zip(&results) {
            lane.measure(&self.scene, range.clone(), steps, full.as_ref());
            lane.check(&self.scene, range.clone(), steps)?;
        }
        self.position = range.end;
        Ok(())
    }
}

impl Lane<'_> {
    /// Tokens it has room for are not infinitely many.
    pub fn has_ended(&self, scene: &Scene<'_>, position: usize) -> bool {
        position >= self.policy.end(&scene.settings)
    }

    fn measure(&mut self, scene: &Scene<'_>, range: Range<usize>, steps: &Steps, full: Option<&Steps>) {
        let rows = steps.o.chunks_exact(Q_ROW).zip(steps.lse.chunks_exact(HEADS));
        for (i, (t, (o, lse))) in range.zip(rows).enumerate() {
            let full = full.and_then(|full| full.o.get(i * Q_ROW..(i + 1) * Q_ROW));
            self.record.series.push(t, &measures(o, lse, &scene.model.sink_logits, full));
            let words = o.iter().chain(lse).map(|x| u64::from(x.to_bits()));
            self.record.checksum =
                words.fold(self.record.checksum, |sum, word| (sum ^ word).wrapping_mul(0x0100_0000_01b3));
        }
    }

    fn check(&mut self, scene: &Scene<'_>, range: Range<usize>, steps: &Steps) -> sink_attention::Result<()> {
        let computed = range.start..range.start + steps.lse.len() / HEADS;
        let from = scene.rows.partition_point(|t| *t < computed.start);
        for &t in scene.rows[from..].iter().take_while(|t| computed.contains(t)) {
            let i = t - computed.start;
            let (o, lse) = (&steps.o[i * Q_ROW..][..Q_ROW], &steps.lse[i * HEADS..][..HEADS]);
            let errors = check::against_reference(scene, self.policy, t, o, lse)?;
            self.record.errors = self.record.errors.worst(errors);
            self.record.checked += 1;
        }
        Ok(())
    }
}

/// Of one token, means over heads.
fn measures(o: &[f32], lse: &[f32], sink_logits: &[f32], full: Option<&[f32]>) -> Measures {
    let of_heads = |x: f64| x / HEADS as f64;
    // All but the mark.
    let values = |o: &[f32]| {
        let heads = o.chunks_exact(HEAD_DIM).flat_map(|head| &head[..MARK]);
        heads.map(|x| f64::from(*x)).collect::<Vec<_>>()
    };
    let square = |values: &[f64]| of_heads(values.iter().map(|x| x * x).sum::<f64>() / MARK as f64);
    let here = values(o);
    let full = full.map(values);
    let difference = full.as_ref().map(|full| here.iter().zip(full).map(|(a, b)| a - b).collect::<Vec<_>>());
    Measures {
        size: square(&here),
        first: of_heads(o.chunks_exact(HEAD_DIM).map(|head| f64::from(head[MARK])).sum()),
        logit: of_heads(sink_logits.iter().zip(lse).map(|(sink, lse)| f64::from(sink - lse).exp()).sum()),
        difference: difference.map_or(0.0, |difference| square(&difference)),
        full: full.map_or(0.0, |full| square(&full)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::TOLERANCE;

    pub const BYTES: &[u8] = b"It is not down on any map; true places never are. ";
    const TOKENS: usize = 150;
    const SETTINGS: Settings = Settings { window: 16, sink_tokens: 4, capacity: 70 };

    fn records(settings: Settings, chunk: usize, check: impl Fn(&mut Scene<'_>)) -> Vec<Record> {
        let (model, rows) = (Model::new(3), (0..TOKENS).collect::<Vec<_>>());
        let (text, table) = (Text { bytes: BYTES, tokens: TOKENS }, table(&Policy::ALL, &settings));
        let scene = Scene { model: &model, text, settings, table: &table, rows: &rows };
        let mut stream = Stream::new(&Attention::cpu(), scene, &Policy::ALL).unwrap();
        check(&mut stream.scene);
        while stream.position < TOKENS {
            stream.advance(chunk.min(TOKENS - stream.position)).unwrap();
        }
        stream.lanes.into_iter().map(|lane| lane.record).collect()
    }

    #[test]
    fn every_policy_follows_the_definition_in_any_chunks() {
        for (window, sink_tokens) in [(16, 4), (1, 0), (3, 9), (100, 4)] {
            let settings = Settings { window, sink_tokens, ..SETTINGS };
            let whole = records(settings, TOKENS, |_| ());
            for chunk in [1, 64] {
                assert_eq!(records(settings, chunk, |_| ()), whole, "the same bits");
            }
            for (record, checked) in whole.iter().zip([TOKENS, TOKENS, 70]) {
                assert_eq!(record.checked, checked);
                assert!(record.errors.within(TOLERANCE), "{settings:?}: {:?}", record.errors);
            }
        }
    }

    #[test]
    fn the_check_sees_a_key_too_few() {
        for wrong in [Settings { window: 15, ..SETTINGS }, Settings { sink_tokens: 3, ..SETTINGS }] {
            // The caches are made for other settings than the definition is given.
            let records = records(wrong, 64, |scene| scene.settings = SETTINGS);
            assert!(!records[0].errors.within(TOLERANCE), "{wrong:?}: {:?}", records[0].errors);
        }
    }

    #[test]
    fn sinks_change_what_they_should() {
        let records = records(SETTINGS, 64, |_| ());
        let [sinks, window, full] = [0, 1, 2].map(|n| records[n].series.after(SETTINGS.window + 4).unwrap().measures);
        // The first tokens get most of the probability where they are there, and are gone where they are not.
        assert!(sinks.first > 0.5 && full.first > 0.5, "{sinks:?} {full:?}");
        assert!(window.first < 1e-6 && window.size > 4.0 * sinks.size, "{window:?} {sinks:?}");
        // Nearer to full attention with them than without.
        assert!(sinks.difference * 4.0 < window.difference && full.difference == 0.0, "{sinks:?} {window:?}");
    }

    #[test]
    fn shares_of_the_probability_sum_to_one() {
        // Where every token is a first one, the rest is the sink logit's.
        let settings = Settings { window: 1, sink_tokens: 1000, capacity: 1 };
        let total = records(settings, 64, |_| ())[0].series.after(0).unwrap().measures;
        assert!(total.logit > 0.0 && total.first > 0.0);
        approx::assert_abs_diff_eq!(total.logit + total.first, 1.0, epsilon = 1e-5);
    }
}
