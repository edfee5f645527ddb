//! Candidates: tiles worth measuring.

use std::cmp::Reverse;

use crate::device::capabilities::{Capabilities, CooperativeMatrices};
use crate::kernel::loops::{LoopHint, LoopHints, LoopName};
use crate::kernel::tile::Tiling;
use crate::kernel::tile::portable::PortableTile;
use crate::kernel::{Kernel, MicroKernel};
use crate::plan::{Pass, table};
use crate::problem::Problem;

impl Tiling {
    /// Tiles worth measuring for a kernel of a problem on a device: those of one micro-kernel or, with [`MicroKernel::Auto`], of all. The
    /// tiles of a micro-kernel follow one another. The built-in table comes first, in its order, then other tiles, the most promising ones
    /// first. Behind the table stand its first tiles with hints for loops, if hints reach the driver. All fit the device's limits. There are
    /// none of a micro-kernel that the device, the problem or the kernel rules out.
    pub fn candidates(
        kernel: Kernel,
        problem: &Problem,
        capabilities: &Capabilities,
        micro_kernel: MicroKernel,
    ) -> Vec<Tiling> {
        let mut found = Vec::new();
        let wants = |one: MicroKernel| [one, MicroKernel::Auto].contains(&micro_kernel);
        if wants(MicroKernel::Fragments) {
            found.extend(fragments(kernel, problem, capabilities));
        }
        if wants(MicroKernel::Cooperative) {
            found.extend(cooperative(kernel, problem, capabilities));
        }
        if wants(MicroKernel::Portable) {
            let portable = PortableTile::candidates(kernel, problem, capabilities);
            found.extend(portable.into_iter().map(Tiling::Portable));
        }
        found
    }
}

/// A tile shape with each hint for every loop, and for the loops of each name; none where hints do not reach the driver.
fn with_hints(kernel: Kernel, first: Option<&Tiling>, capabilities: &Capabilities) -> Vec<Tiling> {
    let Some(first) = first.filter(|_| capabilities.spirv.is_some()) else { return Vec::new() };
    let every = LoopHint::ALL.map(LoopHints::every);
    let names = LoopName::of(kernel, first.micro_kernel()).into_iter();
    let named = names.flat_map(|name| LoopHint::ALL.map(|hint| LoopHints::NONE.with(name, hint)));
    every.into_iter().chain(named).map(|loops| first.with_loops(loops)).collect()
}

/// Registers a thread, by the estimate, above which cooperative tiles are not worth a measurement. GPUs have at most 255, and a few that do
/// not fit cost little.
const MOST_LANE_REGISTERS: u32 = 300;
/// Most subgroups and rows of fragments that are tried. Columns are as many as in the table, and twice as many.
const SUBGROUPS: u32 = 16;
const ROWS: u32 = 4;

fn cooperative(kernel: Kernel, problem: &Problem, capabilities: &Capabilities) -> Vec<Tiling> {
    let Some(matrices) = capabilities.cooperative.filter(CooperativeMatrices::is_sound) else { return Vec::new() };
    let pass = |tiling: &Tiling| Pass::with_tiles(kernel, problem, capabilities, *tiling).ok();
    let table = table::cooperative(kernel, problem, matrices, capabilities.class).map(|fragments| fragments.tiling());
    let mut found: Vec<Tiling> = table.filter(|tiling| pass(tiling).is_some()).collect();
    found.extend(with_hints(kernel, found.first(), capabilities));
    let mut others = Vec::new();
    for columns in [16 / matrices.side, 32 / matrices.side] {
        for [subgroups, rows, stages] in (1..=SUBGROUPS)
            .flat_map(|subgroups| (1..=ROWS).flat_map(move |rows| [2, 1].map(|stages| [subgroups, rows, stages])))
        {
            let tiling = Tiling::Cooperative { subgroups, rows, columns, stages, loops: LoopHints::NONE };
            let Some(pass) = pass(&tiling).filter(|_| !found.contains(&tiling)) else { continue };
            let (Some([tile_rows, _]), Some(registers)) = (pass.variant.tile(), pass.variant.registers()) else {
                continue;
            };
            if registers <= MOST_LANE_REGISTERS {
                // Columns are read once for all rows that a workgroup holds. More workgroups hide each other's waits.
                let rows_in_flight = tile_rows * pass.resident_workgroups(capabilities).unwrap_or(1);
                others.push((Reverse(rows_in_flight), registers, tiling));
            }
        }
    }
    others.sort_by_key(|&(rows, registers, _)| (rows, registers));
    found.extend(others.into_iter().map(|(.., tiling)| tiling));
    found
}

/// The built-in tiles with elements in registers, their hints for loops, and others.
fn fragments(kernel: Kernel, problem: &Problem, capabilities: &Capabilities) -> Vec<Tiling> {
    let Some(matrices) = capabilities.cooperative.filter(CooperativeMatrices::is_sound) else { return Vec::new() };
    let pass = |tiling: &Tiling| Pass::with_tiles(kernel, problem, capabilities, *tiling).ok();
    let table = table::fragments(kernel, problem, matrices, capabilities.class);
    let mut found: Vec<Tiling> = table.iter().map(|tile| tile.tiling()).filter(|t| pass(t).is_some()).collect();
    found.dedup();
    let Some(first) = found.first().copied() else { return found };
    let hinted = with_hints(kernel, Some(&first), capabilities).into_iter().chain([first.with_loops(LoopHints::NONE)]);
    found.extend(hinted.filter(|tiling| *tiling != first));
    let mut others = Vec::new();
    for columns in [1, 2, 4].map(|columns| columns * 16 / matrices.side) {
        for [subgroups, rows, chunk] in (1..=SUBGROUPS)
            .flat_map(|subgroups| (1..=ROWS).flat_map(move |rows| (1..=columns).map(move |n| [subgroups, rows, n])))
        {
            let tiling = Tiling::Fragments { subgroups, rows, columns, chunk, loops: first.loops() };
            let Some(pass) = pass(&tiling).filter(|_| !found.contains(&tiling)) else { continue };
            let (Some([tile_rows, _]), Some(registers)) = (pass.variant.tile(), pass.variant.registers()) else {
                continue;
            };
            if registers <= MOST_LANE_REGISTERS {
                let rows_in_flight = tile_rows * pass.resident_workgroups(capabilities).unwrap_or(1);
                others.push((Reverse(rows_in_flight), registers, tiling));
            }
        }
    }
    others.sort_by_key(|&(rows, registers, _)| (rows, registers));
    found.extend(others.into_iter().map(|(.., tiling)| tiling));
    found
}

/// Registers a thread, by [`PortableTile::registers`], above which tiles are not worth a measurement. GPUs have at most 256, and the
/// estimate leaves out addresses.
const MOST_REGISTERS: u32 = 232;

impl PortableTile {
    /// Tiles worth measuring for a kernel of a problem on a device. The built-in table comes first, in its order, then neighbours of its
    /// tiles, the nearest ones first. All fit the device's limits. A kernel without tiles has none.
    pub(crate) fn candidates(kernel: Kernel, problem: &Problem, capabilities: &Capabilities) -> Vec<PortableTile> {
        if kernel.tiled().is_none() {
            return Vec::new();
        }
        let shape = problem.shape();
        let fits = |tiles: &PortableTile| Pass::with_tiles(kernel, problem, capabilities, *tiles).is_ok();
        let mut found: Vec<PortableTile> = Vec::new();
        for tiles in table::portable(kernel, problem, capabilities.class) {
            if !found.contains(&tiles) && fits(&tiles) {
                found.push(tiles);
            }
        }
        let built_in = found.len();
        // Neighbours of the first choice are up to two steps away, and those of other tiles one step.
        let mut index = 0;
        while index < built_in || (index < found.len() && index < 3 * built_in) {
            for tiles in found[index].neighbours() {
                if !found.contains(&tiles)
                    && tiles.threads() >= 32
                    && fits(&tiles)
                    && tiles.registers(kernel, shape.head_dim as u32, shape.value_dim as u32) <= MOST_REGISTERS
                {
                    found.push(tiles);
                }
            }
            index += 1;
        }
        let first = found.first().copied().map(Tiling::Portable);
        let hinted = with_hints(kernel, first.as_ref(), capabilities);
        found.splice(
            built_in..built_in,
            hinted.into_iter().filter_map(|tiling| match tiling {
                Tiling::Portable(tiles) => Some(tiles),
                Tiling::Cooperative { .. } | Tiling::Fragments { .. } => None,
            }),
        );
        found
    }

    /// Tiles with one number doubled or halved. Some of them do not fit together.
    fn neighbours(self) -> impl Iterator<Item = PortableTile> {
        const NUMBERS: [fn(&mut PortableTile) -> &mut u32; 6] = [
            |t| &mut t.rows,
            |t| &mut t.threads_r,
            |t| &mut t.quads,
            |t| &mut t.threads_c,
            |t| &mut t.k_step,
            |t| &mut t.n_step,
        ];
        NUMBERS.into_iter().flat_map(move |number| {
            [true, false].map(|double| {
                let mut tiles = self;
                let number = number(&mut tiles);
                *number = if double { *number * 2 } else { *number / 2 };
                tiles
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::problem::element::DType;
    use crate::problem::{Options, Shape, SinkLogits, Window};

    fn problem(seq: usize, width: usize, options: Options) -> Problem {
        let shape =
            Shape { batch: 1, heads: 8, kv_heads: 2, seq_q: seq, seq_k: seq, head_dim: width, value_dim: width };
        Problem::new(shape, options.sink_logits(SinkLogits::PerHead)).unwrap()
    }

    const KERNELS: [Kernel; 3] = [Kernel::FORWARD, Kernel::D_Q, Kernel::D_KV];

    #[test]
    fn portable_candidates_fit_and_differ() {
        let causal = Options::new().causal(true);
        for device in Capabilities::samples() {
            for kernel in KERNELS {
                for (seq, width, options) in [
                    (8192, 64, causal),
                    (8192, 128, causal),
                    (8192, 64, causal.window(Window::keys(128))),
                    (300, 80, causal),
                    (1, 256, causal),
                ] {
                    let problem = problem(seq, width, options);
                    let found = PortableTile::candidates(kernel, &problem, &device);
                    let plan = crate::plan::Plan::forward(&problem, &device).unwrap();
                    assert!(kernel != Kernel::FORWARD || plan.passes[0].variant.tiling == Some(found[0].into()));
                    let hinted = found.iter().filter(|tiles| !tiles.loops.is_none()).count();
                    assert_eq!(hinted > 5, device.spirv.is_some(), "{}: {hinted}", device.name);
                    assert!(found.len() > 5, "{}: {kernel:?} {problem}: {found:?}", device.name);
                    for (index, tiles) in found.iter().enumerate() {
                        Pass::with_tiles(kernel, &problem, &device, *tiles).unwrap();
                        assert!(!found[..index].contains(tiles));
                        assert_eq!(tiles.to_string().parse(), Ok(*tiles));
                    }
                }
                assert_eq!(PortableTile::candidates(Kernel::DELTA, &problem(9, 4, causal), &device), []);
            }
        }
    }

    #[test]
    fn candidates_fit_and_differ() {
        let problem = |dtype, width| {
            let shape =
                Shape { batch: 1, heads: 8, kv_heads: 2, seq_q: 1024, seq_k: 1024, head_dim: width, value_dim: width };
            Problem::new(shape, Options::new().causal(true).dtype(dtype)).unwrap()
        };
        let of = |problem: &Problem, device: &Capabilities, micro_kernel| {
            Tiling::candidates(Kernel::FORWARD, problem, device, micro_kernel)
        };
        for device in Capabilities::samples() {
            for problem in [problem(DType::F16, 64), problem(DType::F16, 128), problem(DType::F32, 64)] {
                let both = of(&problem, &device, MicroKernel::Auto);
                let [cooperative, portable] =
                    [MicroKernel::Cooperative, MicroKernel::Portable].map(|kernel| of(&problem, &device, kernel));
                assert_eq!(both, [&cooperative[..], &portable[..]].concat());
                let multiplies = problem.options().dtype.multiplies_on_matrices();
                assert_eq!(
                    cooperative.len() > 8,
                    multiplies && device.cooperative.is_some(),
                    "{}: {problem}",
                    device.name
                );
                let plan = crate::plan::Plan::forward(&problem, &device).unwrap();
                let variant = plan.passes[0].variant;
                let first = both.iter().find(|tiling| tiling.micro_kernel() == variant.micro_kernel);
                assert_eq!(variant.tiling.as_ref(), first, "the built-in choice comes first");
                for (index, tiling) in cooperative.iter().enumerate() {
                    assert_eq!(tiling.micro_kernel(), MicroKernel::Cooperative);
                    Pass::with_tiles(Kernel::FORWARD, &problem, &device, *tiling).unwrap();
                    assert!(!cooperative[..index].contains(tiling));
                }
            }
        }
        // Tiles that the table lacks come in the order of the rows that they keep in flight, the most first.
        let (device, narrow) = (&Capabilities::samples()[0], problem(DType::F16, 64));
        let table = table::cooperative(Kernel::FORWARD, &narrow, device.cooperative.unwrap(), device.class);
        let table: Vec<Tiling> = table.map(|fragments| fragments.tiling()).collect();
        let all = of(&narrow, device, MicroKernel::Cooperative);
        let others = all.iter().copied().filter(|tiling| !table.contains(tiling) && tiling.loops().is_none());
        let rows: Vec<u32> = others
            .map(|tiling| {
                let pass = Pass::with_tiles(Kernel::FORWARD, &narrow, device, tiling).unwrap();
                pass.variant.tile().unwrap()[0] * pass.resident_workgroups(device).unwrap()
            })
            .collect();
        assert!(rows.is_sorted_by(|a, b| a >= b) && rows.first() > rows.last(), "{rows:?}");
        // The table's first choice has hints for its loops.
        let hinted: Vec<String> = all.iter().filter(|t| !t.loops().is_none()).map(Tiling::to_string).collect();
        let hints = ["loops keep", "loops unroll", "loops tiles keep", "loops tiles unroll"];
        assert_eq!(hinted, hints.map(|hints| format!("{}, {hints}", table[0])));
        assert_eq!(of(&problem(DType::F16, 257), device, MicroKernel::Cooperative), []);
    }
}
