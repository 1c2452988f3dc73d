// rmsnorm
