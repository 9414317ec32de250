"""What a training step and an embedder are measured by: memory, and how alike instructions are."""
