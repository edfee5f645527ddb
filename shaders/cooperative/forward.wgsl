{#- The forward pass on fragments: rows are queries, columns are keys. -#}
# import "cooperative/fragments.wgsl" as matrix
# import "cooperative/mask.wgsl" as masking
# import "cooperative/columns.wgsl" as columns
# import "cooperative/scores.wgsl" as score
# import "cooperative/fallback.wgsl" as fallback

# macro declare()
{{ matrix.declare() }}
// Below every product of halves{{ ", and every capped one" if softcap else ", and far from where f32 ends" }}.
const HIDDEN: f32 = {{ "-3e38" if softcap else "-1e30" }};
// The maximum of a row may stay behind by so many powers of two, within f16, before its output is rescaled.
const SLACK: f32 = 8.0;
# endmacro

# macro begin()
{{ matrix.begin() }}
  let hidden = {{ "params.negative_infinity" if formed else "HIDDEN" }};
{{ columns.begin_columns() }}
{{ columns.fetch_first() }}
{{ matrix.resident("q") }}
{{ matrix.row_scales("q") }}
{{ matrix.accumulator("o", "v") }}
{{ columns.put_columns() }}
  // Where nothing has been seen the maximum is finite, and so far above hidden scores that their weights are zero.
# if formed
  let floor = LOWEST;
  let slack = SLACK;
# else
  let floor = max(0.5 * HIDDEN * scale, LOWEST);
  let slack = SLACK / scale;
# endif
# for r in range(row_fragments)
  var row_max_{{ r }} = floor;
  // What scores may reach before that.
  var limit_{{ r }} = {{ "LOWEST" if formed else "0.5 * HIDDEN" }};
  var row_sum_{{ r }} = 0.0;
# endfor
# endmacro

# macro scores()
{{ fallback.clean_columns() }}
{{ columns.fetch_next() }}
{{ matrix.product("s", "q", "k", "stage") }}
# endmacro

{#- Online softmax. The maximum of a row follows only when it has grown by more than SLACK: then, rarely, the output is
    rescaled, through the strip. Where nearly all registers are taken, scores are better hidden while they are in the strip. -#}
# macro softmax()
# set in_strips = registers > 200 and not (modified or mask or column_scales)
{{ score.begin_scores() }}
# for r in range(row_fragments)
{{ matrix.store_rows("s", r) }}
# if in_strips
    if (is_partial) {
# for n in range(lane_quads)
      {
        let at = score_at + {{ n * lanes // side }}u;
        score_rows[at] = select(vec4<f32>(hidden), score_rows[at], {{ masking.visible(r, n) }});
      }
# endfor
    }
# endif
{{ matrix.load_rows("x", r, 0) }}
# endfor
{{ score.make_scores("x", "") }}
# if column_scales
# for r, n in pairs(row_fragments, lane_quads)
    x_{{ r }}_{{ n }} += {{ matrix.column_stat(n, 1) }};
# endfor
# endif
# if not in_strips
{{ masking.hide("x", "hidden") }}
# endif
    loop {
      if (!subgroupAny(any({% for r in range(row_fragments) %}{% for n in range(lane_quads) %}{{ " | " if r + n > 0 }}(x_{{ r }}_{{ n }} > vec4<f32>(limit_{{ r }})){% endfor %}{% endfor %}))) { break; }
# for r in range(row_fragments)
      let old_max_{{ r }} = row_max_{{ r }};
      {
        var tile_max4 = x_{{ r }}_0;
# for n in range(1, lane_quads)
        tile_max4 = max(tile_max4, x_{{ r }}_{{ n }});
# endfor
        var tile_max = max(max(tile_max4.x, tile_max4.y), max(tile_max4.z, tile_max4.w));
{{ matrix.reduce_row("tile_max", "max") }}
        // A NaN, which a maximum may keep, becomes the limit: else the loop would not end.
        if (tile_max > limit_{{ r }} || (bitcast<u32>(tile_max) & 0x7fffffffu) > 0x7f800000u) {
          row_max_{{ r }} = tile_max{{ " * scale" if not formed }};
          limit_{{ r }} = tile_max + slack;
        }
      }
      // A row that keeps its maximum keeps its bits.
      let rescale_{{ r }} = select(exp2(old_max_{{ r }} - row_max_{{ r }}), 1.0, old_max_{{ r }} == row_max_{{ r }});
      row_sum_{{ r }} *= rescale_{{ r }};
# endfor
      // Nothing to rescale yet.
      if (tile == {{ "first_tile" if mask else "tiles.first" }}) { continue; }
{{ matrix.rescale("o", "v", "rescale_") }}
    }
# for r in range(row_fragments)
    var total_{{ r }} = vec4<f32>();
# for n in range(lane_quads)
    let p_{{ r }}_{{ n }} = {{ score.exponential("x_" ~ r ~ "_" ~ n, "row_max_" ~ r, r) }};
# if column_scales
    total_{{ r }} = fma(p_{{ r }}_{{ n }}, {{ matrix.column_stat(n, 2) }}, total_{{ r }});
# else
    total_{{ r }} += p_{{ r }}_{{ n }};
# endif
# endfor
    row_sum_{{ r }} += (total_{{ r }}.x + total_{{ r }}.y) + (total_{{ r }}.z + total_{{ r }}.w);
# endfor
{{ matrix.store_p("p") }}
{{ fallback.find_fallback() }}
# endmacro

# macro accumulate()
{{ matrix.accumulate("o", "v", "stage") }}
{{ columns.next_stage() }}
# endmacro

{#- Sums the rows' denominators, adds the sink logit once, and writes o and lse. -#}
# macro finish()
# for r in range(row_fragments)
{{ matrix.reduce_row("row_sum_" ~ r, "sum") }}
# if bias
  fallback_{{ r }} = fallback_{{ r }} || (row_sum_{{ r }} > 0.0 && row_max_{{ r }} <= LOWEST);
# endif
# if column_scales
  // The sum, which values' powers have taken anywhere, comes to 1 .. 2.
  let power_{{ r }} = select(0, i32(bitcast<u32>(row_sum_{{ r }}) >> 23u) - 127, row_sum_{{ r }} > 0.0);
  let lift_{{ r }} = bitcast<f32>(u32(127 - clamp(power_{{ r }}, -126, 126)) << 23u);
  row_max_{{ r }} += f32(power_{{ r }});
  row_sum_{{ r }} *= lift_{{ r }};
# endif
  let end_{{ r }} = finish_row(row_max_{{ r }} / {% if formed %}LOG2_E{% elif softcap %}LOG2_E + params.softcap{% else %}scale{% endif %}, row_sum_{{ r }}, work.head);
  let factor_{{ r }} = end_{{ r }}.factor{{ " * lift_" ~ r if column_scales }};
  if (row_{{ r }} < row_limit && part == 0u) { lse[lse_base + row_{{ r }}] = select(params.negative_infinity, end_{{ r }}.lse, row_{{ r }} < seq.seq_q); }
# endfor
{{ matrix.store("o", "o", "factor_") }}
{{ fallback.report_fallback() }}
# endmacro
