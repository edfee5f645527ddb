//! One kernel of a problem on a device: its workgroups, and how they fold into a grid.

use std::fmt;

use crate::device::capabilities::{Capabilities, Multiprocessor};
use crate::kernel::tile::Tiling;
use crate::kernel::{Kernel, MASK_TILE, Variant};
use crate::problem::Problem;
use crate::problem::error::{Error, Result};
use crate::problem::varlen::Sequence;

/// One kernel of a problem on a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pass {
    /// The kernel.
    pub variant: Variant,
    /// Workgroups in all.
    pub workgroups: u64,
    /// The same, folded into two dimensions; the most that a dispatch numbers where it takes several.
    pub grid: [u32; 2],
    /// Where the tiles come from, for the kernels that have tiles.
    pub tiles_origin: TilesOrigin,
}

/// Where the tiles of a [`Pass`] come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TilesOrigin {
    /// The table that the crate brings along.
    BuiltIn,
    /// A [`Tuning`](crate::Tuning).
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
    /// Workgroups that run on a multiprocessor at a time, by the memory and the registers they share; `None` where these
    /// are not known of the device.
    pub fn resident_workgroups(&self, capabilities: &Capabilities) -> Option<u32> {
        let Multiprocessor { workgroup_bytes, registers } = capabilities.multiprocessor?;
        let variant = &self.variant;
        let by_memory = workgroup_bytes / variant.workgroup_bytes().max(1);
        let by_registers = variant.registers().map_or(u32::MAX, |each| registers / (each * variant.threads()).max(1));
        // The driver makes do with fewer registers than one workgroup would like.
        Some(by_memory.min(by_registers).max(1))
    }

    pub(crate) fn new(
        problem: &Problem,
        variant: Variant,
        workgroups: u128,
        capabilities: &Capabilities,
    ) -> Result<Self> {
        let needs = [
            ("bytes of workgroup memory", variant.workgroup_bytes(), capabilities.workgroup_bytes),
            ("threads in a workgroup", variant.threads(), capabilities.workgroup_threads),
            ("storage buffers", variant.storage_buffers(), capabilities.storage_buffers),
        ];
        for (what, needed, offered) in needs {
            if needed > offered {
                let reason = format!("{} needs {needed} {what}, the device offers {offered}", variant.name());
                return Err(Error::NoKernel { problem: problem.to_string(), reason });
            }
        }
        let side = variant.tile().map_or(0, |[rows, columns]| rows.max(columns));
        if variant.mask && u64::from(side) > MASK_TILE {
            let reason = format!("{} has tiles of {side}, under a mask the most is {MASK_TILE}", variant.name());
            return Err(Error::NoKernel { problem: problem.to_string(), reason });
        }
        let most = u64::from(capabilities.grid_dimension.min(MOST_GRID)).pow(2);
        // Without a grid there is none; otherwise the work is cut where it has too many.
        let (_, grid) =
            fold(workgroups.div_ceil(variant.batch.into()).min(most.max(1).into()), capabilities.grid_dimension)?;
        let workgroups = workgroups as u64;
        Ok(Pass { variant, workgroups, grid, tiles_origin: TilesOrigin::Caller })
    }
}

/// Workgroups of a kernel that has tiles, of so many rows and columns.
pub(crate) fn tile_count(kernel: Kernel, problem: &Problem, [rows, columns]: [u32; 2]) -> u128 {
    let shape = problem.shape();
    if let (Kernel::DBias, Some(axes)) = (kernel, problem.options().bias) {
        let [batch, heads, seq_q, seq_k] = axes.of(problem.pairs_shape());
        return seq_q.div_ceil(rows as usize) as u128
            * seq_k.div_ceil(columns as usize) as u128
            * (batch * heads) as u128;
    }
    let heads = if kernel == Kernel::DKv { shape.kv_heads } else { shape.heads };
    let tiles: u128 = problem.distinct_sequences().map(|sequence| row_tiles(kernel, &sequence, rows) as u128).sum();
    tiles * if problem.has_lengths() { heads } else { shape.batch * heads } as u128
}

/// Tiles of rows of a head of a sequence.
pub(crate) fn row_tiles(kernel: Kernel, sequence: &Sequence, rows: u32) -> usize {
    let length = if kernel == Kernel::DKv { sequence.k_rows } else { sequence.q_rows };
    length.div_ceil(rows as usize)
}

/// The tiles of all sequences of different lengths: how many tiles of the other side each visits, its sequence and itself.
pub(crate) fn work_list(pass: &Pass, problem: &Problem) -> Vec<(usize, [u32; 2])> {
    let (kernel, [rows, columns]) = (pass.variant.kernel, pass.variant.tile().unwrap_or([1; 2]));
    let mut work = Vec::new();
    for (number, sequence) in problem.sequences().enumerate() {
        let band = sequence.band;
        for tile in 0..row_tiles(kernel, &sequence, rows) {
            let start = tile * rows as usize;
            let visited = match kernel {
                Kernel::DKv => {
                    let keys = start..(start + rows as usize).min(band.seq_k());
                    if keys.is_empty() { 0 } else { band.query_tiles(&keys, columns as usize).len() }
                }
                _ => {
                    let queries = start..(start + rows as usize).min(band.seq_q());
                    if queries.is_empty() { 0 } else { band.key_tiles(&queries, columns as usize).count() }
                }
            };
            work.push((visited, [number as u32, tile as u32]));
        }
    }
    work
}

/// Places for reports of tiles that have rows to compute again.
pub(crate) fn repair_slots(pass: &Pass, problem: &Problem) -> usize {
    if !problem.has_lengths() {
        return pass.workgroups as usize;
    }
    let (shape, [rows, _]) = (problem.shape(), pass.variant.tile().unwrap_or([1; 2]));
    let (length, heads) = match pass.variant.kernel {
        Kernel::DKv => (shape.seq_k, shape.kv_heads),
        _ => (shape.seq_q, shape.heads),
    };
    (shape.batch * length / rows as usize + problem.sequence_count() + 1) * heads
}

/// WebGPU's own limit; with it no index wraps.
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
            write!(f, ", {} loads", if v.vec4 { "vec4" } else { "scalar" })?;
        }
        match (v.fragments(), v.tiling) {
            (Some(fragments), _) => write!(f, ", tiles {fragments}")?,
            (_, Some(Tiling::Portable(tiles))) => write!(f, ", tiles {tiles}")?,
            _ => {}
        }
        if let Some(registers) = v.registers() {
            write!(f, ", ~{registers} registers")?;
        }
        if let Some(rows) = v.repairs {
            write!(f, ", repairs tiles of {rows} rows")?;
        }
        let [x, y] = self.grid;
        write!(f, ", {} B workgroup memory, {} workgroups as {x}x{y}", v.workgroup_bytes(), self.workgroups)
    }
}
