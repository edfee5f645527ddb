{#- Tiles that the boolean mask hides are skipped, and tiles of which it hides nothing need no bits.
    Needs: `mask_bits`, mask.wgsl, mask_words.wgsl.
    Declares: where masks go by spans Span and visible_span, else tile_class and visible_tile. -#}
// The class of a tile is 1 where the mask shows pairs, 2 where it hides pairs, 3 where it does both. Classes are those of whole blocks,
// so 3 may stand for 1 or 2. `base` is the place of the classes of the tile's sequence and head.
# if masks_by_spans
# set row_block = "BLOCK_KEYS" if rows_are_keys else "BLOCK_ROWS"
# set column_block = "BLOCK_ROWS" if rows_are_keys else "BLOCK_KEYS"
// The classes of 16 blocks of columns, from block 16 * group on, over all rows of the tile: two bits each. All threads read the same
// words, so compilers see one path through the loop over tiles. NVIDIA's compiler takes a value that a subgroup finds together for
// one that differs between lanes.
struct Classes { word: u32, group: u32 }

fn load_classes(seq: Sequence, base: u32, row0: u32, row_end: u32, group: u32) -> Classes {
  let first_row = row0 / {{ row_block }};
  let last_row = (min(row_end, seq.{{ "seq_k" if rows_are_keys else "seq_q" }}) - 1u) / {{ row_block }};
  var word = 0u;
# if rows_are_keys
  let last_column = (seq.seq_q - 1u) / {{ column_block }};
  for (var n = 0u; n < 16u; n += 1u) {
    let at = base + min(group * 16u + n, last_column) * params.mask_classes.seq;
# if mask_group * mask_block_words * 32 % tile_rows == 0
    let kinds = (mask_bits[at + first_row / 16u] >> (first_row % 16u * 2u)) & (0xffffffffu >> (30u - 2u * (last_row - first_row)));
    word |= (select(0u, 1u, (kinds & 0x55555555u) != 0u) | select(0u, 2u, (kinds & 0xaaaaaaaau) != 0u)) << (n * 2u);
# else
    for (var row = first_row; row <= last_row; row += 1u) {
      word |= ((mask_bits[at + row / 16u] >> (row % 16u * 2u)) & 3u) << (n * 2u);
    }
# endif
  }
# else
  for (var row = first_row; row <= last_row; row += 1u) { word |= mask_bits[base + row * params.mask_classes.seq + group]; }
# endif
  return Classes(word, group);
}

// The consecutive tiles first..end of columns are of one class, 1 or 3.
struct Span { first: u32, end: u32, kind: u32 }

// The first tiles from `from_tile` on that the mask leaves visible, as far as one class and one group of blocks reaches.
fn visible_span(seq: Sequence, classes: ptr<function, Classes>, base: u32, tiles: {{ "QueryTiles" if rows_are_keys else "KeyTiles" }}, row0: u32, row_end: u32, from_tile: u32) -> Span {
  var tile = from_tile;
  loop {
    if (tile >= tiles.end) { break; }
    let column0 = {{ "tile * TILE_COLUMNS" if rows_are_keys else "first_column(tiles, tile)" }};
    let block = column0 / {{ column_block }};
    if (block / 16u != (*classes).group) { *classes = load_classes(seq, base, row0, row_end, block / 16u); }
    let place = block % 16u;
# if mask_words
    let word = (*classes).word;
    let kind = (word >> (place * 2u)) & 3u;
    // A bit for each block of another class. After a block without visible pairs: for each block with visible pairs.
    let other = word ^ (kind * 0x55555555u);
    let differ = select(other | (other >> 1u), word, (kind & 1u) == 0u) & 0x55555555u;
    // A span of class 3 ends with the words that `fetch_mask` reads.
# set read_blocks = 2 if rows_are_keys else 1
# if mirrored
    // If no block differs, the span begins with the group.
    var first_block = u32(i32(block - place) + (i32(firstLeadingBit(differ & ((1u << (place * 2u)) - 1u))) >> 1u) + 1);
    if (kind == 3u) { first_block = block; }
    var end = tiles.mirror - first_block * ({{ column_block }} / TILE_COLUMNS) + 1u;
# else
    // If no block differs, the span ends with the group.
    var end_block = block - place + min(firstTrailingBit(differ & ~((1u << (place * 2u)) - 1u)) >> 1u, 16u);
    if (kind == 3u) { end_block = min(end_block, (block / {{ read_blocks }}u + 1u) * {{ read_blocks }}u); }
    var end = end_block * ({{ column_block }} / TILE_COLUMNS);
# endif
    end = min(end, {{ "tiles.end" if rows_are_keys else "select(tiles.end, tiles.sink_end, tile < tiles.sink_end)" }});
# else
    // A tile that crosses blocks is a span of its own, of the class of all of its blocks.
    let last = min(column0 + TILE_COLUMNS, seq.{{ "seq_q" if rows_are_keys else "seq_k" }}) - 1u;
    var kind = ((*classes).word >> (place * 2u)) & 3u;
    for (var next = block + 1u; next <= last / {{ column_block }}; next += 1u) {
      if (next / 16u != (*classes).group) { *classes = load_classes(seq, base, row0, row_end, next / 16u); }
      kind |= ((*classes).word >> (next % 16u * 2u)) & 3u;
    }
    let end = tile + 1u;
# endif
    if ((kind & 1u) != 0u) { return Span(tile, end, kind); }
    tile = {{ "end" if rows_are_keys else "next_tile(tiles, end - 1u)" }};
  }
  return Span(tile, tile, 1u);
}
# else
fn tile_class(seq: Sequence, base: u32, query0: u32, query_end: u32, key0: u32, key_end: u32) -> u32 {
  let last_query = min(query_end, seq.seq_q) - 1u;
  let last_key = min(key_end, seq.seq_k) - 1u;
  var kind = 0u;
  for (var row = query0 / BLOCK_ROWS; row <= last_query / BLOCK_ROWS; row += 1u) {
    for (var block = key0 / BLOCK_KEYS; block <= last_key / BLOCK_KEYS; block += 1u) {
      kind |= (mask_bits[base + row * params.mask_classes.seq + block / 16u] >> (block % 16u * 2u)) & 3u;
    }
  }
  return kind;
}

// The first tile from `from_tile` on that the mask leaves visible.
# if rows_are_keys
fn visible_tile(seq: Sequence, base: u32, tiles: QueryTiles, key0: u32, key_end: u32, from_tile: u32) -> u32 {
  var tile = from_tile;
  while (tile < tiles.end && (tile_class(seq, base, tile * TILE_COLUMNS, (tile + 1u) * TILE_COLUMNS, key0, key_end) & 1u) == 0u) {
    tile += 1u;
  }
  return tile;
}
# else
fn visible_tile(seq: Sequence, base: u32, tiles: KeyTiles, query0: u32, query_end: u32, from_tile: u32) -> u32 {
  var tile = from_tile;
  while (tile < tiles.end && (tile_class(seq, base, query0, query_end, tile * TILE_COLUMNS, (tile + 1u) * TILE_COLUMNS) & 1u) == 0u) {
    tile = next_tile(tiles, tile);
  }
  return tile;
}
# endif
# endif
