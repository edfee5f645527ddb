{#- Appends new keys and values to a cache, and rotates queries in place: one dispatch for all tokens of all sequences.

      for each sequence: next length = length + its new tokens
      for each new token, and each of its rows of k, v and, where asked for, q:
        x = four numbers of the row                      load_X
        x = x * cosines + partner * sines                rotation: of q, and of k unless keys are rotated as they are read
        q = x                                            write_q
        cached row = x                                   write_row: quantised in blocks of 32 where asked for

    LANES threads share a row, each with four numbers of it. A prefill appends behind the rows that were gathered from the cache, and not
    into the cache; a quantised number is then stored as the number that it would be read as. -#}
# include "params.wgsl"
# include "operands.wgsl"
# if quantised
# include "cache/scales.wgsl"

# endif
# set rotates_k = rotary is not none and not rotary.relative
# if rotary
# include "cache/rotary.wgsl"
# for operand in loads if operand.name != "v"

// The numbers that those of a quad are paired with.
fn partners_{{ operand.name }}(base: u32, quad: u32, x: vec4<f32>) -> vec4<f32> {
# if not rotary.half_split
  return x.yxwz;
# elif rotary.dim % 8 == 0
  if (quad * 4u >= ROTARY_DIM) { return x; }
  return load_{{ operand.name }}(base, select(quad - {{ rotary.dim // 8 }}u, quad + {{ rotary.dim // 8 }}u, quad < {{ rotary.dim // 8 }}u));
# else
  var y = x;
# for e in range(4)
  if (quad * 4u + {{ e }}u < ROTARY_DIM) {
    let d = (quad * 4u + {{ e }}u + ROTARY_DIM / 2u) % ROTARY_DIM;
    let paired = load_{{ operand.name }}(base, d / 4u);
    y.{{ xyzw[e] }} = paired[d % 4u];
  }
# endfor
  return y;
# endif
}
# endfor
# endif

# if quantised
# for name, rotated in [("k", rotates_k), ("v", false)]
# set position_parameter = ", position: u32" if rotated else ""
# set position_argument = ", position" if rotated else ""

// Four numbers to append, zero beyond the width.
fn new_{{ name }}(base: u32, quad: u32{{ position_parameter }}) -> vec4<f32> {
  if (quad >= {{ operand_quads[name] }}u) { return vec4<f32>(); }
  let x = load_{{ name }}(base, quad);
# if rotated
  let turn = rotation(position, quad);
  return x * turn.cosines + partners_{{ name }}(base, quad, x) * turn.sines;
# else
  return x;
# endif
}

// The scale of a block of 32 neighbours. Sizes are compared by their bits, where infinities and NaNs are the largest.
fn scale_{{ name }}(base: u32, block: u32{{ position_parameter }}) -> u32 {
  var largest = vec4<u32>();
  for (var n = 0u; n < 8u; n++) {
    largest = max(largest, bitcast<vec4<u32>>(new_{{ name }}(base, block * 8u + n{{ position_argument }})) & vec4<u32>(0x7fffffffu));
  }
  return narrow_scale(bitcast<f32>(max(max(largest.x, largest.y), max(largest.z, largest.w))) * 0.007874016);
}
# endfor
# endif

const THREADS: u32 = {{ threads }}u;
const LANES: u32 = {{ lanes }}u;

{#- The lengths after this append lie in a list of their own, since other workgroups still read the lengths before it. -#}
# macro count_lengths()
  for (var n = index * THREADS + thread; n < sequences; n += params.workgroups * THREADS) {
    if (index < params.workgroups) { state[params.next + n] = state[params.current + n] + tokens[n]; }
  }
# endmacro

{#- Rotates a query in place. All threads of a row have read it before one of them writes. -#}
# macro write_q()
  let q_base = operand_base(params.q, 0u, row - 2u * params.kv_heads) + token * params.q.seq;
  let is_query = has_row && row >= 2u * params.kv_heads && quad < {{ operand_quads.q }}u;
  var rotated = vec4<f32>();
  if (is_query) {
    let x = load_q(q_base, quad);
# if rotary.relative and rolling
    // The query's place once its key is in the cache.
    let turn = rotation(min(position, params.sink_rows + params.window_rows - 1u), quad);
# else
    let turn = rotation(position, quad);
# endif
    rotated = x * turn.cosines + partners_q(q_base, quad, x) * turn.sines;
  }
  storageBarrier();
  if (is_query) { store_q(q_base, quad, rotated); }
# endmacro

{#- `cached`, the row that a new row is written to. -#}
# macro cached_row()
# if gathered
  let cached = head * params.gathered_rows + tokens[sequence] + number;
# else
# if rolling
  // A token that this append itself pushes out of the window is not written: each window row has one writer.
  if (position >= params.sink_rows && tokens[sequence] - number > params.window_rows) { return; }
  let place = select(params.sink_rows + (position - params.sink_rows) % params.window_rows, position, position < params.sink_rows);
  let block = sequence;
# elif paged
  let place = position & (params.block_rows - 1u);
  let block = state[params.table + sequence * params.table_row + (position >> params.block_shift)];
# else
  let place = position;
  let block = sequence;
# endif
  let cached = (block * params.kv_heads + head) * params.block_rows + place;
# endif
# endmacro

{#- Four numbers of the new row, and their place in the cached row. -#}
# macro write_row(name, cache)
      let base = operand_base(params.{{ name }}, 0u, head) + token * params.{{ name }}.seq;
# if quantised
{{ quantise(name, cache) }}
# else
      var x = vec4<f32>();
      if (quad < {{ operand_quads[name] }}u) {
        x = load_{{ name }}(base, quad);
# if name == "k" and rotates_k
        let turn = rotation(position, quad);
        x = x * turn.cosines + partners_k(base, quad, x) * turn.sines;
# endif
      }
# endif
# if not quantised or gathered
# if not is_half
      {{ cache }}[cached * {{ padded_quads[name] }}u + quad] = x;
# else
      let halves = narrow4(x);
      {{ cache }}[cached * {{ padded_quads[name] }}u + quad] = halves.xz | (halves.yw << vec2<u32>(16u));
# endif
# endif
# endmacro

{#- The numbers of a block as signed bytes, in units of its scale. If the scale is NaN, the bytes do not matter. -#}
# macro quantise(name, cache)
# set position_argument = ", position" if name == "k" and rotates_k else ""
      let scale = scale_{{ name }}(base, quad / 8u{{ position_argument }});
      let d = widen_scale(scale);
      let inverse = select(0.0, 1.0 / d, d > 0.0);
      let numbers = clamp(round(new_{{ name }}(base, quad{{ position_argument }}) * inverse), vec4<f32>(-127.0), vec4<f32>(127.0));
# if gathered
      let x = select(vec4<f32>(), numbers, d > 0.0) * d;
# else
      let bytes = bitcast<vec4<u32>>(vec4<i32>(select(vec4<f32>(), numbers, d > 0.0))) & vec4<u32>(0xffu);
      let words = cached * {{ row_vectors[name] * 4 }}u;
      {{ cache }}[words + quad] = bytes.x | (bytes.y << 8u) | (bytes.z << 16u) | (bytes.w << 24u);
      if (quad % 16u == 0u) {
        // Two scales in a word.
        let next = scale_{{ name }}(base, quad / 8u + 1u{{ position_argument }});
        {{ cache }}[words + {{ padded_quads[name] }}u + quad / 16u] = scale | (next << 16u);
      }
# endif
# endmacro

@compute @workgroup_size({{ threads }})
fn main(
  @builtin(workgroup_id) workgroup: vec3<u32>,
  @builtin(num_workgroups) grid: vec3<u32>,
  @builtin(local_invocation_index) thread: u32,
) {
  let index = workgroup.x + workgroup.y * grid.x;
  // `tokens` has a word for each sequence: {{ "the gathered row of its first new token" if gathered else "the number of its new tokens" }}.
  // Behind these words each token has two: its sequence, and its number among the sequence's new tokens.
  let sequences = params.sequences;
# if not gathered
{{ count_lengths() }}
# endif
  let rows = 2u * params.kv_heads{{ " + params.heads" if rotates_q else "" }};
  let item = index * (THREADS / LANES) + thread / LANES;
  let quad = thread % LANES;
  let token = item / rows;
  let row = item % rows;
  let has_row = index < params.workgroups && token < params.tokens;
  var sequence = 0u;
  var number = 0u;
  var position = 0u;
  if (has_row) {
    sequence = tokens[sequences + 2u * token];
    number = tokens[sequences + 2u * token + 1u];
    position = state[params.current + sequence] + number;
  }
# if rotates_q
{{ write_q() }}
# endif
  if (!has_row || row >= 2u * params.kv_heads) { return; }
  let head = row % params.kv_heads;
{{ cached_row() }}
# for name, cache in [("k", "keys"), ("v", "values")]
  {{ "if (row < params.kv_heads)" if name == "k" else "else" }} {
    if (quad < {{ padded_quads[name] }}u) {
{{ write_row(name, cache) }}
    }
  }
# endfor
}
