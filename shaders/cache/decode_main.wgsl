{#- A few queries against many cached keys. -#}
{% if decode_cooperative %}
{% include "cache/decode_cooperative.wgsl" %}
{% else %}
{% include "cache/decode.wgsl" %}
{% endif %}
