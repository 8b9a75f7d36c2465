"""From a trained model to measured candidates: sources, passes, gate, report."""
