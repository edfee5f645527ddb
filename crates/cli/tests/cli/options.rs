//! The built binary on files with a bias, a mask, ALiBi slopes, softcap and sequences of different lengths: what it computes,
//! and what it says where they are wrong.

use std::fs;

use crate::binary::{fails, succeeds};
use crate::files::{TestFile, check_fixture, floats, folder, rejects};
use safetensors::{Dtype, SafeTensors};
use sink_attention::cpu::reference;
use sink_attention::file::case::Case;
use sink_attention::half::{bf16, f16};
use sink_attention::testing::compare::accepted;
use sink_attention::testing::compare::tensor;
use sink_attention::testing::devices::gpu;
use sink_attention::{Axes, DType, Element};

const FIXTURES: [(&str, &str); 5] = [
    ("alibi_causal_f32", "bshd"),
    ("bias_full_f32", "bshd"),
    ("bool_mask_broadcast_f32", "bshd"),
    ("softcap_scale_f32", "bshd"),
    ("varlen_causal_swa_sink_f32", "thd"),
];

#[test]
fn run_computes_what_the_files_expect() {
    let folder = folder("options_fixtures");
    for (name, layout) in FIXTURES {
        check_fixture(&folder, name, layout, &["--backend", "cpu"]);
        if gpu().is_some() {
            check_fixture(&folder, name, layout, &["--backend", "gpu"]);
        }
    }
}

/// Good files with the options alone and together, and broadcasting of every kind.
fn good_files() -> Vec<TestFile> {
    let good = || TestFile::good().tensor("dout", "F32", &[2, 3, 4, 6]);
    let half = |dtype| {
        let file = good().tensor("q", dtype, &[2, 3, 4, 4]).tensor("k", dtype, &[2, 5, 2, 4]);
        file.tensor("v", dtype, &[2, 5, 2, 6]).tensor("dout", dtype, &[2, 3, 4, 6])
    };
    let mut files = vec![
        good().with("softcap", "2"),
        good().with("softcap", "0.5").with("scale", "1.5"),
        good().tensor("alibi_slopes", "F32", &[4]),
        good().tensor("alibi_slopes", "F32", &[4]).with("q_offset", "3"),
        half("F16").tensor("bias", "F16", &[1, 4, 3, 5]),
        half("F16").tensor("bias", "F32", &[1, 1, 3, 5]),
        half("BF16").tensor("bias", "BF16", &[2, 4, 1, 5]),
        half("BF16").tensor("mask", "U8", &[1, 1, 3, 5]).tensor("alibi_slopes", "F32", &[4]),
        TestFile::thd(),
        TestFile::thd().with("causal", "true").tensor("dout", "F32", &[5, 4, 6]),
        TestFile::every_option(),
        // An empty sequence on either side.
        TestFile::thd().integers("cu_seqlens_q", "I32", &[5], &[0, 2, 2, 5, 5]).integers(
            "cu_seqlens_k",
            "I32",
            &[5],
            &[0, 0, 1, 4, 5],
        ),
    ];
    for (b, h, m) in (0..8).map(|n| (1 + (n & 1), 1 + 3 * (n >> 1 & 1), 1 + 2 * (n >> 2))) {
        files.push(good().tensor("bias", "F32", &[b, h, m, 5]));
        files.push(good().tensor("mask", "U8", &[b, h, m, 5]));
    }
    files
}

/// The results of a file by the definition, under the names of the format.
fn expected<T: Element>(case: &Case) -> Vec<(&'static str, Vec<f64>)> {
    let inputs = case.inputs::<T>().unwrap();
    let output = reference::forward(&case.problem, &inputs).unwrap();
    let mut all = vec![("out", output.o), ("lse", output.lse)];
    if let Some(upstream) = case.upstream().unwrap() {
        let gradients = reference::backward(&case.problem, &inputs, &upstream).unwrap();
        all.extend([("dq", gradients.d_q), ("dk", gradients.d_k), ("dv", gradients.d_v)]);
        all.extend(gradients.d_sink_logits.map(|d_sink| ("dsinks", d_sink)));
        all.extend(gradients.d_alibi_slopes.map(|slopes| ("dalibi_slopes", slopes)));
        all.extend(gradients.d_bias.map(|d_bias| ("dbias", d_bias)));
    }
    all
}

#[test]
fn every_option_reaches_the_computation() {
    let folder = folder("options_honoured");
    let mut results: Vec<Vec<u8>> = Vec::new();
    for file in good_files() {
        let (input, output) = (folder.write("in", &file.bytes()), folder.path("out"));
        succeeds(&["run", &input, &output, "--backend", "cpu"]);
        let (case, written) = (Case::read(&input).unwrap(), fs::read(&output).unwrap());
        let tensors = SafeTensors::deserialize(&written).unwrap();
        let dtype = case.problem.options().dtype;
        let expected = match dtype {
            DType::F16 => expected::<f16>(&case),
            DType::Bf16 => expected::<bf16>(&case),
            _ => expected::<f32>(&case),
        };
        let mut names = tensors.names();
        names.sort();
        let mut wanted: Vec<_> = expected.iter().map(|(name, _)| *name).collect();
        wanted.sort();
        assert_eq!(names, wanted, "{}", case.problem);
        for (name, expected) in expected {
            let actual = floats(&tensors, name);
            // Infinities must be alike, the rest close.
            let finite: Vec<usize> = (0..expected.len()).filter(|&n| expected[n].is_finite()).collect();
            assert!((0..expected.len()).all(|n| expected[n].is_finite() || f64::from(actual[n]) == expected[n]));
            let pick = |x: Vec<f64>| finite.iter().map(|&n| x[n]).collect::<Vec<f64>>();
            let single = ["lse", "dsinks", "dalibi_slopes", "dbias"].contains(&name);
            let found = tensors.tensor(name).unwrap().dtype();
            assert_eq!(found == Dtype::F32, single || dtype == DType::F32, "{name} is {found}");
            let bound = accepted(if single { DType::F32 } else { dtype });
            tensor(&pick(actual.into_iter().map(f64::from).collect()), &pick(expected), bound)
                .unwrap_or_else(|error| panic!("{}: {name}: {error}", case.problem));
        }
        results.push(written);
    }
    for j in 0..results.len() {
        assert!((0..j).all(|i| results[i] != results[j]), "file {j} gives what another one gives");
    }
}

#[test]
fn gradients_have_the_shapes_of_their_operands() {
    let folder = folder("options_shapes");
    let output = folder.path("out");
    let shape = |name: &str| {
        let written = fs::read(&output).unwrap();
        SafeTensors::deserialize(&written).unwrap().tensor(name).unwrap().shape().to_vec()
    };
    for bias in [[1, 1, 1, 5], [2, 1, 3, 5], [2, 4, 3, 5]] {
        let file = TestFile::good().tensor("bias", "F32", &bias).tensor("dout", "F32", &[2, 3, 4, 6]);
        succeeds(&["run", &folder.write("in", &file.bytes()), &output, "--backend", "cpu"]);
        assert_eq!(shape("dbias"), bias);
    }
    succeeds(&["run", &folder.write("in", &TestFile::every_option().bytes()), &output, "--backend", "cpu"]);
    for (name, expected) in [
        ("out", &[5, 4, 6][..]),
        ("lse", &[4, 5]),
        ("dq", &[5, 4, 4]),
        ("dk", &[5, 2, 4]),
        ("dv", &[5, 2, 6]),
        ("dsinks", &[4]),
        ("dalibi_slopes", &[4]),
        ("dbias", &[2, 1, 3, 4]),
    ] {
        assert_eq!(shape(name), expected, "{name}");
    }
}

#[test]
fn axes_follow_from_shapes() {
    let axes = |shape: [usize; 4]| {
        let file = TestFile::good().tensor("bias", "F32", &shape).tensor("mask", "BOOL", &shape);
        let options = *Case::parse(&file.bytes()).unwrap().problem.options();
        assert_eq!(options.bias, options.mask);
        options.bias.unwrap()
    };
    assert_eq!(axes([1, 1, 1, 5]), Axes::KEYS);
    assert_eq!(axes([2, 1, 1, 5]), Axes::KEYS.batch());
    assert_eq!(axes([1, 4, 1, 5]), Axes::KEYS.heads());
    assert_eq!(axes([1, 1, 3, 5]), Axes::KEYS.seq_q());
    assert_eq!(axes([2, 4, 3, 5]), Axes::ALL);
    // In thd they count sequences, and tokens of the longest one.
    let file = TestFile::thd().tensor("bias", "F32", &[2, 1, 3, 4]);
    assert_eq!(Case::parse(&file.bytes()).unwrap().problem.options().bias, Some(Axes::KEYS.batch().seq_q()));
}

#[test]
fn element_types_that_say_the_same() {
    let lengths = |dtype| {
        let file = TestFile::thd().integers("cu_seqlens_q", dtype, &[3], &[0, 2, 5]);
        Case::parse(&file.bytes()).unwrap()
    };
    assert_eq!(lengths("U32"), lengths("I32"));
    assert_eq!(lengths("I64"), lengths("I32"));
    let mask = |dtype| Case::parse(&TestFile::good().tensor("mask", dtype, &[2, 1, 3, 5]).bytes()).unwrap();
    assert_eq!(mask("BOOL"), mask("U8"));
}

#[test]
fn wrong_biases_and_masks_are_rejected() {
    let folder = folder("wrong_biases");
    let good = TestFile::good;
    let half = |dtype| {
        let file = good().tensor("q", dtype, &[2, 3, 4, 4]).tensor("k", dtype, &[2, 5, 2, 4]);
        file.tensor("v", dtype, &[2, 5, 2, 6])
    };
    let all = &[2, 4, 3, 5];
    for (file, message) in [
        (good().tensor("bias", "F16", all), "tensor bias has element type F16; it must be F32, as q"),
        (good().tensor("bias", "U8", all), "tensor bias has element type U8; it must be F32, as q"),
        (good().tensor("bias", "F64", all), "tensor bias has element type F64"),
        (half("F16").tensor("bias", "BF16", all), "tensor bias has element type BF16; it must be F32, or F16 as q"),
        (half("BF16").tensor("bias", "F16", all), "tensor bias has element type F16; it must be F32, or BF16 as q"),
        (good().tensor("mask", "F32", all), "tensor mask has element type F32; it must be U8 or BOOL"),
        (good().tensor("mask", "I32", all), "tensor mask has element type I32"),
        (good().tensor("mask", "I8", all), "tensor mask has element type I8"),
        (
            good().integers("mask", "U8", &[1, 1, 1, 5], &[1, 0, 1, 2, 0]),
            "tensor mask has 2 at element 3; it must be 0 or 1",
        ),
        (good().integers("mask", "BOOL", &[1, 1, 1, 5], &[255, 0, 1, 2, 0]), "tensor mask has 255 at element 0"),
        (good().tensor("masks", "U8", all), "unknown tensor \"masks\""),
        (good().tensor("attn_mask", "U8", all), "unknown tensor \"attn_mask\""),
        (good().tensor("attn_bias", "F32", all), "unknown tensor \"attn_bias\""),
    ] {
        rejects(&folder, &file.bytes(), message);
    }
    let shapes: [&[usize]; 15] = [
        &[3, 4, 3, 5],
        // Those of key heads; of heads and queries exchanged; of queries and keys exchanged.
        &[2, 2, 3, 5],
        &[2, 3, 4, 5],
        &[2, 4, 5, 3],
        // The keys' axis is not broadcast.
        &[2, 4, 3, 1],
        &[1, 1, 1, 1],
        &[2, 4, 3, 6],
        &[2, 4, 0, 5],
        &[0, 4, 3, 5],
        &[2, 4, 3, 0],
        &[3, 5],
        &[5],
        &[],
        &[1, 2, 4, 3, 5],
        &[2, 4, 15],
    ];
    for shape in shapes {
        for (name, dtype) in [("bias", "F32"), ("mask", "U8"), ("mask", "BOOL")] {
            let message = format!(
                "tensor {name} has shape {shape:?}; it must be [2, 4, 3, 5], where each axis but the last may be 1"
            );
            rejects(&folder, &good().tensor(name, dtype, shape).bytes(), &message);
        }
    }
    // The whole batch's tokens are not the longest sequence's.
    for shape in [[1, 4, 5, 5], [2, 4, 3, 5], [2, 4, 5, 4], [3, 1, 1, 4]] {
        let message = format!("tensor bias has shape {shape:?}; it must be [2, 4, 3, 4]");
        rejects(&folder, &TestFile::thd().tensor("bias", "F32", &shape).bytes(), &message);
    }
}

#[test]
fn wrong_slopes_are_rejected() {
    let folder = folder("wrong_slopes");
    let slopes = |dtype, shape: &[usize]| TestFile::good().tensor("alibi_slopes", dtype, shape);
    for (file, message) in [
        (slopes("F32", &[2]), "tensor alibi_slopes has shape [2]; q, k and v call for [4]"),
        (slopes("F32", &[5]), "tensor alibi_slopes has shape [5]; q, k and v call for [4]"),
        (slopes("F32", &[2, 4]), "tensor alibi_slopes has shape [2, 4]"),
        (slopes("F32", &[4, 1]), "tensor alibi_slopes has shape [4, 1]"),
        (slopes("F32", &[]), "tensor alibi_slopes has shape []"),
        (slopes("F32", &[0]), "tensor alibi_slopes has shape [0]"),
        (slopes("F16", &[4]), "tensor alibi_slopes has element type F16; it must be F32"),
        (slopes("F64", &[4]), "tensor alibi_slopes has element type F64; it must be F32"),
        (slopes("I32", &[4]), "tensor alibi_slopes has element type I32; it must be F32"),
        (slopes("F32", &[4]).with("q_offset", "1073741825"), "option query_offset: 1073741825; with ALiBi it must"),
        (TestFile::good().tensor("alibi", "F32", &[4]), "unknown tensor \"alibi\""),
        (TestFile::good().with("alibi", "true"), "unknown metadata key \"alibi\""),
    ] {
        rejects(&folder, &file.bytes(), message);
    }
}

#[test]
fn wrong_lengths_are_rejected() {
    let folder = folder("wrong_lengths");
    let thd = TestFile::thd;
    let q = |numbers: &[i64]| thd().integers("cu_seqlens_q", "I32", &[numbers.len()], numbers);
    let k = |numbers: &[i64]| thd().integers("cu_seqlens_k", "I32", &[numbers.len()], numbers);
    let far = |dtype, number| thd().integers("cu_seqlens_q", dtype, &[3], &[0, number, 5]);
    for (file, message) in [
        (thd().without("cu_seqlens_q"), "tensor cu_seqlens_q is missing"),
        (thd().without("cu_seqlens_k"), "tensor cu_seqlens_k is missing"),
        (
            TestFile::good().integers("cu_seqlens_q", "I32", &[3], &[0, 2, 3]),
            "tensor cu_seqlens_q goes with layout thd, the file's is bshd",
        ),
        (
            TestFile::good().with("layout", "bhsd").integers("cu_seqlens_k", "I32", &[2], &[0, 5]),
            "tensor cu_seqlens_k goes with layout thd, the file's is bhsd",
        ),
        (thd().tensor("seqlens", "I32", &[3]), "unknown tensor \"seqlens\""),
        (
            thd().tensor("cu_seqlens_q", "F32", &[3]),
            "tensor cu_seqlens_q has element type F32; it must be I32, U32 or I64",
        ),
        (thd().tensor("cu_seqlens_q", "U8", &[3]), "tensor cu_seqlens_q has element type U8"),
        (thd().tensor("cu_seqlens_k", "F64", &[3]), "tensor cu_seqlens_k has element type F64"),
        (
            thd().integers("cu_seqlens_q", "I32", &[1, 3], &[0, 2, 5]),
            "tensor cu_seqlens_q has shape [1, 3]; in layout thd its axes must be [sequences + 1]",
        ),
        (thd().integers("cu_seqlens_k", "I32", &[], &[5]), "tensor cu_seqlens_k has shape []; in layout thd"),
        (q(&[]), "cu_seqlens_q: no numbers; there must be one more than sequences"),
        (q(&[0]), "cu_seqlens_q: one number; there must be one more than sequences"),
        (k(&[5]), "cu_seqlens_k: one number"),
        (q(&[1, 2, 5]), "cu_seqlens_q: the first number is 1; it must be 0"),
        (q(&[-1, 2, 5]), "cu_seqlens_q: number 0 is -1; it must be from 0 to 4294967295"),
        (q(&[0, -2, 5]), "cu_seqlens_q: number 1 is -2; it must be from 0 to 4294967295"),
        (k(&[0, 1, i32::MIN.into()]), "cu_seqlens_k: number 2 is -2147483648; it must be from 0 to 4294967295"),
        (far("I64", 1 << 32), "cu_seqlens_q: number 1 is 4294967296; it must be from 0 to 4294967295"),
        (far("I64", i64::MIN), "cu_seqlens_q: number 1 is -9223372036854775808"),
        (far("U32", u32::MAX.into()), "cu_seqlens_q: number 2 is 5, less than 4294967295 before it"),
        (q(&[0, 3, 2, 5]), "cu_seqlens_q: number 2 is 2, less than 3 before it"),
        (q(&[0, 2, 4]), "cu_seqlens_q: the last number is 4; it must be the number of tokens, 5"),
        (q(&[0, 2, 6]), "cu_seqlens_q: the last number is 6; it must be the number of tokens, 5"),
        (k(&[0, 0, 0]), "cu_seqlens_k: the last number is 0; it must be the number of tokens, 5"),
        (q(&[0, 5]), "cu_seqlens_k: 3 numbers, cu_seqlens_q has 2; there is one more than sequences in both"),
        (k(&[0, 1, 2, 5]), "cu_seqlens_k: 4 numbers, cu_seqlens_q has 3"),
        (
            thd().tensor("q", "F32", &[1, 5, 4, 4]),
            "tensor q has shape [1, 5, 4, 4]; in layout thd its axes must be [tokens, heads, width]",
        ),
        (thd().tensor("v", "F32", &[5, 12]), "tensor v has shape [5, 12]; in layout thd"),
        (thd().tensor("v", "F32", &[4, 2, 6]), "sequence length differs: 5 of k, 4 of v (in layout thd)"),
        (thd().tensor("k", "F32", &[5, 4, 4]), "heads differs: 4 of k, 2 of v (in layout thd)"),
        (thd().tensor("q", "F32", &[0, 4, 4]), "seq_q is 0"),
        (thd().tensor("q", "F32", &[6, 4, 4]), "the last number is 5; it must be the number of tokens, 6"),
        (
            thd().tensor("dout", "F32", &[1, 5, 4, 6]),
            "tensor dout has shape [1, 5, 4, 6]; q, k and v call for [5, 4, 6]",
        ),
        (
            thd().tensor("dout", "F32", &[5, 4, 6]).tensor("dlse", "F32", &[1, 4, 5]),
            "tensor dlse has shape [1, 4, 5]; q, k and v call for [4, 5]",
        ),
        (thd().tensor("dlse", "F32", &[4, 5]), "tensor dout is missing"),
        (thd().tensor("sinks", "F32", &[2]), "tensor sinks has shape [2]; q, k and v call for [4]"),
    ] {
        rejects(&folder, &file.bytes(), message);
    }
}

#[test]
fn a_wrong_option_leaves_earlier_results() {
    let folder = folder("options_survive");
    let output = folder.write("out", b"earlier");
    for file in [
        TestFile::good().with("softcap", "0"),
        TestFile::good().tensor("mask", "U8", &[5]),
        TestFile::thd().without("cu_seqlens_k"),
    ] {
        fails(&["run", &folder.write("in", &file.bytes()), &output, "--backend", "cpu"]);
        assert_eq!(fs::read(&output).unwrap(), b"earlier");
    }
}
