//! Random problems on the CPU, and laws of the definition. `PROPTEST_CASES` and `PROPTEST_RNG_SEED` ask for others.

use proptest::prelude::*;
use proptest::test_runner::{Config, RngSeed, TestRunner};
use sink_attention::cpu::reference;
use sink_attention::testing::gradients::Backward;
use sink_attention::testing::operands::{BiasValues, Operands};
use sink_attention::{Attention, Gradients, Layout, Problem, Shape, SinkLogits};

use crate::common::properties::{Packing, Plain, agrees_in_its_type, bytes, check, close, plain, single, split_merges};

#[test]
fn the_cpu_agrees_with_the_definition() {
    let attention = Attention::cpu();
    check(200, plain(90), |plain| agrees_in_its_type(&attention, &plain));
}

/// A mismatch must be found and shrunk, or the tests above prove nothing.
#[test]
fn a_mistake_is_found_and_shrunk() {
    // An operator that takes the keys at a window's left bound for hidden.
    let wrong = |plain: &Plain| {
        let problem = plain.problem();
        let operands = Operands::scattered(&problem, plain.seed);
        let right = reference::forward(&problem, &operands.inputs()).unwrap();
        let narrow = Plain { window: plain.window.map(|bound| bound.map(|bound| bound.max(1) - 1)), ..plain.clone() };
        let wrong = reference::forward(&narrow.problem(), &operands.inputs()).unwrap();
        close("o", &wrong.o, &right.o, 1e-5, 0.0)
    };
    let config = Config {
        cases: 200,
        max_shrink_iters: 4096,
        rng_seed: RngSeed::Fixed(0),
        failure_persistence: None,
        ..Config::default()
    };
    let found = TestRunner::new(config).run(&plain(30), |plain| wrong(&plain).map_err(TestCaseError::fail));
    let Err(proptest::test_runner::TestError::Fail(_, simplest)) = found else { panic!("nothing was found") };
    // The other options make no difference, so they are off.
    assert!(!simplest.alibi && simplest.bias.is_none() && simplest.softcap.is_none(), "{simplest:?}");
    assert!(simplest.sequences.len() == 1 && simplest.widths == [4, 4] && simplest.seed == 0, "{simplest:?}");
}

#[test]
fn any_split_of_the_pairs_merges_to_the_whole() {
    check(100, single(60), |plain| split_merges(&Attention::cpu(), &plain));
}

/// The gradients by everything, one after the other.
fn all_gradients(gradients: Gradients<f64, f64>) -> Vec<f64> {
    let optional = [gradients.d_sink_logits, gradients.d_alibi_slopes, gradients.d_bias];
    let all = [gradients.d_q, gradients.d_k, gradients.d_v].into_iter().chain(optional.into_iter().flatten());
    all.flatten().collect()
}

/// Laws of the definition itself, which the others are held to.
#[test]
fn the_definition_obeys_laws() {
    check(100, single(24), |plain| {
        let problem = plain.problem();
        let operands = Backward::scattered(&problem, plain.seed, true);
        let backward = |problem: &Problem, operands: &Backward| {
            all_gradients(reference::backward(problem, &operands.operands.inputs(), &operands.upstream()).unwrap())
        };
        let gradients = backward(&problem, &operands);

        // Linear in what flows in: powers of two are exact.
        let mut twice = operands.clone();
        twice.d_o.iter_mut().chain(twice.d_lse.iter_mut().flatten()).for_each(|x| *x *= 2.0);
        let expected: Vec<f64> = gradients.iter().map(|x| 2.0 * x).collect();
        close("gradients of twice the inflow", &backward(&problem, &twice), &expected, 1e-12, 0.0)?;

        // What a mask hides, a bias of -infinity hides.
        let masked = Plain { mask: Some([true; 3]), bias: Some([true; 3]), ..plain.clone() };
        let mut operands = Backward::scattered(&masked.problem(), plain.seed, true);
        let mut hidden = operands.clone();
        hidden.operands.mask = None;
        let Some(BiasValues::F32(bias)) = &mut hidden.operands.bias else { panic!("a bias in f32") };
        let mask = bytes(&mut operands.operands.mask);
        assert_eq!(bias.len(), mask.len());
        for (bias, &mut mask) in bias.iter_mut().zip(mask) {
            *bias = if mask == 0 { f32::NEG_INFINITY } else { *bias };
        }
        let biased = Plain { mask: None, ..masked.clone() }.problem();
        let expected = reference::forward(&masked.problem(), &operands.operands.inputs()).unwrap();
        let actual = reference::forward(&biased, &hidden.operands.inputs()).unwrap();
        if actual != expected || backward(&masked.problem(), &operands) != backward(&biased, &hidden) {
            return Err("a bias of -infinity is not a mask".into());
        }

        // Bits are bytes.
        let bits = Plain { mask_bits: true, ..masked.clone() }.problem();
        let packed = Operands::scattered(&bits, plain.seed);
        if reference::forward(&bits, &packed.inputs()).unwrap() != expected {
            return Err("a mask in bits is not the mask in bytes".into());
        }
        Ok(())
    });
}

/// Every sequence of a batch gives what it gives alone.
#[test]
fn sequences_are_on_their_own() {
    check(100, single(24), |plain| {
        let plain = Plain { packing: Packing::Thd, bias: None, mask: None, sink_logits: SinkLogits::None, ..plain };
        let problem = plain.problem();
        let operands = Operands::scattered(&problem, plain.seed);
        let together = reference::forward(&problem, &operands.inputs()).unwrap();
        let (shape, [.., seq_q]) = (*problem.shape(), problem.lse_shape());
        for sequence in problem.sequences().filter(|sequence| sequence.q_rows > 0 && sequence.k_rows > 0) {
            let alone = Shape { seq_q: sequence.q_rows, seq_k: sequence.k_rows, ..shape };
            let alone = Problem::new(alone, plain.options().layout(Layout::Bshd)).unwrap();
            let rows = |x: &[f32], start: usize, rows: usize, row: usize| x[start * row..][..rows * row].to_vec();
            let (q_row, k_row) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
            let own = Operands {
                q: rows(&operands.q, sequence.q_start, sequence.q_rows, q_row),
                k: rows(&operands.k, sequence.k_start, sequence.k_rows, k_row),
                v: rows(&operands.v, sequence.k_start, sequence.k_rows, shape.kv_heads * shape.value_dim),
                ..operands.clone()
            };
            let output = reference::forward(&alone, &own.inputs()).unwrap();
            let row = shape.heads * shape.value_dim;
            if output.o != together.o[sequence.q_start * row..][..sequence.q_rows * row] {
                return Err(format!("o of {sequence:?} differs"));
            }
            for head in 0..shape.heads {
                let lse = &together.lse[head * seq_q + sequence.q_start..][..sequence.q_rows];
                if output.lse[head * sequence.q_rows..][..sequence.q_rows] != *lse {
                    return Err(format!("lse of {sequence:?} differs"));
                }
            }
        }
        Ok(())
    });
}
