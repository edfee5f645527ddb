{#- Gradients by k and v: one workgroup computes a tile of keys of one key head against all query tiles that
    see them, of every query head of the group in turn, so that GQA needs no second pass.
    d_v = sum over queries of p d_o;  d_k = scale * sum over queries of d_s q. -#}
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
{% import micro_kernel ~ "/d_kv.wgsl" as micro %}
{{ micro.declare() }}

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
  let work = key_work(index);
  let row0 = work.tile * TILE_ROWS;
  let row_limit = params.seq_k;
  let column_limit = params.seq_q;
  let row_end = min(row0 + TILE_ROWS, row_limit);
{% if repairs %}
  if (!to_repair(work, row0, row_end)) { return; }
{% endif %}
  let k_base = operand_base(params.k, work.batch, work.kv_head);
  let v_base = operand_base(params.v, work.batch, work.kv_head);
  let d_k_base = operand_base(params.d_k, work.batch, work.kv_head);
  let d_v_base = operand_base(params.d_v, work.batch, work.kv_head);
  let tiles = query_tiles(row0, row_end);

  {{ micro.begin() }}
  for (var head = work.head; head < work.head + params.heads / params.kv_heads; head += 1u) {
    let q_base = operand_base(params.q, work.batch, head);
    let d_o_base = operand_base(params.d_o, work.batch, head);
    let delta_base = (work.batch * params.heads + head) * params.seq_q;
    let lse_base = params.lse_offset + delta_base;
    {{ micro.begin_head() }}
    for (var tile = tiles.first; tile < tiles.end; tile += 1u) {
      let column0 = tile * TILE_COLUMNS;
      let masked = !all_visible(column0, column0 + TILE_COLUMNS, row0, row_end) || column0 + TILE_COLUMNS > column_limit;
      {{ micro.scores() }}
      {{ micro.probabilities() }}
      {{ micro.accumulate_d_v() }}
      {{ micro.probability_gradients() }}
      {{ micro.score_gradients() }}
      {{ micro.accumulate_d_k() }}
    }
  }
  {{ micro.finish() }}
}
