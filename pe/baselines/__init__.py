"""What PromptEmbedder is measured against: the frozen backbone, PEFT LoRA, and static learned prompts."""
