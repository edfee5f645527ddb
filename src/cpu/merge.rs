//! Merges partial states into one, in f32 with weights in f64. Twin of shaders/merge.wgsl.

use rayon::prelude::*;

use super::reference::Denominator;
use super::rows::rows;
use crate::problem::element::Element;
use crate::problem::error::Result;
use crate::problem::host::PartialState;
use crate::problem::{Layout, Output, Problem, SinkLogits};

/// Merges partial states of a problem, each of another shard of its keys, on all cores of the CPU. See
/// [`Attention::merge`](crate::Attention::merge).
///
/// # Errors
/// Those of [`Problem::check_state`].
pub fn merge(problem: &Problem, states: &[&PartialState]) -> Result<PartialState> {
    states.iter().try_for_each(|state| problem.check_state(state))?;
    Ok(merge_with(problem, states, |_| None))
}

/// Applies the sink logits, once, to a state of all keys. See [`Attention::finish`](crate::Attention::finish).
///
/// # Errors
/// Those of [`Problem::check_finish`].
pub fn finish<T: Element>(problem: &Problem, state: &PartialState, sink_logits: Option<&[f32]>) -> Result<Output<T>> {
    problem.check_finish::<T>(state, sink_logits)?;
    let sink = |head: usize| match problem.options().sink_logits {
        SinkLogits::None => None,
        SinkLogits::OffByOne => Some(0.0),
        SinkLogits::PerHead => sink_logits.map(|sink_logits| sink_logits[head].into()),
    };
    Ok(merge_with(problem, &[state], sink).narrow())
}

impl PartialState {
    /// The state as the results of a forward pass.
    pub(crate) fn narrow<T: Element>(self) -> Output<T> {
        let o_lo = T::DTYPE.has_rounding_error().then(|| self.o.par_iter().map(|&o| T::lo(o)).collect());
        Output { o: T::narrow(self.o), o_lo, lse: self.lse }
    }
}

fn merge_with(problem: &Problem, states: &[&PartialState], sink: impl Fn(usize) -> Option<f64> + Sync) -> PartialState {
    let (s, layout) = (problem.shape(), problem.options().layout);
    // The denominator of a row of lse, which is `[batch, heads, seq_q]` in every layout.
    let denominator = |n: usize| {
        let (batch, head, i) = (n / s.seq_q / s.heads, n / s.seq_q % s.heads, n % s.seq_q);
        // A row beyond the end of a padded sequence has no sink logit.
        let counts = layout == Layout::Thd || i < problem.sequence(batch).band.seq_q();
        let sink = if counts { sink(head) } else { None };
        // A state that has seen nothing has no share, whatever its o holds. The share of a state of exp(inf) is unknown: NaN.
        let terms = states.iter().map(|state| f64::from(state.lse[n])).chain(sink);
        Denominator::new(terms.filter(|lse| *lse != f64::NEG_INFINITY).map(|lse| (lse, 1.0)))
    };
    let denominators: Vec<Denominator> =
        (0..s.batch * s.heads * s.seq_q).into_par_iter().with_min_len(64).map(denominator).collect();
    let mut o = vec![0.0; denominators.len() * s.value_dim];
    let place = rows(layout, s.heads, s.seq_q);
    o.par_chunks_exact_mut(s.value_dim).with_min_len(64).enumerate().for_each(|(row, o)| {
        let [batch, head, i] = place(row);
        let n = (batch * s.heads + head) * s.seq_q + i;
        for state in states.iter().filter(|state| state.lse[n] != f32::NEG_INFINITY) {
            let weight = denominators[n].weight(state.lse[n].into()) as f32;
            let part = &state.o[row * s.value_dim..][..s.value_dim];
            o.iter_mut().zip(part).for_each(|(o, part)| *o += weight * part);
        }
    });
    let maxima: Option<Vec<&[f32]>> = states.iter().map(|state| state.row_max.as_deref()).collect();
    let row_max = maxima.map(|maxima| {
        let seen = |n: usize| states.iter().zip(&maxima).filter(move |(state, _)| state.lse[n] != f32::NEG_INFINITY);
        let larger = |a: f32, b: f32| if a.is_nan() || b.is_nan() { f32::NAN } else { a.max(b) };
        let row = |n: usize| seen(n).map(|(_, maxima)| maxima[n]).fold(f32::NEG_INFINITY, larger);
        (0..denominators.len()).into_par_iter().with_min_len(64).map(row).collect()
    });
    PartialState { o, lse: denominators.iter().map(|denominator| denominator.log() as f32).collect(), row_max }
}
