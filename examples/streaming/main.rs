//! Streams a text through attention with both kinds of sink, in constant memory:
//!
//! ```text
//! cargo run --release --example streaming                # 100,000 bytes of Moby-Dick
//! cargo run --release --example streaming -- FILE        # any file, whole
//! cargo run --release --example streaming -- --help
//! ```
//!
//! Every byte is a token. It becomes q, k and v through a fixed random embedding, projections and rotary
//! positions (`model.rs`), with the head layout and the sink logits of a GPT-OSS layer. Chunk after chunk goes
//! through [`sink_attention::Attention`] over a cache of the sink tokens and the last keys (`cache.rs`, `stream.rs`).
//! At the end, random rows of the stream are held against the f64 definition on the full, masked sequence
//! (`check.rs`), and a picture shows the stream's course (`picture.rs`).

mod args;
mod cache;
mod check;
mod model;
mod picture;
mod progress;
mod stream;

use std::error::Error;
use std::process::ExitCode;
use std::time::Instant;

use indicatif::{HumanBytes, HumanCount};
use sink_attention::{Attention, DeviceChoice};

use args::{Args, Command};
use model::Model;
use progress::{Memory, Progress, percent};
use stream::{Settings, Text};

/// Fixes the weights, the sink logits and the rows to check.
const SEED: u64 = 1851;

fn main() -> ExitCode {
    match args::parse(std::env::args_os().skip(1)).and_then(|command| match command {
        Command::Help => {
            print!("{}", args::HELP);
            Ok(())
        }
        Command::Run(args) => run(&args),
    }) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<(), Box<dyn Error>> {
    let bytes = args.text()?;
    let text = Text { bytes: &bytes, tokens: args.tokens.unwrap_or(bytes.len()) };
    let settings = args.settings;

    let attention = Attention::new()?;
    if attention.is_gpu() {
        println!("Device: {}", attention.device_name());
    } else {
        let asked = DeviceChoice::from_env() == DeviceChoice::Cpu;
        let why = if asked { "As asked for" } else { "No GPU was found, so" };
        println!("{why} the CPU path is used: {}", attention.device_name());
    }
    describe(args, &text, &settings);

    let model = Model::new(SEED);
    let rows = check::choose_rows(text.tokens, &settings, SEED);
    let mut series = picture::Series::default();
    let mut progress = Progress::new(text.tokens);
    let started = Instant::now();
    let kept = stream::run(&attention, &model, &text, &settings, &rows, |chunk| {
        progress.update(&chunk);
        series.push(chunk.point);
    })?;
    let seconds = started.elapsed().as_secs_f64();
    let memory = progress.finish();

    let errors = check::against_reference(&kept, &model, &text, &settings)?;
    let shares = series.shares();
    std::fs::write(&args.out, picture::draw(&series, &attention.device_name())?)
        .map_err(|error| format!("cannot write {}: {error}", args.out.display()))?;

    let rate = text.tokens as f64 / seconds;
    println!();
    println!("Streamed    {} tokens in {seconds:.2} s: {} tokens/s", count(text.tokens), HumanCount(rate as u64));
    let keys = settings.most_keys().min(text.tokens);
    println!("Cache       {} keys and their values, {}", count(keys), HumanBytes(cache::bytes(keys)));
    if let Some(Memory { first, last }) = memory {
        println!("Memory      {} after a tenth of the stream, {} at its end", HumanBytes(first), HumanBytes(last));
    }
    let [logit, sink_tokens] = [shares.logit, shares.sink_tokens].map(percent);
    println!("Probability {logit} to the sink logit, {sink_tokens} to the sink tokens");
    println!("Check       {} rows against f64: error {:.1e} in o, {:.1e} in lse", kept.len(), errors.o, errors.lse);
    println!("Picture     {}", args.out.display());
    if !errors.within(check::TOLERANCE) {
        let check::Errors { o, lse } = errors;
        let most = check::TOLERANCE;
        return Err(
            format!("the stream is not the definition: error {o:e} in o, {lse:e} in lse, above {most:e}").into()
        );
    }
    Ok(())
}

fn describe(args: &Args, text: &Text, settings: &Settings) {
    let name = args.file.as_ref().map_or("Moby-Dick, chapters 1 to 15".into(), |file| file.display().to_string());
    println!(
        "Text:   {name}: {} tokens (bytes) in chunks of {}; {} sink tokens and a window of {} keys",
        count(text.tokens),
        count(settings.chunk),
        settings.sink_tokens,
        count(settings.window),
    );
}

fn count(n: usize) -> HumanCount {
    HumanCount(n as u64)
}
