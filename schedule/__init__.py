"""From a model description to a proven program."""
