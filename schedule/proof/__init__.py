"""The independent proof of a program: what docs/machine.md asks, shown about the object that runs."""
