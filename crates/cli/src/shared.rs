//! Arguments, output and progress, which the subcommands share.

use std::error::Error;
use std::fmt;
use std::io::{IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};

use clap::error::ErrorKind;
use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use sink_attention::plan::{Capabilities, ElementLayout, MicroKernel, Precision, Rounding};
use sink_attention::tuning::Tuning;
use sink_attention::{Attention, DType, DeviceChoice, file};

/// Where to compute.
#[derive(Debug, Args)]
pub struct DeviceArgs {
    /// Where to compute
    #[arg(long, value_enum, default_value_t)]
    backend: Backend,

    /// GPU adapter: its index, or a part of its name [default: $SINK_ATTENTION_ADAPTER, else the best]
    #[arg(long, value_name = "NAME")]
    adapter: Option<String>,

    /// How kernels form matrix products; all but auto need a GPU
    #[arg(long, value_enum, default_value_t)]
    kernel: Kernel,

    /// How products of f32 are formed; split needs a GPU and operands of f32
    #[arg(long, value_enum, default_value_t)]
    precision: PrecisionArg,

    /// File with tiles measured by `tune` on this device [default: $SINK_ATTENTION_TUNING]
    #[arg(long, value_name = "FILE")]
    tuning: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, Default, ValueEnum)]
enum Backend {
    /// The best GPU adapter, a software one where there is no other; an error where there is none
    Gpu,
    /// The CPU
    Cpu,
    /// A GPU, or the CPU where there is none: it is faster than a software adapter
    #[default]
    Auto,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
enum Kernel {
    /// The fastest way that the device offers
    #[default]
    Auto,
    /// Plain WGSL, on every device
    Portable,
    /// Cooperative matrices (tensor cores)
    Cooperative,
    /// Cooperative matrices whose elements are computed with in registers
    Fragments,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
enum PrecisionArg {
    /// Multiply-adds in f32
    #[default]
    Full,
    /// Cooperative matrices (tensor cores): each number is two halves, and each product is three, with the bounds of f32
    Split,
}

/// Element type of the operands.
#[derive(Debug, Clone, Copy, Default, ValueEnum)]
pub enum ElementType {
    #[default]
    F32,
    F16,
    Bf16,
}

impl From<ElementType> for DType {
    fn from(element: ElementType) -> Self {
        match element {
            ElementType::F32 => DType::F32,
            ElementType::F16 => DType::F16,
            ElementType::Bf16 => DType::Bf16,
        }
    }
}

impl DeviceArgs {
    /// Refuses arguments that exclude each other, before any other work, as clap would.
    pub fn check(&self) -> Result<(), clap::Error> {
        let gpu_only =
            self.adapter.as_ref().map(|_| "--adapter <NAME>").or(self.tuning.as_ref().map(|_| "--tuning <FILE>"));
        match (self.backend, gpu_only) {
            (Backend::Cpu, Some(argument)) => {
                let message = format!("the argument '{argument}' cannot be used with '--backend cpu'");
                Err(clap::Error::raw(ErrorKind::ArgumentConflict, message))
            }
            (Backend::Cpu, None) if self.kernel != Kernel::Auto => {
                let message = "the argument '--kernel' cannot be used with '--backend cpu'";
                Err(clap::Error::raw(ErrorKind::ArgumentConflict, message))
            }
            (Backend::Cpu, None) if self.precision != PrecisionArg::Full => {
                let message = "the argument '--precision split' cannot be used with '--backend cpu'";
                Err(clap::Error::raw(ErrorKind::ArgumentConflict, message))
            }
            _ => Ok(()),
        }
    }

    /// Refuses another precision than the full one, for a command whose results say nothing of it.
    pub fn check_full_precision(&self, command: &str) -> Result<(), clap::Error> {
        if self.precision == PrecisionArg::Full {
            return Ok(());
        }
        let message = format!("the argument '--precision split' cannot be used with {command}");
        Err(clap::Error::raw(ErrorKind::ArgumentConflict, message))
    }

    /// Whether the arguments ask for the CPU.
    pub fn is_cpu(&self) -> bool {
        matches!(self.backend, Backend::Cpu)
    }

    /// The micro-kernel that the arguments ask for.
    pub fn micro_kernel(&self) -> MicroKernel {
        match self.kernel {
            Kernel::Auto => MicroKernel::Auto,
            Kernel::Portable => MicroKernel::Portable,
            Kernel::Cooperative => MicroKernel::Cooperative,
            Kernel::Fragments => MicroKernel::Fragments,
        }
    }

    /// The precision of products of f32 that the arguments ask for.
    pub fn precision(&self) -> Precision {
        match self.precision {
            PrecisionArg::Full => Precision::Full,
            PrecisionArg::Split => Precision::Split,
        }
    }

    /// Whether the arguments ask for kernels that not every problem and device has. The name of the argument if they do.
    pub fn special(&self) -> Option<&'static str> {
        match (self.kernel, self.precision) {
            (_, PrecisionArg::Split) => Some("--precision split"),
            (Kernel::Auto, PrecisionArg::Full) => None,
            _ => Some("--kernel"),
        }
    }

    /// Opens the operator on the chosen device.
    pub fn open(&self) -> sink_attention::Result<Attention> {
        // A tuning of the arguments replaces the environment's, which may be of another device.
        self.open_choice(&self.choice())
    }

    /// Like [`open`](Self::open), for work that only a GPU does. A software adapter is enough.
    pub fn open_gpu(&self) -> sink_attention::Result<Attention> {
        self.open_choice(&needing_gpu(self.choice()))
    }

    /// Like [`open_gpu`](Self::open_gpu), with the built-in table.
    pub fn open_gpu_untuned(&self) -> sink_attention::Result<Attention> {
        let choice = needing_gpu(self.choice());
        Ok(Attention::open_untuned(&choice)?.with_micro_kernel(self.micro_kernel()))
    }

    fn open_choice(&self, choice: &DeviceChoice) -> sink_attention::Result<Attention> {
        let attention = match &self.tuning {
            Some(path) => Attention::open_untuned(choice)?.with_tuning(Tuning::load(path)?)?,
            None => Attention::open(choice)?,
        };
        Ok(attention.with_micro_kernel(self.micro_kernel()).with_precision(self.precision()))
    }

    /// Whether the arguments name measured tiles.
    pub fn has_tuning(&self) -> bool {
        self.tuning.is_some()
    }

    /// The measured tiles that the arguments name, or else the environment.
    pub fn tuning(&self) -> sink_attention::Result<Option<Tuning>> {
        self.tuning.as_ref().map_or_else(Tuning::from_env, |path| Tuning::load(path).map(Some))
    }

    /// The device that the arguments choose, or else the environment.
    pub fn choice(&self) -> DeviceChoice {
        match (self.backend, &self.adapter) {
            (Backend::Cpu, _) => DeviceChoice::Cpu,
            (Backend::Gpu | Backend::Auto, Some(name)) => DeviceChoice::Adapter(name.clone()),
            (Backend::Gpu, None) => match DeviceChoice::from_env() {
                adapter @ DeviceChoice::Adapter(_) => adapter,
                _ => DeviceChoice::Gpu,
            },
            // The CPU path has neither micro-kernels nor tunings.
            (Backend::Auto, None) if self.kernel != Kernel::Auto || self.tuning.is_some() => {
                needing_gpu(DeviceChoice::from_env())
            }
            (Backend::Auto, None) => DeviceChoice::from_env(),
        }
    }
}

/// For work that only a GPU does, a software adapter replaces the CPU path.
fn needing_gpu(choice: DeviceChoice) -> DeviceChoice {
    if choice == DeviceChoice::Auto { DeviceChoice::Gpu } else { choice }
}

/// Prints to stdout. println! is not used, because it panics if the reader has left.
pub fn print(text: impl fmt::Display) -> Result<(), Box<dyn Error>> {
    Ok(writeln!(std::io::stdout(), "{text}").map_err(|error| format!("cannot write to stdout: {error}"))?)
}

/// Prints a summary for people, or as a JSON object.
pub fn print_summary<T: fmt::Display + Serialize>(summary: &T, json: bool) -> Result<(), Box<dyn Error>> {
    if json { print(serde_json::to_string(summary)?) } else { print(summary) }
}

/// The progress of a long command, on stderr: a bar on a terminal, and elsewhere a line for each step, for logs.
pub struct Progress {
    bar: ProgressBar,
    terminal: bool,
}

impl Progress {
    /// The progress of `steps` steps.
    pub fn new(steps: usize) -> Result<Self, Box<dyn Error>> {
        let style = ProgressStyle::with_template("{pos} of {len} {wide_msg} {elapsed}")?;
        let bar = ProgressBar::new(steps as u64).with_style(style);
        Ok(Progress { bar, terminal: std::io::stderr().is_terminal() })
    }

    /// Shows the preparation of a step, on a terminal only.
    pub fn prepare(&self, message: impl Into<String>) {
        self.bar.set_message(message.into());
    }

    /// Begins the next step.
    pub fn begin(&self, message: impl Into<String>) {
        let message = message.into();
        if !self.terminal {
            // A reader that has left must not stop the work.
            let (step, steps) = (self.bar.position() + 1, self.bar.length().unwrap_or(0));
            let _ = writeln!(std::io::stderr(), "{step} of {steps} {message}");
        }
        self.bar.set_message(message);
    }

    /// Ends the step.
    pub fn end(&self) {
        self.bar.inc(1);
    }

    /// Steps that are not done.
    pub fn left(&self) -> u64 {
        self.bar.length().unwrap_or(0).saturating_sub(self.bar.position())
    }

    /// Removes the bar from the terminal.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

/// Replaces a file, with its name in the error.
pub fn write_file(path: &Path, text: &str) -> Result<(), String> {
    file::replace(path, text.as_bytes()).map_err(|error| cannot_write(path, &error))
}

/// Checks whether [`write_file`] can write the file, before there is anything to lose.
pub fn check_writable(path: &Path) -> Result<(), String> {
    file::check_writable(path).map_err(|error| cannot_write(path, &error))
}

fn cannot_write(path: &Path, error: &std::io::Error) -> String {
    format!("cannot write {}: {error}", path.display())
}

/// A number of bytes, in the unit that suits it.
pub fn bytes(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let unit = (bytes.max(1).ilog2() / 10) as usize;
    let value = bytes as f64 / (1u64 << (10 * unit)) as f64;
    // There are up to four digits, and no more than needed.
    let decimals = if value.fract() == 0.0 || value >= 100.0 { 0 } else { 1 };
    format!("{value:.decimals$} {}", units[unit])
}

/// The capabilities of an adapter with what a device of it says of the elements of fragments, and whether its matrices multiply bf16.
pub fn with_elements(
    mut capabilities: Capabilities,
    elements: Option<ElementLayout>,
    bf16: Option<Rounding>,
) -> Capabilities {
    capabilities.cooperative = capabilities.cooperative.map(|matrices| matrices.elements(elements).bf16(bf16));
    capabilities
}

#[cfg(test)]
mod tests {
    use super::bytes;

    #[test]
    fn bytes_in_their_unit() {
        for (n, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (48 << 10, "48 KiB"),
            ((2 << 30) - 4, "2.0 GiB"),
            (u64::MAX, "16 EiB"),
        ] {
            assert_eq!(bytes(n), text);
        }
    }
}
