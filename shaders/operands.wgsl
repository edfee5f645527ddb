{#- Loads and stores of operands, f32 in arithmetic whatever they are in memory. Halves are bound as words of two.
    Needs: bindings.wgsl; `loads`, `stores`, `dtype`, `is_half`, `vec4`. Declares: for each operand X load_X or store_X, and without vec4 X_at or set_X;
    with halves the declarations of f16.wgsl or bf16.wgsl; with o_lo signed2. -#}
# set halves = is_half
# if halves
# include dtype ~ ".wgsl"

# endif
# if o_lo
// Two signed halves of a word.
fn signed2(word: u32) -> vec2<i32> {
  return bitcast<vec2<i32>>(vec2<u32>(word << 16u, word)) >> vec2<u32>(16u);
}

# endif
// Four neighbours of a row, zero beyond the width. With vec4 loads the width is a multiple of four.
# for operand in loads if not (multiplies_halves and is_matrix_operand)
# set is_lo = operand.name in ["o_lo", "states_lo"]
# set scalar = "i32" if is_lo else "f32"
# set widen = "signed2" if is_lo else "widen2"

fn load_{{ operand.name }}(base: u32, quad: u32) -> vec4<{{ scalar }}> {
# if not vec4
  let at = base + quad * 4u;
  var x = vec4<{{ scalar }}>({{ operand.name }}_at(at), 0, 0, 0);
# for e in range(1, 4)
  if (quad * 4u + {{ e }}u < {{ operand.width }}u) { x.{{ xyzw[e] }} = {{ operand.name }}_at(at + {{ e }}u); }
# endfor
  return x;
# elif halves
  let words = {{ operand.name }}[base + quad];
  return vec4<{{ scalar }}>({{ widen }}(words.x), {{ widen }}(words.y));
# else
  return {{ operand.name }}[base + quad];
# endif
}
# if not vec4

fn {{ operand.name }}_at(at: u32) -> {{ scalar }} {
# if halves
# if operand.atomic is defined and operand.atomic
  return {{ widen }}(atomicLoad(&{{ operand.name }}[at / 2u]) >> (at % 2u * 16u)).x;
# else
  return {{ widen }}({{ operand.name }}[at / 2u] >> (at % 2u * 16u)).x;
# endif
# else
  return {{ operand.name }}[at];
# endif
}
# endif
# endfor
# for operand in stores

fn store_{{ operand.name }}(base: u32, quad: u32, x: vec4<f32>) {
# if halves
  let stored = {{ "lo4" if operand.name == "o_lo" else "narrow4" }}(x);
# else
  let stored = x;
# endif
# if not vec4
  let at = base + quad * 4u;
  set_{{ operand.name }}(at, stored.x);
# for e in range(1, 4)
  if (quad * 4u + {{ e }}u < {{ operand.width }}u) { set_{{ operand.name }}(at + {{ e }}u, stored.{{ xyzw[e] }}); }
# endfor
# elif halves
  {{ operand.buffer }}[base + quad] = stored.xz | (stored.yw << vec2<u32>(16u));
# else
  {{ operand.buffer }}[base + quad] = stored;
# endif
}
# if not vec4 and halves

// The other half of the word may be another thread's: each changes its own only, so no order makes a difference.
fn set_{{ operand.name }}(at: u32, half: u32) {
  let shift = at % 2u * 16u;
  atomicAnd(&{{ operand.buffer }}[at / 2u], ~(0xffffu << shift));
  atomicOr(&{{ operand.buffer }}[at / 2u], half << shift);
}
# elif not vec4

fn set_{{ operand.name }}(at: u32, x: f32) {
  {{ operand.buffer }}[at] = x;
}
# endif
# endfor
