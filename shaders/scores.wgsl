{#- What makes scores of products, and what hides single pairs: softcap, ALiBi, bias, boolean mask. Rows and columns are those of
    the kernel's tiles; positions count from the start of the sequence. Loads stay within the sequence, whatever lies beyond
    its end is hidden by the band. -#}
{% if alibi %}

var<private> slope: f32;
{% endif %}
{% if bias %}

// Place of the bias of query 0 and key 0, in elements.
var<private> bias_base: u32;

fn bias_at(i: u32, j: u32) -> f32 {
  let at = bias_base + min(i, {{ sequence }}.seq_q - 1u) * params.bias.seq + min(j, {{ sequence }}.seq_k - 1u);
{% if bias == "f32" %}
  return bias[at];
{% else %}
  return widen2(bias[at / 2u] >> (at % 2u * 16u)).x;
{% endif %}
}

fn bias4(row: u32, column: u32) -> vec4<f32> {
{% if rows_are_keys %}
  return vec4<f32>({% for e in range(4) %}{{ ", " if e > 0 }}bias_at(column + {{ e }}u, row){% endfor %});
{% else %}
  return vec4<f32>({% for e in range(4) %}{{ ", " if e > 0 }}bias_at(row, column + {{ e }}u){% endfor %});
{% endif %}
}
{% endif %}
{% if mask %}

// Place of the mask's words of query 0.
var<private> mask_base: u32;

const BLOCK_ROWS: u32 = {{ mask_block_rows }}u;
const BLOCK_KEYS: u32 = {{ mask_block_words * 32 }}u;

fn mask_word(i: u32, j: u32) -> u32 {
  return mask_bits[mask_base + min(i, {{ sequence }}.seq_q - 1u) * params.mask_bits.seq + j / 32u] >> (j % 32u);
}

fn mask4(row: u32, column: u32) -> vec4<bool> {
{% if rows_are_keys %}
  let words = vec4<u32>({% for e in range(4) %}{{ ", " if e > 0 }}mask_word(column + {{ e }}u, row){% endfor %});
  return (words & vec4<u32>(1u)) != vec4<u32>();
{% else %}
  return (vec4<u32>(mask_word(row, column)) & vec4<u32>(1u, 2u, 4u, 8u)) != vec4<u32>();
{% endif %}
}

// 1 where the mask shows something of a tile, 2 where it hides something, 3 where it does both; by whole blocks, so it may say
// 3 too often. `base` is the place of the classes of its sequence and head.
{% if cooperative %}
{% set row_block = "BLOCK_KEYS" if rows_are_keys else "BLOCK_ROWS" %}
{% set column_block = "BLOCK_ROWS" if rows_are_keys else "BLOCK_KEYS" %}
// What the blocks 16 * group and following of columns hold of all rows of the tile, two bits each; the lanes of a subgroup read
// them together.
struct Classes { word: u32, group: u32 }

fn load_classes({{ here_parameter }}lane: u32, base: u32, row0: u32, row_end: u32, group: u32) -> Classes {
  let last_row = (min(row_end, {{ bounds }}.{{ "seq_k" if rows_are_keys else "seq_q" }}) - 1u) / {{ row_block }};
  let last_column = ({{ bounds }}.{{ "seq_q" if rows_are_keys else "seq_k" }} - 1u) / {{ column_block }};
  var word = 0u;
  for (var item = lane; item < 16u * (last_row - row0 / {{ row_block }} + 1u); item += {{ lanes }}u) {
    let column = group * 16u + item % 16u;
    if (column <= last_column) {
      let row = row0 / {{ row_block }} + item / 16u;
      word |= mask_bits[base + {{ "column * params.mask_classes.seq + row" if rows_are_keys else "row * params.mask_classes.seq + column" }}] << (item % 16u * 2u);
    }
  }
  return Classes(subgroupOr(word), group);
}

// A tile of columns, and its class. By whole blocks it may say 3 too often.
struct SeenTile { tile: u32, kind: u32 }

// The first tile from `from_tile` on of which the mask shows something.
fn seen_tile({{ here_parameter }}lane: u32, classes: ptr<function, Classes>, base: u32, tiles: {{ "QueryTiles" if rows_are_keys else "KeyTiles" }}, row0: u32, row_end: u32, from_tile: u32) -> SeenTile {
  var tile = from_tile;
  var kind = 0u;
  loop {
    if (tile >= tiles.end || (kind & 1u) != 0u) { break; }
    let column0 = {{ "tile * TILE_COLUMNS" if rows_are_keys else "first_column(tiles, tile)" }};
{% if (mask_block_rows if rows_are_keys else 32 * mask_block_words) % tile_columns == 0 %}
    let block = column0 / {{ column_block }};
    if (block / 16u != (*classes).group) { *classes = load_classes({{ here_argument }}lane, base, row0, row_end, block / 16u); }
    kind = ((*classes).word >> (block % 16u * 2u)) & 3u;
{% else %}
    let last = min(column0 + TILE_COLUMNS, {{ bounds }}.{{ "seq_q" if rows_are_keys else "seq_k" }}) - 1u;
    kind = 0u;
    for (var block = column0 / {{ column_block }}; block <= last / {{ column_block }}; block += 1u) {
      if (block / 16u != (*classes).group) { *classes = load_classes({{ here_argument }}lane, base, row0, row_end, block / 16u); }
      kind |= ((*classes).word >> (block % 16u * 2u)) & 3u;
    }
{% endif %}
    if ((kind & 1u) == 0u) { tile = {{ "tile + 1u" if rows_are_keys else "next_tile(tiles, tile)" }}; }
  }
  return SeenTile(tile, kind);
}
{% else %}
fn tile_class({{ here_parameter }}base: u32, query0: u32, query_end: u32, key0: u32, key_end: u32) -> u32 {
  let last_query = min(query_end, {{ bounds }}.seq_q) - 1u;
  let last_key = min(key_end, {{ bounds }}.seq_k) - 1u;
  var kind = 0u;
  for (var row = query0 / BLOCK_ROWS; row <= last_query / BLOCK_ROWS; row += 1u) {
    for (var block = key0 / BLOCK_KEYS; block <= last_key / BLOCK_KEYS; block += 1u) {
      kind |= mask_bits[base + row * params.mask_classes.seq + block];
    }
  }
  return kind;
}

// The first tile from `tile` on of which the mask shows something.
{% if rows_are_keys %}
fn seen_tile({{ here_parameter }}base: u32, tiles: QueryTiles, key0: u32, key_end: u32, from_tile: u32) -> u32 {
  var tile = from_tile;
  while (tile < tiles.end && (tile_class({{ here_argument }}base, tile * TILE_COLUMNS, (tile + 1u) * TILE_COLUMNS, key0, key_end) & 1u) == 0u) {
    tile += 1u;
  }
  return tile;
}
{% else %}
fn seen_tile({{ here_parameter }}base: u32, tiles: KeyTiles, query0: u32, query_end: u32, from_tile: u32) -> u32 {
  var tile = from_tile;
  while (tile < tiles.end && (tile_class({{ here_argument }}base, query0, query_end, tile * TILE_COLUMNS, (tile + 1u) * TILE_COLUMNS) & 1u) == 0u) {
    tile = next_tile(tiles, tile);
  }
  return tile;
}
{% endif %}
{% endif %}
{% endif %}
{% if hides and not cooperative %}

// Which of a row's four columns the band, the mask and the bias leave visible.
fn sees4(row: u32, column: u32) -> vec4<bool> {
  return visible4(row, column){% if mask %} & mask4(row, column){% endif %}{% if bias %} & (bitcast<vec4<u32>>(bias4(row, column)) != vec4<u32>(0xff800000u)){% endif %};
}
{% endif %}
{% if bias and cooperative %}

// Adds a bias to scores in powers of two. Its lowest numbers, of which no more than that is kept, are not to be taken for
// -infinity; where a row has no others, `finish` reports it. By the bits: compilers make a maximum of a comparison, and lose NaN.
fn biased4(score: vec4<f32>, bias: vec4<f32>) -> vec4<f32> {
  let sum = fma(bias, vec4<f32>(LOG2_E), score);
  let hidden = vec4<u32>(0xff800000u);
  return select(sum, vec4<f32>(LOWEST), (bitcast<vec4<u32>>(sum) == hidden) & (bitcast<vec4<u32>>(bias) != hidden));
}
{% endif %}
{% if softcap and cooperative %}

// A size with the sign of another number.
fn sign4(size: vec4<f32>, x: vec4<f32>) -> vec4<f32> {
  return bitcast<vec4<f32>>(bitcast<vec4<u32>>(size) | (bitcast<vec4<u32>>(x) & vec4<u32>(0x80000000u)));
}
{% endif %}
{% if softcap and not cooperative %}

// tanh(x), within 2 ulp, and its derivative: drivers' own overflows for large numbers, and 1 - tanh^2 cancels. After Cephes
// (Moshier); twin of src/cpu/simd.rs.
struct Tanh { value: vec4<f32>, derivative: vec4<f32> }

fn tanh4(x: vec4<f32>) -> Tanh {
  let square = x * x;
  var p = fma(vec4<f32>(-5.70498872745e-3), square, vec4<f32>(2.06390887954e-2));
{% for c in ["-5.37397155531e-2", "1.33314422036e-1", "-3.33332819422e-1"] %}
  p = fma(p, square, vec4<f32>({{ c }}));
{% endfor %}
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
{% endif %}
{% if modified and not cooperative %}

// The score of a product times the scale{{ ", capped" if softcap }}.
fn score4(capped: vec4<f32>, row: u32, column: u32) -> vec4<f32> {
  var score = capped;
{% if alibi %}
  score = fma(-vec4<f32>(slope), distance4(row, column), score);
{% endif %}
{% if bias %}
  score += bias4(row, column);
{% endif %}
  return score;
}
{% endif %}
{% if alibi %}

// |p - j|, exact below 2^24.
fn distance4(row: u32, column: u32) -> vec4<f32> {
  let columns = vec4<i32>(i32(column)) + vec4<i32>(0, 1, 2, 3);
{% if rows_are_keys %}
  return vec4<f32>(abs(columns + vec4<i32>({{ sequence }}.offset - i32(row))));
{% else %}
  return vec4<f32>(abs(vec4<i32>(i32(row) + {{ sequence }}.offset) - columns));
{% endif %}
}
{% endif %}

// What of the above depends on the sequence, its place along the batch axis, and the query head.
fn begin_pairs(number: u32, batch: u32, head: u32) {
{% if alibi %}
  slope = {{ "alibi_slopes[params.slope_offset + head]" if kernel == "forward" or kernel == "exact_delta" else "row_terms[operand_base(params.row_terms, batch, head) + params.slope_row].x" }};
{% endif %}
{% if bias %}
  bias_base = operand_base(params.bias, number, head);
{% endif %}
{% if mask %}
  mask_base = operand_base(params.mask_bits, number, head);
{% endif %}
}
