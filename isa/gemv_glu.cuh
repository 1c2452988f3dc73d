// gemv_glu
