"""Cross-entropy from the last hidden states: logits a tile at a time, and over tensor-parallel ranks in parts."""
