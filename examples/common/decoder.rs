//! One sequence decoded token by token through a cache of keys and values, on the GPU or, without one, on the CPU.

use std::error::Error;
use std::sync::mpsc;

use sink_attention::{
    AppendBuffers, Attention, CacheConfig, Decode, DecodeBuffers, Device, KvCache, Options, PreparedAppend,
    PreparedDecode, RotaryPositions, SinkLogits, TensorView, cpu, wgpu,
};

/// What is fixed for all steps. Everything is f32.
#[derive(Debug, Clone, Copy)]
pub struct Setup<'a> {
    /// A cache of one sequence.
    pub config: CacheConfig,
    /// Query heads.
    pub heads: usize,
    /// One for each query head.
    pub sink_logits: &'a [f32],
    /// Cosines and sines of the rotary embedding, see [`AppendBuffers::cos_sin`].
    pub cos_sin: &'a [f32],
    /// Tokens that are recorded before the GPU starts.
    pub chunk: usize,
}

impl Setup<'_> {
    fn decode(&self) -> Decode {
        Decode::new(self.heads, Options::new().causal(true).sink_logits(SinkLogits::PerHead))
    }

    fn is_relative(&self) -> bool {
        self.config.rotary.is_some_and(|rotary| rotary.positions == RotaryPositions::CacheRelative)
    }
}

/// Results of some tokens: o is `[tokens, H, E]`, lse is `[tokens, H]`.
#[derive(Debug, Clone, Default)]
pub struct Steps {
    pub o: Vec<f32>,
    pub lse: Vec<f32>,
}

pub struct Decoder<'a> {
    setup: Setup<'a>,
    cache: Cache,
}

enum Cache {
    Cpu(Box<cpu::KvCache<f32>>),
    Gpu(Box<OnGpu>),
}

impl<'a> Decoder<'a> {
    pub fn new(attention: &Attention, setup: Setup<'a>) -> Result<Self, Box<dyn Error>> {
        let cache = match attention.device() {
            None => Cache::Cpu(Box::new(cpu::KvCache::new(&setup.config)?)),
            Some(device) => {
                Cache::Gpu(Box::new(OnGpu::new(attention, device, attention.create_cache(&setup.config)?, &setup)?))
            }
        };
        Ok(Decoder { setup, cache })
    }

    /// Tokens without queries: keys `[tokens, G, D]`, not rotated yet, and values `[tokens, G, E]`.
    #[allow(dead_code, reason = "a stream has no prompt")]
    pub fn append(&mut self, k: &[f32], v: &[f32]) -> Result<(), Box<dyn Error>> {
        let tokens = k.len() / (self.setup.config.kv_heads * self.setup.config.head_dim);
        match &mut self.cache {
            Cache::Cpu(cache) => cache.append(&[tokens], k, v, None, Some(self.setup.cos_sin))?,
            Cache::Gpu(gpu) => gpu.append(tokens, k, v)?,
        }
        Ok(())
    }

    /// Token after token is appended, and its query, `[tokens, H, D]`, not rotated yet, attends to what the cache holds then.
    pub fn steps(&mut self, q: &[f32], k: &[f32], v: &[f32]) -> Result<Steps, Box<dyn Error>> {
        let Setup { config, heads, sink_logits, cos_sin, chunk } = self.setup;
        let [q_row, k_row, v_row] =
            [heads * config.head_dim, config.kv_heads * config.head_dim, config.kv_heads * config.value_dim];
        let mut steps = Steps::default();
        match &mut self.cache {
            Cache::Cpu(cache) => {
                let decode = self.setup.decode();
                let when_read = self.setup.is_relative().then_some(cos_sin);
                for ((q, k), v) in q.chunks(q_row).zip(k.chunks(k_row)).zip(v.chunks(v_row)) {
                    let mut q = q.to_vec();
                    cache.append(&[1], k, v, Some(&mut q), Some(cos_sin))?;
                    let output = cache.decode(&decode, &q, Some(sink_logits), when_read)?;
                    steps.o.extend(output.o);
                    steps.lse.extend(output.lse);
                }
            }
            Cache::Gpu(gpu) => {
                let chunks = q.chunks(chunk * q_row).zip(k.chunks(chunk * k_row)).zip(v.chunks(chunk * v_row));
                for ((q, k), v) in chunks {
                    let [o, lse] = gpu.steps(q.len() / q_row, [q, k, v])?;
                    steps.o.extend(o);
                    steps.lse.extend(lse);
                }
            }
        }
        Ok(steps)
    }

    /// Tokens that were appended.
    #[allow(dead_code, reason = "only a stream is saved")]
    pub fn tokens(&self) -> usize {
        match &self.cache {
            Cache::Cpu(cache) => cache.lengths()[0],
            Cache::Gpu(gpu) => gpu.cache.lengths()[0],
        }
    }

    #[allow(dead_code, reason = "only a stream is saved")]
    pub fn to_safetensors(&self) -> Result<Vec<u8>, sink_attention::Error> {
        match &self.cache {
            Cache::Cpu(cache) => cache.to_safetensors(),
            Cache::Gpu(gpu) => gpu.cache.to_safetensors(),
        }
    }

    #[allow(dead_code, reason = "only a stream is saved")]
    pub fn restore(&mut self, file: &[u8]) -> Result<(), sink_attention::Error> {
        match &mut self.cache {
            Cache::Cpu(cache) => cache.restore(file),
            Cache::Gpu(gpu) => gpu.cache.restore(file),
        }
    }
}

/// Every token of a chunk has its place in the buffers, and its own prepared steps: a chunk is recorded without any
/// preparation, and nothing is read back in between.
struct OnGpu {
    attention: Attention,
    device: Device,
    cache: KvCache,
    inputs: [wgpu::Buffer; 3],
    results: [wgpu::Buffer; 2],
    /// Bytes of a token's o and lse.
    result_bytes: [u64; 2],
    read_back: wgpu::Buffer,
    cos_sin: wgpu::Buffer,
    tokens: Vec<(PreparedAppend, PreparedDecode)>,
}

impl OnGpu {
    fn new(attention: &Attention, device: &Device, cache: KvCache, setup: &Setup<'_>) -> Result<Self, Box<dyn Error>> {
        let Setup { config, heads, chunk, .. } = *setup;
        let rows = [heads * config.head_dim, config.kv_heads * config.head_dim, config.kv_heads * config.value_dim];
        let results = [heads * config.value_dim, heads];
        let bytes = |floats: usize| 4 * (chunk * floats) as u64;
        let result_bytes = results.map(|floats| 4 * floats as u64);
        let (inputs, results, read_back, cos_sin, sinks) =
            pollster::block_on(device.scoped("allocating a chunk", || {
                (
                    rows.map(|row| storage(device, bytes(row))),
                    results.map(|floats| storage(device, bytes(floats))),
                    buffer(
                        device,
                        bytes(results[0] + results[1]),
                        wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
                    ),
                    filled(device, setup.cos_sin),
                    filled(device, setup.sink_logits),
                )
            }))?;
        let decode = setup.decode();
        let view = |buffer, row: usize, token| TensorView::new(buffer).offset((row * token) as u64);
        let tokens = (0..chunk).map(|token| -> Result<_, Box<dyn Error>> {
            let [q, k, v] = [0, 1, 2].map(|n| view(&inputs[n], rows[n], token));
            let [o, lse] = [heads * config.value_dim, heads];
            let [o, lse] = [view(&results[0], o, token), view(&results[1], lse, token)];
            let append = AppendBuffers { q: Some((q, heads)), cos_sin: Some(&cos_sin), ..AppendBuffers::new(k, v) };
            let when_read = setup.is_relative().then_some(&cos_sin);
            let step = DecodeBuffers {
                sink_logits: Some(TensorView::new(&sinks)),
                cos_sin: when_read,
                ..DecodeBuffers::new(q, o, lse)
            };
            Ok((cache.prepare_append(&[1], &append)?, cache.prepare_decode(&decode, &step)?))
        });
        let tokens = tokens.collect::<Result<Vec<_>, _>>()?;
        Ok(OnGpu {
            attention: attention.clone(),
            device: device.clone(),
            cache,
            inputs,
            results,
            result_bytes,
            read_back,
            cos_sin,
            tokens,
        })
    }

    fn append(&mut self, tokens: usize, k: &[f32], v: &[f32]) -> Result<(), Box<dyn Error>> {
        let device = &self.device;
        let [k, v] = [k, v].map(|x| pollster::block_on(device.scoped("uploading a prompt", || filled(device, x))));
        let (k, v) = (k?, v?);
        let buffers = AppendBuffers { cos_sin: Some(&self.cos_sin), ..AppendBuffers::new(&k, &v) };
        let prepared = self.cache.prepare_append(&[tokens], &buffers)?;
        let mut step = self.attention.step()?.label("prompt");
        prepared.encode(&mut self.cache, &mut step)?;
        step.submit()?;
        Ok(())
    }

    fn steps(&mut self, tokens: usize, inputs: [&[f32]; 3]) -> Result<[Vec<f32>; 2], Box<dyn Error>> {
        let (attention, device, cache) = (&self.attention, &self.device, &mut self.cache);
        let [o_bytes, lse_bytes] = self.result_bytes.map(|bytes| bytes * tokens as u64);
        let (sender, mapped) = mpsc::channel();
        let submit = || -> sink_attention::Result<()> {
            for (buffer, data) in self.inputs.iter().zip(inputs) {
                device.queue().write_buffer(buffer, 0, bytemuck::cast_slice(data));
            }
            // Where a token fails none of the chunk is in the cache.
            let mut step = attention.step()?.label("chunk");
            let mut pass = step.begin_compute_pass(&Default::default());
            for (append, decode) in self.tokens.iter().take(tokens) {
                append.encode_in(cache, &mut pass)?;
                decode.encode_in(cache, &mut pass)?;
            }
            drop(pass);
            let encoder = step.encoder();
            encoder.copy_buffer_to_buffer(&self.results[0], 0, &self.read_back, 0, o_bytes);
            encoder.copy_buffer_to_buffer(&self.results[1], 0, &self.read_back, o_bytes, lse_bytes);
            step.submit()?;
            self.read_back.map_async(wgpu::MapMode::Read, ..o_bytes + lse_bytes, move |result| {
                // The receiver waits below.
                let _ = sender.send(result);
            });
            Ok(())
        };
        pollster::block_on(device.scoped("decoding", submit))??;
        device.wgpu().poll(wgpu::PollType::wait_indefinitely())?;
        mapped.recv()??;
        let floats: Vec<f32> = bytemuck::pod_collect_to_vec(&self.read_back.get_mapped_range(..o_bytes + lse_bytes)?);
        self.read_back.unmap();
        let (o, lse) = floats.split_at(o_bytes as usize / 4);
        Ok([o.to_vec(), lse.to_vec()])
    }
}

fn buffer(device: &Device, size: u64, usage: wgpu::BufferUsages) -> wgpu::Buffer {
    device.wgpu().create_buffer(&wgpu::BufferDescriptor { label: None, size, usage, mapped_at_creation: false })
}

fn storage(device: &Device, size: u64) -> wgpu::Buffer {
    let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST;
    buffer(device, size, usage)
}

fn filled(device: &Device, data: &[f32]) -> wgpu::Buffer {
    let buffer = storage(device, 4 * data.len() as u64);
    device.queue().write_buffer(&buffer, 0, bytemuck::cast_slice(data));
    buffer
}
