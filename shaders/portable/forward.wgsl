{#- The forward pass in portable blocks: rows are queries, columns are keys.
    Needs: portable/blocks.wgsl, softmax.wgsl, `main` of tile_main.wgsl. Declares: the macros that forward.wgsl calls. -#}
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

# macro scores(chunk)
    // S = Q K^T{{ ", with softcap, ALiBi or bias" if modified }}.
{{ blocks.product("s", "q", "k") }}
{{ blocks.make_scores("s") }}
# endmacro

{#- The online softmax. It leaves P as the P tile. -#}
# macro softmax(masked)
    // The largest visible score of each row in the tile.
{{ tile_max() }}
    // m = max(row_max, max of S by rows);  P = exp(S - m).
# for i in range(rows)
{{ row_max(i) }}
{{ exponentiate(i) }}
# endfor
{{ mask() }}
    // O *= exp(row_max - m);  row_sum = exp(row_max - m) row_sum + sum of P.
# for i in range(rows)
    {
{{ rescale(i) }}
{{ row_sum(i) }}
    }
# endfor
{{ blocks.store_p("s") }}
# endmacro

# macro tile_max()
# for i in range(rows)
    var thread_max_{{ i }} = 0.0;
# endfor
    if (is_partial) {
{{ thread_max(true) }}
    } else {
{{ thread_max(false) }}
    }
{{ blocks.reduce_rows("tile_max", "thread_max", "max") }}
# endmacro

{#- The largest visible score of each row among the columns of this thread. -#}
# macro thread_max(partial)
# for i in range(rows)
      {
        var largest = vec4<f32>(LOWEST);
# for c in range(quads)
# if partial
        largest = max(largest, select(vec4<f32>(LOWEST), s_{{ i }}_{{ c }} * params.scale_sign, {{ blocks.visible(i, c) }}));
# else
        largest = max(largest, s_{{ i }}_{{ c }} * params.scale_sign);
# endif
# endfor
        thread_max_{{ i }} = max(max(largest.x, largest.y), max(largest.z, largest.w));
      }
# endfor
# endmacro

{#- m = max(row_max, max of S by rows). The maximum is that of products, without the size of the scale: the largest product less itself is
    0, however large it is. -#}
# macro row_max(i)
    let old_max_{{ i }} = row_max_{{ i }};
    row_max_{{ i }} = max(old_max_{{ i }}, tile_max_{{ i }});
# endmacro

{#- P = exp(S - m). -#}
# macro exponentiate(i)
# for c in range(quads)
    s_{{ i }}_{{ c }} = exp4(fma(s_{{ i }}_{{ c }}, vec4<f32>(params.scale_sign), vec4<f32>(-row_max_{{ i }})) * params.scale_size);
# endfor
# endmacro

{#- Hidden pairs have no probability. They are hidden after the exponential, which may make any number of them. -#}
{%- macro mask() %}{{ blocks.mask("s") }}{% endmacro -%}

{#- O *= exp(row_max - m). -#}
# macro rescale(i)
      let rescale = exp1((old_max_{{ i }} - row_max_{{ i }}) * params.scale_size);
# for c in range(accumulator_quads.v)
      o_{{ i }}_{{ c }} *= rescale;
# endfor
# endmacro

{#- row_sum = exp(row_max - m) row_sum + sum of P, of the columns of this thread: `finish` adds up the threads of a row. -#}
# macro row_sum(i)
      var total = s_{{ i }}_0;
# for c in range(1, quads)
      total += s_{{ i }}_{{ c }};
# endfor
      row_sum_{{ i }} = fma(row_sum_{{ i }}, rescale, (total.x + total.y) + (total.z + total.w));
# endmacro

# macro accumulate(chunk)
    // O += P V.
{{ blocks.accumulate("o", "v") }}
# endmacro

{#- The denominator of each row takes in the sink logit. Then o = O / row_sum and lse are written. -#}
# macro finish()
  workgroupBarrier();
{{ blocks.reduce_rows("total", "row_sum", "sum") }}
# for i in range(rows)
  let end_{{ i }} = finish_row(row_max_{{ i }}, total_{{ i }}, work.head);
  let factor_{{ i }} = end_{{ i }}.factor;
  if (tx == 0u && {{ blocks.writes(i) }}) { lse[lse_base + row_{{ i }}] = select(params.negative_infinity, end_{{ i }}.lse, row_{{ i }} < seq.seq_q); }
# if has_row_max
  if (tx == 0u && {{ blocks.writes(i) }}) {
    let at = operand_base(params.row_max, work.batch, work.head) + seq.q_start + row_{{ i }};
    row_max[at] = select(params.negative_infinity, largest_score(row_max_{{ i }}, total_{{ i }}), row_{{ i }} < seq.seq_q);
  }
# endif
# endfor
{{ blocks.store("o", "o", "factor_") }}
# if o_lo
{{ blocks.store("o", "o_lo", "factor_") }}
# endif
# endmacro
