//! Tile shapes of all micro-kernels in one type.

pub(crate) mod cooperative;
pub(crate) mod decode;
pub mod portable;

use std::fmt;
use std::str::FromStr;

use crate::kernel::loops::LoopHints;
use crate::kernel::micro_kernel::MicroKernel;
use crate::kernel::tile::portable::PortableTile;

/// How a kernel divides the score matrix: the micro-kernel with its tile shape.
///
/// As text ([`FromStr`] and [`Display`](fmt::Display)) it is `portable 64x32 (16x8 threads of 4x4), k_step 32, n_step 16`, or
/// `cooperative 4x3x1x2` for subgroups, row fragments, column fragments and stages, or `fragments 4x2x4x2` for subgroups, row fragments, column
/// fragments and those of a chunk. All may end with hints for loops ([`LoopHints`]), as in
/// `cooperative 4x3x1x2, loops keep`.
///
/// ```
/// use sink_attention::plan::{LoopHints, Tiling};
/// let tiling: Tiling = "cooperative 4x3x1x2".parse()?;
/// assert_eq!(tiling, Tiling::Cooperative { subgroups: 4, rows: 3, columns: 1, stages: 2, loops: LoopHints::NONE });
/// assert_eq!(tiling.to_string(), "cooperative 4x3x1x2");
/// # Ok::<(), String>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Tiling {
    /// Multiply-adds on register tiles.
    Portable(PortableTile),
    /// Cooperative matrices. Their side and the lanes of a subgroup are the device's.
    Cooperative {
        /// Subgroups of a workgroup.
        subgroups: u32,
        /// Rows of fragments of a subgroup.
        rows: u32,
        /// Columns of fragments of a tile.
        columns: u32,
        /// Tiles of columns in workgroup memory: 2, so that one is read while the next is written, or 1.
        stages: u32,
        /// Hints for the kernel's loops, for the driver.
        loops: LoopHints,
    },
    /// Cooperative matrices whose elements stay in registers.
    Fragments {
        /// Subgroups of a workgroup.
        subgroups: u32,
        /// Rows of fragments of a subgroup.
        rows: u32,
        /// Columns of fragments of a tile.
        columns: u32,
        /// Columns of fragments whose scores are in registers at a time.
        chunk: u32,
        /// Hints for the kernel's loops, for the driver.
        loops: LoopHints,
    },
}

impl Tiling {
    /// The micro-kernel of the tiles, never [`MicroKernel::Auto`].
    pub fn micro_kernel(&self) -> MicroKernel {
        match self {
            Tiling::Portable(_) => MicroKernel::Portable,
            Tiling::Cooperative { .. } => MicroKernel::Cooperative,
            Tiling::Fragments { .. } => MicroKernel::Fragments,
        }
    }

    /// Hints for the kernel's loops, for the driver.
    pub fn loops(&self) -> LoopHints {
        match self {
            Tiling::Portable(tiles) => tiles.loops,
            Tiling::Cooperative { loops, .. } | Tiling::Fragments { loops, .. } => *loops,
        }
    }

    /// The same tiles with other hints.
    pub fn with_loops(self, loops: LoopHints) -> Self {
        match self {
            Tiling::Portable(tiles) => Tiling::Portable(PortableTile { loops, ..tiles }),
            Tiling::Cooperative { subgroups, rows, columns, stages, .. } => {
                Tiling::Cooperative { subgroups, rows, columns, stages, loops }
            }
            Tiling::Fragments { subgroups, rows, columns, chunk, .. } => {
                Tiling::Fragments { subgroups, rows, columns, chunk, loops }
            }
        }
    }
}

impl From<PortableTile> for Tiling {
    fn from(tiles: PortableTile) -> Self {
        Tiling::Portable(tiles)
    }
}

impl fmt::Display for Tiling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ", self.micro_kernel())?;
        match self {
            Tiling::Portable(tiles) => write!(f, "{tiles}"),
            Tiling::Cooperative { subgroups, rows, columns, stages, loops } => {
                write!(f, "{subgroups}x{rows}x{columns}x{stages}")?;
                loops.write_after(f)
            }
            Tiling::Fragments { subgroups, rows, columns, chunk, loops } => {
                write!(f, "{subgroups}x{rows}x{columns}x{chunk}")?;
                loops.write_after(f)
            }
        }
    }
}

/// Parses the text that [`Display`](fmt::Display) writes.
impl FromStr for Tiling {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let text = text.trim();
        let (name, shape) = text.split_once(' ').unwrap_or((text, ""));
        match name {
            "portable" => shape.trim_start().parse().map(Tiling::Portable),
            "cooperative" | "fragments" => {
                let (shape, loops) = LoopHints::split_from(shape).map_err(|reason| format!("tiles {reason}"))?;
                let numbers: Option<Vec<u32>> = shape.split('x').map(|word| word.trim().parse().ok()).collect();
                // The limit is far above anything useful. The plan decides which tiles fit a device.
                match numbers.as_deref() {
                    Some(&[subgroups, rows, columns, last])
                        if [subgroups, rows, columns, last].iter().all(|n| (1..=32).contains(n)) =>
                    {
                        Ok(match name {
                            "cooperative" => Tiling::Cooperative { subgroups, rows, columns, stages: last, loops },
                            _ => Tiling::Fragments { subgroups, rows, columns, chunk: last, loops },
                        })
                    }
                    _ => Err(format!(
                        "tiles {text:?}: want subgroups x row fragments x column fragments x {}, each 1 to 32, like \
                         \"{name} 4x2x1x1\"",
                        if name == "cooperative" { "stages" } else { "columns of a chunk" }
                    )),
                }
            }
            _ => Err(format!("tiles {text:?}: unknown micro-kernel {name:?}; known: portable, cooperative, fragments")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::loops::{LoopHint, LoopName};

    #[test]
    fn text_and_back() {
        let tiles = PortableTile {
            threads_r: 16,
            threads_c: 8,
            rows: 4,
            quads: 1,
            k_step: 8,
            n_step: 16,
            loops: LoopHints::NONE,
        };
        for (tiling, text) in [
            (tiles.into(), "portable 64x32 (16x8 threads of 4x4), k_step 32, n_step 16"),
            (
                Tiling::Cooperative { subgroups: 16, rows: 1, columns: 2, stages: 1, loops: LoopHints::NONE },
                "cooperative 16x1x2x1",
            ),
            (
                Tiling::from(tiles).with_loops(LoopHints::every(LoopHint::Keep)),
                "portable 64x32 (16x8 threads of 4x4), k_step 32, n_step 16, loops keep",
            ),
            (
                Tiling::Cooperative { subgroups: 4, rows: 2, columns: 1, stages: 1, loops: LoopHints::NONE }
                    .with_loops(LoopHints::every(LoopHint::Keep).with(LoopName::Tiles, LoopHint::Unroll)),
                "cooperative 4x2x1x1, loops keep tiles unroll",
            ),
        ] {
            assert_eq!((tiling.to_string().as_str(), text.parse()), (text, Ok(tiling)));
        }
    }

    #[test]
    fn what_is_malformed_is_told() {
        for (text, message) in [
            ("", "unknown micro-kernel \"\"; known: portable, cooperative, fragments"),
            ("magic 1x1x1", "unknown micro-kernel \"magic\""),
            ("portable", "tiles \"\""),
            ("portable 4x3x1", "want a form like"),
            ("cooperative", "want subgroups x row fragments x column fragments"),
            ("cooperative 4x3x1", "each 1 to 32"),
            ("cooperative 4x3x1x1x1", "each 1 to 32"),
            ("cooperative 0x3x1x1", "each 1 to 32"),
            ("cooperative 4x33x1x1", "each 1 to 32"),
            ("cooperative 4x-3x1x1", "each 1 to 32"),
            ("cooperative 4x3x1x99999999999", "each 1 to 32"),
            ("cooperative 4x3x1x1, loops", "found the end"),
            ("cooperative 4x3x1x1, loops tile keep", "found \"tile\""),
            ("cooperative 4x3x1x1 loops keep", "each 1 to 32"),
            ("portable 64x32 (16x8 threads of 4x4), k_step 32, n_step 16, loops hold", "found \"hold\""),
            ("portable 64x64 (16x8 threads of 4x4), k_step 32, n_step 16, loops keep", "these numbers give"),
        ] {
            let error = text.parse::<Tiling>().unwrap_err();
            assert!(error.contains(message), "no {message:?} in {error}");
        }
    }
}
