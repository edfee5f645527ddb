//! Streams a text through attention that keeps the first tokens, or drops them, in constant memory:
//!
//! ```text
//! cargo run --release --example streaming                                             # 20,000 bytes of Moby-Dick
//! cargo run --release --example streaming -- --tokens 1000000 --state stream.state    # a million, can be killed
//! cargo run --release --example streaming -- FILE --policy sinks                      # any file, one policy
//! cargo run --release --example streaming -- --help
//! ```
//!
//! Every byte is a token. It becomes q, k and v of a layer whose heads leave their surplus attention on the first token, as
//! those of trained models do (`model.rs`). Token after token goes into a cache that rolls over the stream
//! (`policy.rs`, `stream.rs`), and its query attends to what is in it. At the end, a picture shows what it changes that the
//! first tokens are kept (`series.rs`, `picture.rs`); some results have been held against the f64 definition (`check.rs`).
//! With `--state`, a stream that was killed goes on with the same bits (`state.rs`).

mod args;
mod check;
#[path = "../common/decoder.rs"]
mod decoder;
#[cfg(test)]
#[path = "../common/gpu.rs"]
mod gpu;
mod model;
mod picture;
mod policy;
mod progress;
mod series;
#[path = "../common/shard.rs"]
mod shard;
mod state;
mod stream;
#[cfg(test)]
mod tests;

use std::error::Error;
use std::path::Path;
use std::process::ExitCode;

use indicatif::{HumanBytes, HumanCount};
use sink_attention::{Attention, DeviceChoice, file};

use args::{Args, Command};
use model::Model;
use policy::Policy;
use progress::{Memory, Progress, percent};
use series::Measures;
use stream::{CHUNK, Scene, Stream, Text};

/// Fixes the weights, the sink logits and the rows to check.
const SEED: u64 = 1851;

fn main() -> ExitCode {
    match args::parse(std::env::args_os().skip(1)).and_then(|command| match command {
        Command::Help => {
            print!("{}", args::HELP);
            Ok(())
        }
        Command::Run(args) => run(&args, &DeviceChoice::from_env()),
    }) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args, choice: &DeviceChoice) -> Result<(), Box<dyn Error>> {
    // Better now than after the stream.
    for path in std::iter::once(&args.out).chain(&args.state) {
        file::check_writable(path).map_err(|error| cannot_write(path, &error))?;
    }
    let bytes = args.text()?;
    let (settings, policies) = (args.settings, &args.policies);
    let asked = args.tokens.unwrap_or(bytes.len());
    // Where every policy has ended, so has the stream.
    let end = policies.iter().map(|policy| policy.end(&settings)).max().unwrap_or(0);
    let text = Text { bytes: &bytes, tokens: asked.min(end) };

    let attention = Attention::open(choice)?;
    println!("Device: {}", attention.device_description());
    let name = args.file.as_ref().map_or("Moby-Dick, chapters 1 to 15".into(), |file| file.display().to_string());
    println!("Text:   {name}: {} tokens (bytes)", count(text.tokens));
    for policy in policies {
        let keys = policy.most_keys(&settings);
        let (name, size) = (policy.name(), HumanBytes(policy::bytes(keys)));
        match policy {
            Policy::Full if asked > keys => {
                println!("Policy: {name}, {} tokens at most ({size}): the cache is full then, and ends", count(keys));
            }
            Policy::Full => println!("Policy: {name}, {} tokens at most ({size})", count(keys)),
            _ => println!("Policy: {name}, {} keys and values ({size}), however long the stream", count(keys)),
        }
    }

    let model = Model::new(SEED);
    let rows = check::choose_rows(text.tokens, &settings, SEED);
    let table = stream::table(policies, &settings);
    let scene = Scene { model: &model, text, settings, table: &table, rows: &rows };
    let mut stream = Stream::new(&attention, scene, policies)?;
    if let Some(state) = args.state.as_ref().filter(|state| state.exists()) {
        stream.load(state)?;
        println!("State:  {} goes on after {} tokens", state.display(), count(stream.position));
    }
    let mut progress = Progress::new(stream.position, text.tokens);
    let from = stream.position;
    while stream.position < text.tokens {
        let next_save = (stream.position / args.save_every + 1).saturating_mul(args.save_every);
        stream.advance(CHUNK.min(text.tokens - stream.position).min(next_save - stream.position))?;
        progress.update(&stream);
        if let Some(state) =
            args.state.as_ref().filter(|_| stream.position == next_save || stream.position == text.tokens)
        {
            stream.save(state)?;
        }
    }
    let rate = progress.rate(stream.position);
    let memory = progress.finish();

    let lanes: Vec<_> = stream.lanes.iter().map(|lane| (lane.policy, &lane.record.series)).collect();
    let picture = picture::draw(&lanes, &settings)?;
    file::replace(&args.out, picture.as_bytes()).map_err(|error| cannot_write(&args.out, &error))?;

    println!();
    println!(
        "Streamed {} tokens, {} of them here: {} tokens/s",
        count(text.tokens),
        count(text.tokens - from),
        HumanCount(rate as u64)
    );
    if text.tokens < asked {
        println!("         of {}: full attention ended with its cache; see --capacity", count(asked));
    }
    if let Some(Memory { first, last }) = memory {
        println!("Memory   {} after the first tenth, {} at the end", HumanBytes(first), HumanBytes(last));
    }
    println!("Picture  {}", args.out.display());
    println!();
    println!("policy   tokens       rms of o   from full   first tokens   sink logit   error in o, lse    checksum");
    for lane in &stream.lanes {
        let record = &lane.record;
        // What is left once the window rolls, if it does.
        let since = if text.tokens > settings.window + settings.sink_tokens { settings.window } else { 0 };
        let mean = record.series.after(since).map(|stretch| stretch.measures);
        let share = |of: fn(&Measures) -> f64| mean.as_ref().map_or("-".into(), |mean| percent(of(mean)));
        println!(
            "{:7}  {:11}  {:>8}   {:>9}   {:>12}   {:>10}   {:7.1e}, {:7.1e}   {:016x}",
            lane.policy.name(),
            count(text.tokens.min(lane.policy.end(&settings))).to_string(),
            mean.as_ref().map_or("-".into(), |mean| format!("{:.3}", mean.size.sqrt())),
            mean.as_ref().and_then(Measures::relative_difference).map_or("-".into(), percent),
            share(|mean| mean.first),
            share(|mean| mean.logit),
            record.errors.o,
            record.errors.lse,
            record.checksum,
        );
    }
    for lane in &stream.lanes {
        let (errors, most) = (lane.record.errors, check::TOLERANCE);
        if !errors.within(most) {
            let (name, check::Errors { o, lse }) = (lane.policy.name(), errors);
            return Err(format!(
                "policy {name} is not the definition: error {o:.1e} in o, {lse:.1e} in lse, above {most:e}"
            )
            .into());
        }
    }
    Ok(())
}

fn cannot_write(path: &Path, error: &std::io::Error) -> String {
    format!("cannot write {}: {error}", path.display())
}

fn count(n: usize) -> HumanCount {
    HumanCount(n as u64)
}
