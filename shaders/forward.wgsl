{#- Forward pass: one workgroup computes a tile of queries of one head against all key tiles that they see.

    The outer loop knows nothing of how scores are formed or summed: the micro-kernel does. -#}
{% include "tiled.wgsl" %}
{% include "softmax.wgsl" %}
{% import micro_kernel ~ "/forward.wgsl" as micro %}
{{ micro.declare() }}

{% include "tiled_main.wgsl" %}

  {{ micro.begin() }}
  for (var tile = tiles.first; tile < tiles.end; tile = next_tile(tiles, tile)) {
    let column0 = tile * TILE_COLUMNS;
    let masked = !all_visible(row0, row_end, column0, column0 + TILE_COLUMNS);
    {{ micro.scores() }}
    {{ micro.softmax() }}
    {{ micro.accumulate() }}
  }
  {{ micro.finish() }}
}
