//! Decisions of decoding: how threads and workgroups share the rows and keys of a group.

use std::fmt;
use std::str::FromStr;

use crate::device::capabilities::{Capabilities, CooperativeMatrices, DeviceClass};
use crate::kernel::tile::decode::{DecodeTiles, cooperative_bytes};
use crate::problem::cache::CacheConfig;
use crate::problem::element::DType;
use crate::problem::row_format::Bounds;

/// How the decode kernel divides its work. Its text is `32x8 rows 8, steps 4 by 2, splits 330`, `cooperative rows 8, columns 1, ahead 2,
/// splits 330` or `fragments 4x1 rows 8, columns 1, ahead 2, splits 33`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct DecodeTiling {
    /// A workgroup's share.
    pub tiles: DecodeTiles,
    /// Splits of the keys. There are fewer if each would have less than 64 keys. The portable kernel has up to four times as many if each
    /// would have more than 512.
    pub splits: u32,
}

/// Most numbers of q, and of the result, that a thread holds.
const HELD: u32 = 64;
/// The same in vectors of 16 bytes of operands, where threads have 128 registers: M1 and Adreno 740 spill beyond it, and with four keys at a time, in
/// bf16 with two (benches/results/2026-12-01-compilers.md).
const HELD_BY_FEW: u32 = 4;
/// Words of tiles that a lane of the cooperative kernel loads at a time.
const UNDER_WAY: u32 = 96;
/// The same of the kernel on fragments, where Q and O take registers, too.
const FRAGMENTS_UNDER_WAY: u32 = 64;
/// Subgroups of a workgroup of the kernel on fragments, and workgroups that a multiprocessor runs at a time (H200,
/// benches/results/2026-11-30-h200-decode.md). A few narrow rows take many subgroups with one tile ahead each, one workgroup at a time: the driver
/// then keeps to 128 registers.
const SUBGROUPS: u32 = 4;
const FRAGMENTS_RESIDENT: u32 = 2;
const MANY_SUBGROUPS: u32 = 16;
/// Widths of keys and values together with which two rows of fragments fit the registers.
const NARROW: u32 = 128;
/// Fewer keys than this are not worth a workgroup of their own.
const LEAST_KEYS: u32 = 64;
/// With more keys than this, the start and the end of a workgroup take little time, and more workgroups share the work more evenly.
const LONG_KEYS: u32 = 512;
const MORE_SPLITS: u32 = 4;
/// Most iterations of a thread's loops, for drivers that end long loops.
const MOST_ITERATIONS: u64 = 50_000;

impl DecodeTiling {
    /// A tiling on cooperative matrices, for the rows of a group and `groups` groups in all. An error says why they cannot serve.
    pub(crate) fn cooperative(
        config: &CacheConfig,
        total_rows: usize,
        groups: usize,
        several: bool,
        capabilities: &Capabilities,
    ) -> Result<Self, String> {
        let matrices = capabilities.cooperative.filter(CooperativeMatrices::is_sound);
        let side = matrices.map_or(16, |matrices| matrices.side);
        let rows = if total_rows > 8 { side } else { 8 };
        let lanes = matrices.map_or(32, |matrices| matrices.lanes);
        // As many tiles as registers hold. llvmpipe takes seconds to compile a kernel, the longer the more products it has, so it gets one.
        let words = side * (config.head_dim + config.value_dim) as u32 / 2 / lanes;
        let ahead =
            if capabilities.class == DeviceClass::Software { 1 } else { (UNDER_WAY / words.max(1)).clamp(1, 3) };
        // The fewest columns that the lanes can share.
        let of = |columns| {
            let tiles = DecodeTiles::Cooperative { rows, columns, ahead };
            tiles.lacks(config, several, matrices).map_or(Ok(tiles), Err)
        };
        let tiles = of(1).or_else(|reason| of(2).or_else(|_| of(4)).map_err(|_| reason))?;
        let groups = groups.max(1) * total_rows.div_ceil(rows as usize);
        let splits = match capabilities.multiprocessor {
            Some(multiprocessor) => {
                let widths = [config.head_dim, config.value_dim].map(|width| width as u32);
                let bytes = cooperative_bytes(widths, tiles.keys(matrices), side);
                let resident = (multiprocessor.workgroup_bytes / bytes).max(1);
                even_splits(groups, multiprocessor.count.max(1).saturating_mul(resident) as usize)
            }
            None => (capabilities.small_workgroups() / groups as u64).max(1) as u32,
        };
        Ok(DecodeTiling { tiles, splits })
    }

    /// A tiling on fragments, for the rows of a group and `groups` groups in all. An error says why they cannot serve.
    pub(crate) fn fragments(
        config: &CacheConfig,
        total_rows: usize,
        groups: usize,
        capabilities: &Capabilities,
    ) -> Result<Self, String> {
        let matrices = capabilities.cooperative.filter(CooperativeMatrices::is_sound);
        let [side, lanes] = matrices.map_or([16, 32], |matrices| [matrices.side, matrices.lanes]);
        let width = (config.head_dim + config.value_dim) as u32;
        let is_software = capabilities.class == DeviceClass::Software;
        // A second row of fragments fits the registers of narrow rows. llvmpipe takes seconds to compile a kernel, the longer the more products
        // it has.
        let most = if width > NARROW || is_software { side } else { 2 * side };
        let rows = if total_rows <= 8 { 8 } else { (total_rows as u32).next_multiple_of(side).min(most) };
        let is_small = total_rows <= 8 && width <= NARROW && !is_software;
        let fitting = (capabilities.workgroup_threads / lanes).max(1);
        let subgroups = if is_small { MANY_SUBGROUPS } else { SUBGROUPS }.min(1 << fitting.ilog2());
        let row_parts = (total_rows as u32).div_ceil(rows).next_power_of_two().min(subgroups);
        let key_parts = if is_software { 2 } else { subgroups / row_parts };
        let words = side * width / 2 / lanes;
        let ahead =
            if is_software || is_small || rows > side { 1 } else { (FRAGMENTS_UNDER_WAY / words.max(1)).clamp(1, 3) };
        let tiles = DecodeTiles::Fragments { key_parts, row_parts, rows, columns: 1, ahead };
        if let Some(reason) = tiles.lacks(config, true, matrices) {
            return Err(reason);
        }
        let groups = groups.max(1) * total_rows.div_ceil(tiles.rows() as usize);
        let splits = match capabilities.multiprocessor {
            Some(multiprocessor) => {
                let resident = if is_small { 1 } else { FRAGMENTS_RESIDENT };
                let at_a_time = multiprocessor.count.max(1).saturating_mul(resident) as usize;
                even_splits(groups, at_a_time).max((at_a_time / groups) as u32)
            }
            None => (capabilities.small_workgroups() / u64::from(key_parts * row_parts) / groups as u64).max(1) as u32,
        };
        Ok(DecodeTiling { tiles, splits })
    }

    /// A tiling in plain WGSL, for the rows of a group and `groups` groups in all.
    pub(crate) fn portable(
        config: &CacheConfig,
        total_rows: usize,
        groups: usize,
        capabilities: &Capabilities,
    ) -> Self {
        let format = config.format();
        let elements = format.elements();
        let vectors = format.vectors(config.head_dim.max(config.value_dim));
        let most_rows = (total_rows.min(8) as u32).next_power_of_two();
        let few = capabilities.class.has_few_registers();
        // As many rows as fit, with as few threads a key as hold them. A key has no more threads than its row has vectors.
        let fits = |rows: u32, lanes: u32| {
            let held = vectors.div_ceil(lanes);
            (held <= 2 || lanes == 32)
                && if few { rows * held <= HELD_BY_FEW } else { rows * held * elements <= HELD }
                && lanes <= vectors.next_power_of_two().max(4)
        };
        let shapes = [8, 4, 2, 1].into_iter().flat_map(|rows| [4, 8, 16, 32].map(|lanes| [rows, lanes]));
        let shape = shapes.filter(|[rows, _]| *rows <= most_rows).find(|[rows, lanes]| fits(*rows, *lanes));
        let [rows, lanes] = shape.unwrap_or([1, 32]);
        // A workgroup of one subgroup does not wait for other subgroups at its barriers.
        let threads = 32;
        let slots = threads / lanes;
        // The scales of quantised rows take registers.
        let steps = if few && config.dtype == DType::Bf16 {
            1
        } else if few || slots > 4 || config.quantisation.is_some() {
            2
        } else {
            4
        };
        let groups = (groups as u64 * (total_rows as u64).div_ceil(rows.into())).max(1);
        let splits = (capabilities.small_workgroups() / groups).max(1) as u32;
        DecodeTiling { tiles: DecodeTiles::Portable { threads, lanes, rows, steps, exchanged: steps.min(2) }, splits }
    }

    /// The division of the keys into splits, if partial results of at most `fitting` splits fit.
    pub(crate) fn split(&self, config: &CacheConfig, tile: u32, capabilities: &Capabilities, fitting: u32) -> Split {
        let tiles = (config.most_keys() as u64).div_ceil(tile.into());
        let least_tiles = LEAST_KEYS.div_ceil(tile);
        // More splits than this would be too short, or would not fit.
        let sensible = tiles.div_ceil(least_tiles.into()).clamp(1, fitting.max(1).into()) as u32;
        let iterations = match (self.tiles, capabilities.cooperative) {
            // Loops over tiles, loops that hide pairs and raise the maximum, and the loop that rescales by quads.
            (DecodeTiles::Cooperative { .. }, Some(CooperativeMatrices { side, .. })) => {
                4 + config.value_dim as u64 / u64::from(side) * (1 + u64::from(side) / 4)
            }
            // The same loops; values that are not finite are added key by key.
            (DecodeTiles::Fragments { .. }, _) => 4 + u64::from(tile),
            _ => 1,
        };
        let needed =
            if capabilities.loop_iterations.is_some() { (tiles * iterations).div_ceil(MOST_ITERATIONS) } else { 1 };
        let splits = self.splits.max(needed.min(u32::MAX.into()) as u32).min(sensible);
        let most = match self.tiles {
            DecodeTiles::Portable { .. } => splits.saturating_mul(MORE_SPLITS).min(sensible),
            DecodeTiles::Cooperative { .. } | DecodeTiles::Fragments { .. } => splits,
        };
        Split { splits, most, long_tiles: LONG_KEYS.div_ceil(tile), least_tiles }
    }
}

impl fmt::Display for DecodeTiling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, splits {}", self.tiles, self.splits)
    }
}

impl FromStr for DecodeTiling {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let want = || {
            format!(
                "{text:?}: want such as \"32x8 rows 8, steps 4 by 2, splits 330\", \"cooperative rows 8, columns 1, ahead 2, \
                 splits 330\" or \"fragments 4x1 rows 8, columns 1, ahead 2, splits 33\""
            )
        };
        let numbers: Vec<u32> = text
            .split(|c: char| !c.is_ascii_digit())
            .filter(|part| !part.is_empty())
            .map(|part| part.parse().map_err(|_| want()))
            .collect::<Result<_, _>>()?;
        let tiling = match numbers[..] {
            [key_parts, row_parts, rows, columns, ahead, splits] if text.starts_with("fragments") => {
                DecodeTiling { tiles: DecodeTiles::Fragments { key_parts, row_parts, rows, columns, ahead }, splits }
            }
            [threads, lanes, rows, steps, exchanged, splits] => {
                DecodeTiling { tiles: DecodeTiles::Portable { threads, lanes, rows, steps, exchanged }, splits }
            }
            [rows, columns, ahead, splits] => {
                DecodeTiling { tiles: DecodeTiles::Cooperative { rows, columns, ahead }, splits }
            }
            _ => return Err(want()),
        };
        if tiling.to_string() == text { Ok(tiling) } else { Err(want()) }
    }
}

/// The fewest splits with which the groups keep a device busy to the end. The device runs `at_a_time` workgroups at a time.
fn even_splits(groups: usize, at_a_time: usize) -> u32 {
    let busy = |splits: usize| {
        let workgroups = groups * splits;
        workgroups as f64 / workgroups.next_multiple_of(at_a_time) as f64
    };
    let most = (4 * at_a_time).div_ceil(groups);
    let enough = (1..=most).find(|splits| busy(*splits) >= 0.96);
    enough.or_else(|| (1..=most).max_by(|a, b| busy(*a).total_cmp(&busy(*b)))).unwrap_or(1) as u32
}

/// Splits of the keys that the queries of a sequence see together. Twin of key_range in shaders/cache/range.wgsl.
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

/// The division of keys among workgroups.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Split {
    pub(crate) splits: u32,
    /// The number of splits if a split would otherwise have more tiles than `long_tiles`.
    pub(crate) most: u32,
    pub(crate) long_tiles: u32,
    /// Fewest tiles of a split.
    pub(crate) least_tiles: u32,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::elements::ElementLayout;
    use crate::problem::cache::{CacheKind, Rotary, RotaryPositions, RotaryStyle};
    use crate::problem::row_format::{Quantisation, UNBOUNDED};

    #[test]
    fn a_tiling_reads_what_it_writes() {
        let config = CacheConfig::new(CacheKind::Contiguous { capacity: 100 }, 1, 8, 64).dtype(DType::F16);
        let plain = Capabilities::webgpu_defaults();
        let matrices =
            CooperativeMatrices { side: 16, lanes: 32, guarded: false, in_step: false, elements: None, bf16: None };
        let fast = Capabilities { cooperative: Some(matrices), ..plain.clone() };
        let elements = Capabilities { cooperative: Some(matrices.elements(ElementLayout::NVIDIA)), ..plain.clone() };
        for (tiling, text) in [
            (DecodeTiling::portable(&config, 8, 8, &plain), "32x8 rows 4, steps 2 by 2, splits 64"),
            (
                DecodeTiling::cooperative(&config, 8, 8, false, &fast).unwrap(),
                "cooperative rows 8, columns 1, ahead 3, splits 128",
            ),
            (
                DecodeTiling::fragments(&config, 8, 8, &elements).unwrap(),
                "fragments 8x1 rows 8, columns 1, ahead 1, splits 16",
            ),
        ] {
            assert_eq!(tiling.to_string(), text);
            assert_eq!(tiling.to_string().parse(), Ok(tiling));
        }
    }

    #[test]
    fn what_cooperative_matrices_cannot_do() {
        let config =
            CacheConfig::new(CacheKind::Contiguous { capacity: 100 }, 1, 8, 64).value_dim(48).dtype(DType::F16);
        let matrices = |side, lanes| {
            Some(CooperativeMatrices { side, lanes, guarded: false, in_step: false, elements: None, bf16: None })
        };
        let lacks = |[rows, columns, ahead]: [u32; 3], config: &CacheConfig, several, matrices| {
            DecodeTiles::Cooperative { rows, columns, ahead }.lacks(config, several, matrices)
        };
        for (tiles, side, lanes) in [([8, 1, 1], 16, 32), ([16, 4, 4], 16, 32), ([8, 1, 2], 8, 8), ([8, 2, 3], 8, 32)] {
            assert_eq!(lacks(tiles, &config, false, matrices(side, lanes)), None, "{tiles:?} {side} {lanes}");
        }
        let ring = CacheKind::Rolling { sink_tokens: 4, window: 128, queries: 1 };
        let quantisation = Some(Quantisation::Q8_0);
        for (tiles, config, several, matrices, reason) in [
            ([8, 1, 1], config, false, None, "no cooperative matrices"),
            ([8, 3, 1], config, false, matrices(16, 32), "columns 1, 2 or 4"),
            ([8, u32::MAX, 1], config, false, matrices(16, 32), "not 8, 4294967295, 1"),
            ([12, 1, 1], config, false, matrices(16, 32), "rows are 8 or 16"),
            ([16, 1, 1], config, false, matrices(8, 32), "at most 8"),
            ([8, 1, 5], config, false, matrices(16, 32), "1 to 4"),
            ([8, 1, 1], config, false, matrices(8, 32), "32 lanes cannot share 8 rows of 8 keys"),
            // The lanes cannot share the vectors of a tile evenly.
            ([16, 1, 1], config, false, matrices(16, 64), "widths 64 and 48"),
            ([8, 1, 1], config, true, matrices(16, 32), "one query"),
            ([8, 1, 1], config.dtype(DType::Bf16), false, matrices(16, 32), "f16"),
            ([8, 1, 1], config.quantisation(quantisation), false, matrices(16, 32), "f16"),
            ([8, 1, 1], config.head_dim(24), false, matrices(16, 32), "not 24 and 48"),
            ([8, 1, 1], config.head_dim(256), false, matrices(16, 32), "up to 128"),
            ([8, 1, 1], config.kind(ring), false, matrices(16, 32), "ring"),
            ([8, 2, 1], config.kind(CacheKind::Contiguous { capacity: 31 }), false, matrices(16, 32), "capacity, 31"),
        ] {
            let found = lacks(tiles, &config, several, matrices);
            assert!(found.as_ref().is_some_and(|found| found.contains(reason)), "{reason}: {found:?}");
        }
    }

    #[test]
    fn what_fragments_cannot_do() {
        let config = CacheConfig::new(CacheKind::Contiguous { capacity: 100 }, 1, 8, 64).dtype(DType::F16);
        let matrices = |elements| CooperativeMatrices {
            side: 16,
            lanes: 32,
            guarded: false,
            in_step: false,
            elements,
            bf16: None,
        };
        let known = Some(ElementLayout::NVIDIA);
        let lacks = |[key_parts, row_parts, rows, columns, ahead]: [u32; 5], config: &CacheConfig, elements| {
            let tiles = DecodeTiles::Fragments { key_parts, row_parts, rows, columns, ahead };
            tiles.lacks(config, true, Some(matrices(elements)))
        };
        for tiles in [[4, 1, 8, 1, 2], [16, 1, 64, 2, 4], [1, 4, 16, 1, 1]] {
            assert_eq!(lacks(tiles, &config, known), None, "{tiles:?}");
        }
        let loaded = ElementLayout::NVIDIA.with_right(16, &[0; 256]);
        let rotary = Rotary { dim: 64, style: RotaryStyle::HalfSplit, positions: RotaryPositions::CacheRelative };
        for (tiles, config, elements, reason) in [
            ([3, 1, 8, 1, 1], config, known, "powers of two"),
            ([8, 4, 8, 1, 1], config, known, "at most 16"),
            ([1, 1, 24, 1, 1], config, known, "rows 8 or"),
            ([1, 1, 8, 4, 1], config, known, "columns are 1 or 2"),
            ([1, 1, 8, 1, 5], config, known, "1 to 4"),
            ([1, 1, 8, 1, 1], config, None, "no layout of elements"),
            ([1, 1, 8, 1, 1], config, Some(loaded), "no layout of right operands"),
            ([1, 1, 8, 1, 1], config.dtype(DType::Bf16), known, "f16"),
            ([1, 1, 8, 1, 1], config.quantisation(Some(Quantisation::Q8_0)), known, "f16"),
            ([1, 1, 8, 1, 1], config.head_dim(80), known, "multiples of 32 and 64 up to 128, not 80 and 64"),
            ([1, 1, 8, 1, 1], config.value_dim(96), known, "not 64 and 96"),
            ([1, 1, 8, 1, 1], config.head_dim(256), known, "up to 128"),
            ([1, 1, 8, 1, 1], config.rotary(Some(rotary)), known, "rotated as they are read"),
            ([1, 1, 8, 2, 1], config.kind(CacheKind::Contiguous { capacity: 31 }), known, "capacity, 31"),
        ] {
            let found = lacks(tiles, &config, elements);
            assert!(found.as_ref().is_some_and(|found| found.contains(reason)), "{reason}: {found:?}");
        }
    }

    #[test]
    fn fewer_tiles_of_wide_rows_are_under_way() {
        let samples = Capabilities::samples();
        let h200 = samples.iter().find(|device| device.name.contains("H200")).unwrap();
        for (width, text) in [
            (64, "cooperative rows 8, columns 1, ahead 3, splits 111"),
            (96, "cooperative rows 8, columns 1, ahead 2, splits 80"),
            (128, "cooperative rows 8, columns 1, ahead 1, splits 64"),
        ] {
            let config = CacheConfig::new(CacheKind::Contiguous { capacity: 1 << 16 }, 1, 8, width).dtype(DType::F16);
            assert_eq!(DecodeTiling::cooperative(&config, 8, 8, false, h200).unwrap().to_string(), text);
        }
    }

    #[test]
    fn fragments_of_few_rows_and_of_many() {
        let samples = Capabilities::samples();
        let h200 = samples.iter().find(|device| device.name.contains("H200")).unwrap();
        for (width, rows, groups, text) in [
            (64, 8, 8, "fragments 16x1 rows 8, columns 1, ahead 1, splits 16"),
            (64, 8, 64, "fragments 16x1 rows 8, columns 1, ahead 1, splits 2"),
            (64, 16, 8, "fragments 4x1 rows 16, columns 1, ahead 2, splits 33"),
            (64, 32, 8, "fragments 4x1 rows 32, columns 1, ahead 1, splits 33"),
            (64, 64, 8, "fragments 2x2 rows 32, columns 1, ahead 1, splits 33"),
            (64, 128, 8, "fragments 1x4 rows 32, columns 1, ahead 1, splits 33"),
            (64, 200, 8, "fragments 1x4 rows 32, columns 1, ahead 1, splits 16"),
            (128, 4, 8, "fragments 4x1 rows 8, columns 1, ahead 1, splits 33"),
            (128, 16, 8, "fragments 4x1 rows 16, columns 1, ahead 1, splits 33"),
        ] {
            let config = CacheConfig::new(CacheKind::Contiguous { capacity: 1 << 16 }, 1, 8, width).dtype(DType::F16);
            assert_eq!(DecodeTiling::fragments(&config, rows, groups, h200).unwrap().to_string(), text);
        }
    }

    /// An H200 runs 924 workgroups at a time.
    #[test]
    fn splits_fill_a_device_evenly() {
        for (groups, splits) in [(8, 111), (64, 14), (924, 1), (1024, 4), (100_000, 1)] {
            assert_eq!(even_splits(groups, 924), splits, "{groups}");
        }
    }

    /// Brute force: the tiles in which some query sees something, divided evenly.
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
