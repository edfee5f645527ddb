//! Whether the tiles of decoding fit a cache and a device.

use super::config::{CacheConfig, CacheKind};
use super::plan::{DecodeTiles, DecodeTiling};
use super::shader::{CacheKernel, CacheVariant};
use crate::device::capabilities::Capabilities;
use crate::problem::error::{Error, Result};

impl DecodeTiling {
    /// Whether the numbers fit together, a cache and a device.
    pub(crate) fn check(
        &self,
        config: &CacheConfig,
        variant: &CacheVariant,
        capabilities: &Capabilities,
    ) -> Result<()> {
        let unfit = |reason: String| Err(Error::NoKernel { problem: format!("decoding with {self}"), reason });
        let CacheKernel::Decode { several, matrices, .. } = variant.kernel else { return Ok(()) };
        let splits = self.splits;
        let (threads, lanes, rows, steps, exchanged) = match self.tiles {
            DecodeTiles::Portable { threads, lanes, rows, steps, exchanged } => {
                (threads, lanes, rows, steps, exchanged)
            }
            DecodeTiles::Cooperative { .. } => {
                return match self.tiles.lacks(config, several, matrices) {
                    Some(reason) => unfit(reason),
                    None if splits == 0 => unfit("splits are at least 1".into()),
                    None => self.check_sizes(config, variant, capabilities),
                };
            }
        };
        if ![4, 8, 16, 32].contains(&lanes) || !(lanes..=1024).contains(&threads) || !threads.is_power_of_two() {
            return unfit(format!(
                "{lanes} of {threads} threads a key: lanes are 4, 8, 16 or 32, threads a power of two"
            ));
        }
        if !(1..=16).contains(&rows) || ![1, 2, 4].contains(&exchanged) || !(1..=8).contains(&steps) || splits == 0 {
            return unfit("rows go to 16, steps to 8, exchanged keys are 1, 2 or 4, splits at least 1".into());
        }
        if steps % exchanged != 0 || !steps.is_power_of_two() {
            return unfit(format!("steps, {steps}, must be a power of two and a multiple of {exchanged}"));
        }
        self.check_sizes(config, variant, capabilities)
    }

    fn check_sizes(&self, config: &CacheConfig, variant: &CacheVariant, capabilities: &Capabilities) -> Result<()> {
        let unfit = |reason: String| Err(Error::NoKernel { problem: format!("decoding with {self}"), reason });
        let tile = variant.tile();
        if let CacheKind::Paged { page_size, .. } = config.kind
            && tile as usize > page_size
        {
            return unfit(format!("a tile of {tile} keys does not fit a page of {page_size}"));
        }
        for (what, needed, offered) in [
            ("bytes of workgroup memory", variant.workgroup_bytes(), capabilities.workgroup_bytes),
            ("threads in a workgroup", variant.threads(), capabilities.workgroup_threads),
        ] {
            if needed > offered {
                return unfit(format!("it needs {needed} {what}, the device offers {offered}"));
            }
        }
        Ok(())
    }
}
