{#- Packs a boolean mask into bits. One workgroup packs 32 rows by 16 blocks of 64 keys:

      for each step of words:
        a bit for each pair, by rows of queries
        the class of each block of 32 x 64: 1 shows pairs, 2 hides pairs, 3 both
        a bit for each pair, by rows of keys, for d_kv

    Pairs beyond the last key count as neither shown nor hidden. The classes of 16 blocks are one word. -#}
# include "params.wgsl"
# from "entry.wgsl" import main

const BLOCK_ROWS: u32 = {{ mask_block_rows }}u;
const BLOCK_WORDS: u32 = {{ mask_block_words }}u;
const GROUP_WORDS: u32 = {{ mask_group * mask_block_words }}u;
const STEP_WORDS: u32 = {{ mask_step_words }}u;
var<workgroup> classes: atomic<u32>;
var<workgroup> words: array<u32, {{ mask_block_rows * mask_step_words }}>;
# if not packed

// A bit for each byte.
fn nonzero_bytes(bytes: u32) -> u32 {
  let tops = ((((bytes & 0x7f7f7f7fu) + 0x7f7f7f7fu) | bytes) & 0x80808080u) >> 7u;
  // Each of the four bits meets the factor that moves it into the top four bits.
  return (tops * 0x10204080u) >> 28u;
}
# endif

# call main()
  let row_words = (params.mask_keys + 31u) / 32u;
  let place = decode_work(index);
  let group = place.cell;
  let block_row = place.tile;
  let head = place.head;
  let batch = place.batch;
  let row = block_row * BLOCK_ROWS + thread / STEP_WORDS;

  if (thread == 0u) { atomicStore(&classes, 0u); }
  for (var step = 0u; step < GROUP_WORDS; step += STEP_WORDS) {
    workgroupBarrier();
    let word = group * GROUP_WORDS + step + thread % STEP_WORDS;
    if (row < params.mask_rows && word < row_words) {
      let keys = min(params.mask_keys - word * 32u, 32u);
      let base = operand_base(params.mask, batch, head) + row * params.mask.seq;
      let all = 0xffffffffu >> (32u - keys);
# if packed
      let bits = mask[base + word] & all;
# else
      var bits = 0u;
      let first = base + word * 32u;
      if (keys == 32u && first % 4u == 0u) {
# for n in range(8)
        bits |= nonzero_bytes(mask[first / 4u + {{ n }}u]) << {{ 4 * n }}u;
# endfor
      } else {
        for (var j = 0u; j < keys; j += 1u) {
          let at = first + j;
          bits |= select(0u, 1u << j, ((mask[at / 4u] >> (at % 4u * 8u)) & 0xffu) != 0u);
        }
      }
# endif
      mask_bits[operand_base(params.mask_bits, batch, head) + row * params.mask_bits.seq + word] = bits;
      words[thread] = bits;
      let kind = select(0u, 1u, bits != 0u) | select(0u, 2u, bits != all);
      atomicOr(&classes, kind << ((step + thread % STEP_WORDS) / BLOCK_WORDS * 2u));
    }
    workgroupBarrier();
    // A row of keys has a bit for each query of the block.
    let key = (group * GROUP_WORDS + step) * 32u + thread;
    if (key < params.mask_keys && params.mask_rows > 1u) {
      var bits = 0u;
      for (var i = 0u; i < min(params.mask_rows - block_row * BLOCK_ROWS, BLOCK_ROWS); i += 1u) {
        bits |= ((words[i * STEP_WORDS + thread / 32u] >> (thread % 32u)) & 1u) << i;
      }
      mask_bits[operand_base(params.mask_key_bits, batch, head) + key * params.mask_key_bits.seq + block_row] = bits;
    }
  }
  workgroupBarrier();
  if (thread == 0u) {
    mask_bits[operand_base(params.mask_classes, batch, head) + block_row * params.mask_classes.seq + group] = atomicLoad(&classes);
  }
# endcall
