{#- Four neighbours of a row for fragments: loaded as they lie in memory, and rounded to halves later.
    Needs: operands.wgsl, `loads`. Declares: Raw, raw_X of each operand that is loaded, half4; in f16 halves4, in bf16 widened4. -#}
alias Raw = {{ "vec2<u32>" if vec4 else ("vec4<f16>" if dtype == "f16" else "vec4<f32>") }};
# if dtype == "f16"

fn halves4(raw: Raw) -> vec4<f16> {
  return {{ "raw" if not vec4 else ("bits_as_halves(raw)" if elements else "vec4<f16>(vec4<f32>(unpack2x16float(raw.x), unpack2x16float(raw.y)))") }};
}
# endif

# if column_scales
fn widened4(raw: Raw) -> vec4<f32> {
  return {{ "vec4<f32>(widen2(raw.x), widen2(raw.y))" if vec4 else "raw" }};
}

# endif
fn half4(raw: Raw, factor: f32) -> vec4<f16> {
# if dtype == "f16"
  return halves4(raw) * f16(factor);
# elif vec4
  return vec4<f16>(vec4<f32>(widen2(raw.x), widen2(raw.y)) * factor);
# else
  return vec4<f16>(raw * factor);
# endif
}
# for operand in loads

// Zero beyond the width.
fn raw_{{ operand.name }}(base: u32, row: u32, quad: u32) -> Raw {
# if vec4
  // The row is added last, because only it changes from tile to tile.
  return {{ operand.name }}[base + quad + row];
# elif dtype == "f16"
  let at = base + row + quad * 4u;
  var x = vec4<f16>({{ operand.name }}[at], 0.0h, 0.0h, 0.0h);
# for e in range(1, 4)
  if (quad * 4u + {{ e }}u < {{ operand.width }}u) { x.{{ xyzw[e] }} = {{ operand.name }}[at + {{ e }}u]; }
# endfor
  return x;
# else
  return load_{{ operand.name }}(base + row, quad);
# endif
}
# endfor
