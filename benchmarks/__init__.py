"""What fastarat is measured against, and the command that does it; run from a checkout, never installed."""
