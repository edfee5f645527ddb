{#- Opens the work on a tile of keys. -#}
    let column0 = first_column(tiles, tile);
# if cooperative
    let is_partial = !is_full({{ here_argument }}full, column0);
# if mask
# include "next_shown.wgsl"
# endif
# elif bias
    // Any number of it may be -infinity.
    let is_partial = true;
# else
    let is_partial = !is_full({{ here_argument }}full, column0){% if mask %} || tile_class({{ class_arguments }}, row0, row_end, column0, column0 + TILE_COLUMNS) != 1u{% endif %};
# endif
