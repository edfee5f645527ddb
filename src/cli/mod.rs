//! The subcommands, and the arguments they share.

pub mod run;

use clap::error::ErrorKind;
use clap::{Args, ValueEnum};
use sink_attention::{Attention, DeviceChoice};

/// Where to compute.
#[derive(Debug, Args)]
pub struct DeviceArgs {
    /// Where to compute
    #[arg(long, value_enum, default_value_t)]
    backend: Backend,

    /// GPU adapter: its index, or a part of its name [default: $SINK_ATTENTION_ADAPTER, else the best]
    #[arg(long, value_name = "NAME")]
    adapter: Option<String>,
}

#[derive(Debug, Clone, Copy, Default, ValueEnum)]
enum Backend {
    /// A GPU; an error where there is none
    Gpu,
    /// The CPU
    Cpu,
    /// A GPU, or the CPU where there is none
    #[default]
    Auto,
}

impl DeviceArgs {
    /// Refuses arguments that exclude each other; before any other work, as clap would.
    pub fn check(&self) -> Result<(), clap::Error> {
        match (self.backend, &self.adapter) {
            (Backend::Cpu, Some(_)) => {
                let message = "the argument '--adapter <NAME>' cannot be used with '--backend cpu'";
                Err(clap::Error::raw(ErrorKind::ArgumentConflict, message))
            }
            _ => Ok(()),
        }
    }

    /// Opens the operator on the chosen device.
    pub fn open(&self) -> sink_attention::Result<Attention> {
        match (self.backend, &self.adapter) {
            (Backend::Cpu, _) => Attention::open(&DeviceChoice::Cpu),
            (Backend::Gpu | Backend::Auto, Some(name)) => Attention::open(&DeviceChoice::Adapter(name.clone())),
            (Backend::Gpu, None) => match DeviceChoice::from_env() {
                adapter @ DeviceChoice::Adapter(_) => Attention::open(&adapter),
                _ => Attention::open(&DeviceChoice::Gpu),
            },
            (Backend::Auto, None) => Attention::new(),
        }
    }
}
