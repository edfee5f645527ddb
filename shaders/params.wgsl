// What changes between calls. Strides, offsets and bases count vectors of the operand's load width.
struct Operand { offset: u32, batch: u32, head: u32, seq: u32 }

struct Params {
  q: Operand,
  k: Operand,
  v: Operand,
  o: Operand,
  heads: u32,
  kv_heads: u32,
  seq_q: u32,
  seq_k: u32,
  lower: i32,
  upper: i32,
  sink_tokens: u32,
  workgroups: u32,
  lse_offset: u32,
  sink_offset: u32,
  scale_log2: f32,
  // WGSL has no literal for it.
  negative_infinity: f32,
}
{% for b in bindings %}
@group(0) @binding({{ b.slot }}) var<{{ b.space }}> {{ b.name }}: {{ b.type }};
{% endfor %}

const HEAD_DIM: u32 = {{ head_dim }}u;
const VALUE_DIM: u32 = {{ value_dim }}u;
const TILE_Q: u32 = {{ tile_q }}u;
const TILE_K: u32 = {{ tile_k }}u;
const LOG2_E: f32 = 1.4426950408889634;
const LN_2: f32 = 0.6931471805599453;
// Below every finite score; stands for "hidden", and for the maximum of a row that has seen nothing.
const LOWEST: f32 = -3.4028234e38;

fn operand_base(operand: Operand, batch: u32, head: u32) -> u32 {
  return operand.offset + batch * operand.batch + head * operand.head;
}
