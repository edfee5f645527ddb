{#- The gradient by q in portable blocks: rows are queries, columns are keys.
    Needs: portable/blocks.wgsl, probability.wgsl, `main` of tile_main.wgsl. Declares: the macros that d_q.wgsl calls. -#}
# import "portable/blocks.wgsl" as blocks

{%- macro declare() %}{{ blocks.declare() }}{% endmacro -%}

# macro begin()
{{ blocks.begin() }}
# for i in range(rows)
  var lse_{{ i }} = 0.0;
  var delta_{{ i }} = 0.0;
# if bias
  var portion_{{ i }} = 1.0;
# endif
  if (row_{{ i }} < row_limit) {
    let stats = row_stats[stats_base + row_{{ i }}];
    lse_{{ i }} = stats.x;
    delta_{{ i }} = stats.y;
# if bias
    portion_{{ i }} = share(seq, row_{{ i }}, stats.x);
# endif
  }
# endfor
{{ blocks.accumulator("d_q", "k") }}
# if slope_rows
# for i in range(rows)
  var d_slope_{{ i }} = 0.0;
# endfor
# endif
# endmacro

# macro scores()
    // S = Q K^T{{ ", with softcap, ALiBi or bias" if modified }}.
{{ blocks.product("s", "q", "k") }}
{{ blocks.make_scores("s") }}
# endmacro

# macro probability_gradients()
    // dP = dO V^T.
{{ blocks.product("d_p", "d_o", "v") }}
# endmacro

# macro score_gradients(masked)
    // dS = exp(S - lse) (dP - delta), stored as the P tile. With ALiBi |p - j| dS is summed along each row, too.
# for i, c in pairs(rows, quads)
    s_{{ i }}_{{ c }} = exp4(fma(s_{{ i }}_{{ c }}, vec4<f32>(params.score_scale), vec4<f32>(-lse_{{ i }}))) * (d_p_{{ i }}_{{ c }} - delta_{{ i }});
# endfor
{{ blocks.mask("s") }}
# if slope_rows
# for i, c in pairs(rows, quads)
    {
      let terms = s_{{ i }}_{{ c }} * distance4(seq, row_{{ i }}, {{ blocks.quad_column(c) }});
      d_slope_{{ i }} += (terms.x + terms.y) + (terms.z + terms.w);
    }
# endfor
# endif
{{ blocks.uncap("s") }}
    workgroupBarrier();
{{ blocks.store_p("s") }}
# endmacro

# macro accumulate()
    // dQ += dS K.
{{ blocks.accumulate("d_q", "k") }}
# endmacro

{#- d_q is linear in the probabilities, so the factor that shares them among keys with the largest bias comes last. -#}
# macro finish()
# if bias
# for i in range(rows)
  let factor_{{ i }} = params.scale * portion_{{ i }};
# endfor
# endif
{{ blocks.store("d_q", "d_q", "factor_" if bias else "params.scale") }}
# if slope_rows
{{ blocks.reduce_rows("total", "d_slope", "sum") }}
# for i in range(rows)
  if (tx == 0u && {{ blocks.writes(i) }}) { d_slope_rows[slope_rows_base + row_{{ i }}] = total_{{ i }}{{ " * portion_" ~ i if bias }}; }
# endfor
# endif
# endmacro
