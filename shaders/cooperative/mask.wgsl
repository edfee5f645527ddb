{#- Hidden pairs of a score tile.
    Needs: cooperative/fragments.wgsl, mask.wgsl; with a mask mask_words.wgsl and the span of tile_loops.wgsl.
    Declares: the macros below; `mask_words_R` and `mask_R`, the mask's bits of the lane's rows. -#}
# from "cooperative/fragments.wgsl" import quad_column

{#- Loads the mask's bits of each of a lane's rows and the 64 columns around a tile, where the mask hides pairs of the tile's span. -#}
# macro fetch_mask(tile)
# if mask_words
  if (span.kind != 1u) {
    let first_word = {{ "(" ~ tile ~ " * TILE_COLUMNS)" if rows_are_keys else "first_column(tiles, " ~ tile ~ ")" }} / 64u * 2u;
# for r in range(lane_rows)
    mask_words_{{ r }} = vec2<u32>(mask_word(seq, row_{{ r }}, first_word), mask_word(seq, row_{{ r }}, first_word + 1u));
# endfor
  }
# endif
# endmacro

{#- The bits of the tile's columns, a word or two for each row. The next span's bits come after. -#}
# macro mask_of_tile()
# if mask_words
# for r in range(lane_rows)
# set first = "tile_column0" if elements else "column0"
# if tile_columns > 32
    let mask_{{ r }} = mask_words_{{ r }};
# else
    let mask_{{ r }} = select(mask_words_{{ r }}.x, mask_words_{{ r }}.y, ({{ first }} & 32u) != 0u) >> ({{ first }} % 32u);
# endif
# endfor
# endif
# endmacro

{#- The columns of a lane's n-th quad that its r-th row sees by the band. -#}
{%- macro visible(r, n) %}visible4(seq, row_{{ r }}, {{ quad_column(n) }}){% endmacro -%}

{#- Sets hidden pairs to `value`, whatever was computed for them, and their numbers in `also` to 0. Pairs of all tiles of the loop may be
    hidden, or of none, or each tile has to say (`masked`). That is written as a loop that runs at most once: with an `if`, NVIDIA's
    compiler moves the registers of fragments. -#}
# macro hide(x, value, masked, also="", before="")
# if masked == "all"
    {
{{ hide_pairs(x, value, also) }}
    }
# elif masked == "some"
    var hides_{{ before ~ x }} = is_partial{{ " || mask_partial" if mask }};
    loop {
      if (!hides_{{ before ~ x }}) { break; }
      hides_{{ before ~ x }} = false;
{{ hide_pairs(x, value, also) }}
    }
# endif
# endmacro

{#- A row's bits from the first column of the chunk on. -#}
{%- macro mask_of_chunk(r) -%}
{%- if not elements -%}
  mask_{{ r }}
{%- elif tile_columns > 32 -%}
  (select(mask_{{ r }}.x, mask_{{ r }}.y, chunk_column >= 32u) >> (chunk_column % 32u))
{%- else -%}
  (mask_{{ r }} >> chunk_column)
{%- endif -%}
{%- endmacro -%}

# macro hide_pairs(x, value, also)
# for r in range(lane_rows)
# if mask_words
      // A bit for each column.
      var visible_{{ r }} = select(0xffffffffu, {{ mask_of_chunk(r) }}, mask_partial);
      if (is_partial) { visible_{{ r }} &= visible_bits(seq, row_{{ r }}, column0); }
      visible_{{ r }} >>= lane_column;
# endif
# for n in range(lane_quads)
      {{ x }}_{{ r }}_{{ n }} = select(vec4<f32>({{ value }}), {{ x }}_{{ r }}_{{ n }}, {{ visible_quad(r, n) }});
# if also
      {{ also }}_{{ r }}_{{ n }} = select(vec4<f32>(), {{ also }}_{{ r }}_{{ n }}, {{ x }}_{{ r }}_{{ n }} != vec4<f32>());
# endif
# endfor
# endfor
# endmacro

{#- The columns of a lane's n-th quad that the band and the mask leave visible. -#}
{%- macro visible_quad(r, n) -%}
{%- if mask_words -%}
  (vec4<u32>(visible_{{ r }}) & {{ quad_bits(n) }}) != vec4<u32>()
{%- elif mask -%}
  {{ visible(r, n) }} & mask4(seq, row_{{ r }}, {{ quad_column(n) }})
{%- else -%}
  {{ visible(r, n) }}
{%- endif -%}
{%- endmacro -%}

{#- The bits of a lane's n-th quad. The caller has shifted them by the lane's column. -#}
{%- macro quad_bits(n) %}vec4<u32>({% for step in quad_steps %}{{ ", " if not loop.first }}{{ 2 ** (quad_offsets[n] + step) }}u{% endfor %}){% endmacro -%}
