{#- delta in portable blocks: rows are queries, columns are keys.
    Needs: portable/blocks.wgsl, probability.wgsl, `main` of tile_main.wgsl. Declares: the macros that exact_delta.wgsl calls. -#}
# import "portable/blocks.wgsl" as blocks

{%- macro declare() %}{{ blocks.declare() }}{% endmacro -%}

# macro begin()
{{ blocks.begin() }}
# for i in range(rows)
  var sum_{{ i }} = 0.0;
  var largest_{{ i }} = 0.0;
  var lse_{{ i }} = 0.0;
  if (row_{{ i }} < row_limit) { lse_{{ i }} = probability_lse(lse[lse_base + row_{{ i }}]); }
# endfor
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

# macro accumulate(masked)
    // sum += P dP. The largest |P dP| of each row leads to the unit of d_q.
# for i, c in pairs(rows, quads)
    s_{{ i }}_{{ c }} = exp4(fma(s_{{ i }}_{{ c }}, vec4<f32>(params.score_scale), vec4<f32>(-lse_{{ i }}))) * d_p_{{ i }}_{{ c }};
# endfor
{{ blocks.mask("s") }}
# for i in range(rows)
    {
      var total = s_{{ i }}_0;
# for c in range(1, quads)
      total += s_{{ i }}_{{ c }};
# endfor
      sum_{{ i }} += (total.x + total.y) + (total.z + total.w);
      var sizes = abs(s_{{ i }}_0);
# for c in range(1, quads)
      sizes = max(sizes, abs(s_{{ i }}_{{ c }}));
# endfor
      largest_{{ i }} = max(largest_{{ i }}, max(max(sizes.x, sizes.y), max(sizes.z, sizes.w)));
    }
# endfor
# endmacro

# macro finish()
{{ blocks.reduce_rows("total", "sum", "sum") }}
    workgroupBarrier();
{{ blocks.reduce_rows("size", "largest", "max") }}
# for i in range(rows)
  if (tx == 0u && {{ blocks.writes(i) }}) {
    store_row(work, seq.q_start + row_{{ i }}, total_{{ i }}{% if bias %} * share(seq, row_{{ i }}, lse_{{ i }}){% endif %}, size_{{ i }});
  }
# endfor
# endmacro
