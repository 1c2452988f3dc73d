// swiglu
