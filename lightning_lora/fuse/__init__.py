"""What is computed together: siblings, gated MLPs, norms, experts."""
