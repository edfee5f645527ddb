//! Finite operands whose scores are beyond what f32 holds well, on the CPU in one program and on the GPU in the other.

use sink_attention::half::f16;
use sink_attention::testing::compare::accepted;
use sink_attention::testing::gradients::Backward;
use sink_attention::testing::operands::{BiasValues, problem};
use sink_attention::{
    Attention, Axes, Bias, DType, Element, Inputs, Options, PartialState, Problem, Shape, SinkLogits, Upstream,
};

fn shape(seq: usize, width: usize) -> Shape {
    Shape { batch: 1, heads: 1, kv_heads: 1, seq_q: seq, seq_k: seq, head_dim: width, value_dim: 1 }
}

/// The lowest number as a bias hides nothing: where all keys have it, as with masks that are made of it, they weigh the same.
#[test]
fn the_lowest_scores_weigh_the_same() {
    for attention in crate::paths().into_iter().chain(crate::cooperative()) {
        for lowest in [f32::MIN, -3e38, -1e35] {
            let shape = Shape { batch: 1, heads: 1, kv_heads: 1, seq_q: 1, seq_k: 3, head_dim: 16, value_dim: 16 };
            let problem = Problem::new(shape, Options::new().bias(Axes::KEYS).dtype(DType::F16)).unwrap();
            let (q, v) = ([f16::ONE; 16], [1.0, 2.0, 6.0].map(f16::from_f32).map(|x| [x; 16]));
            let (k, bias) = ([f16::ZERO; 48], [lowest; 3]);
            let inputs = Inputs::new(&q, &k, v.as_flattened()).bias(Bias::F32(&bias));
            let output = attention.forward(&problem, &inputs).unwrap();
            let name = attention.device_name();
            assert!(output.o.iter().all(|o| (o.to_f32() - 3.0).abs() < 2e-3), "{name}: {lowest}: {output:?}");
            assert!((output.lse[0] / lowest - 1.0).abs() < 1e-6, "{name}: {lowest}: {output:?}");
        }
    }
}

/// Rows in which every visible key has the lowest bias, as left padding leaves them: lse has lost the logarithm of their number,
/// and each still has its share.
fn rows_of_the_lowest_biases<T: Element>(attention: &Attention, lowest: f32) {
    let axes = Axes { batch: false, heads: true, seq_q: true };
    let options = Options::new().bias(axes).mask(Axes::KEYS.batch()).dtype(T::DTYPE);
    let problem = problem([2, 2, 1], [9, 150], [16, 16], options);
    let mut backward = Backward::random(&problem, 4);
    let Some(BiasValues::F32(bias)) = &mut backward.operands.bias else { panic!("a bias in f32") };
    for (n, bias) in bias.iter_mut().enumerate().filter(|(_, bias)| **bias != f32::NEG_INFINITY) {
        match n / 150 % 9 {
            0..3 => *bias = lowest,
            // Others are as low, and lower.
            3 => *bias = if n % 4 == 0 { lowest } else { lowest.max(-1e38) * 3.0 },
            _ => {}
        }
    }
    if lowest > -1e30 {
        // In f64 such a bias leaves something of products: there are none.
        (0..4).for_each(|i| backward.operands.q.chunks_mut(9 * 32).for_each(|q| q[i * 32..][..32].fill(0.0)));
    }
    let backward = backward.cast::<T>();
    let saved = attention.forward(&problem, &backward.operands.inputs()).unwrap().o_lo(None);
    let gradients = backward.run_with(attention, &problem, &saved);
    let expected = backward.rows_agree(accepted(T::DTYPE), &problem, &gradients);
    let name = attention.device_name();
    backward.agree(&gradients, &expected).unwrap_or_else(|error| panic!("{name}, {lowest}: {problem}: {error}"));
}

#[test]
fn gradients_of_rows_of_the_lowest_biases() {
    for attention in crate::paths() {
        for lowest in [f32::MIN, -1e35, -1e9] {
            rows_of_the_lowest_biases::<f32>(&attention, lowest);
            rows_of_the_lowest_biases::<f16>(&attention, lowest);
        }
    }
}

/// The largest score less itself is 0, however large it is and however it was rounded.
#[test]
fn a_row_with_huge_scores_is_not_empty() {
    for attention in crate::paths() {
        for q in [6e4f32, 3e5, 1e9, 1e15, 1e18] {
            for (scale, k) in [(None, q), (Some(-0.7), -q), (Some(1.3), q)] {
                for sinks in [SinkLogits::None, SinkLogits::OffByOne] {
                    let mut options = Options::new().sink_logits(sinks);
                    options.scale = scale;
                    let problem = Problem::new(shape(1, 3), options).unwrap();
                    let (queries, keys) = ([q; 3], [k; 3]);
                    let inputs = Inputs::new(&queries, &keys, &[0.75]);
                    let output = attention.forward(&problem, &inputs).unwrap();
                    let score = 3.0 * f64::from(q) * f64::from(k) * f64::from(problem.scale());
                    let name = attention.device_name();
                    assert!((output.o[0] - 0.75).abs() < 1e-6, "{name}: {problem} q={q}: {output:?}");
                    assert!(
                        (f64::from(output.lse[0]) / score - 1.0).abs() < 1e-5,
                        "{name}: {problem} q={q}: {output:?}"
                    );
                    // The only key keeps all the probability, so nothing pulls at its score.
                    let upstream = Upstream::new(&[1.0]);
                    let gradients = attention.backward(&problem, &inputs, &output, &upstream).unwrap();
                    assert!(gradients.d_q.iter().chain(&gradients.d_k).all(|d| d.is_finite()), "{name}: {gradients:?}");
                    assert!((0.0..=2.72).contains(&gradients.d_v[0]), "{name}: {gradients:?}");
                }
            }
        }
    }
}

/// A visible score that overflowed to -inf takes no probability, and has no gradient.
#[test]
fn a_visible_score_of_minus_infinity() {
    for attention in crate::paths() {
        let problem = Problem::new(shape(2, 1), Options::new().causal(true)).unwrap();
        let inputs = Inputs::new(&[1e30, 1.0], &[-1e30, 1.0], &[2.0, 3.0]);
        let output = attention.forward(&problem, &inputs).unwrap();
        assert_eq!((output.o[0], output.lse[0]), (0.0, f32::NEG_INFINITY), "{}", attention.device_name());
        let upstream = Upstream::new(&[1.0, 1.0]).d_lse(&[5.0, 0.0][..]);
        let gradients = attention.backward(&problem, &inputs, &output, &upstream).unwrap();
        assert_eq!((gradients.d_q[0], gradients.d_k[0], gradients.d_v[0]), (0.0, 0.0, 0.0), "{gradients:?}");
        assert_eq!(gradients.d_v[1], 1.0, "{gradients:?}");
    }
}

/// A score of two keys times a scale beyond f32: lse is too large for its type, o is that of the larger score.
#[test]
fn a_score_beyond_f32_makes_lse_infinite() {
    for attention in crate::paths() {
        for scale in [f32::MAX, -f32::MAX] {
            for (sinks, logits) in [
                (SinkLogits::None, None),
                (SinkLogits::OffByOne, None),
                (SinkLogits::PerHead, Some([3e38])),
                (SinkLogits::PerHead, Some([f32::INFINITY])),
            ] {
                let shape = Shape { seq_q: 1, seq_k: 2, ..shape(2, 4) };
                let problem = Problem::new(shape, Options::new().scale(scale).sink_logits(sinks)).unwrap();
                let keys = [1.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0].map(|k| k * scale.signum());
                let inputs = Inputs::new(&[1.0; 4], &keys, &[0.75, -2.0]);
                let inputs = inputs.sink_logits(logits.as_ref().map(|logits| &logits[..]));
                let output = attention.forward(&problem, &inputs).unwrap();
                let expected = sink_attention::cpu::reference::forward(&problem, &inputs).unwrap();
                let name = attention.device_name();
                assert_eq!(output.lse, [f32::INFINITY], "{name}: {problem} {logits:?}: {output:?}");
                assert_eq!(expected.lse[0] as f32, f32::INFINITY);
                // The limit of ever larger sink logits takes all.
                let o = if logits == Some([f32::INFINITY]) { 0.0 } else { 0.75 };
                assert_eq!((output.o[0], expected.o[0]), (o, f64::from(o)), "{name}: {problem} {logits:?}");
            }
        }
    }
}

/// Whichever infinite score has the weight is not known.
#[test]
fn an_infinite_score_makes_o_nan_and_lse_infinite() {
    let shape = Shape { batch: 1, heads: 1, kv_heads: 1, seq_q: 2, seq_k: 3, head_dim: 1, value_dim: 1 };
    for attention in crate::paths() {
        // As operands, as a product beyond f32, and as a score that is formed beforehand.
        for (q, scale, bias) in [(f32::INFINITY, None, false), (3e38, None, false), (3e38, Some(2.0), true)] {
            for sinks in [SinkLogits::None, SinkLogits::OffByOne] {
                let mut options = Options::new().causal(true).sink_logits(sinks);
                options.scale = scale;
                let options = if bias { options.bias(Axes::KEYS) } else { options };
                let problem = Problem::new(shape, options).unwrap();
                let queries = [1.0, q];
                let inputs = Inputs::new(&queries, &[1.0, 0.5, 4.0], &[0.75, 1.0, 2.0]);
                let inputs = inputs.bias(bias.then_some(Bias::F32(&[0.0; 3])));
                let output = attention.forward(&problem, &inputs).unwrap();
                let name = attention.device_name();
                assert!(output.o[0].is_finite() && output.lse[0].is_finite(), "{name}: {problem} q={q}: {output:?}");
                assert_eq!(output.lse[1], f32::INFINITY, "{name}: {problem} q={q}: {output:?}");
                assert!(output.o[1].is_nan(), "{name}: {problem} q={q}: {output:?}");
                let expected = sink_attention::cpu::reference::forward(&problem, &inputs).unwrap();
                assert_eq!(
                    expected.lse[1] as f32,
                    if q.is_infinite() || bias { f32::INFINITY } else { expected.lse[1] as f32 }
                );
                assert_eq!(expected.o[1].is_nan(), q.is_infinite());
            }
        }
    }
}

#[test]
fn a_state_of_infinite_lse_makes_a_merge_nan() {
    let shape = Shape { batch: 1, heads: 2, kv_heads: 1, seq_q: 2, seq_k: 3, head_dim: 1, value_dim: 4 };
    let problem = Problem::new(shape, Options::new().sink_logits(SinkLogits::PerHead)).unwrap();
    let state = |lse: [f32; 4]| PartialState::new(vec![1.0; 16], lse.to_vec());
    let inf = f32::INFINITY;
    // Rows of [head, query]; o is [query, head, width].
    let (a, b) = (state([0.5, inf, inf, -inf]), state([0.25, 1.0, inf, -inf]));
    let of_row = |o: &[f32], row: usize| o[(row % 2 * 2 + row / 2) * 4..][..4].to_vec();
    for attention in crate::paths() {
        let name = attention.device_name();
        for states in [[&a, &b], [&b, &a]] {
            let merged = attention.merge(&problem, &states).unwrap();
            assert_eq!(merged.lse[1..], [inf, inf, -inf], "{name}");
            assert!(of_row(&merged.o, 0).iter().all(|o| (o - 1.0).abs() < 1e-6), "{name}: {merged:?}");
            assert!([1, 2].iter().all(|&row| of_row(&merged.o, row).iter().all(|o| o.is_nan())), "{name}: {merged:?}");
            assert_eq!(of_row(&merged.o, 3), [0.0; 4], "{name}");
        }
        // Sinks of +inf take all of what is finite.
        let finished = attention.finish::<f32>(&problem, &a, Some(&[inf, inf])).unwrap();
        assert_eq!(finished.lse, [inf; 4], "{name}");
        assert_eq!((of_row(&finished.o, 0), of_row(&finished.o, 3)), (vec![0.0; 4], vec![0.0; 4]), "{name}");
        assert!([1, 2].iter().all(|&row| of_row(&finished.o, row).iter().all(|o| o.is_nan())), "{name}: {finished:?}");
    }
}

/// A scale of zero weighs all visible keys the same, and no hidden one.
#[test]
fn a_scale_of_zero() {
    for attention in crate::paths() {
        let problem = Problem::new(shape(2, 1), Options::new().causal(true).scale(0.0)).unwrap();
        let output = attention.forward(&problem, &Inputs::new(&[2.0, 3.0], &[5.0, -1.0], &[2.0, 4.0])).unwrap();
        let name = attention.device_name();
        assert_eq!(output.o, [2.0, 3.0], "{name}: {output:?}");
        assert!(output.lse[0] == 0.0 && (output.lse[1] - 2f32.ln()).abs() < 1e-6, "{name}: {output:?}");
    }
}
