{#- The bits of the boolean mask that the kernel mask_bits has packed.
    Needs: `mask_bits`, the numbers of the sequence; of 32 columns at once also the band.
    Declares: `mask_base`, which begin_pairs of scores.wgsl sets, mask_word, mask4; with `mask_words` visible_bits. -#}
// First word of row 0: a row of queries, or a row of keys where the tile's rows are keys.
var<private> mask_base: u32;

const BLOCK_ROWS: u32 = {{ mask_block_rows }}u;
const BLOCK_KEYS: u32 = {{ mask_block_words * 32 }}u;

// The mask of a row and 32 columns, a bit for each column.
fn mask_word(seq: Sequence, row: u32, word: u32) -> u32 {
# if rows_are_keys
  let key = min(row, seq.seq_k - 1u);
  // One row for all queries.
  if (params.mask_rows == 1u) { return 0u - ((mask_bits[mask_base + key / 32u] >> (key % 32u)) & 1u); }
  return mask_bits[mask_base + key * params.mask_key_bits.seq + word];
# else
  return mask_bits[mask_base + min(row, seq.seq_q - 1u) * params.mask_bits.seq + word];
# endif
}

// The mask of a row and the four columns of a quad from `column` on, which lie in one word.
fn mask4(seq: Sequence, row: u32, column: u32) -> vec4<bool> {
  return (vec4<u32>(mask_word(seq, row, column / 32u) >> (column % 32u)) & vec4<u32>({% for step in quad_steps %}{{ ", " if not loop.first }}{{ 2 ** step }}u{% endfor %})) != vec4<u32>();
}
# if mask_words

// The first n bits.
fn first_bits(n: i32) -> u32 {
  return select(0u, 0xffffffffu >> u32(32 - clamp(n, 1, 32)), n > 0);
}

// The band of a row and the 32 columns from `column0` on, a bit for each visible column. Twin of `visible4`.
fn visible_bits(seq: Sequence, row: u32, column0: u32) -> u32 {
# if rows_are_keys
  let seq_q = i32(seq.seq_q);
  let start = clamp(i32(row) - seq.upper, 0, seq_q);
  let end = select(clamp(i32(row) + 1 - seq.lower, start, seq_q), seq_q, row < seq.sink_tokens);
  let bits = first_bits(end - i32(column0)) & ~first_bits(start - i32(column0));
  return {% if lengths %}select(0u, bits, row < seq.seq_k){% else %}bits{% endif %};
# else
  let end = clamp(i32(row) + 1 + seq.upper, 0, i32(seq.seq_k));
  let start = clamp(i32(row) + seq.lower, 0, end);
  let sinks = i32(min(seq.sink_tokens, u32(end)));
  let bits = (first_bits(end - i32(column0)) & ~first_bits(start - i32(column0))) | first_bits(sinks - i32(column0));
  return {% if lengths %}select(0u, bits, row < seq.seq_q){% else %}bits{% endif %};
# endif
}
# endif
