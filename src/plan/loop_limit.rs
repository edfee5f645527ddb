//! The limit on loop iterations of one driver, llvmpipe. It ends longer loops and goes on with wrong results.

use crate::device::capabilities::Capabilities;
use crate::kernel::spec::Work;
use crate::kernel::{Kernel, MASK_BLOCK_ROWS};
use crate::problem::Problem;
use crate::problem::error::{Error, Result};
use crate::problem::mask::Band;
use crate::problem::varlen::Sequence;

/// Refuses a kernel whose loops the driver would end too early. `needed` gets the most iterations that the driver allows.
pub(crate) fn check_loop_iterations(
    kernel: Kernel,
    problem: &Problem,
    capabilities: &Capabilities,
    needed: impl FnOnce(u64) -> u64,
) -> Result<()> {
    let Some(most) = capabilities.loop_iterations else { return Ok(()) };
    let needed = needed(most);
    if needed <= most {
        return Ok(());
    }
    let reason = format!(
        "{} ends loops in silence after {most} iterations, {kernel:?} needs {needed} or more; \
         the CPU path has no such limit",
        capabilities.name
    );
    Err(Error::NoKernel { problem: problem.to_string(), reason })
}

/// Loop iterations of the longest workgroup, from those of an open tile and of a masked one. A result within `most` may be too high, and a
/// result beyond `most` may be too low.
pub(crate) fn loop_iterations(
    kernel: Kernel,
    problem: &Problem,
    tile: [u32; 2],
    iterations: [u64; 2],
    most: u64,
) -> u64 {
    let of = |sequence: Sequence| sequence_loop_iterations(kernel, problem, &sequence.band, tile, iterations, most);
    let (mut longest, mut total) = (0, 0u64);
    for sequence in problem.distinct_sequences() {
        let iterations = of(sequence);
        longest = longest.max(iterations);
        total = total.saturating_add(iterations);
    }
    match problem.options().bias {
        // One workgroup visits all pairs that share the bias.
        Some(axes) if kernel.spec().work == Work::BiasTiles => {
            let shape = problem.shape();
            let sequences = match (axes.batch, problem.has_lengths()) {
                (true, _) => longest,
                (false, true) => total,
                (false, false) => longest.saturating_mul(shape.batch as u64),
            };
            sequences.saturating_mul(if axes.heads { 1 } else { shape.heads as u64 })
        }
        _ => longest,
    }
}

pub(crate) fn sequence_loop_iterations(
    kernel: Kernel,
    problem: &Problem,
    band: &Band,
    tile: [u32; 2],
    [open, masked]: [u64; 2],
    most: u64,
) -> u64 {
    let options = problem.options();
    let [rows, columns] = tile.map(|n| n as usize);
    // The kernel looks up a mask twice for each tile, block by block.
    let lookup = match options.mask {
        Some(_) => 2 * (2 + rows / MASK_BLOCK_ROWS as usize) * (2 + columns / 32),
        None => 0,
    } as u64;
    let masked = masked + lookup;
    let open = if options.bias.is_some() || options.mask.is_some() { masked } else { open };
    let of_tile = |is_open| if is_open { open } else { masked };
    let work = kernel.spec().work;
    if let (Work::BiasTiles, Some(axes)) = (work, options.bias) {
        let row_tiles = if axes.seq_q { 1 } else { band.seq_q().div_ceil(rows) };
        return 1 + row_tiles as u64 * (1 + masked);
    }
    let rows_are_keys = work.rows_are_keys();
    let visited = |range: &std::ops::Range<usize>| match rows_are_keys {
        true => band.query_tiles(range, columns).len(),
        false => band.key_tiles(range, columns).count(),
    };
    let [seq, heads] = if rows_are_keys { [band.seq_k(), problem.heads_per_kv()] } else { [band.seq_q(), 1] };
    // A long sequence is not visited tile by tile if its ends decide, or if the most tiles that there can be are few enough. Tiles may be
    // cut where sink tokens end.
    let other = if rows_are_keys { band.seq_q() } else { band.seq_k() };
    let enough =
        (heads as u64).saturating_mul(1 + (other.div_ceil(columns) as u64 + 2).saturating_mul(open.max(masked)));
    if enough <= most {
        return enough;
    }
    // The iterations are too many even if nothing is masked.
    let least = |longest: usize| heads as u64 * (1 + longest as u64 * open);
    let ends = [0..rows.min(seq), seq.saturating_sub(rows)..seq];
    let of_ends = least(ends.iter().map(visited).max().unwrap_or(0));
    if of_ends > most {
        return of_ends;
    }
    let ranges = (0..seq).step_by(rows).map(|start| start..(start + rows).min(seq));
    let of_all = least(ranges.clone().map(|range| visited(&range)).max().unwrap_or(0));
    if of_all > most {
        return of_all;
    }
    let workgroups = ranges.map(|range| {
        if rows_are_keys {
            let column = |tile| tile * columns..(tile + 1) * columns;
            let is_open = |tile| band.all_visible(&column(tile), &range);
            band.query_tiles(&range, columns).map(|tile| of_tile(is_open(tile))).sum::<u64>()
        } else {
            let (visited, full) = (band.key_tiles(&range, columns).count(), band.full_tiles(&range, columns));
            full as u64 * of_tile(true) + (visited - full) as u64 * of_tile(false)
        }
    });
    heads as u64 * (1 + workgroups.max().unwrap_or(0))
}
