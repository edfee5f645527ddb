//! The choice between micro-kernels.

use crate::device::capabilities::{Capabilities, DeviceClass};
use crate::kernel::{MicroKernel, Precision};
use crate::problem::Problem;
use crate::problem::element::DType;
use crate::problem::error::{Error, Result};

/// Whether cooperative matrices were faster on a device that has them, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Gain {
    /// They were not, or nobody knows.
    None,
    /// With scores in workgroup memory.
    Matrices,
    /// With scores in registers, where elements can be computed with.
    Elements,
}

impl Gain {
    /// That of the kernels of a problem. Elements in registers have been measured in f16, and in bf16 where the device multiplies it as itself,
    /// for widths of 64 and 128 (benches/results/2026-11-30-h200-fragments.md, with options 2026-11-30-h200-options.md). A kernel whose
    /// registers spill takes several times as long, so that a guess will not do.
    pub(crate) fn of(problem: &Problem, capabilities: &Capabilities) -> Self {
        let (shape, options) = (problem.shape(), problem.options());
        let width = shape.head_dim.max(shape.value_dim);
        // Nothing is measured on AMD's GPUs. By ACO's statistics the backward pass of wider heads spills on RDNA3
        // (benches/results/2026-11-30-aco-strips.md). Elements are left out: RDNA has them in places of which no operand can be made.
        if capabilities.class == DeviceClass::Amd {
            return if width <= 128 { Gain::Matrices } else { Gain::None };
        }
        let has_type = match options.dtype {
            DType::F16 => true,
            DType::Bf16 => capabilities.cooperative.is_some_and(|matrices| matrices.bf16.is_some()),
            DType::F32 => false,
        };
        let is_measured = has_type && width <= 128;
        if is_measured { Gain::Elements } else { Gain::Matrices }
    }
}

/// Refuses operands and micro-kernels that have no products of split numbers.
pub(crate) fn check_precision(problem: &Problem, precision: Precision, micro_kernel: MicroKernel) -> Result<()> {
    let none = |reason: String| Err(Error::NoKernel { problem: problem.to_string(), reason });
    let dtype = problem.options().dtype;
    match precision {
        Precision::Full => Ok(()),
        Precision::Split if !dtype.is_split_on_matrices() => {
            none(format!("the precision split divides numbers of f32 into halves; the operands are {dtype}"))
        }
        Precision::Split if ![MicroKernel::Auto, MicroKernel::Fragments].contains(&micro_kernel) => {
            none(format!("the precision split has the micro-kernel fragments alone; {micro_kernel} was asked for"))
        }
        Precision::Split => Ok(()),
    }
}

/// The micro-kernels to plan with: the first that can serve. It is an error if the last of them cannot.
///
/// They are those of the caller's request. With [`MicroKernel::Auto`] it is the micro-kernel of the tiles that the caller or a tuning gives.
/// Without tiles it goes by measurements. Split numbers have one micro-kernel, whatever tiles there are.
pub(crate) fn micro_kernels(
    asked: MicroKernel,
    precision: Precision,
    given: Option<MicroKernel>,
    gain: Gain,
    capabilities: &Capabilities,
) -> &'static [MicroKernel] {
    if precision == Precision::Split {
        return &[MicroKernel::Fragments];
    }
    match (asked, given) {
        (MicroKernel::Fragments, _) | (MicroKernel::Auto, Some(MicroKernel::Fragments)) => &[MicroKernel::Fragments],
        (MicroKernel::Cooperative, _) | (MicroKernel::Auto, Some(MicroKernel::Cooperative)) => {
            &[MicroKernel::Cooperative]
        }
        // Other devices use the portable kernel until the kernels have been checked and measured there. `tune` does that.
        (MicroKernel::Auto, None) if matches!(capabilities.class, DeviceClass::Nvidia | DeviceClass::Amd) => match gain
        {
            Gain::Elements => &MicroKernel::ALL,
            Gain::Matrices => &[MicroKernel::Cooperative, MicroKernel::Portable],
            Gain::None => &[MicroKernel::Portable],
        },
        _ => &[MicroKernel::Portable],
    }
}
