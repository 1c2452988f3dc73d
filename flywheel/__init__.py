"""From verdicts to the next config."""
