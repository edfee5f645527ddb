{#- The gradient by q. One workgroup computes a tile of queries of one head:

      dQ = 0
      for each tile of keys that the queries see:
        S = Q K^T * scale                                scores
        dP = dO V^T                                      probability_gradients
        dS = exp(S - lse) * (dP - delta)                 score_gradients: times softcap's derivative
        dQ += dS K                                       accumulate
      d_q = scale * dQ                                   finish

    Cooperative kernels hold dS in f16, in a unit for each row. In bf16 a walk over the first tiles finds the units before the loop. -#}
# include "tiled.wgsl"
# include "probability.wgsl"
# import templates ~ "/d_q.wgsl" as micro
# from "tile_main.wgsl" import tile_main
# from "tile_loops.wgsl" import key_loop
{{ micro.declare() }}

# call tile_main()
  {{ micro.begin() }}
# if units
# call(masked) key_loop(walk=true)
    {{ micro.find_units() }}
# endcall
# endif
# if prefetches_tiles
  {{ micro.begin_tiles() }}
# endif
# call(masked) key_loop()
    {{ micro.scores() }}
    {{ micro.probability_gradients() }}
    {{ micro.score_gradients(masked) }}
    {{ micro.accumulate() }}
# endcall
  {{ micro.finish() }}
# endcall
