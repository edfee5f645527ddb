// Twins of src/mask.rs, under the same names.

{% if rows_are_keys %}
// The four queries from i on see key j.
fn visible4(j: u32, i: u32) -> vec4<bool> {
  let queries = vec4<u32>(i) + vec4<u32>(0u, 1u, 2u, 3u);
  let diagonal = vec4<i32>(i32(j)) - vec4<i32>(queries);
  return (queries < vec4<u32>(params.seq_q)) & (diagonal <= vec4<i32>(params.upper))
    & ((diagonal >= vec4<i32>(params.lower)) | vec4<bool>(j < params.sink_tokens));
}

// Tiles first..end of queries hold one that sees something of key0..key_end. One range: the queries that see
// a key lie in a row, up to the last query where the key is a sink token.
struct QueryTiles { first: u32, end: u32 }

fn query_tiles(key0: u32, key_end: u32) -> QueryTiles {
  let seq_q = i32(params.seq_q);
  let start = clamp(i32(key0) - params.upper, 0, seq_q);
  let end = select(clamp(i32(key_end) - params.lower, 0, seq_q), seq_q, key0 < params.sink_tokens);
  if (start >= end) { return QueryTiles(0u, 0u); }
  return QueryTiles(u32(start) / TILE_COLUMNS, (u32(end) + TILE_COLUMNS - 1u) / TILE_COLUMNS);
}
{% else %}
// Query i sees the four keys from j on.
fn visible4(i: u32, j: u32) -> vec4<bool> {
  let keys = vec4<u32>(j) + vec4<u32>(0u, 1u, 2u, 3u);
  let diagonal = vec4<i32>(keys) - vec4<i32>(i32(i));
  return (keys < vec4<u32>(params.seq_k)) & (diagonal <= vec4<i32>(params.upper))
    & ((diagonal >= vec4<i32>(params.lower)) | (keys < vec4<u32>(params.sink_tokens)));
}

// Tiles first..sink_end and window..end of keys hold something that a query of row0..row_end sees.
struct KeyTiles { first: u32, sink_end: u32, window: u32, end: u32 }

fn key_tiles(row0: u32, row_end: u32) -> KeyTiles {
  let end = u32(clamp(i32(row_end) + params.upper, 0, i32(params.seq_k)));
  let start = u32(clamp(i32(row0) + params.lower, 0, i32(end)));
  let sink_tiles = (min(params.sink_tokens, end) + TILE_COLUMNS - 1u) / TILE_COLUMNS;
  let end_tile = (end + TILE_COLUMNS - 1u) / TILE_COLUMNS;
  let window = max(select(end_tile, start / TILE_COLUMNS, start < end), sink_tiles);
  return KeyTiles(select(0u, window, sink_tiles == 0u), sink_tiles, window, max(end_tile, window));
}

fn next_tile(tiles: KeyTiles, tile: u32) -> u32 {
  return select(tile + 1u, tiles.window, tile + 1u == tiles.sink_end);
}
{% endif %}

// Whether every query of row0..row_end sees every key of key0..key_end.
fn all_visible(row0: u32, row_end: u32, key0: u32, key_end: u32) -> bool {
  let window = i32(row_end) - 1 + params.lower;
  return key_end <= params.seq_k && i32(key_end) - 1 <= i32(row0) + params.upper
    && max(i32(key0), i32(params.sink_tokens)) >= min(i32(key_end), window);
}
