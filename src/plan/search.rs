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
        for one in [MicroKernel::Fragments, MicroKernel::Cooperative].into_iter().filter(|one| wants(*one)) {
            found.extend(on_matrices(kernel, problem, capabilities, one));
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
/// Most subgroups and rows of fragments that are tried.
const SUBGROUPS: u32 = 16;
const ROWS: u32 = 4;

/// Tiles of a micro-kernel on cooperative matrices: those of the table, the first of them with hints for loops, and others.
fn on_matrices(
    kernel: Kernel,
    problem: &Problem,
    capabilities: &Capabilities,
    micro_kernel: MicroKernel,
) -> Vec<Tiling> {
    let Some(matrices) = capabilities.cooperative.filter(CooperativeMatrices::is_sound) else { return Vec::new() };
    let pass = |tiling: &Tiling| Pass::with_tiles(kernel, problem, capabilities, *tiling).ok();
    let mut found: Vec<Tiling> = Vec::new();
    for tile in table::on_matrices(kernel, problem, matrices, capabilities.class, micro_kernel) {
        let tiling = tile.tiling();
        if !found.contains(&tiling) && pass(&tiling).is_some() {
            found.push(tiling);
        }
    }
    let first = found.first().copied();
    let loops = first.map_or(LoopHints::NONE, |first| first.loops());
    // A table may have hints of its own, and then no hints are worth a measurement, too.
    let hinted = with_hints(kernel, first.as_ref(), capabilities).into_iter();
    let plain = first.map(|first| first.with_loops(LoopHints::NONE));
    found.extend(hinted.chain(plain).filter(|tiling| Some(*tiling) != first));

    let columns = [1, 2, 4].map(|columns| columns * 16 / matrices.side);
    // Scores of a wide tile are many, unless they are taken by chunks.
    let columns = if micro_kernel == MicroKernel::Fragments { &columns[..] } else { &columns[..2] };
    let mut others = Vec::new();
    for [columns, subgroups, rows] in columns.iter().flat_map(|columns| {
        (1..=SUBGROUPS).flat_map(move |subgroups| (1..=ROWS).map(move |rows| [*columns, subgroups, rows]))
    }) {
        let tilings: Vec<Tiling> = if micro_kernel == MicroKernel::Fragments {
            (1..=columns).map(|chunk| Tiling::Fragments { subgroups, rows, columns, chunk, loops }).collect()
        } else {
            [2, 1].map(|stages| Tiling::Cooperative { subgroups, rows, columns, stages, loops }).to_vec()
        };
        for tiling in tilings {
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
        for tiles in table::portable(kernel, problem, capabilities) {
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
        let hinted = with_hints(kernel, first.as_ref(), capabilities).into_iter().filter_map(|tiling| match tiling {
            Tiling::Portable(tiles) => Some(tiles),
            Tiling::Cooperative { .. } | Tiling::Fragments { .. } => None,
        });
        // The table may have hints of its own.
        let hinted: Vec<PortableTile> = hinted.filter(|tiles| !found.contains(tiles)).collect();
        found.splice(built_in..built_in, hinted);
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
                let all = of(&problem, &device, MicroKernel::Auto);
                let each = MicroKernel::ALL.map(|kernel| of(&problem, &device, kernel));
                assert_eq!(all, each.concat());
                let multiplies = problem.options().dtype.multiplies_on_matrices();
                let matrices = device.cooperative.filter(|_| multiplies);
                let has_elements = matrices.is_some_and(|matrices| matrices.elements.is_some());
                for (micro_kernel, found, serves) in [
                    (MicroKernel::Fragments, &each[0], has_elements),
                    (MicroKernel::Cooperative, &each[1], matrices.is_some()),
                ] {
                    assert_eq!(found.len() > 8, serves, "{}: {problem}", device.name);
                    for (index, tiling) in found.iter().enumerate() {
                        assert_eq!(tiling.micro_kernel(), micro_kernel);
                        Pass::with_tiles(Kernel::FORWARD, &problem, &device, *tiling).unwrap();
                        assert!(!found[..index].contains(tiling), "{tiling} twice");
                    }
                }
                let plan = crate::plan::Plan::forward(&problem, &device).unwrap();
                let variant = plan.passes[0].variant;
                let first = all.iter().find(|tiling| tiling.micro_kernel() == variant.micro_kernel);
                assert_eq!(variant.tiling.as_ref(), first, "the built-in choice comes first");
            }
        }
        let (device, narrow) = (&Capabilities::samples()[0], problem(DType::F16, 64));
        let matrices = device.cooperative.unwrap();
        for micro_kernel in [MicroKernel::Fragments, MicroKernel::Cooperative] {
            let table = table::on_matrices(Kernel::FORWARD, &narrow, matrices, device.class, micro_kernel);
            let table: Vec<Tiling> = table.iter().map(|tile| tile.tiling()).collect();
            let all = of(&narrow, device, micro_kernel);
            // The table's first choice has every hint for its loops, and none.
            let mut hints = ["loops", "loops keep", "loops unroll", "loops tiles keep", "loops tiles unroll"];
            hints.sort_unstable_by_key(|hints| *hints != table[0].loops().to_string());
            let hinted =
                all.iter().filter(|tiling| tiling.with_loops(LoopHints::NONE) == table[0].with_loops(LoopHints::NONE));
            let mut hinted: Vec<String> = hinted.map(|tiling| tiling.loops().to_string()).collect();
            assert_eq!(hinted[0], hints[0]);
            hinted.sort_unstable();
            hints.sort_unstable();
            assert_eq!(hinted, hints);
            // Tiles that the table lacks come in the order of the rows that they keep in flight, the most first.
            let others = all.iter().copied().filter(|tiling| {
                !table.contains(tiling) && tiling.with_loops(LoopHints::NONE) != table[0].with_loops(LoopHints::NONE)
            });
            let rows: Vec<u32> = others
                .map(|tiling| {
                    let pass = Pass::with_tiles(Kernel::FORWARD, &narrow, device, tiling).unwrap();
                    pass.variant.tile().unwrap()[0] * pass.resident_workgroups(device).unwrap()
                })
                .collect();
            assert!(rows.is_sorted_by(|a, b| a >= b) && rows.first() > rows.last(), "{rows:?}");
            assert_eq!(of(&problem(DType::F16, 257), device, micro_kernel), []);
        }
    }
}
