{#- Opens `main` of a kernel that has tiles: the workgroup's tile of rows, where their operands lie, and the tiles of columns that
    it meets. Rows of one query head know where their lse and delta lie; a key head's columns are of several query heads. -#}
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
  let work = {{ "key_work" if rows_are_keys else "query_work" }}(index);
  let row0 = work.tile * TILE_ROWS;
  let row_limit = params.{{ "seq_k" if rows_are_keys else "seq_q" }};
  let column_limit = params.{{ "seq_q" if rows_are_keys else "seq_k" }};
  let row_end = min(row0 + TILE_ROWS, row_limit);
{% if repairs %}
  if (!to_repair(work, row0, row_end)) { return; }
{% endif %}
{% for operand in (loads + stores) if not (rows_are_keys and operand.name in ["q", "d_o"]) %}
  let {{ operand.name }}_base = operand_base(params.{{ operand.name }}, work.batch, work.{{ "kv_head" if operand.name in ["k", "v", "d_k", "d_v"] else "head" }});
{% endfor %}
{% if rows_are_keys %}
  let tiles = query_tiles(row0, row_end);
{% else %}
  let delta_base = (work.batch * params.heads + work.head) * params.seq_q;
  let lse_base = params.lse_offset + delta_base;
  let tiles = key_tiles(row0, row_end);
{% endif %}
