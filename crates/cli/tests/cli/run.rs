//! The built binary: what it computes, and what it says about files and arguments that are wrong.

use std::fs;

use crate::binary::{fails, sink_attention, succeeds, wrong_usage};
use crate::files::{TestFile, assemble, check_fixture, floats, folder, rejects};
use safetensors::SafeTensors;
use serde_json::{Value, json};
use sink_attention::Attention;
use sink_attention::file::case::Case;
use sink_attention::testing::devices::gpu;

#[test]
fn run_computes_what_the_file_expects() {
    let folder = folder("run_computes");
    let (stdout, stderr) = check_fixture(&folder, "causal_swa_gqa_sink_f32", "bshd", &["--backend", "cpu"]);
    assert!(
        stdout.starts_with("forward and backward B=1 H=4 G=2 M=140 N=140 D=32 E=32 bshd causal window=(31,-)"),
        "{stdout}"
    );
    assert_eq!(stdout.lines().count(), 1);
    assert!(stderr.is_empty(), "{stderr}");
    // The second run replaces the results of the first.
    check_fixture(&folder, "mqa_bhsd_layout_f32", "bhsd", &["--backend", "cpu", "--kernel", "auto"]);
    check_fixture(&folder, "top_left_causal_f32", "bshd", &[]);
}

#[test]
fn run_computes_in_half_precision() {
    let folder = folder("run_half");
    for (name, dtype) in [("gpt_oss_heads_f16", "f16"), ("gpt_oss_heads_bf16", "bf16")] {
        let (stdout, _) = check_fixture(&folder, name, "bshd", &["--backend", "cpu", "--json"]);
        let summary: Value = serde_json::from_str(&stdout).unwrap();
        assert_eq!(summary["dtype"], dtype);
        assert!(summary["problem"].as_str().unwrap().contains(&format!("bshd {dtype} ")), "{stdout}");
    }
}

#[test]
fn run_on_the_gpu() {
    if gpu().is_some() {
        let folder = folder("run_on_the_gpu");
        let arguments = ["--backend", "gpu", "--kernel", "portable", "--json"];
        let (stdout, _) = check_fixture(&folder, "swa_sinks_both_kinds_dlse_f32", "bshd", &arguments);
        assert_eq!(serde_json::from_str::<Value>(&stdout).unwrap()["gpu"], true);
    }
}

#[test]
fn run_prints_json() {
    let folder = folder("run_prints_json");
    let (stdout, _) = check_fixture(&folder, "forward_noncausal_f32", "bshd", &["--backend", "cpu", "--json"]);
    let summary: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(summary["pass"], "forward and backward");
    assert_eq!(summary["dtype"], "f32");
    assert_eq!(summary["gpu"], false);
    assert_eq!(
        summary["results"],
        json!({
            "out": [1, 80, 2, 64], "lse": [1, 2, 80], "dq": [1, 80, 2, 64], "dk": [1, 80, 2, 64], "dv": [1, 80, 2, 64]
        })
    );
    assert!(summary["seconds"].as_f64().unwrap() > 0.0);
    assert!(summary["device"].is_string() && summary["problem"].is_string() && summary["output"].is_string());
}

/// Every option reaches the computation: in a good file it gives what the library gives.
#[test]
fn run_honours_every_option() {
    let folder = folder("run_honours");
    let plain = TestFile::good();
    let files = [
        plain.clone(),
        plain.clone().with("causal", "true"),
        plain.clone().with("causal", "true").with("window_right", "1"),
        plain.clone().with("window_right", "0").with("causal", "false").with("format", "pt"),
        plain.clone().with("window_right", "1"),
        plain.clone().with("window_left", "1"),
        plain.clone().with("window_left", "0").with("sink_tokens", "1"),
        plain.clone().with("window_left", "18446744073709551615"),
        plain.clone().with("causal", "true").with("align", "top-left"),
        plain.clone().with("causal", "true").with("q_offset", "-1").with("align", "bottom-right"),
        plain.clone().with("causal", "true").with("q_offset", "-9223372036854775808"),
        plain.clone().with("scale", "-0.25"),
        plain.clone().without("sinks"),
        plain.clone().tensor("q", "F32", &[2, 4, 3, 4]).tensor("k", "F32", &[2, 2, 5, 4]).with("layout", "bhsd"),
    ];
    let mut results: Vec<Vec<u8>> = Vec::new();
    for mut file in files {
        if file.metadata.iter().any(|(_, value)| value == "bhsd") {
            file = file.tensor("v", "F32", &[2, 2, 5, 6]);
        }
        let (input, output) = (folder.write("in", &file.bytes()), folder.path("out"));
        succeeds(&["run", &input, &output, "--backend", "cpu"]);
        let written = fs::read(&output).unwrap();
        let case = Case::read(&input).unwrap();
        let library = Attention::cpu().forward(&case.problem, &case.inputs::<f32>().unwrap()).unwrap();
        let tensors = SafeTensors::deserialize(&written).unwrap();
        assert_eq!((floats(&tensors, "out"), floats(&tensors, "lse")), (library.o, library.lse), "{:?}", file.metadata);
        results.push(written);
    }
    let same: Vec<(usize, usize)> = (0..results.len())
        .flat_map(|j| (0..j).map(move |i| (i, j)))
        .filter(|&(i, j)| results[i] == results[j])
        .collect();
    // Causal is right = 0, whatever the right bound; a window wider than the keys is none.
    assert_eq!(same, [(1, 2), (1, 3), (2, 3), (0, 7)]);
}

#[test]
fn data_need_not_be_aligned() {
    let case = |padding| Case::parse(&TestFile { padding, ..TestFile::good() }.bytes()).unwrap();
    for padding in 1..8 {
        assert_eq!(case(padding), case(0));
    }
}

#[test]
fn expected_results_are_ignored() {
    let folder = folder("expected_ignored");
    let file = TestFile::good().tensor("expected.out", "U8", &[7]).tensor("expected.anything", "F64", &[]);
    let input = folder.write("in", &file.bytes());
    let (_, stderr) = succeeds(&["run", &input, &folder.path("out"), "--backend", "cpu"]);
    assert_eq!(stderr, "");
}

#[test]
fn bad_options_are_rejected() {
    let folder = folder("bad_options");
    for (key, values) in [
        ("causal", &["True", "1", "", "yes", " true"][..]),
        ("window_left", &["-1", "1.5", "", "x", "18446744073709551616", "0x1"]),
        ("window_right", &["-1", "none"]),
        ("sink_tokens", &["-4", "4.0"]),
        ("scale", &["nan", "inf", "-inf", "1e39", "", "1/8"]),
        ("softcap", &["0", "-0.0", "-20", "1e-60", "nan", "inf", "1e39", "", "20,0"]),
        ("q_offset", &["1.0", "9223372036854775808", ""]),
        ("align", &["top_left", "Top-Left", ""]),
        ("layout", &["sbhd", "BSHD", "thd ", ""]),
    ] {
        for value in values {
            let file = TestFile::good().with(key, value);
            rejects(&folder, &file.bytes(), &format!("metadata {key} is {value:?}; it must be "));
        }
    }
    for key in ["Causal", "windowleft", "window_size", "is_causal", "formats", ""] {
        rejects(&folder, &TestFile::good().with(key, "1").bytes(), &format!("unknown metadata key {key:?}"));
    }
}

#[test]
fn what_is_named_twice_is_rejected() {
    let folder = folder("named_twice");
    let (header, data) = TestFile::good().with("causal", "true").header_and_data();
    let header = header.to_string();
    for (once, twice, name) in [
        (r#""causal":"true""#, r#""causal":"true","causal":"true""#, "causal"),
        (r#""causal":"true""#, r#""causal":"true","ca\u0075sal":"false""#, "causal"),
        (r#""sinks":{"#, r#""sinks":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"sinks":{"#, "sinks"),
        (r#"{"__metadata__""#, r#"{"__metadata__":{},"__metadata__""#, "__metadata__"),
        (r#""shape":[4]"#, r#""shape":[4],"shape":[4]"#, "shape"),
    ] {
        assert!(header.contains(once));
        let doubled = header.replacen(once, twice, 1);
        rejects(&folder, &assemble(&doubled, &data), name);
    }
}

#[test]
fn wrong_tensors_are_rejected() {
    let folder = folder("wrong_tensors");
    let good = TestFile::good;
    for (file, message) in [
        (good().without("q"), "tensor q is missing"),
        (good().without("k"), "tensor k is missing"),
        (good().without("v"), "tensor v is missing"),
        (good().tensor("sink", "F32", &[4]), "unknown tensor \"sink\""),
        (good().tensor("Q", "F32", &[4]), "unknown tensor \"Q\""),
        (good().tensor("expected", "F32", &[4]), "unknown tensor \"expected\""),
        (
            good().tensor("q", "F32", &[2, 3, 16]),
            "tensor q has shape [2, 3, 16]; in layout bshd its axes must be [batch, seq, heads, width]",
        ),
        (good().tensor("k", "F32", &[2, 5, 2, 4, 1]), "tensor k has shape [2, 5, 2, 4, 1]"),
        (good().tensor("v", "F32", &[]), "tensor v has shape []"),
        (good().tensor("q", "F64", &[2, 3, 4, 4]), "tensor q has element type F64"),
        (good().tensor("q", "I32", &[2, 3, 4, 4]), "tensor q has element type I32"),
        (good().tensor("k", "F16", &[2, 5, 2, 4]), "tensor k has element type F16, q has F32"),
        (good().tensor("v", "BF16", &[2, 5, 2, 6]), "tensor v has element type BF16, q has F32"),
        (good().tensor("sinks", "F16", &[4]), "tensor sinks has element type F16; it must be F32"),
        (good().tensor("sinks", "F32", &[3]), "tensor sinks has shape [3]; q, k and v call for [4]"),
        (good().tensor("sinks", "F32", &[4, 1]), "tensor sinks has shape [4, 1]"),
        (good().tensor("q", "F32", &[1, 3, 4, 4]), "batch differs: 1 of q, 2 of k (in layout bshd)"),
        (good().tensor("v", "F32", &[3, 5, 2, 6]), "batch differs: 2 of q, 3 of v"),
        (good().tensor("v", "F32", &[2, 4, 2, 6]), "sequence length differs: 5 of k, 4 of v"),
        (good().tensor("v", "F32", &[2, 5, 1, 6]), "heads differs: 2 of k, 1 of v"),
        (good().tensor("k", "F32", &[2, 5, 2, 3]), "width differs: 4 of q, 3 of k"),
        (good().tensor("q", "F32", &[2, 3, 3, 4]), "heads (3) must be a multiple of kv_heads (2)"),
        (good().tensor("q", "F32", &[2, 0, 4, 4]), "seq_q is 0"),
        (good().tensor("v", "F32", &[2, 5, 2, 513]), "value_dim is 513, the most is 512"),
        (good().tensor("dout", "F32", &[2, 3, 4, 4]), "tensor dout has shape [2, 3, 4, 4]"),
        (good().tensor("dout", "F16", &[2, 3, 4, 6]), "tensor dout has element type F16, q has F32"),
        (good().tensor("dlse", "F32", &[2, 3, 4]), "tensor dlse has shape [2, 3, 4]; q, k and v call for [2, 4, 3]"),
        (good().with("layout", "bhsd"), "heads"),
        (TestFile { tensors: vec![], ..good() }, "tensor q is missing"),
    ] {
        rejects(&folder, &file.bytes(), message);
    }
}

#[test]
fn malformed_files_are_rejected() {
    let folder = folder("malformed");
    let file = TestFile::good().with("causal", "true");
    let bytes = file.bytes();
    for length in [0, 1, 7] {
        rejects(&folder, &bytes[..length], &format!("not a safetensors file: {length} bytes"));
    }
    let header_end = bytes.len() - file.header_and_data().1.len();
    for length in (8..header_end).step_by(61).chain([header_end - 1]) {
        rejects(&folder, &bytes[..length], "not a safetensors file, or truncated");
    }
    for length in (header_end..bytes.len()).step_by(173).chain([bytes.len() - 1]) {
        rejects(&folder, &bytes[..length], "truncated or overlong");
    }
    rejects(&folder, &[&bytes[..], &[0]].concat(), "truncated or overlong");
    rejects(&folder, b"\x93NUMPY\x01\x00v\x00{'descr': '<f4'}", "not a safetensors file");
    for length in [0, 1, header_end as u64, u64::from(u32::MAX), i64::MAX as u64, u64::MAX] {
        rejects(&folder, &[&length.to_le_bytes(), &bytes[8..]].concat(), "");
    }
    for header in ["", "{", "[]", "null", "7", "{}x", "\u{fffd}", &"[".repeat(100_000), &"{\"a\":".repeat(100_000)] {
        rejects(&folder, &assemble(header, &[]), "malformed header");
    }
    rejects(&folder, &assemble("{\"\u{0}\":1}", &[]), "malformed header");
    rejects(&folder, &[&[1, 0, 0, 0, 0, 0, 0, 0, 0xff][..]].concat(), "malformed header");
    for metadata in ["7", "[]", "{\"causal\":true}", "{\"causal\":null}", "\"causal\""] {
        rejects(&folder, &assemble(&format!("{{\"__metadata__\":{metadata}}}"), &[]), "malformed header");
    }
}

/// Sizes and offsets near the end of the integers, which overflow where they are added or multiplied.
#[test]
fn overflowing_headers_are_rejected() {
    let folder = folder("overflowing");
    let tensor = |shape: &str, start: u64, end: u64| {
        format!("{{\"dtype\":\"F32\",\"shape\":{shape},\"data_offsets\":[{start},{end}]}}")
    };
    let max = u64::MAX;
    for q in [
        tensor("[1,1,1,1]", 0, max),
        tensor("[1,1,1,1]", max - 3, max),
        tensor("[1,1,1,1]", 4, 0),
        tensor("[4294967296,4294967296,1,1]", 0, 0),
        tensor("[4294967296,4294967296,4294967296,4294967296]", 0, 4),
        tensor("[9223372036854775807,1,1,1]", 0, 4),
        tensor("[18446744073709551615,1,1,1]", 0, 4),
        tensor("[18446744073709551616,1,1,1]", 0, 4),
        tensor("[-1,1,1,1]", 0, 4),
        tensor("[1.0,1,1,1]", 0, 4),
        tensor("[0,18446744073709551615,1,1]", 0, 0),
        tensor("[1,1,1,1]", 0, 4).replace("F32", "F31"),
        tensor("[1,1,1,1]", 0, 4).replace("shape", "shapes"),
    ] {
        rejects(&folder, &assemble(&format!("{{\"q\":{q}}}"), &[0; 4]), "");
    }

    // Each tensor is countable, their sum is not: the end plus the header's length is beyond 64 bits.
    let chunk = 1u64 << 60;
    let mut tensors: Vec<String> = (0..15)
        .map(|i| format!("\"expected.{i}\":{}", tensor(&format!("[{}]", chunk / 4), i * chunk, (i + 1) * chunk)))
        .collect();
    let rest = (max - 15 * chunk) / 4 * 4;
    tensors.push(format!("\"q\":{}", tensor(&format!("[{}]", rest / 4), 15 * chunk, 15 * chunk + rest)));
    let header = format!("{{{}}}", tensors.join(","));
    rejects(&folder, &assemble(&header, &[0; 4]), "truncated or overlong");
}

/// In the process itself, where thousands of files take no time: an error or a case, never a panic.
#[test]
fn no_damage_makes_the_parser_panic() {
    let options = |file: TestFile| file.with("causal", "true").with("window_left", "3").with("scale", "0.5");
    damage(options(TestFile::good()));
    damage(options(TestFile::every_option()));
}

fn damage(good: TestFile) {
    let bytes = good.bytes();
    for length in 0..bytes.len() {
        Case::parse(&bytes[..length]).unwrap_err();
    }
    let header_end = bytes.len() - good.header_and_data().1.len();
    let mut parsed = 0;
    for i in 0..header_end {
        for replacement in
            [0, b'"', b'0', b'9', b'-', b',', b'}', b']', b'.', b'q', 0xff, bytes[i] ^ 1, bytes[i] ^ 0x20]
        {
            let mut damaged = bytes.clone();
            damaged[i] = replacement;
            if let Ok(case) = Case::parse(&damaged) {
                parsed += 1;
                case.problem.check_inputs(&case.inputs::<f32>().unwrap()).unwrap();
            }
        }
    }
    assert!(parsed > 0, "damage to a digit of an option should still give a file");
}

/// A few of the same through the binary: whatever it decides, results and exit code belong together.
#[test]
fn damaged_headers_give_results_or_an_error() {
    let folder = folder("damaged");
    let file = TestFile::good().with("window_left", "3");
    let bytes = file.bytes();
    let header_end = bytes.len() - file.header_and_data().1.len();
    for i in (0..header_end).step_by(7) {
        let mut damaged = bytes.clone();
        damaged[i] ^= 1 << (i % 8);
        let (input, output) = (folder.write("in", &damaged), folder.path("out"));
        let result = sink_attention(&["run", &input, &output, "--backend", "cpu"]);
        let stderr = String::from_utf8(result.stderr).unwrap();
        match result.status.code() {
            Some(0) => fs::remove_file(output).unwrap(),
            Some(1) => assert!(stderr.starts_with("error: ") && !stderr.contains("panicked"), "{stderr}"),
            other => panic!("exit code {other:?}: {stderr}"),
        }
        assert_eq!(folder.names(), ["in"]);
    }
}

#[test]
fn impossible_paths_are_rejected() {
    let folder = folder("paths");
    let input = folder.write("in", &TestFile::good().bytes());
    let run = |input: &str, output: &str| fails(&["run", input, output, "--backend", "cpu"]);

    let missing = folder.path("missing");
    assert!(run(&missing, &folder.path("out")).contains(&format!("cannot read {missing}")));
    assert!(run(&folder.path(""), &folder.path("out")).contains("cannot read"));
    for output in [folder.path("no/such/folder/out"), folder.path("in/out")] {
        assert!(run(&input, &output).contains("cannot write"), "{output}");
    }
    assert!(run(&input, &folder.path("")).contains("not a regular file"));
    assert!(run(&input, &folder.path(&"x".repeat(300))).contains("cannot write"));
    for same in [input.clone(), folder.path("./in"), folder.path("../paths/in")] {
        assert!(run(&input, &same).contains("it is the input file"));
    }
    assert_eq!(folder.names(), ["in"]);
    assert_eq!(fs::read(&input).unwrap(), TestFile::good().bytes());
}

#[cfg(unix)]
#[test]
fn links_and_folders_are_not_replaced() {
    let folder = folder("links");
    let input = folder.write("in", &TestFile::good().bytes());
    let link = folder.path("link");
    std::os::unix::fs::symlink(&input, &link).unwrap();
    assert!(fails(&["run", &input, &link, "--backend", "cpu"]).contains("it is the input file"));
    assert!(fails(&["run", &link, &input, "--backend", "cpu"]).contains("it is the input file"));
    assert!(fails(&["run", &input, &folder.path("out/"), "--backend", "cpu"]).contains("cannot write"));
    assert_eq!(folder.names(), ["in", "link"]);
}

/// A failed run says so, and leaves what an earlier one has written.
#[test]
fn an_earlier_result_survives_a_failure() {
    let folder = folder("survives");
    let output = folder.write("out", b"earlier");
    let input = folder.write("in", &TestFile::good().with("causal", "maybe").bytes());
    fails(&["run", &input, &output, "--backend", "cpu"]);
    assert_eq!(fs::read(&output).unwrap(), b"earlier");
}

#[test]
fn wrong_usage_exits_with_2() {
    let folder = folder("usage");
    let (input, output) = (folder.write("in", &TestFile::good().bytes()), folder.path("out"));
    wrong_usage(&["run", &input], "<OUT>");
    wrong_usage(&["run", &input, &output, "--backend", "tpu"], "tpu");
    wrong_usage(&["run", &input, &output, "--kernel", "fast"], "fast");
    wrong_usage(&["run", &input, &output, "--fast"], "--fast");
    wrong_usage(&["run", &input, &output, "--backend", "cpu", "--adapter", "x"], "cannot be used with '--backend cpu'");
    wrong_usage(&["run", &input, &output, "--backend", "cpu", "--kernel", "portable"], "cannot be used with");
    wrong_usage(&["run", &input, &output, "--backend", "cpu", "--precision", "split"], "cannot be used with");
    wrong_usage(&["run", &input, &output, "--precision", "double"], "double");
    wrong_usage(&["tune", "--precision", "split"], "cannot be used with tune");
    wrong_usage(&["plan", "--decode", "--precision", "split"], "cannot be used with --decode");
    wrong_usage(&["run", &input, ""], "OUT");
    wrong_usage(&["walk"], "walk");
    assert_eq!(folder.names(), ["in"]);
}

/// Of f32 there is no cooperative kernel, with a GPU or without one.
#[test]
fn kernels_that_there_are_not() {
    let folder = folder("cooperative");
    let (input, output) = (folder.write("in", &TestFile::good().bytes()), folder.path("out"));
    let stderr = fails(&["run", &input, &output, "--kernel", "cooperative"]);
    assert!(stderr.contains("cooperative"), "{stderr}");
    assert_eq!(folder.names(), ["in"]);
    let plan = |arguments: &[&'static str]| [&["plan", "--kernel", "cooperative", "--device"], arguments].concat();
    let stderr = fails(&plan(&["H200"]));
    assert!(stderr.contains("f32 operands need the portable micro-kernel"), "{stderr}");
    let stderr = fails(&plan(&["A770", "--dtype", "f16"]));
    assert!(stderr.contains("Intel Arc A770 has no cooperative matrices"), "{stderr}");
    succeeds(&plan(&["H200", "--dtype", "f16", "--backward"]));
    succeeds(&["plan", "--device", "H200", "--kernel", "portable", "--backward"]);
    let split = |arguments: &[&'static str]| [&["plan", "--precision", "split", "--device"], arguments].concat();
    let (stdout, _) = succeeds(&split(&["H200", "--backward"]));
    assert!(stdout.contains("d_kv_fragments_f32_d64_e64"), "{stdout}");
    let stderr = fails(&split(&["H200", "--dtype", "f16"]));
    assert!(stderr.contains("the operands are f16"), "{stderr}");
    let stderr = fails(&split(&["A770"]));
    assert!(stderr.contains("Intel Arc A770 has no cooperative matrices"), "{stderr}");
    let stderr = fails(&split(&["H200", "--kernel", "cooperative"]));
    assert!(stderr.contains("the micro-kernel fragments alone"), "{stderr}");
}

#[test]
fn help_explains_the_format() {
    let (stdout, _) = succeeds(&["run", "--help"]);
    for word in [
        "safetensors",
        "window_left",
        "softcap",
        "cu_seqlens_q",
        "dalibi_slopes",
        "--backend",
        "--adapter",
        "--kernel",
        "--json",
    ] {
        assert!(stdout.contains(word), "no {word} in: {stdout}");
    }
}
