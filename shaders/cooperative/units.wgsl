# from "cooperative/columns.wgsl" import fetch_columns, column_of, fetch_first
# from "cooperative/fragments.wgsl" import store_p, reduce_row, rescale, any_subgroup

{#- Before the walk: no row has a unit. -#}
# macro begin_units()
# if units
# for x in units
# for r in range(row_fragments)
  var {{ x }}_unit_{{ r }} = 1.0;
  var {{ x }}_waits_{{ r }} = row_{{ r }} < min(row_limit, seq.{{ "seq_k" if rows_are_keys else "seq_q" }});
# endfor
# endfor
  var waits = true;
# endif
# endmacro

{#- The largest weight of each row sets its unit, where that waits for the first weights, or where they go beyond halves: it comes to
    2^-6 .. 2^-5, so that weights down to 2^-8 of it are as precise as halves are, what is lost below is little beside it, and later ones
    may be 2^20 times as large. -#}
# macro follow(w, x, condition, then="")
# for r in range(row_fragments)
      var factor_{{ r }} = 1.0;
      {
        var largest4 = abs({{ w }}_{{ r }}_0);
# for n in range(1, lane_quads)
        largest4 = max(largest4, abs({{ w }}_{{ r }}_{{ n }}));
# endfor
        var largest = max(max(largest4.x, largest4.y), max(largest4.z, largest4.w));
{{ reduce_row("largest", "max") }}
        let exponent = i32(bitcast<u32>(largest) >> 23u) - 127;
        // No unit takes infinity or NaN: the row is reported.
        if (exponent < 128 && {{ condition | replace("ROW", r) }}) {
          factor_{{ r }} = bitcast<f32>(u32(127 + clamp(-6 - exponent, -100, 100)) << 23u);
# if then
          {{ then | replace("ROW", r) }}
# endif
        }
      }
      {{ x }}_unit_{{ r }} *= factor_{{ r }};
# endfor
# endmacro

{#- Sets units of rows that have none. -#}
# macro set_units(w, x)
    {
{{ follow(w, x, x ~ "_waits_ROW && largest > 0.0", x ~ "_waits_ROW = false;") }}
    }
# endmacro

{#- Leaves changed weights w, in the unit of the accumulator x, for `accumulate`. The unit is known before: setting it here costs the
    loop over tiles its registers, even where that hardly ever happens (8 to 25 % on an NVIDIA H200), and so does comparing weights
    with what halves hold (16 to 25 % of d_kv). A weight beyond that becomes infinite as a half, and so does its row, which is
    reported. In the second run the unit follows such weights. -#}
# macro keep_in_unit(w, x, operand, also=[])
# if sanitize
    var grows_{{ x }} = subgroupAny(any({% for r in range(row_fragments) %}{% for n in range(lane_quads) %}{{ " | " if r + n > 0 }}(abs({{ w }}_{{ r }}_{{ n }}) > vec4<f32>(UNIT_LIMIT)){% endfor %}{% endfor %}));
    loop {
      if (!grows_{{ x }}) { break; }
      grows_{{ x }} = false;
{{ follow(w, x, "largest > UNIT_LIMIT") }}
# for r in range(row_fragments)
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

{#- The walk begins at a tile of which all rows see something, if there is one, goes on from the first one, and ends when all rows
    have a unit. A row without weights has none to the end. -#}
# macro begin_walk()
# if not mask
  let walk_tile = clamp({{ "full.start" if rows_are_keys else "(max(full.end, 1u) - 1u)" }} / TILE_COLUMNS, tiles.first, max(tiles.end, 1u) - 1u);
  var next_of_walk = tiles.first;
  var is_first = true;
# endif
{{ fetch_first("walk_tile") }}
# endmacro

{#- Ends a tile: goes on where rows wait for their units. -#}
# macro next_units()
    let subgroup_waits = subgroupAny({% for x in units %}{% set first = loop.first %}{% for r in range(row_fragments) %}{{ " || " if r > 0 or not first }}{{ x }}_waits_{{ r }}{% endfor %}{% endfor %});
{{ any_subgroup("waits", "subgroup_waits") }}
    if (!waits) { break; }
# if not mask
    next_of_walk = select({{ following }}, tiles.first, is_first);
    is_first = false;
# endif
    let next = {{ column_of("next_visible" if mask else "next_of_walk") }};
{{ fetch_columns("next") }}
# endmacro

{#- After the walk: the first tile again. -#}
# macro restart()
# if mask
  classes = Classes(0u, 0xffffffffu);
  span = visible_span({{ class_arguments }}, tiles, row0, row_end, tiles.first);
  next_visible = first_tile;
# endif
{{ fetch_first() }}
# endmacro
