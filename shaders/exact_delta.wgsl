{#- delta of half precision, from the products. One workgroup computes a tile of queries of one head:

      sum = 0
      for each tile of keys that the queries see:
        S = Q K^T * scale                                scores
        dP = dO V^T                                      probability_gradients
        sum += P * dP, with P = exp(S - lse)             accumulate
      delta = sum - d_lse                                finish

    In exact arithmetic sum is d_o . o. The rounding of o to half precision is too coarse wherever delta cancels: in a row that few
    keys dominate, and in the sum over rows of the sink logits' gradient. -#}
# include "tiled.wgsl"
# include "probability.wgsl"
# include "unit.wgsl"
# import templates ~ "/exact_delta.wgsl" as micro
# from "tile_main.wgsl" import tile_main
# from "tile_loops.wgsl" import key_loop
{{ micro.declare() }}

// Writes the statistics of the row at `row` of a head from `total`, the sum of p d_p, and from `largest`, the largest |p d_p|.
fn store_row(work: TileWork, row: u32, total: f32, largest: f32) {
  let row_lse = lse[operand_base(params.lse, work.batch, work.head) + row];
  // A row that sees nothing has an lse that depends on nothing.
  let sees = row_lse != params.negative_infinity;
# if d_lse
  let delta = total - d_lse[operand_base(params.d_lse, work.batch, work.head) + row];
# else
  let delta = total;
# endif
  let unit = query_unit(max(exponent_of(largest), exponent_of(delta)) + 1);
  row_stats[operand_base(params.row_stats, work.batch, work.head) + row] = vec4<f32>(probability_lse(row_lse), select(0.0, delta, sees), unit, 0.0);
}

# call tile_main()
# if alibi
  // Later kernels read the slope here and need no binding for it.
  if (thread == 0u && row0 == 0u) { row_stats[operand_base(params.row_stats, work.batch, work.head) + params.slope_row] = vec4<f32>(slope); }
# endif
  {{ micro.begin() }}
# call(masked) key_loop()
    {{ micro.scores() }}
    {{ micro.probability_gradients() }}
    {{ micro.accumulate(masked) }}
# endcall
  {{ micro.finish() }}
# endcall
