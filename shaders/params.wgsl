{#- Opens every kernel: the numbers that change between calls (the fields that the text reads, see src/kernel/params.rs), its buffers, and where the
    work of a workgroup lies. -#}
// PARAMS

{% include "bindings.wgsl" %}
{% if order %}
{% include "work.wgsl" %}
{% endif %}
