{#- The gradient by the bias in portable blocks: rows are queries, columns are keys.
    Needs: portable/blocks.wgsl, scores.wgsl, the loops of d_bias.wgsl. Declares: the macros that d_bias.wgsl calls. -#}
# import "portable/blocks.wgsl" as blocks

{%- macro declare() %}{{ blocks.declare() }}{% endmacro -%}

# macro begin()
{{ blocks.begin_threads() }}
# for i, c in pairs(rows, quads)
  var d_bias_{{ i }}_{{ c }} = vec4<f32>();
# endfor
# endmacro

{#- d_bias += dS = P (dP - delta) of a tile. -#}
# macro add()
# for i in range(rows)
    let row_{{ i }} = row0 + ty + {{ i }}u * THREADS_R;
    var lse_{{ i }} = 0.0;
    var delta_{{ i }} = 0.0;
    var portion_{{ i }} = 1.0;
    if (row_{{ i }} < row_limit) {
      let stats = row_stats[stats_base + row_{{ i }}];
      lse_{{ i }} = stats.x;
      delta_{{ i }} = stats.y;
      portion_{{ i }} = share(seq, row_{{ i }}, stats.x);
    }
# endfor
{{ blocks.product("s", "q", "k") }}
{{ blocks.make_scores("s") }}
{{ blocks.product("d_p", "d_o", "v") }}
# for i, c in pairs(rows, quads)
    s_{{ i }}_{{ c }} = exp4(fma(s_{{ i }}_{{ c }}, vec4<f32>(params.score_scale), vec4<f32>(-lse_{{ i }}))) * portion_{{ i }} * (d_p_{{ i }}_{{ c }} - delta_{{ i }});
# endfor
{{ blocks.mask("s") }}
# for i, c in pairs(rows, quads)
    // Rows beyond the last add nothing, whatever the keys hold.
    d_bias_{{ i }}_{{ c }} += select(vec4<f32>(), s_{{ i }}_{{ c }}, row_{{ i }} < row_limit);
# endfor
# endmacro

# macro finish()
  let d_bias_base = operand_base(params.d_bias, own_number, own_head);
# if axes.seq_q
# for i in range(rows)
  {
    let row = own_row_tile * TILE_ROWS + ty + {{ i }}u * THREADS_R;
    if (row < params.pair_rows) {
# for c in range(quads)
      {
        let column = {{ blocks.quad_column(c) }};
# for e in range(4)
        if (column + {{ e }}u < params.pair_keys) { d_bias[d_bias_base + row * params.d_bias.seq + column + {{ e }}u] = d_bias_{{ i }}_{{ c }}.{{ xyzw[e] }}; }
# endfor
      }
# endfor
    }
  }
# endfor
# else
  // The sum of a column: first the rows of each thread, then the threads in order.
  workgroupBarrier();
# for c in range(quads)
  memory[ty * {{ threads_c * quads }}u + tx + {{ c }}u * THREADS_C] = d_bias_0_{{ c }}{% for i in range(1, rows) %} + d_bias_{{ i }}_{{ c }}{% endfor %};
# endfor
  workgroupBarrier();
  for (var quad = thread; quad < {{ threads_c * quads }}u; quad += THREADS) {
    var total = memory[quad];
    for (var y = 1u; y < THREADS_R; y += 1u) { total += memory[y * {{ threads_c * quads }}u + quad]; }
    let column = column0 + 4u * quad;
# for e in range(4)
    if (column + {{ e }}u < params.pair_keys) { d_bias[d_bias_base + column + {{ e }}u] = total.{{ xyzw[e] }}; }
# endfor
  }
# endif
# endmacro
