{#- The gradients by k and v. One workgroup computes a tile of keys of one key head:

      dK = 0;  dV = 0
      for each query head of the group:
        for each tile of queries that see some of the keys:
          S = K Q^T * scale                              scores
          P = exp(S - lse)                               probabilities
          dV += P dO                                     accumulate_d_v
          dP = V dO^T                                    probability_gradients
          dS = P * (dP - delta)                          score_gradients: times softcap's derivative
          dK += dS Q                                     accumulate_d_k
      d_k = scale * dK;  d_v = dV                        finish

    The query heads of a group take turns, so grouped heads need neither a second pass nor atomics. Cooperative kernels hold dS in f16,
    in a unit for each row. A walk over the first tiles finds the units before the loop. -#}
# include "tiled.wgsl"
# include "probability.wgsl"
# import templates ~ "/d_kv.wgsl" as micro
# from "tile_main.wgsl" import tile_main
# from "tile_loops.wgsl" import head_loop, query_loop
{{ micro.declare() }}

# call tile_main()
  {{ micro.begin() }}
# if units
# call head_loop(condition="waits")
    {{ micro.begin_walk() }}
# call(masked) query_loop(walk=true)
      {{ micro.find_units() }}
# endcall
# endcall
# endif
# if prefetches_tiles
  {{ micro.begin_tiles() }}
# endif
# call head_loop()
    {{ micro.begin_head() }}
# call(masked) query_loop()
      {{ micro.scores() }}
      {{ micro.probabilities(masked) }}
      {{ micro.accumulate_d_v() }}
      {{ micro.probability_gradients() }}
      {{ micro.score_gradients(masked) }}
      {{ micro.accumulate_d_k() }}
# endcall
# endcall
  {{ micro.finish() }}
# endcall
