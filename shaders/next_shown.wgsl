{#- What the mask makes of a tile, and the next one that it shows something of, whose span `span` is then. -#}
# import "cooperative/blocks.wgsl" as blocks
    let mask_partial = span.kind != 1u;
{{ blocks.mask_of_tile() }}
    next_shown = tile + 1u;
    var leaves = next_shown >= span.end;
    // A loop that runs once, as in `hide`.
    loop {
      if (!leaves) { break; }
      leaves = false;
      span = visible_span({{ class_arguments }}, tiles, row0, row_end, {{ "next_shown" if rows_are_keys else "next_tile(tiles, tile)" }});
      next_shown = span.first;
{{ blocks.fetch_mask("next_shown") }}
    }
