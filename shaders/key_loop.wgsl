{#- Opens the loop over the tiles of keys that a tile of queries sees. -#}
{% if cooperative or not bias %}
  let open = open_tiles({{ here_argument }}row0, row_end);
{% endif %}
  for (var tile = {{ "first_tile" if mask else "tiles.first" }}; tile < tiles.end; tile = {{ "next_shown" if cooperative and mask else following }}) {
    let column0 = first_column(tiles, tile);
{% if cooperative %}
    let masked = !is_open({{ here_argument }}open, column0);
{% if mask %}
{% include "next_shown.wgsl" %}
{% endif %}
{% elif bias %}
    // Any number of it may be -infinity.
    let masked = true;
{% else %}
    let masked = !is_open({{ here_argument }}open, column0){% if mask %} || tile_class({{ class_arguments }}, row0, row_end, column0, column0 + TILE_COLUMNS) != 1u{% endif %};
{% endif %}
