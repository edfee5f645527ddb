//! Templates: WGSL with Jinja marks.

use std::sync::OnceLock;

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, UndefinedBehavior, Value};

use crate::kernel::params::declare;
use crate::problem::error::{Error, Result};

/// Environment variable that names a folder for composed shaders. Without it no shader is written.
pub const DUMP_VARIABLE: &str = "SINK_ATTENTION_DUMP_SHADERS";

/// The texts that kernels share, each under the name that `include` and `import` use.
const SOURCES: &[(&str, &str)] = &[
    ("alibi.wgsl", include_str!("../../shaders/alibi.wgsl")),
    ("bf16.wgsl", include_str!("../../shaders/bf16.wgsl")),
    ("bias.wgsl", include_str!("../../shaders/bias.wgsl")),
    ("bindings.wgsl", include_str!("../../shaders/bindings.wgsl")),
    ("cache/decode_cooperative.wgsl", include_str!("../../shaders/cache/decode_cooperative.wgsl")),
    ("cache/decode_fragments.wgsl", include_str!("../../shaders/cache/decode_fragments.wgsl")),
    ("cache/decode.wgsl", include_str!("../../shaders/cache/decode.wgsl")),
    ("cache/group.wgsl", include_str!("../../shaders/cache/group.wgsl")),
    ("cache/range.wgsl", include_str!("../../shaders/cache/range.wgsl")),
    ("cache/rotary.wgsl", include_str!("../../shaders/cache/rotary.wgsl")),
    ("cache/scales.wgsl", include_str!("../../shaders/cache/scales.wgsl")),
    ("cache/tree.wgsl", include_str!("../../shaders/cache/tree.wgsl")),
    ("cooperative/columns.wgsl", include_str!("../../shaders/cooperative/columns.wgsl")),
    ("cooperative/d_kv.wgsl", include_str!("../../shaders/cooperative/d_kv.wgsl")),
    ("cooperative/d_q.wgsl", include_str!("../../shaders/cooperative/d_q.wgsl")),
    ("cooperative/exact_delta.wgsl", include_str!("../../shaders/cooperative/exact_delta.wgsl")),
    ("cooperative/fallback.wgsl", include_str!("../../shaders/cooperative/fallback.wgsl")),
    ("cooperative/forward.wgsl", include_str!("../../shaders/cooperative/forward.wgsl")),
    ("cooperative/fragments.wgsl", include_str!("../../shaders/cooperative/fragments.wgsl")),
    ("cooperative/mask.wgsl", include_str!("../../shaders/cooperative/mask.wgsl")),
    ("cooperative/scores.wgsl", include_str!("../../shaders/cooperative/scores.wgsl")),
    ("cooperative/units.wgsl", include_str!("../../shaders/cooperative/units.wgsl")),
    ("entry.wgsl", include_str!("../../shaders/entry.wgsl")),
    ("exp.wgsl", include_str!("../../shaders/exp.wgsl")),
    ("f16.wgsl", include_str!("../../shaders/f16.wgsl")),
    ("halves.wgsl", include_str!("../../shaders/halves.wgsl")),
    ("mask.wgsl", include_str!("../../shaders/mask.wgsl")),
    ("mask_tiles.wgsl", include_str!("../../shaders/mask_tiles.wgsl")),
    ("mask_words.wgsl", include_str!("../../shaders/mask_words.wgsl")),
    ("operands.wgsl", include_str!("../../shaders/operands.wgsl")),
    ("params.wgsl", include_str!("../../shaders/params.wgsl")),
    ("portable/blocks.wgsl", include_str!("../../shaders/portable/blocks.wgsl")),
    ("portable/d_bias.wgsl", include_str!("../../shaders/portable/d_bias.wgsl")),
    ("portable/d_kv.wgsl", include_str!("../../shaders/portable/d_kv.wgsl")),
    ("portable/d_q.wgsl", include_str!("../../shaders/portable/d_q.wgsl")),
    ("portable/exact_delta.wgsl", include_str!("../../shaders/portable/exact_delta.wgsl")),
    ("portable/forward.wgsl", include_str!("../../shaders/portable/forward.wgsl")),
    ("probability.wgsl", include_str!("../../shaders/probability.wgsl")),
    ("fallback.wgsl", include_str!("../../shaders/fallback.wgsl")),
    ("scale.wgsl", include_str!("../../shaders/scale.wgsl")),
    ("scores.wgsl", include_str!("../../shaders/scores.wgsl")),
    ("softcap.wgsl", include_str!("../../shaders/softcap.wgsl")),
    ("softmax.wgsl", include_str!("../../shaders/softmax.wgsl")),
    ("unit.wgsl", include_str!("../../shaders/unit.wgsl")),
    ("tiled.wgsl", include_str!("../../shaders/tiled.wgsl")),
    ("tile_loops.wgsl", include_str!("../../shaders/tile_loops.wgsl")),
    ("tile_main.wgsl", include_str!("../../shaders/tile_main.wgsl")),
    ("tile_work.wgsl", include_str!("../../shaders/tile_work.wgsl")),
    ("work.wgsl", include_str!("../../shaders/work.wgsl")),
];

/// The text of a kernel's own template, which includes others.
pub(crate) fn render(name: &str, template: &str, context: Value) -> Result<String> {
    environment()
        .and_then(|environment| environment.template_from_named_str(name, template))
        .and_then(|template| template.render(context))
        .map_err(not_composed)
        .and_then(|text| Ok(tidy(&declare(&text)?)))
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
    let syntax = SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .keep_trailing_newline(true)
        .line_statement_prefix("# ")
        .build()?;
    environment.set_syntax(syntax);
    // Rows and columns that a thread holds, as pairs: one loop of a template visits all of them.
    environment.add_function("pairs", |rows: u32, columns: u32| -> Vec<[u32; 2]> {
        (0..rows).flat_map(|row| (0..columns).map(move |column| [row, column])).collect()
    });
    environment.set_undefined_behavior(UndefinedBehavior::Strict);
    for &(name, source) in SOURCES {
        environment.add_template(name, source)?;
    }
    Ok(ENVIRONMENT.get_or_init(|| environment))
}

/// The same program in a form for dumps, labels and snapshots: two spaces for each level of brackets, one blank line between items, and
/// within functions blank lines before comments only. The indentation of fragments and macros therefore does not matter.
///
/// The text has no block comments and no brackets within literals.
fn tidy(text: &str) -> String {
    let mut tidied = String::with_capacity(text.len());
    // One entry for each open bracket: the number of its line.
    let mut open: Vec<usize> = Vec::new();
    let (mut was_blank, mut after_opening) = (false, true);
    let mut previous_line = None;
    for (number, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() {
            was_blank = true;
            continue;
        }
        let code = line.split("//").next().unwrap_or_default();
        let is_comment = code.is_empty();
        // Brackets that close before anything else in the line belong to the level outside.
        let closing = code.chars().take_while(|c| matches!(c, '}' | ')' | ']')).count();
        let outer = &open[..open.len().saturating_sub(closing)];
        let levels = outer.iter().zip(outer.iter().skip(1)).filter(|(a, b)| a != b).count() + outer.len().min(1);
        let gap = if outer.is_empty() && closing == 0 {
            begins_after(&mut previous_line, line, was_blank)
        } else {
            was_blank && is_comment && !after_opening
        };
        if gap && !tidied.is_empty() {
            tidied.push('\n');
        }
        (0..levels).for_each(|_| tidied.push_str("  "));
        tidied.push_str(line);
        tidied.push('\n');
        for c in code.chars() {
            match c {
                '{' | '(' | '[' => open.push(number),
                '}' | ')' | ']' => {
                    open.pop();
                }
                _ => {}
            }
        }
        (was_blank, after_opening) = (false, code.trim_end().ends_with('{'));
    }
    tidied
}

/// A line outside of all brackets. Comments belong to the item that follows them.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Line {
    Comment,
    /// A constant, a variable, an alias or an extension.
    Declaration,
    /// The first line of a function or a structure.
    Block,
}

/// Whether a blank line stands before a line outside of all brackets.
fn begins_after(previous: &mut Option<Line>, line: &str, was_blank: bool) -> bool {
    let kind = match line.split_whitespace().next() {
        Some(word) if word.starts_with("//") => Line::Comment,
        Some("fn" | "struct" | "@compute") => Line::Block,
        _ => Line::Declaration,
    };
    match (previous.replace(kind), kind) {
        (None, _) => false,
        (Some(Line::Comment), _) => was_blank && kind == Line::Comment,
        // The attributes of the entry point are on the line above it.
        (Some(Line::Block), _) => !line.starts_with("fn main"),
        (Some(Line::Declaration), Line::Declaration) => was_blank,
        (Some(Line::Declaration), _) => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn composed_text_is_tidy() {
        let text = "
enable f16;
// Of B.
const B: u32 = 1u;


const C: u32 = 2u;
fn f(
x: u32,
      ) -> u32 {

let y = g(x, vec2<u32>(
1u, // not {
2u));


      // A comment.
if (y > 0u) {
return 1u;
}

return y;
}
@compute @workgroup_size(1)
fn main() {}
";
        let tidied = "\
enable f16;

// Of B.
const B: u32 = 1u;

const C: u32 = 2u;

fn f(
  x: u32,
) -> u32 {
  let y = g(x, vec2<u32>(
    1u, // not {
    2u));

  // A comment.
  if (y > 0u) {
    return 1u;
  }
  return y;
}

@compute @workgroup_size(1)
fn main() {}
";
        assert_eq!(tidy(text), tidied);
        assert_eq!(tidy(tidied), tidied);
    }

    #[test]
    fn pairs_go_row_by_row() {
        let text = "# for r, n in pairs(2, 3)\n{{ r }}{{ n }};\n# endfor\n";
        let rendered = render("pairs", text, Value::UNDEFINED).unwrap();
        assert_eq!(rendered.split_whitespace().collect::<String>(), "00;01;02;10;11;12;");
    }
}
