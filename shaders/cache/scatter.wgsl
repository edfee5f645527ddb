{#- Writes the gradients by gathered keys and values into the cache's layout. One workgroup writes one run of rows of one key head:

      for each vector of 16 bytes of the run, of keys and then of values:
        sum = 0
        for each term of the run:
          sum += the gathered vector of the term
        the cache's vector = sum

    A row of a shared block stands in several sequences, and its gradient is the sum over them. The terms have a fixed order and are summed
    in f32, so the gradient has the same bits each time. -#}
# include "params.wgsl"
# from "entry.wgsl" import main
# if is_half
# include dtype ~ ".wgsl"
# endif

const THREADS: u32 = {{ threads }}u;

{#- sum += the gathered vector of a term, n vectors behind the start of the term's first row. -#}
# macro add_term(cache, vectors)
      let x = gathered_{{ cache }}[(head * params.gathered_rows + tokens[term]) * {{ vectors }}u + n];
# if not is_half
      low_sum += bitcast<vec4<f32>>(x);
# else
      low_sum += vec4<f32>(widen2(x.x), widen2(x.y));
      high_sum += vec4<f32>(widen2(x.z), widen2(x.w));
# endif
# endmacro

{#- The sum in the element type. -#}
# macro narrow_sum()
# if not is_half
    let x = bitcast<vec4<u32>>(low_sum);
# else
    let low = narrow4(low_sum);
    let high = narrow4(high_sum);
    let x = vec4<u32>(low.xz | (low.yw << vec2<u32>(16u)), high.xz | (high.yw << vec2<u32>(16u)));
# endif
# endmacro

# call main()
  // Words of a run: its block, the first row in the block, how many rows, and the first and the end of its terms. A term is the first
  // gathered row that adds to the run.
  let run = index / params.kv_heads * 5u;
  let head = index % params.kv_heads;
  let destination = (tokens[run] * params.kv_heads + head) * params.block_rows + tokens[run + 1u];
  let rows = tokens[run + 2u];
  let first = tokens[run + 3u];
  let end = tokens[run + 4u];
# for name, cache in [("k", "keys"), ("v", "values")]
# set vectors = gathered_vectors[name]
  for (var n = thread; n < rows * {{ vectors }}u; n += THREADS) {
    var low_sum = vec4<f32>();
# if is_half
    // A vector has eight halves.
    var high_sum = vec4<f32>();
# endif
    for (var term = first; term < end; term++) {
{{ add_term(cache, vectors) }}
    }
{{ narrow_sum() }}
    {{ cache }}[destination * {{ vectors }}u + n] = x;
  }
# endfor
# endcall
