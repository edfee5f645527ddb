//! The definition against finite differences and other ways to compute it.

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::*;
use crate::problem::element::DType;
use crate::problem::varlen::Lengths;
use crate::problem::{Alignment, Axes, Options, Shape, Window};
use crate::testing::compare;

fn one_head(m: usize, n: usize, d: usize) -> Shape {
    Shape { batch: 1, heads: 1, kv_heads: 1, seq_q: m, seq_k: n, head_dim: d, value_dim: 1 }
}

#[test]
fn by_hand() {
    // Scores 0 and ln 3 with a sink logit of ln 4: the probabilities are 1/8, 3/8 and 4/8.
    let problem = Problem::new(one_head(1, 2, 1), Options::new().scale(1.0).sink_logits(SinkLogits::PerHead)).unwrap();
    let (k, sink_logits) = ([0.0, 3f32.ln()], [4f32.ln()]);
    let inputs = Inputs::new(&[1.0], &k, &[8.0, 16.0]).sink_logits(&sink_logits[..]);
    let output = forward(&problem, &inputs).unwrap();
    approx::assert_relative_eq!(output.o[0], 7.0, epsilon = 1e-6);
    approx::assert_relative_eq!(output.lse[0], 8f64.ln(), epsilon = 1e-6);
    // The sink logit is larger than both scores, and does not count as one.
    approx::assert_relative_eq!(row_max(&problem, &inputs).unwrap()[0], 3f64.ln(), epsilon = 1e-6);
}

#[test]
fn a_row_that_sees_nothing() {
    let shape = one_head(2, 1, 1);
    let data = Inputs::new(&[1.0, 1.0], &[f32::NAN], &[f32::INFINITY]);
    let options = Options::new().causal(true).query_offset(-2);
    let none = forward(&Problem::new(shape, options).unwrap(), &data).unwrap();
    assert_eq!((none.o, none.lse), (vec![0.0; 2], vec![f64::NEG_INFINITY; 2]));
    let options = options.sink_logits(SinkLogits::PerHead);
    let data = Inputs { sink_logits: Some(&[-3.5]), ..data };
    let sink = forward(&Problem::new(shape, options).unwrap(), &data).unwrap();
    assert_eq!((sink.o, sink.lse), (vec![0.0; 2], vec![-3.5; 2]));
}

#[test]
fn a_weight_below_normal_numbers_may_be_lost() {
    // The second key has a weight of exp(-87.5), about 1e-38, and only its value contributes to o.
    let problem = Problem::new(one_head(1, 2, 1), Options::new().scale(1.0)).unwrap();
    let inputs = Inputs::new(&[1.0], &[0.0, -87.5], &[0.0, 3.0]);
    let (output, _, magnitudes) = with_magnitudes(&problem, &inputs, None).unwrap();
    assert!(output.o[0] > 0.0 && output.o[0] < f64::from(3.0 * f32::MIN_POSITIVE));
    let of = |magnitudes: &[f64]| {
        compare::rows(&[0.0], &output.o, magnitudes, std::iter::once(0..1), DType::F32, 2f64.powi(-24))
    };
    of(&magnitudes.o).unwrap();
    // Without the allowance for lost weights, the comparison fails.
    of(&output.o).unwrap_err();
}

/// A loss that every gradient flows from, and its gradients by central differences.
fn finite_differences(problem: &Problem, operands: &Operands, upstream: &Upstream<'_>) -> Gradients<f64, f64> {
    let weighted = |x: &[f64], weights: &[f32]| -> f64 {
        // Rows that see nothing have an lse of -inf, and their d_lse is ignored.
        x.iter().zip(weights).filter(|(x, _)| x.is_finite()).map(|(x, &w)| x * f64::from(w)).sum()
    };
    let loss = |operands: &Operands| {
        let output = operands.forward(problem, &mut None);
        weighted(&output.o, upstream.d_o) + upstream.d_lse.map_or(0.0, |d_lse| weighted(&output.lse, d_lse))
    };
    // The error of a step h is about h^2 + 1e-16 / h.
    let step = 1e-5;
    let differences = |entries: fn(&mut Operands) -> &mut [f64]| -> Vec<f64> {
        let mut moved = operands.clone();
        let count = entries(&mut moved).len();
        let mut at = |n: usize, x: f64| {
            entries(&mut moved)[n] = x;
            loss(&moved)
        };
        let start = entries(&mut operands.clone()).to_vec();
        (0..count)
            .map(|n| {
                let difference = at(n, start[n] + step) - at(n, start[n] - step);
                at(n, start[n]);
                difference / (2.0 * step)
            })
            .collect()
    };
    let per_head = problem.options().sink_logits == SinkLogits::PerHead;
    Gradients {
        d_q: differences(|o| &mut o.q.data),
        d_k: differences(|o| &mut o.k.data),
        d_v: differences(|o| &mut o.v.data),
        d_sink_logits: per_head.then(|| differences(|o| o.sink_logits.as_mut().unwrap())),
        d_alibi_slopes: operands.alibi_slopes.as_ref().map(|_| differences(|o| o.alibi_slopes.as_mut().unwrap())),
        d_bias: operands.bias.as_ref().map(|_| differences(|o| &mut o.bias.as_mut().unwrap().data)),
    }
}

#[test]
fn gradients_are_finite_differences() {
    let full = Options::new;
    let masks = [
        full(),
        full().causal(true),
        full().causal(true).alignment(Alignment::TopLeft),
        full().window(Window::keys(2)).sink_tokens(1),
        full().window(Window::new(1, 1)).scale(-0.7),
        full().causal(true).query_offset(-2),
        full().window(Window::keys(2)).query_offset(1).scale(0.0),
    ];
    // Options that change scores and options that hide single pairs take turns: all combinations would take minutes.
    let extras: [fn(Options) -> Options; 7] = [
        |o| o,
        |o| o.softcap(0.8),
        |o| o.alibi(true),
        |o| o.bias(Axes::ALL).mask(Axes::KEYS.batch()),
        |o| o.bias(Axes::KEYS.heads()).softcap(1.5),
        |o| o.mask(Axes::KEYS.seq_q()).mask_packing(MaskPacking::Bits).alibi(true),
        |o| o.bias(Axes::KEYS).mask(Axes::ALL).alibi(true).softcap(0.6),
    ];
    let mut seed = 0;
    for (m, n) in [(1, 1), (1, 5), (3, 3), (4, 2), (3, 6)] {
        for mask in masks {
            for sink_logits in [SinkLogits::None, SinkLogits::OffByOne, SinkLogits::PerHead] {
                for (layout, heads, kv_heads) in [(Layout::Bshd, 2, 1), (Layout::Bhsd, 4, 2)] {
                    seed += 1;
                    let shape = Shape { batch: 2, heads, kv_heads, seq_q: m, seq_k: n, head_dim: 3, value_dim: 2 };
                    let options = extras[seed as usize % extras.len()](mask.sink_logits(sink_logits));
                    let [short_q, short_k] = [m, n].map(|length| length as u32 - 1);
                    let problem = match seed % 5 {
                        0 => {
                            let (q, k) = (&[m as u32, short_q][..], &[n as u32, short_k][..]);
                            let lengths = Lengths::Used { q: Some(q), k: Some(k) };
                            Problem::with_lengths(shape, options.layout(layout), lengths)
                        }
                        1 => {
                            let lengths = Lengths::Cumulative {
                                q: &[0, m as u32, m as u32, 2 * m as u32],
                                k: &[0, short_k, n as u32, 2 * n as u32],
                            };
                            let shape = Shape { batch: 1, seq_q: 2 * m, seq_k: 2 * n, ..shape };
                            Problem::with_lengths(shape, options.layout(Layout::Thd), lengths)
                        }
                        _ => Problem::new(shape, options.layout(layout)),
                    };
                    check_gradients(&problem.unwrap(), seed);
                }
            }
        }
    }
}

fn check_gradients(problem: &Problem, seed: u64) {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut random =
        |shape: &[usize]| -> Vec<f32> { (0..shape.iter().product()).map(|_| rng.random_range(-1.0..1.0)).collect() };
    let (options, heads) = (problem.options(), problem.shape().heads);
    let (q, k, v) = (random(&problem.q_shape()), random(&problem.k_shape()), random(&problem.v_shape()));
    let (d_o, d_lse) = (random(&problem.o_shape()), random(&problem.lse_shape()));
    let sinks = (options.sink_logits == SinkLogits::PerHead).then(|| random(&[heads]));
    let slopes = options.alibi.then(|| random(&[heads]));
    let mut bias = problem.bias_shape().map(|shape| random(&shape));
    if let Some(bias) = &mut bias {
        bias[0] = f32::NEG_INFINITY;
    }
    let mask: Option<Vec<u8>> = problem
        .mask_shape()
        .map(|shape| random(&[shape.iter().product::<usize>() * 4]).into_iter().map(|x| u8::from(x > -0.4)).collect());
    let words: Option<Vec<u32>> = problem
        .mask_shape()
        .map(|shape| random(&shape).into_iter().map(|x| x.to_bits() ^ x.to_bits() << 16 | 1).collect());
    let mask = match options.mask_packing {
        MaskPacking::Bytes => mask.as_ref().map(|mask| MaskData::Bytes(&mask[..mask.len() / 4])),
        MaskPacking::Bits => words.as_ref().map(|words| MaskData::Bits(words)),
    };
    let inputs = Inputs::new(&q, &k, &v).sink_logits(sinks.as_deref()).alibi_slopes(slopes.as_deref());
    let inputs = inputs.bias(bias.as_deref().map(Bias::F32)).mask(mask);
    let upstream = Upstream { d_o: &d_o, d_lse: (!seed.is_multiple_of(4)).then_some(&d_lse[..]) };

    let gradients = backward(problem, &inputs, &upstream).unwrap();
    let expected = finite_differences(problem, &Operands::new(problem, &inputs), &upstream);
    assert_eq!(gradients.d_sink_logits.is_some(), sinks.is_some());
    let all = |g: Gradients<f64, f64>| {
        let optional = [g.d_sink_logits, g.d_alibi_slopes, g.d_bias].map(Option::unwrap_or_default);
        [g.d_q, g.d_k, g.d_v].into_iter().chain(optional)
    };
    let names = ["d_q", "d_k", "d_v", "d_sink_logits", "d_alibi_slopes", "d_bias"];
    for (name, (actual, expected)) in names.iter().zip(all(gradients).zip(all(expected))) {
        assert_eq!(actual.len(), expected.len());
        for (n, (x, y)) in actual.into_iter().zip(expected).enumerate() {
            // A pair that -inf hides has a difference of NaN, and no gradient.
            let close = (x - y).abs() <= 1e-8 || y.is_nan() && x == 0.0;
            assert!(close, "{problem}: {name}[{n}] is {x}, not {y}");
        }
    }
}
