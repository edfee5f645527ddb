{#- Opens every kernel: the numbers that change between calls (the fields that the text reads, see src/kernel/params.rs), its buffers, and
    where the work of a workgroup lies.
    Needs: `bindings`, `order`. Declares: Operand, Params, and what bindings.wgsl declares; with an order also what work.wgsl declares. -#}
// PARAMS

# include "bindings.wgsl"

# if order
# include "work.wgsl"
# endif
