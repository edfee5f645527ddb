//! The backward pass against the definition.

use super::*;
use crate::cpu::{forward, reference};
use crate::problem::{Bias, MaskData, Options, Shape, Window};

fn all<T: Clone>(x: Gradients<T, T>) -> Vec<T> {
    let optional = [x.d_sink_logits, x.d_alibi_slopes, x.d_bias].into_iter().flatten();
    [x.d_q, x.d_k, x.d_v].into_iter().chain(optional).flatten().collect()
}

/// `tests/cpu` covers the best instruction set of the machine, and this test the other ones.
#[test]
fn every_instruction_set() {
    let mut archs = vec![Arch::Scalar, Arch::new()];
    #[cfg(target_arch = "x86_64")]
    archs.extend(pulp::x86::V3::try_new().map(Arch::V3));
    for (m, n) in [(1, 257), (5, 70), (113, 203), (70, 5)] {
        let shape = Shape { batch: 1, heads: 4, kv_heads: 2, seq_q: m, seq_k: n, head_dim: 33, value_dim: 21 };
        let plain = Options::new().window(Window::keys(90)).sink_tokens(5).sink_logits(SinkLogits::PerHead);
        let modified = plain.softcap(2.0).alibi(true).bias(Axes::ALL).mask(Axes::KEYS.heads());
        for options in [plain, modified] {
            let problem = Problem::new(shape, options).unwrap();
            let wave = |shape: [usize; 4], step: f32| -> Vec<f32> {
                (0..shape.iter().product()).map(|x| 2.0 * (x as f32 * step).sin()).collect()
            };
            let (q, k, v) = (wave(problem.q_shape(), 0.7), wave(problem.k_shape(), 1.3), wave(problem.v_shape(), 2.1));
            let d_o = wave(problem.o_shape(), 1.7);
            let slopes = options.alibi.then(|| vec![0.1, 0.02, 0.0, -0.01]);
            let bias = problem.bias_shape().map(|shape| wave(shape, 0.3));
            let mask = problem
                .mask_shape()
                .map(|shape| (0..shape.iter().product()).map(|n| (n % 5 != 3) as u8).collect::<Vec<_>>());
            let inputs =
                Inputs::new(&q, &k, &v).sink_logits(&[0.0, -1.0, 2.0, 1.0][..]).alibi_slopes(slopes.as_deref());
            let inputs = inputs.bias(bias.as_deref().map(Bias::F32)).mask(mask.as_deref().map(MaskData::Bytes));
            let upstream = Upstream { d_o: &d_o, d_lse: None };
            let expected = reference::backward(&problem, &inputs, &upstream).unwrap();
            let saved = forward(&problem, &inputs).unwrap();
            let expected = all(expected);
            for &arch in &archs {
                let x = backward_on(arch, &problem, &inputs, &saved.o, &saved.lse, &upstream);
                let actual = all(x);
                assert_eq!(actual.len(), expected.len());
                for (x, y) in actual.iter().zip(&expected) {
                    assert!((f64::from(*x) - y).abs() <= 1e-5 * (1.0 + y.abs()), "{arch:?} {problem}: {x}, not {y}");
                }
            }
        }
    }
}
