//! Decisions: which kernel, which tiles, how many workgroups. Pure functions of numbers.

use std::fmt;

use crate::capabilities::Capabilities;
use crate::error::{Error, Result};
use crate::problem::Problem;
use crate::shader::Variant;
use crate::tiles::{Tiles, candidates};

/// How a problem will be computed on a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan {
    /// The kernel.
    pub variant: Variant,
    /// Workgroups in all.
    pub workgroups: u32,
    /// The same, folded into two dimensions.
    pub grid: [u32; 2],
}

impl Plan {
    /// Plans the forward pass; `vec4` says whether the operands can be read four neighbours at a time.
    ///
    /// # Errors
    /// [`Error::NoKernel`] and [`Error::TooManyWorkgroups`].
    pub fn forward(problem: &Problem, vec4: bool, capabilities: &Capabilities) -> Result<Self> {
        let mut reason = String::from("no candidate tiles");
        for tiles in candidates(problem, capabilities.class) {
            match Plan::with_tiles(problem, vec4, capabilities, tiles) {
                Err(Error::NoKernel { reason: why, .. }) => reason = why,
                plan => return plan,
            }
        }
        Err(Error::NoKernel { problem: problem.to_string(), reason })
    }

    /// The plan with given tiles, for measuring candidates.
    ///
    /// # Errors
    /// [`Error::NoKernel`] where the tiles do not fit the device or do not fit together,
    /// [`Error::TooManyWorkgroups`].
    pub fn with_tiles(problem: &Problem, vec4: bool, capabilities: &Capabilities, tiles: Tiles) -> Result<Self> {
        let shape = problem.shape();
        let (head_dim, value_dim) = (shape.head_dim as u32, shape.value_dim as u32);
        let refuse = |reason: String| Err(Error::NoKernel { problem: problem.to_string(), reason });
        if let Err(reason) = tiles.check(head_dim) {
            // Not the short form: it multiplies numbers that have just failed the check.
            return refuse(format!("{tiles:?}: {reason}"));
        }
        let needs = [
            ("workgroup memory", tiles.workgroup_bytes(head_dim, value_dim), capabilities.workgroup_bytes),
            ("threads in a workgroup", tiles.threads(), capabilities.workgroup_threads),
        ];
        for (what, needed, offered) in needs {
            if needed > offered {
                return refuse(format!("tiles {tiles} need {needed} of {what}, the device offers {offered}"));
            }
        }
        let variant = Variant { head_dim, value_dim, vec4, sink_logits: problem.options().sink_logits, tiles };
        let bindings = variant.storage_buffers();
        if bindings > capabilities.storage_buffers {
            return refuse(format!(
                "the kernel binds {bindings} storage buffers, the device offers {}",
                capabilities.storage_buffers
            ));
        }
        let workgroups = shape.seq_q.div_ceil(tiles.tile_q() as usize) as u128 * (shape.batch * shape.heads) as u128;
        let (workgroups, grid) = fold(workgroups, capabilities.grid_dimension)?;
        Ok(Plan { variant, workgroups, grid })
    }
}

/// Folds a row of workgroups into two dimensions of at most `most` each.
fn fold(workgroups: u128, most: u32) -> Result<(u32, [u32; 2])> {
    let total = (u64::from(most) * u64::from(most)).min(u64::from(u32::MAX - most));
    if workgroups > u128::from(total) {
        return Err(Error::TooManyWorkgroups { workgroups, most: total });
    }
    let workgroups = workgroups as u32;
    let y = workgroups.div_ceil(most);
    Ok((workgroups, [workgroups.div_ceil(y), y]))
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let v = &self.variant;
        write!(
            f,
            "portable f32{}, tiles {}, {} B workgroup memory, ~{} registers, {} workgroups as {}x{}",
            if v.vec4 { ", vec4 loads" } else { ", scalar loads" },
            v.tiles,
            v.tiles.workgroup_bytes(v.head_dim, v.value_dim),
            v.tiles.registers(v.value_dim),
            self.workgroups,
            self.grid[0],
            self.grid[1]
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folding_covers_every_workgroup() {
        for most in [1, 2, 7, 65535] {
            for n in [1u128, 2, 6, 7, 8, 49, 50, 65535, 65536, 131_071, 4_000_000_000] {
                match fold(n, most) {
                    Ok((total, [x, y])) => {
                        assert_eq!(u128::from(total), n);
                        assert!(x <= most && y <= most && u128::from(x) * u128::from(y) >= n);
                        assert!(u64::from(x) * u64::from(y) <= u64::from(u32::MAX), "the index must not wrap");
                    }
                    Err(_) => assert!(n > u128::from(most) * u128::from(most), "{n} in {most}"),
                }
            }
        }
    }
}
