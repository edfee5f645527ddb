//! From a variant to the text of its shader.

use std::sync::OnceLock;

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, UndefinedBehavior, context};

use crate::error::{Error, Result};
use crate::problem::SinkLogits;
use crate::tiles::Tiles;

/// The shader texts, each with the name that `include` and `import` know it by.
const SOURCES: [(&str, &str); 6] = [
    ("forward.wgsl", include_str!("../shaders/forward.wgsl")),
    ("mask.wgsl", include_str!("../shaders/mask.wgsl")),
    ("operands.wgsl", include_str!("../shaders/operands.wgsl")),
    ("params.wgsl", include_str!("../shaders/params.wgsl")),
    ("portable.wgsl", include_str!("../shaders/portable.wgsl")),
    ("softmax.wgsl", include_str!("../shaders/softmax.wgsl")),
];

/// Everything a kernel may bind. The slot is the discriminant; slots are never renumbered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Binding {
    Params = 0,
    Q = 1,
    K = 2,
    V = 3,
    O = 4,
    Lse = 5,
    SinkLogits = 6,
}

impl Binding {
    pub(crate) const ALL: [Binding; 7] =
        [Binding::Params, Binding::Q, Binding::K, Binding::V, Binding::O, Binding::Lse, Binding::SinkLogits];

    pub(crate) fn slot(self) -> u32 {
        self as u32
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Binding::Params => "params",
            Binding::Q => "q",
            Binding::K => "k",
            Binding::V => "v",
            Binding::O => "o",
            Binding::Lse => "lse",
            Binding::SinkLogits => "sink_logits",
        }
    }

    fn address_space(self) -> &'static str {
        match self.kind() {
            wgpu::BufferBindingType::Uniform => "uniform",
            wgpu::BufferBindingType::Storage { read_only: true } => "storage, read",
            wgpu::BufferBindingType::Storage { read_only: false } => "storage, read_write",
        }
    }

    fn wgsl_type(self, vec4: bool) -> &'static str {
        match self {
            Binding::Params => "Params",
            Binding::Q | Binding::K | Binding::V | Binding::O if vec4 => "array<vec4<f32>>",
            _ => "array<f32>",
        }
    }

    pub(crate) fn kind(self) -> wgpu::BufferBindingType {
        match self {
            Binding::Params => wgpu::BufferBindingType::Uniform,
            Binding::O | Binding::Lse => wgpu::BufferBindingType::Storage { read_only: false },
            _ => wgpu::BufferBindingType::Storage { read_only: true },
        }
    }
}

/// What a pipeline fixes. Two problems of one variant share a pipeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Variant {
    /// D.
    pub head_dim: u32,
    /// E.
    pub value_dim: u32,
    /// Operands are read and written four neighbours at a time.
    pub vec4: bool,
    /// Where the sink logits come from.
    pub sink_logits: SinkLogits,
    /// The tile shape.
    pub tiles: Tiles,
}

impl Variant {
    /// The operands this variant binds, in the order of their slots.
    pub(crate) fn bindings(&self) -> Vec<Binding> {
        let absent = |b: &Binding| *b == Binding::SinkLogits && self.sink_logits != SinkLogits::PerHead;
        Binding::ALL.into_iter().filter(|b| !absent(b)).collect()
    }

    /// Storage buffers this variant binds.
    pub(crate) fn storage_buffers(&self) -> u32 {
        self.bindings().iter().filter(|b| b.kind() != wgpu::BufferBindingType::Uniform).count() as u32
    }

    /// Name for labels and dumps.
    pub fn name(&self) -> String {
        let t = &self.tiles;
        format!(
            "forward_portable_f32_d{}_e{}_{}x{}_t{}x{}_c{}_v{}{}{}{}{}",
            self.head_dim,
            self.value_dim,
            t.tile_q(),
            t.tile_k(),
            t.threads_q,
            t.threads_k,
            t.chunk * 4,
            t.v_chunk,
            if t.q_resident { "_qres" } else { "" },
            if t.v_apart { "_vapart" } else { "" },
            if self.vec4 { "" } else { "_scalar" },
            match self.sink_logits {
                SinkLogits::None => "",
                SinkLogits::OffByOne => "_offbyone",
                SinkLogits::PerHead => "_sinks",
            },
        )
    }

    /// The WGSL text of this variant.
    ///
    /// # Errors
    /// [`Error::Gpu`] if the template does not render, which would be a mistake of this crate.
    pub fn wgsl(&self) -> Result<String> {
        let t = &self.tiles;
        let [q_tile_len, stage_len, v_stage_len, probs_len, _] = t.arrays(self.head_dim, self.value_dim);
        let value_quads_all = self.value_dim.div_ceil(4);
        let context = context! {
            micro_kernel => "portable.wgsl",
            bindings => self.bindings().iter().map(|b| context! {
                name => b.name(),
                slot => b.slot(),
                space => b.address_space(),
                type => b.wgsl_type(self.vec4),
            }).collect::<Vec<_>>(),
            xyzw => ["x", "y", "z", "w"],
            head_dim => self.head_dim,
            value_dim => self.value_dim,
            vec4 => self.vec4,
            sinks => match self.sink_logits {
                SinkLogits::None => "none",
                SinkLogits::OffByOne => "off_by_one",
                SinkLogits::PerHead => "per_head",
            },
            tile_q => t.tile_q(),
            tile_k => t.tile_k(),
            threads => t.threads(),
            threads_q => t.threads_q,
            threads_k => t.threads_k,
            rows => t.rows,
            quads => t.quads,
            chunk => t.chunk,
            unroll => if t.chunk.is_multiple_of(2) { 2 } else { 1 },
            v_chunk => t.v_chunk,
            v_row => t.v_row(self.value_dim),
            q_resident => t.q_resident,
            v_apart => t.v_apart,
            head_quads => self.head_dim.div_ceil(4),
            value_quads => t.value_quads(self.value_dim),
            value_quads_all,
            q_tile_len, stage_len, v_stage_len, probs_len,
        };
        environment()
            .and_then(|environment| environment.get_template("forward.wgsl"))
            .and_then(|template| template.render(context))
            .map_err(|error| Error::Gpu { during: "composing a shader", message: format!("{error:#}") })
    }
}

/// The templates, parsed once.
fn environment() -> Result<&'static Environment<'static>, minijinja::Error> {
    static ENVIRONMENT: OnceLock<Environment<'static>> = OnceLock::new();
    if let Some(environment) = ENVIRONMENT.get() {
        return Ok(environment);
    }
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.set_undefined_behavior(UndefinedBehavior::Strict);
    for (name, source) in SOURCES {
        environment.add_template(name, source)?;
    }
    Ok(ENVIRONMENT.get_or_init(|| environment))
}
