//! Measured tiles: the tables from which tiles are chosen.

use crate::device::capabilities::{Capabilities, CooperativeMatrices, DeviceClass};
use crate::kernel::loops::{LoopHint, LoopHints, LoopName};
use crate::kernel::tile::cooperative::CooperativeTile;
use crate::kernel::tile::portable::PortableTile;
use crate::kernel::{Kernel, MicroKernel};
use crate::plan::tuning::MaskClass;
use crate::problem::Problem;
use crate::problem::element::DType;

/// A row of the tuning table: tiles, and the problems they are good for.
struct Candidate {
    tiles: PortableTile,
    /// Widest accumulators of a row, taken together, that stay in registers.
    width: u32,
    /// Fewest rows that fill a tile well enough.
    seq: usize,
}

const fn candidate(threads: [u32; 2], thread: [u32; 2], k_step: u32, n_step: u32, width: u32, seq: usize) -> Candidate {
    let [threads_r, threads_c] = threads;
    let [rows, quads] = thread;
    let loops = LoopHints::NONE;
    Candidate { tiles: PortableTile { threads_r, threads_c, rows, quads, k_step, n_step, loops }, width, seq }
}

/// Measured on an NVIDIA H200, see benches/results/. If a row does not fit, the next one is tried.
const FORWARD: [Candidate; 9] = [
    candidate([16, 8], [4, 1], 8, 16, 64, 33),
    candidate([32, 8], [4, 2], 8, 16, 128, 65),
    candidate([16, 8], [4, 1], 8, 16, 128, 33),
    candidate([8, 8], [4, 1], 8, 16, 128, 1),
    candidate([16, 16], [4, 1], 8, 16, 256, 33),
    candidate([4, 16], [4, 1], 4, 8, 256, 1),
    LESS,
    WIDE,
    LEAST,
];

const D_Q: [Candidate; 9] = [
    candidate([16, 8], [8, 1], 8, 16, 64, 65),
    candidate([16, 16], [8, 1], 8, 16, 128, 65),
    candidate([16, 8], [4, 1], 8, 16, 128, 33),
    candidate([8, 8], [4, 1], 8, 16, 128, 1),
    candidate([16, 16], [4, 1], 8, 16, 256, 33),
    candidate([4, 16], [4, 1], 4, 8, 256, 1),
    LESS,
    WIDE,
    LEAST,
];

const D_KV: [Candidate; 9] = [
    candidate([16, 16], [4, 2], 8, 16, 256, 33),
    candidate([8, 16], [4, 1], 8, 16, 256, 1),
    candidate([8, 16], [4, 1], 8, 8, 256, 1),
    candidate([16, 16], [4, 1], 8, 16, 512, 33),
    candidate([4, 16], [4, 1], 4, 8, 512, 1),
    // For narrow windows.
    candidate([8, 8], [4, 1], 8, 16, 128, 1),
    LESS,
    WIDE,
    LEAST,
];

/// Accumulators of a row in kernels of narrow heads.
const NARROW: u32 = 32;

/// For devices of 128 registers a thread (Apple, Intel, unknown ones), where the tables above spill or leave few subgroups. By Mesa's compilers for
/// Apple's M1 and Adreno 740 in f32 these spill nothing, at the fewest instructions for each multiply-add
/// (benches/results/2026-12-01-compilers.md). tests/compilers.txt has what the compilers make of them.
const FEW_FORWARD: [Candidate; 10] = [
    // The M1's compiler unrolls the short loops of narrow rows, which takes registers.
    candidate([8, 8], [2, 2], 4, 16, NARROW, 1),
    candidate([16, 8], [2, 2], 4, 16, 64, 33),
    candidate([8, 8], [2, 2], 4, 16, 64, 1),
    candidate([16, 8], [2, 2], 4, 16, 128, 33),
    candidate([16, 8], [2, 2], 4, 8, 128, 33),
    candidate([8, 8], [2, 2], 4, 8, 128, 1),
    candidate([16, 16], [2, 2], 4, 8, 256, 33),
    candidate([16, 8], [1, 1], 4, 8, 256, 1),
    WIDE,
    LEAST,
];

const FEW_D_Q: [Candidate; 10] = [
    candidate([16, 8], [2, 1], 4, 8, NARROW, 33),
    candidate([16, 8], [2, 2], 4, 16, 64, 33),
    candidate([8, 8], [2, 1], 4, 8, 64, 1),
    candidate([8, 16], [2, 2], 4, 16, 128, 1),
    candidate([8, 16], [2, 2], 4, 8, 128, 1),
    candidate([16, 8], [2, 1], 4, 8, 64, 33),
    candidate([16, 16], [2, 1], 4, 8, 256, 33),
    candidate([8, 16], [2, 1], 4, 8, 256, 1),
    WIDE,
    LEAST,
];

const FEW_D_KV: [Candidate; 8] = [
    candidate([16, 8], [1, 1], 4, 8, 96, 1),
    candidate([16, 16], [2, 1], 4, 8, 128, 33),
    candidate([8, 16], [2, 1], 4, 8, 128, 1),
    candidate([16, 8], [1, 1], 4, 8, 256, 1),
    candidate([16, 16], [1, 1], 4, 8, 512, 33),
    candidate([8, 16], [1, 1], 4, 8, 512, 1),
    WIDE,
    LEAST,
];

/// A software driver runs the threads of a workgroup one after the other, a vector at a time.
const SOFTWARE: [Candidate; 5] =
    [candidate([8, 8], [4, 1], 4, 16, 256, 1), candidate([4, 16], [4, 1], 4, 8, 512, 1), LESS, WIDE, LEAST];

/// For the widest heads.
const WIDE: Candidate = candidate([8, 16], [2, 1], 4, 4, u32::MAX, 1);
/// Fits 16 KiB of workgroup memory and 64 threads for widths to 256 ...
const LESS: Candidate = candidate([8, 8], [2, 1], 4, 8, 256, 1);
/// ... and for every width.
const LEAST: Candidate = candidate([8, 8], [2, 1], 4, 4, u32::MAX, 1);

/// The kernels that share a table.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Family {
    /// Rows are queries, with an online softmax.
    Softmax,
    /// Rows are queries, or pairs.
    Queries,
    /// Rows are keys.
    Keys,
}

impl Family {
    fn of(kernel: Kernel) -> Self {
        match kernel.tiled() {
            Some(tiled) if tiled.softmax => Family::Softmax,
            _ if kernel.spec().work.rows_are_keys() => Family::Keys,
            _ => Family::Queries,
        }
    }
}

/// The first tiles in f32 on NVIDIA's GPUs, if the driver gets hints for loops: the innermost ones unrolled, which the driver does not do by itself.
/// Measured on an NVIDIA H200 (benches/results/2026-12-01-h200-f32.md). Narrow windows lose by it.
fn unrolled(kernel: Kernel, problem: &Problem, capabilities: &Capabilities) -> Option<PortableTile> {
    let (shape, narrow) = (problem.shape(), MaskClass::of(problem) == Some(MaskClass::Window));
    let wide = match shape.head_dim.max(shape.value_dim) {
        ..=64 => false,
        65..=128 => true,
        _ => return None,
    };
    let is_measured = capabilities.class == DeviceClass::Nvidia && problem.options().dtype == DType::F32 && !narrow;
    if !is_measured || capabilities.spirv.is_none() {
        return None;
    }
    let [least, _] = problem.longest();
    let tile = match (kernel.name(), wide) {
        ("forward", false) => candidate([16, 8], [4, 1], 8, 16, 64, 65),
        ("forward" | "d_q", true) => candidate([32, 8], [4, 2], 8, 16, 128, 65),
        ("d_q", false) => candidate([16, 8], [4, 2], 8, 16, 64, 65),
        ("d_kv", false) if problem.options().mask.is_none() && problem.options().bias.is_none() => {
            candidate([16, 16], [4, 1], 8, 16, 128, 65)
        }
        ("d_kv", _) => candidate([16, 16], [4, 2], 8, 16, 256, 65),
        _ => return None,
    };
    let loops = LoopHints::NONE.with(LoopName::Inner, LoopHint::Unroll);
    (least >= tile.seq).then_some(PortableTile { loops, ..tile.tiles })
}

/// Tiles to try for a kernel, the best first. One of them fits every WebGPU device.
pub(crate) fn portable(kernel: Kernel, problem: &Problem, capabilities: &Capabilities) -> Vec<PortableTile> {
    let class = capabilities.class;
    let shape = problem.shape();
    let widths = [shape.head_dim as u32, shape.value_dim as u32];
    let accumulators = kernel.tiled().map_or(&[][..], |tiled| tiled.accumulators);
    let width: u32 = accumulators.iter().map(|width| width.of(widths)).sum();
    let [seq_q, seq_k] = problem.longest();
    let family = Family::of(kernel);
    let seq = if family == Family::Keys { seq_k } else { seq_q };
    let table: &[Candidate] = match (class, family) {
        (DeviceClass::Software, _) => &SOFTWARE,
        (class, Family::Softmax) if class.has_few_registers() => &FEW_FORWARD,
        (class, Family::Queries) if class.has_few_registers() => &FEW_D_Q,
        (class, Family::Keys) if class.has_few_registers() => &FEW_D_KV,
        (_, Family::Softmax) => &FORWARD,
        (_, Family::Queries) => &D_Q,
        (_, Family::Keys) => &D_KV,
    };
    // Tiles for every width are the last resort, and those of narrow rows suit kernels that have such rows.
    let fitting = |is_last: bool| {
        let suits = move |c: &&Candidate| (c.width == u32::MAX) == is_last && (width > 0 || c.width > NARROW);
        table.iter().filter(suits).filter(move |c| width <= c.width && seq >= c.seq).map(|c| c.tiles)
    };
    let mut candidates: Vec<PortableTile> = fitting(false).collect();
    if MaskClass::of(problem) == Some(MaskClass::Window) {
        let band = problem.most_visible() as u32;
        candidates.sort_by(|a, b| window_cost(a, band).total_cmp(&window_cost(b, band)));
    }
    candidates.extend(fitting(true));
    unrolled(kernel, problem, capabilities).into_iter().chain(candidates).collect()
}

/// The cost of a visible key under a band of keys: the area of the visited tiles divided by the area of the band, times the cost of an
/// element of a tile.
fn window_cost(tiles: &PortableTile, band: u32) -> f32 {
    let [rows, columns, band] = [tiles.tile_rows(), tiles.tile_columns(), band.max(1)].map(|n| n as f32);
    let [thread_rows, thread_columns] = [tiles.rows, 4 * tiles.quads].map(|n| n as f32);
    // The cost of the inner loops, which are bound by reads from workgroup memory. Thread tiles above 4x4 gain nothing.
    let inner = (2.0 / thread_rows + 2.0 / thread_columns).max(1.0);
    // The cost of reads from global memory, a seventh of the time at 64x32 (both are in benches/results/).
    let global = 3.5 / rows + 3.5 / columns;
    (band + rows + columns) / band * (inner + global)
}

/// Tiles to try for a kernel with a micro-kernel on cooperative matrices, the best first.
pub(crate) fn on_matrices(
    kernel: Kernel,
    problem: &Problem,
    matrices: CooperativeMatrices,
    class: DeviceClass,
    micro_kernel: MicroKernel,
) -> Vec<CooperativeTile> {
    match micro_kernel {
        MicroKernel::Fragments => fragments(kernel, problem, matrices, class),
        MicroKernel::Cooperative => cooperative(kernel, problem, matrices, class).collect(),
        MicroKernel::Auto | MicroKernel::Portable => Vec::new(),
    }
}

/// Fragments to try for a kernel, the best first.
fn cooperative(
    kernel: Kernel,
    problem: &Problem,
    matrices: CooperativeMatrices,
    class: DeviceClass,
) -> impl Iterator<Item = CooperativeTile> {
    let shape = problem.shape();
    let width = shape.head_dim.max(shape.value_dim);
    let narrow = MaskClass::of(problem) == Some(MaskClass::Window);
    // Subgroups, rows, columns and stages, measured on an NVIDIA H200, see benches/results/. Widths beyond 128 were not measured. At 256
    // staged columns leave room for four subgroups in 48 KiB, of one row of fragments each. Forward then takes some 250 registers. d_q and
    // d_k/d_v have up to two accumulators and two operands and take some 310 and 440. Drivers spill registers beyond 255, and results are
    // right all the same.
    let options = problem.options();
    let modified = options.softcap.is_some() || options.alibi || options.bias.is_some();
    let changed = modified || options.mask.is_some();
    let table: &[[u32; 4]] = match (class, Family::of(kernel)) {
        (DeviceClass::Software, _) => &[[2, 1, 1, 2]],
        (DeviceClass::Amd, family) => amd_strips(family, width),
        (_, Family::Softmax) if modified && !narrow && width <= 128 => &[[4, 2, 1, 1], [4, 1, 1, 1], [2, 1, 1, 1]],
        (_, Family::Softmax) if narrow => &[[4, 1, 1, 1], [2, 1, 1, 1]],
        (_, Family::Queries) if narrow && width <= 64 => &[[2, 2, 1, 1], [2, 1, 1, 1]],
        (_, Family::Keys) if narrow && width <= 64 => &[[2, 1, 1, 1]],
        _ if narrow => &[[4, 1, 1, 1], [2, 1, 1, 1]],
        (_, Family::Keys) if width <= 64 && (changed || !options.dtype.needs_token_scales()) => {
            &[[4, 2, 1, 1], [4, 1, 1, 1], [2, 1, 1, 1]]
        }
        _ if width <= 64 => &[[4, 2, 1, 2], [4, 1, 1, 1], [2, 1, 1, 1]],
        (_, Family::Softmax) if options.mask.is_some() && width <= 128 => {
            &[[8, 2, 1, 2], [4, 2, 1, 1], [4, 1, 1, 1], [2, 1, 1, 1]]
        }
        (_, Family::Softmax) if width <= 128 => &[[4, 2, 1, 1], [4, 1, 1, 1], [2, 1, 1, 1]],
        (_, Family::Keys) if changed && width <= 128 => &[[4, 1, 1, 1], [2, 1, 1, 1]],
        (_, Family::Queries) if options.mask.is_some() && width <= 128 => &[[4, 1, 1, 1], [2, 1, 1, 1]],
        (_, Family::Keys) if width <= 128 => &[[8, 1, 2, 1], [4, 1, 1, 1], [2, 1, 1, 1]],
        _ => &[[8, 1, 1, 2], [4, 1, 1, 1], [2, 1, 1, 1]],
    };
    let smaller = match class {
        // llvmpipe takes seconds to compile a kernel, the longer the more products it has.
        DeviceClass::Software => 1,
        _ => 16 / matrices.side,
    };
    table.iter().map(move |&[subgroups, rows, columns, stages]| CooperativeTile {
        matrices,
        subgroups,
        rows: rows * smaller,
        columns: columns * smaller,
        stages,
        chunk: None,
        loops: LoopHints::NONE,
    })
}

/// Subgroups, rows, columns and stages for AMD's GPUs, unmeasured. By ACO's statistics for RDNA3 and RDNA4 in subgroups of 64 they spill nothing and
/// keep 4 to 16 waves (benches/results/2026-11-30-aco-strips.md). RDNA3 holds operands twice, so that a second row of fragments spills in the
/// backward pass.
fn amd_strips(family: Family, width: usize) -> &'static [[u32; 4]] {
    match family {
        _ if width <= 64 => &[[4, 1, 2, 1], [4, 1, 1, 1], [2, 1, 1, 1]],
        Family::Softmax if width <= 128 => &[[4, 1, 2, 1], [4, 1, 1, 1], [2, 1, 1, 1]],
        _ => &[[4, 1, 1, 1], [2, 1, 1, 1]],
    }
}

/// Fragments with their elements in registers, to try for a kernel, the best first.
fn fragments(
    kernel: Kernel,
    problem: &Problem,
    matrices: CooperativeMatrices,
    class: DeviceClass,
) -> Vec<CooperativeTile> {
    let shape = problem.shape();
    let width = shape.head_dim.max(shape.value_dim);
    let narrow = MaskClass::of(problem) == Some(MaskClass::Window);
    let options = problem.options();
    let has_mask = options.mask.is_some();
    let modified = options.softcap.is_some() || options.alibi || options.bias.is_some();
    let keep = LoopHints::every(LoopHint::Keep);
    let keep_tiles = LoopHints::NONE.with(LoopName::Tiles, LoopHint::Keep);
    // Subgroups, rows, columns and columns of a chunk in fragments of 16x16, measured on an NVIDIA H200 in f16:
    // benches/results/2026-11-30-h200-fragments.md and 2026-11-30-h200-options.md. Two workgroups of a multiprocessor have 24 KiB each. A mask's words are of 32 columns.
    let (table, loops): (&[[u32; 4]], LoopHints) = match (class, Family::of(kernel)) {
        // Four fragments of 8x8 make quads of llvmpipe's elements.
        (DeviceClass::Software, _) => (&[[2, 1, 2, 2]], keep),
        // Split numbers take twice the registers and the memory.
        (_, family) if options.dtype.is_split_on_matrices() => (split_fragments(family, width, narrow), keep),
        (_, Family::Softmax) if narrow => (&[[4, 1, 2, 1], [4, 1, 1, 1]], keep),
        (_, Family::Softmax) if width <= 64 => (&[[4, 2, 4, 1], [4, 1, 2, 1]], keep),
        (_, Family::Softmax) if width <= 128 => (&[[4, 2, 1, 1], [4, 1, 1, 1]], keep),
        (_, Family::Queries) if narrow && width <= 64 => (&[[2, 2, 1, 1], [2, 1, 1, 1]], keep),
        (_, Family::Keys) if narrow && width <= 64 => (&[[4, 1, 2, 2], [2, 1, 1, 1]], keep),
        _ if narrow => (&[[4, 1, 2, 2], [4, 1, 1, 1]], keep),
        (_, Family::Queries) if width <= 64 => (&[[4, 2, 2, 2], [4, 1, 1, 1]], keep),
        (_, Family::Keys) if (modified || has_mask) && width <= 64 => (&[[4, 2, 2, 2], [4, 1, 1, 1]], keep),
        (_, Family::Keys) if width <= 64 => (&[[8, 1, 4, 4], [4, 2, 2, 2], [4, 1, 1, 1]], keep_tiles),
        (_, Family::Queries) if width <= 128 && !modified && !has_mask => {
            (&[[8, 1, 4, 4], [8, 1, 2, 2], [4, 1, 1, 1]], keep)
        }
        _ if width <= 128 => (&[[8, 1, 2, 2], [4, 1, 1, 1]], keep),
        _ => (&[[4, 1, 1, 1], [2, 1, 1, 1]], keep),
    };
    let finer = 16 / matrices.side;
    // llvmpipe takes minutes to compile a kernel with many products.
    let rows_finer = if class == DeviceClass::Software { 1 } else { finer };
    let tile = |&[subgroups, rows, columns, chunk]: &[u32; 4]| CooperativeTile {
        matrices,
        subgroups,
        rows: rows * rows_finer,
        columns: columns * finer,
        stages: 1,
        chunk: Some(chunk * finer),
        loops,
    };
    table.iter().map(tile).collect()
}

/// Fragments of split numbers, in the same form, measured the same way.
fn split_fragments(family: Family, width: usize, narrow: bool) -> &'static [[u32; 4]] {
    match (family, width, narrow) {
        (_, ..=64, true) => &[[4, 1, 2, 2], [4, 1, 1, 1]],
        (Family::Softmax, ..=64, false) => &[[4, 2, 1, 1], [4, 1, 1, 1]],
        (_, ..=64, false) => &[[8, 1, 2, 2], [4, 1, 1, 1]],
        (_, ..=128, true) => &[[4, 1, 1, 1], [2, 1, 1, 1]],
        (_, ..=128, false) => &[[8, 1, 2, 2], [8, 1, 1, 1], [4, 1, 1, 1], [2, 1, 1, 1]],
        _ => &[[4, 1, 1, 1], [2, 1, 1, 1], [1, 1, 1, 1]],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::problem::{Options, Shape, SinkLogits, Window};

    fn problem(seq: usize, width: usize, options: Options) -> Problem {
        let shape =
            Shape { batch: 1, heads: 8, kv_heads: 2, seq_q: seq, seq_k: seq, head_dim: width, value_dim: width };
        Problem::new(shape, options.sink_logits(SinkLogits::PerHead)).unwrap()
    }

    /// Wide tiles visit many keys that a narrow window hides.
    #[test]
    fn narrow_windows_have_smaller_tiles() {
        let causal = Options::new().causal(true);
        let h200 = &Capabilities::samples()[0];
        for (kernel, window, smaller) in
            [(Kernel::D_KV, 128, true), (Kernel::D_Q, 128, true), (Kernel::D_KV, 2048, false)]
        {
            let first = |options| portable(kernel, &problem(8192, 64, options), h200)[0];
            let area = |tiles: PortableTile| tiles.tile_rows() * tiles.tile_columns();
            let (long, narrow) = (first(causal), first(causal.window(Window::keys(window))));
            assert_eq!(area(narrow) < area(long), smaller, "{kernel:?} {window}: {narrow} and {long}");
        }
    }
}
