//! The example on its fixture, on spoiled copies of it, and on a layer of the real model's size.

use std::collections::HashMap;
use std::fs;

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use sink_attention::half::bf16;

use super::*;

/// A copy of the fixture, removed in the end.
struct Folder(PathBuf);

impl Folder {
    fn empty(name: &str) -> Self {
        let folder = std::env::temp_dir().join(format!("gpt-oss-layer-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).unwrap();
        Folder(folder)
    }

    fn new(name: &str) -> Self {
        let folder = Folder::empty(name);
        for file in ["config.json", "model.safetensors", "expected.safetensors"] {
            fs::copy(parse([]).unwrap().unwrap().folder.join(file), folder.0.join(file)).unwrap();
        }
        folder
    }

    fn bytes(&self, file: &str) -> Vec<u8> {
        fs::read(self.0.join(file)).unwrap()
    }

    fn write(&self, file: &str, bytes: impl AsRef<[u8]>) {
        fs::write(self.0.join(file), bytes).unwrap();
    }

    /// Writes a file again with its tensors changed: bytes and shape, or none.
    fn change(&self, file: &str, change: impl Fn(&str, &mut Tensor) -> bool) {
        let bytes = self.bytes(file);
        let tensors = tensors(&bytes).into_iter().filter_map(|(name, mut tensor)| {
            let keep = change(&name, &mut tensor);
            keep.then_some((name, tensor))
        });
        self.write(file, serialize(&tensors.collect::<Vec<_>>()));
    }

    /// Replaces a part of config.json, which is there.
    fn configure(&self, from: &str, to: &str) {
        let text = String::from_utf8(self.bytes("config.json")).unwrap();
        assert!(text.contains(from), "{from} in {text}");
        self.write("config.json", text.replace(from, to));
    }

    fn run(&self, options: &str) -> Result<(), String> {
        self.run_on(&DeviceChoice::from_env(), options)
    }

    fn run_on(&self, choice: &DeviceChoice, options: &str) -> Result<(), String> {
        let words = options.split_whitespace().map(OsString::from);
        let args = parse([self.0.clone().into_os_string()].into_iter().chain(words)).map_err(|e| e.to_string())?;
        run(&args.unwrap(), choice).map_err(|error| error.to_string())
    }

    #[track_caller]
    fn fails(&self, message: &str) {
        let error = self.run("").unwrap_err();
        assert!(error.contains(message), "no {message:?} in: {error}");
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

struct Tensor {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

fn tensors(bytes: &[u8]) -> Vec<(String, Tensor)> {
    let read = SafeTensors::deserialize(bytes).unwrap();
    let of = |(name, view): (String, TensorView<'_>)| {
        (name, Tensor { dtype: view.dtype(), shape: view.shape().to_vec(), bytes: view.data().to_vec() })
    };
    read.tensors().into_iter().map(of).collect()
}

fn serialize(tensors: &[(String, Tensor)]) -> Vec<u8> {
    let views = tensors.iter().map(|(name, tensor)| {
        (name.as_str(), TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.bytes).unwrap())
    });
    safetensors::serialize(views, None::<HashMap<String, String>>).unwrap()
}

const SINKS: &str = "model.layers.0.self_attn.sinks";

#[test]
fn the_fixture_with_any_prompt() {
    for choice in [Some(DeviceChoice::Cpu), gpu::choice()].into_iter().flatten() {
        let folder = Folder::new("whole");
        for options in ["", "--prompt 1", "--prompt 74", "--prompt 15 --layers 0", "--prompt 16 --layers 1,0"] {
            folder.run_on(&choice, options).unwrap_or_else(|error| panic!("{choice:?} {options}: {error}"));
        }
        fs::remove_file(folder.0.join("expected.safetensors")).unwrap();
        folder.run_on(&choice, "--tokens 40").unwrap();
    }
}

#[test]
fn mistakes_on_the_command_line_are_errors() {
    let folder = Folder::new("options");
    for (options, message) in [
        ("--layers 2", "there is no layer 2, config.json has 2"),
        ("--layers one", "not a list of numbers"),
        ("--prompt 75", "--prompt 75: there are 75 tokens"),
        ("--prompt 0", "from 1 to 65536"),
        ("--tokens 9", "the inputs are those of expected.safetensors"),
        ("--tokens", "needs a value"),
        ("--fast", "unknown option --fast"),
        ("more", "a second folder, more"),
    ] {
        let error = folder.run(options).unwrap_err();
        assert!(error.contains(message), "{options}: {error}");
    }
}

/// What the layers are made of matters: the comparison sees each part that is wrong.
#[test]
fn wrong_results_fail() {
    for (from, to, what) in [
        ("\"sliding_window\": 16", "\"sliding_window\": 15", "prefill's error"),
        ("\"factor\": 8.0", "\"factor\": 7.9", "the rotary table's error"),
        ("\"truncate\": false", "\"truncate\": true", "the rotary table's error"),
        ("\"attention_bias\": true", "\"attention_bias\": false", "prefill's error"),
    ] {
        let folder = Folder::new("wrong");
        folder.configure(from, to);
        folder.fails(what);
    }
    for part in ["sinks", "q_proj.bias", "k_proj.weight", "v_proj.bias", "o_proj.bias"] {
        let folder = Folder::new("changed");
        folder.change("model.safetensors", |name, tensor| {
            if name.ends_with(part) {
                tensor.bytes.fill(0);
            }
            true
        });
        folder.fails("error is");
    }
}

#[test]
fn malformed_files_are_errors() {
    let folder = Folder::new("missing");
    folder.change("model.safetensors", |name, _| name != SINKS);
    folder.fails(&format!("model.safetensors: tensor {SINKS} is missing"));

    let folder = Folder::new("shape");
    folder.change("model.safetensors", |name, tensor| {
        if name.ends_with("0.self_attn.q_proj.weight") {
            tensor.shape.reverse();
        }
        true
    });
    folder.fails("q_proj.weight has shape [96, 256], config.json calls for [256, 96]");

    let folder = Folder::new("dtype");
    folder.change("model.safetensors", |name, tensor| {
        if name == SINKS {
            tensor.dtype = Dtype::I16;
        }
        true
    });
    folder.fails("has element type I16; known: BF16, F16, F32");

    let folder = Folder::new("truncated");
    let whole = folder.bytes("model.safetensors");
    for (end, message) in [
        (0, "0 bytes, the length of the header alone takes 8"),
        (7, "7 bytes, the length"),
        (100, "the header claims"),
        (whole.len() - 1, "truncated or overlong: the tensors take"),
    ] {
        folder.write("model.safetensors", &whole[..end]);
        folder.fails(message);
    }
    folder.write("model.safetensors", u64::MAX.to_le_bytes());
    folder.fails("the header claims 18446744073709551615 bytes, 0 follow its length");
    folder.write("model.safetensors", [&2u64.to_le_bytes()[..], b"[]"].concat());
    folder.fails("malformed header");
    fs::remove_file(folder.0.join("model.safetensors")).unwrap();
    folder.fails("model.safetensors: ");
    folder.write("config.json", "{}");
    folder.fails("config.json: model_type is missing");
    fs::remove_file(folder.0.join("config.json")).unwrap();
    folder.fails("cannot read");

    let folder = Folder::new("expected");
    folder.change("expected.safetensors", |name, _| name != "layers.1.attn_output");
    folder.fails("tensor layers.1.attn_output is missing");
    folder.change("expected.safetensors", |_, tensor| {
        if tensor.shape[2] == 96 {
            tensor.shape = vec![75, 96];
        }
        true
    });
    folder.fails("layers.0.attn_input has shape [75, 96], it must be [1, tokens, 96]");
    let folder = Folder::new("shorter");
    folder.change("expected.safetensors", |name, tensor| {
        if name.ends_with("output") {
            tensor.shape[1] = 70;
            tensor.bytes.truncate(70 * 96 * 4);
        }
        true
    });
    folder.fails("layers.0.attn_output has 70 tokens, attn_input has 75");
}

/// A sliding layer with the sizes of gpt-oss-20b, in two shards.
#[test]
fn a_layer_of_the_real_size() {
    let folder = Folder::empty("real");
    let config = String::from_utf8(fs::read(parse([]).unwrap().unwrap().folder.join("config.json")).unwrap()).unwrap();
    let mut json: serde_json::Value = serde_json::from_str(&config).unwrap();
    for (name, value) in [
        ("hidden_size", 2880),
        ("num_hidden_layers", 1),
        ("num_attention_heads", 64),
        ("num_key_value_heads", 8),
        ("head_dim", 64),
        ("sliding_window", 128),
    ] {
        json[name] = value.into();
    }
    json["layer_types"] = serde_json::json!(["sliding_attention"]);
    folder.write("config.json", json.to_string());
    let mut rng = StdRng::seed_from_u64(1);
    let mut tensor = |name: &str, shape: &[usize]| {
        let bound = (3.0 / *shape.last().unwrap() as f32).sqrt();
        let bytes =
            (0..shape.iter().product()).flat_map(|_| bf16::from_f32(rng.random_range(-bound..bound)).to_le_bytes());
        let tensor = Tensor { dtype: Dtype::BF16, shape: shape.to_vec(), bytes: bytes.collect() };
        (format!("model.layers.0.self_attn.{name}"), tensor)
    };
    let mut shards = [vec![tensor("sinks", &[64])], vec![]];
    for (name, outputs, inputs) in
        [("q_proj", 4096, 2880), ("k_proj", 512, 2880), ("v_proj", 512, 2880), ("o_proj", 2880, 4096)]
    {
        shards[1].push(tensor(&format!("{name}.weight"), &[outputs, inputs]));
        shards[0].push(tensor(&format!("{name}.bias"), &[outputs]));
    }
    let mut map = serde_json::Map::new();
    for (n, shard) in shards.iter().enumerate() {
        let file = format!("model-0000{n}-of-00002.safetensors");
        folder.write(&file, serialize(shard));
        map.extend(shard.iter().map(|(name, _)| (name.clone(), file.clone().into())));
    }
    let index = |map: &serde_json::Map<String, serde_json::Value>| {
        let text = serde_json::json!({ "weight_map": map }).to_string();
        folder.write("model.safetensors.index.json", text);
    };
    index(&map);
    folder.run("--tokens 140 --prompt 130").unwrap();

    map[SINKS] = "../model.safetensors".into();
    index(&map);
    folder.fails("must be a file's name");
    map.remove(SINKS);
    index(&map);
    folder.fails(&format!("index.json: tensor {SINKS} is missing"));
    folder.write("model.safetensors.index.json", "{}");
    folder.fails("weight_map is missing");
}
