//! The command line, by hand: a handful of options needs no library.

use std::borrow::Cow;
use std::error::Error;
use std::ffi::OsString;
use std::fs::File;
use std::io::Read;
use std::path::PathBuf;

use crate::policy::{Policy, Settings};

pub const HELP: &str = "\
Streams a text, byte by byte, through attention that keeps the first tokens or drops them, in constant memory.

Usage: streaming [FILE] [OPTIONS]

  FILE              The text to stream, whole (default: the first 20,000 bytes of Moby-Dick)
  --tokens N        Tokens to stream; a shorter text is repeated. A million and more are fine
  --policy P        sinks:  a rolling cache of the first tokens and of the last ones
                    window: a rolling cache of the last tokens alone
                    full:   a contiguous cache of all tokens, until it is full
                    all:    the three of them side by side (default)
  --window W        Last tokens that a query sees, its own included (default 256)
  --sink-tokens S   First tokens that policy sinks keeps (default 4)
  --capacity C      Tokens that the cache of policy full has room for (default 2048)
  --state FILE      Save the stream here as it goes, and go on from there if there is such a file
  --save-every N    Tokens from one save to the next (default 10,000)
  --out PICTURE     Where the picture goes (default streaming.svg)
  --help            This text

Fails where the stream is not what the f64 definition gives.
";

const MOBY_DICK: &[u8] = include_bytes!("../data/moby-dick.txt");
const DEFAULT_TOKENS: usize = 20_000;
/// As many as a cache counts to.
const MOST_TOKENS: usize = 1 << 30;
/// Bounds the text of a file, which is in memory as a whole.
const MOST_BYTES: usize = 100_000_000;
/// Bounds each cache to 64 MiB.
const MOST_KEYS: usize = 65_536;

pub enum Command {
    Help,
    Run(Args),
}

#[derive(Debug)]
pub struct Args {
    pub file: Option<PathBuf>,
    /// `None` is the whole text.
    pub tokens: Option<usize>,
    pub policies: Vec<Policy>,
    pub settings: Settings,
    pub state: Option<PathBuf>,
    pub save_every: usize,
    pub out: PathBuf,
}

pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Command, Box<dyn Error>> {
    let mut parsed = Args {
        file: None,
        tokens: None,
        policies: Policy::ALL.to_vec(),
        settings: Settings { window: 256, sink_tokens: 4, capacity: 2048 },
        state: None,
        save_every: 10_000,
        out: "streaming.svg".into(),
    };
    let mut args = args.into_iter();
    while let Some(arg) = args.next() {
        let name = arg.to_string_lossy();
        let mut value = || args.next().ok_or_else(|| format!("{name} needs a value; see --help"));
        match &*name {
            "--help" | "-h" => return Ok(Command::Help),
            "--tokens" => parsed.tokens = Some(number(&name, value()?, 1..=MOST_TOKENS)?),
            "--policy" => parsed.policies = policies(&value()?.to_string_lossy())?,
            "--window" => parsed.settings.window = number(&name, value()?, 1..=MOST_KEYS)?,
            "--sink-tokens" => parsed.settings.sink_tokens = number(&name, value()?, 0..=MOST_KEYS)?,
            "--capacity" => parsed.settings.capacity = number(&name, value()?, 1..=MOST_KEYS)?,
            "--state" => parsed.state = Some(value()?.into()),
            "--save-every" => parsed.save_every = number(&name, value()?, 1..=MOST_TOKENS)?,
            "--out" => parsed.out = value()?.into(),
            _ if name.starts_with('-') => return Err(format!("unknown option {name}; see --help").into()),
            _ if parsed.file.is_some() => return Err(format!("a second file, {name}; see --help").into()),
            _ => parsed.file = Some(arg.into()),
        }
    }
    // Better now than after the stream.
    for (name, path) in [("--out", Some(&parsed.out)), ("--state", parsed.state.as_ref())] {
        let Some(path) = path else { continue };
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
        if path.is_dir() || folder.is_some_and(|folder| !folder.is_dir()) {
            return Err(format!("{name} {}: not a file in an existing folder", path.display()).into());
        }
    }
    if parsed.state.as_ref() == Some(&parsed.out) {
        return Err(format!("--state and --out are both {}", parsed.out.display()).into());
    }
    if parsed.file.is_none() {
        parsed.tokens.get_or_insert(DEFAULT_TOKENS);
    }
    Ok(Command::Run(parsed))
}

fn policies(name: &str) -> Result<Vec<Policy>, String> {
    match Policy::ALL.into_iter().find(|policy| policy.name() == name) {
        Some(policy) => Ok(vec![policy]),
        None if name == "all" => Ok(Policy::ALL.to_vec()),
        None => Err(format!("--policy {name}: known are sinks, window, full and all")),
    }
}

fn number(name: &str, value: OsString, range: std::ops::RangeInclusive<usize>) -> Result<usize, String> {
    let value = value.to_string_lossy();
    match value.parse() {
        Ok(number) if range.contains(&number) => Ok(number),
        _ => Err(format!("{name} {value}: not a whole number from {} to {}", range.start(), range.end())),
    }
}

impl Args {
    /// The bytes to stream; never empty.
    pub fn text(&self) -> Result<Cow<'static, [u8]>, String> {
        let Some(path) = &self.file else { return Ok(MOBY_DICK.into()) };
        let name = path.display();
        // Bounded, so that an endless file ends too.
        let most = self.tokens.unwrap_or(usize::MAX).min(MOST_BYTES + 1);
        let mut bytes = Vec::new();
        File::open(path)
            .and_then(|file| file.take(most as u64).read_to_end(&mut bytes))
            .map_err(|error| format!("cannot read {name}: {error}"))?;
        match bytes.len() {
            0 => Err(format!("{name} is empty: there is nothing to stream")),
            n if n > MOST_BYTES => Err(format!("{name} has more than {MOST_BYTES} bytes; take a part with --tokens")),
            _ => Ok(bytes.into()),
        }
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
        let line = "a.txt --tokens 7 --policy window --window 1 --sink-tokens 0 --capacity 3 --state c --save-every 5 --out b.svg";
        let args = parse_line(line).unwrap();
        assert_eq!(args.file, Some("a.txt".into()));
        assert_eq!((args.tokens, args.out, args.state), (Some(7), "b.svg".into(), Some("c".into())));
        assert_eq!(args.settings, Settings { window: 1, sink_tokens: 0, capacity: 3 });
        assert_eq!((args.policies, args.save_every), (vec![Policy::Window], 5));
        let args = parse_line("").unwrap();
        assert_eq!((args.tokens, args.policies.len()), (Some(DEFAULT_TOKENS), 3));
        assert_eq!(parse_line("a.txt --policy all").unwrap().tokens, None);
    }

    #[test]
    fn mistakes_are_errors() {
        for (line, part) in [
            ("--tokens", "needs a value"),
            ("--tokens 0", "from 1 to"),
            ("--tokens -3", "from 1 to"),
            ("--window many", "not a whole number"),
            ("--capacity 99999999999999999999", "not a whole number"),
            ("--policy none", "--policy none: known are sinks, window, full and all"),
            ("--pictures", "unknown option"),
            ("a b", "second file"),
            ("--out no/such/folder/p.svg", "existing folder"),
            ("--state no/such/folder/s", "existing folder"),
            ("--state a.svg --out a.svg", "are both a.svg"),
        ] {
            let error = parse_line(line).unwrap_err();
            assert!(error.contains(part), "{line}: {error}");
        }
        assert!(parse_line("no-such-file").unwrap().text().unwrap_err().contains("cannot read"));
    }
}
