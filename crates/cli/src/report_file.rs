//! The file that `check --report` and `tune --report` add to: what a bug report about a device needs, and its measured tiles.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use sink_attention::tuning::{REPORT_FORMAT, Tuning, TuningKey};
use sink_attention::{Attention, file};

use crate::devices;
use crate::shared::{check_writable, write_file};

/// A larger file is none of these.
const MOST_BYTES: u64 = 16 << 20;

/// A report on its way to its file.
#[derive(Debug)]
pub struct ReportFile {
    path: PathBuf,
    content: Content,
    tuning: Tuning,
}

/// The file. [`Tuning`] reads it as a table.
#[derive(Debug, Serialize, Deserialize)]
struct Content {
    format: String,
    device: String,
    driver: String,
    /// What `devices` says of it; absent for the CPU.
    #[serde(default)]
    adapter: Option<Value>,
    /// A line for each entry of the tuning.
    tuning: Vec<String>,
    runs: Vec<Run>,
}

/// What a command found.
#[derive(Debug, Serialize, Deserialize)]
struct Run {
    command: String,
    version: String,
    /// The driver at that time.
    driver: String,
    result: Value,
}

impl ReportFile {
    /// The report that the file holds, which must be of this device, or a new one. Nothing is written yet, but could be.
    pub fn open(path: &Path, attention: &Attention) -> Result<Self, String> {
        let device = attention.device();
        let name = device.map_or_else(|| attention.device_name(), |device| device.capabilities().name.clone());
        let info = device.map(|device| device.wgpu().adapter_info());
        let driver = info.map_or_else(String::new, |info| format!("{} {}", info.driver, info.driver_info));
        let tuning = Tuning::new(&name, &driver);
        // Both are on one line here.
        let (device, driver) = (tuning.device().to_string(), tuning.driver().to_string());
        check_writable(path)?;
        let mut report = match Self::read(path)? {
            Some(mut content) => {
                let lines = content.tuning.join("\n");
                let text = format!("sink-attention tuning 1\ndevice: {}\ndriver: {driver}\n{lines}", content.device);
                let tuning: Tuning = text.parse().map_err(|error| format!("{}: {error}", path.display()))?;
                tuning.check_device(&device).map_err(|_| {
                    let other = &content.device;
                    format!(
                        "{} is a report of {other:?}, and this device is {device:?}; name another file by --report",
                        path.display()
                    )
                })?;
                content.driver = driver;
                ReportFile { path: path.into(), content, tuning }
            }
            None => {
                let format = REPORT_FORMAT.into();
                let content = Content { format, device, driver, adapter: None, tuning: Vec::new(), runs: Vec::new() };
                ReportFile { path: path.into(), content, tuning }
            }
        };
        if attention.device().is_some() {
            report.content.adapter = devices::describe_adapter(&name);
        }
        Ok(report)
    }

    /// The content of a file; none if there is no file, or an empty one.
    fn read(path: &Path) -> Result<Option<Content>, String> {
        if !path.exists() {
            return Ok(None);
        }
        let failed =
            |reason: String| format!("{} is no report: {reason}; name another file by --report", path.display());
        let bytes = file::read(path, MOST_BYTES).map_err(|error| failed(error.to_string()))?;
        if bytes.is_empty() {
            return Ok(None);
        }
        let content: Value = serde_json::from_slice(&bytes).map_err(|error| failed(error.to_string()))?;
        match content["format"].as_str() {
            Some(REPORT_FORMAT) => {}
            _ => return Err(failed(format!("its format is {}, not {REPORT_FORMAT:?}", content["format"]))),
        }
        serde_json::from_value(content).map(Some).map_err(|error| failed(error.to_string()))
    }

    /// Adds tiles, or replaces those of this key.
    pub fn insert(&mut self, key: TuningKey, tiles: sink_attention::plan::Tiling) {
        self.tuning.insert(key, tiles);
    }

    /// Adds what this command found, in place of what it found the last time, and writes the file.
    pub fn write(&mut self, result: &impl Serialize) -> Result<(), String> {
        let told = |error: serde_json::Error| format!("{}: {error}", self.path.display());
        let run = Run {
            command: command(std::env::args().skip(1)),
            version: env!("CARGO_PKG_VERSION").into(),
            driver: self.content.driver.clone(),
            result: serde_json::to_value(result).map_err(told)?,
        };
        self.content.tuning = self.tuning.entries().iter().map(|(key, tiles)| format!("{key}: {tiles}")).collect();
        self.content.runs.retain(|other| other.command != run.command);
        self.content.runs.push(run);
        let text = serde_json::to_string_pretty(&self.content).map_err(told)?;
        write_file(&self.path, &(text + "\n"))
    }
}

/// The arguments without paths, which are nobody else's concern.
fn command(arguments: impl Iterator<Item = String>) -> String {
    const PATHS: [&str; 3] = ["--report", "--out", "--tuning"];
    let mut words = Vec::new();
    let mut arguments = arguments;
    while let Some(argument) = arguments.next() {
        if PATHS.contains(&&*argument) {
            arguments.next();
        } else if !PATHS.iter().any(|path| argument.strip_prefix(path).is_some_and(|rest| rest.starts_with('='))) {
            words.push(argument);
        }
    }
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::command;

    #[test]
    fn commands_name_no_path() {
        let of = |text: &str| command(text.split(' ').map(String::from));
        assert_eq!(of("check --quick --report r.json --dtype f16"), "check --quick --dtype f16");
        assert_eq!(of("tune --out=/home/x/t --reports --tuning t --report"), "tune --reports");
    }
}
