{#- Copies rows of chosen sequences out of the cache, one after the other, to where the ordinary passes read them. One workgroup copies one
    run of rows of one key head:

      for each vector of 16 bytes of the run, of keys and then of values:
        x = the cache's vector                           quantised: from its bytes and scale, in the element type
        gathered = x

    A run lies within one block of the cache, so its rows follow one another on both sides. -#}
# include "params.wgsl"
# from "entry.wgsl" import main
# if quantised
# if is_half
# include dtype ~ ".wgsl"

# endif
# include "cache/scales.wgsl"
# for name, cache in [("k", "keys"), ("v", "values")]

// Four numbers of a row that begins at a word.
fn quad_{{ name }}(row: u32, quad: u32) -> vec4<f32> {
  // Two scales in a word, one for eight quads.
  let scales = {{ cache }}[row + {{ data_quads[name] }}u + quad / 16u];
  let scale = widen_scale(select(scales & 0xffffu, scales >> 16u, (quad & 8u) != 0u));
  return quad_of_bytes({{ cache }}[row + quad]) * scale;
}
# endfor
# endif

const THREADS: u32 = {{ threads }}u;

{#- A vector of 16 bytes of a quantised row, in the element type. -#}
# macro dequantise(name, vectors)
    let row = (source + n / {{ vectors }}u) * {{ row_vectors[name] * 4 }}u;
    let vector = n % {{ vectors }}u;
# if not is_half
    let x = bitcast<vec4<u32>>(quad_{{ name }}(row, vector));
# else
    let low = narrow4(quad_{{ name }}(row, 2u * vector));
    let high = narrow4(quad_{{ name }}(row, 2u * vector + 1u));
    let x = vec4<u32>(low.xz | (low.yw << vec2<u32>(16u)), high.xz | (high.yw << vec2<u32>(16u)));
# endif
# endmacro

# call main()
  // Words of a run: its block (in a paged cache the index of the block's number in the table), the first row in the block, the first
  // gathered row, and how many rows.
  let run = index / params.kv_heads * 4u;
  let head = index % params.kv_heads;
  let block = {{ "state[tokens[run]]" if paged else "tokens[run]" }};
  let source = (block * params.kv_heads + head) * params.block_rows + tokens[run + 1u];
  let destination = head * params.gathered_rows + tokens[run + 2u];
  let rows = tokens[run + 3u];
# for name, cache in [("k", "keys"), ("v", "values")]
# set vectors = gathered_vectors[name]
  for (var n = thread; n < rows * {{ vectors }}u; n += THREADS) {
# if quantised
{{ dequantise(name, vectors) }}
# else
    let x = {{ cache }}[source * {{ vectors }}u + n];
# endif
    gathered_{{ cache }}[destination * {{ vectors }}u + n] = x;
  }
# endfor
# endcall
