//! Every conformance file against every path: the expected results come from an independent dense
//! float64 computation.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::{compare, compare_lse};
use safetensors::{Dtype, SafeTensors};
use sink_attention::cpu::{self, reference};
use sink_attention::io::{Case, FormatError};
use sink_attention::{Attention, DType, Gradients, Output, Upstream};

/// Files that this version does not compute, each with the feature it waits for.
const WAITING: [(&str, &str); 8] = [
    ("alibi_causal_f32", "alibi_slopes"),
    ("bias_full_f32", "bias"),
    ("bool_mask_broadcast_f32", "mask"),
    ("gpt_oss_heads_bf16", "bf16"),
    ("gpt_oss_heads_f16", "f16"),
    ("llama_heads_d128_f16", "f16"),
    ("softcap_scale_f32", "softcap"),
    ("varlen_causal_swa_sink_f32", "thd"),
];

/// Bound on absolute + relative error of lse, whatever the element type.
const LSE_BOUND: f64 = 1e-5;

/// Bound on the relative error of results in the operands' element type.
fn bound(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => 1e-5,
        DType::F16 => 1.5e-3,
        DType::Bf16 => 6e-3,
        other => panic!("no bound for {other}"),
    }
}

/// All files, as (name without extension, content).
fn files() -> Vec<(String, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/conformance");
    let mut paths: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    let name = |path: &PathBuf| path.file_stem().unwrap().to_str().unwrap().to_string();
    paths.iter().map(|path| (name(path), fs::read(path).unwrap())).collect()
}

fn feature_awaited_by(name: &str) -> Option<&'static str> {
    WAITING.iter().find(|(waiting, _)| *waiting == name).map(|(_, feature)| *feature)
}

fn expected(bytes: &[u8], name: &str) -> Vec<f32> {
    let file = SafeTensors::deserialize(bytes).unwrap();
    let tensor = file.tensor(&format!("expected.{name}")).unwrap();
    assert_eq!(tensor.dtype(), Dtype::F32);
    tensor.data().as_chunks().0.iter().map(|&chunk| f32::from_le_bytes(chunk)).collect()
}

/// Runs every file that does not wait for a feature, and reports all that fail, not just the first.
fn check_all(check: impl Fn(&Case, &[u8]) -> Result<(), String>) {
    let mut failures = Vec::new();
    for (name, bytes) in files() {
        if feature_awaited_by(&name).is_some() {
            continue;
        }
        let result = Case::parse(&bytes).map_err(|error| error.to_string()).and_then(|case| check(&case, &bytes));
        if let Err(error) = result {
            failures.push(format!("{name}: {error}"));
        }
    }
    assert!(failures.is_empty(), "\n{}", failures.join("\n"));
}

fn check_forward<T: Copy + Into<f64>>(forward: impl Fn(&Case) -> sink_attention::Result<Output<T, T>>) {
    check_all(|case, bytes| {
        let output = forward(case).map_err(|error| error.to_string())?;
        let out = compare(&output.o, &expected(bytes, "out"), bound(case.q.dtype()));
        out.map_err(|error| format!("out: {error}"))?;
        let lse = compare_lse(&output.lse, &expected(bytes, "lse"), LSE_BOUND);
        lse.map(drop).map_err(|error| format!("lse: {error}"))
    });
}

fn check_backward<T: Copy + Into<f64>>(
    backward: impl Fn(&Case, &Upstream<'_>) -> sink_attention::Result<Gradients<T, T>>,
) {
    check_all(|case, bytes| {
        let upstream = case.upstream().ok_or("no dout")?;
        let gradients = backward(case, &upstream).map_err(|error| error.to_string())?;
        let mut results = vec![("dq", gradients.d_q), ("dk", gradients.d_k), ("dv", gradients.d_v)];
        if case.sink_logits.is_some() {
            results.push(("dsinks", gradients.d_sink_logits.ok_or("no dsinks")?));
        }
        let failures: Vec<String> = results
            .into_iter()
            .filter_map(|(name, gradient)| {
                let result = compare(&gradient, &expected(bytes, name), bound(case.q.dtype()));
                result.err().map(|error| format!("{name}: {error}"))
            })
            .collect();
        if failures.is_empty() { Ok(()) } else { Err(failures.join(", ")) }
    });
}

mod forward {
    use super::*;

    #[test]
    fn reference() {
        check_forward(|case| reference::forward(&case.problem, &case.inputs()));
    }

    #[test]
    fn cpu() {
        let cpu = Attention::cpu();
        check_forward(|case| cpu.forward(&case.problem, &case.inputs()));
    }

    #[test]
    fn gpu() {
        if let Some(gpu) = common::gpu() {
            check_forward(|case| gpu.forward(&case.problem, &case.inputs()));
        }
    }
}

mod backward {
    use super::*;

    #[test]
    fn reference() {
        check_backward(|case, upstream| reference::backward(&case.problem, &case.inputs(), upstream));
    }

    #[test]
    fn cpu() {
        check_backward(|case, upstream| {
            let saved = cpu::forward(&case.problem, &case.inputs())?;
            cpu::backward(&case.problem, &case.inputs(), &saved, upstream)
        });
    }

    #[test]
    fn gpu() {
        if let Some(gpu) = common::gpu() {
            check_backward(|case, upstream| {
                let saved = gpu.forward(&case.problem, &case.inputs())?;
                gpu.backward(&case.problem, &case.inputs(), &saved, upstream)
            });
        }
    }
}

#[test]
fn waiting_files_name_the_feature() {
    let files = files();
    for (name, feature) in WAITING {
        let (_, bytes) = files.iter().find(|(file, _)| file == name).unwrap_or_else(|| panic!("no file {name}"));
        match Case::parse(bytes) {
            Err(FormatError::Unsupported { feature: named }) if named.contains(feature) => {}
            other => panic!("{name} should wait for {feature}, but is {other:?}: is the list out of date?"),
        }
    }
}
