// seat_qkv
