// stretch_attention
