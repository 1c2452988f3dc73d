// gemv_head
