{#- Forward pass: one workgroup computes a tile of queries of one head against all key tiles that they see.

    The outer loop knows nothing of how scores are formed or summed: the micro-kernel does. -#}
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
{% include "softmax.wgsl" %}
{% import micro_kernel ~ "/forward.wgsl" as micro %}
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
  let work = query_work(index);
  let head = work.head;
  let row0 = work.tile * TILE_ROWS;
  let row_limit = params.seq_q;
  let column_limit = params.seq_k;
  let row_end = min(row0 + TILE_ROWS, row_limit);
{% if repairs %}
  if (!to_repair(work, row0, row_end)) { return; }
{% endif %}
  let q_base = operand_base(params.q, work.batch, head);
  let o_base = operand_base(params.o, work.batch, head);
{% if o_rest %}
  let o_rest_base = operand_base(params.o_rest, work.batch, head);
{% endif %}
  let k_base = operand_base(params.k, work.batch, work.kv_head);
  let v_base = operand_base(params.v, work.batch, work.kv_head);
  let lse_base = params.lse_offset + (work.batch * params.heads + head) * params.seq_q;
  let tiles = key_tiles(row0, row_end);

  {{ micro.begin() }}
  for (var tile = tiles.first; tile < tiles.end; tile = next_tile(tiles, tile)) {
    let column0 = tile * TILE_COLUMNS;
    let masked = !all_visible(row0, row_end, column0, column0 + TILE_COLUMNS);
    {{ micro.scores() }}
    {{ micro.softmax() }}
    {{ micro.accumulate() }}
  }
  {{ micro.finish() }}
}
