{#- delta_i = sum over keys of p d_p - d_lse_i, with d_p = d_o . v, p = exp(s - lse): what d_o . o would be had o not
    been rounded to half precision. That rounding is too coarse wherever delta meets what it cancels with: in a row
    that few keys dominate, and in the sum over rows of the sink logits' gradient. One workgroup computes a tile of
    queries of one head. -#}
{% include "tiled.wgsl" %}
{% include "probability.wgsl" %}
{% import micro_kernel ~ "/exact_delta.wgsl" as micro %}
{{ micro.declare() }}

// `total` is a row's sum of p d_p.
fn row_delta(place: u32, total: f32) -> f32 {
  // The row sees nothing, and lse is no function of anything.
  if (lse[params.lse_offset + place] == params.negative_infinity) { return 0.0; }
{% if d_lse %}
  return total - d_lse[params.d_lse_offset + place];
{% else %}
  return total;
{% endif %}
}

{% include "tiled_main.wgsl" %}

  {{ micro.begin() }}
  for (var tile = tiles.first; tile < tiles.end; tile = next_tile(tiles, tile)) {
    let column0 = tile * TILE_COLUMNS;
    let masked = !all_visible(row0, row_end, column0, column0 + TILE_COLUMNS);
    {{ micro.scores() }}
    {{ micro.probability_gradients() }}
    {{ micro.accumulate() }}
  }
  {{ micro.finish() }}
}
