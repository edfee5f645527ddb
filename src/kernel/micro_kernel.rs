//! Micro-kernels: ways to form matrix products.

use std::fmt;

use minijinja::{Value, context};

/// How a kernel forms matrix products.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum MicroKernel {
    /// The micro-kernel that a [`Tuning`](crate::tuning::Tuning) has found faster. Without a tuning, cooperative matrices where they have
    /// been measured (NVIDIA through Vulkan, f16 and bf16), and on AMD's GPUs by what its driver's compiler makes of them (widths to 128), and the
    /// portable micro-kernel elsewhere.
    #[default]
    Auto,
    /// Multiply-adds in f32, on every device.
    Portable,
    /// Cooperative matrices (tensor cores), with scores in workgroup memory, where rows are computed with.
    Cooperative,
    /// Cooperative matrices (tensor cores) whose elements are computed with where they are, in the registers of fragments. It needs a device
    /// that takes SPIR-V and has an [`ElementLayout`](crate::plan::ElementLayout).
    Fragments,
}

impl MicroKernel {
    /// All that a plan can have, the ones that are tried first in front.
    pub const ALL: [MicroKernel; 3] = [MicroKernel::Fragments, MicroKernel::Cooperative, MicroKernel::Portable];
}

impl fmt::Display for MicroKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            MicroKernel::Auto => "auto",
            MicroKernel::Portable => "portable",
            MicroKernel::Cooperative => "cooperative",
            MicroKernel::Fragments => "fragments",
        })
    }
}

/// Properties by which the planner, the host and the shared shaders distinguish micro-kernels. A template reads each by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Properties {
    /// The folder of the micro-kernel's shaders.
    pub(crate) templates: &'static str,
    /// Computes with the elements of fragments in registers, by instructions that SPIR-V has and WGSL has not.
    pub(crate) needs_elements: bool,
    /// Computes full tiles in a loop of their own, which has nothing to hide.
    pub(crate) peels_full_tiles: bool,
    /// Multiplies cooperative matrices. The device must have them, WGSL must enable them, and operations take as long as theirs.
    pub(crate) needs_matrices: bool,
    /// Multiplies f16. Operands are read as f16, or rounded to f16 with their token scales. P and dS are rounded to f16, and dS has a unit
    /// for each row. Results in f16 are rounded in the same way as products.
    pub(crate) multiplies_halves: bool,
    /// Divides a workgroup into subgroups, and its `main` takes the numbers of subgroup and lane.
    pub(crate) has_subgroups: bool,
    /// Fetches a tile of columns while it computes with the one before. It also fetches one after the last, and one if there is none.
    pub(crate) prefetches_tiles: bool,
    /// Reports rows that it cannot compute: rows whose numbers are not finite or leave the range of f16, and rows of the lowest biases. A
    /// second run and the portable kernel compute these.
    pub(crate) reports_rows: bool,
    /// Forms scores in powers of two on the way to the exponential, with softcap and bias. A bias of -infinity then needs no mask.
    pub(crate) scores_in_powers_of_two: bool,
    /// Reads a boolean mask by spans of tiles of one class, and hides the pairs of a tile itself.
    pub(crate) masks_by_spans: bool,
    /// Rescales only after the maximum of a row has grown by much. It is fastest if the largest scores come first.
    pub(crate) rescales_rarely: bool,
    /// An array of `vec4<f32>` in workgroup memory that is free before the first tile.
    pub(crate) flags: &'static str,
}

impl MicroKernel {
    /// Whether the micro-kernel multiplies f16, so that a kernel rounds probabilities, and the gradients by scores, to f16.
    pub fn multiplies_halves(self) -> bool {
        self.properties().multiplies_halves
    }

    /// The table of properties. No kernel is planned with [`MicroKernel::Auto`].
    pub(crate) const fn properties(self) -> Properties {
        match self {
            MicroKernel::Auto | MicroKernel::Portable => Properties {
                templates: "portable",
                needs_elements: false,
                peels_full_tiles: false,
                needs_matrices: false,
                multiplies_halves: false,
                has_subgroups: false,
                prefetches_tiles: false,
                reports_rows: false,
                scores_in_powers_of_two: false,
                masks_by_spans: false,
                rescales_rarely: false,
                flags: "memory",
            },
            MicroKernel::Fragments => {
                Properties { needs_elements: true, peels_full_tiles: true, ..MicroKernel::Cooperative.properties() }
            }
            MicroKernel::Cooperative => Properties {
                templates: "cooperative",
                needs_elements: false,
                peels_full_tiles: false,
                needs_matrices: true,
                multiplies_halves: true,
                has_subgroups: true,
                prefetches_tiles: true,
                reports_rows: true,
                scores_in_powers_of_two: true,
                masks_by_spans: true,
                rescales_rarely: true,
                flags: "score_rows",
            },
        }
    }
}

impl Properties {
    /// The properties that templates read.
    pub(crate) fn context(self) -> Value {
        let Properties {
            templates,
            needs_elements: _,
            peels_full_tiles: _,
            needs_matrices,
            multiplies_halves,
            has_subgroups,
            prefetches_tiles,
            reports_rows,
            scores_in_powers_of_two,
            masks_by_spans,
            rescales_rarely: _,
            flags,
        } = self;
        context! {
            templates, needs_matrices, multiplies_halves, has_subgroups, prefetches_tiles, reports_rows, scores_in_powers_of_two, masks_by_spans, flags,
        }
    }
}
