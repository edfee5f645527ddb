{#- The first tile of which the mask shows something. Cooperative kernels keep its span, and what they have read of its classes. -#}
# if cooperative
  var classes = Classes(0u, 0xffffffffu);
  var span = visible_span({{ class_arguments }}, tiles, row0, row_end, tiles.first);
  let first_tile = span.first;
  var next_shown = first_tile;
# else
  let first_tile = visible_tile({{ class_arguments }}, tiles, row0, row_end, tiles.first);
# endif
