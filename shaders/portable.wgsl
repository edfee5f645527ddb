{#- The portable micro-kernel: f32 multiply-adds on register tiles, no subgroups, no f16.

    Thread (tx, ty) of THREADS_K x THREADS_Q holds rows ty + THREADS_Q * i of the query tile (i < rows)
    and, for each of them, key quads tx + THREADS_K * c of the key tile (c < quads) and value quads
    tx + THREADS_K * c of the output (c < value_quads). Everything is unrolled in the text: drivers do
    not unroll naga's loops, and indexed arrays fall out of registers.

    Tiles lie in workgroup memory as rows of vec4, one vec4 longer than needed so that neighbouring
    rows start in different banks. The four keys of quad tx are staged THREADS_K rows apart, so that
    neighbouring threads read neighbouring rows. -#}

{%- macro declare() %}
const THREADS_K: u32 = {{ threads_k }}u;
const THREADS_Q: u32 = {{ threads_q }}u;
const THREADS: u32 = {{ threads }}u;
const HEAD_QUADS: u32 = {{ head_quads }}u;
const VALUE_QUADS: u32 = {{ value_quads_all }}u;
// Head quads staged at once, and the length of a staged row.
const CHUNK: u32 = {{ chunk }}u;
const K_ROW: u32 = {{ chunk + 1 }}u;
const Q_ROW: u32 = {{ head_quads + 1 if q_resident else chunk + 1 }}u;
const V_ROW: u32 = {{ v_row }}u;
const P_ROW: u32 = {{ tile_k // 4 + 1 }}u;
{% if q_resident %}
var<workgroup> q_tile: array<vec4<f32>, {{ q_tile_len }}>;
{% endif %}
// Chunks of q (unless it stays resident) and k, then of v.
var<workgroup> stage: array<vec4<f32>, {{ stage_len }}>;
{% if v_apart %}
var<workgroup> v_stage: array<vec4<f32>, {{ v_stage_len }}>;
{% endif %}
var<workgroup> probs: array<vec4<f32>, {{ probs_len }}>;
// One partial result per row and tx.
var<workgroup> partials: array<vec4<f32>, {{ tile_q * threads_k // 4 }}>;
// 1 + the last masked tile in which some value was NaN or infinite.
var<workgroup> poisoned: atomic<u32>;

// The logical key of a staged row.
fn staged_key(row: u32) -> u32 {
  let within = row % (4u * THREADS_K);
  return row - within + (within % THREADS_K) * 4u + within / THREADS_K;
}

fn is_finite4(x: vec4<f32>) -> bool {
  return all(abs(x) <= vec4<f32>(-LOWEST));
}
{% endmacro -%}

{%- macro begin() %}
  let tx = thread % THREADS_K;
  let ty = thread / THREADS_K;
  if (thread == 0u) { atomicStore(&poisoned, 0u); }
{% for i in range(rows) %}
  let row_{{ i }} = row0 + ty + {{ i }}u * THREADS_Q;
  var max_{{ i }} = LOWEST;
  var sum_{{ i }} = 0.0;
{% for c in range(value_quads) %}
  var o_{{ i }}_{{ c }} = vec4<f32>();
{% endfor %}
{% endfor %}
{% if q_resident %}
{{ stage_rows("q_tile", "0u", "Q_ROW", "q", tile_q, head_quads, "0u", "row0 + row", "params.seq_q") }}
{% endif %}
{% endmacro -%}

{#- Copies `count` rows of `quads` vec4 from an operand into workgroup memory, zeros beyond its end. -#}
{%- macro stage_rows(target, offset, stride, name, count, quads, quad0, source, seq) %}
{% set total = count * quads %}
{% for step in range((total + threads - 1) // threads) %}
  {
    let at = thread + {{ step * threads }}u;
{% if (step + 1) * threads > total %}
    if (at < {{ total }}u) {
{% else %}
    {
{% endif %}
      let row = at / {{ quads }}u;
      let quad = {{ quad0 }} + at % {{ quads }}u;
      let source = {{ source }};
      var x = vec4<f32>();
      if (source < {{ seq }}{{ " && quad < HEAD_QUADS" if name in ["q", "k"] and head_quads % quads else "" }}) {
        x = load_{{ name }}({{ name }}_base + source * params.{{ name }}.seq, quad);
{% if name == "q" %}
        x *= params.scale_log2;
{% elif name == "v" %}
        if (masked && !is_finite4(x)) { atomicStore(&poisoned, tile + 1u); }
{% endif %}
      }
      {{ target }}[{{ offset }} + row * {{ stride }} + at % {{ quads }}u] = x;
    }
  }
{% endfor %}
{% endmacro -%}

{%- macro stage_v(first) %}
{{ stage_rows("v_stage" if v_apart else "stage", "0u", "V_ROW", "v", v_chunk, value_quads_all, "0u", "key0 + " ~ first ~ " + row", "params.seq_k") }}
{% endmacro -%}

{%- macro scores() %}
{% for i in range(rows) %}{% for c in range(quads) %}
    var s_{{ i }}_{{ c }} = vec4<f32>();
{% endfor %}{% endfor %}
    for (var quad0 = 0u; quad0 < HEAD_QUADS; quad0 += CHUNK) {
      workgroupBarrier();
{% if v_apart %}
      if (quad0 == 0u) {
{{ stage_v("0u") }}
      }
{% endif %}
{% if not q_resident %}
{{ stage_rows("stage", (tile_k * (chunk + 1)) ~ "u", "Q_ROW", "q", tile_q, chunk, "quad0", "row0 + row", "params.seq_q") }}
{% endif %}
{{ stage_rows("stage", "0u", "K_ROW", "k", tile_k, chunk, "quad0", "key0 + staged_key(row)", "params.seq_k") }}
      workgroupBarrier();
      for (var quad = 0u; quad < CHUNK; quad += {{ unroll }}u) {
{% for u in range(unroll) %}
        {
{% for i in range(rows) %}
{% if q_resident %}
          let q_{{ i }} = q_tile[(ty + {{ i }}u * THREADS_Q) * Q_ROW + quad0 + quad + {{ u }}u];
{% else %}
          let q_{{ i }} = stage[{{ tile_k * (chunk + 1) }}u + (ty + {{ i }}u * THREADS_Q) * Q_ROW + quad + {{ u }}u];
{% endif %}
{% endfor %}
{% for c in range(quads) %}
          {
{% for e in range(4) %}
            let k_{{ e }} = stage[(tx + {{ c * 4 + e }}u * THREADS_K) * K_ROW + quad + {{ u }}u];
{% endfor %}
{% for e in xyzw %}
            let k_{{ e }} = vec4<f32>(k_0.{{ e }}, k_1.{{ e }}, k_2.{{ e }}, k_3.{{ e }});
{% endfor %}
{% for i in range(rows) %}{% for e in xyzw %}
            s_{{ i }}_{{ c }} = fma(vec4<f32>(q_{{ i }}.{{ e }}), k_{{ e }}, s_{{ i }}_{{ c }});
{% endfor %}{% endfor %}
          }
{% endfor %}
        }
{% endfor %}
      }
    }
{% endmacro -%}

{#- Masks, updates the running maximum and sum of each row, and leaves probabilities in `probs`. -#}
{%- macro probabilities() %}
    if (masked) {
{% for i in range(rows) %}{% for c in range(quads) %}
      s_{{ i }}_{{ c }} = select(vec4<f32>(LOWEST), s_{{ i }}_{{ c }}, visible4(row_{{ i }}, key0 + 4u * (tx + {{ c }}u * THREADS_K)));
{% endfor %}{% endfor %}
    }
{% for i in range(rows) %}
    {
      var most = s_{{ i }}_0;
{% for c in range(1, quads) %}
      most = max(most, s_{{ i }}_{{ c }});
{% endfor %}
      let at = (ty + {{ i }}u * THREADS_Q) * THREADS_K + tx;
      partials[at / 4u][at % 4u] = max(max(most.x, most.y), max(most.z, most.w));
    }
{% endfor %}
    workgroupBarrier();
{% for i in range(rows) %}
    {
      var most = partials[(ty + {{ i }}u * THREADS_Q) * (THREADS_K / 4u)];
{% for t in range(1, threads_k // 4) %}
      most = max(most, partials[(ty + {{ i }}u * THREADS_Q) * (THREADS_K / 4u) + {{ t }}u]);
{% endfor %}
      let before = max_{{ i }};
      max_{{ i }} = max(before, max(max(most.x, most.y), max(most.z, most.w)));
      // A row that has seen nothing yet must give exp2(LOWEST - 0) = 0, not exp2(0).
      let shift = select(max_{{ i }}, 0.0, max_{{ i }} == LOWEST);
      let rescale = exp2(before - max_{{ i }});
{% for c in range(value_quads) %}
      o_{{ i }}_{{ c }} *= rescale;
{% endfor %}
      var total = vec4<f32>();
{% for c in range(quads) %}
      let p_{{ c }} = exp2(s_{{ i }}_{{ c }} - shift);
      total += p_{{ c }};
      probs[(ty + {{ i }}u * THREADS_Q) * P_ROW + tx + {{ c }}u * THREADS_K] = p_{{ c }};
{% endfor %}
      sum_{{ i }} = fma(sum_{{ i }}, rescale, (total.x + total.y) + (total.z + total.w));
    }
{% endfor %}
{% endmacro -%}

{%- macro accumulate() %}
{% set v = "v_stage" if v_apart else "stage" %}
    for (var first = 0u; first < TILE_K; first += {{ v_chunk }}u) {
{% if v_apart and v_chunk == tile_k %}
      workgroupBarrier();
{% else %}
      if (first != 0u) { workgroupBarrier(); }
{% if v_apart %}
      if (first != 0u) {
{{ stage_v("first") }}
      }
{% else %}
{{ stage_v("first") }}
{% endif %}
      workgroupBarrier();
{% endif %}
      if (masked && atomicLoad(&poisoned) == tile + 1u) {
        // A hidden value that is NaN or infinite must not meet its zero probability.
        for (var j = 0u; j < {{ v_chunk }}u; j += 1u) {
          let key = key0 + first + j;
{% for i in range(rows) %}
          if (visible4(row_{{ i }}, key).x) {
            let p = probs[(ty + {{ i }}u * THREADS_Q) * P_ROW + (first + j) / 4u][(first + j) % 4u];
{% for c in range(value_quads) %}
            o_{{ i }}_{{ c }} = fma(vec4<f32>(p), {{ v }}[j * V_ROW + tx + {{ c }}u * THREADS_K], o_{{ i }}_{{ c }});
{% endfor %}
          }
{% endfor %}
        }
      } else {
        for (var quad = 0u; quad < {{ v_chunk // 4 }}u; quad += 1u) {
{% for i in range(rows) %}
          let p_{{ i }} = probs[(ty + {{ i }}u * THREADS_Q) * P_ROW + first / 4u + quad];
{% endfor %}
{% for e in range(4) %}
          {
            let at = (quad * 4u + {{ e }}u) * V_ROW + tx;
{% for c in range(value_quads) %}
            let v_{{ c }} = {{ v }}[at + {{ c }}u * THREADS_K];
{% endfor %}
{% for i in range(rows) %}{% for c in range(value_quads) %}
            o_{{ i }}_{{ c }} = fma(vec4<f32>(p_{{ i }}.{{ xyzw[e] }}), v_{{ c }}, o_{{ i }}_{{ c }});
{% endfor %}{% endfor %}
          }
{% endfor %}
        }
      }
    }
{% endmacro -%}

{#- Sums the rows' partial denominators, adds the sink logit once, and writes o and lse. -#}
{%- macro finish() %}
  workgroupBarrier();
{% for i in range(rows) %}
  {
    let at = (ty + {{ i }}u * THREADS_Q) * THREADS_K + tx;
    partials[at / 4u][at % 4u] = sum_{{ i }};
  }
{% endfor %}
  workgroupBarrier();
{% for i in range(rows) %}
  if (row_{{ i }} < params.seq_q) {
    var total = partials[(ty + {{ i }}u * THREADS_Q) * (THREADS_K / 4u)];
{% for t in range(1, threads_k // 4) %}
    total += partials[(ty + {{ i }}u * THREADS_Q) * (THREADS_K / 4u) + {{ t }}u];
{% endfor %}
    let end = finish_row(max_{{ i }}, (total.x + total.y) + (total.z + total.w), head);
    if (tx == 0u) {
      lse[params.lse_offset + (batch * params.heads + head) * params.seq_q + row_{{ i }}] = end.lse;
    }
    let o_base = operand_base(params.o, batch, head) + row_{{ i }} * params.o.seq;
{% for c in range(value_quads) %}
    if (tx + {{ c }}u * THREADS_K < VALUE_QUADS) { store_o(o_base, tx + {{ c }}u * THREADS_K, o_{{ i }}_{{ c }} * end.factor); }
{% endfor %}
  }
{% endfor %}
{% endmacro -%}
