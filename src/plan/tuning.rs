//! Tiles measured on the user's own device, as a table in a text file.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use serde_json::Value;

use crate::file;
use crate::kernel::Kernel;
use crate::kernel::tile::Tiling;
use crate::problem::Problem;
use crate::problem::element::DType;
use crate::problem::error::{Error, Result};

/// Environment variable that names a file with the [`Tuning`] of [`Attention::new`](crate::Attention::new) and
/// [`Attention::open`](crate::Attention::open).
pub const TUNING_VARIABLE: &str = "SINK_ATTENTION_TUNING";

const FIRST_LINE: &str = "sink-attention tuning 1";
/// The format of the report that `sink-attention check --report` and `sink-attention tune --report` write, in JSON. It holds a [`Tuning`],
/// too.
pub const REPORT_FORMAT: &str = "sink-attention report 1";
/// A table with every possible entry has some 20 KiB. The rest is for remarks, and for the failures in a report.
const MOST_BYTES: u64 = 16 << 20;
/// Widths up to each of these share tiles.
const WIDTHS: [u32; 4] = [32, 64, 128, 256];
/// Fewer queries than this are decoding, which has no class.
const FEW: usize = 33;
/// Up to this many queries and keys, workgroups are scarce.
const SHORT: usize = 512;
/// Up to this many visible keys a query, the edges of tiles matter.
const NARROW: usize = 512;

/// Classes of masks and lengths that need different tiles.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum MaskClass {
    /// More than 512 queries and keys, and more than 512 of the keys in reach of a query.
    Long,
    /// More than 512 queries and keys, of which a query sees at most 512.
    Window,
    /// 33 to 512 queries, or as few keys.
    Short,
}

impl MaskClass {
    /// All classes.
    pub const ALL: [MaskClass; 3] = [MaskClass::Long, MaskClass::Window, MaskClass::Short];

    /// The class of a problem. `None` for up to 32 queries (decoding), which stay with the built-in table.
    pub fn of(problem: &Problem) -> Option<Self> {
        let [seq_q, seq_k] = problem.longest();
        match (seq_q, seq_q.min(seq_k)) {
            (..FEW, _) => None,
            (_, ..=SHORT) => Some(MaskClass::Short),
            _ if problem.most_visible() <= NARROW => Some(MaskClass::Window),
            _ => Some(MaskClass::Long),
        }
    }
}

impl fmt::Display for MaskClass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            MaskClass::Long => "long",
            MaskClass::Window => "window",
            MaskClass::Short => "short",
        })
    }
}

/// The key of an entry: the kernel and the problems that tiles are measured for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TuningKey {
    /// One of the kernels that have tiles.
    pub kernel: Kernel,
    /// Element type of the operands.
    pub dtype: DType,
    /// The larger of D and E, rounded up to 32, 64, 128 or 256.
    pub width: u32,
    /// Mask and length.
    pub mask: MaskClass,
}

impl TuningKey {
    /// The key of a kernel of a problem. `None` if the problem has no class or the kernel has no tiles.
    pub fn of(kernel: Kernel, problem: &Problem) -> Option<Self> {
        let width = problem.shape().head_dim.max(problem.shape().value_dim) as u32;
        let width = WIDTHS.into_iter().find(|most| width <= *most)?;
        let (dtype, mask) = (problem.options().dtype, MaskClass::of(problem)?);
        kernel.tiled().map(|_| TuningKey { kernel, dtype, width, mask })
    }
}

impl fmt::Display for TuningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let TuningKey { kernel, dtype, width, mask } = self;
        write!(f, "{} {dtype} width {width} {mask}", kernel.name())
    }
}

impl FromStr for TuningKey {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let words: Vec<&str> = text.split_whitespace().collect();
        let [kernel, dtype, "width", width, mask] = words[..] else {
            return Err(format!("{text:?} is not of the form \"forward f32 width 64 long\""));
        };
        Ok(TuningKey {
            kernel: one_of("kernel", kernel, Kernel::TILED, |kernel| kernel.name())?,
            dtype: one_of("dtype", dtype, [DType::F32, DType::F16, DType::Bf16], ToString::to_string)?,
            width: one_of("width", width, WIDTHS, ToString::to_string)?,
            mask: one_of("mask", mask, MaskClass::ALL, ToString::to_string)?,
        })
    }
}

fn one_of<T: Copy, S: AsRef<str> + fmt::Display, const N: usize>(
    what: &str,
    word: &str,
    known: [T; N],
    name: impl Fn(&T) -> S,
) -> Result<T, String> {
    let found = known.iter().find(|value| name(value).as_ref() == word);
    found.copied().ok_or_else(|| unknown(what, word, known.each_ref().map(name)))
}

fn unknown(what: &str, word: &str, known: impl IntoIterator<Item: fmt::Display>) -> String {
    let known: Vec<String> = known.into_iter().map(|name| name.to_string()).collect();
    format!("unknown {what} {word:?}; known: {}", known.join(", "))
}

/// Tiles that were measured on one device. [`Attention::with_tuning`](crate::Attention::with_tuning) prefers them to the built-in table.
/// They change the speed, and results by no more than the order of sums does.
///
/// Its text ([`FromStr`] and [`Display`](fmt::Display)) is the one that `sink-attention tune` writes: three lines for the format, the
/// device and the driver, then a line for each entry, `kernel dtype width WIDTH mask: tiles`. The tiles are a [`Tiling`], which names the
/// micro-kernel that won. Empty lines, and lines that begin with `#`, are ignored. The report of a device, which `sink-attention tune
/// --report` writes in JSON, is read as the table that it holds.
///
/// ```
/// let text = "sink-attention tuning 1
/// device: NVIDIA H200
/// driver: NVIDIA 580.159.04
/// forward f32 width 64 long: portable 64x32 (16x8 threads of 4x4), k_step 32, n_step 16
/// forward f16 width 64 long: cooperative 4x3x1x2
/// ";
/// let tuning: sink_attention::tuning::Tuning = text.parse()?;
/// assert_eq!((tuning.device(), tuning.entries().len()), ("NVIDIA H200", 2));
/// assert_eq!(tuning.to_string().parse(), Ok(tuning));
/// # Ok::<(), sink_attention::tuning::TuningError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tuning {
    device: String,
    driver: String,
    entries: Vec<(TuningKey, Tiling)>,
}

impl Tuning {
    /// A table without entries, for a device. `device` is the name that its adapter reports, and `driver` is for people to read.
    pub fn new(device: &str, driver: &str) -> Self {
        // Each name is on one line, so that the text can be read again.
        let line = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
        Tuning { device: line(device), driver: line(driver), entries: Vec::new() }
    }

    /// Reads a file.
    ///
    /// # Errors
    /// [`Error::TuningFile`] with the path and, if the file can be read, the line.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let failed = |reason: String| Error::TuningFile { path: path.as_ref().into(), reason };
        let bytes = file::read(&path, MOST_BYTES).map_err(|error| failed(format!("cannot read: {error}")))?;
        let text = String::from_utf8(bytes).map_err(|_| failed("it is not text in UTF-8".into()))?;
        text.parse().map_err(|error: TuningError| failed(error.to_string()))
    }

    /// The file that `SINK_ATTENTION_TUNING` names. `None` if the variable is unset or empty.
    ///
    /// # Errors
    /// Those of [`load`](Self::load).
    pub fn from_env() -> Result<Option<Self>> {
        let path = std::env::var_os(TUNING_VARIABLE).filter(|path| !path.is_empty());
        path.map(Tuning::load).transpose()
    }

    /// Name of the device's adapter.
    pub fn device(&self) -> &str {
        &self.device
    }

    /// The driver at the time of the measurement. With another driver the table still holds, but it may be worth measuring again.
    pub fn driver(&self) -> &str {
        &self.driver
    }

    /// The entries in their order.
    pub fn entries(&self) -> &[(TuningKey, Tiling)] {
        &self.entries
    }

    /// Adds an entry, or replaces the one of this key.
    pub fn insert(&mut self, key: TuningKey, tiles: impl Into<Tiling>) {
        let tiles = tiles.into();
        match self.entries.iter_mut().find(|(other, _)| *other == key) {
            Some((_, old)) => *old = tiles,
            None => self.entries.push((key, tiles)),
        }
    }

    /// Adds an entry from its line.
    fn add(&mut self, line: &str) -> Result<(), String> {
        let (key, tiles) = line.split_once(':').ok_or_else(|| format!("no \":\" between key and tiles in {line:?}"))?;
        let key = key.parse()?;
        if self.get(&key).is_some() {
            return Err(format!("a second entry for {key}"));
        }
        self.insert(key, tiles.parse::<Tiling>()?);
        Ok(())
    }

    /// The tiles for a key.
    pub fn get(&self, key: &TuningKey) -> Option<Tiling> {
        self.entries.iter().find(|(other, _)| other == key).map(|(_, tiles)| *tiles)
    }

    /// Refuses a device other than the measured one.
    ///
    /// # Errors
    /// [`Error::TuningDevice`].
    pub fn check_device(&self, name: &str) -> Result<()> {
        if Tuning::new(name, "").device == self.device {
            return Ok(());
        }
        Err(Error::TuningDevice { measured: self.device.clone(), actual: name.into() })
    }
}

impl fmt::Display for Tuning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{FIRST_LINE}\ndevice: {}\ndriver: {}", self.device, self.driver)?;
        writeln!(f, "# kernel, dtype, widths up to, mask: micro-kernel and tiles")?;
        self.entries.iter().try_for_each(|(key, tiles)| writeln!(f, "{key}: {tiles}"))
    }
}

/// The reason why a text is no [`Tuning`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {reason}")]
pub struct TuningError {
    /// Line, counted from 1.
    pub line: usize,
    /// The mistake in the text.
    pub reason: String,
}

impl FromStr for Tuning {
    type Err = TuningError;

    fn from_str(text: &str) -> Result<Self, TuningError> {
        if text.trim_start().starts_with('{') {
            return of_report(text);
        }
        let lines = text.lines().enumerate().map(|(index, line)| (index + 1, line.trim()));
        let mut lines = lines.filter(|(_, line)| !line.is_empty() && !line.starts_with('#'));
        let end = text.lines().count() + 1;
        let mut header = |expected: String, read: &dyn Fn(&str) -> Option<String>| {
            let (line, found) = lines.next().unwrap_or((end, "the end of the file"));
            read(found).ok_or_else(|| TuningError { line, reason: format!("expected {expected}, found {found:?}") })
        };
        header(format!("{FIRST_LINE:?}"), &|line| (line == FIRST_LINE).then(String::new))?;
        let field = |name: &str, line: &str| Some(line.strip_prefix(name)?.strip_prefix(':')?.trim().to_string());
        let device = header("\"device: NAME\"".into(), &|line| field("device", line).filter(|name| !name.is_empty()))?;
        let driver = header("\"driver: NAME\"".into(), &|line| field("driver", line))?;
        let mut tuning = Tuning::new(&device, &driver);
        for (line, text) in lines {
            tuning.add(text).map_err(|reason| TuningError { line, reason })?;
        }
        Ok(tuning)
    }
}

/// The table in a report, in JSON.
fn of_report(text: &str) -> Result<Tuning, TuningError> {
    let report: Value =
        serde_json::from_str(text).map_err(|error| TuningError { line: error.line(), reason: error.to_string() })?;
    // The line of a value, for a report is written with a line for each.
    let line = |value: &str| text.lines().position(|line| line.contains(value)).map_or(1, |index| index + 1);
    let missing = |key: &str, kind: &str| TuningError {
        line: line(&format!("{key:?}")),
        reason: format!("{key:?} of the report is {}, not {kind}", report[key]),
    };
    let field = |key: &str| report[key].as_str().ok_or_else(|| missing(key, "a text"));
    if field("format")? != REPORT_FORMAT {
        return Err(missing("format", &format!("{REPORT_FORMAT:?}")));
    }
    let mut tuning = Tuning::new(field("device")?, field("driver")?);
    if tuning.device.is_empty() {
        return Err(missing("device", "a name"));
    }
    let entries = report["tuning"].as_array().ok_or_else(|| missing("tuning", "a list"))?;
    if entries.is_empty() {
        let reason = "the report has no tiles; `sink-attention tune --report` adds them".into();
        return Err(TuningError { line: line("\"tuning\""), reason });
    }
    for (n, entry) in entries.iter().enumerate() {
        let failed = |reason: String| TuningError {
            line: line(&entry.to_string()),
            reason: format!("entry {} of \"tuning\": {reason}", n + 1),
        };
        let entry = entry.as_str().ok_or_else(|| failed(format!("{entry} is no text")))?;
        tuning.add(entry).map_err(failed)?;
    }
    Ok(tuning)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::loops::LoopHints;
    use crate::kernel::tile::portable::PortableTile;
    use crate::problem::{Options, Shape, Window};

    fn problem(seq: [usize; 2], width: usize, options: Options) -> Problem {
        let [seq_q, seq_k] = seq;
        let shape = Shape { batch: 1, heads: 2, kv_heads: 1, seq_q, seq_k, head_dim: width, value_dim: 8 };
        Problem::new(shape, options).unwrap()
    }

    #[test]
    fn classes() {
        let causal = Options::new().causal(true);
        let class = |seq, options| MaskClass::of(&problem(seq, 64, options));
        assert_eq!(class([8192, 8192], causal), Some(MaskClass::Long));
        assert_eq!(class([8192, 8192], Options::new()), Some(MaskClass::Long));
        assert_eq!(class([8192, 8192], causal.window(Window::keys(128))), Some(MaskClass::Window));
        assert_eq!(class([8192, 8192], causal.window(Window::keys(128)).sink_tokens(4)), Some(MaskClass::Window));
        assert_eq!(class([8192, 8192], causal.window(Window::keys(512))), Some(MaskClass::Window));
        assert_eq!(class([8192, 8192], causal.window(Window::keys(513))), Some(MaskClass::Long));
        assert_eq!(class([8192, 8192], causal.window(Window::keys(512)).sink_tokens(1)), Some(MaskClass::Long));
        assert_eq!(class([512, 512], causal.window(Window::keys(128))), Some(MaskClass::Short));
        assert_eq!(class([1024, 64], causal), Some(MaskClass::Short));
        assert_eq!(class([32, 8192], causal), None);
        let key = |width| TuningKey::of(Kernel::D_Q, &problem([99, 99], width, causal));
        for (width, class) in [(1, 32), (32, 32), (33, 64), (80, 128), (256, 256)] {
            assert_eq!(key(width).unwrap().width, class);
        }
        assert_eq!(TuningKey::of(Kernel::DELTA, &problem([99, 99], 64, causal)), None);
    }

    fn sample() -> Tuning {
        let mut tuning = Tuning::new(" Some\nGPU ", "1.2 (Mesa)");
        let mut tiles = PortableTile {
            threads_r: 16,
            threads_c: 8,
            rows: 4,
            quads: 1,
            k_step: 8,
            n_step: 16,
            loops: LoopHints::NONE,
        };
        for kernel in Kernel::TILED {
            for dtype in [DType::F32, DType::F16, DType::Bf16] {
                for mask in MaskClass::ALL {
                    tuning.insert(TuningKey { kernel, dtype, width: 64, mask }, tiles);
                    let cooperative = Tiling::Cooperative {
                        subgroups: tiles.rows,
                        rows: 2,
                        columns: 1,
                        stages: 2,
                        loops: LoopHints::NONE,
                    };
                    tuning.insert(TuningKey { kernel, dtype, width: 128, mask }, cooperative);
                    tiles.rows = tiles.rows % 8 + 1;
                }
            }
        }
        tuning
    }

    #[test]
    fn text_and_back() {
        let tuning = sample();
        assert_eq!(tuning.entries().len(), 90);
        assert_eq!(tuning.to_string().parse(), Ok(tuning.clone()));
        let with_windows_ends = tuning.to_string().replace('\n', "\r\n\r\n  # a remark\r\n");
        assert_eq!(with_windows_ends.parse(), Ok(tuning.clone()));
        let empty = Tuning::new("x", "");
        assert_eq!(empty.to_string().parse(), Ok(empty));
        tuning.check_device("Some GPU").unwrap();
        tuning.check_device("Some GPU 2").unwrap_err();
        tuning.check_device("").unwrap_err();
    }

    #[test]
    fn what_is_malformed_is_told_with_its_line() {
        let head = "sink-attention tuning 1\ndevice: x\ndriver: y\n";
        let tiles = "64x32 (16x8 threads of 4x4), k_step 32, n_step 16";
        let good = format!("forward f32 width 64 long: portable {tiles}");
        format!("{head}{good}").parse::<Tuning>().unwrap();
        let entry = |text: &str| format!("{head}# remark\n{text}\n");
        for (text, line, message) in [
            (String::new(), 1, "expected \"sink-attention tuning 1\""),
            ("sink-attention tuning 2".into(), 1, "tuning 2"),
            ("sink-attention tuning 1\n".into(), 2, "device"),
            ("sink-attention tuning 1\ndevice:\ndriver: y".into(), 2, "device"),
            ("sink-attention tuning 1\ndevice: x\n\nforward".into(), 4, "driver"),
            (entry("forward f32 width 64 long"), 5, "no \":\""),
            (
                entry(&good.replace("forward", "delta")),
                5,
                "unknown kernel \"delta\"; known: forward, exact_delta, d_q, d_kv",
            ),
            (entry(&good.replace("f32", "f64")), 5, "unknown dtype \"f64\"; known: f32, f16, bf16"),
            (entry(&good.replace("portable", "magic")), 5, "unknown micro-kernel \"magic\""),
            (entry(&good.replace("width 64", "width 65")), 5, "unknown width \"65\"; known: 32, 64, 128, 256"),
            (entry(&good.replace("width 64", "64")), 5, "is not of the form"),
            (entry(&good.replace("long", "wide")), 5, "unknown mask \"wide\"; known: long, window, short"),
            (entry(&good.replace(tiles, "")), 5, "tiles \"\""),
            (entry(&good.replace("n_step 16", "n_step 12")), 5, "n_step (12)"),
            (entry(&good.replace("64x32", "64x64")), 5, "64x64"),
            (entry(&good.replace("k_step 32", "k_step 99999999999")), 5, "99999999999"),
            (entry(&good.replace("16x8", "4294967295x4294967295")), 5, "threads_r (4294967295)"),
            (format!("{head}{good}\n{good}"), 5, "a second entry"),
        ] {
            let error = text.parse::<Tuning>().unwrap_err();
            assert_eq!(error.line, line, "{error}");
            assert!(error.to_string().contains(message), "no {message:?} in {error}");
        }
    }

    /// A report as the command writes it, with the fields of a tuning and one more.
    fn report(tuning: &Tuning) -> String {
        let entries: Vec<String> = tuning.entries().iter().map(|(key, tiles)| format!("{key}: {tiles}")).collect();
        let report = serde_json::json!({
            "format": REPORT_FORMAT,
            "device": tuning.device(),
            "driver": tuning.driver(),
            "tuning": entries,
            "runs": [{ "command": "check", "result": { "failed": 0 } }],
        });
        serde_json::to_string_pretty(&report).unwrap()
    }

    #[test]
    fn a_report_is_read_as_its_table() {
        let tuning = sample();
        assert_eq!(report(&tuning).parse(), Ok(tuning.clone()));
        let in_one_line = report(&tuning).lines().map(str::trim).collect::<String>();
        assert_eq!(in_one_line.parse(), Ok(tuning));
    }

    #[test]
    fn what_is_wrong_in_a_report_is_told_with_its_line() {
        let mut tuning = sample();
        tuning.entries.truncate(2);
        let good = report(&tuning);
        let first = tuning.entries[0].0.to_string();
        let with = |from: &str, to: &str| {
            assert!(good.contains(from), "{from:?} in {good}");
            good.replace(from, to)
        };
        for (text, line, message) in [
            ("{".into(), 1, "EOF"),
            (good[..good.len() / 2].into(), 0, "EOF"),
            (with("report 1", "report 2"), 4, "\"format\" of the report is \"sink-attention report 2\""),
            (with("\"format\"", "\"kind\""), 1, "\"format\" of the report is null, not a text"),
            (with("Some GPU", " "), 2, "\"device\""),
            (with("\"1.2 (Mesa)\"", "12"), 3, "\"driver\" of the report is 12"),
            (with("\"tuning\": [", "\"tuning\": 7, \"other\": ["), 0, "\"tuning\" of the report is 7"),
            (report(&Tuning::new("x", "")), 0, "has no tiles"),
            (with(&first, "forward f64 width 64 long"), 0, "entry 1 of \"tuning\": unknown dtype \"f64\""),
            (with(&tuning.entries[1].0.to_string(), &first), 0, "entry 2 of \"tuning\": a second entry"),
            (with("\"tuning\": [", "\"tuning\": [ 7,"), 0, "entry 1 of \"tuning\": 7 is no text"),
            (format!("{good} more"), 0, "trailing"),
        ] {
            let error = text.parse::<Tuning>().unwrap_err();
            assert!(error.to_string().contains(message), "no {message:?} in {error}");
            assert!(line == 0 || error.line == line, "{error} of {text}");
            assert!((1..=text.lines().count()).contains(&error.line), "{error}");
        }
    }

    #[test]
    fn a_file_that_is_not_there() {
        let error = Tuning::load("no such folder/tuning").unwrap_err();
        assert!(matches!(error, Error::TuningFile { .. }) && error.to_string().contains("no such folder"), "{error}");
    }
}
