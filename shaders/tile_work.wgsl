{#- The tile of a workgroup, of a kernel whose rows are queries or keys. -#}
const TILE_ROWS: u32 = {{ tile_rows }}u;
const TILE_COLUMNS: u32 = {{ tile_columns }}u;

// `batch` is the place along the batch axis, `sequence` the number of the sequence: the same but where lengths differ. Where rows are
// keys, `head` is the first query head of the group.
struct TileWork { tile: u32, batch: u32, sequence: u32, head: u32, kv_head: u32 }

fn tile_work(index: u32) -> TileWork {
  let at = decode_work(index);
  let head = at.head * (params.heads / params.kv_heads) + at.cell;
# if is_listed
  // The host has listed sequences and their tiles, the longest first.
  let number = sequences[params.work_at + 2u * at.tile];
  let tile = sequences[params.work_at + 2u * at.tile + 1u];
  return TileWork(tile, sequences[number * {{ sequence_words }}u], number, head, at.head);
# else
  return TileWork(at.tile, at.batch, at.batch, head, at.head);
# endif
}
