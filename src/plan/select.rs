//! The choice between the portable micro-kernel and cooperative matrices.

use crate::device::capabilities::{Capabilities, DeviceClass};
use crate::kernel::MicroKernel;

/// The micro-kernel to plan with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Choice {
    Portable,
    /// An error where it cannot serve.
    Cooperative,
    /// The portable one where it cannot serve.
    CooperativeWherePossible,
}

/// Chooses by what the caller asked for and, where that is [`MicroKernel::Auto`], by the micro-kernel of tiles that the caller or a
/// tuning gives, or else by what was measured: `gains` says whether cooperative matrices were faster on a device that has them.
pub(crate) fn micro_kernel(
    asked: MicroKernel,
    given: Option<MicroKernel>,
    gains: bool,
    capabilities: &Capabilities,
) -> Choice {
    match (asked, given) {
        (MicroKernel::Cooperative, _) | (MicroKernel::Auto, Some(MicroKernel::Cooperative)) => Choice::Cooperative,
        // Elsewhere not before the kernels have been checked and measured there: `tune` does.
        (MicroKernel::Auto, None) if gains && capabilities.class == DeviceClass::Nvidia => {
            Choice::CooperativeWherePossible
        }
        _ => Choice::Portable,
    }
}
