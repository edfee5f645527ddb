//! The choice between the portable micro-kernel and cooperative matrices.

use crate::device::capabilities::{Capabilities, DeviceClass};
use crate::kernel::MicroKernel;

/// The micro-kernel to plan with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Choice {
    Portable,
    /// Cooperative matrices. It is an error if they cannot serve.
    Cooperative,
    /// Cooperative matrices, or the portable micro-kernel if they cannot serve.
    CooperativeWherePossible,
}

/// Chooses by the caller's request. With [`MicroKernel::Auto`] it takes the micro-kernel of the tiles that the caller or a tuning gives.
/// Without tiles it goes by measurements: `gains` says whether cooperative matrices were faster on a device that has them.
pub(crate) fn micro_kernel(
    asked: MicroKernel,
    given: Option<MicroKernel>,
    gains: bool,
    capabilities: &Capabilities,
) -> Choice {
    match (asked, given) {
        (MicroKernel::Cooperative, _) | (MicroKernel::Auto, Some(MicroKernel::Cooperative)) => Choice::Cooperative,
        // Other devices use the portable kernel until the kernels have been checked and measured there. `tune` does that.
        (MicroKernel::Auto, None) if gains && capabilities.class == DeviceClass::Nvidia => {
            Choice::CooperativeWherePossible
        }
        _ => Choice::Portable,
    }
}
