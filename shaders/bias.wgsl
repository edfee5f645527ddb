{#- The bias that is added to scores, in f32 or in words of two halves.
    Needs: `bias`, the numbers of the sequence, widen2.
    Declares: `bias_base`, which begin_pairs of scores.wgsl sets, bias_at, BiasQuad, bias_quad, bias_of and bias4; where scores are in powers of two
    biased4. Loads stay within the sequence. The band hides all pairs beyond its end. -#}
// Element of the bias of query 0 and key 0.
var<private> bias_base: u32;
# if bias_vec4

// Four neighbours of a row, as they lie in memory. Offsets, strides and numbers of keys are multiples of four.
alias BiasQuad = {{ "vec4<f32>" if bias == "f32" else "vec2<u32>" }};

fn bias_quad(seq: Sequence, row: u32, column: u32) -> BiasQuad {
  return bias[(bias_base + min(row, seq.seq_q - 1u) * params.bias.seq) / 4u + min(column, seq.seq_k - 1u) / 4u];
}

fn bias_of(quad: BiasQuad) -> vec4<f32> {
  return {{ "quad" if bias == "f32" else "vec4<f32>(widen2(quad.x), widen2(quad.y))" }};
}
# else

fn bias_at(seq: Sequence, i: u32, j: u32) -> f32 {
  let at = bias_base + min(i, seq.seq_q - 1u) * params.bias.seq + min(j, seq.seq_k - 1u);
# if bias == "f32"
  return bias[at];
# else
  return widen2(bias[at / 2u] >> (at % 2u * 16u)).x;
# endif
}

alias BiasQuad = vec4<f32>;

fn bias_quad(seq: Sequence, row: u32, column: u32) -> BiasQuad {
# if rows_are_keys
  return vec4<f32>({% for step in quad_steps %}{{ ", " if not loop.first }}bias_at(seq, column + {{ step }}u, row){% endfor %});
# else
  return vec4<f32>({% for step in quad_steps %}{{ ", " if not loop.first }}bias_at(seq, row, column + {{ step }}u){% endfor %});
# endif
}

fn bias_of(quad: BiasQuad) -> vec4<f32> { return quad; }
# endif

fn bias4(seq: Sequence, row: u32, column: u32) -> vec4<f32> {
  return bias_of(bias_quad(seq, row, column));
}
# if scores_in_powers_of_two and not joins_bias

// Adds a bias to scores in powers of two. A sum may fall to -infinity although the bias does not hide the pair. Such a sum becomes
// LOWEST, so that the pair stays visible; `finish` reports a row that has no larger score. Bits are compared because compilers turn
// a float comparison into a maximum, which loses NaN.
fn biased4(score: vec4<f32>, bias: vec4<f32>) -> vec4<f32> {
  let sum = fma(bias, vec4<f32>(LOG2_E), score);
  let hidden = vec4<u32>(0xff800000u);
  return select(sum, vec4<f32>(LOWEST), (bitcast<vec4<u32>>(sum) == hidden) & (bitcast<vec4<u32>>(bias) != hidden));
}
# endif
