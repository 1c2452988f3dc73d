// stretch_glu
