//! One sequence decoded token by token through a cache of keys and values, on the GPU or, without one, on the CPU.

use std::error::Error;

use sink_attention::cache::{
    AppendBuffers, CacheConfig, Decode, DecodeBuffers, DecodeOperands, HostCache, KvCache, PreparedAppend,
    PreparedDecode, RotaryPositions,
};
use sink_attention::device::DeviceBuffer;
use sink_attention::{Attention, DType, Device, Options, SinkLogits, TensorView};

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
    cache: HostCache<f32>,
    /// Where the cache is on the GPU. Calls of the cache on host slices would wait for the GPU at every token.
    chunk: Option<Chunk>,
}

impl<'a> Decoder<'a> {
    pub fn new(attention: &Attention, setup: Setup<'a>) -> Result<Self, Box<dyn Error>> {
        let mut cache = attention.create_host_cache(&setup.config)?;
        let chunk = match (attention.device(), cache.gpu()) {
            (Some(device), Some(cache)) => Some(Chunk::new(attention, device, cache, &setup)?),
            _ => None,
        };
        Ok(Decoder { setup, cache, chunk })
    }

    /// Tokens without queries: keys `[tokens, G, D]`, not rotated yet, and values `[tokens, G, E]`.
    #[allow(dead_code, reason = "a stream has no prompt")]
    pub fn append(&mut self, k: &[f32], v: &[f32]) -> Result<(), Box<dyn Error>> {
        let tokens = k.len() / (self.setup.config.kv_heads * self.setup.config.head_dim);
        Ok(self.cache.append(&[tokens], k, v, None, Some(self.setup.cos_sin))?)
    }

    /// Token after token is appended, and its query, `[tokens, H, D]`, not rotated yet, attends to what the cache holds then.
    pub fn steps(&mut self, q: &[f32], k: &[f32], v: &[f32]) -> Result<Steps, Box<dyn Error>> {
        let Setup { config, heads, sink_logits, cos_sin, chunk } = self.setup;
        let [q_row, k_row, v_row] =
            [heads * config.head_dim, config.kv_heads * config.head_dim, config.kv_heads * config.value_dim];
        let mut steps = Steps::default();
        if let (Some(prepared), Some(cache)) = (&self.chunk, self.cache.gpu()) {
            let chunks = q.chunks(chunk * q_row).zip(k.chunks(chunk * k_row)).zip(v.chunks(chunk * v_row));
            for ((q, k), v) in chunks {
                let [o, lse] = prepared.steps(cache, q.len() / q_row, [q, k, v])?;
                steps.o.extend(o);
                steps.lse.extend(lse);
            }
            return Ok(steps);
        }
        let decode = self.setup.decode();
        let when_read = self.setup.is_relative().then_some(cos_sin);
        for ((q, k), v) in q.chunks(q_row).zip(k.chunks(k_row)).zip(v.chunks(v_row)) {
            let mut q = q.to_vec();
            self.cache.append(&[1], k, v, Some(&mut q), Some(cos_sin))?;
            let output = self.cache.decode(
                &decode,
                &q,
                &DecodeOperands::default().sink_logits(sink_logits).cos_sin(when_read),
            )?;
            steps.o.extend(output.o);
            steps.lse.extend(output.lse);
        }
        Ok(steps)
    }

    /// Tokens that were appended.
    #[allow(dead_code, reason = "only a stream is saved")]
    pub fn tokens(&self) -> usize {
        self.cache.lengths()[0]
    }

    #[allow(dead_code, reason = "only a stream is saved")]
    pub fn to_safetensors(&self) -> Result<Vec<u8>, sink_attention::Error> {
        self.cache.to_safetensors()
    }

    #[allow(dead_code, reason = "only a stream is saved")]
    pub fn restore(&mut self, file: &[u8]) -> Result<(), sink_attention::Error> {
        self.cache.restore(file)
    }
}

/// Every token of a chunk has its place in the buffers, and its own prepared steps: a chunk is recorded without any
/// preparation, and nothing is read back in between.
struct Chunk {
    attention: Attention,
    device: Device,
    /// q, k and v of a chunk's tokens.
    inputs: [DeviceBuffer; 3],
    o: DeviceBuffer,
    lse: DeviceBuffer,
    /// Elements of a token's o and lse.
    result_rows: [usize; 2],
    tokens: Vec<(PreparedAppend, PreparedDecode)>,
}

impl Chunk {
    fn new(attention: &Attention, device: &Device, cache: &KvCache, setup: &Setup<'_>) -> Result<Self, Box<dyn Error>> {
        let Setup { config, heads, chunk, .. } = *setup;
        let rows = [heads * config.head_dim, config.kv_heads * config.head_dim, config.kv_heads * config.value_dim];
        let result_rows = [heads * config.value_dim, heads];
        let zeros = |operand, row| device.zeros(operand, DType::F32, &[chunk, row]);
        let inputs = [zeros("q", rows[0])?, zeros("k", rows[1])?, zeros("v", rows[2])?];
        let (o, lse) = (zeros("o", result_rows[0])?, zeros("lse", result_rows[1])?);
        let cos_sin = device.upload("cos_sin", setup.cos_sin)?;
        let sinks = device.upload("sink_logits", setup.sink_logits)?;
        let decode = setup.decode();
        let tokens = (0..chunk).map(|token| -> Result<_, Box<dyn Error>> {
            let [q, k, v] = [0, 1, 2].map(|n| row(&inputs[n], rows[n], token));
            let (o, lse) = (row(&o, result_rows[0], token), row(&lse, result_rows[1], token));
            let table = Some(cos_sin.wgpu());
            let append = AppendBuffers::new(k, v).q((q, heads)).cos_sin(table);
            let step =
                DecodeBuffers::new(q, o, lse).sink_logits(sinks.view()).cos_sin(table.filter(|_| setup.is_relative()));
            Ok((cache.prepare_append(&[1], &append)?, cache.prepare_decode(&decode, &step)?))
        });
        let tokens = tokens.collect::<Result<Vec<_>, _>>()?;
        Ok(Chunk { attention: attention.clone(), device: device.clone(), inputs, o, lse, result_rows, tokens })
    }

    fn steps(&self, cache: &mut KvCache, tokens: usize, inputs: [&[f32]; 3]) -> Result<[Vec<f32>; 2], Box<dyn Error>> {
        for (buffer, data) in self.inputs.iter().zip(inputs) {
            buffer.write(0, data)?;
        }
        // Where a token fails none of the chunk is in the cache.
        let mut step = self.attention.step()?.label("chunk");
        let mut pass = step.begin_compute_pass(&Default::default());
        for (append, decode) in self.tokens.iter().take(tokens) {
            append.encode_in(cache, &mut pass)?;
            decode.encode_in(cache, &mut pass)?;
        }
        drop(pass);
        step.submit()?;
        let [o, lse] = self.result_rows.map(|row| 0..tokens * row);
        Ok(self.device.download([(&self.o, o), (&self.lse, lse)])?)
    }
}

/// The part of a buffer that is a token's.
fn row(buffer: &DeviceBuffer, elements: usize, token: usize) -> TensorView<'_> {
    buffer.view().offset((elements * token) as u64)
}
