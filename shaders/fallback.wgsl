{#- The rows that a cooperative kernel reports, and a portable one computes again. -#}
// Where the report of a tile of so many rows begins: a word that is zero where there are none, then, where there
// are some, a bit for each row.
fn fallback_slot(seq: Sequence, work: TileWork, tile: u32) -> u32 {
# set heads = "kv_heads" if rows_are_keys else "heads"
# set head = "kv_head" if rows_are_keys else "head"
# if lengths
  let start = work.batch * params.{{ "seq_k" if rows_are_keys else "seq_q" }} + seq.{{ "k_start" if rows_are_keys else "q_start" }};
  return ((start / {{ fallback_rows }}u + work.sequence + tile) * params.{{ heads }} + work.{{ head }}) * {{ report_words }}u;
# else
  return ((tile * params.batch + work.batch) * params.{{ heads }} + work.{{ head }}) * {{ report_words }}u;
# endif
}
# if repairs

// Whether the cooperative kernel has reported rows of a tile that has some in row0..row_end.
fn has_fallback_rows(seq: Sequence, work: TileWork, row0: u32, row_end: u32) -> bool {
  for (var tile = row0 / {{ repairs }}u; tile <= (row_end - 1u) / {{ repairs }}u; tile += 1u) {
    if (repairs[fallback_slot(seq, work, tile)] != 0u) { return true; }
  }
  return false;
}

// Whether it has reported this row: the others keep what it wrote.
fn is_fallback_row(seq: Sequence, work: TileWork, row: u32) -> bool {
  let slot = fallback_slot(seq, work, row / {{ repairs }}u);
  let place = row % {{ repairs }}u;
  return repairs[slot] != 0u && ((repairs[slot + 1u + place / 32u] >> (place % 32u)) & 1u) != 0u;
}
# endif
