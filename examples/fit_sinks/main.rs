//! Recovers the sink logits of an attention layer from what the layer puts out, by gradient descent:
//!
//! ```text
//! cargo run --release --example fit_sinks
//! cargo run --release --example fit_sinks -- --help
//! ```
//!
//! A teacher, a random layer with sink logits, and a student, another one without, read pieces of Moby-Dick. Step
//! after step the student moves its projections and its sink logits to where its outputs are more like the teacher's
//! (`fit.rs`), through [`Attention::forward`] and [`Attention::backward`] (`layer.rs`). It never sees the teacher's
//! weights: only at the end are they held beside the student's (`recovery.rs`).

mod adam;
mod args;
mod fit;
#[cfg(test)]
#[path = "../common/gpu.rs"]
mod gpu;
mod layer;
mod matrix;
mod picture;
mod progress;
mod recovery;
mod text;

use std::error::Error;
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use sink_attention::{Attention, Options, Problem, Shape, SinkLogits, Window, file};

use args::{Args, Command};
use layer::{Layer, Weights};
use progress::Progress;
use recovery::Recovery;
use text::{EMBEDDING, Text};

/// Small, as a layer of a model goes, but with all that a layer of GPT-OSS has: shared key heads, a causal window
/// and sink logits. In so short a window the smallest of the sink logits still has something to say.
const SHAPE: Shape = Shape { batch: 8, heads: 4, kv_heads: 2, seq_q: 64, seq_k: 64, head_dim: 16, value_dim: 16 };
const WINDOW: usize = 16;
/// The largest error of a sink logit with which they count as recovered.
const BOUND: f32 = 0.02;

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

fn cannot_write(path: &Path, error: &std::io::Error) -> String {
    format!("cannot write {}: {error}", path.display())
}

fn run(args: &Args) -> Result<(), Box<dyn Error>> {
    // Better now than after the fit.
    file::check_writable(&args.out).map_err(|error| cannot_write(&args.out, &error))?;
    let attention = Attention::new()?;
    let options = Options::new().causal(true).window(Window::keys(WINDOW)).sink_logits(SinkLogits::PerHead);
    let problem = Problem::new(SHAPE, options)?;
    let learnt_from = if args.settings.with_lse { "o and lse" } else { "o alone" };
    println!("Device:  {}", attention.device_description());
    println!("Problem: {problem}");
    println!("Steps:   {} of Adam, on pieces of Moby-Dick, from {learnt_from}", args.settings.steps);

    let mut rng = StdRng::seed_from_u64(args.seed);
    let text = Text::new(&mut rng);
    let mut teacher = Weights::random(&problem, EMBEDDING, &mut rng);
    // One for each head, from each of the units between -1 and 3: small ones and large ones, in any order.
    teacher.sink_logits = (-1..3).map(|unit| unit as f32 + rng.random::<f32>()).collect();
    teacher.sink_logits.shuffle(&mut rng);
    let student = Weights::random(&problem, EMBEDDING, &mut rng);

    let layer = Layer { attention: &attention, problem: problem.clone(), embedding: EMBEDDING };
    let mut progress = Progress::new(args.settings.steps);
    let mut course = Vec::with_capacity(args.settings.steps);
    let started = Instant::now();
    let student = fit::run(
        &layer,
        student,
        &args.settings,
        || text.batch(SHAPE.batch, SHAPE.seq_q, &mut rng),
        |x| Ok(layer.forward(&teacher, x)?.output),
        |step| {
            progress.update(&step);
            course.push(step);
        },
    )?;
    let seconds = started.elapsed().as_secs_f64();
    progress.finish();

    let svg = picture::draw(&course, &teacher.sink_logits)?;
    file::replace(&args.out, svg.as_bytes()).map_err(|error| cannot_write(&args.out, &error))?;
    let recovery = Recovery::new(&problem, EMBEDDING, &student, &teacher);
    println!("\n{recovery}");
    println!("Values  W_v is off by {:.2}%", 100.0 * recovery.values);
    println!("Loss    {:.1e} at the first step, {:.1e} at the last", course[0].loss, course[course.len() - 1].loss);
    println!("Time    {seconds:.1} s on {}", attention.device_name());
    println!("Picture {}", args.out.display());
    if !recovery.within(BOUND) {
        return Err(format!(
            "the sink logits were not recovered: one is off by more than {BOUND} after {} steps",
            args.settings.steps
        )
        .into());
    }
    Ok(())
}
