{#- The loops over tiles of columns.
    Needs: `main` of tile_main.wgsl around them, mask.wgsl; with a mask mask_tiles.wgsl.
    Declares: loops around the caller's text, with `tile`, `column0` and `is_partial`. Where masks go by spans, a kernel keeps the span of
    tiles of one class (`span`), `mask_partial`, the mask's bits of a tile, and `next_visible`, the next tile that the mask leaves
    visible. -#}
# import "cooperative/mask.wgsl" as masking

{#- The first tile of which the mask shows something, as `first_tile`. -#}
# macro first_tile()
# if masks_by_spans
  var classes = Classes(0u, 0xffffffffu);
  var span = visible_span({{ class_arguments }}, tiles, row0, row_end, tiles.first);
  let first_tile = span.first;
  var next_visible = first_tile;
# else
  let first_tile = visible_tile({{ class_arguments }}, tiles, row0, row_end, tiles.first);
# endif
# endmacro

{#- The next tile that the mask leaves visible: where a span ends, the one after it. -#}
# macro next_span()
    next_visible = tile + 1u;
    var span_ends = next_visible >= span.end;
    // A loop that runs at most once, as in `hide`.
    loop {
      if (!span_ends) { break; }
      span_ends = false;
      span = visible_span({{ class_arguments }}, tiles, row0, row_end, {{ "next_visible" if rows_are_keys else "next_tile(tiles, tile)" }});
      next_visible = span.first;
{{ masking.fetch_mask("next_visible") }}
    }
# endmacro

{#- The first column of a tile, and that of a chunk of it. A tile that has to say whether it hides pairs is one chunk. -#}
# macro begin_columns(column0)
# if chunks > 1
    let tile_column0 = {{ column0 }};
# else
    let column0 = {{ column0 }};
# endif
# if elements and chunks == 1
    let tile_column0 = column0;
    let chunk_column = 0u;
# endif
# endmacro

{#- Whether pairs of the tile are hidden one by one, where the loop does not say so. -#}
# macro begin_tile(column0, full_arguments, class_ranges, advances=true)
{{ begin_columns(column0) }}
# if bias and not scores_in_powers_of_two
    // Any number of the bias may be -infinity.
    let is_partial = true;
# elif masks_by_spans
    let is_partial = !is_full({{ full_arguments }}, {{ "tile_column0" if elements else "column0" }});
# if mask
    let mask_partial = span.kind != 1u;
{{ masking.mask_of_tile() }}
# if advances
{{ next_span() }}
# endif
# endif
# else
    let is_partial = !is_full({{ full_arguments }}, column0){% if mask %} || tile_class({{ class_arguments }}, {{ class_ranges }}) != 1u{% endif %};
# endif
# endmacro

{#- The tile that follows a tile in a loop. -#}
{%- macro tile_after(walk) -%}
{{ "next_visible" if masks_by_spans and mask else ("next_of_walk" if walk else following) }}
{%- endmacro -%}

{#- The first column of a chunk, and its place in the tile. -#}
# macro chunk_columns(chunk)
# if chunks > 1
      let chunk_column = {{ chunk * side * column_fragments }}u;
      let column0 = tile_column0 + chunk_column;
# endif
# endmacro

{#- The caller's text for each chunk of a tile's columns, with the `column0` of the chunk. Scores of a chunk are in registers at a time. -#}
# macro chunks_of_tile()
# if chunks > 1
# for chunk in range(chunks)
    {
{{ chunk_columns(chunk) }}
{{ caller(chunk) }}
    }
# endfor
# else
{{ caller(0) }}
# endif
# endmacro

{#- The full tiles first, then the others: the second loop alone hides pairs, and in the first no column is beyond the end. The caller
    gets "none" or "all", and "some" where each tile has to say. `following` is the next tile of both loops. An `optimistic` caller may
    leave the loop over full tiles. It gets "raise" before it enters the loop, at the tile where it has left it. -#}
# macro peeled_loops(column0, after)
# if optimistic
  for (var tile = open.first; tile < open.end; ) {
    {
{{ begin_columns(column0) }}
{{ caller("raise") }}
    }
    let raised = tile;
# endif
  // Loop: tiles
  for ({{ "" if optimistic else "var tile = open.first" }}; tile < open.end; tile += 1u) {
    let following = select(rest, tile + 1u, tile + 1u < open.end);
{{ begin_columns(column0) }}
{{ caller("none") }}
  }
# if optimistic
  }
# endif
  // Loop: tiles
  for (var tile = rest; tile < tiles.end; ) {
    let after = {{ after }};
    let following = select(after, open.end, after == open.first && open.first < open.end);
{{ begin_columns(column0) }}
{{ caller("all") }}
    tile = following;
  }
# endmacro

{#- A loop over the tiles of keys that a tile of queries sees. `walk` is the first loop of a kernel that finds units. -#}
# macro key_loop(walk=false)
# if peels and not walk
# set body = caller
# call(masked) peeled_loops("first_column(tiles, tile)", "next_tile(tiles, tile)")
{{ body(masked) }}
# endcall
# else
# set first = "first_tile" if mask else ("walk_tile" if walk else "tiles.first")
# set body = caller
# set ranges = "row0, row_end, column0, column0 + TILE_COLUMNS"
# if optimistic
{#- Two loops in turn, for tiles that hide nothing and for others, in the order of tiles. -#}
# set hides_tile = "(span.kind != 1u || !is_full(seq, full, first_column(tiles, tile)))"
  var raises = true;
  var raised = 0u;
  for (var tile = {{ first }}; tile < tiles.end; ) {
    loop {
      if (!raises) { break; }
      raises = false;
      raised = tile;
      // The span may have been left.
      span = visible_span({{ class_arguments }}, tiles, row0, row_end, tile);
{{ masking.fetch_mask("tile") }}
{{ begin_tile("first_column(tiles, tile)", "seq, full", ranges, advances=false) }}
{{ body("raise") }}
    }
# for masked in ["none", "all"]
  // Loop: tiles
  for (; tile < tiles.end && {{ "!" if masked == "none" else "!raises && " }}{{ hides_tile }}; tile = {{ tile_after(walk) }}) {
{{ begin_tile("first_column(tiles, tile)", "seq, full", ranges) }}
{{ body(masked) }}
  }
# endfor
  }
# else
  // Loop: tiles
  for (var tile = {{ first }}; tile < tiles.end; tile = {{ tile_after(walk) }}) {
{{ begin_tile("first_column(tiles, tile)", "seq, full", ranges) }}
{{ body("some") }}
  }
# endif
# endif
# endmacro

{#- A loop over the tiles of queries of one head that see a tile of keys. -#}
# macro query_loop(walk=false)
# if peels and not walk
# set body = caller
# call(masked) peeled_loops("tile * TILE_COLUMNS", "tile + 1u")
{{ body(masked) }}
# endcall
# else
# set first = "walk_tile" if walk and not mask else "first_tile"
    // Loop: tiles
    for (var tile = {{ first }}; tile < tiles.end; tile = {{ tile_after(walk) }}) {
{{ begin_tile("tile * TILE_COLUMNS", "full", "column0, column0 + TILE_COLUMNS, row0, row_end") }}
{{ caller("some") }}
    }
# endif
# endmacro

{#- A loop over the query heads of a group, as long as `condition` holds. It declares the bases of the queries' operands, and the first
    tile. -#}
# macro head_loop(condition="")
# set heads_per_kv = "params.heads / params.kv_heads"
  // Loop: heads
  for (var head = work.head; {{ condition ~ " && " if condition }}head < work.head + {{ heads_per_kv }}; head += 1u) {
# for operand in ["q", "d_o"]
    let {{ operand }}_base = operand_base(params.{{ operand }}, work.batch, head) + seq.q_start * params.{{ operand }}.seq;
# endfor
    let stats_base = operand_base(params.row_stats, work.batch, head) + seq.q_start;
# if column_scales
    let scales_base = operand_base(params.query_scales, work.batch, head) + seq.q_start;
# endif
# if modified or hides
    begin_pairs(work.sequence, work.batch, head);
# endif
# if mask
    let class_base = operand_base(params.mask_classes, work.sequence, head);
{{ first_tile() }}
# else
    let first_tile = tiles.first;
# endif
{{ caller() }}
  }
# endmacro
