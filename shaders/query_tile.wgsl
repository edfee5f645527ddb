{#- Opens the work on a tile of queries. -#}
      let column0 = tile * TILE_COLUMNS;
# if cooperative
      let is_partial = !is_full(full, column0);
# if mask
# include "next_shown.wgsl"
# endif
# elif bias
      // Any number of it may be -infinity.
      let is_partial = true;
# else
      let is_partial = !is_full(full, column0){% if mask %} || tile_class({{ class_arguments }}, column0, column0 + TILE_COLUMNS, row0, row_end) != 1u{% endif %};
# endif
