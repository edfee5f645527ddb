{#- What a cooperative kernel reports, and a portable one computes again. -#}
// Where it stands whether a tile of so many rows is to be computed again.
fn repair_slot({{ here_parameter }}work: Work, tile: u32) -> u32 {
{% set heads = "kv_heads" if rows_are_keys else "heads" %}
{% set head = "kv_head" if rows_are_keys else "head" %}
{% if lengths %}
  let start = work.batch * params.{{ "seq_k" if rows_are_keys else "seq_q" }} + here.{{ "k_start" if rows_are_keys else "q_start" }};
  return (start / {{ repair_rows }}u + work.sequence + tile) * params.{{ heads }} + work.{{ head }};
{% else %}
  return (tile * params.batch + work.batch) * params.{{ heads }} + work.{{ head }};
{% endif %}
}
{% if repairs %}

// Whether the cooperative kernel has reported a tile that has rows in row0..row_end.
fn to_repair({{ here_parameter }}work: Work, row0: u32, row_end: u32) -> bool {
  for (var tile = row0 / {{ repairs }}u; tile <= (row_end - 1u) / {{ repairs }}u; tile += 1u) {
    if (repairs[repair_slot({{ here_argument }}work, tile)] != 0u) { return true; }
  }
  return false;
}
{% endif %}
