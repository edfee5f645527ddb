{#- Opens the loop over the tiles of keys that a tile of queries sees. -#}
  for (var tile = {{ "first_tile" if mask else "tiles.first" }}; tile < tiles.end; tile = {{ "next_shown" if cooperative and mask else following }}) {
# include "key_tile.wgsl"
