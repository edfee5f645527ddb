//! The CPU path: `cargo bench --bench cpu`.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use rand::rngs::StdRng;
use rand::{Rng, RngExt, SeedableRng};
use sink_attention::{Inputs, Layout, Options, Problem, Shape, SinkLogits, Upstream, Window, cpu};

fn forward_and_backward(c: &mut Criterion) {
    let shape = |heads, kv_heads, seq_q, seq_k, width| Shape {
        batch: 1,
        heads,
        kv_heads,
        seq_q,
        seq_k,
        head_dim: width,
        value_dim: width,
    };
    let bhsd = Options::new().layout(Layout::Bhsd);
    let mut group = c.benchmark_group("cpu");
    for (name, shape, options) in [
        ("causal", shape(8, 8, 2048, 2048, 64), bhsd.causal(true)),
        ("causal bshd", shape(8, 8, 2048, 2048, 64), bhsd.causal(true).layout(Layout::Bshd)),
        ("full", shape(8, 8, 2048, 2048, 64), bhsd),
        ("wide causal", shape(8, 8, 2048, 2048, 128), bhsd.causal(true)),
        (
            "window 128, sinks",
            shape(64, 8, 2048, 2048, 64),
            bhsd.window(Window::keys(128)).sink_logits(SinkLogits::OffByOne),
        ),
        ("decode", shape(32, 8, 1, 8192, 128), bhsd.causal(true)),
        ("decode, no groups", shape(8, 8, 1, 8192, 128), bhsd.causal(true)),
    ] {
        let problem = Problem::new(shape, options).expect("a valid problem");
        let mut rng = StdRng::seed_from_u64(0);
        let mut operand = |shape: [usize; 4]| random(&mut rng, shape.iter().product());
        let (q, k, v) = (operand(problem.q_shape()), operand(problem.k_shape()), operand(problem.v_shape()));
        let inputs = Inputs::new(&q, &k, &v);
        group.throughput(Throughput::ElementsAndBytes {
            elements: problem.forward_flops() as u64,
            bytes: 4 * (q.len() + k.len() + v.len()) as u64,
        });
        group.bench_function(BenchmarkId::new(format!("forward/{name}"), &problem), |b| {
            b.iter(|| cpu::forward(&problem, &inputs));
        });
        let saved = cpu::forward(&problem, &inputs).expect("operands of the right lengths");
        let d_o = operand(problem.o_shape());
        let upstream = Upstream::new(&d_o);
        group.throughput(Throughput::ElementsAndBytes {
            elements: problem.backward_flops() as u64,
            bytes: 4 * (2 * (q.len() + k.len() + v.len()) + saved.o.len() + d_o.len()) as u64,
        });
        group.bench_function(BenchmarkId::new(format!("backward/{name}"), &problem), |b| {
            b.iter(|| cpu::backward(&problem, &inputs, &saved, &upstream));
        });
    }
}

fn random(rng: &mut impl Rng, len: usize) -> Vec<f32> {
    (0..len).map(|_| rng.random_range(-1.0..1.0)).collect()
}

criterion_group!(benches, forward_and_backward);
criterion_main!(benches);
