//! draft
use rand::{RngExt, SeedableRng};
use sink_attention::*;
fn err(a: &[f32], b: &[f64]) -> f64 {
    let n: f64 = a.iter().zip(b).map(|(x, y)| if (*x as f64) == *y { 0.0 } else { (*x as f64 - y).powi(2) }).sum();
    let d: f64 = b.iter().filter(|x| x.is_finite()).map(|y| y * y).sum();
    (n / d.max(1e-300)).sqrt()
}
/// dense f64 backward
fn reference(p: &Problem, i: &Inputs<'_>, u: &Upstream<'_>) -> (Vec<f64>, Vec<f64>, Vec<f64>, Vec<f64>) {
    let s = p.shape();
    let l = p.options().layout;
    let r = cpu::reference::forward(p, i).unwrap();
    let ix = |st: [u64; 3], b: usize, h: usize, i: usize| b * st[0] as usize + h * st[1] as usize + i * st[2] as usize;
    let (qs, ks, vs, os) = (
        l.strides(s.heads, s.seq_q, s.head_dim),
        l.strides(s.kv_heads, s.seq_k, s.head_dim),
        l.strides(s.kv_heads, s.seq_k, s.value_dim),
        l.strides(s.heads, s.seq_q, s.value_dim),
    );
    let (mut dq, mut dk, mut dv, mut ds) =
        (vec![0.0; i.q.len()], vec![0.0; i.k.len()], vec![0.0; i.v.len()], vec![0.0; s.heads]);
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(x, y)| *x as f64 * *y as f64).sum::<f64>();
    for b in 0..s.batch {
        for h in 0..s.heads {
            let g = h / p.group();
            for m in 0..s.seq_q {
                let lse = r.lse[(b * s.heads + h) * s.seq_q + m];
                if lse == f64::NEG_INFINITY {
                    continue;
                }
                let (qo, oo) = (ix(qs, b, h, m), ix(os, b, h, m));
                let d_o = &u.d_o[oo..oo + s.value_dim];
                let mut delta: f64 = d_o.iter().zip(&r.o[oo..]).map(|(x, y)| *x as f64 * y).sum();
                delta -= u.d_lse.map_or(0.0, |d| d[(b * s.heads + h) * s.seq_q + m] as f64);
                if let Some(sl) = i.sink_logits {
                    ds[h] -= (sl[h] as f64 - lse).exp() * delta;
                }
                for j in 0..s.seq_k {
                    if !p.mask().visible(m, j) {
                        continue;
                    }
                    let (ko, vo) = (ix(ks, b, g, j), ix(vs, b, g, j));
                    let pr = (p.scale() as f64 * dot(&i.q[qo..qo + s.head_dim], &i.k[ko..ko + s.head_dim]) - lse).exp();
                    let dsij = pr * (dot(d_o, &i.v[vo..vo + s.value_dim]) - delta) * p.scale() as f64;
                    for c in 0..s.head_dim {
                        dq[qo + c] += dsij * i.k[ko + c] as f64;
                        dk[ko + c] += dsij * i.q[qo + c] as f64;
                    }
                    for c in 0..s.value_dim {
                        dv[vo + c] += pr * d_o[c] as f64;
                    }
                }
            }
        }
    }
    (dq, dk, dv, ds)
}
#[test]
fn t() {
    let at = Attention::open(&DeviceChoice::Gpu).unwrap();
    println!("{}", at.device_name());
    let mut rng = rand::rngs::StdRng::seed_from_u64(1);
    for (d, e) in [(64, 64), (80, 33), (3, 7), (256, 256)] {
        for (m, n) in [(1, 1), (1, 257), (3, 3), (64, 1), (63, 65), (113, 203), (239, 1)] {
            for options in [
                Options::new(),
                Options::new().causal(true).sink_logits(SinkLogits::PerHead),
                Options::new()
                    .window(Window::keys(17))
                    .sink_tokens(3)
                    .sink_logits(SinkLogits::PerHead)
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
                let (d_o, d_lse) = (v(p.o_shape().iter().product()), v(p.lse_shape().iter().product()));
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
                let u = Upstream { d_o: &d_o, d_lse: (d == 64).then_some(&d_lse[..]) };
                let b = at.backward(&p, &i, &g, &u).unwrap();
                let (dq, dk, dv, ds) = reference(&p, &i, &u);
                let es = [
                    err(&b.d_q, &dq),
                    err(&b.d_k, &dk),
                    err(&b.d_v, &dv),
                    b.d_sink_logits.as_ref().map_or(0.0, |x| err(x, &ds)),
                ];
                if !es.iter().all(|e| *e < 1e-5) {
                    println!("BAD {p}: {es:?} ");
                }
                assert!(at.backward(&p, &i, &g, &u).unwrap() == b);
            }
        }
    }
}
