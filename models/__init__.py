"""From a checkpoint to a model description, its weights and its eager source model."""
