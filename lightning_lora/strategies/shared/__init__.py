"""What the strategies for Trainer and Fabric have in common."""
