//! Which keys a query sees, and the tile ranges that follow from it: the rule, once.
//!
//! Positions are folded into a band of diagonals on the host, so that kernels need no offset, no
//! flags and no 64-bit integers: with p = i + offset,
//!
//! ```text
//! j <= p + right   is   j <= i + upper      upper = offset + right
//! j >= p - left    is   j >= i + lower      lower = offset - left
//! ```
//!
//! `upper` and `lower` are clamped to [-M, N], where one more step changes nothing.
//! `shaders/mask.wgsl` holds the twins of these functions under the same names.

use std::ops::Range;

use crate::problem::options::{Alignment, Options};

/// The visibility rule of one sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Band {
    seq_q: i64,
    seq_k: i64,
    lower: i64,
    upper: i64,
    sink_tokens: i64,
    offset: i64,
}

/// Key tiles that a tile of queries has to visit, as tile indices: first the tiles that hold visible
/// sink tokens, then those of the window. The ranges never overlap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyTiles {
    /// Tiles with visible sink tokens that lie before the window.
    pub sink: Range<usize>,
    /// Tiles that the window (or plain causal or full attention) reaches.
    pub window: Range<usize>,
}

impl KeyTiles {
    /// All tiles in the order of the visit.
    pub fn iter(&self) -> impl Iterator<Item = usize> + use<> {
        self.sink.clone().chain(self.window.clone())
    }

    /// Number of tiles.
    pub fn count(&self) -> usize {
        self.sink.len() + self.window.len()
    }
}

/// The options of some of the keys, from number `start` on: query 0 stands at `offset` among all of them.
pub(crate) fn shard_options(options: &Options, offset: i64, start: usize) -> Options {
    let sink_tokens = options.sink_tokens.saturating_sub(start);
    options.sink_tokens(sink_tokens).query_offset(offset.saturating_sub_unsigned(start as u64))
}

/// Numbers of rows, keys and tiles beyond every problem count as the largest one.
fn signed(n: usize) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

/// The tile's size, unless it is 0, by which nothing can be divided.
fn tile_size(tile: usize) -> Option<i64> {
    (tile > 0).then(|| signed(tile))
}

/// Tiles that so many rows or keys take.
fn tiles_of(n: i64, tile: i64) -> i64 {
    n / tile + i64::from(n % tile > 0)
}

impl Band {
    /// Of so many queries and keys, each at most 2^29.
    pub(crate) fn new(seq_q: usize, seq_k: usize, options: &Options) -> Self {
        let (m, n) = (seq_q as i64, seq_k as i64);
        let offset = options.query_offset.unwrap_or(match options.alignment {
            Alignment::BottomRight => n - m,
            Alignment::TopLeft => 0,
        });
        let right = if options.causal { Some(0) } else { options.window.right };
        // i128: the sum of any offset and any bound is exact.
        let diagonal = |signed: i128| (i128::from(offset) + signed).clamp(-m as i128, n as i128) as i64;
        Band {
            seq_q: m,
            seq_k: n,
            lower: options.window.left.map_or(-m, |left| diagonal(-(left as i128))),
            upper: right.map_or(n, |right| diagonal(right as i128)),
            sink_tokens: options.sink_tokens.min(seq_k) as i64,
            offset,
        }
    }

    /// The same queries before some of the keys, `keys` from number `start` on.
    pub(crate) fn shard(&self, start: usize, keys: usize, options: &Options) -> Self {
        Band::new(self.seq_q(), keys, &shard_options(options, self.offset, start))
    }

    /// Queries, M.
    pub fn seq_q(&self) -> usize {
        self.seq_q as usize
    }

    /// Keys, N.
    pub fn seq_k(&self) -> usize {
        self.seq_k as usize
    }

    /// Position of query 0 among the keys.
    pub fn offset(&self) -> i64 {
        self.offset
    }

    /// First visible diagonal: key j >= i + lower, unless it is a sink token.
    pub fn lower(&self) -> i32 {
        self.lower as i32
    }

    /// Last visible diagonal: key j <= i + upper.
    pub fn upper(&self) -> i32 {
        self.upper as i32
    }

    /// Keys exempt from the lower bound, at most N.
    pub fn sink_tokens(&self) -> u32 {
        self.sink_tokens as u32
    }

    /// Most keys that a query sees: those of its window, at most N, and the sink tokens.
    pub(crate) fn most_visible(&self) -> usize {
        ((self.upper - self.lower + 1).min(self.seq_k) + self.sink_tokens) as usize
    }

    /// Whether query i sees key j.
    pub fn visible(&self, i: usize, j: usize) -> bool {
        let (i, j) = (signed(i), signed(j));
        i < self.seq_q && j < self.seq_k && j <= i + self.upper && (j >= i + self.lower || j < self.sink_tokens)
    }

    /// The keys that query i sees: its sink tokens before the window, then its window.
    pub fn visible_keys(&self, i: usize) -> [Range<usize>; 2] {
        let end = signed(i).saturating_add(self.upper + 1).clamp(0, self.seq_k);
        let start = signed(i).saturating_add(self.lower).clamp(0, end);
        let sink_end = self.sink_tokens.min(start);
        [0..sink_end as usize, start as usize..end as usize]
    }

    /// The tiles of `tile` keys in which some query of `rows` sees something; there are no tiles of 0 keys.
    ///
    /// Between a row range's first and last window every key is visible to some row, so no tile
    /// is visited in vain: a brute-force test holds this against [`Band::visible`].
    pub fn key_tiles(&self, rows: &Range<usize>, tile: usize) -> KeyTiles {
        let Some(tile) = tile_size(tile) else { return KeyTiles { sink: 0..0, window: 0..0 } };
        let end = signed(rows.end).saturating_add(self.upper).clamp(0, self.seq_k);
        let start = signed(rows.start).saturating_add(self.lower).clamp(0, end);
        let tiles = |keys: i64| tiles_of(keys, tile);
        let sink_tiles = tiles(self.sink_tokens.min(end));
        let window_start = if start < end { start / tile } else { tiles(end) }.max(sink_tiles);
        let window_end = tiles(end).max(window_start);
        KeyTiles { sink: 0..sink_tiles as usize, window: window_start as usize..window_end as usize }
    }

    /// The tiles of `tile` queries in which some query sees something of `keys`: one range; there are no tiles of 0
    /// queries.
    ///
    /// Key j is seen by the queries from j - upper to j - lower; never none, as lower <= upper. One key
    /// further, both ends move by one, so what the keys of a range are seen by has no gap. A sink token
    /// is seen by all queries from j - upper on, which is more than any key after it is seen by.
    pub fn query_tiles(&self, keys: &Range<usize>, tile: usize) -> Range<usize> {
        let Some(tile) = tile_size(tile) else { return 0..0 };
        let (first, last) = (signed(keys.start), signed(keys.end) - 1);
        let end = if first < self.sink_tokens {
            self.seq_q
        } else {
            last.saturating_sub(self.lower - 1).clamp(0, self.seq_q)
        };
        let start = first.saturating_sub(self.upper).clamp(0, end);
        let end_tile = tiles_of(end, tile);
        (if start < end { start / tile } else { end_tile }) as usize..end_tile as usize
    }

    /// Whether every query of `rows` sees every key of `keys`, so that nothing need be masked.
    pub fn all_visible(&self, rows: &Range<usize>, keys: &Range<usize>) -> bool {
        let (first, last) = (signed(rows.start), signed(rows.end) - 1);
        let (start, end) = (signed(keys.start), signed(keys.end));
        last < self.seq_q
            && end <= self.seq_k
            && end - 1 <= first.saturating_add(self.upper)
            && start.max(self.sink_tokens) >= end.min(last + self.lower) // no key between the sinks and the window
    }

    /// How many of [`key_tiles`](Self::key_tiles) are [`all_visible`](Self::all_visible), counted without a visit.
    ///
    /// A tile at the end of the keys that is not whole never counts: a kernel has to mask what lies beyond.
    pub fn full_tiles(&self, rows: &Range<usize>, tile: usize) -> usize {
        let visited = self.key_tiles(rows, tile);
        let Some(tile) = tile_size(tile) else { return 0 };
        let (first, last) = (signed(rows.start), signed(rows.end) - 1);
        // Whole tiles up to the last key of the first query ...
        let end = first.saturating_add(self.upper + 1).clamp(0, self.seq_k) / tile;
        // ... less those that reach into the gap between the sink tokens and the first key of the last query.
        let start = last.saturating_add(self.lower);
        let gap = if self.sink_tokens < start { [self.sink_tokens / tile, tiles_of(start, tile)] } else { [end, 0] };
        let count = |tiles: Range<usize>, from: i64, to: i64| {
            ((tiles.end as i64).min(to) - (tiles.start as i64).max(from)).max(0) as usize
        };
        count(visited.sink, 0, end.min(gap[0])) + count(visited.window, gap[1], end)
    }

    /// Number of (query, key) pairs that are visible, for one head of one sequence.
    pub fn visible_pairs(&self) -> u64 {
        (0..self.seq_q as usize).map(|i| self.visible_keys(i).iter().map(|r| r.len() as u64).sum::<u64>()).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::problem::{Problem, Shape, Window};

    /// Numbers that no kernel asks for: none panics, and of no keys or queries there are no tiles.
    #[test]
    fn ranges_of_any_numbers() {
        let shape = Shape { batch: 1, heads: 1, kv_heads: 1, seq_q: 7, seq_k: 11, head_dim: 1, value_dim: 1 };
        for options in [Options::new(), Options::new().causal(true).window(Window::keys(3)).sink_tokens(2)] {
            let problem = Problem::new(shape, options).unwrap();
            let band = Band::new(shape.seq_q, shape.seq_k, problem.options());
            let numbers = [0, 1, 7, 11, 12, i64::MAX as usize, usize::MAX];
            for start in numbers {
                let _ = band.visible_keys(start);
                assert!(!band.visible(start, usize::MAX));
                for end in numbers {
                    let range = start..end;
                    let _ = band.all_visible(&range, &(0..end));
                    for tile in [1, 4, i64::MAX as usize, usize::MAX] {
                        let _ = (band.key_tiles(&range, tile), band.query_tiles(&range, tile));
                        let _ = band.full_tiles(&range, tile);
                    }
                    assert_eq!(band.key_tiles(&range, 0).count(), 0);
                    assert_eq!((band.query_tiles(&range, 0), band.full_tiles(&range, 0)), (0..0, 0));
                }
            }
            assert_eq!(band.key_tiles(&(0..7), usize::MAX).count(), 1);
            assert_eq!(band.query_tiles(&(0..11), usize::MAX), 0..1);
        }
    }

    /// Every small problem: the rule of the specification, spelled out.
    fn small_problems() -> impl Iterator<Item = (Problem, impl Fn(usize, usize) -> bool)> {
        let bounds = [None, Some(0), Some(1), Some(4), Some(usize::MAX)];
        let mut problems = Vec::new();
        for (m, n) in [(1, 1), (1, 9), (3, 3), (5, 2), (7, 11), (12, 7)] {
            for left in bounds {
                for right in bounds {
                    for causal in [false, true] {
                        for sink_tokens in [0, 1, 3, 50] {
                            for offset in [None, Some(0), Some(-3), Some(6), Some(i64::MAX), Some(i64::MIN)] {
                                let options = Options {
                                    causal,
                                    window: Window { left, right },
                                    sink_tokens,
                                    query_offset: offset,
                                    ..Options::default()
                                };
                                let shape = Shape {
                                    batch: 1,
                                    heads: 1,
                                    kv_heads: 1,
                                    seq_q: m,
                                    seq_k: n,
                                    head_dim: 1,
                                    value_dim: 1,
                                };
                                problems.push((Problem::new(shape, options).unwrap(), m, n));
                            }
                        }
                    }
                }
            }
        }
        problems.into_iter().map(|(problem, m, n)| {
            let o = *problem.options();
            let rule = move |i: usize, j: usize| {
                let p = i as i128 + i128::from(o.query_offset.unwrap_or(n as i64 - m as i64));
                let right = if o.causal { Some(0) } else { o.window.right };
                let j_ = j as i128;
                right.is_none_or(|r| j_ <= p + r as i128)
                    && (o.window.left.is_none_or(|l| j_ >= p - l as i128) || j < o.sink_tokens)
            };
            (problem, rule)
        })
    }

    #[test]
    fn visible_is_the_rule() {
        for (problem, rule) in small_problems() {
            let mask = problem.sequences().next().unwrap().band;
            let mut pairs = 0;
            for i in 0..problem.shape().seq_q {
                let listed: Vec<usize> = mask.visible_keys(i).into_iter().flatten().collect();
                for j in 0..problem.shape().seq_k {
                    assert_eq!(mask.visible(i, j), rule(i, j), "{problem} i={i} j={j}");
                    assert_eq!(listed.contains(&j), rule(i, j), "{problem} i={i} j={j}");
                    pairs += u64::from(rule(i, j));
                }
                assert!(listed.is_sorted());
            }
            assert_eq!(mask.visible_pairs(), pairs, "{problem}");
        }
    }

    #[test]
    fn tiles_are_those_with_something_visible() {
        for (problem, rule) in small_problems() {
            let (m, n) = (problem.shape().seq_q, problem.shape().seq_k);
            let mask = problem.sequences().next().unwrap().band;
            for (query_tile, tile) in [(1, 1), (2, 3), (4, 2), (5, 4), (16, 16)] {
                for i0 in (0..m).step_by(query_tile) {
                    let rows = i0..(i0 + query_tile).min(m);
                    let visited: Vec<usize> = mask.key_tiles(&rows, tile).iter().collect();
                    let mut full = 0;
                    for t in 0..n.div_ceil(tile) {
                        let keys = t * tile..((t + 1) * tile).min(n);
                        let any = rows.clone().any(|i| keys.clone().any(|j| rule(i, j)));
                        let all = rows.clone().all(|i| keys.clone().all(|j| rule(i, j)));
                        assert_eq!(visited.contains(&t), any, "{problem} rows {rows:?} keys {keys:?}");
                        assert_eq!(mask.all_visible(&rows, &keys), all, "{problem} rows {rows:?} keys {keys:?}");
                        full += usize::from(any && all && keys.len() == tile);
                    }
                    assert_eq!(mask.full_tiles(&rows, tile), full, "{problem} rows {rows:?} tile {tile}");
                    assert!(visited.is_sorted() && visited.windows(2).all(|w| w[0] < w[1]), "{problem}");
                }
            }
        }
    }

    #[test]
    fn query_tiles_are_those_that_see_something() {
        for (problem, rule) in small_problems() {
            let (m, n) = (problem.shape().seq_q, problem.shape().seq_k);
            for (tile, key_tile) in [(1, 1), (2, 3), (4, 2), (5, 4), (16, 16)] {
                for j0 in (0..n).step_by(key_tile) {
                    let keys = j0..(j0 + key_tile).min(n);
                    let visited = problem.sequences().next().unwrap().band.query_tiles(&keys, tile);
                    assert!(visited.end <= m.div_ceil(tile), "{problem} keys {keys:?}");
                    for t in 0..m.div_ceil(tile) {
                        let rows = t * tile..((t + 1) * tile).min(m);
                        let any = rows.clone().any(|i| keys.clone().any(|j| rule(i, j)));
                        assert_eq!(visited.contains(&t), any, "{problem} rows {rows:?} keys {keys:?}");
                    }
                }
            }
        }
    }
}
