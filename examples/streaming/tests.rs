//! The whole demo: a run that is killed goes on with the same result, and what is no state of it is an error.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use sink_attention::{Attention, DeviceChoice};

use super::args::{self, Command as Parsed};
use super::model::Model;
use super::shard::Shard;
use super::state::Checksum;
use super::stream::{self, Scene, Stream, Text};
use super::{SEED, gpu, run};

/// Removed in the end.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let folder = std::env::temp_dir().join(format!("streaming-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).unwrap();
        Folder(folder)
    }

    /// Options, with files of this folder.
    fn line(&self, line: &str) -> String {
        line.replace("DIR", self.0.to_str().unwrap())
    }

    fn run(&self, line: &str) -> Result<(), String> {
        let words: Vec<OsString> = self.line(line).split_whitespace().map(OsString::from).collect();
        match args::parse(words).map_err(|error| error.to_string())? {
            Parsed::Run(args) => run(&args, &DeviceChoice::from_env()).map_err(|error| error.to_string()),
            Parsed::Help => Err("help".into()),
        }
    }

    /// In a process of its own.
    fn spawn(&self, line: &str, adapter: &str) -> Child {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "tests::in_a_process_of_its_own", "--ignored", "--nocapture"]);
        command.env("STREAMING_TEST_LINE", self.line(line)).stdout(Stdio::piped()).stderr(Stdio::null());
        command.env("SINK_ATTENTION_ADAPTER", adapter);
        command.spawn().unwrap()
    }

    fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.0.join(name)).unwrap()
    }

    fn position(&self, state: &str) -> u64 {
        let (_, bytes) = Shard::open(&self.0.join(state)).unwrap().bytes("position").unwrap();
        u64::from_le_bytes(bytes.try_into().unwrap())
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[test]
#[ignore = "others run it in a process that they kill"]
fn in_a_process_of_its_own() {
    let line = std::env::var("STREAMING_TEST_LINE").unwrap();
    Folder(PathBuf::from("no such folder")).run(&line).unwrap();
}

/// The table's lines: all that the results decide.
fn results(child: Child) -> Vec<String> {
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{text}");
    let is_result = |line: &&str| ["sinks  ", "window ", "full  "].iter().any(|policy| line.starts_with(policy));
    let results: Vec<_> = text.lines().filter(is_result).map(String::from).collect();
    assert_eq!(results.len(), 3, "{text}");
    results
}

fn goes_on_after_a_kill(adapter: &str, tokens: u64) {
    let folder = Folder::new(&format!("kill-{tokens}"));
    let options = format!("--tokens {tokens} --window 64 --capacity 500");
    let whole = results(folder.spawn(&format!("{options} --out DIR/whole.svg"), adapter));
    let line = format!("{options} --state DIR/state --save-every 300 --out DIR/resumed.svg");
    let mut killed = folder.spawn(&line, adapter);
    let started = Instant::now();
    while !folder.0.join("state").exists() {
        assert!(started.elapsed() < Duration::from_secs(120), "nothing was saved");
        std::thread::sleep(Duration::from_millis(2));
    }
    killed.kill().unwrap();
    killed.wait().unwrap();
    let position = folder.position("state");
    assert!(position >= 300 && position < tokens, "killed after {position} tokens");
    assert!(!folder.0.join("resumed.svg").exists());
    assert_eq!(results(folder.spawn(&line, adapter)), whole);
    assert!(folder.read("resumed.svg") == folder.read("whole.svg"), "the same picture");
    // Once more, with nothing left to do.
    fs::remove_file(folder.0.join("resumed.svg")).unwrap();
    assert_eq!(results(folder.spawn(&line, adapter)), whole);
    assert!(folder.read("resumed.svg") == folder.read("whole.svg"), "the same picture");
}

#[test]
fn a_killed_run_goes_on_with_the_same_bits_on_the_cpu() {
    goes_on_after_a_kill("cpu", 6000);
}

/// On the GPU, where there is one.
#[test]
fn a_killed_run_goes_on_with_the_same_bits() {
    match gpu::choice() {
        Some(DeviceChoice::Adapter(name)) => goes_on_after_a_kill(&name, 1500),
        Some(_) => goes_on_after_a_kill("gpu", 1500),
        None => {}
    }
}

#[test]
fn each_policy_by_itself() {
    let folder = Folder::new("policies");
    for policy in ["sinks", "window", "full"] {
        folder
            .run(&format!("--tokens 300 --window 16 --capacity 40 --policy {policy} --out DIR/{policy}.svg"))
            .unwrap();
    }
    let text = |name: &str| String::from_utf8(folder.read(name)).unwrap();
    assert!(text("sinks.svg").contains("sinks: 4 first and 16 last") && !text("sinks.svg").contains("full:"));
    assert!(text("full.svg").contains("full: all, 40 at most"));
}

/// A state that is longer than the first run was asked for.
#[test]
fn a_finished_run_can_be_prolonged() {
    let folder = Folder::new("longer");
    let line = "--window 16 --policy sinks --state DIR/state --out DIR/a.svg";
    folder.run(&format!("--tokens 100 {line}")).unwrap();
    assert_eq!(folder.position("state"), 100);
    folder.run(&format!("--tokens 250 {line}")).unwrap();
    assert_eq!(folder.position("state"), 250);
    let error = folder.run(&format!("--tokens 249 {line}")).unwrap_err();
    assert!(error.contains("250 tokens were streamed already, --tokens asks for 249"), "{error}");
}

#[test]
fn other_states_are_errors() {
    let folder = Folder::new("states");
    let line = "--tokens 100 --window 16 --capacity 40 --state DIR/state --out DIR/a.svg";
    folder.run(line).unwrap();
    let state = folder.read("state");
    for (other, message) in [
        ("--window 17", "it has version 2, policies sinks and window and full, window 16,"),
        ("--sink-tokens 3", "sink tokens 4, capacity 40"),
        ("--policy window", "wanted is version 2, policies window, window 16"),
    ] {
        let error = folder.run(&format!("{line} {other}")).unwrap_err();
        assert!(error.contains("of another stream") && error.contains(message), "{other}: {error}");
    }
    let text = folder.0.join("text");
    fs::write(&text, "Another text").unwrap();
    assert!(folder.run(&format!("{line} DIR/text")).unwrap_err().contains("of another stream"));

    let fails = |bytes: &[u8], message: &str| {
        fs::write(folder.0.join("state"), bytes).unwrap();
        let error = folder.run(line).unwrap_err();
        assert!(error.contains("state: ") && error.contains(message), "{message}: {error}");
    };
    for end in [0, 7, 100, state.len() / 2, state.len() - 1] {
        fails(&state[..end], "");
    }
    fails(
        &fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/gpt_oss_tiny/model.safetensors")).unwrap(),
        "not the state",
    );
    // A file of the first version, which had no checksum.
    let older = state.windows(9).position(|bytes| bytes == b"version 2").unwrap();
    let mut old = state.clone();
    old[older + 8] = b'1';
    fails(&old, "of another stream: it has version 1, policies");
    let read = safetensors::SafeTensors::deserialize(&state).unwrap();
    let place = |name: &str| read.tensor(name).unwrap().data().as_ptr().addr() - state.as_ptr().addr();
    // A cache of another length, sound by itself.
    let mut swapped = state.clone();
    let [sinks, len] = [place("sinks.cache"), read.tensor("sinks.cache").unwrap().data().len()];
    folder.run(&line.replace("100", "101").replace("DIR/state", "DIR/longer")).unwrap();
    let longer = folder.read("longer");
    let (_, cache) = Shard::open(&folder.0.join("longer")).unwrap().bytes("sinks.cache").unwrap();
    assert!(cache.len() == len && longer != state);
    swapped[sinks..sinks + len].copy_from_slice(&cache);
    fails(&swapped, "damaged");
    // With a checksum that fits.
    let (_, header) = safetensors::SafeTensors::read_metadata(&swapped).unwrap();
    let metadata = header.metadata().as_ref().unwrap();
    let read = safetensors::SafeTensors::deserialize(&swapped).unwrap();
    let names = ["position", "sinks", "window", "full", "sinks.cache", "window.cache", "full.cache"];
    let mut sum = Checksum::new(&metadata["streaming"]);
    names.iter().for_each(|name| sum.tensor(name, read.tensor(name).unwrap().data()));
    let old = metadata["checksum"].as_bytes();
    let at = swapped.windows(old.len()).position(|bytes| bytes == old).unwrap();
    let new = sum.text();
    swapped[at..at + old.len()].copy_from_slice(new.as_bytes());
    fails(&swapped, "the cache of policy sinks has 101 tokens, not 100");
}

/// Of every tensor: every byte of what is known of the results, and some of each cache, which has a checksum of its own.
#[test]
fn every_flipped_bit_is_told() {
    let folder = Folder::new("flips");
    let line = "--tokens 100 --window 16 --capacity 40 --state DIR/state --out DIR/a.svg";
    let Parsed::Run(args) = args::parse(folder.line(line).split_whitespace().map(OsString::from)).unwrap() else {
        panic!("no help was asked for")
    };
    let (bytes, model) = (args.text().unwrap(), Model::new(SEED));
    let table = stream::table(&args.policies, &args.settings);
    // More tokens than were streamed, so that another position could be believed.
    let text = Text { bytes: &bytes, tokens: 200 };
    let scene = Scene { model: &model, text, settings: args.settings, table: &table, rows: &[] };
    let mut stream = Stream::new(&Attention::cpu(), scene, &args.policies).unwrap();
    stream.advance(100).unwrap();
    let path = folder.0.join("state");
    stream.save(&path).unwrap();
    stream.load(&path).unwrap();
    let state = folder.read("state");
    let read = safetensors::SafeTensors::deserialize(&state).unwrap();
    let mut flips = 0;
    for (name, tensor) in read.tensors() {
        let place = tensor.data().as_ptr().addr() - state.as_ptr().addr();
        let step = if name.ends_with(".cache") { tensor.data().len() / 20 } else { 1 };
        for offset in (0..tensor.data().len()).step_by(step) {
            let mut spoiled = state.clone();
            spoiled[place + offset] ^= 1 << ((offset + offset / 8) % 8);
            fs::write(&path, &spoiled).unwrap();
            let error = stream.load(&path).unwrap_err().to_string();
            assert!(error.contains("state: damaged"), "byte {offset} of {name}: {error}");
            flips += 1;
        }
    }
    assert!(flips > 500, "{flips}");
}
