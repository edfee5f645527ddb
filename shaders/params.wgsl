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
  o_rest: Operand,
  lse: Operand,
  d_lse: Operand,
  // What the backward pass needs of each row; behind the last row of a head stands its ALiBi slope.
  row_terms: Operand,
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
  states_rest: Operand,
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
{% if tile_rows is defined %}

const TILE_ROWS: u32 = {{ tile_rows }}u;
const TILE_COLUMNS: u32 = {{ tile_columns }}u;

// `batch` is the place along the batch axis, `sequence` the number of the sequence: the same but where lengths differ.
struct Work { tile: u32, batch: u32, sequence: u32, head: u32, kv_head: u32 }
{% if lengths %}

// The n-th tile of the list, which the host has made: longest first.
fn listed(n: u32, head: u32, kv_head: u32) -> Work {
  let number = sequences[params.work_at + 2u * n];
  let tile = sequences[params.work_at + 2u * n + 1u];
  return Work(tile, sequences[number * {{ sequence_words }}u], number, head, kv_head);
}
{% endif %}
{% if rows_are_keys %}

// The tile of keys of a workgroup; `head` is the first query head of the group. The first key tile of every head comes first:
// under a causal mask the most queries see it.
fn key_work(index: u32) -> Work {
  let kv_head = params.region_head + index % params.region_heads;
  let place = index / params.region_heads;
  let head = kv_head * (params.heads / params.kv_heads);
{% if lengths %}
  return listed(params.region_tile + place, head, kv_head);
{% else %}
  let batch = params.region_batch + place % params.region_batches;
  return Work(params.region_tile + place / params.region_batches, batch, batch, head, kv_head);
{% endif %}
}
{% else %}

// The tile of queries of a workgroup. The query heads of a group stand side by side (they share keys and values). The last
// query tile of every head comes first: under a causal mask it is the longest.
fn query_work(index: u32) -> Work {
  let group = params.heads / params.kv_heads;
  let kv_head = params.region_head + index / group % params.region_heads;
  let place = index / (group * params.region_heads);
  let head = kv_head * group + index % group;
{% if lengths %}
  return listed(params.region_tile + place, head, kv_head);
{% else %}
  let batch = params.region_batch + place % params.region_batches;
  let tile = params.region_tile + params.region_tiles - 1u - place / params.region_batches;
  return Work(tile, batch, batch, head, kv_head);
{% endif %}
}
{% endif %}
{% endif %}
