//! `sink-attention run`: computes the problem of a conformance file, and writes its results to another file.

use std::error::Error;
use std::fmt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Args;
use serde::Serialize;
use sink_attention::file::case::{Case, check_output, write};

use crate::shared::{DeviceArgs, print_summary};

/// Compute attention for the problem in a file
///
/// IN is a safetensors file with tensors q, k, v and, as present, sinks, bias, mask, alibi_slopes, dout, dlse; its string
/// metadata holds the other options: layout, causal, align, window_left, window_right, sink_tokens, scale, softcap, q_offset.
/// Layout thd takes the tensors cu_seqlens_q and cu_seqlens_k. Tensors named expected.* are ignored. OUT receives the
/// tensors out and lse and, where there is dout, the gradients dq, dk, dv, dsinks, dbias and dalibi_slopes, in the layout of
/// IN. q, k, v and dout may be f32, f16 or bf16, all of one type, and so are out, dq, dk and dv; bias is of that type or f32,
/// mask is u8 or bool, lengths are i32, u32 or i64; everything else is f32.
#[derive(Debug, Args)]
pub struct Run {
    /// File with the problem
    #[arg(value_name = "IN")]
    input: PathBuf,

    /// File for the results; an existing one is replaced
    #[arg(value_name = "OUT")]
    output: PathBuf,

    #[command(flatten)]
    device: DeviceArgs,

    /// Print the summary as a JSON object
    #[arg(long)]
    json: bool,
}

impl Run {
    /// Reads, computes, writes, and prints a summary.
    pub fn execute(self) -> Result<(), Box<dyn Error>> {
        self.device.check()?;
        check_output(&self.input, &self.output)?;
        let case = Case::read(&self.input)?;

        let attention = self.device.open()?;
        let start = Instant::now();
        let results = case.compute(&attention)?;
        let elapsed = start.elapsed();
        write(&self.output, case.problem.options().layout, &results)?;

        let summary = Summary {
            pass: if case.d_o.is_some() { "forward and backward" } else { "forward" },
            problem: case.problem.to_string(),
            dtype: case.problem.options().dtype.to_string(),
            device: attention.device_name(),
            device_reason: attention.device_reason().to_string(),
            gpu: attention.is_gpu(),
            seconds: elapsed.as_secs_f64(),
            results: results.iter().map(|tensor| (tensor.name, tensor.shape.as_slice())).collect(),
            output: self.output.display().to_string(),
        };
        print_summary(&summary, self.json)
    }
}

/// The problem, the device, and the time of the call (uploads and downloads included).
#[derive(Debug, Serialize)]
struct Summary<'a> {
    pass: &'static str,
    problem: String,
    dtype: String,
    device: String,
    /// The reason for this device.
    device_reason: String,
    gpu: bool,
    seconds: f64,
    #[serde(serialize_with = "as_map")]
    results: Vec<(&'static str, &'a [usize])>,
    output: String,
}

impl fmt::Display for Summary<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let elapsed = Duration::from_secs_f64(self.seconds);
        let Summary { pass, problem, device, device_reason, .. } = self;
        write!(f, "{pass} {problem} on {device} ({device_reason}) in {elapsed:.2?}:")?;
        for (name, shape) in &self.results {
            write!(f, " {name} {shape:?}")?;
        }
        write!(f, " written to {}", self.output)
    }
}

/// An object in the order of the pairs.
fn as_map<S: serde::Serializer>(pairs: &[(&str, &[usize])], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(pairs.iter().copied())
}
