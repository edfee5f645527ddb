{#- The portable micro-kernel: f32 multiply-adds on register tiles, without subgroups and without f16.

    A kernel keeps a tile of rows (queries, or keys in d_kv) and walks over tiles of columns (keys, or queries). Two kinds of matrix
    product occur:

      product(s, a, b)        s[row, column] = sum over features of a[row] * b[column]
      accumulate(x, b)        x[row] += sum over columns of P[row, column] * b[column]

    Thread (tx, ty) of THREADS_C x THREADS_R holds the rows ty + THREADS_R * i, i < rows. Of each it holds the column quads
    tx + THREADS_C * c of a score tile, c < quads, and the feature quads tx + THREADS_C * c of an accumulator. All is unrolled in the text:
    drivers do not unroll naga's loops, and indexed arrays fall out of registers.

    Tiles lie in workgroup memory as rows of vec4. A row is one vec4 longer than its data, so neighbouring rows start in different banks.
    The four columns of quad tx are staged THREADS_C rows apart, so neighbouring threads read neighbouring rows.

    Needs: `main` of tile_main.wgsl, operands.wgsl, mask.wgsl; with options scores.wgsl.
    Declares: the macros below; `memory` for the tiles, `partials` for sums along rows. -#}

# macro declare()
const THREADS_C: u32 = {{ threads_c }}u;
const THREADS_R: u32 = {{ threads_r }}u;
const THREADS: u32 = {{ threads }}u;
// Feature quads staged at once for a product, and columns staged at once for an accumulation.
const K_STEP: u32 = {{ k_step }}u;
const N_STEP: u32 = {{ n_step }}u;
const K_STEP_ROW: u32 = {{ k_step + 1 }}u;
const P_ROW: u32 = {{ tile_columns // 4 + 1 }}u;
// A product stages columns, then rows. An accumulation has the P tile, then a step of columns.
const ROW_STAGE: u32 = {{ tile_columns * (k_step + 1) }}u;
const N_STAGE: u32 = {{ tile_rows * (tile_columns // 4 + 1) }}u;
var<workgroup> memory: array<vec4<f32>, {{ memory_len }}>;
# if partials_len > 0
// One number for each row and tx. Scalars, because threads that write components of one vector may race.
var<workgroup> partials: array<f32, {{ partials_len }}>;
# endif
// 1 + the last step of a partial tile in which a staged column was NaN or infinite.
var<workgroup> nonfinite_step: atomic<u32>;

// The column of a tile that lies in a staged row.
fn staged_column(row: u32) -> u32 {
  let within = row % (4u * THREADS_C);
  return row - within + (within % THREADS_C) * 4u + within / THREADS_C;
}

// Bits are compared: compilers may assume that a float comparison meets no NaN.
fn is_finite4(x: vec4<f32>) -> bool {
  return all((bitcast<vec4<u32>>(x) & vec4<u32>(0x7f800000u)) < vec4<u32>(0x7f800000u));
}
# endmacro

{#- Where a thread's i-th row of the P tile lies in `memory`. -#}
{%- macro p_row(i) %}(ty + {{ i }}u * THREADS_R) * P_ROW{% endmacro -%}

{#- The thread's place in the grid of threads. -#}
# macro begin_threads()
  // Eight neighbours form a block of four by two threads, which share rows of both sides.
  let block = thread / 8u;
  let tx = thread % 4u + 4u * (block % (THREADS_C / 4u));
  let ty = thread / 4u % 2u + 2u * (block / (THREADS_C / 4u));
  var step = 0u;
  if (thread == 0u) { atomicStore(&nonfinite_step, 0u); }
# endmacro

# macro begin()
{{ begin_threads() }}
# for i in range(rows)
  let row_{{ i }} = row0 + ty + {{ i }}u * THREADS_R;
# endfor
# endmacro

{#- The first column of a thread's c-th quad. -#}
{%- macro quad_column(c) %}column0 + 4u * (tx + {{ c }}u * THREADS_C){% endmacro -%}

{#- The columns of a thread's c-th quad that its i-th row sees. -#}
{%- macro visible(i, c) %}{% if hides %}visible_{{ i }}_{{ c }}{% else %}visible4(seq, row_{{ i }}, {{ quad_column(c) }}){% endif %}{% endmacro -%}

{#- Turns products into scores with softcap, ALiBi and bias, and finds the pairs that mask and bias leave visible. Without options the
    scale is applied in the exponential, and the band hides pairs. -#}
# macro make_scores(s)
# for i, c in pairs(rows, quads)
# if softcap
    let capped_{{ i }}_{{ c }} = tanh4({{ s }}_{{ i }}_{{ c }} * params.scale / params.softcap);
    {{ s }}_{{ i }}_{{ c }} = capped_{{ i }}_{{ c }}.value * params.softcap;
# elif modified
    {{ s }}_{{ i }}_{{ c }} *= params.scale;
# endif
# if alibi or bias
    {{ s }}_{{ i }}_{{ c }} = score4(seq, {{ s }}_{{ i }}_{{ c }}, row_{{ i }}, {{ quad_column(c) }});
# endif
# if hides
    var visible_{{ i }}_{{ c }} = vec4<bool>(true);
    if (is_partial) { visible_{{ i }}_{{ c }} = pair_visible4(seq, row_{{ i }}, {{ quad_column(c) }}); }
# endif
# endfor
# endmacro

{#- Turns gradients by scores into gradients by products times the scale. A 0 stays 0: the derivative of a hidden pair may be NaN. -#}
# macro uncap(d_s)
# if softcap
# for i, c in pairs(rows, quads)
    {{ d_s }}_{{ i }}_{{ c }} = select({{ d_s }}_{{ i }}_{{ c }} * capped_{{ i }}_{{ c }}.derivative, vec4<f32>(), {{ d_s }}_{{ i }}_{{ c }} == vec4<f32>());
# endfor
# endif
# endmacro

{#- Sets hidden pairs to 0, whatever was computed for them. -#}
# macro mask(s)
    if (is_partial) {
# for i, c in pairs(rows, quads)
      {{ s }}_{{ i }}_{{ c }} = select(vec4<f32>(), {{ s }}_{{ i }}_{{ c }}, {{ visible(i, c) }});
# endfor
    }
# endmacro

{#- A zero accumulator as wide as an operand. -#}
# macro accumulator(x, operand)
# for i, c in pairs(rows, accumulator_quads[operand])
  var {{ x }}_{{ i }}_{{ c }} = vec4<f32>();
# endfor
# endmacro

{#- Reads a thread's share of `count` rows of `quads` vec4 of an operand into registers, with zeros beyond its end. Reads are under way
    while the threads wait for each other. `put` stores them in workgroup memory. -#}
# macro fetch(share, operand, count, quads, quad0, row, limit, flags_nonfinite)
# set total = count * quads
# for pass in range((total + threads - 1) // threads)
  var {{ share }}_{{ pass }} = vec4<f32>();
  {
    let item = thread + {{ pass * threads }}u;
    let staged = item / {{ quads }}u;
    let quad = {{ quad0 }} + item % {{ quads }}u;
    let source = {{ row }};
    if (source < {{ limit }}{% if (pass + 1) * threads > total %} && item < {{ total }}u{% endif %}{% if operand_quads[operand] % quads != 0 %} && quad < {{ operand_quads[operand] }}u{% endif %}) {
      {{ share }}_{{ pass }} = load_{{ operand }}({{ operand }}_base + source * params.{{ operand }}.seq, quad);
# if flags_nonfinite
      if (is_partial && !is_finite4({{ share }}_{{ pass }})) { atomicStore(&nonfinite_step, step + 1u); }
# endif
    }
  }
# endfor
# endmacro

# macro put(share, at, stride, count, quads)
# set total = count * quads
# for pass in range((total + threads - 1) // threads)
  {
    let item = thread + {{ pass * threads }}u;
    {% if (pass + 1) * threads > total %}if (item < {{ total }}u) {% endif %}{ memory[{{ at }} + item / {{ quads }}u * {{ stride }} + item % {{ quads }}u] = {{ share }}_{{ pass }}; }
  }
# endfor
# endmacro

{#- s[row, column] = a[row] . b[column], as a sum of sums of four features: the shorter chain halves the rounding error of large scores.
    All kernels come to the same bits, whichever operand is q. Otherwise lse and o would belong to other scores than those of the
    backward pass. -#}
# macro product(s, a, b)
# for i, c in pairs(rows, quads)
    var {{ s }}_{{ i }}_{{ c }} = vec4<f32>();
# endfor
    // Loop: k_steps
    for (var quad0 = 0u; quad0 < {{ operand_quads[a] }}u; quad0 += K_STEP) {
{{ fetch("column_share", b, tile_columns, k_step, "quad0", "column0 + staged_column(staged)", "column_limit", false) }}
{{ fetch("row_share", a, tile_rows, k_step, "quad0", "row0 + staged", "row_limit", false) }}
      workgroupBarrier();
{{ put("column_share", "0u", "K_STEP_ROW", tile_columns, k_step) }}
{{ put("row_share", "ROW_STAGE", "K_STEP_ROW", tile_rows, k_step) }}
      workgroupBarrier();
      // Loop: inner
      for (var quad = 0u; quad < K_STEP; quad += {{ unroll }}u) {
# for u in range(unroll)
        {
# for i in range(rows)
          let a_{{ i }} = memory[ROW_STAGE + (ty + {{ i }}u * THREADS_R) * K_STEP_ROW + quad + {{ u }}u];
# endfor
# for c in range(quads)
          {
# for e in range(4)
            let b_{{ e }} = memory[(tx + {{ c * 4 + e }}u * THREADS_C) * K_STEP_ROW + quad + {{ u }}u];
# endfor
# for e in xyzw
            let b_{{ e }} = vec4<f32>(b_0.{{ e }}, b_1.{{ e }}, b_2.{{ e }}, b_3.{{ e }});
# endfor
# for i in range(rows)
            {{ s }}_{{ i }}_{{ c }} += fma(vec4<f32>(a_{{ i }}.w), b_w, fma(vec4<f32>(a_{{ i }}.z), b_z, fma(vec4<f32>(a_{{ i }}.y), b_y, a_{{ i }}.x * b_x)));
# endfor
          }
# endfor
        }
# endfor
      }
    }
# endmacro

{#- Stores a tile of P, or of dS, as the P tile for `accumulate`. The caller has passed a barrier since the last product or accumulation
    read that memory. -#}
# macro store_p(s)
# for i, c in pairs(rows, quads)
    memory[{{ p_row(i) }} + tx + {{ c }}u * THREADS_C] = {{ s }}_{{ i }}_{{ c }};
# endfor
# endmacro

{#- x[row] += sum over columns of P[row, column] * b[column]. -#}
# macro accumulate(x, b)
# set x_quads = accumulator_quads[b]
# set n_step_row = x_quads * threads_c
    // Loop: n_steps
    for (var first = 0u; first < {{ tile_columns }}u; first += N_STEP) {
{{ fetch("share", b, n_step, operand_quads[b], "0u", "column0 + first + staged", "column_limit", true) }}
# if n_step < tile_columns
      if (first != 0u) { workgroupBarrier(); }
# endif
{{ put("share", "N_STAGE", n_step_row ~ "u", n_step, operand_quads[b]) }}
      workgroupBarrier();
      if (is_partial && atomicLoad(&nonfinite_step) == step + 1u) {
        // A hidden column may be NaN or infinite, and 0 times it is NaN: hidden pairs are skipped.
        for (var j = 0u; j < N_STEP; j += 1u) {
          let column = column0 + first + j;
# for i in range(rows)
          if ({{ "pair_visible4" if hides else "visible4" }}(seq, row_{{ i }}, column).x) {
            let p = memory[{{ p_row(i) }} + (first + j) / 4u][(first + j) % 4u];
# for c in range(x_quads)
            {{ x }}_{{ i }}_{{ c }} = fma(vec4<f32>(p), memory[N_STAGE + j * {{ n_step_row }}u + tx + {{ c }}u * THREADS_C], {{ x }}_{{ i }}_{{ c }});
# endfor
          }
# endfor
        }
      } else {
        // Loop: inner
        for (var quad = 0u; quad < N_STEP / 4u; quad += 1u) {
# for i in range(rows)
          let p_{{ i }} = memory[{{ p_row(i) }} + first / 4u + quad];
# endfor
# for e in range(4)
          {
            let at = N_STAGE + (quad * 4u + {{ e }}u) * {{ n_step_row }}u + tx;
# for c in range(x_quads)
            let b_{{ c }} = memory[at + {{ c }}u * THREADS_C];
# endfor
# for i, c in pairs(rows, x_quads)
            {{ x }}_{{ i }}_{{ c }} = fma(vec4<f32>(p_{{ i }}.{{ xyzw[e] }}), b_{{ c }}, {{ x }}_{{ i }}_{{ c }});
# endfor
          }
# endfor
        }
      }
    }
    step += 1u;
# endmacro

{#- Combines a number of each thread of a row, by "max" or "sum", in a fixed order. A barrier has to stand between two uses. -#}
# macro reduce_rows(result, value, op)
# for i in range(rows)
    partials[(ty + {{ i }}u * THREADS_R) * THREADS_C + tx] = {{ value }}_{{ i }};
# endfor
    workgroupBarrier();
# for i in range(rows)
    var {{ result }}_{{ i }} = 0.0;
    {
      let at = (ty + {{ i }}u * THREADS_R) * THREADS_C;
      var x = partials[at];
# for t in range(1, threads_c)
# if op == "max"
      x = max(x, partials[at + {{ t }}u]);
# else
      x += partials[at + {{ t }}u];
# endif
# endfor
      {{ result }}_{{ i }} = x;
    }
# endfor
# endmacro

{#- Whether a thread writes its i-th row. After a cooperative kernel only the rows that it has reported are written. -#}
{%- macro writes(i) %}row_{{ i }} < row_limit{% if fallback_tile %} && is_fallback_row(seq, work, row_{{ i }}){% endif %}{% endmacro -%}

{#- Writes an accumulator times `factor`. A factor that ends with "_" is the stem of a name, which each row completes with its number. -#}
# macro store(x, operand, factor)
# for i in range(rows)
  if ({{ writes(i) }}) {
    let base = {{ operand }}_base + row_{{ i }} * params.{{ operand }}.seq;
# for c in range(accumulator_quads[operand])
    if (tx + {{ c }}u * THREADS_C < {{ operand_quads[operand] }}u) {
      store_{{ operand }}(base, tx + {{ c }}u * THREADS_C, {{ x }}_{{ i }}_{{ c }} * {{ factor ~ i if factor is endingwith("_") else factor }});
    }
# endfor
  }
# endfor
# endmacro
