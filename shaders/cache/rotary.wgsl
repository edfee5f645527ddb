{#- Rotary embedding: x * cosines + partner * sines. The sine of the first number of a pair is negative.
    Needs: the table `cos_sin`; `rotary`. Declares: Rotation, ROTARY_DIM, rotation. -#}
struct Rotation { cosines: vec4<f32>, sines: vec4<f32> }

const ROTARY_DIM: u32 = {{ rotary.dim }}u;

// The rotation of a quad of a row, by the row's position. Numbers beyond the rotated ones stay as they are. A row of the table holds
// cosines, then sines.
fn rotation(position: u32, quad: u32) -> Rotation {
  var turn = Rotation(vec4<f32>(1.0), vec4<f32>());
  let row = position * ROTARY_DIM;
# for e in range(4)
  if (quad * 4u + {{ e }}u < ROTARY_DIM) {
    let d = quad * 4u + {{ e }}u;
# if rotary.half_split
    let pair = row + d % (ROTARY_DIM / 2u);
    let sign = select(1.0, -1.0, d < ROTARY_DIM / 2u);
# else
    let pair = row + d / 2u;
    let sign = {{ "-1.0" if e % 2 == 0 else "1.0" }};
# endif
    turn.cosines.{{ xyzw[e] }} = cos_sin[pair];
    turn.sines.{{ xyzw[e] }} = sign * cos_sin[pair + ROTARY_DIM / 2u];
  }
# endfor
  return turn;
}
