//! Runs attention layers of GPT-OSS from Hugging Face's files, prompt first, then token by token:
//!
//! ```text
//! cargo run --release --example gpt_oss_layer              # a tiny model with recorded outputs
//! cargo run --release --example gpt_oss_layer -- DIR       # config.json and model.safetensors, or shards of it
//! cargo run --release --example gpt_oss_layer -- --help
//! ```
//!
//! Each layer of config.json (`config.rs`) is loaded (`weights.rs`) and computed in two ways (`layer.rs`): all tokens in
//! one forward pass, and, once the prompt is in the cache that goes with the layer's type, one by one from it, rotated
//! by YaRN's table (`RotaryFrequencies`) as they are appended. Both must agree, and agree with the outputs in
//! `expected.safetensors` where there are any.

mod config;
#[path = "../common/decoder.rs"]
mod decoder;
#[cfg(test)]
#[path = "../common/gpu.rs"]
mod gpu;
mod layer;
mod rotary;
#[path = "../common/shard.rs"]
mod shard;
#[cfg(test)]
mod tests;
mod weights;

use std::error::Error;
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use sink_attention::cache::CacheKind;
use sink_attention::{Attention, DeviceChoice};

use config::{Config, LayerType};
use layer::Layer;
use weights::{Expected, Weights};

/// ||x - expected|| / ||expected|| over all rows, and |x - expected| of each number, at most.
const TOLERANCE: f64 = 2e-3;
/// The same between decoding and prefill, both of which are f32 throughout.
const SAME: f64 = 1e-5;
/// Of the tables of cosines and sines: the recorded ones come from angles in f32.
const SAME_TABLE: f64 = 1e-4;
/// Bounds the memory of projections.
const MOST_TOKENS: usize = 65_536;
const SEED: u64 = 20;

const TABLE: &str =
    "layer  type     cache                    prompt  decoded  prefill error     decode error      decode - prefill";

const HELP: &str = "\
Runs attention layers of GPT-OSS, a prompt first, then token by token from the layers' caches.

Usage: gpt_oss_layer [DIR] [OPTIONS]

  DIR             A folder with config.json, model.safetensors (or model.safetensors.index.json and its shards) and,
                  for the comparison, expected.safetensors (default: tests/gpt_oss_tiny)
  --layers LIST   Only these layers, such as 0,1 (default: all of config.json)
  --tokens N      Tokens of random inputs, where no inputs were recorded (default 160)
  --prompt P      Tokens of the prompt, the rest is decoded one by one (default: half of them)
  --help          This text

Fails where decoding differs from prefill, or either from what was recorded.
";

struct Args {
    folder: PathBuf,
    layers: Option<Vec<usize>>,
    tokens: Option<usize>,
    prompt: Option<usize>,
}

fn main() -> ExitCode {
    match parse(std::env::args_os().skip(1)).and_then(|args| match args {
        None => {
            print!("{HELP}");
            Ok(())
        }
        Some(args) => run(&args, &DeviceChoice::from_env()),
    }) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// `None` asks for help.
fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Option<Args>, Box<dyn Error>> {
    let mut folder = None;
    let mut parsed = Args { folder: PathBuf::new(), layers: None, tokens: None, prompt: None };
    let mut args = args.into_iter();
    while let Some(arg) = args.next() {
        let name = arg.to_string_lossy();
        let mut value = || match args.next() {
            Some(value) => Ok(value.to_string_lossy().into_owned()),
            None => Err(format!("{name} needs a value; see --help")),
        };
        match &*name {
            "--help" | "-h" => return Ok(None),
            "--layers" => {
                let value = value()?;
                let numbers = value.split(',').map(str::parse).collect::<Result<Vec<usize>, _>>();
                let numbers = numbers.map_err(|_| format!("--layers {value}: not a list of numbers such as 0,1"))?;
                parsed.layers = Some(numbers);
            }
            "--tokens" => parsed.tokens = Some(number(&name, &value()?, 2)?),
            "--prompt" => parsed.prompt = Some(number(&name, &value()?, 1)?),
            _ if name.starts_with('-') => return Err(format!("unknown option {name}; see --help").into()),
            _ if folder.is_some() => return Err(format!("a second folder, {name}; see --help").into()),
            _ => folder = Some(arg.into()),
        }
    }
    parsed.folder = folder.unwrap_or_else(|| concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/gpt_oss_tiny").into());
    Ok(Some(parsed))
}

fn number(name: &str, value: &str, least: usize) -> Result<usize, String> {
    match value.parse() {
        Ok(number) if (least..=MOST_TOKENS).contains(&number) => Ok(number),
        _ => Err(format!("{name} {value}: not a whole number from {least} to {MOST_TOKENS}")),
    }
}

fn run(args: &Args, choice: &DeviceChoice) -> Result<(), Box<dyn Error>> {
    let config = Config::load(&args.folder.join("config.json"))?;
    let mut weights = Weights::open(&args.folder)?;
    let mut expected = Expected::open(&args.folder)?;
    let layers = args.layers.clone().unwrap_or_else(|| (0..config.layers.len()).collect());
    if let Some(layer) = layers.iter().find(|layer| **layer >= config.layers.len()) {
        return Err(format!("--layers: there is no layer {layer}, config.json has {}", config.layers.len()).into());
    }
    let attention = Attention::open(choice)?;
    println!("Device: {}", attention.device_description());
    let Config { hidden, heads, kv_heads, head_dim, .. } = config;
    println!("Layers: {heads} query heads, {kv_heads} key heads, width {head_dim}, hidden size {hidden}");
    if expected.is_none() {
        println!("No expected.safetensors: random inputs, and decoding is held against prefill alone");
    }

    let mut worst = Vec::new();
    let mut checked_table = false;
    let mut rows = Vec::new();
    for number in layers {
        let x = inputs(&config, expected.as_mut(), number, args.tokens)?;
        let tokens = x.len() / hidden;
        if !(2..=MOST_TOKENS).contains(&tokens) {
            return Err(format!("layer {number} has {tokens} tokens of input; it must be 2 to {MOST_TOKENS}").into());
        }
        let prompt = args.prompt.unwrap_or(tokens / 2);
        if prompt >= tokens {
            return Err(format!("--prompt {prompt}: there are {tokens} tokens, one at least must be decoded").into());
        }
        let cos_sin = config.rope.table(head_dim as u32, tokens)?;
        if let (Some(expected), false) = (&mut expected, checked_table) {
            checked_table = true;
            if let Some(error) = table_error(expected, &cos_sin, head_dim)? {
                worst.push(("the rotary table's error", error, SAME_TABLE));
            }
        }
        let layer = Layer::load(&mut weights, &config, number)?;
        let outputs = layer.run(&attention, &x, prompt, &cos_sin)?;
        let decoded = &outputs.prefill[prompt * hidden..];
        let same = Errors::between(&outputs.decode, decoded);
        let (mut prefill, mut decode) = (None, None);
        if let Some(expected) = &mut expected {
            let recorded = expected.rows(&format!("layers.{number}.attn_output"), hidden)?;
            if recorded.len() != x.len() {
                let rows = recorded.len() / hidden;
                return Err(format!("layers.{number}.attn_output has {rows} tokens, attn_input has {tokens}").into());
            }
            prefill = Some(Errors::between(&outputs.prefill, &recorded));
            decode = Some(Errors::between(&outputs.decode, &recorded[prompt * hidden..]));
        }
        let (kind, cache) = match (config.layers[number], layer.cache(tokens).kind) {
            (LayerType::Sliding { .. }, CacheKind::Rolling { window, .. }) => {
                ("sliding", format!("rolling, {window} keys"))
            }
            _ => ("full", format!("contiguous, {tokens} keys")),
        };
        let shown = |errors: Option<Errors>| errors.map_or("-".into(), |errors| errors.to_string());
        rows.push(format!(
            "{number:5}  {kind:7}  {cache:23}  {prompt:6}  {:7}  {:16}  {:16}  {same}",
            tokens - prompt,
            shown(prefill),
            shown(decode),
        ));
        for (what, errors, most) in [
            ("prefill's error", prefill, TOLERANCE),
            ("decoding's error", decode, TOLERANCE),
            ("the difference of decoding and prefill", Some(same), SAME),
        ] {
            worst.extend(errors.map(|errors| (what, errors.worst(), most)));
        }
    }
    println!();
    println!("{TABLE}");
    for row in rows {
        println!("{row}");
    }
    println!();
    println!("Errors are relative ones of all rows, and the largest of a single number.");
    match worst.iter().find(|(_, error, most)| error.is_nan() || error > most) {
        Some((what, error, most)) => Err(format!("{what} is {error:.1e}, above {most:.0e}").into()),
        None => Ok(()),
    }
}

/// Those that were recorded, or random ones.
fn inputs(
    config: &Config,
    expected: Option<&mut Expected>,
    layer: usize,
    tokens: Option<usize>,
) -> Result<Vec<f32>, String> {
    match (expected, tokens) {
        (Some(_), Some(tokens)) => Err(format!("--tokens {tokens}: the inputs are those of expected.safetensors")),
        (Some(expected), None) => expected.rows(&format!("layers.{layer}.attn_input"), config.hidden),
        (None, tokens) => {
            let mut rng = StdRng::seed_from_u64(SEED + layer as u64);
            let bound = 3f32.sqrt();
            Ok((0..tokens.unwrap_or(160) * config.hidden).map(|_| rng.random_range(-bound..bound)).collect())
        }
    }
}

/// The largest difference to the recorded cosines and sines, where there are any.
fn table_error(expected: &mut Expected, table: &[f32], dim: usize) -> Result<Option<f64>, String> {
    if !expected.has("rope_cos") || !expected.has("rope_sin") {
        return Ok(None);
    }
    let [cos, sin] = ["rope_cos", "rope_sin"].map(|name| expected.rows(name, dim / 2));
    let (cos, sin) = (cos?, sin?);
    let recorded = cos.chunks(dim / 2).zip(sin.chunks(dim / 2)).flat_map(|(cos, sin)| [cos, sin].concat());
    let recorded: Vec<f32> = recorded.collect();
    if recorded.len() != table.len() {
        return Err(format!(
            "rope_cos and rope_sin have {} positions, the inputs have {} tokens",
            recorded.len() / dim,
            table.len() / dim
        ));
    }
    let error = Errors::between(table, &recorded).largest;
    println!("Rotary: cosines and sines differ from the recorded ones by {error:.1e}");
    Ok(Some(error))
}

#[derive(Debug, Clone, Copy)]
struct Errors {
    relative: f64,
    largest: f64,
}

impl Errors {
    fn between(x: &[f32], expected: &[f32]) -> Self {
        let square = |x: f64| x * x;
        let pairs = || x.iter().zip(expected).map(|(x, e)| (f64::from(*x) - f64::from(*e), f64::from(*e)));
        let difference: f64 = pairs().map(|(d, _)| square(d)).sum();
        let size: f64 = pairs().map(|(_, e)| square(e)).sum();
        // f64::max would let a number hide a NaN.
        let largest = pairs().map(|(d, _)| d.abs()).fold(0.0, |a: f64, b| if a.is_nan() || a > b { a } else { b });
        Errors { relative: (difference / size.max(f64::MIN_POSITIVE)).sqrt(), largest }
    }

    fn worst(&self) -> f64 {
        if self.relative.is_nan() { self.relative } else { self.largest.max(self.relative) }
    }
}

impl std::fmt::Display for Errors {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(&format!("{:.1e}, {:.1e}", self.relative, self.largest))
    }
}
