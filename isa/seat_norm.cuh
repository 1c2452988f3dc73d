// seat_norm
