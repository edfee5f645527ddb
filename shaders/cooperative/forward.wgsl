{#- The forward pass on fragments: rows are queries, columns are keys.
    Needs: the cooperative macros, softmax.wgsl, `main` of tile_main.wgsl. Declares: the macros that forward.wgsl calls. -#}
# import "cooperative/fragments.wgsl" as matrix
# import "cooperative/mask.wgsl" as masking
# import "cooperative/columns.wgsl" as columns
# import "cooperative/scores.wgsl" as score
# import "cooperative/fallback.wgsl" as fallback
# from "tile_loops.wgsl" import chunk_columns

{#- Whether exponentials of `optimistic_tile` take in the bias. Their scores are not formed. -#}
# set joined = joins_bias and not has_row_max

# macro declare()
{{ matrix.declare() }}
# if not wide_products
// Below every product of halves{{ ", and below every capped one" if softcap else ", and far from the end of f32" }}.
const HIDDEN: f32 = {{ "-3e38" if softcap else "-1e30" }};
# endif
// row_max may lag behind by this power of two, within the range of f16, before O is rescaled.
const SLACK: f32 = 8.0;
# if optimistic
// Probabilities of a lane's columns may have this sum before row_max follows. So each is within f16.
const MOST: f32 = 32768.0;
# endif
# if splits
// A new row_max is this power of two below the largest score, so that small probabilities have both halves. SLACK is within the range still.
const LIFT: f32 = 7.0;
# endif
# endmacro

# macro begin()
{{ matrix.begin() }}
  let hidden = {{ "params.negative_infinity" if formed or wide_products else "HIDDEN" }};
{{ columns.begin_columns() }}
# if joined
  // The exponential multiplies hidden products with the scale.
  let hidden_product = select(hidden, -hidden, scale < 0.0);
# endif
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

{#- A full tile, `optimistic`: P is formed with the maxima so far, and then tested. Where a sum of P is too large, all subgroups leave the
    loop over tiles. `raise` forms S once more and raises the maxima, and the loop begins again at the same tile. So the loop neither
    looks for maxima nor changes O but by products: NVIDIA's compiler would copy registers of O in every tile. A row's maximum follows
    its own sums alone, so other rows do not change its bits. -#}
# macro optimistic_tile(masked)
{{ score.fetch_bias("bias0", "tile_column0") if joined }}
# for r in range(lane_rows)
    var total_{{ r }} = vec4<f32>();
# endfor
# for chunk in range(chunks)
# for r, c in pairs(row_fragments, column_fragments)
    var p{{ chunk }}_left_{{ r }}_{{ c }} = coop_mat{{ side }}x{{ side }}<f16, A>();
# endfor
# endfor
# for chunk in range(chunks)
    // S = Q K^T.
# if chunk == 0
{{ fallback.clean_columns(["k"]) }}
# endif
{{ matrix.product("s" ~ chunk ~ "_", "q", "k", "stage", chunk) }}
# if chunk == 0
{{ columns.put("v", "stage") }}
{{ columns.fetch_next() }}
# endif
{{ score.fetch_bias("bias" ~ (chunk + 1), "tile_column0 + " ~ ((chunk + 1) * side * column_fragments) ~ "u") if joined and chunk < chunks - 1 }}
{{ optimistic_chunk(chunk, masked) }}
# endfor
# for r in range(lane_rows)
    let sum_{{ r }} = {{ sum_of_four("total_" ~ r) }};
# endfor
    if ({% for r in range(lane_rows) %}{{ " || " if r > 0 }}sum_{{ r }} > MOST{% endfor %}) { score_rows[0].x = 1.0; }
    workgroupBarrier();
    // No tile is left twice, whatever its numbers are.
    if (score_rows[0].x > 0.0 && tile != raised) {
      // `raise` stores this tile's K again, and the tile that begins again its V.
{{ columns.fetch_columns("tile_column0") }}
      {{ "raises = true;" if mask }}
      break;
    }
# for r in range(lane_rows)
    row_sum_{{ r }} += sum_{{ r }};
# endfor
# if sanitize
{{ fallback.clean_columns(["v"]) }}
# for chunk in range(chunks)
    {
{{ chunk_columns(chunk) }}
{{ fallback.find_fallback(masked) }}
    }
# endfor
# endif
    // O += P V.
# for chunk in range(chunks)
{{ matrix.accumulate("o", "p" ~ chunk, "v", "stage", chunk) }}
# endfor
{{ columns.put_first() }}
# endmacro

{#- P = exp(S - m) of a chunk;  total += P. -#}
# macro optimistic_chunk(chunk, masked)
    {
{{ chunk_columns(chunk) }}
{{ load_scores(masked, "s" ~ chunk ~ "_", joined) }}
# for r in range(lane_rows)
{{ probabilities(r, "bias" ~ chunk if joined else "") }}
# endfor
# for r, c in pairs(row_fragments, column_fragments)
      p{{ chunk }}_left_{{ r }}_{{ c }} = {{ matrix.left("p", r, c) }};
# endfor
    }
# endmacro

{#- row_max of a full tile, of which K and V have been loaded, for rows whose sums of P are too large. It leaves K in the stage. -#}
# macro raise(masked)
    // All subgroups have used K, and have seen the flag.
    workgroupBarrier();
    if (thread == 0u) { score_rows[0] = vec4<f32>(); }
{{ columns.put_first() }}
# for r in range(lane_rows)
    var total_{{ r }} = vec4<f32>();
    var largest_of_tile_{{ r }} = hidden;
    let old_max_{{ r }} = row_max_{{ r }};
# endfor
# for chunk in range(chunks)
    {
{{ chunk_columns(chunk) }}
{{ matrix.product("s", "q", "k", "stage", chunk) }}
{{ load_scores(masked) }}
# for r in range(lane_rows)
{{ tile_max(r) }}
      largest_of_tile_{{ r }} = max(largest_of_tile_{{ r }}, tile_max_{{ r }});
{{ probabilities(r) }}
# endfor
    }
# endfor
# for r in range(lane_rows)
    {
      var sum = {{ sum_of_four("total_" ~ r) }};
{{ matrix.reduce_row("sum", "max") }}
{{ matrix.reduce_row("largest_of_tile_" ~ r, "max") }}
      if (sum > MOST || (bitcast<u32>(sum) & 0x7fffffffu) > 0x7f800000u) {
        row_max_{{ r }} = largest_of_tile_{{ r }}{{ " * scale" if not formed }}{{ " - LOG2_GAIN" if lifts_p }};
        limit_{{ r }} = largest_of_tile_{{ r }} + slack;
      }
    }
{{ rescale(r) }}
# endfor
{{ matrix.rescale("o", "v", "rescale_") }}
# endmacro

{#- P of a row of a chunk, and its sum over this lane's columns as four. -#}
# macro probabilities(r, bias="")
# for n in range(lane_quads)
{{ exponentiate(r, n, bias) }}
{{ row_sum(r, n) }}
# endfor
# endmacro

{%- macro sum_of_four(x) %}({{ x }}.x + {{ x }}.y) + ({{ x }}.z + {{ x }}.w){% endmacro -%}

{#- The online softmax. row_max follows only when it has grown by more than SLACK, which is rare: a stale maximum is exact up to rounding,
    and P stays within f16. It leaves P as the P tile. -#}
# macro softmax(masked)
{{ load_scores(masked) }}
# if elements
# for r in range(lane_rows)
{{ tile_max(r) }}
# endfor
# endif
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
{{ probabilities(r) }}
    row_sum_{{ r }} += {{ sum_of_four("total_" ~ r) }};
# endfor
{{ matrix.store_p("p") }}
{{ fallback.find_fallback(masked) }}
# endmacro

# macro load_scores(masked, s="s", joined=false)
# set hidden_value = "hidden_product" if joined else "hidden"
# set hides_in_memory = registers > 200 and not (modified or mask or column_scales or elements)
{{ score.begin_scores() }}
# if elements
{{ matrix.rows_of("x", s, 0) }}
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
{{ score.make_scores("x", "", masked, joined) }}
# if has_row_max
# if not hides_in_memory
{{ masking.hide("x", hidden_value, masked) }}
# endif
{{ largest_scores() }}
# endif
# if column_scales
# for r, n in pairs(lane_rows, lane_quads)
    x_{{ r }}_{{ n }} += {{ matrix.column_stat(n, 1) }};
# endfor
# endif
# if not (hides_in_memory or has_row_max)
{{ masking.hide("x", hidden_value, masked) }}
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

{#- m = max(row_max, max of S by rows), for rows that have passed their limit. A NaN among scores makes the row NaN, but not its maximum: a
    maximum below another score would not end the loop. -#}
# macro row_max(r)
      let old_max_{{ r }} = row_max_{{ r }};
      {
# if elements
        var tile_max = select(limit_{{ r }}, tile_max_{{ r }}, tile_max_{{ r }} > limit_{{ r }});
# else
        var tile_max4 = vec4<f32>(limit_{{ r }});
# for n in range(lane_quads)
        tile_max4 = select(tile_max4, x_{{ r }}_{{ n }}, x_{{ r }}_{{ n }} > tile_max4);
# endfor
        var tile_max = max(max(tile_max4.x, tile_max4.y), max(tile_max4.z, tile_max4.w));
# endif
{{ matrix.reduce_row("tile_max", "max") }}
        if (tile_max > limit_{{ r }}) {
          row_max_{{ r }} = tile_max{{ " * scale" if not formed }}{{ " - LIFT" if splits }}{{ " - LOG2_GAIN" if lifts_p }};
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
# macro exponentiate(r, n, bias)
# set x = "x_" ~ r ~ "_" ~ n
# set joined = score.joined_exponential(x, bias ~ "_" ~ r ~ "_" ~ n, "vec4<f32>(-row_max_" ~ r ~ ")", r)
    let p_{{ r }}_{{ n }} = {{ joined if bias else score.exponential(x, "row_max_" ~ r, r) }};
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
  let factor_{{ r }} = end_{{ r }}.factor{{ " * lift_" ~ r if column_scales }}{{ " * GAIN" if lifts_p }};
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
