//! The way between the host and the GPU.

use crate::common;
use sink_attention::cache::{AppendBuffers, CacheConfig, CacheKind};
use sink_attention::device::{BufferElement, BufferType};
use sink_attention::half::{bf16, f16};
use sink_attention::wgpu::BufferUsages;
use sink_attention::{DType, Device, Error, ForwardBuffers, Options, Problem, Shape};

fn device() -> Option<&'static Device> {
    common::gpu().and_then(|gpu| gpu.device())
}

/// Every length around whole words, and parts of them.
fn round_trips<T: BufferElement + PartialEq + std::fmt::Debug>(device: &Device, number: impl Fn(usize) -> T) {
    let (size, words) = (size_of::<T>(), 4 / size_of::<T>());
    assert_eq!(T::TYPE.bytes(), size);
    for len in [0, 1, 2, 3, 4, 5, 1001] {
        let data: Vec<T> = (0..len).map(&number).collect();
        let buffer = device.upload("data", &data).unwrap();
        assert_eq!((buffer.len(), buffer.is_empty(), buffer.element()), (len, len == 0, T::TYPE));
        assert_eq!(buffer.wgpu().size(), (len * size).next_multiple_of(4).max(4) as u64);
        let usages = BufferUsages::STORAGE | BufferUsages::COPY_SRC | BufferUsages::COPY_DST;
        assert!(buffer.wgpu().usage().contains(usages));
        assert_eq!(buffer.download::<T>().unwrap(), data);
        for range in [0..0, 0..len, len..len, len / 3..len, 1.min(len)..len / 2 + 1.min(len)] {
            let [part] = device.download::<T, 1>([(&buffer, range.clone())]).unwrap();
            assert_eq!(part, data[range.clone()], "{range:?} of {len}");
        }

        let zeros = device.zeros("zeros", T::TYPE, &[len, 1]).unwrap();
        assert!(zeros.download::<T>().unwrap().iter().all(|x| *x == T::zeroed()));
        // A part, which leaves the rest as it is.
        let start = (len / 2) / words * words;
        zeros.write(start, &data[start..]).unwrap();
        let written = zeros.download::<T>().unwrap();
        assert!(written[..start].iter().all(|x| *x == T::zeroed()) && written[start..] == data[start..]);
        if len == 1001 {
            let error = zeros.write(1000 / words * words, &data[..words + 1]).unwrap_err().to_string();
            assert!(error.contains("of zeros, a buffer of 1001 elements"), "{error}");
            let [both @ .., tail] =
                device.download::<T, 3>([(&buffer, 3..5), (&zeros, 990..1001), (&buffer, 1000..1001)]).unwrap();
            assert_eq!((both, tail), ([data[3..5].to_vec(), data[990..].to_vec()], data[1000..].to_vec()));
        }
        if words > 1 && len == 5 {
            // Neighbours in a word would be lost.
            assert!(matches!(zeros.write(1, &data[..words]), Err(Error::BufferRange { start: 1, .. })));
            assert!(matches!(zeros.write(0, &data[..1]), Err(Error::BufferRange { end: 1, len: 5, .. })));
        }
    }
}

#[test]
fn slices_of_every_type_come_back() {
    let Some(device) = device() else { return };
    round_trips(device, |n| n as f32 - 0.5);
    round_trips(device, |n| f16::from_f32(n as f32 - 0.5));
    round_trips(device, |n| bf16::from_f32(n as f32 - 0.5));
    round_trips(device, |n| n as i16 - 7);
    round_trips(device, |n| 1u32 << (n % 32) | 1);
    round_trips(device, |n| n as u8 | 1);
}

#[test]
fn wrong_types_and_ranges_are_errors_with_numbers() {
    let Some(gpu) = common::gpu() else { return };
    let device = gpu.device().unwrap();
    let shape = Shape { batch: 1, heads: 1, kv_heads: 1, seq_q: 2, seq_k: 2, head_dim: 4, value_dim: 4 };
    let problem = Problem::new(shape, Options::new().dtype(DType::F16)).unwrap();
    let halves = || device.zeros("halves", DType::F16, &problem.q_shape()).unwrap();
    let [q, k, v, o] = [halves(), halves(), halves(), halves()];
    let lse = device.zeros("lse", DType::F32, &problem.lse_shape()).unwrap();
    gpu.prepare_forward(&problem, &ForwardBuffers::new(&q, &k, &v, &o, &lse)).unwrap();
    // bf16 has as many bytes, so that nothing else would tell.
    let other = device.zeros("k", DType::Bf16, &problem.k_shape()).unwrap();
    let error = gpu.prepare_forward(&problem, &ForwardBuffers::new(&q, &other, &v, &o, &lse)).unwrap_err();
    assert_eq!(error.to_string(), "k lies in a buffer of bf16, f16 is needed");
    let wide = device.zeros("lse", DType::F16, &[64]).unwrap();
    let error = gpu.prepare_forward(&problem, &ForwardBuffers::new(&q, &k, &v, &o, &wide)).unwrap_err();
    assert_eq!(error.to_string(), "lse lies in a buffer of f16, f32 is needed");
    let rest = ForwardBuffers::new(&q, &k, &v, &o, &lse).o_lo(other.view());
    assert!(matches!(
        gpu.prepare_forward(&problem, &rest),
        Err(Error::BufferType { operand: "o_lo", needed: BufferType::I16, actual: BufferType::Bf16 })
    ));
    // One row short: a whole word of four bytes.
    let short = device.zeros("v", DType::F16, &[1, 1, 1, 4]).unwrap();
    let error = gpu.prepare_forward(&problem, &ForwardBuffers::new(&q, &k, &short, &o, &lse)).unwrap_err();
    assert!(matches!(error, Error::BufferTooSmall { operand: "v", needed: 16, actual: 8 }), "{error}");

    let kind = CacheKind::Contiguous { capacity: 8 };
    let cache = gpu.create_cache(&CacheConfig::new(kind, 1, 1, 4).dtype(DType::F16)).unwrap();
    let error = cache.prepare_append(&[1], &AppendBuffers::new(&other, &v)).unwrap_err();
    assert!(error.to_string().contains("bf16, f16 is needed"), "{error}");

    let error = q.download::<f32>().unwrap_err();
    assert_eq!(error.to_string(), "halves lies in a buffer of f16, f32 is needed");
    assert!(matches!(q.write(0, &[1u8]), Err(Error::BufferType { .. })));
    let error = device.download::<f16, 1>([(&q, 3..9)]).unwrap_err().to_string();
    assert_eq!(error, "elements 3 to 9 of halves, a buffer of 8 elements: they must lie within it");
    let error = device.zeros("o", DType::F32, &[usize::MAX, 2]).unwrap_err();
    assert!(matches!(error, Error::BufferTooLarge { operand: "o", .. }), "{error}");
}
