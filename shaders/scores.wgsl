{#- Scores are more than products, or pairs are hidden one by one: softcap, ALiBi, bias, boolean mask. Rows and columns are those of the
    kernel's tiles, and positions count from the start of the sequence.
    Needs: mask.wgsl, operands.wgsl, exp.wgsl.
    Declares: begin_pairs, and what the fragments below declare; score4 unless scores are in powers of two, pair_visible4 unless masks go by
    spans, and share unless rows of the lowest biases are reported. -#}
# if alibi
# include "alibi.wgsl"
# endif
# if bias
# include "bias.wgsl"
# endif
# if mask
# include "mask_words.wgsl"
# include "mask_tiles.wgsl"
# endif
# if softcap
# include "softcap.wgsl"
# endif
# if hides and not masks_by_spans

// The columns of a row, four from `column` on, that the band, the mask and the bias all leave visible.
fn pair_visible4(seq: Sequence, row: u32, column: u32) -> vec4<bool> {
# set by_mask = " & mask4(seq, row, column)" if mask else ""
# set by_bias = " & (bitcast<vec4<u32>>(bias4(seq, row, column)) != vec4<u32>(0xff800000u))" if bias else ""
  return visible4(seq, row, column){{ by_mask }}{{ by_bias }};
}
# endif
# if bias and not reports_rows and not softmax

// The factor of a query's probabilities. A bias of -1e9 or less absorbs log(n) of its row's lse, so exp(score - lse) is 1 for each of
// the n keys that share the largest bias, where 1 / n is right. Twin of Scores::shares.
fn share(seq: Sequence, query: u32, row_lse: f32) -> f32 {
  if (!(row_lse <= -1e9)) { return 1.0; }
  var count = 0.0;
# if rows_are_keys
  for (var key = 0u; key < seq.seq_k; key += 1u) {
    count += select(0.0, 1.0, pair_visible4(seq, key, query).x && bias_at(seq, query, key) == row_lse);
  }
# else
  for (var key = 0u; key < seq.seq_k; key += 4u) {
    count += dot(vec4<f32>(1.0), select(vec4<f32>(), vec4<f32>(1.0), pair_visible4(seq, query, key) & (bias4(seq, query, key) == vec4<f32>(row_lse))));
  }
# endif
  return 1.0 / max(count, 1.0);
}
# endif
# if modified and not scores_in_powers_of_two

// The score of a product times the scale{{ ", capped" if softcap }}.
fn score4(seq: Sequence, capped: vec4<f32>, row: u32, column: u32) -> vec4<f32> {
  var score = capped;
# if alibi
  score = fma(-vec4<f32>(slope), distance4(seq, row, column), score);
# endif
# if bias
  score += bias4(seq, row, column);
# endif
  return score;
}
# endif

// Sets the slope, and the bases of the bias and the mask, for a sequence, its place along the batch axis, and a query head.
fn begin_pairs(number: u32, batch: u32, head: u32) {
# if alibi
  slope = {{ "alibi_slopes[params.slope_offset + head]" if "alibi_slopes" in names else "row_stats[operand_base(params.row_stats, batch, head) + params.slope_row].x" }};
# endif
# if bias
  bias_base = operand_base(params.bias, number, head);
# endif
# if mask
# if rows_are_keys
  mask_base = operand_base(params.mask_bits, number, head) + select(0u, params.mask_key_bits.offset - params.mask_bits.offset, params.mask_rows > 1u);
# else
  mask_base = operand_base(params.mask_bits, number, head);
# endif
# endif
}
