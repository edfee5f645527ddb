//! Files of every kind, good and spoilt, and a folder for them.

use std::fs;

use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use sink_attention::DType;
use sink_attention::half::{bf16, f16};
use sink_attention::testing::compare::{accepted, lse, tensor};
use sink_attention::testing::folder::Folder;

use crate::binary::{fails, succeeds};

/// A safetensors file by parts, each of which a test may spoil.
#[derive(Clone)]
pub struct TestFile {
    pub metadata: Vec<(&'static str, String)>,
    pub tensors: Vec<(&'static str, &'static str, Vec<usize>)>,
    /// What tensors hold that are not made up.
    pub contents: Vec<(&'static str, Vec<u8>)>,
    /// Spaces behind the header, which shift the data.
    pub padding: usize,
}

impl TestFile {
    /// B=2 H=4 G=2 M=3 N=5 D=4 E=6 with sinks, bshd.
    pub fn good() -> Self {
        let tensors = vec![
            ("q", "F32", vec![2, 3, 4, 4]),
            ("k", "F32", vec![2, 5, 2, 4]),
            ("v", "F32", vec![2, 5, 2, 6]),
            ("sinks", "F32", vec![4]),
        ];
        TestFile { metadata: vec![], tensors, contents: vec![], padding: 0 }
    }

    pub fn with(mut self, key: &'static str, value: &str) -> Self {
        self.metadata.push((key, value.into()));
        self
    }

    /// Adds a tensor, or replaces the one of that name.
    pub fn tensor(self, name: &'static str, dtype: &'static str, shape: &[usize]) -> Self {
        let mut file = self.without(name);
        file.tensors.push((name, dtype, shape.to_vec()));
        file
    }

    /// As [`tensor`](Self::tensor), with whole numbers, as many as the shape has.
    pub fn integers(self, name: &'static str, dtype: &'static str, shape: &[usize], numbers: &[i64]) -> Self {
        let element = match dtype {
            "I64" => 8,
            "I32" | "U32" => 4,
            "U8" | "BOOL" => 1,
            other => panic!("{other} holds no whole numbers"),
        };
        assert_eq!(shape.iter().product::<usize>(), numbers.len());
        let mut file = self.tensor(name, dtype, shape);
        let bytes = numbers.iter().flat_map(|number| number.to_le_bytes()[..element].to_vec()).collect();
        file.contents.push((name, bytes));
        file
    }

    /// Two sequences of 2 and 3 queries, 1 and 4 keys: H=4 G=2 D=4 E=6 with sinks, thd.
    pub fn thd() -> Self {
        let file = TestFile::good().with("layout", "thd");
        let file = file.tensor("q", "F32", &[5, 4, 4]).tensor("k", "F32", &[5, 2, 4]).tensor("v", "F32", &[5, 2, 6]);
        let file = file.integers("cu_seqlens_q", "I32", &[3], &[0, 2, 5]);
        file.integers("cu_seqlens_k", "I32", &[3], &[0, 1, 5])
    }

    /// As [`thd`](Self::thd), with everything that a file may have.
    pub fn every_option() -> Self {
        let file = TestFile::thd().with("softcap", "2.5").with("sink_tokens", "1");
        let file = file.tensor("bias", "F32", &[2, 1, 3, 4]).tensor("mask", "U8", &[1, 4, 1, 4]);
        let file = file.tensor("alibi_slopes", "F32", &[4]);
        file.tensor("dout", "F32", &[5, 4, 6]).tensor("dlse", "F32", &[4, 5])
    }

    pub fn without(mut self, name: &str) -> Self {
        self.tensors.retain(|(other, ..)| *other != name);
        self.contents.retain(|(other, _)| *other != name);
        self
    }

    pub fn header_and_data(&self) -> (Value, Vec<u8>) {
        let mut header = serde_json::Map::new();
        if !self.metadata.is_empty() {
            let metadata = self.metadata.iter().map(|(key, value)| (key.to_string(), json!(value))).collect();
            header.insert("__metadata__".into(), Value::Object(metadata));
        }
        let mut data = Vec::new();
        for (name, dtype, shape) in &self.tensors {
            let (start, elements) = (data.len(), shape.iter().product::<usize>());
            let element = |i: usize| ((i * 7 + 3) % 13) as f32 * 0.25 - 1.5;
            let content = self.contents.iter().find(|(other, _)| other == name);
            match *dtype {
                _ if content.is_some() => data.extend(content.iter().flat_map(|(_, bytes)| bytes)),
                "F32" => data.extend((0..elements).flat_map(|i| element(i).to_le_bytes())),
                "F16" => data.extend((0..elements).flat_map(|i| f16::from_f32(element(i)).to_le_bytes())),
                "BF16" => data.extend((0..elements).flat_map(|i| bf16::from_f32(element(i)).to_le_bytes())),
                "F64" | "I64" => data.extend(std::iter::repeat_n(0u8, 8 * elements)),
                "I32" | "U32" => data.extend(std::iter::repeat_n(0u8, 4 * elements)),
                // Masks that hide some keys of some queries.
                _ => data.extend((0..elements).map(|i| u8::from(i % 7 != 2))),
            }
            let info = json!({"dtype": dtype, "shape": shape, "data_offsets": [start, data.len()]});
            header.insert(name.to_string(), info);
        }
        (Value::Object(header), data)
    }

    pub fn bytes(&self) -> Vec<u8> {
        let (header, data) = self.header_and_data();
        assemble(&(header.to_string() + &" ".repeat(self.padding)), &data)
    }
}

pub fn assemble(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

/// A folder of its own for a test, empty at first.
pub fn folder(test: &str) -> Folder {
    Folder::new(env!("CARGO_TARGET_TMPDIR"), test)
}

/// Runs `run` on these bytes, and checks what must hold of every failure: a message, no panic,
/// and nothing left behind.
#[track_caller]
pub fn rejects(folder: &Folder, bytes: &[u8], message: &str) {
    let input = folder.write("in", bytes);
    let stderr = fails(&["run", &input, &folder.path("out"), "--backend", "cpu"]);
    assert!(stderr.contains(message), "no {message:?} in: {stderr}");
    assert!(stderr.contains(&input), "the file is not named in: {stderr}");
    assert_eq!(folder.names(), ["in"]);
}

pub fn fixture(name: &str) -> String {
    format!("{}/../../tests/conformance/{name}.safetensors", env!("CARGO_MANIFEST_DIR"))
}

pub fn floats(file: &SafeTensors<'_>, name: &str) -> Vec<f32> {
    let tensor = file.tensor(name).unwrap();
    let halves = |widen: fn([u8; 2]) -> f32| tensor.data().as_chunks().0.iter().copied().map(widen).collect();
    match tensor.dtype() {
        Dtype::F32 => tensor.data().as_chunks().0.iter().map(|&chunk| f32::from_le_bytes(chunk)).collect(),
        Dtype::F16 => halves(|bytes| f16::from_le_bytes(bytes).to_f32()),
        Dtype::BF16 => halves(|bytes| bf16::from_le_bytes(bytes).to_f32()),
        other => panic!("{name} is {other}"),
    }
}

fn metadata_of(bytes: &[u8]) -> Vec<(String, String)> {
    let (_, header) = SafeTensors::read_metadata(bytes).unwrap();
    header.metadata().clone().unwrap().into_iter().collect()
}

/// Runs a fixture and compares with the results in it.
pub fn check_fixture(folder: &Folder, name: &str, layout: &str, arguments: &[&str]) -> (String, String) {
    let (input, output) = (fixture(name), folder.path("out"));
    let said = succeeds(&[&["run", &input, &output], arguments].concat());
    let (given, written) = (fs::read(input).unwrap(), fs::read(output).unwrap());
    let (given, results) = (SafeTensors::deserialize(&given).unwrap(), SafeTensors::deserialize(&written).unwrap());
    // Every fixture holds dout, so every result that it expects must be there, and no other.
    let expected: Vec<&str> = given.names().into_iter().filter_map(|name| name.strip_prefix("expected.")).collect();
    // No file expects the gradient of slopes: tests of its own hold that.
    assert_eq!(results.len(), expected.len() + usize::from(given.tensor("alibi_slopes").is_ok()));
    for name in expected {
        let expected = format!("expected.{name}");
        assert_eq!(results.tensor(name).unwrap().shape(), given.tensor(&expected).unwrap().shape());
        // Like the operands, but for what is f32 whatever they are.
        let dtype =
            if ["lse", "dsinks", "dbias"].contains(&name) { Dtype::F32 } else { given.tensor("q").unwrap().dtype() };
        assert_eq!(results.tensor(name).unwrap().dtype(), dtype, "{name}");
        let bound = accepted(match dtype {
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::Bf16,
            _ => DType::F32,
        });
        let compare = if name == "lse" { lse } else { tensor };
        compare(&floats(&results, name), &floats(&given, &expected), bound).unwrap();
    }
    assert_eq!(metadata_of(&written), [("layout".to_string(), layout.to_string())]);
    assert_eq!(folder.names(), ["out"]);
    said
}
