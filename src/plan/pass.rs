//! One kernel of a problem on a device: its workgroups, and how they fold into a grid.

use std::fmt;

use crate::device::capabilities::{Capabilities, Multiprocessor};
use crate::kernel::spec::Grid;
use crate::kernel::tile::Tiling;
use crate::kernel::{MASK_TILE, Variant};
use crate::problem::Problem;
use crate::problem::error::{Error, Result};

/// One kernel of a problem on a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Pass {
    /// The kernel.
    pub variant: Variant,
    /// Workgroups in all.
    pub workgroups: u64,
    /// The workgroups, folded into two or three dimensions. If the pass takes several dispatches, the most that a dispatch numbers.
    pub grid: [u32; 3],
    /// The source of the tiles, for kernels that have tiles.
    pub tiles_origin: TilesOrigin,
}

/// The source of the tiles of a [`Pass`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TilesOrigin {
    /// The table that is part of the crate.
    BuiltIn,
    /// A [`Tuning`](crate::tuning::Tuning).
    Tuning,
    /// The caller.
    Caller,
}

impl fmt::Display for TilesOrigin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            TilesOrigin::BuiltIn => "built-in table",
            TilesOrigin::Tuning => "tuning",
            TilesOrigin::Caller => "caller",
        })
    }
}

impl Pass {
    /// Workgroups that run on a multiprocessor at a time, limited by the memory and the registers that they share. `None` if these are not
    /// known for the device.
    pub fn resident_workgroups(&self, capabilities: &Capabilities) -> Option<u32> {
        let Multiprocessor { workgroup_bytes, registers, .. } = capabilities.multiprocessor?;
        let variant = &self.variant;
        let by_memory = workgroup_bytes / variant.workgroup_bytes().max(1);
        let by_registers = variant.registers().map_or(u32::MAX, |each| registers / (each * variant.threads()).max(1));
        // If the registers do not suffice for one workgroup, the driver uses fewer.
        Some(by_memory.min(by_registers).max(1))
    }

    pub(crate) fn new(problem: &Problem, variant: Variant, capabilities: &Capabilities) -> Result<Self> {
        let workgroups = grid(&variant, problem).workgroups();
        check_limits(&variant, capabilities)
            .map_err(|reason| Error::NoKernel { problem: problem.to_string(), reason })?;
        let side = variant.tile().map_or(0, |[rows, columns]| rows.max(columns));
        if variant.mask && u64::from(side) > MASK_TILE {
            let reason = format!("{} has tiles of {side}, under a mask the most is {MASK_TILE}", variant.name());
            return Err(Error::NoKernel { problem: problem.to_string(), reason });
        }
        let most = u64::from(capabilities.grid_dimension.min(MOST_GRID)).pow(2);
        // A device without a grid is an error. Otherwise the work is cut if it has too many workgroups.
        let (_, [x, y]) =
            fold(workgroups.div_ceil(variant.batch.into()).min(most.max(1).into()), capabilities.grid_dimension)?;
        let (workgroups, grid) = (workgroups as u64, [x, y, 1]);
        Ok(Pass { variant, workgroups, grid, tiles_origin: TilesOrigin::Caller })
    }
}

/// The reason why a device cannot run a variant, if it cannot.
pub(crate) fn check_limits(variant: &Variant, capabilities: &Capabilities) -> Result<(), String> {
    let needs = [
        ("bytes of workgroup memory", variant.workgroup_bytes(), capabilities.workgroup_bytes),
        ("threads in a workgroup", variant.threads(), capabilities.workgroup_threads),
        ("storage buffers", variant.storage_buffers(), capabilities.storage_buffers),
    ];
    match needs.into_iter().find(|(_, needed, offered)| needed > offered) {
        Some((what, needed, offered)) => {
            Err(format!("{} needs {needed} {what}, the device offers {offered}", variant.name()))
        }
        None => Ok(()),
    }
}

/// The work of a pass.
pub(crate) fn grid(variant: &Variant, problem: &Problem) -> Grid {
    variant.kernel.spec().work.grid(problem, variant.tile().unwrap_or([1; 2]), variant.lengths)
}

/// The tiles of sequences of different lengths: how many tiles of the other side each of them visits, its sequence and its number.
pub(crate) fn work_list(pass: &Pass, problem: &Problem) -> Vec<(usize, [u32; 2])> {
    let (work_of, [rows, columns]) = (pass.variant.kernel.spec().work, pass.variant.tile().unwrap_or([1; 2]));
    let mut work = Vec::new();
    for (number, sequence) in problem.sequences().enumerate() {
        let band = sequence.band;
        for tile in 0..work_of.row_tiles(&sequence, rows as usize) {
            let start = tile * rows as usize;
            let visited = match work_of.rows_are_keys() {
                true => {
                    let keys = start..(start + rows as usize).min(band.seq_k());
                    if keys.is_empty() { 0 } else { band.query_tiles(&keys, columns as usize).len() }
                }
                false => {
                    let queries = start..(start + rows as usize).min(band.seq_q());
                    if queries.is_empty() { 0 } else { band.key_tiles(&queries, columns as usize).count() }
                }
            };
            work.push((visited, [number as u32, tile as u32]));
        }
    }
    work
}

/// Number of reports of tiles that may have rows to compute again.
pub(crate) fn fallback_slots(pass: &Pass, problem: &Problem) -> usize {
    if !problem.has_lengths() {
        return pass.workgroups as usize;
    }
    let (shape, [rows, _]) = (problem.shape(), pass.variant.tile().unwrap_or([1; 2]));
    let (length, heads) = match pass.variant.rows_are_keys() {
        true => (shape.seq_k, shape.kv_heads),
        false => (shape.seq_q, shape.heads),
    };
    (shape.batch * length / rows as usize + problem.sequence_count() + 1) * heads
}

/// WebGPU's own limit. Below it no index wraps.
const MOST_GRID: u32 = 65535;

/// Folds a row of workgroups into two dimensions of at most `most` each.
pub(crate) fn fold(workgroups: u128, most: u32) -> Result<(u32, [u32; 2])> {
    let most = most.min(MOST_GRID);
    let total = u64::from(most) * u64::from(most);
    if workgroups > u128::from(total) {
        return Err(Error::TooManyWorkgroups { workgroups, most: total });
    }
    let workgroups = workgroups as u32;
    let y = workgroups.div_ceil(most.max(1)).max(1);
    Ok((workgroups, [workgroups.div_ceil(y), y]))
}

impl fmt::Display for Pass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let v = &self.variant;
        write!(f, "{:?}, {} {}", v.kernel, v.micro_kernel, v.dtype)?;
        if v.value_dim > 0 {
            let loads = match (v.vec8, v.vec4) {
                (true, _) => "vec8",
                (_, true) => "vec4",
                _ => "scalar",
            };
            write!(f, ", {loads} loads")?;
        }
        match (v.fragments(), v.tiling) {
            (Some(fragments), _) => write!(f, ", tiles {fragments}")?,
            (_, Some(Tiling::Portable(tiles))) => write!(f, ", tiles {tiles}")?,
            _ => {}
        }
        if let Some(registers) = v.registers() {
            write!(f, ", ~{registers} registers")?;
        }
        if let Some(rows) = v.fallback {
            write!(f, ", fallback for tiles of {rows} rows")?;
        }
        if let Some(tiles) = v.decode_tiles() {
            write!(f, ", tiles {tiles}")?;
        }
        let [x, y, z] = self.grid;
        write!(f, ", {} B workgroup memory, {} workgroups as {x}x{y}", v.workgroup_bytes(), self.workgroups)?;
        if z > 1 { write!(f, "x{z}") } else { Ok(()) }
    }
}
