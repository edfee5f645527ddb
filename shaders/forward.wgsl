{#- The forward pass. One workgroup computes a tile of queries of one head:

      row_max = lowest;  row_sum = 0;  O = 0
      for each tile of keys that the queries see:
        S = Q K^T * scale                                scores: softcap, ALiBi and bias where asked for
        S = hidden where the rule hides                  mask
        m = max(row_max, max of S by rows)               row_max
        O *= exp(row_max - m);  row_sum *= the same      rescale
        P = exp(S - m);  row_max = m                     exponentiate
        row_sum += sum of P by rows                      row_sum
        O += P V                                         accumulate
      row_sum += exp(sink - row_max)                     finish: the sink logit has no value
      o = O / row_sum;  lse = row_max + log(row_sum)

    The micro-kernel forms the products and holds S, P and O. -#}
# include "tiled.wgsl"
# include "softmax.wgsl"
# import templates ~ "/forward.wgsl" as micro
# from "tile_main.wgsl" import tile_main
# from "tile_loops.wgsl" import key_loop, chunks_of_tile
{{ micro.declare() }}

# call tile_main()
  {{ micro.begin() }}
# call(masked) key_loop()
# if masked == "raise"
    {{ micro.raise("some" if mask else "none") }}
# elif optimistic and (mask or masked != "all")
    {{ micro.optimistic_tile(masked) }}
# else
# call(chunk) chunks_of_tile()
    {{ micro.scores(chunk) }}
    {{ micro.softmax(masked) }}
    {{ micro.accumulate(chunk) }}
# endcall
# endif
# endcall
  {{ micro.finish() }}
# endcall
