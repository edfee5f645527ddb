{#- Chooses the micro-kernel that decodes. Each is an entry shader of its own. -#}
# if decode == "fragments"
# include "cache/decode_fragments.wgsl"
# elif decode == "cooperative"
# include "cache/decode_cooperative.wgsl"
# else
# include "cache/decode.wgsl"
# endif
