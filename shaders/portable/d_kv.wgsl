{#- The gradients by k and v in portable blocks: rows are keys, columns are queries.
    Needs: portable/blocks.wgsl, probability.wgsl, `main` of tile_main.wgsl. Declares: the macros that d_kv.wgsl calls. -#}
# import "portable/blocks.wgsl" as blocks

{%- macro declare() %}{{ blocks.declare() }}{% endmacro -%}

# macro begin()
{{ blocks.begin() }}
{{ blocks.accumulator("d_k", "q") }}
{{ blocks.accumulator("d_v", "d_o") }}
# endmacro

# macro begin_head()
# endmacro

# macro scores()
    // S = K Q^T{{ ", with softcap, ALiBi or bias" if modified }}.
{{ blocks.product("s", "k", "q") }}
{{ blocks.make_scores("s") }}
# endmacro

# macro probabilities(masked)
    // P = exp(S - lse), stored as the P tile and kept in registers.
# for c in range(quads)
    var delta_{{ c }} = vec4<f32>();
    {
      let query = column0 + 4u * (tx + {{ c }}u * THREADS_C);
      var row_lse = vec4<f32>();
# if bias
      var portion = vec4<f32>(1.0);
# endif
# for e in range(4)
      if (query + {{ e }}u < column_limit) {
        let stats = row_stats[stats_base + query + {{ e }}u];
        row_lse.{{ xyzw[e] }} = stats.x;
        delta_{{ c }}.{{ xyzw[e] }} = stats.y;
# if bias
        portion.{{ xyzw[e] }} = share(seq, query + {{ e }}u, stats.x);
# endif
      }
# endfor
# for i in range(rows)
      s_{{ i }}_{{ c }} = exp4(fma(s_{{ i }}_{{ c }}, vec4<f32>(params.score_scale), -row_lse)){{ " * portion" if bias }};
# endfor
    }
# endfor
{{ blocks.mask("s") }}
    workgroupBarrier();
{{ blocks.store_p("s") }}
# endmacro

# macro accumulate_d_v()
    // dV += P dO.
{{ blocks.accumulate("d_v", "d_o") }}
# endmacro

# macro probability_gradients()
    // dP = V dO^T.
{{ blocks.product("d_p", "v", "d_o") }}
# endmacro

# macro score_gradients(masked)
    // dS = P (dP - delta), stored as the P tile.
# for c, i in pairs(quads, rows)
    d_p_{{ i }}_{{ c }} = s_{{ i }}_{{ c }} * (d_p_{{ i }}_{{ c }} - delta_{{ c }});
# endfor
{{ blocks.mask("d_p") }}
{{ blocks.uncap("d_p") }}
    workgroupBarrier();
{{ blocks.store_p("d_p") }}
# endmacro

# macro accumulate_d_k()
    // dK += dS Q.
{{ blocks.accumulate("d_k", "q") }}
# endmacro

# macro finish()
{{ blocks.store("d_k", "d_k", "params.scale") }}
{{ blocks.store("d_v", "d_v", "1.0") }}
# endmacro
