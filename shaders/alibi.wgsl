{#- ALiBi: |p - j| times the slope of the query head is subtracted from a score.
    Needs: the numbers of the sequence. Declares: `slope`, which begin_pairs of scores.wgsl sets, and distance4. -#}
var<private> slope: f32;

// |p - j| of the four columns of a quad from `column` on, exact below 2^24.
fn distance4(seq: Sequence, row: u32, column: u32) -> vec4<f32> {
  let columns = vec4<i32>(i32(column)) + vec4<i32>({{ quad_steps | join(", ") }});
# if rows_are_keys
  return vec4<f32>(abs(columns + vec4<i32>(seq.offset - i32(row))));
# else
  return vec4<f32>(abs(vec4<i32>(i32(row) + seq.offset) - columns));
# endif
}
