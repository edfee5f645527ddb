//! Partial states: the results of shards of the keys, to be merged.

use std::ops::Range;

use rayon::prelude::*;

use crate::attention::{Attention, HostBuffers};
use crate::cpu;
use crate::exec::buffers::{ForwardBuffers, MergeBuffers};
use crate::exec::prepared::Prepared;
use crate::kernel::Binding;
use crate::problem::element::{DType, Element};
use crate::problem::error::{Error, Result};
use crate::problem::{Gradients, Inputs, Output, PartialState, Problem, Upstream};

impl PartialState {
    /// The results of a forward pass, unrounded.
    fn of<T: Element>((output, row_max): (Output<T>, Option<Vec<f32>>)) -> Self {
        let o = match &output.o_lo {
            Some(o_lo) => output.o.par_iter().zip(o_lo).map(|(o, &rest)| o.with_lo(rest)).collect(),
            None => T::widen(&output.o).into_owned(),
        };
        PartialState { o, lse: output.lse, row_max }
    }
}

/// Calls on shards of the keys. `problem` is the whole problem, of which `keys` names the shard, along the sequence
/// axis of k and v, see [`Problem::shard`]; k, v, bias and mask are those of the shard alone. A shard may be empty.
impl Attention {
    /// The forward pass of a shard of the keys, without the sink logit; blocks until the result is there.
    ///
    /// ```
    /// use sink_attention::{Attention, Inputs, Options, Problem, Shape, SinkLogits, Window};
    ///
    /// // Two queries at the end of five keys, in shards of three and two.
    /// let shape = Shape { batch: 1, heads: 1, kv_heads: 1, seq_q: 2, seq_k: 5, head_dim: 1, value_dim: 1 };
    /// let options = Options::new().window(Window::keys(3)).sink_tokens(1).sink_logits(SinkLogits::PerHead);
    /// let problem = Problem::new(shape, options)?;
    /// let (q, k, v) = ([1.0, 2.0], [0.1, 0.2, 0.3, 0.4, 0.5], [1.0, 2.0, 3.0, 4.0, 5.0]);
    /// let sink_logits = &[0.5][..];
    ///
    /// let attention = Attention::cpu();
    /// let first = attention.attend_partial(&problem, 0..3, &Inputs::new(&q, &k[..3], &v[..3]))?;
    /// let second = attention.attend_partial(&problem, 3..5, &Inputs::new(&q, &k[3..], &v[3..]))?;
    /// let state = attention.merge(&problem, &[&first, &second])?;
    /// let output = attention.finish::<f32>(&problem, &state, Some(sink_logits))?;
    ///
    /// let whole = attention.forward(&problem, &Inputs::new(&q, &k, &v).sink_logits(sink_logits))?;
    /// assert!((output.lse[1] - whole.lse[1]).abs() < 1e-6);
    /// assert!((output.o[1] - whole.o[1]).abs() < 1e-6);
    /// # Ok::<(), sink_attention::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::InvalidShard`]; [`Error::UnexpectedOperand`] for sink logits; those of [`forward`](Self::forward).
    #[cfg(not(target_family = "wasm"))]
    pub fn attend_partial<T: Element>(
        &self,
        problem: &Problem,
        keys: Range<usize>,
        inputs: &Inputs<'_, T>,
    ) -> Result<PartialState> {
        pollster::block_on(self.attend_partial_async(problem, keys, inputs))
    }

    /// As [`attend_partial`](Self::attend_partial), for browsers and async hosts.
    ///
    /// # Errors
    /// As [`attend_partial`](Self::attend_partial).
    pub async fn attend_partial_async<T: Element>(
        &self,
        problem: &Problem,
        keys: Range<usize>,
        inputs: &Inputs<'_, T>,
    ) -> Result<PartialState> {
        self.attend_shard(problem, keys, inputs, false).await
    }

    /// As [`attend_partial`](Self::attend_partial), with [`PartialState::row_max`], see
    /// [`forward_with_row_max`](Self::forward_with_row_max). A merge of states with row_max has the row_max of all their keys.
    ///
    /// # Errors
    /// As [`attend_partial`](Self::attend_partial).
    #[cfg(not(target_family = "wasm"))]
    pub fn attend_partial_with_row_max<T: Element>(
        &self,
        problem: &Problem,
        keys: Range<usize>,
        inputs: &Inputs<'_, T>,
    ) -> Result<PartialState> {
        pollster::block_on(self.attend_partial_with_row_max_async(problem, keys, inputs))
    }

    /// As [`attend_partial_with_row_max`](Self::attend_partial_with_row_max), for browsers and async hosts.
    ///
    /// # Errors
    /// As [`attend_partial`](Self::attend_partial).
    pub async fn attend_partial_with_row_max_async<T: Element>(
        &self,
        problem: &Problem,
        keys: Range<usize>,
        inputs: &Inputs<'_, T>,
    ) -> Result<PartialState> {
        self.attend_shard(problem, keys, inputs, true).await
    }

    async fn attend_shard<T: Element>(
        &self,
        problem: &Problem,
        keys: Range<usize>,
        inputs: &Inputs<'_, T>,
        has_row_max: bool,
    ) -> Result<PartialState> {
        check_without_sinks(inputs.sink_logits.is_some())?;
        problem.check_shard(&keys)?;
        if keys.is_empty() {
            problem.check_no_keys(inputs)?;
            return Ok(PartialState::empty(problem));
        }
        let shard = problem.shard(keys)?.without_sink_logits();
        Ok(PartialState::of(self.forward_whole(&shard, inputs, has_row_max).await?))
    }

    /// Merges states of disjoint shards into the state of all their keys, in any order and number, as
    /// [`PartialState`] says; none give the [empty](PartialState::empty) state. Blocks until the result is there. The
    /// same states in the same order give the same bits.
    ///
    /// # Errors
    /// Those of [`Problem::check_state`]; on a GPU those of [`prepare_merge`](Self::prepare_merge) and
    /// [`Error::BufferTooLarge`]: all states lie in one buffer there, which one dispatch binds.
    #[cfg(not(target_family = "wasm"))]
    pub fn merge(&self, problem: &Problem, states: &[&PartialState]) -> Result<PartialState> {
        pollster::block_on(self.merge_async(problem, states))
    }

    /// As [`merge`](Self::merge), for browsers and async hosts.
    ///
    /// # Errors
    /// As [`merge`](Self::merge).
    pub async fn merge_async(&self, problem: &Problem, states: &[&PartialState]) -> Result<PartialState> {
        states.iter().try_for_each(|state| problem.check_state(state))?;
        if !self.is_gpu() {
            self.check_cpu()?;
            return cpu::merge(problem, states);
        }
        if states.is_empty() {
            return Ok(PartialState::empty(problem));
        }
        self.merge_states(&problem.merging(states.len(), DType::F32, false)?, states, None, true).await
    }

    /// Applies the sink logits to the state of all keys, once, as the options of the problem say: the results of the
    /// forward pass. Blocks until they are there.
    ///
    /// ```text
    /// lse' = log(exp(lse) + exp(sink_logit)),  o' = o exp(lse - lse')
    /// ```
    ///
    /// # Errors
    /// Those of [`Problem::check_finish`]; on a GPU those of [`merge`](Self::merge).
    #[cfg(not(target_family = "wasm"))]
    pub fn finish<T: Element>(
        &self,
        problem: &Problem,
        state: &PartialState,
        sink_logits: Option<&[f32]>,
    ) -> Result<Output<T>> {
        pollster::block_on(self.finish_async(problem, state, sink_logits))
    }

    /// As [`finish`](Self::finish), for browsers and async hosts.
    ///
    /// # Errors
    /// As [`finish`](Self::finish).
    pub async fn finish_async<T: Element>(
        &self,
        problem: &Problem,
        state: &PartialState,
        sink_logits: Option<&[f32]>,
    ) -> Result<Output<T>> {
        problem.check_finish::<T>(state, sink_logits)?;
        if !self.is_gpu() {
            self.check_cpu()?;
            return cpu::finish(problem, state, sink_logits);
        }
        // The state has row_max already.
        Ok(self.merge_states(&problem.merging(1, DType::F32, true)?, &[state], sink_logits, false).await?.narrow())
    }

    /// The backward pass of a shard of the keys, from the results of the whole forward pass: its d_k and d_v (and
    /// d_bias), and its part of d_q (and of d_alibi_slopes), which sum over the shards to those of the whole. Blocks
    /// until the result is there.
    ///
    /// The gradient by the sink logits has no shards: give them with one shard, whichever, and its gradients hold it;
    /// with the others leave them out. In half precision each part of d_q is rounded, and `saved` must hold o_lo,
    /// without which delta, the same for all shards, is not known.
    ///
    /// # Errors
    /// [`Error::InvalidShard`]; [`Error::MissingOperand`] for o_lo; those of [`backward`](Self::backward).
    #[cfg(not(target_family = "wasm"))]
    pub fn backward_partial<T: Element>(
        &self,
        problem: &Problem,
        keys: Range<usize>,
        inputs: &Inputs<'_, T>,
        saved: &Output<T>,
        upstream: &Upstream<'_, T>,
    ) -> Result<Gradients<T>> {
        pollster::block_on(self.backward_partial_async(problem, keys, inputs, saved, upstream))
    }

    /// As [`backward_partial`](Self::backward_partial), for browsers and async hosts.
    ///
    /// # Errors
    /// As [`backward_partial`](Self::backward_partial).
    pub async fn backward_partial_async<T: Element>(
        &self,
        problem: &Problem,
        keys: Range<usize>,
        inputs: &Inputs<'_, T>,
        saved: &Output<T>,
        upstream: &Upstream<'_, T>,
    ) -> Result<Gradients<T>> {
        problem.check_shard(&keys)?;
        if T::DTYPE.has_rounding_error() && saved.o_lo.is_none() {
            return Err(Error::MissingOperand { operand: "o_lo" });
        }
        let sinks = |shard: Problem| if inputs.sink_logits.is_some() { shard } else { shard.without_sink_logits() };
        if !keys.is_empty() {
            return self.backward_async(&sinks(problem.shard(keys)?), inputs, saved, upstream).await;
        }
        problem.check_no_keys(inputs)?;
        // Beside a key that no query sees, there is what no key takes part in.
        let hidden = sinks(problem.with_hidden_key()?);
        let [k, v] = [hidden.k_shape(), hidden.v_shape()].map(|shape| vec![T::default(); shape.iter().product()]);
        let beside = Inputs::new(inputs.q, &k, &v).sink_logits(inputs.sink_logits);
        let gradients = self.backward_async(&hidden, &beside, saved, upstream).await?;
        Ok(Gradients {
            d_k: Vec::new(),
            d_v: Vec::new(),
            d_alibi_slopes: problem.options().alibi.then(|| vec![0.0; problem.shape().heads]),
            d_bias: problem.options().bias.map(|_| Vec::new()),
            ..gradients
        })
    }

    /// Prepares the forward pass of a shard of the keys on buffers of the caller's, without the sink logit. In f16
    /// and bf16 the state's o is rounded; together with o_lo it is that in f32. That is the forward pass of
    /// [`Problem::shard`] [`without_sink_logits`](Problem::without_sink_logits), as the backward pass of a shard is
    /// [`prepare_backward`](Self::prepare_backward) of it, with the final o, o_lo and lse; with the sink logits for
    /// one of the shards.
    ///
    /// # Errors
    /// [`Error::InvalidShard`]; [`Error::ZeroDimension`] for no keys; [`Error::UnexpectedOperand`] for sink logits;
    /// those of [`prepare_forward`](Self::prepare_forward).
    #[cfg(not(target_family = "wasm"))]
    pub fn prepare_partial(
        &self,
        problem: &Problem,
        keys: Range<usize>,
        buffers: &ForwardBuffers<'_>,
    ) -> Result<Prepared> {
        pollster::block_on(self.prepare_partial_async(problem, keys, buffers))
    }

    /// As [`prepare_partial`](Self::prepare_partial), for browsers and async hosts.
    ///
    /// # Errors
    /// As [`prepare_partial`](Self::prepare_partial).
    pub async fn prepare_partial_async(
        &self,
        problem: &Problem,
        keys: Range<usize>,
        buffers: &ForwardBuffers<'_>,
    ) -> Result<Prepared> {
        check_without_sinks(buffers.sink_logits.is_some())?;
        self.prepare_forward_async(&problem.shard(keys)?.without_sink_logits(), buffers).await
    }

    /// Prepares a merge of `states` partial states on buffers of the caller's, without the sink logit: one kernel,
    /// which reads each state once.
    ///
    /// # Errors
    /// [`Error::ZeroDimension`] for no states; [`Error::UnexpectedOperand`] for sink logits;
    /// [`Error::BindingTooLarge`] where the states' rows of one head, from the first state to the last, exceed a
    /// binding; those of [`prepare_forward`](Self::prepare_forward).
    #[cfg(not(target_family = "wasm"))]
    pub fn prepare_merge(&self, problem: &Problem, states: usize, buffers: &MergeBuffers<'_>) -> Result<Prepared> {
        pollster::block_on(self.prepare_merge_async(problem, states, buffers))
    }

    /// As [`prepare_merge`](Self::prepare_merge), for browsers and async hosts.
    ///
    /// # Errors
    /// As [`prepare_merge`](Self::prepare_merge).
    pub async fn prepare_merge_async(
        &self,
        problem: &Problem,
        states: usize,
        buffers: &MergeBuffers<'_>,
    ) -> Result<Prepared> {
        check_without_sinks(buffers.sink_logits.is_some())?;
        let merging = problem.merging(states, problem.options().dtype, false)?;
        self.prepare_merging("prepare_merge", &merging, buffers).await
    }

    /// Prepares the last merge, of all of a problem's states or of one that is already merged: with the sink logits,
    /// once, as the options of the problem say.
    ///
    /// # Errors
    /// As [`prepare_merge`](Self::prepare_merge), but [`Error::MissingOperand`] where the options ask for sink logits.
    #[cfg(not(target_family = "wasm"))]
    pub fn prepare_finish(&self, problem: &Problem, states: usize, buffers: &MergeBuffers<'_>) -> Result<Prepared> {
        pollster::block_on(self.prepare_finish_async(problem, states, buffers))
    }

    /// As [`prepare_finish`](Self::prepare_finish), for browsers and async hosts.
    ///
    /// # Errors
    /// As [`prepare_finish`](Self::prepare_finish).
    pub async fn prepare_finish_async(
        &self,
        problem: &Problem,
        states: usize,
        buffers: &MergeBuffers<'_>,
    ) -> Result<Prepared> {
        let merging = problem.merging(states, problem.options().dtype, true)?;
        self.prepare_merging("prepare_finish", &merging, buffers).await
    }

    /// Merges partial states on the GPU, all f32, by a problem whose keys they are; their row_max, too, where it is wanted and all
    /// have it.
    async fn merge_states(
        &self,
        merging: &Problem,
        states: &[&PartialState],
        sink_logits: Option<&[f32]>,
        has_row_max: bool,
    ) -> Result<PartialState> {
        let (device, _) = self.gpu("merge_states")?;
        let maxima: Option<Vec<&[f32]>> = states.iter().map(|state| state.row_max.as_deref()).collect();
        let maxima = maxima.filter(|_| has_row_max);
        let stacked = |of: fn(&PartialState) -> &[f32]| states.iter().flat_map(|state| of(state)).copied().collect();
        let [o, lse]: [Vec<f32>; 2] = [stacked(|state| &state.o), stacked(|state| &state.lse)];
        let maxima = maxima.map(|maxima| maxima.concat());
        let row_max = maxima.as_ref().map(|_| Binding::RowMax);
        let create = || {
            let operands = [
                (Binding::States, Some(&o[..])),
                (Binding::StatesLse, Some(&lse)),
                (Binding::StatesRowMax, maxima.as_deref()),
                (Binding::SinkLogits, sink_logits),
            ];
            let operands = operands.map(|(binding, numbers)| (binding, numbers.map(bytemuck::cast_slice)));
            HostBuffers::new(device)
                .upload(operands)?
                .results(merging, [Binding::O, Binding::Lse].into_iter().chain(row_max))
        };
        let buffers = device.scoped_async("uploading partial states", create).await??;
        let merged = MergeBuffers {
            states: buffers.given(Binding::States)?,
            states_lo: None,
            states_lse: buffers.given(Binding::StatesLse)?,
            sink_logits: buffers.view(Binding::SinkLogits),
            o: buffers.given(Binding::O)?,
            o_lo: None,
            lse: buffers.given(Binding::Lse)?,
            states_row_max: buffers.view(Binding::StatesRowMax),
            row_max: buffers.view(Binding::RowMax),
        };
        let prepared = self.prepare_merging("merge", merging, &merged).await?;
        let results = buffers.download(|encoder| prepared.encode(encoder)).await?;
        let Output { o, lse, .. } = results.output().await?;
        Ok(PartialState { o, lse, row_max: results.optional(Binding::RowMax).await? })
    }

    /// Prepares a merge by a problem whose keys are the states.
    async fn prepare_merging(
        &self,
        call: &'static str,
        merging: &Problem,
        buffers: &MergeBuffers<'_>,
    ) -> Result<Prepared> {
        let (device, pipelines) = self.gpu(call)?;
        Prepared::merge(device, pipelines, merging, buffers, self.dispatch_budget).await
    }
}

/// A sink logit in a partial state would count as often as there are shards.
fn check_without_sinks(given: bool) -> Result<()> {
    let hint = "a partial state has none; finish applies them once";
    if given { Err(Error::UnexpectedOperand { operand: "sink_logits", hint }) } else { Ok(()) }
}
