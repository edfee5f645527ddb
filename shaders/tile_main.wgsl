{#- The entry point of a kernel with tiles.
    Needs: tiled.wgsl, entry.wgsl; `loads`, `stores` and the options. Where `has_lanes` is false, nothing behind it may run.
    Declares: `main`, around the caller's text, with the workgroup's tile (`work`, `row0`, `row_end`, `row_limit`), the base of each
    operand of its rows, and the tiles of columns that its rows see (`tiles`, `full`, `column_limit`). A tile of keys has columns of
    several query heads: head_loop of tile_loops.wgsl declares their bases. -#}
# from "entry.wgsl" import main
# from "tile_loops.wgsl" import first_tile
# macro tile_main()
# set body = caller
# set row_limit = "seq.k_rows" if rows_are_keys else "seq.q_rows"
# if sanitize or fallback_tile
// Whether the cooperative kernel has reported rows of a workgroup's tile.
fn has_fallback(index: u32) -> bool {
  if (index >= params.workgroups) { return false; }
  let work = tile_work(index);
  let seq = load_sequence(work.sequence);
# if sanitize
  return fallback[fallback_slot(seq, work, work.tile)] != 0u;
# else
  let row0 = work.tile * TILE_ROWS;
  return has_fallback_rows(seq, work, row0, min(row0 + TILE_ROWS, {{ row_limit }}));
# endif
}

# endif
# call main()
  let work = tile_work(index);
  let seq = load_sequence(work.sequence);
  let row0 = work.tile * TILE_ROWS;
  let row_limit = {{ row_limit }};
  let column_limit = seq.{{ "seq_q" if rows_are_keys else "seq_k" }};
  let row_end = min(row0 + TILE_ROWS, row_limit);
  // Rows beyond the end of a padded sequence see nothing.
  let used_end = min(row_end, seq.{{ "seq_k" if rows_are_keys else "seq_q" }});
# if batch == 1 and (sanitize or fallback_tile)
  if (thread == 0u) { {{ flags }}[0] = vec4<f32>(select(0.0, 1.0, has_fallback(index))); }
  if (workgroupUniformLoad(&{{ flags }}[0]).x == 0.0) { return; }
# endif
# if guarded_lanes and not sanitize
  if (!has_lanes) {
    // The portable kernel computes all rows.
    let slot = fallback_slot(seq, work, work.tile);
    for (var word = thread; word < {{ report_words }}u; word += {{ threads }}u) { fallback[slot + word] = 0xffffffffu; }
    return;
  }
# endif
# for operand in (loads + stores) if not (rows_are_keys and operand.name in ["q", "d_o"])
# set head, start = ("kv_head", "k_start") if operand.name in ["k", "v", "d_k", "d_v"] else ("head", "q_start")
# set place = "params." ~ operand.name
  let {{ operand.name }}_base = operand_base({{ place }}, work.batch, work.{{ head }}) + seq.{{ start }} * {{ place }}.seq;
# endfor
# if rows_are_keys
  let tiles = query_tiles(seq, row0, used_end);
# else
# if "lse" in names
  let lse_base = operand_base(params.lse, work.batch, work.head) + seq.q_start;
# endif
# if "row_stats" in names
  let stats_base = operand_base(params.row_stats, work.batch, work.head) + seq.q_start;
# endif
# if "key_scales" in names
  let scales_base = operand_base(params.key_scales, work.batch, work.kv_head) + seq.k_start;
# endif
# if "d_slope_rows" in names
  let slope_rows_base = operand_base(params.d_slope_rows, work.batch, work.head) + seq.q_start;
# endif
  let tiles = key_tiles(seq, row0, used_end);
# if modified or hides
  begin_pairs(work.sequence, work.batch, work.head);
# endif
# if mask
  let class_base = operand_base(params.mask_classes, work.sequence, work.head);
{{ first_tile() }}
# endif
# endif
# if scores_in_powers_of_two or not bias
  let full = full_tiles(seq, row0, row_end);
# endif
# if peels
  let open = open_tiles(tiles, full);
  let rest = first_of_rest(tiles, open);
  let first_of_all = select(rest, open.first, open.first < open.end);
# endif
{{ body() }}
# endcall
# endmacro
