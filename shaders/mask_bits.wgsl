{#- Packs a boolean mask into bits, and classifies its blocks: 1 where a block shows something, 2 where it hides something, 3
    where it does both. What lies beyond the last key is neither. One workgroup a block. -#}
{% include "params.wgsl" %}

const BLOCK_ROWS: u32 = {{ mask_block_rows }}u;
const BLOCK_WORDS: u32 = {{ mask_block_words }}u;
var<workgroup> seen: atomic<u32>;

{% include "main.wgsl" %}
  let row_words = (params.mask_keys + 31u) / 32u;
  let blocks = (row_words + BLOCK_WORDS - 1u) / BLOCK_WORDS;
  let block = index % blocks;
  let block_row = params.region_tile + index / blocks % params.region_tiles;
  let place = index / blocks / params.region_tiles;
  let head = params.region_head + place % params.region_heads;
  let batch = params.region_batch + place / params.region_heads;

  if (thread == 0u) { atomicStore(&seen, 0u); }
  workgroupBarrier();
  let row = block_row * BLOCK_ROWS + thread / BLOCK_WORDS;
  let word = block * BLOCK_WORDS + thread % BLOCK_WORDS;
  if (row < params.mask_rows && word < row_words) {
    let keys = min(params.mask_keys - word * 32u, 32u);
    let base = operand_base(params.mask, batch, head) + row * params.mask.seq;
    let all = 0xffffffffu >> (32u - keys);
{% if packed %}
    let bits = mask[base + word] & all;
{% else %}
    var bits = 0u;
    for (var j = 0u; j < keys; j += 1u) {
      let at = base + word * 32u + j;
      bits |= select(0u, 1u << j, ((mask[at / 4u] >> (at % 4u * 8u)) & 0xffu) != 0u);
    }
{% endif %}
    mask_bits[operand_base(params.mask_bits, batch, head) + row * params.mask_bits.seq + word] = bits;
    atomicOr(&seen, select(0u, 1u, bits != 0u) | select(0u, 2u, bits != all));
  }
  workgroupBarrier();
  if (thread == 0u) {
    mask_bits[operand_base(params.mask_classes, batch, head) + block_row * params.mask_classes.seq + block] = atomicLoad(&seen);
  }
}
