{#- delta on fragments: rows are queries, columns are keys. -#}
# import "cooperative/blocks.wgsl" as blocks

{%- macro declare() %}{{ blocks.declare() }}{% endmacro -%}

# macro begin()
{{ blocks.begin() }}
{{ blocks.begin_columns() }}
{{ blocks.fetch_first() }}
{{ blocks.resident("q") }}
{{ blocks.resident("d_o") }}
{{ blocks.row_scales("q") }}
# for r in range(row_fragments)
  var sum_{{ r }} = 0.0;
  var largest_{{ r }} = 0.0;
  var shift_{{ r }} = 0.0;
  if (row_{{ r }} < row_limit) {
    let own = lse[lse_base + row_{{ r }}];
    shift_{{ r }} = {{ blocks.shift("probability_lse(own)") }};
# if bias
    // Its probabilities take counting its keys; of none there is nothing to count.
    fallback_{{ r }} = own <= ABSORBING && own != params.negative_infinity;
# endif
  }
# endfor
{{ blocks.put_columns() }}
# endmacro

# macro scores()
{{ blocks.fetch_next() }}
{{ blocks.product("s", "q", "k", "stage") }}
# endmacro

# macro probability_gradients()
{{ blocks.product("d_p", "d_o", "v", "stage") }}
# endmacro

{#- Sums p d_p. -#}
# macro accumulate()
{{ blocks.begin_scores() }}
# for r in range(row_fragments)
{{ blocks.store_rows("s", r) }}
{{ blocks.load_rows("x", r, 0) }}
# endfor
{{ blocks.make_scores("x", "") }}
# for r in range(row_fragments)
{{ blocks.store_rows("d_p", r) }}
{{ blocks.load_rows("y", r, 1) }}
# for n in range(lane_quads)
    var p_d_p_{{ r }}_{{ n }} = {{ blocks.exponential("x_" ~ r ~ "_" ~ n, "shift_" ~ r, r) }} * y_{{ r }}_{{ n }};
# endfor
# endfor
# if bias
    // A key that the bias hides may hold a NaN, which no zero weight takes out.
# for r, n in pairs(row_fragments, lane_quads)
    p_d_p_{{ r }}_{{ n }} = select(p_d_p_{{ r }}_{{ n }}, vec4<f32>(), bitcast<vec4<u32>>(bias4(row_{{ r }}, {{ blocks.quad_column(n) }})) == vec4<u32>(0xff800000u));
# endfor
# endif
{{ blocks.hide("p_d_p", "0.0") }}
# for r in range(row_fragments)
    {
      var total = p_d_p_{{ r }}_0;
# for n in range(1, lane_quads)
      total += p_d_p_{{ r }}_{{ n }};
# endfor
      sum_{{ r }} += (total.x + total.y) + (total.z + total.w);
      var sizes = abs(p_d_p_{{ r }}_0);
# for n in range(1, lane_quads)
      sizes = max(sizes, abs(p_d_p_{{ r }}_{{ n }}));
# endfor
      largest_{{ r }} = max(largest_{{ r }}, max(max(sizes.x, sizes.y), max(sizes.z, sizes.w)));
    }
# endfor
{{ blocks.next_stage() }}
# endmacro

# macro finish()
# for r in range(row_fragments)
{{ blocks.reduce_row("sum_" ~ r, "sum") }}
{{ blocks.reduce_row("largest_" ~ r, "max") }}
  if (row_{{ r }} < row_limit && part == 0u) {
    let total = sum_{{ r }}{{ blocks.inverse("d_o", r) }};
    fallback_{{ r }} = fallback_{{ r }} || !is_finite4(vec4<f32>(total));
    store_row(work, {% if lengths %}here.q_start + {% endif %}row_{{ r }}, total, largest_{{ r }});
  }
# endfor
{{ blocks.report_fallback() }}
# endmacro
