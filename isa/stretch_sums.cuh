// stretch_sums
