//! The choice between micro-kernels.

use crate::device::capabilities::{Capabilities, DeviceClass};
use crate::kernel::MicroKernel;
use crate::problem::element::DType;

/// The micro-kernels to plan with: the first that can serve. It is an error if the last of them cannot.
///
/// They are those of the caller's request. With [`MicroKernel::Auto`] it is the micro-kernel of the tiles that the caller or a tuning gives.
/// Without tiles it goes by measurements: `gains` says whether cooperative matrices were faster on a device that has them.
pub(crate) fn micro_kernels(
    asked: MicroKernel,
    given: Option<MicroKernel>,
    gains: bool,
    dtype: DType,
    capabilities: &Capabilities,
) -> &'static [MicroKernel] {
    match (asked, given) {
        (MicroKernel::Fragments, _) | (MicroKernel::Auto, Some(MicroKernel::Fragments)) => &[MicroKernel::Fragments],
        (MicroKernel::Cooperative, _) | (MicroKernel::Auto, Some(MicroKernel::Cooperative)) => {
            &[MicroKernel::Cooperative]
        }
        // Other devices use the portable kernel until the kernels have been checked and measured there. `tune` does that.
        (MicroKernel::Auto, None) if gains && capabilities.class == DeviceClass::Nvidia => match dtype {
            DType::F16 => &MicroKernel::ALL,
            // In bf16 elements in registers have not been measured.
            _ => &[MicroKernel::Cooperative, MicroKernel::Portable],
        },
        _ => &[MicroKernel::Portable],
    }
}
