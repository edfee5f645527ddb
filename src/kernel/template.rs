//! Templates: WGSL with Jinja marks.

use std::sync::OnceLock;

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, UndefinedBehavior, Value};

use crate::kernel::params::declare;
use crate::problem::error::{Error, Result};

/// The texts that kernels share, each with the name that `include` and `import` know it by.
const SOURCES: &[(&str, &str)] = &[
    ("bf16.wgsl", include_str!("../../shaders/bf16.wgsl")),
    ("bindings.wgsl", include_str!("../../shaders/bindings.wgsl")),
    ("cache/decode_cooperative.wgsl", include_str!("../../shaders/cache/decode_cooperative.wgsl")),
    ("cache/decode.wgsl", include_str!("../../shaders/cache/decode.wgsl")),
    ("cache/range.wgsl", include_str!("../../shaders/cache/range.wgsl")),
    ("cache/rotary.wgsl", include_str!("../../shaders/cache/rotary.wgsl")),
    ("cache/scales.wgsl", include_str!("../../shaders/cache/scales.wgsl")),
    ("cooperative/blocks.wgsl", include_str!("../../shaders/cooperative/blocks.wgsl")),
    ("cooperative/d_kv.wgsl", include_str!("../../shaders/cooperative/d_kv.wgsl")),
    ("cooperative/d_q.wgsl", include_str!("../../shaders/cooperative/d_q.wgsl")),
    ("cooperative/exact_delta.wgsl", include_str!("../../shaders/cooperative/exact_delta.wgsl")),
    ("cooperative/forward.wgsl", include_str!("../../shaders/cooperative/forward.wgsl")),
    ("exp.wgsl", include_str!("../../shaders/exp.wgsl")),
    ("f16.wgsl", include_str!("../../shaders/f16.wgsl")),
    ("first_tile.wgsl", include_str!("../../shaders/first_tile.wgsl")),
    ("halves.wgsl", include_str!("../../shaders/halves.wgsl")),
    ("key_loop.wgsl", include_str!("../../shaders/key_loop.wgsl")),
    ("key_tile.wgsl", include_str!("../../shaders/key_tile.wgsl")),
    ("main.wgsl", include_str!("../../shaders/main.wgsl")),
    ("mask.wgsl", include_str!("../../shaders/mask.wgsl")),
    ("next_shown.wgsl", include_str!("../../shaders/next_shown.wgsl")),
    ("operands.wgsl", include_str!("../../shaders/operands.wgsl")),
    ("params.wgsl", include_str!("../../shaders/params.wgsl")),
    ("portable/blocks.wgsl", include_str!("../../shaders/portable/blocks.wgsl")),
    ("portable/d_bias.wgsl", include_str!("../../shaders/portable/d_bias.wgsl")),
    ("portable/d_kv.wgsl", include_str!("../../shaders/portable/d_kv.wgsl")),
    ("portable/d_q.wgsl", include_str!("../../shaders/portable/d_q.wgsl")),
    ("portable/exact_delta.wgsl", include_str!("../../shaders/portable/exact_delta.wgsl")),
    ("portable/forward.wgsl", include_str!("../../shaders/portable/forward.wgsl")),
    ("probability.wgsl", include_str!("../../shaders/probability.wgsl")),
    ("query_head.wgsl", include_str!("../../shaders/query_head.wgsl")),
    ("query_tile.wgsl", include_str!("../../shaders/query_tile.wgsl")),
    ("repairs.wgsl", include_str!("../../shaders/repairs.wgsl")),
    ("scale.wgsl", include_str!("../../shaders/scale.wgsl")),
    ("scores.wgsl", include_str!("../../shaders/scores.wgsl")),
    ("softmax.wgsl", include_str!("../../shaders/softmax.wgsl")),
    ("unit.wgsl", include_str!("../../shaders/unit.wgsl")),
    ("tiled.wgsl", include_str!("../../shaders/tiled.wgsl")),
    ("tile_work.wgsl", include_str!("../../shaders/tile_work.wgsl")),
    ("tiled_main.wgsl", include_str!("../../shaders/tiled_main.wgsl")),
    ("work.wgsl", include_str!("../../shaders/work.wgsl")),
];

/// The text of a kernel's own template, which includes others.
pub(crate) fn render(name: &str, template: &str, context: Value) -> Result<String> {
    environment()
        .and_then(|environment| environment.template_from_named_str(name, template))
        .and_then(|template| template.render(context))
        .map_err(not_composed)
        .and_then(|text| Ok(declare(&text)?.into_owned()))
}

fn not_composed(error: minijinja::Error) -> Error {
    Error::Gpu { during: "composing a shader", message: format!("{error:#}") }
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
    for &(name, source) in SOURCES {
        environment.add_template(name, source)?;
    }
    Ok(ENVIRONMENT.get_or_init(|| environment))
}
