//! What a plain dense computation in f32 gives, with results rounded to the element type once: the yardstick for the
//! error of tiled paths, which can hardly be better. Tensor cores multiply halves: the yardstick for kernels that use them
//! rounds p and d_s as well.

use sink_attention::{Element, Gradients, Inputs, Output, Problem, SinkLogits, Upstream};

use sink_attention::testing::operands::row;

/// The rows that a query works with, in f32, and its softmax.
struct Query {
    q: Vec<f32>,
    /// Visible keys: where they lie in k and in v, and their probabilities.
    keys: Vec<([std::ops::Range<usize>; 2], f32)>,
    sink: Option<f32>,
    lse: f32,
}

/// What becomes of p and d_s before they are multiplied.
pub type Round = fn(f32) -> f32;

/// They stay as they are.
fn keep(x: f32) -> f32 {
    x
}

/// They are rounded to an element type.
pub fn to_half<T: Element>(x: f32) -> f32 {
    T::from_f32(x).to_f32()
}

impl Query {
    fn new<T: Element>(problem: &Problem, inputs: &Inputs<'_, T>, [b, h, i]: [usize; 3]) -> Self {
        let s = problem.shape();
        let q = widen(&inputs.q[row(problem, [s.heads, s.seq_q, s.head_dim], [b, h, i])]);
        let place = |width, j| row(problem, [s.kv_heads, s.seq_k, width], [b, h / problem.heads_per_kv(), j]);
        let visible: Vec<_> =
            (0..s.seq_k).filter(|&j| problem.sequences().next().unwrap().band.visible(i, j)).collect();
        let places = visible.into_iter().map(|j| [place(s.head_dim, j), place(s.value_dim, j)]);
        let scored = places.map(|place| {
            let score = problem.scale() * dot(&q, &widen(&inputs.k[place[0].clone()]));
            (place, score)
        });
        let mut keys: Vec<_> = scored.collect();
        let sink = match problem.options().sink_logits {
            SinkLogits::None => None,
            SinkLogits::OffByOne => Some(0.0),
            SinkLogits::PerHead => Some(inputs.sink_logits.unwrap()[h]),
        };
        let terms = || keys.iter().map(|(_, score)| *score).chain(sink);
        let most = terms().fold(f32::NEG_INFINITY, f32::max);
        let finite = if most.is_finite() { most } else { 0.0 };
        let lse = finite + terms().map(|x| (x - finite).exp()).sum::<f32>().ln();
        keys.iter_mut().for_each(|(_, score)| *score = (*score - lse).exp());
        Query { q, keys, sink, lse }
    }
}

fn widen<T: Element>(x: &[T]) -> Vec<f32> {
    T::widen(x).into_owned()
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add_scaled(sum: &mut [f32], factor: f32, x: &[f32]) {
    sum.iter_mut().zip(x).for_each(|(sum, x)| *sum += factor * x);
}

/// Batch, head and position of every query, in the order of lse.
fn queries(problem: &Problem) -> impl Iterator<Item = [usize; 3]> {
    let [batch, heads, seq_q] = problem.lse_shape();
    (0..batch * heads * seq_q).map(move |n| [n / seq_q / heads, n / seq_q % heads, n % seq_q])
}

fn o_row(problem: &Problem, query: [usize; 3]) -> std::ops::Range<usize> {
    let s = problem.shape();
    row(problem, [s.heads, s.seq_q, s.value_dim], query)
}

/// o before it is rounded, and lse.
fn forward_in_f32<T: Element>(problem: &Problem, inputs: &Inputs<'_, T>, round: Round) -> Output {
    let mut o = vec![0.0; problem.o_shape().iter().product()];
    let mut lse = Vec::new();
    for place in queries(problem) {
        let query = Query::new(problem, inputs, place);
        for ([_, value], p) in query.keys {
            add_scaled(&mut o[o_row(problem, place)], round(p), &widen(&inputs.v[value]));
        }
        lse.push(query.lse);
    }
    Output::new(o, lse)
}

pub fn forward<T: Element>(problem: &Problem, inputs: &Inputs<'_, T>) -> Output<T> {
    forward_with(problem, inputs, keep)
}

pub fn forward_with<T: Element>(problem: &Problem, inputs: &Inputs<'_, T>, round: Round) -> Output<T> {
    let Output { o, lse, .. } = forward_in_f32(problem, inputs, round);
    Output::new(T::narrow(o), lse)
}

pub fn backward<T: Element>(problem: &Problem, inputs: &Inputs<'_, T>, upstream: &Upstream<'_, T>) -> Gradients<T> {
    backward_with(problem, inputs, upstream, keep)
}

pub fn backward_with<T: Element>(
    problem: &Problem,
    inputs: &Inputs<'_, T>,
    upstream: &Upstream<'_, T>,
    round: Round,
) -> Gradients<T> {
    let s = problem.shape();
    let o = forward_in_f32(problem, inputs, keep).o;
    let [mut d_q, mut d_k, mut d_v] = [inputs.q, inputs.k, inputs.v].map(|x| vec![0.0; x.len()]);
    let mut d_sink_logits = vec![0.0; s.heads];
    for (n, place) in queries(problem).enumerate() {
        let query = Query::new(problem, inputs, place);
        if query.lse == f32::NEG_INFINITY {
            continue;
        }
        let d_o = widen(&upstream.d_o[o_row(problem, place)]);
        let delta = dot(&d_o, &o[o_row(problem, place)]) - upstream.d_lse.map_or(0.0, |d_lse| d_lse[n]);
        for ([key, value], p) in query.keys {
            let d_s = round(p * (dot(&d_o, &widen(&inputs.v[value.clone()])) - delta));
            let d_q = &mut d_q[row(problem, [s.heads, s.seq_q, s.head_dim], place)];
            add_scaled(d_q, problem.scale() * d_s, &widen(&inputs.k[key.clone()]));
            add_scaled(&mut d_k[key], problem.scale() * d_s, &query.q);
            add_scaled(&mut d_v[value], round(p), &d_o);
        }
        d_sink_logits[place[1]] -= query.sink.map_or(0.0, |sink| (sink - query.lse).exp() * delta);
    }
    let per_head = problem.options().sink_logits == SinkLogits::PerHead;
    Gradients::new(T::narrow(d_q), T::narrow(d_k), T::narrow(d_v)).d_sink_logits(per_head.then_some(d_sink_logits))
}
