{#- Follows the parameters of every kernel: its buffers, and where an operand of a head lies.
    Needs: Operand of params.wgsl; `bindings`. Declares: `params` and the other buffers, LOG2_E, LOWEST, operand_base. -#}
# for b in bindings
@group(0) @binding({{ b.slot }}) var<{{ b.space }}> {{ b.name }}: {{ b.type }};
# endfor

const LOG2_E: f32 = 1.4426950408889634;
// A number below every finite score. It stands for "hidden", and for the maximum of a row that has seen nothing.
const LOWEST: f32 = -3.4028234e38;

fn operand_base(operand: Operand, batch: u32, head: u32) -> u32 {
  return operand.offset + batch * operand.batch + head * operand.head;
}
