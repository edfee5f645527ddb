//! Every conformance file against the definition and the CPU; and the files that the fuzzer keeps.

use std::fs;

use crate::common::conformance::{Reference, check_all};
use sink_attention::Attention;
use sink_attention::file::case::Case;

#[test]
fn by_the_reference() {
    check_all(&Reference);
}

#[test]
fn on_the_cpu() {
    check_all(&Attention::cpu());
}

/// What the fuzzer keeps: files that are read, and others that are refused, none with a panic.
#[test]
fn the_fuzz_corpus_is_read() {
    let mut read = 0;
    for entry in fs::read_dir(format!("{}/fuzz/corpus/file", env!("CARGO_MANIFEST_DIR"))).unwrap() {
        let path = entry.unwrap().path();
        match Case::parse(&fs::read(&path).unwrap()) {
            Ok(_) => read += 1,
            Err(error) => assert_ne!(path.extension().unwrap_or_default(), "safetensors", "{path:?}: {error}"),
        }
    }
    assert!(read >= 8, "{read}");
}
