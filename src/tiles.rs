//! Tile shapes of the portable kernels, what they cost, and the tuning table.

use std::fmt;

use crate::capabilities::DeviceClass;
use crate::problem::Problem;

/// How a workgroup divides a tile of the score matrix and of the output among its threads.
///
/// Threads form a grid of `threads_q` by `threads_k`; each holds `rows` queries by 4 * `quads` keys
/// of the scores, and the same rows by its share of the value columns of the output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Tiles {
    /// Threads along the queries.
    pub threads_q: u32,
    /// Threads along the keys, a multiple of 4; also along the value columns.
    pub threads_k: u32,
    /// Queries a thread holds.
    pub rows: u32,
    /// Groups of four keys a thread holds.
    pub quads: u32,
    /// Columns of q and k staged at once, divided by four.
    pub chunk: u32,
    /// Keys of v staged at once; divides the key tile.
    pub v_chunk: u32,
    /// The query tile stays in workgroup memory (else it is staged again with each chunk of k).
    pub q_resident: bool,
    /// v has a stage of its own and is loaded together with k, so that the two latencies overlap.
    pub v_apart: bool,
}

impl Tiles {
    /// Queries of a tile.
    pub fn tile_q(&self) -> u32 {
        self.threads_q * self.rows
    }

    /// Keys of a tile.
    pub fn tile_k(&self) -> u32 {
        self.threads_k * self.quads * 4
    }

    /// Threads of a workgroup.
    pub fn threads(&self) -> u32 {
        self.threads_q * self.threads_k
    }

    /// Groups of four value columns a thread holds.
    pub fn value_quads(&self, value_dim: u32) -> u32 {
        value_dim.div_ceil(4).div_ceil(self.threads_k)
    }

    /// Vectors of four that each workgroup array holds, in the order q_tile, stage, v_stage, probs, partials.
    pub(crate) fn arrays(&self, head_dim: u32, value_dim: u32) -> [u32; 5] {
        let (tile_q, tile_k) = (self.tile_q(), self.tile_k());
        let q_tile = if self.q_resident { tile_q * (head_dim.div_ceil(4) + 1) } else { 0 };
        let qk_rows = if self.q_resident { tile_k } else { tile_k + tile_q };
        let qk_stage = qk_rows * (self.chunk + 1);
        let v_stage = self.v_chunk * self.v_row(value_dim);
        let probs = tile_q * (tile_k / 4 + 1);
        let partials = tile_q * self.threads_k / 4;
        match self.v_apart {
            true => [q_tile, qk_stage, v_stage, probs, partials],
            false => [q_tile, qk_stage.max(v_stage), 0, probs, partials],
        }
    }

    /// Vectors of four in a staged row of v.
    pub(crate) fn v_row(&self, value_dim: u32) -> u32 {
        self.threads_k * self.value_quads(value_dim)
    }

    /// Whether the numbers fit together; the reason where they do not.
    pub(crate) fn check(&self, head_dim: u32) -> Result<(), String> {
        // Far above anything useful, and low enough that no product of these numbers overflows.
        let numbers = [
            ("threads_q", self.threads_q, 1024),
            ("threads_k", self.threads_k, 1024),
            ("rows", self.rows, 64),
            ("quads", self.quads, 64),
            ("chunk", self.chunk, 64),
            ("v_chunk", self.v_chunk, 1024),
        ];
        if let Some((name, number, most)) = numbers.into_iter().find(|&(_, n, most)| n == 0 || n > most) {
            return Err(format!("{name} ({number}) must lie between 1 and {most}"));
        }
        if self.threads() > 1024 {
            return Err(format!("{} threads, the most is 1024", self.threads()));
        }
        if !self.threads_k.is_multiple_of(4) {
            return Err(format!("threads_k ({}) must be a multiple of 4", self.threads_k));
        }
        if !self.tile_k().is_multiple_of(self.v_chunk) || !self.v_chunk.is_multiple_of(4) {
            return Err(format!("v_chunk ({}) must be a multiple of 4 that divides {}", self.v_chunk, self.tile_k()));
        }
        if self.q_resident && !head_dim.div_ceil(4).is_multiple_of(self.chunk) {
            return Err(format!("with q resident, chunk ({}) must divide {}", self.chunk, head_dim.div_ceil(4)));
        }
        Ok(())
    }

    /// Bytes of workgroup memory.
    pub fn workgroup_bytes(&self, head_dim: u32, value_dim: u32) -> u32 {
        // The flag `poisoned` takes a slot of its own.
        16 * (self.arrays(head_dim, value_dim).iter().sum::<u32>() + 1)
    }

    /// 32-bit registers that the accumulators and the operands in flight take, roughly.
    pub fn registers(&self, value_dim: u32) -> u32 {
        let scores = self.rows * self.quads * 4;
        let output = self.rows * self.value_quads(value_dim) * 4;
        scores + output + 4 * self.rows + 2 * self.rows + 40
    }
}

impl fmt::Display for Tiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}x{} ({}x{} threads of {}x{}), chunk {}, v {}{}{}",
            self.tile_q(),
            self.tile_k(),
            self.threads_q,
            self.threads_k,
            self.rows,
            self.quads * 4,
            self.chunk * 4,
            self.v_chunk,
            if self.q_resident { ", q resident" } else { "" },
            if self.v_apart { ", v apart" } else { "" },
        )
    }
}

/// A row of the tuning table: tiles, and the problems they are good for.
struct Candidate {
    tiles: Tiles,
    /// Widest values that leave the output accumulators in registers.
    value_dim: usize,
    /// Fewest queries that fill a tile well enough.
    seq_q: usize,
}

const fn candidate(threads: [u32; 2], thread: [u32; 2], chunk: u32, v_chunk: u32, problem: [usize; 2]) -> Candidate {
    let [threads_q, threads_k] = threads;
    let [rows, quads] = thread;
    let tiles = Tiles { threads_q, threads_k, rows, quads, chunk, v_chunk, q_resident: false, v_apart: false };
    Candidate { tiles, value_dim: problem[0], seq_q: problem[1] }
}

/// Measured on an NVIDIA H200, see benches/results/; each row falls back to the next where it does not fit.
const HARDWARE: [Candidate; 6] = [
    candidate([32, 8], [4, 1], 8, 32, [128, 65]),
    candidate([16, 8], [4, 1], 4, 32, [128, 33]),
    candidate([8, 8], [4, 1], 4, 16, [128, 1]),
    candidate([16, 16], [4, 1], 8, 16, [256, 33]),
    candidate([4, 16], [4, 1], 4, 8, [256, 1]),
    LEAST,
];

/// A software driver runs the threads of a workgroup one after the other, a vector at a time.
const SOFTWARE: [Candidate; 3] =
    [candidate([8, 8], [4, 1], 4, 16, [128, 1]), candidate([4, 16], [4, 1], 4, 8, [256, 1]), LEAST];

/// Fits 16 KiB of workgroup memory and 64 threads for every width.
const LEAST: Candidate = candidate([8, 8], [2, 1], 4, 8, [usize::MAX, 1]);

/// Tiles to try for a problem, the best first; the last one fits every WebGPU device.
pub(crate) fn candidates(problem: &Problem, class: DeviceClass) -> impl Iterator<Item = Tiles> {
    let shape = *problem.shape();
    let table: &[Candidate] = if class == DeviceClass::Software { &SOFTWARE } else { &HARDWARE };
    let fits = move |c: &&Candidate| shape.value_dim <= c.value_dim && shape.seq_q >= c.seq_q;
    table.iter().filter(fits).map(|c| c.tiles)
}
