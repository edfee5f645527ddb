{#- What makes scores of products, and what hides single pairs: softcap, ALiBi, bias, boolean mask. Rows and columns are those of
    the kernel's tiles; positions count from the start of the sequence. Loads stay within the sequence, whatever lies beyond
    its end is hidden by the band. -#}
# if alibi

var<private> slope: f32;
# endif
# if bias

// Place of the bias of query 0 and key 0, in elements.
var<private> bias_base: u32;

fn bias_at(i: u32, j: u32) -> f32 {
  let at = bias_base + min(i, {{ sequence }}.seq_q - 1u) * params.bias.seq + min(j, {{ sequence }}.seq_k - 1u);
# if bias == "f32"
  return bias[at];
# else
  return widen2(bias[at / 2u] >> (at % 2u * 16u)).x;
# endif
}

fn bias4(row: u32, column: u32) -> vec4<f32> {
# if rows_are_keys
  return vec4<f32>({% for e in range(4) %}{{ ", " if e > 0 }}bias_at(column + {{ e }}u, row){% endfor %});
# else
  return vec4<f32>({% for e in range(4) %}{{ ", " if e > 0 }}bias_at(row, column + {{ e }}u){% endfor %});
# endif
}
# endif
# if mask

// Place of the mask's words of row 0: of queries, or, where rows are keys, of keys.
var<private> mask_base: u32;

const BLOCK_ROWS: u32 = {{ mask_block_rows }}u;
const BLOCK_KEYS: u32 = {{ mask_block_words * 32 }}u;

// A bit for each of 32 columns.
fn mask_word(row: u32, word: u32) -> u32 {
# if rows_are_keys
  let key = min(row, {{ sequence }}.seq_k - 1u);
  // One row for all queries.
  if (params.mask_rows == 1u) { return 0u - ((mask_bits[mask_base + key / 32u] >> (key % 32u)) & 1u); }
  return mask_bits[mask_base + key * params.mask_key_bits.seq + word];
# else
  return mask_bits[mask_base + min(row, {{ sequence }}.seq_q - 1u) * params.mask_bits.seq + word];
# endif
}

// What the mask shows of a row's four columns from `column` on, a multiple of four.
fn mask4(row: u32, column: u32) -> vec4<bool> {
  return (vec4<u32>(mask_word(row, column / 32u) >> (column % 32u)) & vec4<u32>(1u, 2u, 4u, 8u)) != vec4<u32>();
}
# if mask_words

// The first n bits.
fn first_bits(n: i32) -> u32 {
  return select(0u, 0xffffffffu >> u32(32 - clamp(n, 1, 32)), n > 0);
}

// A bit for each of 32 columns from `column0` on that the row sees by the band; twin of `visible4`.
fn visible_bits(row: u32, column0: u32) -> u32 {
# if rows_are_keys
  let seq_q = i32({{ sequence }}.seq_q);
  let start = clamp(i32(row) - {{ sequence }}.upper, 0, seq_q);
  let end = select(clamp(i32(row) + 1 - {{ sequence }}.lower, start, seq_q), seq_q, row < {{ sequence }}.sink_tokens);
  let bits = first_bits(end - i32(column0)) & ~first_bits(start - i32(column0));
  return {% if lengths %}select(0u, bits, row < sequence.seq_k){% else %}bits{% endif %};
# else
  let end = clamp(i32(row) + 1 + {{ sequence }}.upper, 0, i32({{ sequence }}.seq_k));
  let start = clamp(i32(row) + {{ sequence }}.lower, 0, end);
  let sinks = i32(min({{ sequence }}.sink_tokens, u32(end)));
  let bits = (first_bits(end - i32(column0)) & ~first_bits(start - i32(column0))) | first_bits(sinks - i32(column0));
  return {% if lengths %}select(0u, bits, row < sequence.seq_q){% else %}bits{% endif %};
# endif
}
# endif

// 1 where the mask shows something of a tile, 2 where it hides something, 3 where it does both; by whole blocks, so it may say
// 3 too often. `base` is the place of the classes of its sequence and head.
# if cooperative
# set row_block = "BLOCK_KEYS" if rows_are_keys else "BLOCK_ROWS"
# set column_block = "BLOCK_ROWS" if rows_are_keys else "BLOCK_KEYS"
// What the blocks 16 * group and following of columns hold of all rows of the tile, two bits each. All threads read the same, so
// that compilers see one way through the loop over tiles: what a subgroup finds together, NVIDIA's takes for different in its lanes.
struct Classes { word: u32, group: u32 }

fn load_classes({{ here_parameter }}base: u32, row0: u32, row_end: u32, group: u32) -> Classes {
  let first_row = row0 / {{ row_block }};
  let last_row = (min(row_end, {{ bounds }}.{{ "seq_k" if rows_are_keys else "seq_q" }}) - 1u) / {{ row_block }};
  var word = 0u;
# if rows_are_keys
  let last_column = ({{ bounds }}.seq_q - 1u) / {{ column_block }};
  for (var n = 0u; n < 16u; n += 1u) {
    let at = base + min(group * 16u + n, last_column) * params.mask_classes.seq;
# if mask_group * mask_block_words * 32 % tile_rows == 0
    let kinds = (mask_bits[at + first_row / 16u] >> (first_row % 16u * 2u)) & (0xffffffffu >> (30u - 2u * (last_row - first_row)));
    word |= (select(0u, 1u, (kinds & 0x55555555u) != 0u) | select(0u, 2u, (kinds & 0xaaaaaaaau) != 0u)) << (n * 2u);
# else
    for (var row = first_row; row <= last_row; row += 1u) {
      word |= ((mask_bits[at + row / 16u] >> (row % 16u * 2u)) & 3u) << (n * 2u);
    }
# endif
  }
# else
  for (var row = first_row; row <= last_row; row += 1u) { word |= mask_bits[base + row * params.mask_classes.seq + group]; }
# endif
  return Classes(word, group);
}

// Tiles first..end of columns, which follow each other, and their class: 1 or 3.
struct Span { first: u32, end: u32, kind: u32 }

// The first tiles from `from_tile` on of which the mask shows something, as far as one class and one group of blocks reaches.
fn visible_span({{ here_parameter }}classes: ptr<function, Classes>, base: u32, tiles: {{ "QueryTiles" if rows_are_keys else "KeyTiles" }}, row0: u32, row_end: u32, from_tile: u32) -> Span {
  var tile = from_tile;
  loop {
    if (tile >= tiles.end) { break; }
    let column0 = {{ "tile * TILE_COLUMNS" if rows_are_keys else "first_column(tiles, tile)" }};
    let block = column0 / {{ column_block }};
    if (block / 16u != (*classes).group) { *classes = load_classes({{ here_argument }}base, row0, row_end, block / 16u); }
    let place = block % 16u;
# if mask_words
    let word = (*classes).word;
    let kind = (word >> (place * 2u)) & 3u;
    // A bit for each block that is of another class; of blocks that show nothing, for each that does.
    let other = word ^ (kind * 0x55555555u);
    let differ = select(other | (other >> 1u), word, (kind & 1u) == 0u) & 0x55555555u;
    // As far as `fetch_mask` reads.
# set chunk = 2 if rows_are_keys else 1
# if mirrored
    // None gives the block before the first.
    var first_block = u32(i32(block - place) + (i32(firstLeadingBit(differ & ((1u << (place * 2u)) - 1u))) >> 1u) + 1);
    if (kind == 3u) { first_block = block; }
    var end = tiles.mirror - first_block * ({{ column_block }} / TILE_COLUMNS) + 1u;
# else
    // None gives the block after the last.
    var end_block = block - place + min(firstTrailingBit(differ & ~((1u << (place * 2u)) - 1u)) >> 1u, 16u);
    if (kind == 3u) { end_block = min(end_block, (block / {{ chunk }}u + 1u) * {{ chunk }}u); }
    var end = end_block * ({{ column_block }} / TILE_COLUMNS);
# endif
    end = min(end, {{ "tiles.end" if rows_are_keys else "select(tiles.end, tiles.sink_end, tile < tiles.sink_end)" }});
# else
    // Tiles across blocks, one by one: by whole blocks the class may be 3 too often.
    let last = min(column0 + TILE_COLUMNS, {{ bounds }}.{{ "seq_q" if rows_are_keys else "seq_k" }}) - 1u;
    var kind = ((*classes).word >> (place * 2u)) & 3u;
    for (var next = block + 1u; next <= last / {{ column_block }}; next += 1u) {
      if (next / 16u != (*classes).group) { *classes = load_classes({{ here_argument }}base, row0, row_end, next / 16u); }
      kind |= ((*classes).word >> (next % 16u * 2u)) & 3u;
    }
    let end = tile + 1u;
# endif
    if ((kind & 1u) != 0u) { return Span(tile, end, kind); }
    tile = {{ "end" if rows_are_keys else "next_tile(tiles, end - 1u)" }};
  }
  return Span(tile, tile, 1u);
}
# else
fn tile_class({{ here_parameter }}base: u32, query0: u32, query_end: u32, key0: u32, key_end: u32) -> u32 {
  let last_query = min(query_end, {{ bounds }}.seq_q) - 1u;
  let last_key = min(key_end, {{ bounds }}.seq_k) - 1u;
  var kind = 0u;
  for (var row = query0 / BLOCK_ROWS; row <= last_query / BLOCK_ROWS; row += 1u) {
    for (var block = key0 / BLOCK_KEYS; block <= last_key / BLOCK_KEYS; block += 1u) {
      kind |= (mask_bits[base + row * params.mask_classes.seq + block / 16u] >> (block % 16u * 2u)) & 3u;
    }
  }
  return kind;
}

// The first tile from `tile` on of which the mask shows something.
# if rows_are_keys
fn visible_tile({{ here_parameter }}base: u32, tiles: QueryTiles, key0: u32, key_end: u32, from_tile: u32) -> u32 {
  var tile = from_tile;
  while (tile < tiles.end && (tile_class({{ here_argument }}base, tile * TILE_COLUMNS, (tile + 1u) * TILE_COLUMNS, key0, key_end) & 1u) == 0u) {
    tile += 1u;
  }
  return tile;
}
# else
fn visible_tile({{ here_parameter }}base: u32, tiles: KeyTiles, query0: u32, query_end: u32, from_tile: u32) -> u32 {
  var tile = from_tile;
  while (tile < tiles.end && (tile_class({{ here_argument }}base, query0, query_end, tile * TILE_COLUMNS, (tile + 1u) * TILE_COLUMNS) & 1u) == 0u) {
    tile = next_tile(tiles, tile);
  }
  return tile;
}
# endif
# endif
# endif
# if hides and not cooperative

// Which of a row's four columns the band, the mask and the bias leave visible.
fn pair_visible4(row: u32, column: u32) -> vec4<bool> {
  return visible4(row, column){% if mask %} & mask4(row, column){% endif %}{% if bias %} & (bitcast<vec4<u32>>(bias4(row, column)) != vec4<u32>(0xff800000u)){% endif %};
}
# endif
# if bias and not cooperative and not softmax

// The factor of a query's probabilities: each of the n keys with the row's largest bias has 1 / n, of which
// exp(score - lse) makes 1 where the bias takes up the logarithm of n. Twin of Scores::shares.
fn share(query: u32, row_lse: f32) -> f32 {
  if (!(row_lse <= -1e9)) { return 1.0; }
  var count = 0.0;
# if rows_are_keys
  for (var key = 0u; key < {{ sequence }}.seq_k; key += 1u) {
    count += select(0.0, 1.0, pair_visible4(key, query).x && bias_at(query, key) == row_lse);
  }
# else
  for (var key = 0u; key < {{ sequence }}.seq_k; key += 4u) {
    count += dot(vec4<f32>(1.0), select(vec4<f32>(), vec4<f32>(1.0), pair_visible4(query, key) & (bias4(query, key) == vec4<f32>(row_lse))));
  }
# endif
  return 1.0 / max(count, 1.0);
}
# endif
# if bias and cooperative

// Adds a bias to scores in powers of two. Its lowest numbers, of which no more than that is kept, are not to be taken for
// -infinity; where a row has no others, `finish` reports it. By the bits: compilers make a maximum of a comparison, and lose NaN.
fn biased4(score: vec4<f32>, bias: vec4<f32>) -> vec4<f32> {
  let sum = fma(bias, vec4<f32>(LOG2_E), score);
  let hidden = vec4<u32>(0xff800000u);
  return select(sum, vec4<f32>(LOWEST), (bitcast<vec4<u32>>(sum) == hidden) & (bitcast<vec4<u32>>(bias) != hidden));
}
# endif
# if softcap and cooperative

# if bias
// -2^60 / (1 + e) of e times 2^-60. A hidden one shares nothing with another: a bias may hide any.
fn capped4(e: vec4<f32>) -> vec4<f32> {
  return -1.0 / (e + vec4<f32>(8.6736173798840355e-19));
}
# else
// -2^60 / (1 + e) of e times 2^-60: below is room for the product of two, which share a reciprocal. Where e is beyond 2^188 the other
// one, and the derivative, become NaN, and the row is computed again.
fn capped4(e: vec4<f32>) -> vec4<f32> {
  let sum = e + vec4<f32>(8.6736173798840355e-19);
  let inverse = -1.0 / (sum.xy * sum.zw);
  return vec4<f32>(inverse * sum.zw, inverse * sum.xy);
}
# endif

// 1 - tanh^2 = 4 e / (1 + e)^2, as exact at both ends.
fn cap_derivative4(capped: vec4<f32>, e: vec4<f32>) -> vec4<f32> {
  return (capped * e) * (capped * 3.4694469519536142e-18);
}
# endif
# if softcap and not cooperative

// tanh(x), within 2 ulp, and its derivative: drivers' own overflows for large numbers, and 1 - tanh^2 cancels. After Cephes
// (Moshier); twin of src/cpu/simd.rs.
struct Tanh { value: vec4<f32>, derivative: vec4<f32> }

fn tanh4(x: vec4<f32>) -> Tanh {
  let square = x * x;
  var p = fma(vec4<f32>(-5.70498872745e-3), square, vec4<f32>(2.06390887954e-2));
# for c in ["-5.37397155531e-2", "1.33314422036e-1", "-3.33332819422e-1"]
  p = fma(p, square, vec4<f32>({{ c }}));
# endfor
  let small = fma(p * square, x, x);
  let e = exp4(-2.0 * abs(x));
  let rest = 2.0 * e / (1.0 + e);
  let large = 1.0 - rest;
  // A NaN fails the comparison, and small is one, too.
  let is_large = abs(x) >= vec4<f32>(0.625);
  return Tanh(
    select(small, select(large, -large, x < vec4<f32>()), is_large),
    select(fma(-small, small, vec4<f32>(1.0)), rest * (2.0 - rest), is_large),
  );
}
# endif
# if modified and not cooperative

// The score of a product times the scale{{ ", capped" if softcap }}.
fn score4(capped: vec4<f32>, row: u32, column: u32) -> vec4<f32> {
  var score = capped;
# if alibi
  score = fma(-vec4<f32>(slope), distance4(row, column), score);
# endif
# if bias
  score += bias4(row, column);
# endif
  return score;
}
# endif
# if alibi

// |p - j|, exact below 2^24.
fn distance4(row: u32, column: u32) -> vec4<f32> {
  let columns = vec4<i32>(i32(column)) + vec4<i32>(0, 1, 2, 3);
# if rows_are_keys
  return vec4<f32>(abs(columns + vec4<i32>({{ sequence }}.offset - i32(row))));
# else
  return vec4<f32>(abs(vec4<i32>(i32(row) + {{ sequence }}.offset) - columns));
# endif
}
# endif

// What of the above depends on the sequence, its place along the batch axis, and the query head.
fn begin_pairs(number: u32, batch: u32, head: u32) {
# if alibi
  slope = {{ "alibi_slopes[params.slope_offset + head]" if "alibi_slopes" in names else "row_terms[operand_base(params.row_terms, batch, head) + params.slope_row].x" }};
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
