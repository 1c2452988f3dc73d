"""What an instruction is: its words, meaning, footprint and device code."""
