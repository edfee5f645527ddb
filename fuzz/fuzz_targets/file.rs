//! The content of a conformance file: a case whose operands fit it, or an error, whatever the bytes are.

#![no_main]

use libfuzzer_sys::fuzz_target;
use sink_attention::half::{bf16, f16};
use sink_attention::file::case::Case;
use sink_attention::{DType, Element};

fuzz_target!(|bytes: &[u8]| {
    match Case::parse(bytes) {
        // Messages have numbers of the file in them.
        Err(error) => assert!(!error.to_string().is_empty()),
        Ok(case) => match case.problem.options().dtype {
            DType::F16 => fits::<f16>(&case),
            DType::Bf16 => fits::<bf16>(&case),
            _ => fits::<f32>(&case),
        },
    }
});

/// What the reader lets pass is what a computation takes.
fn fits<T: Element>(case: &Case) {
    case.problem.check_inputs(&case.inputs::<T>().unwrap()).unwrap();
    if let Some(upstream) = case.upstream::<T>().unwrap() {
        assert_eq!(upstream.d_o.len(), case.problem.o_shape().iter().product::<usize>());
    }
    assert!(!case.problem.to_string().is_empty());
    // The rule must be counted without overflow, whatever the offsets and windows are.
    if case.problem.shape().seq_q.saturating_mul(case.problem.sequence_count()) < 1 << 16 {
        assert!(case.problem.forward_flops() >= 0.0);
    }
}
