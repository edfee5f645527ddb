{#- What every kernel that has tiles begins with: extensions first, then what is declared for all of them. -#}
# if cooperative
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
# if cooperative
# include "halves.wgsl"
# endif
# include "exp.wgsl"
# if modified or hides
# include "scores.wgsl"
# endif
