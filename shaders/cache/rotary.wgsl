{#- Rotary embedding: x * cosines + partner * sines, where the sines of a pair's first number are negative. -#}
struct Rotation { cosines: vec4<f32>, sines: vec4<f32> }

const ROTARY_DIM: u32 = {{ rotary.dim }}u;

// For four neighbours of a row; beyond the rotated ones nothing changes. A row of the table holds cosines, then sines.
fn rotation(position: u32, quad: u32) -> Rotation {
  var turn = Rotation(vec4<f32>(1.0), vec4<f32>());
  let row = position * ROTARY_DIM;
{% for e in range(4) %}
  if (quad * 4u + {{ e }}u < ROTARY_DIM) {
    let d = quad * 4u + {{ e }}u;
{% if rotary.half_split %}
    let i = row + d % (ROTARY_DIM / 2u);
    let sign = select(1.0, -1.0, d < ROTARY_DIM / 2u);
{% else %}
    let i = row + d / 2u;
    let sign = {{ "-1.0" if e % 2 == 0 else "1.0" }};
{% endif %}
    turn.cosines.{{ xyzw[e] }} = cos_sin[i];
    turn.sines.{{ xyzw[e] }} = sign * cos_sin[i + ROTARY_DIM / 2u];
  }
{% endfor %}
  return turn;
}
