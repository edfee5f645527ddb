{#- The rows that a cooperative kernel reports, and that its second run or the portable kernel computes again.
    Needs: mask.wgsl, tile_work.wgsl, the binding of the reports. Declares: fallback_slot; in the portable kernel has_fallback_rows and
    is_fallback_row. -#}
// The first word of the report of a tile of {{ fallback_rows }} rows. The word is zero where no row is reported. Otherwise a bit for each
// row follows.
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
# if fallback_tile

// Whether the cooperative kernel has reported rows of a tile that overlaps row0..row_end.
fn has_fallback_rows(seq: Sequence, work: TileWork, row0: u32, row_end: u32) -> bool {
  for (var tile = row0 / {{ fallback_tile }}u; tile <= (row_end - 1u) / {{ fallback_tile }}u; tile += 1u) {
    if (fallback[fallback_slot(seq, work, tile)] != 0u) { return true; }
  }
  return false;
}

// Whether the cooperative kernel has reported this row. Other rows keep its results.
fn is_fallback_row(seq: Sequence, work: TileWork, row: u32) -> bool {
  let slot = fallback_slot(seq, work, row / {{ fallback_tile }}u);
  let place = row % {{ fallback_tile }}u;
  return fallback[slot] != 0u && ((fallback[slot + 1u + place / 32u] >> (place % 32u)) & 1u) != 0u;
}
# endif
