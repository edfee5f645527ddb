{#- Four neighbours of a row for fragments: loaded as they lie in memory, and rounded to halves later. Where bf16 is multiplied as itself,
    the halves are its bits.
    Needs: operands.wgsl, `loads`. Declares: Raw, raw_X of each operand that is loaded, half4; in f16 and where bf16 is multiplied halves4;
    with token scales widened4; of split numbers hi4. -#}
alias Raw = {{ "vec2<u32>" if vec4 and is_half else ("vec4<f16>" if dtype == "f16" else "vec4<f32>") }};
# if splits
// A number x is hi, the nearest number of 11 significant bits, and lo = x - hi. hi is formed by rounding errors: compilers may take a conversion
// to f16 and back for no change, and NVIDIA's does.
fn hi4(x: vec4<f32>) -> vec4<f32> {
  let far = vec4<f32>({{ 2 ** 13 }}.0);
  return fma(x, far, -fma(x, far, -x));
}
# endif
# if dtype == "f16"

fn halves4(raw: Raw) -> vec4<f16> {
  return {{ "raw" if not vec4 else ("bits_as_halves(raw)" if elements else "vec4<f16>(vec4<f32>(unpack2x16float(raw.x), unpack2x16float(raw.y)))") }};
}
# endif

# if multiplies_bf16

fn words(raw: Raw) -> vec2<u32> {
# if vec4
  return raw;
# else
  let numbers = narrow4(raw);
  return numbers.xz | (numbers.yw << vec2<u32>(16u));
# endif
}

fn halves4(raw: Raw) -> vec4<f16> {
  return bits_as_halves(words(raw));
}
# endif

# if column_scales
fn widened4(raw: Raw) -> vec4<f32> {
  return {{ "vec4<f32>(widen2(raw.x), widen2(raw.y))" if vec4 and is_half else "raw" }};
}

# endif
fn half4(raw: Raw, factor: f32) -> vec4<f16> {
# if dtype == "f16"
  return halves4(raw) * f16(factor);
# elif multiplies_bf16
  // The factor is 1 or -1: its sign is that of two numbers in a word.
  let sign = bitcast<u32>(factor) & 0x80000000u;
  return bits_as_halves(words(raw) ^ vec2<u32>(sign | (sign >> 16u)));
# elif vec4 and is_half
  return vec4<f16>(vec4<f32>(widen2(raw.x), widen2(raw.y)) * factor);
# else
  return vec4<f16>(raw * factor);
# endif
}
# for operand in loads

// Zero beyond the width.
fn raw_{{ operand.name }}(base: u32, row: u32, quad: u32) -> {{ "vec4<u32>" if operand.eight else "Raw" }} {
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
