{#- delta on fragments: rows are queries, columns are keys.
    Needs: the cooperative macros, probability.wgsl, `main` of tile_main.wgsl. Declares: the macros that exact_delta.wgsl calls. -#}
# import "cooperative/fragments.wgsl" as matrix
# import "cooperative/mask.wgsl" as masking
# import "cooperative/columns.wgsl" as columns
# import "cooperative/scores.wgsl" as score
# import "cooperative/fallback.wgsl" as fallback

{%- macro declare() %}{{ matrix.declare() }}{% endmacro -%}

# macro begin()
{{ matrix.begin() }}
{{ columns.begin_columns() }}
{{ columns.fetch_first() }}
{{ matrix.resident("q") }}
{{ matrix.resident("d_o") }}
{{ matrix.row_scales("q") }}
# for r in range(lane_rows)
  var sum_{{ r }} = 0.0;
  var largest_{{ r }} = 0.0;
  var shift_{{ r }} = 0.0;
  if (row_{{ r }} < row_limit) {
    let own = lse[lse_base + row_{{ r }}];
    shift_{{ r }} = {{ matrix.shift("probability_lse(own)") }};
# if bias
    // The probabilities of this row need a count of its keys. A row without keys has none to count.
    fallback_{{ r }} = own <= ABSORBING && own != params.negative_infinity;
# endif
  }
# endfor
{{ columns.put_columns() }}
# endmacro

# macro scores()
    // S = Q K^T.
{{ columns.fetch_next() }}
{{ matrix.product("s", "q", "k", "stage") }}
# endmacro

# macro probability_gradients()
    // dP = dO V^T.
{{ matrix.product("d_p", "d_o", "v", "stage") }}
# endmacro

# macro accumulate(masked)
    // sum += P dP. The largest |P dP| of each row leads to the unit of d_q.
{{ score.begin_scores() }}
{{ matrix.rows_of("x", "s", 0) }}
{{ score.make_scores("x", "", masked) }}
{{ matrix.rows_of("y", "d_p", 1) }}
# for r in range(lane_rows)
# for n in range(lane_quads)
    var p_d_p_{{ r }}_{{ n }} = {{ score.exponential("x_" ~ r ~ "_" ~ n, "shift_" ~ r, r) }} * y_{{ r }}_{{ n }};
# endfor
# endfor
# if bias
    // A key that the bias hides may hold a NaN, and 0 times it is NaN.
# for r, n in pairs(lane_rows, lane_quads)
    p_d_p_{{ r }}_{{ n }} = select(p_d_p_{{ r }}_{{ n }}, vec4<f32>(), bitcast<vec4<u32>>(bias4(seq, row_{{ r }}, {{ matrix.quad_column(n) }})) == vec4<u32>(0xff800000u));
# endfor
# endif
{{ masking.hide("p_d_p", "0.0", masked) }}
# for r in range(lane_rows)
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
{{ columns.next_stage() }}
# endmacro

# macro finish()
# for r in range(lane_rows)
{{ matrix.reduce_row("sum_" ~ r, "sum") }}
{{ matrix.reduce_row("largest_" ~ r, "max") }}
  if (row_{{ r }} < row_limit && lane_column == 0u) {
    let total = sum_{{ r }}{{ matrix.inverse("d_o", r) }};
    fallback_{{ r }} = fallback_{{ r }} || !is_finite4(vec4<f32>(total));
    store_row(work, seq.q_start + row_{{ r }}, total, largest_{{ r }});
  }
# endfor
{{ fallback.report_fallback() }}
# endmacro
