//! Tile shapes of any micro-kernel, by one name.

use std::cmp::Reverse;
use std::fmt;
use std::str::FromStr;

use crate::capabilities::{Capabilities, CooperativeMatrices};
use crate::fragments;
use crate::plan::Pass;
use crate::problem::Problem;
use crate::shader::{Kernel, MicroKernel};
use crate::tiles::Tiles;

/// How a kernel divides the score matrix: the micro-kernel with its tile shape.
///
/// As text ([`FromStr`] and [`Display`](fmt::Display)) it is `portable 64x32 (16x8 threads of 4x4), chunk 32, slab 16`, or
/// `cooperative 4x3x1x2` for subgroups, row fragments, column fragments and stages.
///
/// ```
/// use sink_attention::Tiling;
/// let tiling: Tiling = "cooperative 4x3x1x2".parse()?;
/// assert_eq!(tiling, Tiling::Cooperative { subgroups: 4, rows: 3, columns: 1, stages: 2 });
/// assert_eq!(tiling.to_string(), "cooperative 4x3x1x2");
/// # Ok::<(), String>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Tiling {
    /// Multiply-adds on register tiles.
    Portable(Tiles),
    /// Cooperative matrices. Their side and the lanes of a subgroup are the device's.
    Cooperative {
        /// Subgroups of a workgroup.
        subgroups: u32,
        /// Rows of fragments of a subgroup.
        rows: u32,
        /// Columns of fragments of a tile.
        columns: u32,
        /// Tiles of columns in workgroup memory: 2, so that one is in use while the next is written, or 1.
        stages: u32,
    },
}

impl Tiling {
    /// The micro-kernel it is for; never [`MicroKernel::Auto`].
    pub fn micro_kernel(&self) -> MicroKernel {
        match self {
            Tiling::Portable(_) => MicroKernel::Portable,
            Tiling::Cooperative { .. } => MicroKernel::Cooperative,
        }
    }

    /// Tiles worth measuring for a kernel of a problem on a device, of one micro-kernel, or, with [`MicroKernel::Auto`], of
    /// all. Those of a micro-kernel follow each other: the built-in table, its first choice first, then what it lacks, the
    /// most promising first. All fit the device's limits; of what the device, the problem or the kernel rules out there
    /// are none.
    pub fn candidates(
        kernel: Kernel,
        problem: &Problem,
        vec4: bool,
        capabilities: &Capabilities,
        micro_kernel: MicroKernel,
    ) -> Vec<Tiling> {
        let mut found = Vec::new();
        if micro_kernel != MicroKernel::Portable {
            found.extend(cooperative(kernel, problem, vec4, capabilities));
        }
        if micro_kernel != MicroKernel::Cooperative {
            let portable = Tiles::candidates(kernel, problem, vec4, capabilities);
            found.extend(portable.into_iter().map(Tiling::Portable));
        }
        found
    }
}

/// Registers a thread, by the estimate, above which cooperative tiles are not worth a measurement: the most that GPUs have
/// is 255, and a few that do not fit cost little.
const MOST_REGISTERS: u32 = 300;
/// Subgroups and rows of fragments that are tried; of columns as many as the table has, and twice that.
const SUBGROUPS: u32 = 16;
const ROWS: u32 = 4;

fn cooperative(kernel: Kernel, problem: &Problem, vec4: bool, capabilities: &Capabilities) -> Vec<Tiling> {
    let Some(matrices) = capabilities.cooperative.filter(CooperativeMatrices::is_sound) else { return Vec::new() };
    let pass = |tiling: &Tiling| Pass::with_tiles(kernel, problem, vec4, capabilities, *tiling).ok();
    let table =
        fragments::candidates(kernel, problem, matrices, capabilities.class).map(|fragments| fragments.tiling());
    let mut found: Vec<Tiling> = table.filter(|tiling| pass(tiling).is_some()).collect();
    let mut others = Vec::new();
    for columns in [16 / matrices.side, 32 / matrices.side] {
        for [subgroups, rows, stages] in (1..=SUBGROUPS)
            .flat_map(|subgroups| (1..=ROWS).flat_map(move |rows| [2, 1].map(|stages| [subgroups, rows, stages])))
        {
            let tiling = Tiling::Cooperative { subgroups, rows, columns, stages };
            let Some(pass) = pass(&tiling).filter(|_| !found.contains(&tiling)) else { continue };
            let (Some([tile_rows, _]), Some(registers)) = (pass.variant.tile(), pass.variant.registers()) else {
                continue;
            };
            if registers <= MOST_REGISTERS {
                // What passes by is read once for all rows that a workgroup holds; more workgroups hide each other's waits.
                let rows_in_flight = tile_rows * pass.resident_workgroups(capabilities).unwrap_or(1);
                others.push((Reverse(rows_in_flight), registers, tiling));
            }
        }
    }
    others.sort_by_key(|&(rows, registers, _)| (rows, registers));
    found.extend(others.into_iter().map(|(.., tiling)| tiling));
    found
}

impl From<Tiles> for Tiling {
    fn from(tiles: Tiles) -> Self {
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

/// From what [`Display`](fmt::Display) writes.
impl FromStr for Tiling {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let text = text.trim();
        let (name, shape) = text.split_once(' ').unwrap_or((text, ""));
        match name {
            "portable" => shape.trim_start().parse().map(Tiling::Portable),
            "cooperative" => {
                let numbers: Option<Vec<u32>> = shape.split('x').map(|word| word.trim().parse().ok()).collect();
                // Far above anything useful; what fits a device, its plan decides.
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
    use crate::element::DType;
    use crate::problem::{Options, Shape};

    #[test]
    fn candidates_fit_and_differ() {
        let problem = |dtype, width| {
            let shape =
                Shape { batch: 1, heads: 8, kv_heads: 2, seq_q: 1024, seq_k: 1024, head_dim: width, value_dim: width };
            Problem::new(shape, Options::new().causal(true).dtype(dtype)).unwrap()
        };
        let of = |problem: &Problem, device: &Capabilities, micro_kernel| {
            Tiling::candidates(Kernel::Forward, problem, true, device, micro_kernel)
        };
        for device in Capabilities::samples() {
            for problem in [problem(DType::F16, 64), problem(DType::F16, 128), problem(DType::F32, 64)] {
                let both = of(&problem, &device, MicroKernel::Auto);
                let [cooperative, portable] =
                    [MicroKernel::Cooperative, MicroKernel::Portable].map(|kernel| of(&problem, &device, kernel));
                assert_eq!(both, [&cooperative[..], &portable[..]].concat());
                let halves = problem.options().dtype != DType::F32;
                assert_eq!(cooperative.len() > 8, halves && device.cooperative.is_some(), "{}: {problem}", device.name);
                let plan = crate::Plan::forward(&problem, true, &device).unwrap();
                let variant = plan.passes[0].variant;
                let first = both.iter().find(|tiling| tiling.micro_kernel() == variant.micro_kernel);
                assert_eq!(variant.tiling.as_ref(), first, "the built-in choice comes first");
                for (index, tiling) in cooperative.iter().enumerate() {
                    assert_eq!(tiling.micro_kernel(), MicroKernel::Cooperative);
                    Pass::with_tiles(Kernel::Forward, &problem, true, &device, *tiling).unwrap();
                    assert!(!cooperative[..index].contains(tiling));
                }
            }
        }
        // Of what the table lacks, those come first that keep the most rows in flight.
        let (device, narrow) = (&Capabilities::samples()[0], problem(DType::F16, 64));
        let table = fragments::candidates(Kernel::Forward, &narrow, device.cooperative.unwrap(), device.class);
        let table: Vec<Tiling> = table.map(|fragments| fragments.tiling()).collect();
        let others = of(&narrow, device, MicroKernel::Cooperative).into_iter().filter(|t| !table.contains(t));
        let rows: Vec<u32> = others
            .map(|tiling| {
                let pass = Pass::with_tiles(Kernel::Forward, &narrow, true, device, tiling).unwrap();
                pass.variant.tile().unwrap()[0] * pass.resident_workgroups(device).unwrap()
            })
            .collect();
        assert!(rows.is_sorted_by(|a, b| a >= b) && rows.first() > rows.last(), "{rows:?}");
        assert_eq!(of(&problem(DType::F16, 257), device, MicroKernel::Cooperative), []);
    }

    #[test]
    fn text_and_back() {
        let tiles = Tiles { threads_r: 16, threads_c: 8, rows: 4, quads: 1, chunk: 8, slab: 16 };
        for (tiling, text) in [
            (tiles.into(), "portable 64x32 (16x8 threads of 4x4), chunk 32, slab 16"),
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
