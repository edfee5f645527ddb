{#- delta_i = sum over keys of p d_p - d_lse_i, with d_p = d_o . v, p = exp(s - lse): what d_o . o would be had o not
    been rounded to half precision. That rounding is too coarse wherever delta meets what it cancels with: in a row
    that few keys dominate, and in the sum over rows of the sink logits' gradient. One workgroup computes a tile of
    queries of one head. -#}
# include "tiled.wgsl"
# include "probability.wgsl"
# include "unit.wgsl"
# import micro_kernel ~ "/exact_delta.wgsl" as micro
{{ micro.declare() }}

// What the row at `row` of a head needs of its `total`, the sum of p d_p, of which the largest is `largest`.
fn store_row(work: TileWork, row: u32, total: f32, largest: f32) {
  let row_lse = lse[operand_base(params.lse, work.batch, work.head) + row];
  // The row sees nothing, and lse is no function of anything.
  let sees = row_lse != params.negative_infinity;
# if d_lse
  let delta = total - d_lse[operand_base(params.d_lse, work.batch, work.head) + row];
# else
  let delta = total;
# endif
  let unit = query_unit(max(exponent_of(largest), exponent_of(delta)) + 1);
  row_terms[operand_base(params.row_terms, work.batch, work.head) + row] = vec4<f32>(probability_lse(row_lse), select(0.0, delta, sees), unit, 0.0);
}

# include "tiled_main.wgsl"
# if alibi

  // For the kernels that come after.
  if (thread == 0u && row0 == 0u) { row_terms[operand_base(params.row_terms, work.batch, work.head) + params.slope_row] = vec4<f32>(slope); }
# endif

  {{ micro.begin() }}
# include "key_loop.wgsl"
    {{ micro.scores() }}
    {{ micro.probability_gradients() }}
    {{ micro.accumulate() }}
  }
  {{ micro.finish() }}
# if batch > 1
  }
# endif
}
