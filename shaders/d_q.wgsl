{#- Gradient by q: one workgroup computes a tile of queries of one head against all key tiles that they see.
    d_q = scale * sum over keys of d_s k, with d_s = p (d_o . v - delta), p = exp(s - lse). -#}
{% include "tiled.wgsl" %}
{% include "probability.wgsl" %}
{% import micro_kernel ~ "/d_q.wgsl" as micro %}
{{ micro.declare() }}

{% include "tiled_main.wgsl" %}

  {{ micro.begin() }}
  for (var tile = tiles.first; tile < tiles.end; tile = next_tile(tiles, tile)) {
    let column0 = tile * TILE_COLUMNS;
    let masked = !all_visible(row0, row_end, column0, column0 + TILE_COLUMNS);
    {{ micro.scores() }}
    {{ micro.probability_gradients() }}
    {{ micro.score_gradients() }}
    {{ micro.accumulate() }}
  }
  {{ micro.finish() }}
}
