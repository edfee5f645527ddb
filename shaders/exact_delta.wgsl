{#- delta_i = sum over keys of p d_p - d_lse_i, with d_p = d_o . v, p = exp(s - lse): what d_o . o would be had o not
    been rounded to half precision. That rounding is too coarse wherever delta meets what it cancels with: in a row
    that few keys dominate, and in the sum over rows of the sink logits' gradient. One workgroup computes a tile of
    queries of one head. -#}
{% if cooperative %}
enable f16;
enable wgpu_cooperative_matrix;
{% endif %}
{% include "params.wgsl" %}
{% include "mask.wgsl" %}
{% include "operands.wgsl" %}
{% if cooperative %}
{% include "halves.wgsl" %}
{% endif %}
{% include "exp.wgsl" %}
{% include "probability.wgsl" %}
{% import micro_kernel ~ "/exact_delta.wgsl" as micro %}
{{ micro.declare() }}

// `total` is a row's sum of p d_p.
fn row_delta(place: u32, total: f32) -> f32 {
  // The row sees nothing, and lse is no function of anything.
  if (lse[params.lse_offset + place] == params.negative_infinity) { return 0.0; }
{% if d_lse %}
  return total - d_lse[params.d_lse_offset + place];
{% else %}
  return total;
{% endif %}
}

@compute @workgroup_size({{ threads }})
fn main(
  @builtin(workgroup_id) workgroup: vec3<u32>,
  @builtin(num_workgroups) grid: vec3<u32>,
  @builtin(local_invocation_index) thread: u32,
{% if cooperative %}
  @builtin(subgroup_id) subgroup: u32,
  @builtin(subgroup_invocation_id) lane: u32,
{% endif %}
) {
  let index = workgroup.x + workgroup.y * grid.x;
  if (index >= params.workgroups) { return; }
  let work = query_work(index);
  let row0 = work.tile * TILE_ROWS;
  let row_limit = params.seq_q;
  let column_limit = params.seq_k;
  let row_end = min(row0 + TILE_ROWS, row_limit);
{% if repairs %}
  if (!to_repair(work, row0, row_end)) { return; }
{% endif %}
  let q_base = operand_base(params.q, work.batch, work.head);
  let d_o_base = operand_base(params.d_o, work.batch, work.head);
  let k_base = operand_base(params.k, work.batch, work.kv_head);
  let v_base = operand_base(params.v, work.batch, work.kv_head);
  let delta_base = (work.batch * params.heads + work.head) * params.seq_q;
  let lse_base = params.lse_offset + delta_base;
  let tiles = key_tiles(row0, row_end);

  {{ micro.begin() }}
  for (var tile = tiles.first; tile < tiles.end; tile = next_tile(tiles, tile)) {
    let column0 = tile * TILE_COLUMNS;
    let masked = !all_visible(row0, row_end, column0, column0 + TILE_COLUMNS);
    {{ micro.scores() }}
    {{ micro.probability_gradients() }}
    {{ micro.accumulate() }}
  }
  {{ micro.finish() }}
}
