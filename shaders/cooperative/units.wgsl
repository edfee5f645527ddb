{#- Units of dS. f16 has less range than dS, so the dS of an accumulator's row are multiplied with the row's unit, a power of two. The
    first dS that the row sees set its unit, in a walk over few tiles before the loop over all of them. The unit of d_q in f16 comes
    with delta (unit.wgsl). A row is scaled by nothing that it does not see.
    Needs: cooperative/fragments.wgsl, cooperative/columns.wgsl, the loops of tile_loops.wgsl.
    Declares: the macros below; of each accumulator X `X_unit_R` and `X_waits_R`; `waits`, `walk_tile`, `next_of_walk`. -#}
# from "cooperative/columns.wgsl" import fetch_columns, column_of, fetch_first
# from "cooperative/fragments.wgsl" import store_p, reduce_row, rescale, any_subgroup

{#- Before the walk no row has a unit. -#}
# macro begin_units()
# if units
# for x in units
# for r in range(lane_rows)
  var {{ x }}_unit_{{ r }} = 1.0;
  var {{ x }}_waits_{{ r }} = row_{{ r }} < min(row_limit, seq.{{ "seq_k" if rows_are_keys else "seq_q" }});
# endfor
# endfor
  var waits = true;
# endif
# endmacro

{#- Sets the unit of each row for which `condition` holds, by the row's largest dS: it comes to 2^-6 .. 2^-5 in the unit. Then numbers
    down to 2^-8 of it are as precise as halves are, and later ones may be 2^20 times as large. Two halves err by
    no more than 2^-25, whatever the number. Numbers come to 2^-3 .. 2^-2, so that this is 2^-22 of the largest; at 2^3 one row of llama's
    8192 keys left the range, which took 18 ms (NVIDIA H200). -#}
# macro follow(w, x, condition, then="")
# for r in range(lane_rows)
      var factor_{{ r }} = 1.0;
      {
        var largest4 = abs({{ w }}_{{ r }}_0);
# for n in range(1, lane_quads)
        largest4 = max(largest4, abs({{ w }}_{{ r }}_{{ n }}));
# endfor
        var largest = max(max(largest4.x, largest4.y), max(largest4.z, largest4.w));
{{ reduce_row("largest", "max") }}
        let exponent = i32(bitcast<u32>(largest) >> 23u) - 127;
        // No unit brings infinity or NaN within range. The row is reported.
        if (exponent < 128 && {{ condition | replace("ROW", r) }}) {
          factor_{{ r }} = bitcast<f32>(u32(127 + clamp({{ -3 if splits else -6 }} - exponent, -100, 100)) << 23u);
# if then
          {{ then | replace("ROW", r) }}
# endif
        }
      }
      {{ x }}_unit_{{ r }} *= factor_{{ r }};
# endfor
# endmacro

{#- Sets the units of rows that wait for their first dS. -#}
# macro set_units(w, x)
    {
{{ follow(w, x, x ~ "_waits_ROW && largest > 0.0", x ~ "_waits_ROW = false;") }}
    }
# endmacro

{#- Stores w, which is in the unit of the accumulator x, as the P tile. The first run does not change units here: that costs the loop over
    tiles its registers although it hardly ever happens (8 to 25 % on an NVIDIA H200), and so does a comparison with the range of halves
    (16 to 25 % of d_kv). A number beyond that range becomes infinite, and so does its row, which is reported. The second run lets the
    unit follow. -#}
# macro keep_in_unit(w, x, operand, also=[])
# if sanitize and not multiplies_bf16
    var grows_{{ x }} = subgroupAny(any({% for r, n in pairs(lane_rows, lane_quads) %}{{ " | " if not loop.first }}(abs({{ w }}_{{ r }}_{{ n }}) > vec4<f32>(UNIT_LIMIT)){% endfor %}));
    loop {
      if (!grows_{{ x }}) { break; }
      grows_{{ x }} = false;
{{ follow(w, x, "largest > UNIT_LIMIT") }}
# for r in range(lane_rows)
# for n in range(lane_quads)
      {{ w }}_{{ r }}_{{ n }} *= factor_{{ r }};
# endfor
# for stem in also
      {{ stem }}_{{ r }} *= factor_{{ r }};
# endfor
# endfor
{{ rescale(x, operand, "factor_") }}
    }
# endif
{{ store_p(w) }}
# endmacro

{#- The walk begins at a tile that all rows see, if there is one, or with ALiBi at the diagonal, where a key's probabilities are largest. It
    goes on from the first tile, and ends when all rows have a unit. A row whose dS are all zero has none to the end. -#}
# macro begin_walk()
# if not mask
# if alibi and rows_are_keys
  let walk_tile = tiles.first;
# else
  let walk_tile = clamp({{ "full.start" if rows_are_keys else "(max(full.end, 1u) - 1u)" }} / TILE_COLUMNS, tiles.first, max(tiles.end, 1u) - 1u);
# endif
  var next_of_walk = tiles.first;
  var is_first = {{ "false" if alibi and rows_are_keys else "true" }};
# endif
{{ fetch_first("walk_tile") }}
# endmacro

{#- Ends a tile of the walk. The walk goes on while rows wait for their units. -#}
# macro next_units()
    let subgroup_waits = subgroupAny({% for x in units %}{% set first = loop.first %}{% for r in range(lane_rows) %}{{ " || " if r > 0 or not first }}{{ x }}_waits_{{ r }}{% endfor %}{% endfor %});
{{ any_subgroup("waits", "subgroup_waits") }}
    if (!waits) { break; }
# if not mask
    next_of_walk = select({{ following }}, tiles.first, is_first);
    is_first = false;
# endif
    let next = {{ column_of("next_visible" if mask else "next_of_walk") }};
{{ fetch_columns("next") }}
# endmacro

{#- After the walk: back to the first tile. -#}
# macro restart()
# if mask
  classes = Classes(0u, 0xffffffffu);
  span = visible_span({{ class_arguments }}, tiles, row0, row_end, tiles.first);
  next_visible = first_tile;
# endif
{{ fetch_first() }}
# endmacro
