//! Tile shapes of all micro-kernels in one type.

pub(crate) mod cooperative;
pub(crate) mod decode;
pub mod portable;

use std::fmt;
use std::str::FromStr;

use crate::kernel::micro_kernel::MicroKernel;
use crate::kernel::tile::portable::PortableTile;

/// How a kernel divides the score matrix: the micro-kernel with its tile shape.
///
/// As text ([`FromStr`] and [`Display`](fmt::Display)) it is `portable 64x32 (16x8 threads of 4x4), k_step 32, n_step 16`, or
/// `cooperative 4x3x1x2` for subgroups, row fragments, column fragments and stages.
///
/// ```
/// use sink_attention::plan::Tiling;
/// let tiling: Tiling = "cooperative 4x3x1x2".parse()?;
/// assert_eq!(tiling, Tiling::Cooperative { subgroups: 4, rows: 3, columns: 1, stages: 2 });
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
    },
}

impl Tiling {
    /// The micro-kernel of the tiles, never [`MicroKernel::Auto`].
    pub fn micro_kernel(&self) -> MicroKernel {
        match self {
            Tiling::Portable(_) => MicroKernel::Portable,
            Tiling::Cooperative { .. } => MicroKernel::Cooperative,
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
            Tiling::Cooperative { subgroups, rows, columns, stages } => {
                write!(f, "{subgroups}x{rows}x{columns}x{stages}")
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
            "cooperative" => {
                let numbers: Option<Vec<u32>> = shape.split('x').map(|word| word.trim().parse().ok()).collect();
                // The limit is far above anything useful. The plan decides which tiles fit a device.
                match numbers.as_deref() {
                    Some(&[subgroups, rows, columns, stages])
                        if [subgroups, rows, columns, stages].iter().all(|n| (1..=32).contains(n)) =>
                    {
                        Ok(Tiling::Cooperative { subgroups, rows, columns, stages })
                    }
                    _ => Err(format!(
                        "tiles {text:?}: want subgroups x row fragments x column fragments x stages, each 1 to 32, like \
                         \"cooperative 4x3x1\""
                    )),
                }
            }
            _ => Err(format!("tiles {text:?}: unknown micro-kernel {name:?}; known: portable, cooperative")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_back() {
        let tiles = PortableTile { threads_r: 16, threads_c: 8, rows: 4, quads: 1, k_step: 8, n_step: 16 };
        for (tiling, text) in [
            (tiles.into(), "portable 64x32 (16x8 threads of 4x4), k_step 32, n_step 16"),
            (Tiling::Cooperative { subgroups: 16, rows: 1, columns: 2, stages: 1 }, "cooperative 16x1x2x1"),
        ] {
            assert_eq!((tiling.to_string().as_str(), text.parse()), (text, Ok(tiling)));
        }
    }

    #[test]
    fn what_is_malformed_is_told() {
        for (text, message) in [
            ("", "unknown micro-kernel \"\"; known: portable, cooperative"),
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
        ] {
            let error = text.parse::<Tiling>().unwrap_err();
            assert!(error.contains(message), "no {message:?} in {error}");
        }
    }
}
