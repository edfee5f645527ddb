use rand::{RngExt, SeedableRng};
use sink_attention::*;
fn err(a: &[f32], b: &[f64]) -> f64 {
    let n: f64 = a.iter().zip(b).map(|(x, y)| if (*x as f64) == *y { 0.0 } else { (*x as f64 - y).powi(2) }).sum();
    let d: f64 = b.iter().filter(|x| x.is_finite()).map(|y| y * y).sum();
    (n / d.max(1e-300)).sqrt()
}
#[test]
fn t() {
    let at = Attention::open(&DeviceChoice::Gpu).unwrap();
    println!("{}", at.device_name());
    let mut rng = rand::rngs::StdRng::seed_from_u64(1);
    for (m, n) in [(1, 1), (1, 257), (3, 3), (64, 1), (63, 65), (113, 203), (239, 1)] {
        for (d, e) in [(64, 64), (80, 33), (3, 7), (256, 256), (1, 1)] {
            for options in [
                Options::new(),
                Options::new().causal(true).sink_logits(SinkLogits::PerHead),
                Options::new()
                    .window(Window::keys(17))
                    .sink_tokens(3)
                    .sink_logits(SinkLogits::OffByOne)
                    .layout(Layout::Bhsd),
                Options::new().window(Window::new(9, 4)),
            ] {
                let shape = Shape { batch: 2, heads: 4, kv_heads: 2, seq_q: m, seq_k: n, head_dim: d, value_dim: e };
                let p = Problem::new(shape, options).unwrap();
                let mut v = |n: usize| -> Vec<f32> { (0..n).map(|_| rng.random_range(-1.0..1.0f32) * 2.0).collect() };
                let (q, k, vv, s) = (
                    v(p.q_shape().iter().product()),
                    v(p.k_shape().iter().product()),
                    v(p.v_shape().iter().product()),
                    v(4),
                );
                let i = Inputs {
                    q: &q,
                    k: &k,
                    v: &vv,
                    sink_logits: (options.sink_logits == SinkLogits::PerHead).then_some(&s[..]),
                };
                let r = cpu::reference::forward(&p, &i).unwrap();
                let g = at.forward(&p, &i).unwrap();
                let (eo, el) = (err(&g.o, &r.o), err(&g.lse, &r.lse));
                if !(eo < 1e-5 && el < 1e-5) {
                    println!("BAD {p}: {eo:e} {el:e}");
                }
            }
        }
    }
}
