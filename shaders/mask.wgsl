{#- The visibility rule, for pairs and for tiles. Twins of src/problem/mask.rs, under the same names; `Sequence` of
    src/problem/varlen.rs.
    Needs: params.wgsl, tile_work.wgsl. Declares: Sequence, load_sequence, visible4; KeyTiles and its functions, or QueryTiles where the
    tile's rows are keys; FullTiles. -#}
// A sequence: its place along the batch axis, its rows and keys in memory, and the numbers of the band.
struct Sequence {
  entry: u32,
  q_start: u32,
  q_rows: u32,
  seq_q: u32,
  k_start: u32,
  k_rows: u32,
  seq_k: u32,
  sink_tokens: u32,
  lower: i32,
  upper: i32,
  offset: i32,
}

// Functions get the sequence as an argument: a private variable would not be known to be the same for all threads of a workgroup.
fn load_sequence(index: u32) -> Sequence {
# if lengths
  let at = index * {{ sequence_words }}u;
  return Sequence(
    sequences[at], sequences[at + 1u], sequences[at + 2u], sequences[at + 3u],
    sequences[at + 4u], sequences[at + 5u], sequences[at + 6u], sequences[at + 7u],
    i32(sequences[at + 8u]), i32(sequences[at + 9u]), i32(sequences[at + 10u]),
  );
# else
  return Sequence(
    index, 0u, params.seq_q, params.seq_q, 0u, params.seq_k, params.seq_k,
    params.sink_tokens, params.lower, params.upper, params.offset,
  );
# endif
}

# if rows_are_keys
// Whether each of the four queries of a quad from i on sees key j. The queries that see a key are consecutive.
fn visible4(seq: Sequence, j: u32, i: u32) -> vec4<bool> {
  let seq_q = i32(seq.seq_q);
  let start = clamp(i32(j) - seq.upper, 0, seq_q);
  let end = select(clamp(i32(j) + 1 - seq.lower, start, seq_q), seq_q, j < seq.sink_tokens);
  let queries = vec4<u32>(i - u32(start)) + vec4<u32>({{ quad_steps | join("u, ") }}u);
  return (queries < vec4<u32>(u32(end - start))){% if lengths %} & vec4<bool>(j < seq.seq_k){% endif %};
}

// The tiles first..end of queries see keys of key0..key_end. They are one range: the queries that see a key are consecutive, and a sink
// token is seen up to the last query.
struct QueryTiles { first: u32, end: u32 }

fn query_tiles(seq: Sequence, key0: u32, key_end: u32) -> QueryTiles {
  let seq_q = i32(seq.seq_q);
  let start = clamp(i32(key0) - seq.upper, 0, seq_q);
  let end = select(clamp(i32(key_end) - seq.lower, 0, seq_q), seq_q, key0 < seq.sink_tokens);
  if (start >= end || key0 >= key_end) { return QueryTiles(0u, 0u); }
  return QueryTiles(u32(start) / TILE_COLUMNS, (u32(end) + TILE_COLUMNS - 1u) / TILE_COLUMNS);
}
# else
// Whether query i sees each of the four keys of a quad from j on: keys of its window, which are consecutive, and sink tokens.
fn visible4(seq: Sequence, i: u32, j: u32) -> vec4<bool> {
  let end = clamp(i32(i) + 1 + seq.upper, 0, i32(seq.seq_k));
  let start = clamp(i32(i) + seq.lower, 0, end);
  let sinks = min(seq.sink_tokens, u32(end));
  let keys = vec4<u32>(j) + vec4<u32>({{ quad_steps | join("u, ") }}u);
  return ((keys - vec4<u32>(u32(start)) < vec4<u32>(u32(end - start))) | (keys < vec4<u32>(sinks))){% if lengths %} & vec4<bool>(i < seq.seq_q){% endif %};
}

// Queries of row0..row_end see keys of the tiles first..sink_end and window..end.
# if mirrored
// Tiles are counted from the last one, tile 0, back to the first, whose number is `mirror`.
# endif
struct KeyTiles { first: u32, sink_end: u32, window: u32, end: u32{{ ", mirror: u32" if mirrored }} }

fn key_tiles(seq: Sequence, row0: u32, row_end: u32) -> KeyTiles {
  // The tile lies beyond the end of a padded sequence.
  if (row0 >= row_end) { return KeyTiles(0u, 0u, 0u, 0u{{ ", 0u" if mirrored }}); }
  let end = u32(clamp(i32(row_end) + seq.upper, 0, i32(seq.seq_k)));
  let start = u32(clamp(i32(row0) + seq.lower, 0, i32(end)));
  let sink_tiles = (min(seq.sink_tokens, end) + TILE_COLUMNS - 1u) / TILE_COLUMNS;
  let end_tile = (end + TILE_COLUMNS - 1u) / TILE_COLUMNS;
  let window = max(select(end_tile, start / TILE_COLUMNS, start < end), sink_tiles);
  let first = select(0u, window, sink_tiles == 0u);
  let tiles_end = max(end_tile, window);
# if mirrored
  return KeyTiles(0u, tiles_end - window, tiles_end - sink_tiles, tiles_end - first, tiles_end - 1u);
# else
  return KeyTiles(first, sink_tiles, window, tiles_end);
# endif
}

fn first_column(tiles: KeyTiles, tile: u32) -> u32 {
  return {{ "(tiles.mirror - tile)" if mirrored else "tile" }} * TILE_COLUMNS;
}

fn next_tile(tiles: KeyTiles, tile: u32) -> u32 {
  return select(tile + 1u, tiles.window, tile + 1u == tiles.sink_end);
}
# endif

# if rows_are_keys
// Tiles of queries within start..end are full: every query sees all of key0..key_end.
struct FullTiles { start: u32, end: u32 }

fn full_tiles(seq: Sequence, key0: u32, key_end: u32) -> FullTiles {
  let seq_q = i32(seq.seq_q);
  let start = clamp(i32(key_end) - 1 - seq.upper, 0, seq_q);
  let end = clamp(i32(max(key0, seq.sink_tokens)) + 1 - seq.lower, 0, seq_q);
  let limit = select(seq_q, 0, key_end > seq.seq_k);
  return FullTiles(u32(start), u32(min(select(end, seq_q, seq.sink_tokens >= key_end), limit)));
}

fn is_full(full: FullTiles, column0: u32) -> bool {
  return column0 >= full.start && column0 + TILE_COLUMNS <= full.end;
}
# else
// Tiles of keys within start..end, and within the sink tokens, are full: all of row0..row_end see every key.
struct FullTiles { start: u32, end: u32 }

fn full_tiles(seq: Sequence, row0: u32, row_end: u32) -> FullTiles {
  let limit = select(i32(seq.seq_k), 0, row_end > seq.seq_q);
  let end = clamp(i32(row0) + 1 + seq.upper, 0, limit);
  let start = u32(clamp(i32(row_end) - 1 + seq.lower, 0, end));
  return FullTiles(select(start, 0u, seq.sink_tokens >= start), u32(end));
}

fn is_full(seq: Sequence, full: FullTiles, column0: u32) -> bool {
  let column_end = column0 + TILE_COLUMNS;
  return column_end <= full.end && (column0 >= full.start || column_end <= seq.sink_tokens);
}
# endif
# if peels

// Full tiles, which are computed first, without a look at pairs. All of them are among the visited tiles.
struct OpenTiles { first: u32, end: u32 }

fn open_tiles(tiles: {{ "QueryTiles" if rows_are_keys else "KeyTiles" }}, full: FullTiles) -> OpenTiles {
  let first = (full.start + TILE_COLUMNS - 1u) / TILE_COLUMNS;
  let end = full.end / TILE_COLUMNS;
  if (first >= end || tiles.first >= tiles.end) { return OpenTiles(0u, 0u); }
# if mirrored
  return OpenTiles(tiles.mirror + 1u - end, tiles.mirror + 1u - first);
# else
  return OpenTiles(first, end);
# endif
}

// The first of the other tiles.
fn first_of_rest(tiles: {{ "QueryTiles" if rows_are_keys else "KeyTiles" }}, open: OpenTiles) -> u32 {
  return select(tiles.first, open.end, tiles.first == open.first && open.first < open.end);
}
# endif
