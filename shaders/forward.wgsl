{#- Forward pass: one workgroup computes TILE_Q queries of one head against all key tiles that they see.

    The outer loop below knows nothing of how scores are formed or summed: a micro-kernel
    (portable.wgsl) supplies declare, load_*, scores, probabilities, accumulate and store. -#}
{% include "params.wgsl" %}
{% include "mask.wgsl" %}
{% include "operands.wgsl" %}
{% include "softmax.wgsl" %}
{% import micro_kernel as micro %}
{{ micro.declare() }}

@compute @workgroup_size({{ threads }})
fn forward(
  @builtin(workgroup_id) workgroup: vec3<u32>,
  @builtin(num_workgroups) grid: vec3<u32>,
  @builtin(local_invocation_index) thread: u32,
) {
  // The grid is folded into two dimensions; the query heads of a group stand side by side (they share
  // keys and values), and the last query tile comes first (under a causal mask it is the longest).
  var index = workgroup.x + workgroup.y * grid.x;
  if (index >= params.workgroups) { return; }
  let group = params.heads / params.kv_heads;
  let member = index % group;
  index /= group;
  let query_tiles = (params.seq_q + TILE_Q - 1u) / TILE_Q;
  let query_tile = query_tiles - 1u - index % query_tiles;
  index /= query_tiles;
  let kv_head = index % params.kv_heads;
  let batch = index / params.kv_heads;
  let head = kv_head * group + member;

  let row0 = query_tile * TILE_Q;
  let row_end = min(row0 + TILE_Q, params.seq_q);
  let q_base = operand_base(params.q, batch, head);
  let k_base = operand_base(params.k, batch, kv_head);
  let v_base = operand_base(params.v, batch, kv_head);
  let tiles = key_tiles(row0, row_end);

  {{ micro.begin() }}
  for (var tile = tiles.first; tile < tiles.end; tile = next_tile(tiles, tile)) {
    let key0 = tile * TILE_K;
    let masked = !all_visible(row0, row_end, key0, key0 + TILE_K);
    {{ micro.scores() }}
    {{ micro.probabilities() }}
    {{ micro.accumulate() }}
  }
  {{ micro.finish() }}
}
