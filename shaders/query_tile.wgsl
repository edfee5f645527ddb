{#- Opens the work on a tile of queries. -#}
      let column0 = tile * TILE_COLUMNS;
# if cooperative
      let masked = !is_open(open, column0);
# if mask
# include "next_shown.wgsl"
# endif
# elif bias
      // Any number of it may be -infinity.
      let masked = true;
# else
      let masked = !is_open(open, column0){% if mask %} || tile_class({{ class_arguments }}, column0, column0 + TILE_COLUMNS, row0, row_end) != 1u{% endif %};
# endif
