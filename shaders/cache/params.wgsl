// What changes between calls of the kernels of caches. Strides and offsets of the caller's operands count vectors of their load
// width, as elsewhere.
struct Operand { offset: u32, batch: u32, head: u32, seq: u32 }

struct Params {
  q: Operand,
  k: Operand,
  v: Operand,
  o: Operand,
  heads: u32,
  kv_heads: u32,
  // Queries of a sequence.
  queries: u32,
  // Workgroups where the grid is folded.
  workgroups: u32,
  // Sequences of the cache.
  sequences: u32,
  // Where the lengths lie that hold now, and those that will after this append: first words in `state`.
  current: u32,
  next: u32,
  // Where the block tables lie, and words of a sequence's.
  table: u32,
  table_row: u32,
  // Rows of a block: a page, or all that a sequence has.
  block_rows: u32,
  block_shift: u32,
  // A rolling cache: rows that are never given up, and rows of the ring behind them.
  kept_rows: u32,
  ring_rows: u32,
  // Rows of a head among the keys of all sequences, where these are gathered.
  gathered_rows: u32,
  // Tokens that are appended, of all sequences.
  tokens: u32,
  // How far a query sees to either side, and the keys exempt from the bound on the left.
  left: i32,
  right: i32,
  sink_tokens: u32,
  // Key heads of all sequences of a decoding step, each with its group of query heads, and the row tiles of such a group.
  groups: u32,
  row_tiles: u32,
  // Splits of the keys, and at most where a split would have more tiles of keys than are long; and tiles it has at least.
  splits: u32,
  most_splits: u32,
  long_tiles: u32,
  least_tiles: u32,
  lse_offset: u32,
  sink_offset: u32,
  scale: f32,
  softcap: f32,
  // Scores have met their scale when the softmax sees them.
  scale_size: f32,
  // WGSL has no literal for it.
  negative_infinity: f32,
}
{% include "bindings.wgsl" %}
