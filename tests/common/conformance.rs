//! Conformance files against a path: the expected results come from an independent dense float64 computation.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use super::{compare, compare_lse};
use safetensors::{Dtype, SafeTensors};
use sink_attention::cpu::reference;
use sink_attention::file::case::Case;
use sink_attention::half::{bf16, f16};
use sink_attention::testing::compare::accepted;
use sink_attention::{Attention, DType, Element, Gradients, Output};

/// All files, as (name without extension, content).
pub fn files() -> Vec<(String, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/conformance");
    let mut paths: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    let name = |path: &PathBuf| path.file_stem().unwrap().to_str().unwrap().to_string();
    paths.iter().map(|path| (name(path), fs::read(path).unwrap())).collect()
}

/// The results that a file expects, beside out and lse.
pub fn expected_gradients(bytes: &[u8]) -> BTreeSet<String> {
    let file = SafeTensors::deserialize(bytes).unwrap();
    let names = file.names().into_iter().filter_map(|name| name.strip_prefix("expected."));
    names.filter(|name| !["out", "lse"].contains(name)).map(String::from).collect()
}

pub fn expected(bytes: &[u8], name: &str) -> Vec<f32> {
    let file = SafeTensors::deserialize(bytes).unwrap();
    let tensor = file.tensor(&format!("expected.{name}")).unwrap();
    assert_eq!(tensor.dtype(), Dtype::F32);
    tensor.data().as_chunks().0.iter().map(|&k_step| f32::from_le_bytes(k_step)).collect()
}

/// Results in f64 whatever a path computes in, which is exact.
pub struct Results {
    pub out: Vec<f64>,
    pub lse: Vec<f64>,
    /// Under the names of the files.
    pub gradients: Vec<(&'static str, Vec<f64>)>,
}

impl Results {
    /// Of the forward pass, and of the backward pass where the file has a dout.
    fn new<T: Into<f64>, S: Into<f64>>(output: Output<T, S>, gradients: Option<Gradients<T, S>>) -> Self {
        let mut all = Vec::new();
        if let Some(Gradients { d_q, d_k, d_v, d_sink_logits, d_bias, .. }) = gradients {
            all.extend([("dq", wide(d_q)), ("dk", wide(d_k)), ("dv", wide(d_v))]);
            all.extend(d_sink_logits.map(|d_sink| ("dsinks", wide(d_sink))));
            all.extend(d_bias.map(|d_bias| ("dbias", wide(d_bias))));
        }
        Results { out: wide(output.o), lse: wide(output.lse), gradients: all }
    }
}

pub fn wide<T: Into<f64>>(x: Vec<T>) -> Vec<f64> {
    x.into_iter().map(Into::into).collect()
}

/// A way to compute a file's results.
pub trait Compute {
    fn compute<T: Element>(&self, case: &Case) -> sink_attention::Result<Results>;
}

pub struct Reference;

impl Compute for Reference {
    fn compute<T: Element>(&self, case: &Case) -> sink_attention::Result<Results> {
        let (inputs, upstream) = (case.inputs::<T>()?, case.upstream()?);
        let output = reference::forward(&case.problem, &inputs)?;
        let backward = |upstream| reference::backward(&case.problem, &inputs, &upstream);
        let gradients = upstream.map(backward).transpose()?;
        Ok(Results::new(output, gradients))
    }
}

impl Compute for Attention {
    fn compute<T: Element>(&self, case: &Case) -> sink_attention::Result<Results> {
        let (inputs, upstream) = (case.inputs::<T>()?, case.upstream()?);
        let output = self.forward(&case.problem, &inputs)?;
        let backward = |upstream| self.backward(&case.problem, &inputs, &output, &upstream);
        let gradients = upstream.map(backward).transpose()?;
        Ok(Results::new(output, gradients))
    }
}

/// Holds a path to every file, and reports all that fail, not just the first.
pub fn check_all(path: &impl Compute) {
    let mut failures = Vec::new();
    for (name, bytes) in files() {
        if let Err(error) = check(path, &bytes) {
            failures.push(format!("{name}: {error}"));
        }
    }
    assert!(failures.is_empty(), "\n{}", failures.join("\n"));
}

pub fn check(path: &impl Compute, bytes: &[u8]) -> Result<(), String> {
    // The gradients of the sinks and of the bias are f32 and made from an f32 delta, whatever the operands are.
    check_with(path, bytes, |_| accepted(DType::F32))
}

/// With the bound of the gradients that are f32 in every element type of the operands.
pub fn check_with(path: &impl Compute, bytes: &[u8], singles: fn(DType) -> f64) -> Result<(), String> {
    let case = Case::parse(bytes).map_err(|error| error.to_string())?;
    let dtype = case.problem.options().dtype;
    let results = match dtype {
        DType::F32 => path.compute::<f32>(&case),
        DType::F16 => path.compute::<f16>(&case),
        DType::Bf16 => path.compute::<bf16>(&case),
        other => panic!("no path for {other}"),
    };
    let results = results.map_err(|error| error.to_string())?;
    let names: BTreeSet<String> = results.gradients.iter().map(|(name, _)| name.to_string()).collect();
    assert_eq!(names, expected_gradients(bytes));
    let mut errors = vec![
        ("out", compare(&results.out, &expected(bytes, "out"), accepted(dtype))),
        ("lse", compare_lse(&results.lse, &expected(bytes, "lse"), accepted(DType::F32))),
    ];
    for (name, gradient) in &results.gradients {
        let bound = if ["dsinks", "dbias"].contains(name) { singles(dtype) } else { accepted(dtype) };
        errors.push((name, compare(gradient, &expected(bytes, name), bound)));
    }
    let failures: Vec<String> =
        errors.iter().filter_map(|(name, error)| Some(format!("{name}: {}", error.as_ref().err()?))).collect();
    if failures.is_empty() { Ok(()) } else { Err(failures.join(", ")) }
}
