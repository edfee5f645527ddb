// What changes between calls. Strides, offsets and bases count vectors of the operand's load width.
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
  heads: u32,
  kv_heads: u32,
  seq_q: u32,
  seq_k: u32,
  lower: i32,
  upper: i32,
  sink_tokens: u32,
  // Workgroups of this pass: the grid is folded into two dimensions and may be larger.
  workgroups: u32,
  lse_offset: u32,
  d_lse_offset: u32,
  sink_offset: u32,
  d_sink_offset: u32,
  batch: u32,
  scale: f32,
  // The same as a product of 1 or -1 and what is not negative.
  scale_sign: f32,
  scale_size: f32,
  // WGSL has no literal for it.
  negative_infinity: f32,
}
{% for b in bindings %}
@group(0) @binding({{ b.slot }}) var<{{ b.space }}> {{ b.name }}: {{ b.type }};
{% endfor %}

const LOG2_E: f32 = 1.4426950408889634;
// Below every finite score; stands for "hidden", and for the maximum of a row that has seen nothing.
const LOWEST: f32 = -3.4028234e38;

fn operand_base(operand: Operand, batch: u32, head: u32) -> u32 {
  return operand.offset + batch * operand.batch + head * operand.head;
}
{% if tile_rows is defined %}

const TILE_ROWS: u32 = {{ tile_rows }}u;
const TILE_COLUMNS: u32 = {{ tile_columns }}u;

struct Work { tile: u32, batch: u32, head: u32, kv_head: u32 }
{% if rows_are_keys %}

// The tile of keys of a workgroup; `head` is the first query head of the group. The first key tile of every head comes first:
// under a causal mask the most queries see it.
fn key_work(index: u32) -> Work {
  let kv_head = index % params.kv_heads;
  let sequence = index / params.kv_heads;
  return Work(sequence / params.batch, sequence % params.batch, kv_head * (params.heads / params.kv_heads), kv_head);
}
{% if repairs %}

// Whether the cooperative kernel has reported a tile that has rows in row0..row_end. Its workgroups are in the order of
// `key_work`.
fn to_repair(work: Work, row0: u32, row_end: u32) -> bool {
  for (var tile = row0 / {{ repairs }}u; tile <= (row_end - 1u) / {{ repairs }}u; tile += 1u) {
    if (repairs[(tile * params.batch + work.batch) * params.kv_heads + work.kv_head] != 0u) { return true; }
  }
  return false;
}
{% endif %}
{% else %}

// The tile of queries of a workgroup. The query heads of a group stand side by side (they share keys and values). The last
// query tile of every head comes first: under a causal mask it is the longest.
fn query_work(index: u32) -> Work {
  let group = params.heads / params.kv_heads;
  let tiles = (params.seq_q + TILE_ROWS - 1u) / TILE_ROWS;
  let place = index / group;
  let kv_head = place % params.kv_heads;
  let sequence = place / params.kv_heads;
  return Work(tiles - 1u - sequence / params.batch, sequence % params.batch, kv_head * group + index % group, kv_head);
}
{% if repairs %}

// Whether the cooperative kernel has reported a tile that has rows in row0..row_end. Its workgroups are in the order of
// `query_work`.
fn to_repair(work: Work, row0: u32, row_end: u32) -> bool {
  let tiles = (params.seq_q + {{ repairs - 1 }}u) / {{ repairs }}u;
  for (var tile = row0 / {{ repairs }}u; tile <= (row_end - 1u) / {{ repairs }}u; tile += 1u) {
    let sequence = (tiles - 1u - tile) * params.batch + work.batch;
    if (repairs[sequence * params.heads + work.head] != 0u) { return true; }
  }
  return false;
}
{% endif %}
{% endif %}
{% endif %}
