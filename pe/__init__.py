"""PromptEmbedder: soft prompts written by a small language model turn a frozen one into a text embedder."""
