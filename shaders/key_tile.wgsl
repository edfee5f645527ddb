{#- Opens the work on a tile of keys. -#}
    let column0 = first_column(tiles, tile);
# if cooperative
    let masked = !is_open({{ here_argument }}open, column0);
# if mask
# include "next_shown.wgsl"
# endif
# elif bias
    // Any number of it may be -infinity.
    let masked = true;
# else
    let masked = !is_open({{ here_argument }}open, column0){% if mask %} || tile_class({{ class_arguments }}, row0, row_end, column0, column0 + TILE_COLUMNS) != 1u{% endif %};
# endif
