{#- The first tile of which the mask shows something. Cooperative kernels keep what they have read of its classes. -#}
{% if cooperative %}
  var classes = Classes(0u, 0xffffffffu);
  var upcoming = seen_tile({{ class_arguments }}, tiles, row0, row_end, tiles.first);
  let first_tile = upcoming.tile;
{% else %}
  let first_tile = seen_tile({{ class_arguments }}, tiles, row0, row_end, tiles.first);
{% endif %}
