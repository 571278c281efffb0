"""Fast second-order merging of LoRA adapters: Fisher matrices in LoRA space, generalized eigenproblems, filters."""
