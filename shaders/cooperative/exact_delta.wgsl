{#- delta on fragments: rows are queries, columns are keys. -#}
{% import "cooperative/blocks.wgsl" as blocks %}

{%- macro declare() %}{{ blocks.declare() }}{% endmacro -%}

{%- macro begin() %}
{{ blocks.begin() }}
{{ blocks.resident("q", blocks.factor("q")) }}
{{ blocks.resident("d_o", blocks.factor("d_o")) }}
{% for r in range(row_fragments) %}
  var sum_{{ r }} = 0.0;
  var shift_{{ r }} = 0.0;
  if (row_{{ r }} < row_limit) { shift_{{ r }} = probability_lse(lse[lse_base + row_{{ r }}]) * LOG2_E; }
{% endfor %}
{{ blocks.begin_columns() }}
{% endmacro -%}

{%- macro scores() %}
{{ blocks.fetch_next() }}
{{ blocks.scores_of("s") }}
{{ blocks.product("s", "q", "k", "stage") }}
{% endmacro -%}

{%- macro probability_gradients() %}
{{ blocks.scores_of("d_p") }}
{{ blocks.product("d_p", "d_o", "v", "stage") }}
{% endmacro -%}

{#- Sums p d_p. -#}
{%- macro accumulate() %}
{% for r in range(row_fragments) %}
{{ blocks.park("s", r) }}
{{ blocks.take("x", r) }}
{{ blocks.park("d_p", r) }}
{{ blocks.take("y", r) }}
    {
      var total = vec4<f32>();
{% for n in range(lane_quads) %}
      var p_d_p_{{ n }} = exp2(fma(x_{{ r }}_{{ n }}, vec4<f32>(scale), vec4<f32>(-shift_{{ r }}))) * y_{{ r }}_{{ n }};
      if (masked) { p_d_p_{{ n }} = select(vec4<f32>(), p_d_p_{{ n }}, visible4(row_{{ r }}, {{ blocks.quad_column(n) }})); }
      total += p_d_p_{{ n }};
{% endfor %}
      sum_{{ r }} += (total.x + total.y) + (total.z + total.w);
    }
{% endfor %}
{{ blocks.next_stage() }}
{% endmacro -%}

{%- macro finish() %}
{% for r in range(row_fragments) %}
{% for n in [1, 2, 4] %}{% if n < lanes // side %}
  sum_{{ r }} += subgroupShuffleXor(sum_{{ r }}, {{ n }}u);
{% endif %}{% endfor %}
  if (row_{{ r }} < row_limit && part == 0u) {
    let place = delta_base + row_{{ r }};
    let total = sum_{{ r }} * {{ blocks.inverse("d_o") }} * {{ blocks.inverse("v") }};
    if (!is_finite4(vec4<f32>(total))) { atomicStore(&broken, 1u); }
    delta[place] = row_delta(place, total);
  }
{% endfor %}
{{ blocks.report() }}
{% endmacro -%}
