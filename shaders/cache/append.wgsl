{#- New keys and values into their rows, and queries rotated where they lie: one dispatch for all tokens of all sequences. A
    few threads share a row, each with four numbers of it. Or not into the cache,
    but behind what was gathered from it, as they would be gathered. -#}
{% include "params.wgsl" %}
{% include "operands.wgsl" %}
{% if quantised %}
{% include "cache/scales.wgsl" %}

{% endif %}
{% if rotary %}
{% include "cache/rotary.wgsl" %}
{% for operand in loads if operand.name != "v" %}

// The numbers that those of a quad are paired with.
fn partners_{{ operand.name }}(base: u32, quad: u32, x: vec4<f32>) -> vec4<f32> {
{% if not rotary.half_split %}
  return x.yxwz;
{% elif rotary.dim % 8 == 0 %}
  if (quad * 4u >= ROTARY_DIM) { return x; }
  return load_{{ operand.name }}(base, select(quad - {{ rotary.dim // 8 }}u, quad + {{ rotary.dim // 8 }}u, quad < {{ rotary.dim // 8 }}u));
{% else %}
  var y = x;
{% for e in range(4) %}
  if (quad * 4u + {{ e }}u < ROTARY_DIM) {
    let d = (quad * 4u + {{ e }}u + ROTARY_DIM / 2u) % ROTARY_DIM;
    let paired = load_{{ operand.name }}(base, d / 4u);
    y.{{ xyzw[e] }} = paired[d % 4u];
  }
{% endfor %}
  return y;
{% endif %}
}
{% endfor %}
{% endif %}

{% if quantised %}
{% for name, rotated in [("k", rotary is not none and not rotary.relative), ("v", false)] %}
{% set turned = ", position: u32" if rotated else "" %}

fn new_{{ name }}(base: u32, quad: u32{{ turned }}) -> vec4<f32> {
  if (quad >= {{ operand_quads[name] }}u) { return vec4<f32>(); }
  let x = load_{{ name }}(base, quad);
{% if rotated %}
  let turn = rotation(position, quad);
  return x * turn.cosines + partners_{{ name }}(base, quad, x) * turn.sines;
{% else %}
  return x;
{% endif %}
}

// The scale of a block of 32 neighbours. By bits, where infinities and NaNs are the largest sizes.
fn scale_{{ name }}(base: u32, block: u32{{ turned }}) -> u32 {
  var most = vec4<u32>();
  for (var n = 0u; n < 8u; n++) {
    most = max(most, bitcast<vec4<u32>>(new_{{ name }}(base, block * 8u + n{{ ", position" if rotated else "" }})) & vec4<u32>(0x7fffffffu));
  }
  return narrow_scale(bitcast<f32>(max(max(most.x, most.y), max(most.z, most.w))) * 0.007874016);
}
{% endfor %}
{% endif %}

const THREADS: u32 = {{ threads }}u;
// Threads of a row.
const LANES: u32 = {{ lanes }}u;

@compute @workgroup_size({{ threads }})
fn main(
  @builtin(workgroup_id) workgroup: vec3<u32>,
  @builtin(num_workgroups) grid: vec3<u32>,
  @builtin(local_invocation_index) thread: u32,
) {
  let index = workgroup.x + workgroup.y * grid.x;
  // `tokens` holds how many each sequence gets{{ ", here: the row of its first new one" if gathered }}, then the sequence of each token and its number
  // among the new ones.
  let sequences = params.sequences;
{% if not gathered %}
  // The lengths are counted up beside those that this dispatch reads.
  for (var n = index * THREADS + thread; n < sequences; n += params.workgroups * THREADS) {
    if (index < params.workgroups) { state[params.next + n] = state[params.current + n] + tokens[n]; }
  }
{% endif %}
  let rows = 2u * params.kv_heads{{ " + params.heads" if rotates_q else "" }};
  let item = index * (THREADS / LANES) + thread / LANES;
  let quad = thread % LANES;
  let token = item / rows;
  let row = item % rows;
  let there = index < params.workgroups && token < params.tokens;
  var sequence = 0u;
  var number = 0u;
  var position = 0u;
  if (there) {
    sequence = tokens[sequences + 2u * token];
    number = tokens[sequences + 2u * token + 1u];
    position = state[params.current + sequence] + number;
  }
{% if rotates_q %}
  // All threads of a row have read it before one of them writes.
  let q_base = operand_base(params.q, 0u, row - 2u * params.kv_heads) + token * params.q.seq;
  let is_query = there && row >= 2u * params.kv_heads && quad < {{ operand_quads.q }}u;
  var rotated = vec4<f32>();
  if (is_query) {
    let x = load_q(q_base, quad);
{% if rotary.relative and rolling %}
    // Its place once it is in the cache.
    let turn = rotation(min(position, params.kept_rows + params.ring_rows - 1u), quad);
{% else %}
    let turn = rotation(position, quad);
{% endif %}
    rotated = x * turn.cosines + partners_q(q_base, quad, x) * turn.sines;
  }
  storageBarrier();
  if (is_query) { store_q(q_base, quad, rotated); }
{% endif %}
  if (!there || row >= 2u * params.kv_heads) { return; }
  let head = row % params.kv_heads;
{% if gathered %}
  let cached = head * params.gathered_rows + tokens[sequence] + number;
{% elif rolling %}
  // What the ring would not hold any more after this append is not written: each row has one writer.
  if (position >= params.kept_rows && tokens[sequence] - number > params.ring_rows) { return; }
  let place = select(params.kept_rows + (position - params.kept_rows) % params.ring_rows, position, position < params.kept_rows);
  let block = sequence;
{% elif paged %}
  let place = position & (params.block_rows - 1u);
  let block = state[params.table + sequence * params.table_row + (position >> params.block_shift)];
{% else %}
  let place = position;
  let block = sequence;
{% endif %}
{% if not gathered %}
  let cached = (block * params.kv_heads + head) * params.block_rows + place;
{% endif %}
{% for name, cache in [("k", "keys"), ("v", "values")] %}
  {{ "if (row < params.kv_heads)" if name == "k" else "else" }} {
    if (quad < {{ padded_quads[name] }}u) {
      let base = operand_base(params.{{ name }}, 0u, head) + token * params.{{ name }}.seq;
{% if quantised %}
{% set turned = ", position" if name == "k" and rotary and not rotary.relative else "" %}
      let scale = scale_{{ name }}(base, quad / 8u{{ turned }});
      let d = widen_scale(scale);
      // In a block whose scale is NaN numbers are of no account.
      let inverse = select(0.0, 1.0 / d, d > 0.0);
      let numbers = clamp(round(new_{{ name }}(base, quad{{ turned }}) * inverse), vec4<f32>(-127.0), vec4<f32>(127.0));
{% if gathered %}
      let x = select(vec4<f32>(), numbers, d > 0.0) * d;
{% else %}
      let bytes = bitcast<vec4<u32>>(vec4<i32>(select(vec4<f32>(), numbers, d > 0.0))) & vec4<u32>(0xffu);
      let words = cached * {{ row_vectors[name] * 4 }}u;
      {{ cache }}[words + quad] = bytes.x | (bytes.y << 8u) | (bytes.z << 16u) | (bytes.w << 24u);
      if (quad % 16u == 0u) {
        // Two scales in a word.
        let next = scale_{{ name }}(base, quad / 8u + 1u{{ turned }});
        {{ cache }}[words + {{ padded_quads[name] }}u + quad / 16u] = scale | (next << 16u);
      }
{% endif %}
{% else %}
      var x = vec4<f32>();
      if (quad < {{ operand_quads[name] }}u) {
        x = load_{{ name }}(base, quad);
{% if name == "k" and rotary and not rotary.relative %}
        let turn = rotation(position, quad);
        x = x * turn.cosines + partners_k(base, quad, x) * turn.sines;
{% endif %}
      }
{% endif %}
{% if not quantised or gathered %}
{% if dtype == "f32" %}
      {{ cache }}[cached * {{ padded_quads[name] }}u + quad] = x;
{% else %}
      let halves = narrow4(x);
      {{ cache }}[cached * {{ padded_quads[name] }}u + quad] = halves.xz | (halves.yw << vec2<u32>(16u));
{% endif %}
{% endif %}
    }
  }
{% endfor %}
}
