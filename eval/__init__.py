"""From outputs to a verdict; never edited by a search."""
