// What changes between calls. Strides, offsets and bases count vectors of the operand's load width, from the start of what is
// bound of the operand. They may wrap around: only the index that they sum up to must be right.
struct Operand { offset: u32, batch: u32, head: u32, seq: u32 }

struct Params {
  q: Operand,
  k: Operand,
  v: Operand,
  o: Operand,
  d_o: Operand,
  d_q: Operand,
  d_k: Operand,
  d_v: Operand,
  o_lo: Operand,
  lse: Operand,
  d_lse: Operand,
  // Statistics of each row for the backward pass: lse, delta, and in half precision the unit of d_q. Behind the last row of a head
  // stands its ALiBi slope.
  row_stats: Operand,
  alibi_moments: Operand,
  sink_partials: Operand,
  key_scales: Operand,
  query_scales: Operand,
  bias: Operand,
  d_bias: Operand,
  // The boolean mask: the caller's, in bytes or words; its bits in words by rows of queries, and, unless one
  // row is for all, again by rows of keys; the classes of its blocks.
  mask: Operand,
  mask_bits: Operand,
  mask_key_bits: Operand,
  mask_classes: Operand,
  // Partial states, one behind the other along the batch axis.
  states: Operand,
  states_lo: Operand,
  states_lse: Operand,
  heads: u32,
  kv_heads: u32,
  seq_q: u32,
  seq_k: u32,
  lower: i32,
  upper: i32,
  // Position of query 0.
  offset: i32,
  sink_tokens: u32,
  // Workgroups of this dispatch: the grid is folded into two dimensions and may be larger.
  workgroups: u32,
  // The region of the pass that this dispatch does: first sequence, head and tile, and how many of each. Heads are those of
  // keys, but where no group is kept together.
  region_batch: u32,
  region_batches: u32,
  region_head: u32,
  region_heads: u32,
  region_tile: u32,
  region_tiles: u32,
  // Workgroups of each of these.
  region_cells: u32,
  sink_offset: u32,
  d_sink_offset: u32,
  slope_offset: u32,
  d_slope_offset: u32,
  // A slope's place behind the first row of its head.
  slope_row: u32,
  // First word of the list of tiles, where sequences differ in length.
  work_at: u32,
  batch: u32,
  // Sequences, and rows and keys of the mask.
  sequence_count: u32,
  mask_rows: u32,
  mask_keys: u32,
  // Queries and keys of the longest sequence.
  pair_rows: u32,
  pair_keys: u32,
  softcap: f32,
  scale: f32,
  // The factor of what the softmax works on: the scale, or 1 where scores are formed beforehand.
  score_scale: f32,
  // The same as a product of 1 or -1 and what is not negative.
  scale_sign: f32,
  scale_size: f32,
  // WGSL has no literal for it.
  negative_infinity: f32,
}
{% include "bindings.wgsl" %}
{% include "work.wgsl" %}
