//! Programs of users, whole and short, on the CPU in one program and on the GPU in the other: a layer that learns, a server, an
//! endless chat, keys over two devices. A layer of GPT-OSS is examples/gpt_oss_layer.

use sink_attention::cache::{
    CacheConfig, CacheKind, Decode, DecodeOperands, HostCache, Prefill, PrefillOperands, Rotary, RotaryFrequencies,
    RotaryPositions, RotaryStyle,
};
use sink_attention::half::f16;
use sink_attention::testing::random::Random;
use sink_attention::{
    Attention, DType, Element, Inputs, Options, Problem, Result, Shape, SinkLogits, Upstream, Window,
};

const H: usize = 4;
const G: usize = 2;
const D: usize = 16;

/// Numbers of a token, the same whenever they are asked for.
fn row<T: Element>(token: u64, name: &str, heads: usize) -> Vec<T> {
    T::narrow(Random::new(token, name).numbers(heads * D))
}

/// The largest difference, of numbers around 1.
fn error<T: Element>(a: &[T], b: &[T]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a.to_f32() - b.to_f32()).abs()).fold(0.0, f32::max)
}

#[test]
fn a_layer_learns() -> Result<()> {
    for attention in crate::paths() {
        let shape = Shape { batch: 1, heads: H, kv_heads: G, seq_q: 24, seq_k: 24, head_dim: D, value_dim: D };
        let options = Options::new().window(Window::keys(8)).sink_logits(SinkLogits::PerHead);
        let problem = Problem::new(shape, options)?;
        let mut random = Random::new(1, "weights");
        let [mut q, mut k, mut v] = [H, G, G].map(|heads| random.numbers(24 * heads * D));
        let mut sinks = vec![0.0; H];
        let wanted = random.numbers(24 * H * D);
        let mut losses = Vec::new();
        for _ in 0..60 {
            let inputs = Inputs::new(&q, &k, &v).sink_logits(&sinks[..]);
            let output = attention.forward(&problem, &inputs)?;
            let d_o: Vec<f32> = output.o.iter().zip(&wanted).map(|(o, wanted)| o - wanted).collect();
            losses.push(d_o.iter().map(|x| x * x).sum::<f32>());
            let gradients = attention.backward(&problem, &inputs, &output, &Upstream::new(&d_o))?;
            let d_sinks = gradients.d_sink_logits.unwrap_or_default();
            for (weights, gradient) in
                [(&mut q, &gradients.d_q), (&mut k, &gradients.d_k), (&mut v, &gradients.d_v), (&mut sinks, &d_sinks)]
            {
                weights.iter_mut().zip(gradient).for_each(|(w, g)| *w -= 0.3 * g);
            }
        }
        assert!(losses[59] < 0.5 * losses[0], "{}: {losses:?}", attention.device_name());
        assert!(sinks.iter().all(|sink| *sink != 0.0), "{sinks:?}");
    }
    Ok(())
}

/// Prompts in chunks, steps, a beam search by forks, a speculated tail that is taken back: in pages, in f16.
#[test]
fn a_server_prefills_forks_and_takes_back() -> Result<()> {
    for attention in crate::paths() {
        let kind = CacheKind::Paged { page_size: 16, pages: 24, sequence_pages: 6 };
        let config = CacheConfig::new(kind, 4, G, D).dtype(DType::F16);
        let mut cache: HostCache<f16> = attention.create_host_cache(&config)?;
        let options = Options::new().causal(true).sink_logits(SinkLogits::PerHead).dtype(DType::F16);
        let sinks = [0.3, -0.5, 0.0, 1.0];
        let operands = PrefillOperands::default().sink_logits(&sinks[..]);
        // The tokens that each sequence has seen.
        let mut seen: Vec<Vec<u64>> = vec![Vec::new(); 4];
        let mut left = [37, 5, 50, 1];
        while left != [0; 4] {
            let take = left.map(|n: usize| n.min(24));
            let mut new = Vec::new();
            for (sequence, take) in take.into_iter().enumerate() {
                let tokens = seen[sequence].len() as u64..(seen[sequence].len() + take) as u64;
                new.extend(tokens.map(|n| 1000 * sequence as u64 + n));
                seen[sequence].extend(&new[new.len() - take..]);
                left[sequence] -= take;
            }
            let all = |name, heads| new.iter().flat_map(|token| row::<f16>(*token, name, heads)).collect::<Vec<_>>();
            let (mut q, k, v) = (all("q", H), all("k", G), all("v", G));
            cache.prefill(&Prefill::new(H, take, options), &mut q, [&k, &v], &operands)?;
        }
        for step in 0..12 {
            if step == 6 {
                cache.fork(0, 1)?;
                seen[1] = seen[0].clone();
                let length = cache.lengths()[2] - 5;
                cache.truncate(2, length)?;
                seen[2].truncate(length);
            }
            let tokens: Vec<u64> = (0..4).map(|sequence| 5000 + 100 * step + sequence).collect();
            seen.iter_mut().zip(&tokens).for_each(|(seen, token)| seen.push(*token));
            let all = |name, heads| tokens.iter().flat_map(|token| row::<f16>(*token, name, heads)).collect::<Vec<_>>();
            cache.append(&[1; 4], &all("k", G), &all("v", G), None, None)?;
            let output = cache.decode(
                &Decode::new(H, options),
                &all("q", H),
                &DecodeOperands::default().sink_logits(&sinks[..]),
            )?;
            for (sequence, seen) in seen.iter().enumerate() {
                let all = |name| seen.iter().flat_map(|token| row::<f16>(*token, name, G)).collect::<Vec<_>>();
                let shape =
                    Shape { batch: 1, heads: H, kv_heads: G, seq_q: 1, seq_k: seen.len(), head_dim: D, value_dim: D };
                let (q, k, v) = (row(tokens[sequence], "q", H), all("k"), all("v"));
                let inputs = Inputs::new(&q, &k, &v).sink_logits(&sinks[..]);
                let wanted = Attention::cpu().forward(&Problem::new(shape, options)?, &inputs)?;
                let off = error(&output.o[sequence * H * D..][..H * D], &wanted.o);
                assert!(off < 4e-3, "{}: step {step}, sequence {sequence}: {off}", attention.device_name());
            }
        }
        assert_eq!(cache.lengths(), seen.iter().map(Vec::len).collect::<Vec<_>>());
    }
    Ok(())
}

/// Four first tokens and the last sixteen, rotated by their place in the cache; saved, and resumed elsewhere.
#[test]
fn an_endless_chat_is_resumed() -> Result<()> {
    let rotary = Rotary { dim: D as u32, style: RotaryStyle::HalfSplit, positions: RotaryPositions::CacheRelative };
    let kind = CacheKind::Rolling { sink_tokens: 4, window: 16, queries: 1 };
    let config = CacheConfig::new(kind, 1, G, D).rotary(rotary);
    let table = RotaryFrequencies::new(10000.0).table(D as u32, 20)?;
    let decode = Decode::new(H, Options::new().causal(true));
    let say = |cache: &mut HostCache<f32>, token: u64| {
        let mut q = row(token, "q", H);
        cache.append(&[1], &row(token, "k", G), &row(token, "v", G), Some(&mut q), Some(&table))?;
        cache.decode(&decode, &q, &DecodeOperands::default().cos_sin(&table[..]))
    };
    for attention in crate::paths() {
        let mut chat = attention.create_host_cache::<f32>(&config)?;
        for token in 0..70 {
            say(&mut chat, token)?;
        }
        let file = chat.to_safetensors()?;
        let mut resumed = attention.create_host_cache(&config)?;
        resumed.restore(&file)?;
        let mut elsewhere = Attention::cpu().create_host_cache(&config)?;
        elsewhere.restore(&file)?;
        for token in 70..80 {
            let output = say(&mut chat, token)?;
            assert_eq!(output, say(&mut resumed, token)?, "{}: the same bits", attention.device_name());
            let off = error(&output.o, &say(&mut elsewhere, token)?.o);
            assert!(off < 1e-5, "{}: {off}", attention.device_name());
        }
        assert_eq!(resumed.lengths(), [80]);
    }
    Ok(())
}

/// The keys of every sequence over two devices, merged, with gradients of each shard.
#[test]
fn keys_over_two_devices() -> Result<()> {
    let shape = Shape { batch: 1, heads: H, kv_heads: G, seq_q: 30, seq_k: 90, head_dim: D, value_dim: D };
    let options = Options::new().window(Window::keys(50)).sink_tokens(4).sink_logits(SinkLogits::PerHead);
    let whole = Problem::new(shape, options)?;
    let mut random = Random::new(2, "shards");
    let [q, k, v, d_o] = [(30, H), (90, G), (90, G), (30, H)].map(|(rows, heads)| random.numbers(rows * heads * D));
    let sinks = [0.5, -1.0, 0.0, 2.0];
    let upstream = Upstream::new(&d_o);
    let inputs = Inputs::new(&q, &k, &v).sink_logits(&sinks[..]);
    let wanted = Attention::cpu().forward(&whole, &inputs)?;
    let gradients = Attention::cpu().backward(&whole, &inputs, &wanted, &upstream)?;
    for attention in crate::paths() {
        let on = [attention, Attention::cpu()];
        let shards = [0..40, 40..90].map(|keys| {
            let rows = keys.start * G * D..keys.end * G * D;
            (keys, &k[rows.clone()], &v[rows])
        });
        let states = on
            .iter()
            .zip(&shards)
            .map(|(on, (keys, k, v))| on.attend_partial(&whole, keys.clone(), &Inputs::new(&q, k, v)))
            .collect::<Result<Vec<_>>>()?;
        let state = on[0].merge(&whole, &states.iter().collect::<Vec<_>>())?;
        let output = on[0].finish::<f32>(&whole, &state, Some(&sinks))?;
        assert!(error(&output.o, &wanted.o) < 1e-5, "{}", on[0].device_name());

        let mut d_q = vec![0.0; q.len()];
        let (mut d_k, mut d_v, mut d_sinks) = (Vec::new(), Vec::new(), None);
        for (n, (on, (keys, k, v))) in on.iter().zip(&shards).enumerate() {
            // One of the shards has the sink logits.
            let inputs = Inputs::new(&q, k, v);
            let inputs = if n == 0 { inputs.sink_logits(&sinks[..]) } else { inputs };
            let part = on.backward_partial(&whole, keys.clone(), &inputs, &output, &upstream)?;
            d_q.iter_mut().zip(&part.d_q).for_each(|(sum, part)| *sum += part);
            d_k.extend(part.d_k);
            d_v.extend(part.d_v);
            d_sinks = d_sinks.or(part.d_sink_logits);
        }
        for (name, off) in [
            ("d_q", error(&d_q, &gradients.d_q)),
            ("d_k", error(&d_k, &gradients.d_k)),
            ("d_v", error(&d_v, &gradients.d_v)),
            ("d_sink_logits", error(&d_sinks.unwrap(), gradients.d_sink_logits.as_ref().unwrap())),
        ] {
            assert!(off < 1e-4, "{}: {name} {off}", on[0].device_name());
        }
    }
    Ok(())
}
