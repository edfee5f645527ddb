{#- Gradient by q: one workgroup computes a tile of queries of one head against all key tiles that they see.
    d_q = scale * sum over keys of d_s k, with d_s = p (d_o . v - delta), p = exp(s - lse). -#}
# include "tiled.wgsl"
# include "probability.wgsl"
# import micro_kernel ~ "/d_q.wgsl" as micro
{{ micro.declare() }}

# include "tiled_main.wgsl"

  {{ micro.begin() }}
# if units
  for (var tile = {{ "first_tile" if mask else "walk_tile" }}; tile < tiles.end; tile = {{ "next_shown" if mask else "next_of_walk" }}) {
# include "key_tile.wgsl"
    {{ micro.find_units() }}
  }
# endif
# if cooperative
  {{ micro.begin_tiles() }}
# endif
# include "key_loop.wgsl"
    {{ micro.scores() }}
    {{ micro.probability_gradients() }}
    {{ micro.score_gradients() }}
    {{ micro.accumulate() }}
  }
  {{ micro.finish() }}
# if batch > 1
  }
# endif
}
