{#- The forward pass on fragments: rows are queries, columns are keys.
    Needs: the cooperative macros, softmax.wgsl, `main` of tile_main.wgsl. Declares: the macros that forward.wgsl calls. -#}
# import "cooperative/fragments.wgsl" as matrix
# import "cooperative/mask.wgsl" as masking
# import "cooperative/columns.wgsl" as columns
# import "cooperative/scores.wgsl" as score
# import "cooperative/fallback.wgsl" as fallback

# macro declare()
{{ matrix.declare() }}
# if not wide_products
// Below every product of halves{{ ", and below every capped one" if softcap else ", and far from the end of f32" }}.
const HIDDEN: f32 = {{ "-3e38" if softcap else "-1e30" }};
# endif
// row_max may lag behind by this power of two, within the range of f16, before O is rescaled.
const SLACK: f32 = 8.0;
# endmacro

# macro begin()
{{ matrix.begin() }}
  let hidden = {{ "params.negative_infinity" if formed or wide_products else "HIDDEN" }};
{{ columns.begin_columns() }}
{{ columns.fetch_first() }}
{{ matrix.resident("q") }}
{{ matrix.row_scales("q") }}
{{ matrix.accumulator("o", "v") }}
{{ columns.put_first() }}
  // The first maximum is finite, and so far above hidden scores that their probabilities are zero.
# if formed
  let floor = LOWEST;
  let slack = SLACK;
# else
  let floor = {{ "LOWEST" if wide_products else "max(0.5 * HIDDEN * scale, LOWEST)" }};
  let slack = SLACK / scale;
# endif
# for r in range(lane_rows)
  var row_max_{{ r }} = floor;
  // Scores above the limit raise the maximum.
  var limit_{{ r }} = {{ "LOWEST" if formed or wide_products else "0.5 * HIDDEN" }};
  var row_sum_{{ r }} = 0.0;
# if has_row_max
  // The largest visible score of this lane's columns: row_max lags behind, and in bf16 has the scales of values.
  var largest_{{ r }} = {{ "LOWEST" if formed or wide_products else "HIDDEN" }};
# endif
# endfor
# endmacro

# macro scores(chunk)
    // S = Q K^T.
# if phased
{{ scores_in_phases(chunk) }}
# else
{{ fallback.clean_columns(staged) }}
{{ columns.fetch_next() }}
{{ matrix.product("s", "q", "k", "stage") }}
# endif
# endmacro

{#- K and V have one place each in workgroup memory. K of a tile is put there at the end of the tile before, and V behind the first product,
    when all subgroups have used the V before it. So each barrier has half of a tile between it and the next. -#}
# macro scores_in_phases(chunk)
# if chunk == 0
{{ fallback.clean_columns(["k"]) }}
# endif
# if chunk == chunks - 1 and chunks > 1
{{ columns.fetch_next() }}
# endif
{{ matrix.product("s", "q", "k", "stage", chunk) }}
# if chunk == 0
{{ columns.put("v", "stage") }}
    workgroupBarrier();
{{ fallback.clean_columns(["v"]) }}
# endif
# if chunks == 1
{{ columns.fetch_next() }}
# endif
# endmacro

{#- The online softmax. row_max follows only when it has grown by more than SLACK, which is rare: a stale maximum is exact up to rounding,
    and P stays within f16. It leaves P as the P tile. -#}
# macro softmax(masked)
{{ load_scores(masked) }}
    // m = max(row_max, max of S by rows);  O and row_sum *= exp(row_max - m). Runs at most once; a loop, because with an `if` NVIDIA's
    // compiler moves the registers of fragments.
    loop {
# if elements
      if (!subgroupAny({% for r in range(lane_rows) %}{{ " || " if not loop.first }}(tile_max_{{ r }} > limit_{{ r }}){% endfor %})) { break; }
# else
      if (!subgroupAny(any({% for r, n in pairs(row_fragments, lane_quads) %}{{ " | " if not loop.first }}(x_{{ r }}_{{ n }} > vec4<f32>(limit_{{ r }})){% endfor %}))) { break; }
# endif
# for r in range(lane_rows)
{{ row_max(r) }}
{{ rescale(r) }}
# endfor
# if not elements
      // The first tile finds O = 0.
      if (tile == {{ "first_tile" if mask else "tiles.first" }}) { continue; }
# endif
{{ matrix.rescale("o", "v", "rescale_") }}
    }
    // P = exp(S - m);  row_sum += sum of P.
# for r in range(lane_rows)
    var total_{{ r }} = vec4<f32>();
# for n in range(lane_quads)
{{ exponentiate(r, n) }}
{{ row_sum(r, n) }}
# endfor
    row_sum_{{ r }} += (total_{{ r }}.x + total_{{ r }}.y) + (total_{{ r }}.z + total_{{ r }}.w);
# endfor
{{ matrix.store_p("p") }}
{{ fallback.find_fallback(masked) }}
# endmacro

# macro load_scores(masked)
# set hides_in_memory = registers > 200 and not (modified or mask or column_scales or elements)
{{ score.begin_scores() }}
# if elements
{{ matrix.rows_of("x", "s", 0) }}
# else
# for r in range(row_fragments)
{{ matrix.store_rows("s", r) }}
# if hides_in_memory
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
# endif
{{ score.make_scores("x", "", masked) }}
# if has_row_max
# if not hides_in_memory
{{ masking.hide("x", "hidden", masked) }}
# endif
{{ largest_scores() }}
# endif
# if column_scales
# for r, n in pairs(lane_rows, lane_quads)
    x_{{ r }}_{{ n }} += {{ matrix.column_stat(n, 1) }};
# endfor
# endif
# if not (hides_in_memory or has_row_max)
{{ masking.hide("x", "hidden", masked) }}
# endif
# if elements
# for r in range(lane_rows)
{{ tile_max(r) }}
# endfor
# endif
# endmacro

{#- The largest score of a row's columns of this lane. -#}
# macro tile_max(r)
# for n in range(lane_quads)
    let pair_max_{{ r }}_{{ n }} = max(x_{{ r }}_{{ n }}.xy, x_{{ r }}_{{ n }}.zw);
# endfor
    var tile_max_{{ r }} = {{ max_of("pair_max_" ~ r ~ "_", 0, lane_quads) }};
# endmacro

{#- The maximum of vectors of two, and of their elements. -#}
{%- macro max_of(stem, first, end) -%}
{%- if end - first == 1 -%}
  max({{ stem ~ first }}.x, {{ stem ~ first }}.y)
{%- else -%}
  max({{ max_of(stem, first, (first + end) // 2) }}, {{ max_of(stem, (first + end) // 2, end) }})
{%- endif -%}
{%- endmacro -%}

{#- The largest score of the columns of this lane so far; `finish` compares the lanes of a row. A row that sees a NaN is reported. -#}
# macro largest_scores()
# for r in range(lane_rows)
    {
      var largest4 = x_{{ r }}_0;
# for n in range(1, lane_quads)
      largest4 = max(largest4, x_{{ r }}_{{ n }});
# endfor
      largest_{{ r }} = max(largest_{{ r }}, max(max(largest4.x, largest4.y), max(largest4.z, largest4.w)));
    }
# endfor
# endmacro

{#- m = max(row_max, max of S by rows), for rows that have passed their limit. -#}
# macro row_max(r)
      let old_max_{{ r }} = row_max_{{ r }};
      {
# if elements
        var tile_max = tile_max_{{ r }};
# else
        var tile_max4 = x_{{ r }}_0;
# for n in range(1, lane_quads)
        tile_max4 = max(tile_max4, x_{{ r }}_{{ n }});
# endfor
        var tile_max = max(max(tile_max4.x, tile_max4.y), max(tile_max4.z, tile_max4.w));
# endif
{{ matrix.reduce_row("tile_max", "max") }}
        // A NaN, which a maximum may keep, becomes the limit, so that the loop ends.
        if (tile_max > limit_{{ r }} || (bitcast<u32>(tile_max) & 0x7fffffffu) > 0x7f800000u) {
          row_max_{{ r }} = tile_max{{ " * scale" if not formed }};
          limit_{{ r }} = tile_max + slack;
        }
      }
# endmacro

{#- row_sum *= exp(row_max - m), and the factor for O. -#}
# macro rescale(r)
      // A row that keeps its maximum keeps its bits.
      let rescale_{{ r }} = select(exp2(old_max_{{ r }} - row_max_{{ r }}), 1.0, old_max_{{ r }} == row_max_{{ r }});
      row_sum_{{ r }} *= rescale_{{ r }};
# endmacro

{#- P = exp(S - m). -#}
# macro exponentiate(r, n)
    let p_{{ r }}_{{ n }} = {{ score.exponential("x_" ~ r ~ "_" ~ n, "row_max_" ~ r, r) }};
# endmacro

{#- The sum of P of the columns of this lane; `finish` adds up the lanes of a row. -#}
# macro row_sum(r, n)
# if column_scales
    total_{{ r }} = fma(p_{{ r }}_{{ n }}, {{ matrix.column_stat(n, 2) }}, total_{{ r }});
# else
    total_{{ r }} += p_{{ r }}_{{ n }};
# endif
# endmacro

# macro accumulate(chunk)
    // O += P V.
{{ matrix.accumulate("o", "p", "v", "stage", chunk) }}
# if not phased
{{ columns.next_stage() }}
# elif chunk == chunks - 1
# if chunks > 1 or column_scales or sanitize
    // All subgroups have used K.
    workgroupBarrier();
# endif
{{ columns.put_first() }}
# endif
# endmacro

{#- The denominator of each row takes in the sink logit. Then o = O / row_sum and lse are written. -#}
# macro finish()
# if formed
# set score_scale, scale_of_largest = "LOG2_E", " / LOG2_E"
# elif softcap
# set score_scale, scale_of_largest = "LOG2_E + params.softcap", " * scale / LOG2_E + params.softcap"
# else
# set score_scale, scale_of_largest = "scale", ""
# endif
# for r in range(lane_rows)
{{ matrix.reduce_row("row_sum_" ~ r, "sum") }}
# if bias
  fallback_{{ r }} = fallback_{{ r }} || (row_sum_{{ r }} > 0.0 && row_max_{{ r }} <= LOWEST);
# endif
# if column_scales
  // The powers of values may have taken the sum anywhere: a power of two brings it to 1 .. 2.
  let power_{{ r }} = select(0, i32(bitcast<u32>(row_sum_{{ r }}) >> 23u) - 127, row_sum_{{ r }} > 0.0);
  let lift_{{ r }} = bitcast<f32>(u32(127 - clamp(power_{{ r }}, -126, 126)) << 23u);
  row_max_{{ r }} += f32(power_{{ r }});
  row_sum_{{ r }} *= lift_{{ r }};
# endif
  let end_{{ r }} = finish_row(row_max_{{ r }} / {{ score_scale }}, row_sum_{{ r }}, work.head);
  let factor_{{ r }} = end_{{ r }}.factor{{ " * lift_" ~ r if column_scales }};
  if (row_{{ r }} < row_limit && lane_column == 0u) { lse[lse_base + row_{{ r }}] = select(params.negative_infinity, end_{{ r }}.lse, row_{{ r }} < seq.seq_q); }
# if has_row_max
{{ matrix.reduce_row("largest_" ~ r, "max") }}
  if (row_{{ r }} < row_limit && lane_column == 0u) {
    let at = operand_base(params.row_max, work.batch, work.head) + seq.q_start + row_{{ r }};
    let largest = largest_score(largest_{{ r }}{{ scale_of_largest }}, row_sum_{{ r }});
    row_max[at] = select(params.negative_infinity, largest, row_{{ r }} < seq.seq_q);
  }
# endif
# endfor
{{ matrix.store("o", "o", "factor_") }}
{{ fallback.report_fallback() }}
# endmacro
