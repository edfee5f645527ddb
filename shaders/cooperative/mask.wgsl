# from "cooperative/fragments.wgsl" import quad_column

{#- Reads what the mask says of each of a lane's rows and the 64 columns around a tile, where the tile's span is mask_partial. -#}
# macro fetch_mask(tile)
# if mask_words
  if (span.kind != 1u) {
    let first_word = {{ "(" ~ tile ~ " * TILE_COLUMNS)" if rows_are_keys else "first_column(tiles, " ~ tile ~ ")" }} / 64u * 2u;
# for r in range(row_fragments)
    mask_words_{{ r }} = vec2<u32>(mask_word(seq, row_{{ r }}, first_word), mask_word(seq, row_{{ r }}, first_word + 1u));
# endfor
  }
# endif
# endmacro

{#- The 32 columns around a tile, before those of the next span come. -#}
# macro mask_of_tile()
# if mask_words
# for r in range(row_fragments)
    let mask_{{ r }} = select(mask_words_{{ r }}.x, mask_words_{{ r }}.y, (column0 & 32u) != 0u) >> (column0 % 32u);
# endfor
# endif
# endmacro

{#- Which of the columns of a lane's n-th quad its r-th row sees. -#}
{%- macro visible(r, n) %}visible4(seq, row_{{ r }}, {{ quad_column(n) }}){% endmacro -%}

{#- `value` instead of what is hidden, whatever was computed there, and zeros in what `also` names. What happens rarely is a loop that runs once, not an if:
    NVIDIA's compiler leaves the registers of fragments where they are. -#}
# macro hide(x, value, also="", before="")
    var hides_{{ before ~ x }} = is_partial{{ " || mask_partial" if mask }};
    loop {
      if (!hides_{{ before ~ x }}) { break; }
      hides_{{ before ~ x }} = false;
# for r in range(row_fragments)
# if mask_words
      // A bit for each column.
      var visible_{{ r }} = select(0xffffffffu, mask_{{ r }}, mask_partial);
      if (is_partial) { visible_{{ r }} &= visible_bits(seq, row_{{ r }}, column0); }
      visible_{{ r }} >>= 4u * part;
# endif
# for n in range(lane_quads)
      {{ x }}_{{ r }}_{{ n }} = select(vec4<f32>({{ value }}), {{ x }}_{{ r }}_{{ n }}, {% if mask_words %}(vec4<u32>(visible_{{ r }}) & {{ quad_bits(n) }}) != vec4<u32>(){% else %}{{ visible(r, n) }}{% if mask %} & mask4(seq, row_{{ r }}, {{ quad_column(n) }}){% endif %}{% endif %});
# if also
      {{ also }}_{{ r }}_{{ n }} = select(vec4<f32>(), {{ also }}_{{ r }}_{{ n }}, {{ x }}_{{ r }}_{{ n }} != vec4<f32>());
# endif
# endfor
# endfor
    }
# endmacro

{#- Bits of a lane's n-th quad, but for its place among the lanes of its row. -#}
{%- macro quad_bits(n) %}vec4<u32>({% for e in [1, 2, 4, 8] %}{{ ", " if e > 1 }}{{ e * 2 ** (4 * n * lanes // side) }}u{% endfor %}){% endmacro -%}
