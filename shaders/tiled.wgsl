{#- The beginning of every kernel with tiles: extensions first, then the declarations that all of these kernels share.
    Needs: the context of a variant. Declares: all declarations of the included fragments. -#}
# if needs_matrices
enable f16;
enable wgpu_cooperative_matrix;
# endif
# include "params.wgsl"
# include "tile_work.wgsl"
# include "mask.wgsl"
# if fallback_rows
# include "fallback.wgsl"
# endif
# include "operands.wgsl"
# if column_scales
# include "scale.wgsl"
# endif
# if multiplies_halves
# include "halves.wgsl"
# endif
# include "exp.wgsl"
# if modified or hides
# include "scores.wgsl"
# endif
