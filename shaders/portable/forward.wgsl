{#- The forward pass in portable blocks: rows are queries, columns are keys. -#}
# import "portable/blocks.wgsl" as blocks

{%- macro declare() %}{{ blocks.declare() }}{% endmacro -%}

# macro begin()
{{ blocks.begin() }}
# for i in range(rows)
  var row_max_{{ i }} = LOWEST;
  var row_sum_{{ i }} = 0.0;
# endfor
{{ blocks.accumulator("o", "v") }}
# endmacro

# macro scores()
{{ blocks.product("s", "q", "k") }}
{{ blocks.make_scores("s") }}
# endmacro

{#- The largest visible score of each row that this thread holds. -#}
# macro visible_max(is_partial)
# for i in range(rows)
      {
        var largest = vec4<f32>(LOWEST);
# for c in range(quads)
# if is_partial
        largest = max(largest, select(vec4<f32>(LOWEST), s_{{ i }}_{{ c }} * params.scale_sign, {{ blocks.visible(i, c) }}));
# else
        largest = max(largest, s_{{ i }}_{{ c }} * params.scale_sign);
# endif
# endfor
        thread_max_{{ i }} = max(max(largest.x, largest.y), max(largest.z, largest.w));
      }
# endfor
# endmacro

{#- Online softmax: updates each row's maximum and sum, rescales the output, leaves the probabilities
    as weights. The maximum is of products without the scale's size: the largest one less itself is 0, however large. -#}
# macro softmax()
# for i in range(rows)
    var thread_max_{{ i }} = 0.0;
# endfor
    if (is_partial) {
{{ visible_max(true) }}
    } else {
{{ visible_max(false) }}
    }
{{ blocks.reduce_rows("tile_max", "thread_max", "max") }}
# for i in range(rows)
    let old_max_{{ i }} = row_max_{{ i }};
    row_max_{{ i }} = max(old_max_{{ i }}, tile_max_{{ i }});
# for c in range(quads)
    s_{{ i }}_{{ c }} = exp4(fma(s_{{ i }}_{{ c }}, vec4<f32>(params.scale_sign), vec4<f32>(-row_max_{{ i }})) * params.scale_size);
# endfor
# endfor
{{ blocks.hide("s") }}
# for i in range(rows)
    {
      let rescale = exp1((old_max_{{ i }} - row_max_{{ i }}) * params.scale_size);
# for c in range(accumulator_quads.v)
      o_{{ i }}_{{ c }} *= rescale;
# endfor
      var total = s_{{ i }}_0;
# for c in range(1, quads)
      total += s_{{ i }}_{{ c }};
# endfor
      row_sum_{{ i }} = fma(row_sum_{{ i }}, rescale, (total.x + total.y) + (total.z + total.w));
    }
# endfor
{{ blocks.store_p("s") }}
# endmacro

{%- macro accumulate() %}{{ blocks.accumulate("o", "v") }}{% endmacro -%}

{#- Sums the rows' denominators, adds the sink logit once, and writes o and lse. -#}
# macro finish()
  workgroupBarrier();
{{ blocks.reduce_rows("total", "row_sum", "sum") }}
# for i in range(rows)
  let end_{{ i }} = finish_row(row_max_{{ i }}, total_{{ i }}, work.head);
  let factor_{{ i }} = end_{{ i }}.factor;
  if (tx == 0u && {{ blocks.writes(i) }}) { lse[lse_base + row_{{ i }}] = select(params.negative_infinity, end_{{ i }}.lse, row_{{ i }} < seq.seq_q); }
# endfor
{{ blocks.store("o", "o", "factor_") }}
# if o_rest
{{ blocks.store("o", "o_rest", "factor_") }}
# endif
# endmacro
