{#- The keys of a sequence that its queries see together, in tiles of keys, and the splits of these tiles among workgroups. A key's place is
    its number in the order of time, counted without the keys that a rolling cache has given up.
    Needs: params.wgsl; the lengths in `state`; `tile`, `rolling`. Declares: TILE, KeyRange, key_range, visible, tile_start. -#}
const TILE: u32 = {{ tile }}u;

// Places of keys, tiles of sink tokens before the window, first tile of the window, tiles in all, tiles of a split and splits.
struct KeyRange { keys: u32, sink_tiles: u32, first: u32, tiles: u32, split_tiles: u32, splits: u32 }

// Twin of `splits` in src/plan/splits.rs.
fn key_range(sequence: u32) -> KeyRange {
# if rolling
  let keys = min(state[params.current + sequence], params.sink_rows + params.window_rows);
# else
  let keys = state[params.current + sequence];
# endif
  // The first key of the window of the first query.
  let start = u32(clamp(i32(keys) - i32(params.queries) - params.left, 0, i32(keys)));
  let sink_tiles = (min(params.sink_tokens, start) + TILE - 1u) / TILE;
  let end = (keys + TILE - 1u) / TILE;
  let first = min(max(start / TILE, sink_tiles), end);
  let tiles = sink_tiles + end - first;
  // Fewer splits where the many would be short.
  let even = (tiles + params.splits - 1u) / params.splits;
  let more = (tiles + params.most_splits - 1u) / params.most_splits;
  let split_tiles = max(max(more, min(even, params.long_tiles)), params.least_tiles);
  return KeyRange(keys, sink_tiles, first, tiles, split_tiles, (tiles + split_tiles - 1u) / split_tiles);
}

// Whether a query at a position among the places sees a key.
fn visible(position: i32, place: u32, keys: u32) -> bool {
  let key = i32(place);
  return place < keys && key <= position + params.right && (key >= position - params.left || place < params.sink_tokens);
}

// The place of the first key of a tile.
fn tile_start(range: KeyRange, tile: u32) -> u32 {
  return select(tile - range.sink_tiles + range.first, tile, tile < range.sink_tiles) * TILE;
}
