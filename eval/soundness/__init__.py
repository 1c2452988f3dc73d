"""How sound the validator is: an explorer, a trace checker, random programs and mutants that share no code with it."""
