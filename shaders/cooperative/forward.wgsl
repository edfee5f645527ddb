{#- The forward pass on fragments: rows are queries, columns are keys. -#}
# import "cooperative/blocks.wgsl" as blocks

# macro declare()
{{ blocks.declare() }}
// Below every product of halves{{ ", and every capped one" if softcap else ", and far from where f32 ends" }}.
const HIDDEN: f32 = {{ "-3e38" if softcap else "-1e30" }};
// The maximum of a row may stay behind by so many powers of two, within f16, before its output is rescaled.
const SLACK: f32 = 8.0;
# endmacro

# macro begin()
{{ blocks.begin() }}
  let hidden = {{ "params.negative_infinity" if formed else "HIDDEN" }};
{{ blocks.begin_columns() }}
{{ blocks.fetch_first() }}
{{ blocks.resident("q") }}
{{ blocks.row_scales("q") }}
{{ blocks.accumulator("o", "v") }}
{{ blocks.put_columns() }}
  // Where nothing has been seen the maximum is finite, and so far above hidden scores that their weights are zero.
# if formed
  let floor = LOWEST;
  let slack = SLACK;
# else
  let floor = max(0.5 * HIDDEN * scale, LOWEST);
  let slack = SLACK / scale;
# endif
# for r in range(row_fragments)
  var most_{{ r }} = floor;
  // What scores may reach before that.
  var limit_{{ r }} = {{ "LOWEST" if formed else "0.5 * HIDDEN" }};
  var sum_{{ r }} = 0.0;
# endfor
# endmacro

# macro scores()
{{ blocks.clean_columns() }}
{{ blocks.fetch_next() }}
{{ blocks.product("s", "q", "k", "stage") }}
# endmacro

{#- Online softmax. The maximum of a row follows only when it has grown by more than SLACK: then, rarely, the output is
    rescaled, through the strip. Where nearly all registers are taken, scores are better hidden while they are in the strip. -#}
# macro softmax()
# set in_strips = registers > 200 and not (modified or mask or column_scales)
{{ blocks.begin_scores() }}
# for r in range(row_fragments)
{{ blocks.park("s", r) }}
# if in_strips
    if (masked) {
# for n in range(lane_quads)
      {
        let at = strip_at + {{ n * lanes // side }}u;
        strips[at] = select(vec4<f32>(hidden), strips[at], {{ blocks.visible(r, n) }});
      }
# endfor
    }
# endif
{{ blocks.take("x", r, 0) }}
# endfor
{{ blocks.make_scores("x", "") }}
# if column_scales
# for r, n in pairs(row_fragments, lane_quads)
    x_{{ r }}_{{ n }} += {{ blocks.term(n, 1) }};
# endfor
# endif
# if not in_strips
{{ blocks.hide("x", "hidden") }}
# endif
    loop {
      if (!subgroupAny(any({% for r in range(row_fragments) %}{% for n in range(lane_quads) %}{{ " | " if r + n > 0 }}(x_{{ r }}_{{ n }} > vec4<f32>(limit_{{ r }})){% endfor %}{% endfor %}))) { break; }
# for r in range(row_fragments)
      let before_{{ r }} = most_{{ r }};
      {
        var most4 = x_{{ r }}_0;
# for n in range(1, lane_quads)
        most4 = max(most4, x_{{ r }}_{{ n }});
# endfor
        var most = max(max(most4.x, most4.y), max(most4.z, most4.w));
{{ blocks.reduce_row("most", "max") }}
        // A NaN, which a maximum may keep, becomes the limit: else the loop would not end.
        if (most > limit_{{ r }} || (bitcast<u32>(most) & 0x7fffffffu) > 0x7f800000u) {
          most_{{ r }} = most{{ " * scale" if not formed }};
          limit_{{ r }} = most + slack;
        }
      }
      // A row that keeps its maximum keeps its bits.
      let rescale_{{ r }} = select(exp2(before_{{ r }} - most_{{ r }}), 1.0, before_{{ r }} == most_{{ r }});
      sum_{{ r }} *= rescale_{{ r }};
# endfor
      // Nothing to rescale yet.
      if (tile == {{ "first_tile" if mask else "tiles.first" }}) { continue; }
{{ blocks.rescale("o", "v", "rescale_") }}
    }
# for r in range(row_fragments)
    var total_{{ r }} = vec4<f32>();
# for n in range(lane_quads)
    let p_{{ r }}_{{ n }} = {{ blocks.exponential("x_" ~ r ~ "_" ~ n, "most_" ~ r, r) }};
# if column_scales
    total_{{ r }} = fma(p_{{ r }}_{{ n }}, {{ blocks.term(n, 2) }}, total_{{ r }});
# else
    total_{{ r }} += p_{{ r }}_{{ n }};
# endif
# endfor
    sum_{{ r }} += (total_{{ r }}.x + total_{{ r }}.y) + (total_{{ r }}.z + total_{{ r }}.w);
# endfor
{{ blocks.keep_weights("p") }}
{{ blocks.find_broken() }}
# endmacro

# macro accumulate()
{{ blocks.accumulate("o", "v", "stage") }}
{{ blocks.next_stage() }}
# endmacro

{#- Sums the rows' denominators, adds the sink logit once, and writes o and lse. -#}
# macro finish()
# for r in range(row_fragments)
{{ blocks.reduce_row("sum_" ~ r, "sum") }}
# if bias
  broken_{{ r }} = broken_{{ r }} || (sum_{{ r }} > 0.0 && most_{{ r }} <= LOWEST);
# endif
# if column_scales
  // The sum, which values' powers have taken anywhere, comes to 1 .. 2.
  let power_{{ r }} = select(0, i32(bitcast<u32>(sum_{{ r }}) >> 23u) - 127, sum_{{ r }} > 0.0);
  let lift_{{ r }} = bitcast<f32>(u32(127 - clamp(power_{{ r }}, -126, 126)) << 23u);
  most_{{ r }} += f32(power_{{ r }});
  sum_{{ r }} *= lift_{{ r }};
# endif
  let end_{{ r }} = finish_row(most_{{ r }} / {% if formed %}LOG2_E{% elif softcap %}LOG2_E + params.softcap{% else %}scale{% endif %}, sum_{{ r }}, work.head);
  let factor_{{ r }} = end_{{ r }}.factor{{ " * lift_" ~ r if column_scales }};
  if (row_{{ r }} < row_limit && part == 0u) { lse[lse_base + row_{{ r }}] = {% if lengths %}select(params.negative_infinity, end_{{ r }}.lse, row_{{ r }} < here.seq_q){% else %}end_{{ r }}.lse{% endif %}; }
# endfor
{{ blocks.store("o", "o", "factor_") }}
{{ blocks.report() }}
# endmacro
