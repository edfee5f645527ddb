{#- The gradient by q on fragments: rows are queries, columns are keys. -#}
{% import "cooperative/blocks.wgsl" as blocks %}

{%- macro declare() %}{{ blocks.declare() }}{% endmacro -%}

{%- macro begin() %}
{{ blocks.begin() }}
{{ blocks.d_s_range() }}
{{ blocks.begin_columns() }}
{{ blocks.resident("q", blocks.factor("q")) }}
{{ blocks.resident("d_o", blocks.factor("d_o")) }}
{{ blocks.accumulator("d_q", "k") }}
{{ blocks.row_statistics() }}
{% if moments %}
{% for r in range(row_fragments) %}
  var moment_{{ r }} = 0.0;
{% endfor %}
{% endif %}
{{ blocks.put_columns() }}
{% endmacro -%}

{%- macro scores() %}
{{ blocks.fetch_next() }}
{{ blocks.product("s", "q", "k", "stage") }}
{% endmacro -%}

{%- macro probability_gradients() %}
{{ blocks.product("d_p", "d_o", "v", "stage") }}
{% endmacro -%}

{#- Leaves d_s = p (d_p - delta) as weights, within the range of halves. -#}
{%- macro score_gradients() %}
{{ blocks.begin_scores() }}
{% for r in range(row_fragments) %}
{{ blocks.park("s", r) }}
{{ blocks.take("x", r) }}
{% endfor %}
{{ blocks.make_scores("x", "derivative") }}
{% for r in range(row_fragments) %}
{{ blocks.park("d_p", r) }}
{{ blocks.take("y", r) }}
{% endfor %}
{% for r in range(row_fragments) %}
{% for n in range(lane_quads) %}
    var d_s_{{ r }}_{{ n }} = {{ blocks.exponential("x_" ~ r ~ "_" ~ n, "shift_" ~ r) }} * fma(y_{{ r }}_{{ n }}, vec4<f32>(d_p_range), vec4<f32>(-delta_{{ r }}));
{% endfor %}
{% endfor %}
{% if softcap and not moments %}
{% for r in range(row_fragments) %}{% for n in range(lane_quads) %}
    d_s_{{ r }}_{{ n }} *= derivative_{{ r }}_{{ n }};
{% endfor %}{% endfor %}
{% endif %}
{{ blocks.hide("d_s", "0.0") }}
{% if moments %}
{% for r in range(row_fragments) %}{% for n in range(lane_quads) %}
    {
      let moment = d_s_{{ r }}_{{ n }} * distance4(row_{{ r }}, {{ blocks.quad_column(n) }});
      moment_{{ r }} += (moment.x + moment.y) + (moment.z + moment.w);
    }
{% endfor %}{% endfor %}
{% endif %}
{% if softcap and moments %}
{% for r in range(row_fragments) %}{% for n in range(lane_quads) %}
    d_s_{{ r }}_{{ n }} *= derivative_{{ r }}_{{ n }};
{% endfor %}{% endfor %}
{% endif %}
{{ blocks.keep_weights("d_s") }}
{% endmacro -%}

{%- macro accumulate() %}
{{ blocks.accumulate("d_q", "k", "stage") }}
{{ blocks.next_stage() }}
{% endmacro -%}

{%- macro finish() %}
  let factor = {{ blocks.d_s_inverse("k") }};
{{ blocks.store("d_q", "d_q", "factor") }}
{% if moments %}
{% for r in range(row_fragments) %}
{{ blocks.reduce_row("moment_" ~ r, "sum") }}
  if (row_{{ r }} < row_limit && part == 0u) {
    let total = moment_{{ r }} / v_bound / d_o_range;
    broken = broken || !is_finite4(vec4<f32>(total));
    alibi_moments[moments_base + row_{{ r }}] = total;
  }
{% endfor %}
{% endif %}
{{ blocks.report() }}
{% endmacro -%}
