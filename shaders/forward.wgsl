{#- Forward pass: one workgroup computes a tile of queries of one head against all key tiles that they see.

    The outer loop knows nothing of how scores are formed or summed: the micro-kernel does. -#}
# include "tiled.wgsl"
# include "softmax.wgsl"
# import micro_kernel ~ "/forward.wgsl" as micro
{{ micro.declare() }}

# include "tiled_main.wgsl"

  {{ micro.begin() }}
# include "key_loop.wgsl"
    {{ micro.scores() }}
    {{ micro.softmax() }}
    {{ micro.accumulate() }}
  }
  {{ micro.finish() }}
# if batch > 1
  }
# endif
}
