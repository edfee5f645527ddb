{#- The forward pass in portable blocks: rows are queries, columns are keys. -#}
# import "portable/blocks.wgsl" as blocks

{%- macro declare() %}{{ blocks.declare() }}{% endmacro -%}

# macro begin()
{{ blocks.begin() }}
# for i in range(rows)
  var max_{{ i }} = LOWEST;
  var sum_{{ i }} = 0.0;
# endfor
{{ blocks.accumulator("o", "v") }}
# endmacro

# macro scores()
{{ blocks.product("s", "q", "k") }}
{{ blocks.make_scores("s") }}
# endmacro

{#- The largest visible score of each row that this thread holds. -#}
# macro most(masked)
# for i in range(rows)
      {
        var most = vec4<f32>(LOWEST);
# for c in range(quads)
# if masked
        most = max(most, select(vec4<f32>(LOWEST), s_{{ i }}_{{ c }} * params.scale_sign, {{ blocks.visible(i, c) }}));
# else
        most = max(most, s_{{ i }}_{{ c }} * params.scale_sign);
# endif
# endfor
        most_{{ i }} = max(max(most.x, most.y), max(most.z, most.w));
      }
# endfor
# endmacro

{#- Online softmax: updates each row's maximum and sum, rescales the output, leaves the probabilities
    as weights. The maximum is of products without the scale's size: the largest one less itself is 0, however large. -#}
# macro softmax()
# for i in range(rows)
    var most_{{ i }} = 0.0;
# endfor
    if (masked) {
{{ most(true) }}
    } else {
{{ most(false) }}
    }
{{ blocks.reduce_rows("row_most", "most", "max") }}
# for i in range(rows)
    let before_{{ i }} = max_{{ i }};
    max_{{ i }} = max(before_{{ i }}, row_most_{{ i }});
# for c in range(quads)
    s_{{ i }}_{{ c }} = exp4(fma(s_{{ i }}_{{ c }}, vec4<f32>(params.scale_sign), vec4<f32>(-max_{{ i }})) * params.scale_size);
# endfor
# endfor
{{ blocks.hide("s") }}
# for i in range(rows)
    {
      let rescale = exp1((before_{{ i }} - max_{{ i }}) * params.scale_size);
# for c in range(accumulator_quads.v)
      o_{{ i }}_{{ c }} *= rescale;
# endfor
      var total = s_{{ i }}_0;
# for c in range(1, quads)
      total += s_{{ i }}_{{ c }};
# endfor
      sum_{{ i }} = fma(sum_{{ i }}, rescale, (total.x + total.y) + (total.z + total.w));
    }
# endfor
{{ blocks.keep_weights("s") }}
# endmacro

{%- macro accumulate() %}{{ blocks.accumulate("o", "v") }}{% endmacro -%}

{#- Sums the rows' denominators, adds the sink logit once, and writes o and lse. -#}
# macro finish()
  workgroupBarrier();
{{ blocks.reduce_rows("total", "sum", "sum") }}
# for i in range(rows)
  let end_{{ i }} = finish_row(max_{{ i }}, total_{{ i }}, work.head);
  let factor_{{ i }} = end_{{ i }}.factor;
  if (tx == 0u && {{ blocks.writes(i) }}) { lse[lse_base + row_{{ i }}] = {% if lengths %}select(params.negative_infinity, end_{{ i }}.lse, row_{{ i }} < here.seq_q){% else %}end_{{ i }}.lse{% endif %}; }
# endfor
{{ blocks.store("o", "o", "factor_") }}
# if o_rest
{{ blocks.store("o", "o_rest", "factor_") }}
# endif
# endmacro
