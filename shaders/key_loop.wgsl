{#- Opens the loop over the tiles of keys that a tile of queries sees. -#}
  for (var tile = {{ "first_tile" if mask else "tiles.first" }}; tile < tiles.end; tile = {{ following }}) {
    let column0 = tile * TILE_COLUMNS;
{% if bias %}
    // Any number of it may be -infinity.
    let masked = true;
{% else %}
    let masked = !all_visible({{ here_argument }}row0, row_end, column0, column0 + TILE_COLUMNS){% if mask %} || tile_class({{ here_argument }}class_base, row0, row_end, column0, column0 + TILE_COLUMNS) != 1u{% endif %};
{% endif %}
