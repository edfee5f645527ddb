//! The command line, by hand: a handful of options needs no library.

use std::borrow::Cow;
use std::error::Error;
use std::ffi::OsString;
use std::fs::File;
use std::io::Read;
use std::path::PathBuf;

use crate::stream::Settings;

pub const HELP: &str = "\
Streams a text, byte by byte, through attention with sinks in constant memory.

Usage: streaming [FILE] [OPTIONS]

  FILE              The text to stream, whole (default: the first 100,000 bytes of Moby-Dick)
  --tokens N        Tokens to stream; a shorter text is repeated
  --window W        Keys that a query sees, its own included (default 256)
  --sink-tokens S   First tokens that stay visible (default 4)
  --chunk C         Tokens to a call (default 256)
  --out PICTURE     Where the picture goes (default streaming.svg)
  --help            This text

The stream runs in constant memory. The check after it holds the whole sequence's keys and values of one
key head, 512 bytes a token.
";

const MOBY_DICK: &[u8] = include_bytes!("../data/moby-dick.txt");
const DEFAULT_TOKENS: usize = 100_000;
/// Bounds the check's memory, 512 bytes a token, to 5 GB.
const MOST_TOKENS: usize = 10_000_000;
/// Bounds the cache and the work buffers to some hundred MB.
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
    pub out: PathBuf,
    pub settings: Settings,
}

pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Command, Box<dyn Error>> {
    let mut parsed = Args {
        file: None,
        tokens: None,
        out: "streaming.svg".into(),
        settings: Settings { window: 256, sink_tokens: 4, chunk: 256 },
    };
    let mut args = args.into_iter();
    while let Some(arg) = args.next() {
        let name = arg.to_string_lossy();
        let mut value = || args.next().ok_or_else(|| format!("{name} needs a value; see --help"));
        match &*name {
            "--help" | "-h" => return Ok(Command::Help),
            "--tokens" => parsed.tokens = Some(number(&name, value()?, 1..=MOST_TOKENS)?),
            "--window" => parsed.settings.window = number(&name, value()?, 1..=MOST_KEYS)?,
            "--sink-tokens" => parsed.settings.sink_tokens = number(&name, value()?, 0..=MOST_KEYS)?,
            "--chunk" => parsed.settings.chunk = number(&name, value()?, 1..=MOST_KEYS)?,
            "--out" => parsed.out = value()?.into(),
            _ if name.starts_with('-') => return Err(format!("unknown option {name}; see --help").into()),
            _ if parsed.file.is_some() => return Err(format!("a second file, {name}; see --help").into()),
            _ => parsed.file = Some(arg.into()),
        }
    }
    // Better now than after the stream.
    let folder = parsed.out.parent().filter(|folder| !folder.as_os_str().is_empty());
    if parsed.out.is_dir() || folder.is_some_and(|folder| !folder.is_dir()) {
        return Err(format!("--out {}: not a file in an existing folder", parsed.out.display()).into());
    }
    if parsed.file.is_none() {
        parsed.tokens.get_or_insert(DEFAULT_TOKENS);
    }
    Ok(Command::Run(parsed))
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
        let most = self.tokens.unwrap_or(MOST_TOKENS + 1);
        let mut bytes = Vec::new();
        File::open(path)
            .and_then(|file| file.take(most as u64).read_to_end(&mut bytes))
            .map_err(|error| format!("cannot read {name}: {error}"))?;
        match bytes.len() {
            0 => Err(format!("{name} is empty: there is nothing to stream")),
            n if n > MOST_TOKENS => Err(format!("{name} has more than {MOST_TOKENS} bytes; take a part with --tokens")),
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
        let args = parse_line("a.txt --tokens 7 --window 1 --sink-tokens 0 --chunk 3 --out b.svg").unwrap();
        assert_eq!(args.file, Some("a.txt".into()));
        assert_eq!((args.tokens, args.out), (Some(7), "b.svg".into()));
        assert_eq!(args.settings, Settings { window: 1, sink_tokens: 0, chunk: 3 });
        assert_eq!(parse_line("").unwrap().tokens, Some(DEFAULT_TOKENS));
        assert_eq!(parse_line("a.txt").unwrap().tokens, None);
    }

    #[test]
    fn mistakes_are_errors() {
        for (line, part) in [
            ("--tokens", "needs a value"),
            ("--tokens 0", "from 1 to"),
            ("--tokens -3", "from 1 to"),
            ("--window many", "not a whole number"),
            ("--chunk 99999999999999999999", "not a whole number"),
            ("--pictures", "unknown option"),
            ("a b", "second file"),
            ("--out no/such/folder/p.svg", "existing folder"),
        ] {
            let error = parse_line(line).unwrap_err();
            assert!(error.contains(part), "{line}: {error}");
        }
        assert!(parse_line("no-such-file").unwrap().text().unwrap_err().contains("cannot read"));
    }
}
