{#- Gradients by k and v: one workgroup computes a tile of keys of one key head against all query tiles that
    see them, of every query head of the group in turn, so that GQA needs no second pass.
    d_v = sum over queries of p d_o;  d_k = scale * sum over queries of d_s q. -#}
# include "tiled.wgsl"
# include "probability.wgsl"
# import micro_kernel ~ "/d_kv.wgsl" as micro
{{ micro.declare() }}

# include "tiled_main.wgsl"

  {{ micro.begin() }}
# if units
  for (var head = work.head; waits && head < work.head + params.heads / params.kv_heads; head += 1u) {
# include "query_head.wgsl"
    {{ micro.begin_walk() }}
    for (var tile = {{ "first_tile" if mask else "walk_tile" }}; tile < tiles.end; tile = {{ "next_shown" if mask else "next_of_walk" }}) {
# include "query_tile.wgsl"
      {{ micro.find_units() }}
    }
  }
# endif
# if cooperative
  {{ micro.begin_tiles() }}
# endif
  for (var head = work.head; head < work.head + params.heads / params.kv_heads; head += 1u) {
# include "query_head.wgsl"
    {{ micro.begin_head() }}
    for (var tile = first_tile; tile < tiles.end; tile = {{ "next_shown" if cooperative and mask else following }}) {
# include "query_tile.wgsl"
      {{ micro.scores() }}
      {{ micro.probabilities() }}
      {{ micro.accumulate_d_v() }}
      {{ micro.probability_gradients() }}
      {{ micro.score_gradients() }}
      {{ micro.accumulate_d_k() }}
    }
  }
  {{ micro.finish() }}
# if batch > 1
  }
# endif
}
