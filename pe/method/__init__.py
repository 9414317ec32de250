"""The method: who writes soft prompts, and how a frozen decoder reads texts and prompts as packed rows."""
