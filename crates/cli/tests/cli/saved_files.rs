//! The built binary on files under hard use: paths that cannot be written, endless files, folders that disappear.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _};
use std::process::Stdio;

use crate::binary::{command, fails};
use crate::files::{TestFile, folder};

const SMALL: [&str; 9] = ["bench", "--backend", "cpu", "--heads", "2", "--seq-k", "64", "--dtype", "f32,f16"];

#[test]
fn paths_are_asked_about_before_anything_is_computed() {
    let folder = folder("saved-command");
    let input = folder.write("in", &TestFile::good().bytes());
    for path in ["/dev/zero", "/dev/full", &folder.path("no/file")] {
        for arguments in [
            vec!["run", &input, path, "--backend", "cpu"],
            vec!["tune", "--out", path],
            [&SMALL[..], &["--json", path]].concat(),
            [&SMALL[..], &["--svg", path]].concat(),
        ] {
            let error = fails(&arguments);
            assert!(error.contains(&format!("cannot write {path}: ")), "{arguments:?}: {error}");
        }
    }
    let error = fails(&["run", "/dev/zero", &folder.path("out"), "--backend", "cpu"]);
    assert!(error.contains("cannot read /dev/zero: it is not a regular file"), "{error}");
    let error = fails(&["plan", "--device", "H200", "--tuning", "/dev/zero"]);
    assert!(error.contains("/dev/zero") && error.contains("not a regular file"), "{error}");
    let huge = folder.path("huge");
    fs::File::create(&huge).unwrap().set_len(1 << 40).unwrap();
    let error = fails(&["run", &huge, &folder.path("out"), "--backend", "cpu"]);
    assert!(error.contains("huge: malformed header"), "{error}");
    assert_eq!(folder.names(), ["huge", "in"]);
}

/// The folder of the figures disappears while they are measured.
#[test]
fn nothing_measured_is_lost() {
    let folder = folder("saved-figures");
    fs::create_dir(folder.path("gone")).unwrap();
    let (json, svg) = (folder.path("gone/figures.json"), folder.path("figures.svg"));
    let mut bench = command(&[&SMALL[..], &["--runs", "30", "--json", &json, "--svg", &svg]].concat());
    let mut child = bench.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    stderr.read_line(&mut line).unwrap();
    assert!(line.starts_with("1 of 2 custom: "), "{line}");
    fs::remove_dir(folder.path("gone")).unwrap();
    stderr.read_to_string(&mut line).unwrap();
    let output = child.wait_with_output().unwrap();
    let table = String::from_utf8(output.stdout).unwrap();
    assert!(line.contains("\n2 of 2 custom: ") && line.contains("error: cannot write"), "{line}");
    assert_eq!(output.status.code(), Some(1));
    assert!(table.contains("| custom | f32   | forward") && table.contains("TFLOP/s"), "{table}");
    assert!(fs::read_to_string(svg).unwrap().contains("<svg"));
}

#[test]
fn lengths_of_keys_are_blamed_for_themselves() {
    for (arguments, message) in [
        (["plan", "--seq-k", "99999999999"], "seq_k is 99999999999"),
        (["plan", "--seq-k", "0"], "seq_k is 0"),
        (["plan", "--seq-q", "0"], "seq_q is 0"),
    ] {
        let error = fails(&[&arguments[..], &["--device", "H200"]].concat());
        assert!(error.contains(message), "{error}");
    }
    let error = fails(&["bench", "--backend", "cpu", "--seq-k", "0"]);
    assert!(error.contains("seq_k is 0"), "{error}");
}
