//! Decisions of decoding: how a group's rows and keys are shared out among threads and workgroups.

use std::fmt;
use std::str::FromStr;

use super::shader::CacheVariant;
use super::{CacheConfig, CacheKind};
use crate::capabilities::{Capabilities, DeviceClass};
use crate::element::DType;
use crate::error::{Error, Result};

/// How the decode kernel divides its work. As text `32x8 rows 8, steps 4 by 2, splits 330`: threads of a workgroup by threads that
/// share a key, rows (queries of the query heads of a group) of a workgroup, keys that a thread loads at a time and of which
/// it exchanges so many at once, and splits of a sequence's keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct DecodeTiling {
    /// Threads of a workgroup.
    pub threads: u32,
    /// Threads that share a key, a power of two from 4 to 32.
    pub lanes: u32,
    /// Rows of a workgroup.
    pub rows: u32,
    /// Keys whose loads a thread has under way.
    pub steps: u32,
    /// Keys between two barriers; divides `steps`, at most 4.
    pub exchanged: u32,
    /// Splits of the keys: fewer where each would have less than 64 keys, and up to four times as many where each would have
    /// more than 512.
    pub splits: u32,
}

/// Numbers of q, and of the result, that a thread holds.
const HELD: u32 = 64;
/// Fewer keys than this are not worth a workgroup of their own.
const LEAST_KEYS: u32 = 64;
/// With more keys than this the start and the end of a workgroup do not count, and more workgroups share the work more evenly.
const LONG_KEYS: u32 = 512;
const MORE_SPLITS: u32 = 4;
/// Iterations of a thread's loop over tiles at most, for drivers that end long loops.
const MOST_TILES: u64 = 50_000;

impl DecodeTiling {
    /// Keys of a tile.
    pub(crate) fn tile(&self) -> u32 {
        self.threads / self.lanes * self.steps
    }

    pub(crate) fn slots(&self) -> u32 {
        self.threads / self.lanes
    }

    /// The tiling for the rows of a group and so many groups in all, on a device.
    pub(crate) fn new(config: &CacheConfig, total_rows: usize, groups: usize, capabilities: &Capabilities) -> Self {
        let element = config.dtype.bytes() as u32;
        let vectors = config.row_vectors().into_iter().max().unwrap_or(1);
        let rows_held = (total_rows.min(8) as u32).next_power_of_two();
        let fits = |rows: u32, lanes: u32| {
            vectors.div_ceil(lanes) <= 2 && rows * vectors.div_ceil(lanes) * (16 / element) <= HELD
        };
        let lanes = [4, 8, 16].into_iter().find(|lanes| fits(rows_held, *lanes)).unwrap_or(32);
        // Of the widest heads fewer rows fit.
        let rows = (HELD / (vectors.div_ceil(lanes) * (16 / element))).clamp(1, rows_held);
        let rows = 1 << rows.ilog2();
        // A workgroup of one subgroup waits for nobody else at its barriers.
        let threads = 32;
        let slots = threads / lanes;
        let steps = if slots > 4 { 2 } else { 4 };
        // Twice as many workgroups as run at a time on the largest devices.
        let workgroups: u64 = match capabilities.class {
            DeviceClass::Nvidia => 2640,
            DeviceClass::Software => 8,
            _ => 1024,
        };
        let groups = (groups as u64 * (total_rows as u64).div_ceil(rows.into())).max(1);
        let splits = (workgroups / groups).max(1) as u32;
        DecodeTiling { threads, lanes, rows, steps, exchanged: 2, splits }
    }

    /// Whether the numbers fit together, a cache and a device.
    pub(crate) fn check(
        &self,
        config: &CacheConfig,
        variant: &CacheVariant,
        capabilities: &Capabilities,
    ) -> Result<()> {
        let DecodeTiling { threads, lanes, rows, steps, exchanged, splits } = *self;
        let unfit = |reason: String| Err(Error::NoKernel { problem: format!("decoding with {self}"), reason });
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
        let tile = self.tile();
        if let CacheKind::Paged { page_size, .. } = config.kind
            && tile as usize > page_size
        {
            return unfit(format!("a tile of {tile} keys does not fit a page of {page_size}"));
        }
        for (what, needed, offered) in [
            ("bytes of workgroup memory", variant.workgroup_bytes(), capabilities.workgroup_bytes),
            ("threads in a workgroup", threads, capabilities.workgroup_threads),
        ] {
            if needed > offered {
                return unfit(format!("it needs {needed} {what}, the device offers {offered}"));
            }
        }
        Ok(())
    }

    /// How the keys are split, in partial results of at most so many splits.
    pub(crate) fn split(&self, config: &CacheConfig, capabilities: &Capabilities, fitting: u32) -> Split {
        let tiles = (config.most_keys() as u64).div_ceil(self.tile().into());
        let least_tiles = LEAST_KEYS.div_ceil(self.tile());
        // No more than there can be.
        let sensible = tiles.div_ceil(least_tiles.into()).clamp(1, fitting.max(1).into()) as u32;
        let needed = if capabilities.loop_iterations.is_some() { tiles.div_ceil(MOST_TILES) } else { 1 };
        let splits = self.splits.max(needed.min(u32::MAX.into()) as u32).min(sensible);
        let most = splits.saturating_mul(MORE_SPLITS).min(sensible);
        Split { splits, most, long_tiles: LONG_KEYS.div_ceil(self.tile()), least_tiles }
    }
}

impl fmt::Display for DecodeTiling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let DecodeTiling { threads, lanes, rows, steps, exchanged, splits } = self;
        write!(f, "{threads}x{lanes} rows {rows}, steps {steps} by {exchanged}, splits {splits}")
    }
}

impl FromStr for DecodeTiling {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let want = || format!("{text:?}: want such as \"32x8 rows 8, steps 4 by 2, splits 330\"");
        let numbers: Vec<u32> = text
            .split(|c: char| !c.is_ascii_digit())
            .filter(|part| !part.is_empty())
            .map(|part| part.parse().map_err(|_| want()))
            .collect::<Result<_, _>>()?;
        let [threads, lanes, rows, steps, exchanged, splits] = numbers[..] else { return Err(want()) };
        let tiling = DecodeTiling { threads, lanes, rows, steps, exchanged, splits };
        if tiling.to_string() == text { Ok(tiling) } else { Err(want()) }
    }
}

/// The keys that the queries of a sequence see together; twin of key_range in shaders/cache/range.wgsl.
pub(crate) fn splits(keys: usize, queries: usize, bounds: &Bounds, tile: u32, split: &Split) -> u32 {
    let tile = i64::from(tile);
    let keys = keys as i64;
    let start = (keys - queries as i64 - i64::from(bounds.left)).clamp(0, keys);
    let tiles = |keys: i64| (keys + tile - 1) / tile;
    let sink_tiles = tiles(i64::from(bounds.sink_tokens).min(start));
    let end = tiles(keys);
    let first = (start / tile).max(sink_tiles).min(end);
    let all = (sink_tiles + end - first) as u64;
    let even = all.div_ceil(split.splits.into()).min(split.long_tiles.into());
    let split_tiles = all.div_ceil(split.most.into()).max(even).max(split.least_tiles.into());
    all.div_ceil(split_tiles) as u32
}

/// How keys are split among workgroups.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Split {
    pub(crate) splits: u32,
    /// Where a split would have more tiles than `long_tiles`.
    pub(crate) most: u32,
    pub(crate) long_tiles: u32,
    /// Of a split.
    pub(crate) least_tiles: u32,
}

/// How far queries see, in numbers that shaders count with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Bounds {
    pub(crate) left: i32,
    pub(crate) right: i32,
    pub(crate) sink_tokens: u32,
}

/// Farther than any position.
pub(crate) const UNBOUNDED: i32 = 1 << 30;

/// Vectors of 16 bytes of a row.
pub(crate) fn vectors(width: usize, dtype: DType) -> u32 {
    width.saturating_mul(dtype.bytes()).div_ceil(16) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tiling_reads_what_it_writes() {
        let config = CacheConfig {
            kind: CacheKind::Contiguous { capacity: 100 },
            sequences: 1,
            kv_heads: 8,
            head_dim: 64,
            value_dim: 64,
            dtype: DType::F16,
            rotary: None,
        };
        let tiling = DecodeTiling::new(&config, 8, 8, &Capabilities::webgpu_defaults());
        assert_eq!(tiling.to_string(), "32x8 rows 8, steps 4 by 2, splits 128");
        assert_eq!(tiling.to_string().parse(), Ok(tiling));
    }

    /// By brute force: the tiles in which some query sees something, shared out evenly.
    #[test]
    fn splits_are_those_of_tiles_with_something_visible() {
        for keys in [0usize, 1, 15, 16, 17, 64, 100, 200] {
            for (queries, left, sink_tokens) in
                [(1, UNBOUNDED, 0), (1, 0, 0), (3, 5, 2), (16, 40, 17), (2, 30, 100), (1, 10, 16)]
            {
                let bounds = Bounds { left, right: 0, sink_tokens };
                let sees = |m: i64, j: i64| {
                    let p = keys as i64 - queries as i64 + m;
                    j <= p && (j >= p - i64::from(left) || j < i64::from(sink_tokens))
                };
                let tiles = (0..keys.div_ceil(16))
                    .filter(|tile| {
                        let end = (16 * tile + 16).min(keys) as i64;
                        (16 * *tile as i64..end).any(|j| (0..queries as i64).any(|m| sees(m, j)))
                    })
                    .count();
                let of = |each: usize| tiles.div_ceil(each);
                for (numbers, each) in [
                    ([1, 1, 100, 1], tiles.max(1)),
                    ([3, 3, 100, 1], of(3).max(1)),
                    ([1000, 1000, 100, 1], 1),
                    ([1000, 1000, 100, 4], 4),
                    // Splits of more than two tiles are halved.
                    ([3, 6, 2, 1], if of(3) <= 2 { of(3).max(1) } else { of(6).max(2) }),
                ] {
                    let [splits, most, long_tiles, least_tiles] = numbers;
                    let split = Split { splits, most, long_tiles, least_tiles };
                    let splits = super::splits(keys, queries, &bounds, 16, &split);
                    assert_eq!(splits as usize, of(each), "{keys} {queries} {bounds:?} {split:?}");
                }
            }
        }
    }
}
