//! The options in a file: `key=value` lines become the metadata of a good file, which is read as it says or refused.

#![no_main]

use std::collections::HashMap;

use libfuzzer_sys::fuzz_target;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use sink_attention::cpu::reference;
use sink_attention::file::case::Case;

fuzz_target!(|text: &str| {
    let metadata: HashMap<String, String> =
        text.lines().filter_map(|line| line.split_once('=')).map(|(k, v)| (k.to_string(), v.to_string())).collect();
    let thd = metadata.get("layout").is_some_and(|layout| layout == "thd");
    let data: Vec<u8> = (0..48u32).flat_map(|n| (n as f32 * 0.37).sin().to_le_bytes()).collect();
    let lengths: Vec<u8> = [0i32, 1, 3].iter().flat_map(|n| n.to_le_bytes()).collect();
    let view = |dtype, shape: &[usize], data| TensorView::new(dtype, shape.to_vec(), data).unwrap();
    // Three tokens, two heads of two features, in every layout.
    let shape: &[usize] = if thd { &[3, 2, 2] } else { &[1, 3, 2, 2] };
    let mut tensors: Vec<(&str, TensorView<'_>)> =
        ["q", "k", "v"].map(|name| (name, view(Dtype::F32, shape, &data[..48]))).into();
    if thd {
        tensors.extend(["cu_seqlens_q", "cu_seqlens_k"].map(|name| (name, view(Dtype::I32, &[3], &lengths))));
    }
    tensors.push(("alibi_slopes", view(Dtype::F32, &[2], &data[8..16])));
    let bytes = safetensors::serialize(tensors, Some(metadata)).unwrap();
    match Case::parse(&bytes) {
        // Messages quote the value.
        Err(error) => assert!(!error.to_string().is_empty()),
        // What is read can be computed: weights that sum to at most 1, of values within [-1, 1].
        Ok(case) => {
            let output = reference::forward(&case.problem, &case.inputs::<f32>().unwrap()).unwrap();
            assert!(output.o.iter().all(|o| o.abs() <= 1.0 + 1e-9), "{}", case.problem);
        }
    }
});
