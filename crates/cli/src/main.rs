//! The command line: `sink-attention SUBCOMMAND ...`.
//!
//! Each subcommand is a module: a struct of arguments with `execute`, and a variant here.

mod bench;
mod check;
mod devices;
mod plan;
mod report_file;
mod run;
mod shared;
mod tune;

use std::error::Error;
use std::io::Write as _;
use std::process::ExitCode;

use clap::{CommandFactory as _, Parser, Subcommand};

/// FlashAttention with attention sinks, on every GPU and on the CPU.
#[derive(Debug, Parser)]
#[command(version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Run(run::Run),
    Devices(devices::Devices),
    Check(check::Check),
    Plan(plan::PlanArgs),
    Bench(bench::Bench),
    Tune(tune::Tune),
}

impl Command {
    fn execute(self) -> Result<(), Box<dyn Error>> {
        match self {
            Command::Run(run) => run.execute(),
            Command::Devices(devices) => devices.execute(),
            Command::Check(check) => check.execute(),
            Command::Plan(plan) => plan.execute(),
            Command::Bench(bench) => bench.execute(),
            Command::Tune(tune) => tune.execute(),
        }
    }
}

/// Exit codes: 0 done, 1 failed (with a message on stderr), 2 wrong usage.
fn main() -> ExitCode {
    // Logs the library's warnings, and other messages if RUST_LOG asks for them, because drivers are talkative.
    env_logger::Builder::new()
        .filter_module("sink_attention", log::LevelFilter::Warn)
        .parse_default_env()
        .format_timestamp(None)
        .init();
    let Err(error) = Cli::parse().command.execute() else { return ExitCode::SUCCESS };
    match error.downcast::<clap::Error>() {
        // Some arguments exclude each other by their values only, which clap cannot check.
        Ok(usage) => usage.format(&mut Cli::command()).exit(),
        Err(error) => {
            // eprintln! is not used, because it panics if stderr is gone.
            let _ = writeln!(std::io::stderr(), "error: {error}");
            ExitCode::FAILURE
        }
    }
}
