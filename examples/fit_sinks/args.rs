//! The command line, by hand: a handful of options needs no library.

use std::error::Error;
use std::ffi::OsString;
use std::ops::RangeInclusive;
use std::path::PathBuf;

use crate::fit::Settings;

pub const HELP: &str = "\
Recovers the sink logits of an attention layer from what the layer puts out, by gradient descent.

Usage: fit_sinks [OPTIONS]

  --steps N       Steps of gradient descent (default 1000)
  --seed N        Draws other embeddings, weights and pieces of the text (default 1851)
  --without-lse   Learn from o alone, without lse
  --out PICTURE   Where the picture goes (default fit_sinks.svg)
  --help          This text

Fails unless every sink logit comes out within 0.02 of the true one.
";

const MOST_STEPS: u64 = 100_000;

pub enum Command {
    Help,
    Run(Args),
}

#[derive(Debug)]
pub struct Args {
    pub seed: u64,
    pub out: PathBuf,
    pub settings: Settings,
}

pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Command, Box<dyn Error>> {
    let mut parsed =
        Args { seed: 1851, out: "fit_sinks.svg".into(), settings: Settings { steps: 1000, with_lse: true } };
    let mut args = args.into_iter();
    while let Some(arg) = args.next() {
        let name = arg.to_string_lossy();
        let mut value = || args.next().ok_or_else(|| format!("{name} needs a value; see --help"));
        match &*name {
            "--help" | "-h" => return Ok(Command::Help),
            "--steps" => parsed.settings.steps = number(&name, value()?, 1..=MOST_STEPS)? as usize,
            "--seed" => parsed.seed = number(&name, value()?, 0..=u64::MAX)?,
            "--without-lse" => parsed.settings.with_lse = false,
            "--out" => parsed.out = value()?.into(),
            _ => return Err(format!("unknown argument {name}; see --help").into()),
        }
    }
    // Better now than after the fit.
    let folder = parsed.out.parent().filter(|folder| !folder.as_os_str().is_empty());
    if parsed.out.file_name().is_none() || parsed.out.is_dir() || folder.is_some_and(|folder| !folder.is_dir()) {
        return Err(format!("--out {}: not a file in an existing folder", parsed.out.display()).into());
    }
    Ok(Command::Run(parsed))
}

fn number(name: &str, value: OsString, range: RangeInclusive<u64>) -> Result<u64, String> {
    let value = value.to_string_lossy();
    match value.parse() {
        Ok(number) if range.contains(&number) => Ok(number),
        _ => Err(format!("{name} {value}: not a whole number from {} to {}", range.start(), range.end())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_line(line: &str) -> Result<Args, String> {
        match parse(line.split_whitespace().map(OsString::from)).map_err(|error| error.to_string())? {
            Command::Run(args) => Ok(args),
            Command::Help => Err("help".into()),
        }
    }

    #[test]
    fn options() {
        let args = parse_line("--steps 7 --seed 3 --without-lse --out a.svg").unwrap();
        assert_eq!((args.seed, args.out), (3, "a.svg".into()));
        assert_eq!(args.settings, Settings { steps: 7, with_lse: false });
        assert!(parse_line("").unwrap().settings.with_lse);
        assert_eq!(parse_line("--steps 7 --help").unwrap_err(), "help");
    }

    #[test]
    fn mistakes_are_errors() {
        for (line, part) in [
            ("--steps", "needs a value"),
            ("--steps 0", "from 1 to"),
            ("--steps many", "not a whole number"),
            ("--seed -1", "not a whole number"),
            ("--step 5", "unknown argument"),
            ("a.txt", "unknown argument"),
            ("--out no/such/folder/p.svg", "existing folder"),
            ("--out .", "existing folder"),
        ] {
            let error = parse_line(line).unwrap_err();
            assert!(error.contains(part), "{line}: {error}");
        }
        let empty = parse(["--out", ""].map(OsString::from)).err().unwrap();
        assert!(empty.to_string().contains("existing folder"));
    }
}
