{#- The tile of a workgroup.
    Needs: work.wgsl; with lengths the list `sequences`. Declares: TILE_ROWS, TILE_COLUMNS, TileWork, tile_work. -#}
const TILE_ROWS: u32 = {{ tile_rows }}u;
const TILE_COLUMNS: u32 = {{ tile_columns }}u;

// `batch` is the place along the batch axis, `sequence` the number of the sequence. They differ only in batches of sequences of
// different lengths. In a kernel whose rows are keys, `head` is the first query head of the group.
struct TileWork { tile: u32, batch: u32, sequence: u32, head: u32, kv_head: u32 }

fn tile_work(index: u32) -> TileWork {
  let at = decode_work(index);
# set heads_per_kv = "(params.heads / params.kv_heads)"
  let head = at.head * {{ heads_per_kv }} + at.cell;
# if is_listed
  // The host has listed the tiles of all sequences, the longest first.
  let number = sequences[params.work_at + 2u * at.tile];
  let tile = sequences[params.work_at + 2u * at.tile + 1u];
  return TileWork(tile, sequences[number * {{ sequence_words }}u], number, head, at.head);
# else
  return TileWork(at.tile, at.batch, at.batch, head, at.head);
# endif
}
