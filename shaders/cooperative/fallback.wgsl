{#- Rows that need a second computation. Fragments have no hidden elements, so a hidden column that is NaN or infinite spoils the rows of
    its tile. The first run reports rows that are not finite. The second run (`sanitize`) computes reported tiles with zeros in place of
    these columns: rows that do not see them get the bits that they have with any other hidden column. It reports the rows that see one,
    and the portable kernel computes these.
    Needs: cooperative/fragments.wgsl, cooperative/mask.wgsl, fallback.wgsl. Declares: the macros below. -#}
# from "cooperative/mask.wgsl" import hide
# from "cooperative/fragments.wgsl" import reduce_row, any_subgroup, quad_column

{#- In the second run: sets staged quads of `operands` that are not finite to zeros, and marks their columns behind the features. -#}
# macro clean_columns(operands)
# if sanitize
      for (var column = thread; column < {{ tile_columns }}u; column += {{ threads }}u) {
# for b in operands
        {
          let at = stage * {{ b | upper }}_TILE + column * {{ b | upper }}_ROW;
          var is_nonfinite = false;
          for (var quad = 0u; quad < {{ staged_quads[b] }}u; quad += 1u) {
# if splits
            let lo = vec4<f32>({{ b }}_stage[at + {{ b | upper }}_LO + quad]);
# endif
            if (!is_finite_staged({{ b }}_stage[at + quad]){{ " || !is_finite4(lo)" if splits }}) {
              {{ b }}_stage[at + quad] = vec4<f16>();
# if splits
              {{ b }}_stage[at + {{ b | upper }}_LO + quad] = vec4<f16>();
# endif
              is_nonfinite = true;
            }
          }
          {{ b }}_stage[at + {{ staged_quads[b] }}u] = vec4<f16>(select(0.0h, 1.0h, is_nonfinite));
        }
# endfor
      }
      workgroupBarrier();
# endif
# endmacro

{#- In the second run: finds the rows that see a marked column. -#}
# macro find_fallback(masked)
# if sanitize
# for r, n in pairs(lane_rows, lane_quads)
      var nonfinite_{{ r }}_{{ n }} = vec4<f32>();
      {
        let place = {{ "chunk_column + " if elements }}{{ quad_offsets[n] }}u + {{ "lane_place" if elements else "lane_column" }};
# for e in range(4)
# for b in staged
        nonfinite_{{ r }}_{{ n }}.{{ xyzw[e] }} += f32({{ b }}_stage[stage * {{ b | upper }}_TILE + (place + {{ place_steps[e] if elements else e }}u) * {{ b | upper }}_ROW + {{ staged_quads[b] }}u].x);
# endfor
# endfor
# if bias
        nonfinite_{{ r }}_{{ n }} = select(nonfinite_{{ r }}_{{ n }}, vec4<f32>(), bitcast<vec4<u32>>(bias4(seq, row_{{ r }}, {{ quad_column(n) }})) == vec4<u32>(0xff800000u));
# endif
      }
# endfor
{{ hide("nonfinite", "0.0", masked) }}
# for r in range(lane_rows)
      fallback_{{ r }} = fallback_{{ r }}{% for n in range(lane_quads) %} || any(nonfinite_{{ r }}_{{ n }} != vec4<f32>()){% endfor %};
# endfor
# endif
# endmacro

{#- Reports whether rows of the tile need another computation, and then which. -#}
# macro report_fallback()
# if wide_products or joins_bias
# if wide_products
  // Products may be so large that the smallest scale that `begin_columns` takes is too large.
  let is_scaled = params.scale_size * LOG2_E >= 1.2e-38;
# else
  // Scores of larger scales may leave the range of f32.
  let is_scaled = abs(params.scale) <= 1e20;
# endif
# for r in range(lane_rows)
  fallback_{{ r }} = fallback_{{ r }} || !is_scaled;
# endfor
# endif
  let subgroup_fallback = subgroupAny({% for r in range(lane_rows) %}{{ " || " if r > 0 }}(fallback_{{ r }} && row_{{ r }} < row_limit){% endfor %});
  var any_fallback = false;
{{ any_subgroup("any_fallback", "subgroup_fallback") }}
  let slot = fallback_slot(seq, work, work.tile);
  if (thread == 0u) { fallback[slot] = u32(any_fallback); }
  var has_any = any_fallback;
  loop {
    if (!has_any) { break; }
    has_any = false;
    workgroupBarrier();
# for r in range(lane_rows)
    var reported_{{ r }} = select(0.0, 1.0, fallback_{{ r }});
{{ reduce_row("reported_" ~ r, "max") }}
    if (lane_column == 0u) { score_rows[row_{{ r }} - row0] = vec4<f32>(reported_{{ r }}); }
# endfor
    workgroupBarrier();
    if (thread < {{ (tile_rows + 31) // 32 }}u) {
      var bits = 0u;
      for (var n = 0u; n < min({{ tile_rows }}u - thread * 32u, 32u); n += 1u) { bits |= u32(score_rows[thread * 32u + n].x) << n; }
      fallback[slot + 1u + thread] = bits;
    }
  }
# endmacro
