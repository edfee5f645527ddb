//! Runs the built binary.

use std::process::{Command, Output};

/// The binary with arguments, the way cargo runs the tests: under its runner where one is set.
pub fn command(arguments: &[&str]) -> Command {
    let architecture = format!("CARGO_TARGET_{}_", std::env::consts::ARCH.to_uppercase());
    let runner = std::env::vars().find(|(key, _)| key.starts_with(&architecture) && key.ends_with("_RUNNER"));
    let runner = runner.map_or(String::new(), |(_, command)| command);
    let mut words = runner.split_whitespace().chain([env!("CARGO_BIN_EXE_sink-attention")]);
    let mut command = Command::new(words.next().unwrap());
    // Where it is unset, Vulkan drivers say so on stderr.
    command.args(words).args(arguments).env("XDG_RUNTIME_DIR", std::env::temp_dir());
    command
}

/// Runs the binary.
pub fn sink_attention(arguments: &[&str]) -> Output {
    command(arguments).output().unwrap()
}

/// Runs the binary, which must succeed; what it says on stdout and stderr.
#[track_caller]
pub fn succeeds(arguments: &[&str]) -> (String, String) {
    let output = sink_attention(arguments);
    let (stdout, stderr) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    assert_eq!(output.status.code(), Some(0), "{stderr}");
    (stdout, stderr)
}

/// Runs the binary, which must fail with exit code 1; what it says on stderr.
#[track_caller]
pub fn fails(arguments: &[&str]) -> String {
    let output = sink_attention(arguments);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.starts_with("error: ") && stderr.trim().lines().count() == 1, "{stderr}");
    assert!(!stderr.contains("panicked"), "{stderr}");
    assert!(output.stdout.is_empty());
    stderr
}

/// Runs the binary, which must refuse its arguments with exit code 2.
#[track_caller]
pub fn wrong_usage(arguments: &[&str], message: &str) {
    let output = sink_attention(arguments);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert!(stderr.contains(message), "no {message:?} in: {stderr}");
    assert!(stderr.contains("--help"), "{stderr}");
}
